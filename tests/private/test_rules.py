"""The suite itself: every test says which rules it holds a kernel to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .support.rules import rule


@rule("suite.rules")
def test_every_test_names_its_rules(request: pytest.FixtureRequest) -> None:
    """Each test here has a docstring and rule ids: lower case, dotted."""
    ours = [
        item
        for item in request.session.items
        if isinstance(item, pytest.Function) and Path(__file__).parent in item.path.parents
    ]
    assert request.node in ours
    for item in ours:
        ids = [name for mark in item.iter_markers("rule") for name in mark.args]
        assert ids, f"{item.nodeid} names no rule"
        for name in ids:
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9_-]+)+", name), f"{item.nodeid}: {name}"
        assert item.function.__doc__, f"{item.nodeid} does not say what its rule is"
