"""The known defects of v9: a kernel with a defect fails the test of that name."""

from __future__ import annotations

import pytest

from .support.defect_detectors import DETECTORS, detect
from .support.defects import DEFECTS, known_defect
from .support.rules import rule


def _parameter(name: str) -> object:
    why = DEFECTS[name].dangerous
    marks = [rule(f"defect.{name}")]
    if why:
        marks.append(pytest.mark.dangerous(f"known defect {name}: {why}"))
    return pytest.param(name, marks=marks)


@rule("suite.defects")
@pytest.mark.usefixtures("no_leak", "make_private_vm")
@pytest.mark.parametrize("name", [_parameter(name) for name in DEFECTS])
def test_known_defect(name: str) -> None:
    """The kernel does not have this defect."""
    seen = detect(name)
    if seen is not None:
        known_defect(name, seen)


@rule("suite.defects.all")
def test_every_defect_is_looked_for() -> None:
    """Every defect of the table has a detector, and every detector a defect."""
    assert DETECTORS.keys() == DEFECTS.keys()


@rule("suite.defects.all")
def test_every_mark_names_a_defect(request: pytest.FixtureRequest) -> None:
    """The marks known_defect of all tests name defects of the table."""
    marks = [mark for item in request.session.items for mark in item.iter_markers("known_defect")]
    assert {name for mark in marks for name in mark.args} <= DEFECTS.keys()
