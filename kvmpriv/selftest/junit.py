"""A run as JUnit XML, which continuous integration servers read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from .records import CRASHED, FAILED, KNOWN_DEFECT, SHORTAGE, SKIPPED, TIMEOUT, Result, Run

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["junit"]

#: The element for each result but PASSED: an error is not the kernel's answer to an assertion.
_ELEMENTS = {
    FAILED: "failure",
    KNOWN_DEFECT: "failure",
    CRASHED: "error",
    TIMEOUT: "error",
    SHORTAGE: "error",
    SKIPPED: "skipped",
}
_SUITE = "kvmpriv selftest"
#: Characters that no XML 1.0 document may have, not even escaped: Extensible Markup Language (XML)
#: 1.0, section 2.2.  A carriage return is allowed, but a parser makes an end of line of it.
_NO_XML = re.compile(r"[^\t\n\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(run: Run) -> str:
    """The document: a test case for each test that has ended.

    The output of a test case begins with its rules and their sentences.  A run that was stopped has
    one more test case, with the reason as its error, so that it does not pass for a complete one.
    """
    totals = run.totals
    counts = {"tests": len(run.results) + bool(run.stopped), "failures": 0, "errors": 0}
    counts["skipped"] = totals[SKIPPED]
    counts["errors"] += bool(run.stopped)
    for kind, element in _ELEMENTS.items():
        if element != "skipped":
            counts[f"{element}s"] += totals[kind]
    numbers = {name: str(count) for name, count in counts.items()}
    numbers["time"] = f"{run.seconds:.3f}"
    root = Element("testsuites", {"name": _SUITE, **numbers})
    suite = SubElement(root, "testsuite", {"name": _SUITE, **numbers})
    properties = SubElement(suite, "properties")
    for name, value in run.host.items():
        if isinstance(value, str):
            SubElement(properties, "property", name=name, value=_clean(value))
    for result in run.results:
        _add(suite, result, run.sentences)
    if run.stopped:
        case = SubElement(suite, "testcase", classname=_SUITE, name="complete", time="0.000")
        why = f"{len(run.results)} of {run.planned} tests: {run.stopped}"
        SubElement(case, "error", type="not complete", message=_clean(why))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, "unicode")}\n'


def _add(suite: Element, result: Result, sentences: dict[str, str]) -> None:
    file, _, name = result.test.partition("::")
    case = SubElement(
        suite,
        "testcase",
        classname=_clean(file.removesuffix(".py").replace("/", ".")),
        name=_clean(name or file),
        time=f"{result.seconds:.3f}",
    )
    if element := _ELEMENTS.get(result.result):
        message = _clean(result.message)
        ended = SubElement(case, element, type=result.result, message=message)
        ended.text = _clean(result.detail) or None
    rules = (f"{rule}: {sentences.get(rule, '')}".removesuffix(": ") for rule in result.rules)
    SubElement(case, "system-out").text = _lines([*rules, result.about])


def _lines(lines: Iterable[str]) -> str:
    return _clean("\n".join(filter(None, lines)))


def _clean(text: str) -> str:
    r"""Escape what XML can't have: ESC as ``\x1b``, a byte that is not UTF-8 as ``\udc80``."""
    return _NO_XML.sub(lambda found: ascii(found[0])[1:-1], text)
