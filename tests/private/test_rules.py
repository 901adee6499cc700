"""The suite itself: every test names the rules that it checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from .support.rules import rule


@rule("suite.rules")
def test_every_test_names_its_rules(request: pytest.FixtureRequest) -> None:
    """Each test has a docstring and rules (rule() refuses those that are not in the table)."""
    ours = [
        item
        for item in request.session.items
        if isinstance(item, pytest.Function) and Path(__file__).parent in item.path.parents
    ]
    assert request.node in ours
    for item in ours:
        ids = [name for mark in item.iter_markers("rule") for name in mark.args]
        assert ids, f"{item.nodeid} names no rule"
        assert item.function.__doc__, f"{item.nodeid} has no docstring"
