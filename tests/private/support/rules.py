"""The mark that names the rules which a test holds the kernel to."""

from __future__ import annotations

import pytest


def rule(*ids: str) -> pytest.MarkDecorator:
    """The test holds a kernel to these rules: lower case, dotted."""
    return pytest.mark.rule(*ids)  # not before the conftest has said that there is such a mark
