"""What a run of the suite leaves behind, and what follows from it.  Nothing here runs a test."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from ..exit_status import ExitStatus

__all__ = [
    "CRASHED",
    "FAILED",
    "FAILURES",
    "INTERRUPTED",
    "KNOWN_DEFECT",
    "PASSED",
    "SCHEMA_VERSION",
    "SKIPPED",
    "TIMEOUT",
    "Planned",
    "Result",
    "Rule",
    "Run",
]

SCHEMA_VERSION = 1

#: How a test ends.
PASSED = "passed"
FAILED = "failed"
#: It took longer than it may.
TIMEOUT = "timeout"
#: It took the process with it.
CRASHED = "crashed"
#: The kernel fails it in the way that is known of the v9 series as it was posted.
KNOWN_DEFECT = "known defect"
#: Something is missing; the message says what.
SKIPPED = "skipped"

#: In the order in which one of a rule's tests decides for the rule.
FAILURES = (FAILED, CRASHED, TIMEOUT, KNOWN_DEFECT)
_RESULTS = (*FAILURES, PASSED, SKIPPED)

#: Why a run that somebody stopped is not complete.
INTERRUPTED = "interrupted"


class Planned(NamedTuple):
    """A test that is to run: its id, the rules that it holds a kernel to, what it says of them."""

    test: str
    rules: tuple[str, ...] = ()
    about: str = ""


class Result(NamedTuple):
    """A test that has ended.

    `message` is one line: why it failed or was skipped.  `detail` is the traceback and what the
    test wrote.
    """

    test: str
    rules: tuple[str, ...]
    about: str
    result: str
    message: str = ""
    detail: str = ""
    seconds: float = 0.0


class Rule(NamedTuple):
    """What the tests of a rule say together; `tests` counts them by result."""

    rule: str
    result: str
    tests: dict[str, int]
    message: str


class Run(NamedTuple):
    """A whole run.  `stopped` says why not all that was planned has run; empty: it has."""

    host: dict[str, Any]
    selection: dict[str, Any]
    planned: int
    results: tuple[Result, ...]
    seconds: float
    stopped: str = ""

    @property
    def totals(self) -> dict[str, int]:
        """How many tests ended how, every result named."""
        found = Counter(result.result for result in self.results)
        return {name: found[name] for name in _RESULTS}

    @property
    def rules(self) -> tuple[Rule, ...]:
        """By name: failed, or a known defect, if one of its tests says so, else passed if one has.

        What is left is skipped.
        """
        tests: dict[str, list[Result]] = {}
        for result in self.results:
            for name in result.rules:
                tests.setdefault(name, []).append(result)
        return tuple(_rule(name, tests[name]) for name in sorted(tests))

    @property
    def exit_status(self) -> ExitStatus:
        """NEGATIVE if a test failed, UNABLE if the run ended early, ALL_SKIPPED, or OK."""
        totals = self.totals
        if any(totals[name] for name in FAILURES):
            return ExitStatus.NEGATIVE
        if self.stopped:
            return ExitStatus.UNABLE
        return ExitStatus.OK if totals[PASSED] else ExitStatus.ALL_SKIPPED

    def to_json(self) -> dict[str, Any]:
        """The document of ``--json``; ``schema.json`` describes it."""
        rules = self.rules
        found = Counter(rule.result for rule in rules)
        return {
            "schema_version": SCHEMA_VERSION,
            "host": self.host,
            "selection": self.selection,
            "planned": self.planned,
            "stopped": self.stopped,
            "seconds": round(self.seconds, 3),
            "totals": {
                "tests": self.totals,
                "rules": {name: found[name] for name in (FAILED, KNOWN_DEFECT, PASSED, SKIPPED)},
            },
            "rules": [rule._asdict() for rule in rules],
            "tests": [
                {
                    **result._asdict(),
                    "rules": list(result.rules),
                    "seconds": round(result.seconds, 3),
                }
                for result in self.results
            ],
        }

    @classmethod
    def from_json(cls, document: Any) -> Run:
        """The run that a document was made from; ValueError says what is wrong with it."""
        from .schema import check

        if not isinstance(document, dict) or "schema_version" not in document:
            raise ValueError("no document of `kvmpriv selftest --json`: no schema_version")
        version = document["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ValueError(f"schema version {version!r}; this kvmpriv reads {SCHEMA_VERSION}")
        try:
            check(document)
        except ValueError as error:
            raise ValueError(f"no document of `kvmpriv selftest --json`: {error}") from None
        results = (Result(**{**test, "rules": tuple(test["rules"])}) for test in document["tests"])
        return cls(
            document["host"],
            document["selection"],
            document["planned"],
            tuple(results),
            document["seconds"],
            document["stopped"],
        )


def _rule(name: str, results: list[Result]) -> Rule:
    tests = Counter(result.result for result in results)
    worst = next(kind for kind in _RESULTS if tests[kind])
    messages = (result.message for result in results if result.result == worst)
    if worst == PASSED:  # then a test that could not run is worth a word
        messages = (f"not all: {result.message}" for result in results if result.result == SKIPPED)
    verdict = FAILED if worst in (CRASHED, TIMEOUT) else worst
    return Rule(name, verdict, dict(tests), next(messages, ""))
