"""The JUnit XML of a run, as a parser of that format reads it."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from kvmpriv.selftest.junit import junit
from kvmpriv.selftest.records import (
    CRASHED,
    FAILED,
    KNOWN_DEFECT,
    PASSED,
    SHORTAGE,
    SKIPPED,
    TIMEOUT,
    Result,
    Run,
)

from .test_selftest import HOST, SELECTION

KINDS: dict[str, type[Error | Failure | Skipped] | None] = {
    PASSED: None,
    FAILED: Failure,
    KNOWN_DEFECT: Failure,
    CRASHED: Error,
    TIMEOUT: Error,
    SHORTAGE: Error,
    SKIPPED: Skipped,
}
RUN = Run(
    HOST,
    SELECTION,
    len(KINDS),
    tuple(
        Result(f"test_it.py::test_{n}[a::b]", ("a.b", "c.d"), "About.", kind, f"why {n}", "more", n)
        for n, kind in enumerate(KINDS)
    ),
    12.25,
    "",
    {"a.b": "It holds."},
)


def cases(text: str) -> tuple[TestSuite, list[TestCase]]:
    """The suite and its test cases; the document must be well-formed and its sums right."""
    assert text.startswith('<?xml version="1.0" encoding="utf-8"?>\n')
    document = JUnitXml.fromstring(text.encode())
    (suite,) = document
    found = list(suite)
    for element in (document, suite):
        sums = (element.tests, element.failures, element.errors, element.skipped, element.time)
        element.update_statistics()  # type: ignore[no-untyped-call]
        recounted = (element.tests, element.failures, element.errors, element.skipped)
        assert sums[:4] == recounted
    return suite, found


def test_each_result() -> None:
    suite, found = cases(junit(RUN))
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (7, 2, 3, 1)
    assert suite.name == "kvmpriv selftest"
    properties = {each.name: each.value for each in suite.properties()}  # type: ignore[no-untyped-call]
    assert properties == {name: text for name, text in HOST.items() if name != "abis"}
    for number, (case, (kind, element)) in enumerate(zip(found, KINDS.items(), strict=True)):
        assert (case.classname, case.name) == ("test_it", f"test_{number}[a::b]")
        assert case.time == number
        assert case.system_out == "a.b: It holds.\nc.d\nAbout."
        if element is None:
            assert case.result == []
            continue
        (result,) = case.result
        assert type(result) is element
        assert (result.type, result.message, result.text) == (kind, f"why {number}", "more")


def test_a_run_that_was_stopped_does_not_pass() -> None:
    """A server that counts only failures and errors must not take it for a complete run."""
    suite, found = cases(junit(RUN._replace(results=RUN.results[:1], stopped="interrupted \x03")))
    assert (suite.tests, suite.failures, suite.errors) == (2, 0, 1)
    (error,) = found[-1].result
    assert (found[-1].name, error.type) == ("complete", "not complete")
    assert error.message == r"1 of 7 tests: interrupted \x03"
    assert cases(junit(RUN._replace(results=(), planned=0)))[1] == []


@pytest.mark.parametrize("low", range(0, 0x11000, 0x1000))
def test_every_character(low: int) -> None:
    """Output of a test may be anything: what XML can't have is escaped, all else comes back."""
    text = "".join(map(chr, range(low, low + 0x1000))) + "]]>&amp;<a b='\"'/>"
    result = Result(f"t.py::t[{text}]", ("a.b",), text, FAILED, text, text)
    document = junit(RUN._replace(results=(result,), sentences={"a.b": text}))
    ElementTree.fromstring(document.encode())
    _, (case,) = cases(document)
    (failure,) = case.result
    expected = "".join(
        char
        if char in "\t\n" or " " <= char <= "~" or (ord(char) >= 0xA0 and not unfit(char))
        else char
        if char == "\x85"
        else ascii(char)[1:-1]
        for char in text
    )
    assert failure.text == expected
    assert failure.message == expected
    assert case.name == f"t[{expected}]"
    assert case.system_out == f"a.b: {expected}\n{expected}"


def unfit(char: str) -> bool:
    """XML 1.0, production 2, Char."""
    return 0xD800 <= ord(char) <= 0xDFFF or char in "\ufffe\uffff"
