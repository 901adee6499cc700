"""The process that runs the tests: it reports what pytest does by a pipe, a JSON object a line.

documents.py describes the events: "nothing", "plan", "start", "end".
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Generator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_timeout

import kvmpriv

from .. import probe
from . import rules, shortage
from .records import FAILED, KNOWN_DEFECT, PASSED, SHORTAGE, SKIPPED, TIMEOUT

if TYPE_CHECKING:
    import pluggy

    from .documents import Event, HostAbout, Outcome, PlannedDocument, Selection

__all__ = ["main"]

#: How the message of a test begins that failed by a known defect, or failed as expected by one.
DEFECT = "known defect: "


def main(folder: Path, selection: Selection, skip: int, pipe: int, *, collect: bool) -> int:
    """Run the tests in `folder` but the first `skip`; returns pytest's exit status.

    It writes nothing to the folder.  The user's settings do not matter: no configuration file is
    read, and no plugin is loaded but this one and pytest-timeout.
    """
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        os.environ.pop(name, None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True

    def send(event: Event) -> None:
        data = json.dumps(event).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data) :]

    arguments = [
        str(folder), f"--rootdir={folder}", f"--confcutdir={folder}", f"-c{os.devnull}",
        "--import-mode=append", "-pno:cacheprovider", "-qq", "--tb=short", "--strict-markers",
        "--continue-on-collection-errors", f"--timeout={selection['timeout']}",
    ]  # fmt: skip
    if selection["expression"]:
        arguments += ["-k", selection["expression"]]
    if selection["dangerous"]:
        arguments.append("--dangerous")
    if collect:
        arguments.append("--collect-only")
    recorder = Recorder(send, selection, skip, rules.read(folder), describe=not collect)
    return int(pytest.main(arguments, plugins=[recorder, pytest_timeout]))


def describe_host() -> HostAbout:
    """The kernel, and which private memory the probe finds in it."""
    found = probe.probe()
    files = [check for check in found.checks if check.step is probe.Step.FILE]
    abis = dict.fromkeys(check.group.value for check in files if check.status == probe.PASS)
    system = platform.uname()
    return {
        "release": system.release,
        "version": system.version,
        "machine": system.machine,
        "kvmpriv": kvmpriv.__version__,
        "verdict": found.verdict,
        "abis": list(abis),
    }


def rules_of(item: pytest.Item) -> list[str]:
    """The rules that a test names, in its order, without those of the suite itself."""
    names = (name for mark in item.iter_markers("rule") for name in mark.args)
    return list(dict.fromkeys(name for name in names if not name.startswith("suite.")))


class Recorder:
    """Reports the plan, then when each test starts and how it has ended."""

    def __init__(
        self,
        send: Callable[[Event], None],
        selection: Selection,
        skip: int,
        table: dict[str, rules.Rule],
        *,
        describe: bool,
    ) -> None:
        self.send = send
        self.table = table
        self.selection = selection
        self.skip = skip
        self.describe = describe
        self.not_collected: dict[str, Outcome] = {}
        #: How the test that runs now ends, as far as that is known.
        self.now: Outcome = _passed()
        self.rules: set[str] = set()
        #: Its time limit, and for how long this process had waited for a CPU before it.
        self.timeout: float = 0.0
        self.waited: float | None = None

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self.rules.update(rules_of(item))  # before -k leaves only some

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.passed:
            return
        message = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        lacking = shortage.of_error(None, _last_line(message))
        result = SHORTAGE if lacking else SKIPPED if report.skipped else FAILED
        self.not_collected[report.nodeid] = {
            "result": result,
            "message": lacking or f"can't be collected: {_last_line(message)}",
            "detail": "" if report.skipped else message,
            "seconds": 0.0,
        }

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # A test of the suite itself says nothing about a kernel.
        items[:] = [item for item in items if rules_of(item) or not item.get_closest_marker("rule")]
        globs = self.selection["rules"]
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in self.rules):
                self.send({"event": "nothing", "why": f"no rule matches {glob!r}"})
                items.clear()
                return
        if globs:
            items[:] = [
                item
                for item in items
                if any(fnmatchcase(name, glob) for name in rules_of(item) for glob in globs)
            ]
        if not items and not self.not_collected:
            expression = self.selection["expression"]
            named = f" of {' '.join(map(repr, globs))}" if globs else ""
            by = f" matches -k {expression!r}" if expression else " is there"
            self.send({"event": "nothing", "why": f"no test{named}{by}"})
            return
        if not self.skip:
            self.send(
                {
                    "event": "plan",
                    "tests": [
                        *map(_planned_without_item, self.not_collected),
                        *map(self._planned, items),
                    ],
                    "host": describe_host() if self.describe else None,
                    "sentences": {name: rule.sentence for name, rule in self.table.items()},
                }
            )
            for result in self.not_collected.values():
                self.send({"event": "end", "result": result})
        del items[: max(0, self.skip - len(self.not_collected))]

    @staticmethod
    def _planned(item: pytest.Item) -> PlannedDocument:
        doc = (getattr(getattr(item, "function", None), "__doc__", None) or "").strip()
        about = " ".join(doc.partition("\n\n")[0].split())
        return {"test": item.nodeid, "rules": rules_of(item), "about": about}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self.now = _passed()
        mark = item.get_closest_marker("timeout")
        own = mark and (mark.args[0] if mark.args else mark.kwargs.get("timeout"))
        self.timeout = own or self.selection["timeout"]
        self.waited = shortage.waited(os.getpid())
        self.send({"event": "start", "test": item.nodeid, "timeout": self.timeout})

    def pytest_runtest_logfinish(self) -> None:
        # Ctrl-C and pytest.exit() leave a wrapper of the protocol by an exception; not this hook.
        self.send({"event": "end", "result": self.now})

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pluggy.Result[pytest.TestReport], None]:
        report = (yield).get_result()
        now = self.now
        now["seconds"] += report.duration
        if report.passed or call.excinfo is None:
            return
        error = call.excinfo.value
        words = getattr(error, "msg", None) or call.excinfo.exconly(tryshort=True)
        message = _first_line(str(words))
        is_late = re.match(r"Timeout \(?>", message) is not None
        lacking = (
            shortage.of_time(self.waited, os.getpid(), self.timeout)
            if is_late
            else shortage.of_error(error, str(words))
        )
        if report.skipped and not lacking and not message.startswith(DEFECT):
            now["result"], now["message"] = SKIPPED, message
            return
        if lacking:
            result, message = SHORTAGE, lacking
        elif message.startswith(DEFECT) and now["result"] == PASSED:
            result, message = KNOWN_DEFECT, message.removeprefix(DEFECT)
        else:
            result = TIMEOUT if is_late else FAILED
        if now["result"] in (PASSED, SKIPPED, KNOWN_DEFECT):  # else the first failure is the cause
            now["result"], now["message"] = result, message
        sections = (f"-- {title} --\n{text}" for title, text in report.sections)
        now["detail"] = "\n".join(filter(None, [now["detail"], report.longreprtext, *sections]))


def _planned_without_item(name: str) -> PlannedDocument:
    """A file that could not be collected, as a test that fails."""
    return {"test": name, "rules": [], "about": ""}


def _passed() -> Outcome:
    return {"result": PASSED, "message": "", "detail": "", "seconds": 0.0}


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].removeprefix("E ").strip()
