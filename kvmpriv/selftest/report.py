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
}


def ktap_version() -> str:
    """The first line, which can be written before the tests are known."""
    return "KTAP version 1\n"


def ktap_plan(plan: Plan, note: str = "") -> str:
    """The number of tests, the kernel, and a note about it."""
    about = "".join(f"# {line}\n" for line in (_host(plan.host), note) if line)
    return f"1..{len(plan.tests)}\n{about}"


def ktap_result(number: int, result: Result, sentences: dict[str, str]) -> str:
    """The lines of a test: for a failure its rules and its output, then how it has ended."""
    lines: list[str] = []
    if result.result in FAILURES:
        lines += _rules(result, sentences)
        lines += filter(None, [result.about, *result.detail.splitlines()])
    end = f"{'not ok' if result.result in FAILURES else 'ok'} {number} {_name(result.test)}"
    why = f"{_DIRECTIVES.get(result.result, '')}{result.message}".strip()
    comments = [f"# {plain(line)}".rstrip() for line in lines]
    return "\n".join([*comments, f"{end} # {_name(why)}" if why else end]) + "\n"


def ktap_end(run: Run) -> str:
    """Each rule's result, and the sums in the form of the kernel's own tests."""
    lines = [f"# rule {rule.rule}: {_of_rule(rule)}" for rule in run.rules]
    if run.stopped:
        lines.append(ktap_bail_out(run.stopped).rstrip())
    totals = run.totals
    crashed = totals[CRASHED] + totals[TIMEOUT]
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


# -- a table ---------------------------------------------------------------------------------------


def text(run: Run, note: str = "", *, colour: bool = False) -> str:
    """The kernel and a note about it; each failure; a line a rule; what is missing; the sums."""
    paint = painter(colour)
    lines = [paint(BOLD, _host(run.host)), *filter(None, [note]), ""]
    for result in run.results:
        if result.result in FAILURES:
            lines.append(f"{paint(_COLOURS[result.result], result.result.upper())} {result.test}")
            about = [*_rules(result, run.sentences), result.about, result.message]
            lines += [f"  {plain(line)}" for line in about if line]
            lines += [f"    {plain(line)}".rstrip() for line in result.detail.splitlines()]
            lines.append("")
    rules = run.rules
    wide = max((len(rule.rule) for rule in rules), default=0)
    for rule in rules:
        badge = paint(_COLOURS[rule.result], f"{rule.result:{_WIDTH}}")
        lines.append(f"{badge}  {rule.rule:{wide}}  {plain(rule.message)}".rstrip())
    missing = Counter(result.message for result in run.results if result.result == SKIPPED)
    if missing:
        lines += ["", paint(BOLD, "Skipped, for lack of")]
        lines += [f"  {plain(why)} ({_count(n, 'test')})" for why, n in missing.most_common()]
    lines += ["", *_sums(run)]
    return "\n".join(lines) + "\n"


_WIDTH = len(KNOWN_DEFECT)


def _sums(run: Run) -> Iterator[str]:
    rules = Counter(rule.result for rule in run.rules)
    yield f"{_count(len(run.rules), 'rule')}: {_list(rules)}"
    yield f"{_count(len(run.results), 'test')}: {_list(run.totals)}, in {run.seconds:.1f} s"
    if run.stopped:
        yield f"not complete, {len(run.results)} of {run.planned} tests: {plain(run.stopped)}"


# -- side by side ----------------------------------------------------------------------------------


def compare(
    runs: tuple[Run, Run], names: tuple[str, str], *, colour: bool = False
) -> tuple[str, bool]:
    """A line for each rule with both results, differences first; and whether there are any."""
    paint = painter(colour)
    rules = [{rule.rule: rule for rule in run.rules} for run in runs]
    every = sorted({*rules[0], *rules[1]})
    wide = max((len(name) for name in every), default=0)
    lines = []
    for letter, name, run in zip("ab", names, runs, strict=True):
        lines.append(paint(BOLD, f"{letter}: {_host(run.host)} ({plain(name)})"))
        if run.stopped:
            lines.append(f"   not complete: {plain(run.stopped)}")
    if runs[0].selection != runs[1].selection:
        lines.append("the two runs selected different tests: a rule may be absent only for that")
    lines.append("")
    rows: dict[bool, list[str]] = {True: [], False: []}
    for name in every:
        pair = [table.get(name) for table in rules]
        results = [rule.result if rule else ABSENT for rule in pair]
        differ = results[0] != results[1]
        cells = "  ".join(paint(_COLOURS.get(said, DIM), f"{said:{_WIDTH}}") for said in results)
        whys = "; ".join(
            f"{letter}: {plain(rule.message)}"
            for letter, rule in zip("ab", pair, strict=True)
            if differ and rule and rule.message
        )
        row = f"{'!' if differ else ' '} {cells}  {name:{wide}}  {whys}"
        rows[differ].append(row.rstrip())
    head = f"  {'a':{_WIDTH}}  {'b':{_WIDTH}}  rule"
    lines += [head, *rows[True], *rows[False], ""]
    different = len(rows[True])
    lines.append(
        f"{different} of {_count(len(every), 'rule')} differ{'s' if different == 1 else ''}"
        if different
        else f"{_count(len(every), 'rule')}, no difference"
    )
    return "\n".join(lines) + "\n", bool(different)


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
    order: Iterable[str] = (PASSED, *FAILURES, SKIPPED)
    return ", ".join(f"{counts[name]} {name}" for name in order if counts.get(name)) or "none"
