"""The records of a run of the suite, and what follows from them.  Nothing here runs a test."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from ..exit_status import ExitStatus

if TYPE_CHECKING:
    from .documents import HostAbout, RunDocument, Selection

__all__ = [
    "CRASHED",
    "FAILED",
    "FAILURES",
    "INTERRUPTED",
    "KNOWN_DEFECT",
    "PASSED",
    "SCHEMA_VERSION",
    "SHORTAGE",
    "SKIPPED",
    "TIMEOUT",
    "Planned",
    "Result",
    "RuleResult",
    "Run",
]

SCHEMA_VERSION = 3

#: How a test ends.
PASSED = "passed"
FAILED = "failed"
#: It took longer than its timeout.
TIMEOUT = "timeout"
#: Its process died.
CRASHED = "crashed"
#: The kernel has a known defect of the v9 series as it was posted.
KNOWN_DEFECT = "known defect"
#: This process or the machine ran out of descriptors, memory or CPU time, and the message says of
#: what: the test gives no result for the kernel.
SHORTAGE = "shortage"
#: The machine lacks something; the message says what.
SKIPPED = "skipped"

#: The first of these that one of a rule's tests has is the rule's result.
FAILURES = (FAILED, CRASHED, TIMEOUT, KNOWN_DEFECT)
_RESULTS = (*FAILURES, SHORTAGE, PASSED, SKIPPED)

_RULE_RESULTS = (FAILED, KNOWN_DEFECT, SHORTAGE, PASSED, SKIPPED)

#: Why a run that the user stopped is not complete.
INTERRUPTED = "interrupted"


class Planned(NamedTuple):
    """A test that is going to run: its id, its rules, the first paragraph of its docstring."""

    test: str
    rules: tuple[str, ...] = ()
    about: str = ""


class Result(NamedTuple):
    """A test that has ended.

    `message` is one line: why it failed or was skipped.  `detail` is the traceback and the test's
    output.
    """

    test: str
    rules: tuple[str, ...]
    about: str
    result: str
    message: str = ""
    detail: str = ""
    seconds: float = 0.0


class RuleResult(NamedTuple):
    """The result of a rule, from those of its tests; `tests` counts them by result."""

    rule: str
    sentence: str
    result: str
    tests: dict[str, int]
    message: str


class Run(NamedTuple):
    """A run.  `stopped` says why some planned tests did not run; empty: all did."""

    host: HostAbout
    selection: Selection
    planned: int
    results: tuple[Result, ...]
    seconds: float
    stopped: str = ""
    #: The sentences of the rules, by id.
    sentences: dict[str, str] = {}  # noqa: RUF012  # never changed

    @property
    def totals(self) -> dict[str, int]:
        """The number of tests by result, with every result as a key."""
        found = Counter(result.result for result in self.results)
        return {name: found[name] for name in _RESULTS}

    @property
    def rules(self) -> tuple[RuleResult, ...]:
        """The rules by id.

        A rule failed, or has a known defect, if one of its tests did; else it has a shortage if one
        of them has; else it passed if one of them passed; else it is skipped.
        """
        tests: dict[str, list[Result]] = {}
        for result in self.results:
            for name in result.rules:
                tests.setdefault(name, []).append(result)
        return tuple(
            _rule(name, self.sentences.get(name, ""), tests[name]) for name in sorted(tests)
        )

    @property
    def exit_status(self) -> ExitStatus:
        """NEGATIVE if a test failed; UNABLE for a shortage or an early end; ALL_SKIPPED; or OK."""
        totals = self.totals
        if any(totals[name] for name in FAILURES):
            return ExitStatus.NEGATIVE
        if self.stopped or totals[SHORTAGE]:
            return ExitStatus.UNABLE
        return ExitStatus.OK if totals[PASSED] else ExitStatus.ALL_SKIPPED

    def to_json(self) -> RunDocument:
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
                "rules": {name: found[name] for name in _RULE_RESULTS},
            },
            "rules": [
                {
                    "rule": rule.rule,
                    "sentence": rule.sentence,
                    "result": rule.result,
                    "tests": rule.tests,
                    "message": rule.message,
                }
                for rule in rules
            ],
            "tests": [
                {
                    "test": result.test,
                    "rules": list(result.rules),
                    "about": result.about,
                    "result": result.result,
                    "message": result.message,
                    "detail": result.detail,
                    "seconds": round(result.seconds, 3),
                }
                for result in self.results
            ],
        }

    @classmethod
    def from_json(cls, document: object) -> Run:
        """The run that a document was made from; ValueError says what is wrong with it."""
        if not isinstance(document, dict) or "schema_version" not in document:
            raise ValueError("not a document of `kvmpriv selftest --json`: no schema_version")
        version = document["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ValueError(f"schema version {version!r}; this kvmpriv reads {SCHEMA_VERSION}")
        found = _checked(document)
        results = (
            Result(
                test["test"],
                tuple(test["rules"]),
                test["about"],
                test["result"],
                test["message"],
                test["detail"],
                test["seconds"],
            )
            for test in found["tests"]
        )
        return cls(
            found["host"],
            found["selection"],
            found["planned"],
            tuple(results),
            found["seconds"],
            found["stopped"],
            {rule["rule"]: rule["sentence"] for rule in found["rules"]},
        )


def _checked(document: object) -> RunDocument:
    """The document; ValueError unless it is as ``schema.json`` describes it."""
    import jsonschema

    schema = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    error = jsonschema.exceptions.best_match(validator.iter_errors(document))
    if error is not None:
        where = error.json_path.removeprefix("$").removeprefix(".") or "the document"
        message = error.message if len(error.message) <= 200 else f"{error.message[:197]}..."
        raise ValueError(f"not a document of `kvmpriv selftest --json`: {where}: {message}")
    return cast("RunDocument", document)


def _rule(name: str, sentence: str, results: list[Result]) -> RuleResult:
    tests = Counter(result.result for result in results)
    worst = next(kind for kind in _RESULTS if tests[kind])
    messages = (result.message for result in results if result.result == worst)
    if worst == PASSED:  # a test that could not run is worth mentioning
        messages = (f"not all: {result.message}" for result in results if result.result == SKIPPED)
    verdict = FAILED if worst in (CRASHED, TIMEOUT) else worst
    return RuleResult(name, sentence, verdict, dict(tests), next(messages, ""))
