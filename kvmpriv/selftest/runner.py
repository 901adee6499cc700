"""Running the suite in a process of its own, which may crash or hang without taking us along."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .records import CRASHED, KNOWN_DEFECT, PASSED, SKIPPED, TIMEOUT, Planned, Result

__all__ = ["BadSelection", "CannotRun", "Plan", "run", "suite"]

#: Seconds beyond its own timeout after which no test can be hoped to end by itself.
GRACE = 20.0
#: Seconds to find the tests and probe the host, or after a test to clean up and start the next:
#: an emulated machine with much else to do takes minutes.
BETWEEN = 600.0
#: Seconds for a process to clean up after Ctrl-C, or to die when it is killed.
_DYING = 5.0
#: How much of its error output is kept of a process that died.
_TAIL = 8192
#: pytest's exit statuses after all tests (passed, some failed, none collected), for a fault of its
#: own, and for arguments that it can't use.
_PYTEST_ENDED, _PYTEST_INTERNAL, _PYTEST_USAGE = (0, 1, 5), 3, 4


class CannotRun(Exception):  # noqa: N818  # it is an outcome
    """The suite could not be run, or not to its end; the message says why."""


class BadSelection(ValueError):  # noqa: N818
    """Nothing is selected, or what was asked for means nothing; the message says why."""


class Plan(NamedTuple):
    """What is going to run, and on what."""

    tests: tuple[Planned, ...]
    host: dict[str, Any]


def suite() -> Path:
    """The folder with the tests: the wheel's, or the checkout's."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_suite", package.parent / "tests" / "private"):
        if (folder / "conftest.py").is_file():
            return folder
    raise CannotRun(f"this installation has no tests: there is no {package / '_suite'}")


def run(
    folder: Path, selection: dict[str, Any], *, collect: bool = False
) -> Generator[Plan | Result, None, None]:
    """The plan, then each result as its test ends; `collect` stops after the plan.

    A test that ends its process has its result too, as has one that hangs in spite of its timeout
    and is killed; the rest run in a new process.  A result is told when the next test starts: what
    happens to the process before that is charged to the test that ended last.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, nobody learns how a child ended
    plan: Plan | None = None
    ended = 0
    while plan is None or ended < len(plan.tests):
        before = ended
        running: Planned | None = None
        last: Result | None = None
        started = 0.0
        with _Process(folder, selection, ended, collect=collect) as process:
            for event in process.events():
                if "nothing" in event:
                    raise BadSelection(f"{event['nothing']} (--list shows what there is)")
                if "plan" in event:
                    tests = tuple(
                        Planned(test["test"], tuple(test["rules"]), test["about"])
                        for test in event["plan"]
                    )
                    plan = Plan(tests, event["host"])
                    yield plan
                    if collect:
                        return
                    continue
                assert plan is not None, "the plan comes first"
                if last:
                    yield last
                    last = None
                if "start" in event:
                    running, started = plan.tests[ended], time.monotonic()
                    if event["start"] != running.test:
                        raise CannotRun(f"planned was {running.test}, now {event['start']} runs")
                else:
                    planned, running = plan.tests[ended], None
                    ended += 1
                    last = Result(*planned, **event["end"])
        if plan is None and process.status == _PYTEST_USAGE:
            raise BadSelection(process.said.removeprefix("ERROR: "))
        result = TIMEOUT if process.killed else CRASHED
        culprit = running or last
        if running:
            ended += 1
            seconds = time.monotonic() - started
            yield Result(*running, result, process.how, process.said, seconds)
        elif last:
            ordinary = not process.killed and process.status in _PYTEST_ENDED
            if plan is None or ended < len(plan.tests) or not ordinary:
                how = f"after the test: {process.how}"
                detail = "\n".join(filter(None, [last.detail, how, process.said]))
                last = last._replace(detail=detail)
                if last.result in (PASSED, SKIPPED, KNOWN_DEFECT):  # else that came first
                    last = last._replace(result=result, message=how)
            yield last
        elif plan is None or ended == before:
            said = f": {process.said}" if process.said else ""
            raise CannotRun(f"pytest did not come as far as the tests, {process.how}{said}")
        if culprit and not process.gone:
            raise CannotRun(f"{culprit.test} hangs in the kernel and can't be killed")


class _Process:
    """pytest in a forked process, in a session of its own: Ctrl-C reaches it through us."""

    killed = False
    gone = False
    #: The exit status; minus the signal.
    status = 0

    def __init__(
        self, folder: Path, selection: dict[str, Any], skip: int, *, collect: bool
    ) -> None:
        self._job = folder, selection, skip
        self._collect = collect
        #: What it wrote to its error output, after its end.
        self.said = ""

    def __enter__(self) -> _Process:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or both of us would write what is buffered
        self._errors = os.fdopen(os.memfd_create("errors"), "w+b")
        self._pipe, writable = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._be_pytest(writable)
        os.close(writable)
        return self

    def _be_pytest(self, pipe: int) -> NoReturn:
        status = _PYTEST_INTERNAL
        try:
            os.setsid()
            os.close(self._pipe)  # when we go, it must not write on
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            for number, target in enumerate((null, null, self._errors.fileno())):
                os.dup2(target, number)
            faulthandler.enable(self._errors.fileno())  # pytest bends 2 while it captures
            sys.stdout, sys.stderr = (
                open(number, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
                for number in (1, 2)
            )
            from .plugin import main

            status = main(*self._job, pipe, collect=self._collect)
            sys.stderr.flush()
        except BaseException:  # noqa: BLE001  # this process ends here, whatever it was
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    def events(self) -> Iterator[dict[str, Any]]:
        """What the process tells, until it has ended or, silent for too long, been killed."""
        rest = b""
        deadline = time.monotonic() + BETWEEN
        while True:
            ended = self._has_ended()  # before looking for the last that it told
            wait = 0.0 if ended else min(0.5, max(0.0, deadline - time.monotonic()))
            if select.select([self._pipe], [], [], wait)[0]:
                data = os.read(self._pipe, 1 << 16)
                if data:
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        event = json.loads(line)
                        patience = event["timeout"] + GRACE if "start" in event else BETWEEN
                        deadline = time.monotonic() + patience
                        yield event
                    continue
                ended = self._wait(deadline - time.monotonic())
            if ended:
                return
            if time.monotonic() > deadline:
                self.killed = True
                os.kill(self._pid, signal.SIGABRT)  # faulthandler says where it is
                self._wait(_DYING)
                return

    def _has_ended(self) -> bool:
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._has_ended():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def __exit__(self, *exc: object) -> None:
        try:
            if not self.killed and not self._has_ended():
                os.kill(self._pid, signal.SIGINT)  # fixtures put back what they changed
                self._wait(_DYING)
        finally:
            with suppress(ProcessLookupError):  # there is no group before setsid()
                os.killpg(self._pid, signal.SIGKILL)  # with what tests have left behind
            os.kill(self._pid, signal.SIGKILL)
            self.gone = self._wait(_DYING)
            if self.gone:
                self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _TAIL))
            self.said = self._errors.read().decode(errors="replace").strip()
            self._errors.close()
            os.close(self._pipe)

    @property
    def how(self) -> str:
        """In which way it ended."""
        if self.killed:
            return "it did not end in time and was killed"
        if self.status < 0:
            name = signal.strsignal(-self.status)
            return f"the process was ended by signal {-self.status} ({name})"
        return f"the process ended with exit status {self.status}"
