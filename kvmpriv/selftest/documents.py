"""The parts of a run's document, as ``schema.json`` describes them, and the runner's events.

For annotations: nothing imports this module when it runs.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

__all__ = [
    "EndEvent",
    "Event",
    "HostAbout",
    "NothingEvent",
    "Outcome",
    "PlanEvent",
    "PlannedDocument",
    "ResultDocument",
    "RuleDocument",
    "RunDocument",
    "Selection",
    "StartEvent",
    "Totals",
]


class HostAbout(TypedDict):
    """The kernel that is tested, the version of kvmpriv, and what the probe found."""

    release: str
    version: str
    machine: str
    kvmpriv: str
    verdict: str
    abis: list[str]


class Selection(TypedDict):
    """What is run: the options of the command.  `timeout` is in seconds."""

    rules: list[str]
    expression: str
    dangerous: bool
    timeout: float


class Totals(TypedDict):
    """How many tests and rules ended in which way, by result."""

    tests: dict[str, int]
    rules: dict[str, int]


class RuleDocument(TypedDict):
    """The result of a rule; `tests` counts its tests by result."""

    rule: str
    sentence: str
    result: str
    tests: dict[str, int]
    message: str


class PlannedDocument(TypedDict):
    """A test that is going to run."""

    test: str
    rules: list[str]
    about: str


class Outcome(TypedDict):
    """How a test ended, and after how many seconds."""

    result: str
    message: str
    detail: str
    seconds: float


class ResultDocument(PlannedDocument, Outcome):
    """A test that has ended."""


class RunDocument(TypedDict):
    """The document of ``kvmpriv selftest --json``."""

    schema_version: int
    host: HostAbout
    selection: Selection
    planned: int
    stopped: str
    seconds: float
    totals: Totals
    rules: list[RuleDocument]
    tests: list[ResultDocument]


# -- what the process of the tests reports ---------------------------------------------------------


class NothingEvent(TypedDict):
    """The selection is empty; `why` is a sentence for the user."""

    event: Literal["nothing"]
    why: str


class PlanEvent(TypedDict):
    """The tests have been found.  `host` is None if they are only collected."""

    event: Literal["plan"]
    tests: list[PlannedDocument]
    host: HostAbout | None
    sentences: dict[str, str]


class StartEvent(TypedDict):
    """A test starts, with its timeout in seconds."""

    event: Literal["start"]
    test: str
    timeout: float


class EndEvent(TypedDict):
    """A test has ended, or a file could not be collected."""

    event: Literal["end"]
    result: Outcome


Event: TypeAlias = NothingEvent | PlanEvent | StartEvent | EndEvent
