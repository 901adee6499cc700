"""The mark that names the rules which a test checks; the table of the rules is rules.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpriv.selftest.rules import read

RULES = read(Path(__file__).resolve().parent.parent)


def rule(*ids: str) -> pytest.MarkDecorator:
    """The test checks these rules of the table; ValueError for an id that is not in it."""
    for name in ids:
        if name not in RULES:
            raise ValueError(f"no rule {name!r} in support/rules.toml: add it, or correct the id")
    return pytest.mark.rule(*ids)
