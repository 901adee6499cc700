"""A run as KTAP, as a table, and compared with another run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..terminal import BOLD, DIM, GREEN, MAGENTA, RED, YELLOW, painter, plain
from .records import (
    CRASHED,
    FAILED,
    FAILURES,
    KNOWN_DEFECT,
    PASSED,
    SHORTAGE,
    SKIPPED,
    TIMEOUT,
    Result,
    RuleResult,
    Run,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .documents import HostAbout
    from .runner import Plan

__all__ = [
    "compare",
    "heading",
    "ktap_bail_out",
    "ktap_end",
    "ktap_plan",
    "ktap_result",
    "ktap_version",
    "text",
]

_COLOURS = {
    PASSED: GREEN,
    FAILED: RED,
    CRASHED: RED,
    TIMEOUT: RED,
    KNOWN_DEFECT: MAGENTA,
    SHORTAGE: YELLOW,
    SKIPPED: YELLOW,
}
#: In a comparison: the run has no test of this rule.
ABSENT = "absent"


# -- KTAP: Documentation/dev-tools/ktap.rst --------------------------------------------------------

#: What precedes the message: KTAP's directive where it has one.
_DIRECTIVES = {
    SKIPPED: "SKIP ",
    TIMEOUT: "TIMEOUT ",
    CRASHED: "ERROR ",
    KNOWN_DEFECT: "known defect: ",
    SHORTAGE: "ERROR shortage of ",
}


def ktap_version() -> str:
    """The first line, which can be written before the tests are known."""
    return "KTAP version 1\n"


def ktap_plan(plan: Plan, note: str = "") -> str:
    """The number of tests, the kernel, and a note about it."""
    about = "".join(f"# {line}\n" for line in (_host(plan.host), note) if line)
    return f"1..{len(plan.tests)}\n{about}"


def ktap_result(number: int, result: Result, sentences: dict[str, str]) -> str:
    """The lines of a test: for a failure its output; then how it has ended, with its rules.

    The description is the test's id, which is unique, and after " - " the rules with their
    sentences.
    """
    lines: list[str] = []
    not_ok = result.result in (*FAILURES, SHORTAGE)
    if not_ok:
        lines += filter(None, [result.about, *result.detail.splitlines()])
    rules = "; ".join(
        f"{name}: {sentences[name]}" if sentences.get(name) else name for name in result.rules
    )
    name = " - ".join(filter(None, [result.test, rules]))
    end = f"{'not ok' if not_ok else 'ok'} {number} {_name(name)}"
    why = f"{_DIRECTIVES.get(result.result, '')}{result.message}".strip()
    comments = [f"# {plain(line)}".rstrip() for line in lines]
    return "\n".join([*comments, f"{end} # {_name(why)}" if why else end]) + "\n"


def ktap_end(run: Run) -> str:
    """Each rule's result, and the sums in the form of the kernel's own tests."""
    lines = [f"# rule {rule.rule}: {_of_rule(rule)}" for rule in run.rules]
    if run.stopped:
        lines.append(ktap_bail_out(run.stopped).rstrip())
    totals = run.totals
    crashed = totals[CRASHED] + totals[TIMEOUT] + totals[SHORTAGE]
    failed = totals[FAILED] + totals[KNOWN_DEFECT]
    lines.append(
        f"# Totals: pass:{totals[PASSED]} fail:{failed} xfail:0 xpass:0 "
        f"skip:{totals[SKIPPED]} error:{crashed}"
    )
    return "\n".join(lines) + "\n"


def ktap_bail_out(why: str) -> str:
    """The line that says why there are no more results."""
    return f"Bail out! {plain(' '.join(why.split()))}\n"


def _name(words: str) -> str:
    """Without the characters that end a description or a line."""
    return plain(words).replace("#", "%")


# -- text ----------------------------------------------------------------------------------------


def heading(host: HostAbout | None, note: str = "", *, colour: bool = False) -> str:
    """The kernel, and a note about it."""
    return "\n".join([painter(colour)(BOLD, _host(host)), *filter(None, [note])]) + "\n"


def text(run: Run, *, colour: bool = False, verbose: bool = False) -> str:
    """Each failure; a line for each rule that was tested; why others were not; the sums.

    `verbose` gives the rules that were skipped a line each, too.
    """
    paint = painter(colour)
    lines = [""]
    for result in run.results:
        if result.result in FAILURES:
            lines.append(f"{paint(_COLOURS[result.result], result.result.upper())} {result.test}")
            about = [*_rules(result, run.sentences), result.about, result.message]
            lines += [f"  {plain(line)}" for line in about if line]
            lines += [f"    {plain(line)}".rstrip() for line in result.detail.splitlines()]
            lines.append("")
    shown = [rule for rule in run.rules if verbose or rule.result != SKIPPED]
    wide = max((len(rule.rule) for rule in shown), default=0)
    for rule in shown:
        badge = paint(_COLOURS[rule.result], f"{rule.result:{_WIDTH}}")
        lines.append(f"{badge}  {rule.rule:{wide}}  {plain(rule.message)}".rstrip())
    if shown:
        lines.append("")
    for result_, title in (
        (SHORTAGE, "Not tested, for a shortage of"),
        (SKIPPED, "Skipped, for lack of"),
    ):
        whys = Counter(result.message for result in run.results if result.result == result_)
        if whys:
            lines.append(paint(BOLD, title))
            lines += [f"  {plain(why)} ({_count(n, 'test')})" for why, n in whys.most_common()]
            lines.append("")
    lines += _sums(run, verbose=verbose)
    return "\n".join(lines) + "\n"


_WIDTH = len(KNOWN_DEFECT)


def _sums(run: Run, *, verbose: bool) -> Iterator[str]:
    rules = Counter(rule.result for rule in run.rules)
    hint = "" if verbose or not rules[SKIPPED] else " (-v lists those that were skipped)"
    yield f"{_count(len(run.rules), 'rule')}: {_list(rules)}{hint}"
    yield f"{_count(len(run.results), 'test')}: {_list(run.totals)}, in {run.seconds:.1f} s"
    if run.stopped:
        yield f"not complete, {len(run.results)} of {run.planned} tests: {plain(run.stopped)}"


# -- side by side ----------------------------------------------------------------------------------


def compare(
    runs: tuple[Run, Run], names: tuple[str, str], *, colour: bool = False
) -> tuple[str, bool]:
    """A line for each rule whose results differ, the number of equal ones; whether any differ."""
    paint = painter(colour)
    lines = []
    for letter, name, run in zip("ab", names, runs, strict=True):
        lines.append(paint(BOLD, f"{letter}: {_host(run.host)} ({plain(name)})"))
        if run.stopped:
            lines.append(f"   not complete: {plain(run.stopped)}")
    if runs[0].selection != runs[1].selection:
        lines.append("the two runs selected different tests: a rule may be absent only for that")
    lines.append("")
    tables = [{rule.rule: rule for rule in run.rules} for run in runs]
    pairs = {
        name: [table[name].result if name in table else ABSENT for table in tables]
        for name in sorted({*tables[0], *tables[1]})
    }
    equal = Counter(a for a, b in pairs.values() if a == b)
    differing = [name for name, (a, b) in pairs.items() if a != b]
    wide = max((len(name) for name in differing), default=0)
    if differing:
        lines.append(paint(BOLD, f"{'a':{_WIDTH}}  {'b':{_WIDTH}}  rule"))
    for name in differing:
        cells = "  ".join(paint(_COLOURS.get(end, DIM), f"{end:{_WIDTH}}") for end in pairs[name])
        whys = "; ".join(
            f"{letter}: {plain(table[name].message)}"
            for letter, table in zip("ab", tables, strict=True)
            if name in table and table[name].message
        )
        lines.append(f"{cells}  {name:{wide}}  {whys}".rstrip())
    every = _count(len(pairs), "rule")
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        lines += ["", f"{len(differing)} of {every} {verb}"]
    else:
        lines.append(f"{every}, no difference")
    if equal:
        lines.append(f"{_count(equal.total(), 'rule')} with equal results: {_list(equal)}")
    return "\n".join(lines) + "\n", bool(differing)


# -- parts -----------------------------------------------------------------------------------------


def _host(host: HostAbout | None) -> str:
    if host is None:
        return ""
    return plain("Linux {release} {machine}, {verdict}; kvmpriv {kvmpriv}".format(**host))


def _rules(result: Result, sentences: dict[str, str]) -> list[str]:
    """The rules of a test, with their sentences where the suite has a table of them."""
    return [f"{name}: {sentences[name]}" for name in result.rules if name in sentences]


def _of_rule(rule: RuleResult) -> str:
    return plain(f"{rule.result} ({_list(rule.tests)})")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _list(counts: dict[str, int]) -> str:
    order: Iterable[str] = (PASSED, *FAILURES, SHORTAGE, SKIPPED)
    return ", ".join(f"{counts[name]} {name}" for name in order if counts.get(name)) or "none"
