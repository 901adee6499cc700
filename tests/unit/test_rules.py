"""The table of the suite's rules: every rule has a test, and every id of a test is in the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmpriv import private
from kvmpriv.selftest import rules, runner
from kvmpriv.selftest.documents import Selection
from private.support.rules import RULES, rule


def test_every_rule_is_whole() -> None:
    """Every rule has an id, a sentence, known ABIs and a source."""
    for one in RULES.values():
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9_-]+)+", one.id), one
        assert re.fullmatch(r"\S.*[^.]\.", one.sentence), one
        assert len(one.sentence) <= 130, one
        assert one.abis == (rules.ANY,) or set(one.abis) <= set(private.ABIS), one
        assert re.search(r"commit [0-9a-f]{12}|^\d{14}\.\S+@|\w+/\w+", one.source), one


def test_every_rule_has_a_test() -> None:
    plans = [*runner.run(runner.suite(), SELECTION, collect=True)]
    (plan,) = plans
    assert isinstance(plan, runner.Plan)
    tested = {name for test in plan.tests for name in test.rules}
    ours = {name for name in RULES if not name.startswith("suite.")}
    assert tested == ours


SELECTION: Selection = {"rules": [], "expression": "", "dangerous": False, "timeout": 120.0}


def test_an_unknown_rule(request: pytest.FixtureRequest) -> None:
    request.config.addinivalue_line("markers", "rule")  # the suite's conftest has the real one
    assert rule("v9.file.read").args == ("v9.file.read",)
    with pytest.raises(ValueError, match=r"^no rule 'v9\.file\.raed' in support/rules\.toml"):
        rule("v9.file.read", "v9.file.raed")


def test_a_rule_that_is_there_twice(tmp_path: Path) -> None:
    assert rules.read(tmp_path) == {}
    table = tmp_path / rules.TABLE
    table.parent.mkdir()
    group = '[{}]\nabis = ["any"]\nsource = "commit 0"\n[{}.rules]\n"a.b" = "It is."\n'
    table.write_text(group.format("one", "one"))
    assert rules.read(tmp_path) == {"a.b": rules.Rule("a.b", "It is.", ("any",), "commit 0")}
    table.write_text(group.format("one", "one") + group.format("two", "two"))
    with pytest.raises(ValueError, match=r"rule 'a\.b' is there twice"):
        rules.read(tmp_path)
