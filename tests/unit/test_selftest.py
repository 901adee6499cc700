"""``kvmpriv selftest``: what follows from the results of tests, and how it is shown."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest

import kvmpriv.selftest
from kvmpriv import cli
from kvmpriv.exit_status import ExitStatus
from kvmpriv.selftest import report
from kvmpriv.selftest.documents import HostAbout, Selection
from kvmpriv.selftest.records import (
    CRASHED,
    FAILED,
    KNOWN_DEFECT,
    PASSED,
    SHORTAGE,
    SKIPPED,
    TIMEOUT,
    Planned,
    Result,
    Run,
)
from kvmpriv.selftest.runner import Plan

from .ktap import parse

SCHEMA = json.loads((Path(kvmpriv.selftest.__file__).parent / "schema.json").read_text())
HOST: HostAbout = {
    "release": "6.1.0",
    "version": "#1",
    "machine": "x86_64",
    "kvmpriv": "0.1.0",
    "verdict": "none",
    "abis": [],
}
SELECTION: Selection = {"rules": [], "expression": "", "dangerous": False, "timeout": 120.0}


# -- records ---------------------------------------------------------------------------------------


def made(*ends: tuple[str, str], stopped: str = "", **changes: Any) -> Run:
    """A run with one test for each pair (rules separated by blanks, result)."""
    results = tuple(
        Result(
            f"test_it.py::test_{number}", tuple(rules.split()), "It holds.", result, f"why {number}"
        )
        for number, (rules, result) in enumerate(ends)
    )
    host = cast("HostAbout", {**HOST, **changes})
    names = sorted({name for result in results for name in result.rules})
    sentences = {name: f"{name} holds." for name in names}
    return Run(host, SELECTION, len(ends) + bool(stopped), results, 1.5, stopped, sentences)


def document(run: Run) -> Any:
    """The document as JSON, validated by the schema."""
    found = json.loads(json.dumps(run.to_json()))
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    return found


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([PASSED], PASSED),
        ([SKIPPED], SKIPPED),
        ([PASSED, SKIPPED], PASSED),
        ([SKIPPED, FAILED, PASSED], FAILED),
        ([PASSED, CRASHED], FAILED),
        ([SKIPPED, TIMEOUT], FAILED),
        ([PASSED, KNOWN_DEFECT, SKIPPED], KNOWN_DEFECT),
        ([KNOWN_DEFECT, FAILED], FAILED),
        ([PASSED, SHORTAGE], SHORTAGE),
        ([SHORTAGE, SKIPPED], SHORTAGE),
        ([SHORTAGE, KNOWN_DEFECT], KNOWN_DEFECT),
    ],
)
def test_a_rules_result(results: list[str], expected: str) -> None:
    run = made(*[("a.b", result) for result in results], ("other.rule", PASSED))
    first, second = run.rules
    assert (first.rule, first.result) == ("a.b", expected)
    assert sum(first.tests.values()) == len(results)
    assert (second.rule, second.result) == ("other.rule", PASSED)


def test_a_rules_message() -> None:
    run = made(("a.b", PASSED), ("a.b c.d", SKIPPED), ("c.d", FAILED), ("c.d", FAILED))
    assert [rule.message for rule in run.rules] == ["not all: why 1", "why 2"]


@pytest.mark.parametrize(
    ("results", "stopped", "status"),
    [
        ([PASSED, SKIPPED], "", 0),
        ([SKIPPED, SKIPPED], "", ExitStatus.ALL_SKIPPED),
        ([PASSED, FAILED], "", ExitStatus.NEGATIVE),
        ([PASSED, CRASHED], "", ExitStatus.NEGATIVE),
        ([PASSED, TIMEOUT], "", ExitStatus.NEGATIVE),
        ([PASSED, KNOWN_DEFECT], "", ExitStatus.NEGATIVE),
        ([PASSED, SHORTAGE, SKIPPED], "", ExitStatus.UNABLE),
        ([SHORTAGE, FAILED], "", ExitStatus.NEGATIVE),
        ([PASSED], "lost", ExitStatus.UNABLE),
        ([], "lost", ExitStatus.UNABLE),
        ([PASSED, FAILED], "lost", ExitStatus.NEGATIVE),
    ],
)
def test_exit_status(results: list[str], stopped: str, status: int) -> None:
    run = made(*[("a.b", result) for result in results], stopped=stopped)
    assert run.exit_status == status


def test_documents_come_back() -> None:
    run = made(
        ("a.b", PASSED),
        ("a.b c.d", KNOWN_DEFECT),
        ("e.f", TIMEOUT),
        ("g.h", SHORTAGE),
        stopped="interrupted",
    )
    found = document(run)
    assert Run.from_json(found) == run
    assert found["totals"]["tests"] == {
        "failed": 0, "crashed": 0, "timeout": 1, "known defect": 1, "shortage": 1, "passed": 1,
        "skipped": 0,
    }  # fmt: skip
    assert found["totals"]["rules"] == {
        "failed": 1, "known defect": 2, "shortage": 1, "passed": 0, "skipped": 0,
    }  # fmt: skip


def test_the_schema_refuses() -> None:
    """The schema refuses wrong documents."""
    good = document(made(("a.b", PASSED)))
    changes: tuple[Callable[[Any], object], ...] = (
        lambda d: d.update(schema_version=2),
        lambda d: d.update(more=1),
        lambda d: d.pop("host"),
        lambda d: d["tests"][0].update(result="odd"),
        lambda d: d["tests"][0].update(rules=["no rule"]),
        lambda d: d["rules"][0]["tests"].update(odd=1),
        lambda d: d["rules"][0].pop("sentence"),
        lambda d: d["totals"]["tests"].pop("skipped"),
    )
    for change in changes:
        bad = copy.deepcopy(good)
        change(bad)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, SCHEMA, cls=jsonschema.Draft202012Validator)


# -- KTAP ------------------------------------------------------------------------------------------


def test_ktap_of_each_result() -> None:
    results = [
        Result("t::passes", ("a.b",), "About.", PASSED),
        Result("t::skips", ("a.b",), "About.", SKIPPED, "a device: none"),
        Result(
            "t::fails[#1]", ("c.d",), "About it.", FAILED, "assert 1 == #2\x1b", "E 1\n\n\tE\xa02"
        ),
        Result("t::hangs", ("c.d",), "", TIMEOUT, "killed"),
        Result("t::dies", (), "", CRASHED, "signal 11"),
        Result("t::known", ("e.f", "c.d"), "", KNOWN_DEFECT, "name: text"),
        Result("t::starved", ("e.f",), "About.", SHORTAGE, "descriptors: few", "OSError: 24"),
    ]
    sentences = {"a.b": "It holds.", "c.d": "It is #so."}
    plan = Plan(tuple(Planned(*result[:3]) for result in results), HOST, sentences)
    run = Run(HOST, SELECTION, len(results), tuple(results), 1, "")
    lines = [
        report.ktap_result(at, result, sentences) for at, result in enumerate(results, start=1)
    ]
    head = report.ktap_version() + report.ktap_plan(plan)
    found = parse(head + "".join(lines) + report.ktap_end(run))
    assert found.plan == 7
    assert found.tests == {
        "t::passes": (True, ""),
        "t::skips": (True, "SKIP a device: none"),
        "t::fails[%1]": (False, r"assert 1 == %2\x1b"),
        "t::hangs": (False, "TIMEOUT killed"),
        "t::dies": (False, "ERROR signal 11"),
        "t::known": (False, "known defect: name: text"),
        "t::starved": (False, "ERROR shortage of descriptors: few"),
    }
    assert found.rules == {
        "t::passes": "a.b: It holds.",
        "t::skips": "a.b: It holds.",
        "t::fails[%1]": "c.d: It is %so.",
        "t::hangs": "c.d: It is %so.",
        "t::dies": "",
        "t::known": "e.f; c.d: It is %so.",
        "t::starved": "e.f",
    }
    said = ["# About it.", "# E 1", r"# \tE\xa02"]
    assert lines[2].splitlines()[:-1] == said
    assert lines[6].splitlines()[:-1] == ["# About.", "# OSError: 24"]
    assert found.diagnostics[-4:] == [
        "rule a.b: passed (1 passed, 1 skipped)",
        "rule c.d: failed (1 failed, 1 timeout, 1 known defect)",
        "rule e.f: known defect (1 known defect, 1 shortage)",
        "Totals: pass:1 fail:2 xfail:0 xpass:0 skip:1 error:3",
    ]


# -- text ------------------------------------------------------------------------------------------


def test_heading() -> None:
    assert report.heading(HOST) == "Linux 6.1.0 x86_64, none; kvmpriv 0.1.0\n"
    assert report.heading(HOST, "a note") == "Linux 6.1.0 x86_64, none; kvmpriv 0.1.0\na note\n"
    assert report.heading(HOST, colour=True).startswith("\x1b[1mLinux")


def rows(lines: list[str]) -> list[list[str]]:
    """The lines of the table of rules."""
    return [
        line.split(maxsplit=2)
        for line in lines
        if re.match(r"(passed|skipped|failed|shortage) ", line)
    ]


def test_text() -> None:
    """A rule that was skipped has no line of its own, but a reason; with `verbose` it has."""
    run = made(
        ("a.b", PASSED),
        ("a.b c.d", SKIPPED),
        ("e.f", FAILED),
        ("g.h", KNOWN_DEFECT),
        ("i.j", SHORTAGE),
    )
    lines = report.text(run).splitlines()
    assert "FAILED test_it.py::test_2" in lines
    assert "KNOWN DEFECT test_it.py::test_3" in lines
    at = lines.index("FAILED test_it.py::test_2")
    assert lines[at + 1 : at + 4] == ["  e.f: e.f holds.", "  It holds.", "  why 2"]
    table = [
        ["passed", "a.b", "not all: why 1"],
        ["failed", "e.f", "why 2"],
        ["shortage", "i.j", "why 4"],
    ]
    assert rows(lines) == table
    assert "known defect  g.h  why 3" in lines
    sums = "1 passed, 1 failed, 1 known defect, 1 shortage, 1 skipped"
    assert lines[-8:] == [
        "Not tested, for a shortage of",
        "  why 4 (1 test)",
        "",
        "Skipped, for lack of",
        "  why 1 (1 test)",
        "",
        f"5 rules: {sums} (-v lists those that were skipped)",
        f"5 tests: {sums}, in 1.5 s",
    ]
    assert "\x1b" not in report.text(run)
    plain = re.sub(r"\x1b\[\d+m", "", report.text(run, colour=True))
    assert plain == report.text(run)
    assert report.text(run, colour=True) != plain
    verbose = report.text(run, verbose=True).splitlines()
    assert rows(verbose) == [table[0], ["skipped", "c.d", "why 1"], *table[1:]]
    assert verbose[-2].endswith("1 skipped")


def test_skipped_rules_are_a_line_for_each_reason() -> None:
    """400 rules that were skipped for two reasons are two lines; the most frequent comes first."""
    skipped = tuple(
        Result(f"t::{n}", (f"a.r{n}",), "", SKIPPED, "root: we are not" if n % 4 else "memory: 1")
        for n in range(400)
    )
    run = Run(HOST, SELECTION, 400, skipped, 1.0)
    assert report.text(run).splitlines() == [
        "",
        "Skipped, for lack of",
        "  root: we are not (300 tests)",
        "  memory: 1 (100 tests)",
        "",
        "400 rules: 400 skipped (-v lists those that were skipped)",
        "400 tests: 400 skipped, in 1.0 s",
    ]
    assert len(rows(report.text(run, verbose=True).splitlines())) == 400


def test_text_of_a_run_that_was_stopped() -> None:
    last = report.text(made(("a.b", PASSED), stopped="interrupted")).splitlines()[-1]
    assert last == "not complete, 1 of 2 tests: interrupted"


# -- side by side ----------------------------------------------------------------------------------


def test_compare() -> None:
    """The rules whose results differ have a line each, all others together one."""
    a = made(("a.b", PASSED), ("c.d", SKIPPED), ("e.f", FAILED), ("i.j", SKIPPED), release="6.1")
    b = made(
        ("a.b", PASSED),
        ("c.d", PASSED),
        ("g.h", FAILED),
        ("i.j", SKIPPED),
        release="6.12",
        stopped="lost",
    )
    words, differ = report.compare((a, b), ("a.json", "b.json"))
    assert differ
    assert words.splitlines() == [
        "a: Linux 6.1 x86_64, none; kvmpriv 0.1.0 (a.json)",
        "b: Linux 6.12 x86_64, none; kvmpriv 0.1.0 (b.json)",
        "   not complete: lost",
        "",
        "a             b             rule",
        "skipped       passed        c.d  a: why 1",
        "failed        absent        e.f  a: why 2",
        "absent        failed        g.h  b: why 2",
        "",
        "3 of 5 rules differ",
        "2 rules with equal results: 1 passed, 1 skipped",
    ]
    same, differ = report.compare((a, a), ("x", "y"))
    assert not differ
    assert same.splitlines()[3:] == [
        "4 rules, no difference",
        "4 rules with equal results: 1 passed, 1 failed, 2 skipped",
    ]
    one, _ = report.compare((made(("a.b", PASSED)), made(("a.b", FAILED))), ("x", "y"))
    assert one.splitlines()[-1] == "1 of 1 rule differs"
    other = a._replace(selection={**SELECTION, "expression": "x"})
    assert "selected different tests" in report.compare((a, other), ("x", "y"))[0]


def compare(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, output, error output."""
    status = cli.main(["selftest", "--compare", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_compare_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, same = (tmp_path / name for name in ("a.json", "b.json", "same.json"))
    a.write_text(json.dumps(document(made(("a.b", PASSED)))))
    b.write_text(json.dumps(document(made(("a.b", FAILED)))))
    same.write_bytes(a.read_bytes())
    status, out, errors = compare(capsys, a, b)
    assert (status, errors) == (1, "")
    assert "\npassed        failed        a.b" in out
    status, out, errors = compare(capsys, a, same)
    assert (status, errors) == (0, "")
    assert "no difference" in out
    status, out, errors = compare(capsys, a, same, "-k", "x")
    assert (status, out) == (2, "")
    assert "remove RULE and -k" in errors


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file or directory"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "no schema_version"),
        (b'{"schema_version": 2}', "schema version 2; this kvmpriv reads 3"),
        (b'{"schema_version": 3}', "the document: 'host' is a required property"),
        (b'{"schema_version": true}', "schema version True; this kvmpriv reads 3"),
        (lambda d: d.update(host=[]), "host: [] is not of type 'object'"),
        (lambda d: d["host"].pop("kvmpriv"), "host: 'kvmpriv' is a required property"),
        (lambda d: d.pop("tests"), "the document: 'tests' is a required property"),
        (lambda d: d.update(tests=[None]), "tests[0]: None is not of type 'object'"),
        (lambda d: d.update(planned="many"), "planned: 'many' is not of type 'integer'"),
        (lambda d: d.update(planned=True), "planned: True is not of type 'integer'"),
        (lambda d: d.update(planned=math.inf), "not JSON: Infinity is not a JSON number"),
        (lambda d: d.update(seconds=math.nan), "not JSON: NaN is not a JSON number"),
        (lambda d: d.update(stopped=["x" * 1000]), "['xxx"),
        (lambda d: d["tests"][0].pop("message"), "tests[0]: 'message' is a required property"),
        (lambda d: d["tests"][0].update(result="odd"), "tests[0].result: 'odd' is not one of"),
        (lambda d: d["tests"][0].update(rules="gm.x"), "rules: 'gm.x' is not of type 'array'"),
        (lambda d: d["tests"][0].update(rules=["a.b", ["a"]]), "rules[1]: ['a'] is not of type"),
    ],
)
def test_compare_what_is_no_document(
    content: bytes | Callable[[Any], Any] | None,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names the file that is not a document; the twin, a valid one, is read."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    made_document = document(made(("a.b", PASSED)))
    good.write_text(json.dumps(made_document))
    if callable(content):
        content(made_document)
        bad.write_text(json.dumps(made_document))
    elif content is not None:
        bad.write_bytes(content)
    status, out, errors = compare(capsys, good, bad)
    assert (status, out) == (2, "")
    assert errors.startswith(f"kvmpriv selftest: {bad}: ")
    assert expected in errors
    assert compare(capsys, bad, good)[0] == 2
    assert compare(capsys, good, good)[0] == 0
