"""A run as KTAP, as a table, and beside another."""

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
    Rule,
    Run,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .runner import Plan

__all__ = ["compare", "ktap_end", "ktap_head", "ktap_result", "text"]

_COLOURS = {
    PASSED: GREEN,
    FAILED: RED,
    CRASHED: RED,
    TIMEOUT: RED,
    KNOWN_DEFECT: MAGENTA,
    SKIPPED: YELLOW,
}
#: In a comparison: the run has no test of the rule.
ABSENT = "absent"


# -- KTAP: Documentation/dev-tools/ktap.rst --------------------------------------------------------

#: What comes before the message: KTAP's own words where it has one.
_DIRECTIVES = {
    SKIPPED: "SKIP ",
    TIMEOUT: "TIMEOUT ",
    CRASHED: "ERROR ",
    KNOWN_DEFECT: "known defect: ",
}


def ktap_head(plan: Plan, note: str = "") -> str:
    """The version, the plan, what is tested, and a note on that."""
    about = "".join(f"# {line}\n" for line in (_host(plan.host), note) if line)
    return f"KTAP version 1\n1..{len(plan.tests)}\n{about}"


def ktap_result(number: int, result: Result) -> str:
    """The lines of a test: what it has to say, then how it has ended."""
    said = result.result in FAILURES and (result.about, *result.detail.splitlines())
    lines = [f"# {plain(line)}".rstrip() for line in said or () if line]
    end = f"{'not ok' if result.result in FAILURES else 'ok'} {number} {_name(result.test)}"
    why = f"{_DIRECTIVES.get(result.result, '')}{result.message}".strip()
    return "\n".join([*lines, f"{end} # {_name(why)}" if why else end]) + "\n"


def ktap_end(run: Run) -> str:
    """Each rule's result, and the sums as the kernel's own tests print them."""
    lines = [f"# rule {rule.rule}: {_of_rule(rule)}" for rule in run.rules]
    if run.stopped:
        lines.append(f"Bail out! {plain(run.stopped)}")
    totals = run.totals
    crashed = totals[CRASHED] + totals[TIMEOUT]
    failed = totals[FAILED] + totals[KNOWN_DEFECT]
    lines.append(
        f"# Totals: pass:{totals[PASSED]} fail:{failed} xfail:0 xpass:0 "
        f"skip:{totals[SKIPPED]} error:{crashed}"
    )
    return "\n".join(lines) + "\n"


def _name(words: str) -> str:
    """Without what would end a description, or a line."""
    return plain(words).replace("#", "%")


# -- a table ---------------------------------------------------------------------------------------


def text(run: Run, note: str = "", *, colour: bool = False) -> str:
    """On what, with a note on that; what failed and why, rule x result, what is missing, sums."""
    paint = painter(colour)
    lines = [paint(BOLD, _host(run.host)), *filter(None, [note]), ""]
    for result in run.results:
        if result.result in FAILURES:
            lines.append(f"{paint(_COLOURS[result.result], result.result.upper())} {result.test}")
            lines += [f"  {plain(line)}" for line in (result.about, result.message) if line]
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
    """rule x (a, b), the differences first; and whether there are any."""
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
        lines.append("not selected in the same way: a rule may be absent for that alone")
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


# -- words -----------------------------------------------------------------------------------------


def _host(host: dict[str, object]) -> str:
    return plain("Linux {release} {machine}, {verdict}; kvmpriv {kvmpriv}".format(**host))


def _of_rule(rule: Rule) -> str:
    return plain(f"{rule.result} ({_list(rule.tests)})")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _list(counts: dict[str, int]) -> str:
    order: Iterable[str] = (PASSED, *FAILURES, SKIPPED)
    return ", ".join(f"{counts[name]} {name}" for name in order if counts.get(name)) or "none"
