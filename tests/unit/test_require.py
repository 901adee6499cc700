"""KVMPRIV_REQUIRE: what may be missing has a name, and only that can be required."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpriv import private
from private import conftest
from private.support import requirements

#: An unexpected one would end the test here, and not as a failure.
OUTCOMES = (pytest.skip.Exception, pytest.fail.Exception)
#: Calls that skip a test and name nothing that can be required.
QUIET = ("pytest.skip", "pytest.mark.skip", "pytest.mark.skipif", "pytest.importorskip")
TESTS = Path(__file__).resolve().parents[1]


def test_every_name_is_known_and_used() -> None:
    words, names = set(private.ABIS), set()
    for path in TESTS.rglob("*.py"):
        if path in (TESTS / "private/support/requirements.py", Path(__file__)):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("missing"):
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    names.add(name.value)
    assert len(names) > 30
    assert names <= set(requirements.REQUIREMENTS)
    assert words >= set(requirements.REQUIREMENTS), "every identifier is used by a test"


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("", ""),
        ("host, restrictedmem", ""),
        (" private-memory,,dangerous ,", ""),
        ("guest-memfd,host", "unknown 'guest-memfd'; known are: ansible, atomic-sleep, "),
        ("b c,host, a", "unknown 'a', 'b c'; known are: "),
    ],
)
def test_what_can_be_required(text: str, unknown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "REQUIRED", requirements.identifiers(text))
    if unknown:
        with pytest.raises(pytest.UsageError, match=f"^KVMPRIV_REQUIRE: {unknown}"):
            requirements.check_required()
        return
    requirements.check_required()
    for name in filter(None, map(str.strip, text.split(","))):
        with pytest.raises(OUTCOMES, match=f"^KVMPRIV_REQUIRE={name}, but it is"):
            requirements.missing(name, "it is so")


def test_identifiers_can_be_typed() -> None:
    """Names are lower case without blanks, and each has a description."""
    for name, what in requirements.REQUIREMENTS.items():
        assert re.fullmatch(r"[a-z0-9]+([-_][a-z0-9]+)*", name), name
        assert what


def test_no_skip_is_quiet() -> None:
    """Every skip goes through `missing`, which names what is missing."""
    for path in TESTS.rglob("*.py"):
        if path in (TESTS / "private/support/requirements.py", Path(__file__)):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in QUIET, path


def test_a_skip_nobody_could_require() -> None:
    with pytest.raises((AssertionError, *OUTCOMES), match=r"^'bogus' is not in REQUIREMENTS"):
        requirements.missing("bogus", "it is so")


def test_danger_can_be_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "FIXED", False)
    item: Any = SimpleNamespace(
        get_closest_marker=lambda _: SimpleNamespace(args=["it wedges"], kwargs={}),
        config=SimpleNamespace(getoption=lambda *_, **__: False),
    )
    with pytest.raises(OUTCOMES, match=r"^dangerous: it wedges \(--dangerous runs it"):
        conftest.pytest_runtest_setup(item)
    monkeypatch.setattr(requirements, "REQUIRED", {"dangerous"})
    with pytest.raises(OUTCOMES, match=r"^KVMPRIV_REQUIRE=dangerous, but it wedges"):
        conftest.pytest_runtest_setup(item)
