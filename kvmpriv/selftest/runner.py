"""Runs the suite in a process of its own, so that a crash or a hang there does not end this one."""

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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from . import shortage
from .records import CRASHED, KNOWN_DEFECT, PASSED, SHORTAGE, SKIPPED, TIMEOUT, Planned, Result

if TYPE_CHECKING:
    from .documents import EndEvent, Event, HostAbout, PlanEvent, Selection, StartEvent

__all__ = ["BadSelection", "CannotRun", "Plan", "run", "suite"]

#: Seconds that a test may take beyond its own timeout before its process is killed.
GRACE = 20.0
#: Seconds in which the process must find the tests and probe the host, or clean up after a test
#: and start the next one.  A busy emulated machine needs minutes.
BETWEEN = 600.0
#: Seconds for the process to clean up after Ctrl-C, or to end when it is killed.
_DYING = 5.0
#: How many bytes of the error output of a process that died are kept.
_TAIL = 8192
#: pytest's exit statuses: after all tests (passed, some failed, none collected); an error of
#: pytest's own; arguments that it does not accept.
_PYTEST_ENDED, _PYTEST_INTERNAL, _PYTEST_USAGE = (0, 1, 5), 3, 4


class CannotRun(Exception):  # noqa: N818  # it is an outcome
    """The suite could not be run, or not to its end; the message says why."""


class BadSelection(ValueError):  # noqa: N818
    """The selection is empty, or pytest does not accept it; the message says why."""


class Plan(NamedTuple):
    """The tests that are going to run, the kernel they run on, and the rules' sentences.

    `host` is None if the tests are only collected.
    """

    tests: tuple[Planned, ...]
    host: HostAbout | None
    sentences: dict[str, str]


def suite() -> Path:
    """The folder with the tests: the wheel's, or the checkout's.  Raises CannotRun."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_suite", package.parent / "tests" / "private"):
        if (folder / "conftest.py").is_file():
            return folder
    raise CannotRun(f"this installation has no tests: there is no {package / '_suite'}")


def run(
    folder: Path, selection: Selection, *, collect: bool = False
) -> Generator[Plan | Result, None, None]:
    """Yield the plan, then a result when each test has ended; `collect` stops after the plan.

    A test that ends its process has a result too, and so has one that hangs in spite of its
    timeout and is killed; the remaining tests run in a new process.

    Raises BadSelection, and CannotRun if the tests can't be run to the end.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, no exit status can be had
    _check_surroundings()
    yield from _Run(folder, selection, collect=collect).results()


def _check_surroundings() -> None:
    """Raise CannotRun where pytest would fail with a traceback."""
    try:
        os.getcwd()  # noqa: PTH109  # Path.cwd() is the same
    except OSError as error:
        raise CannotRun(
            f"the current directory can't be used ({error.strerror}): change to one that exists"
        ) from None
    try:
        os.close(os.open(os.devnull, os.O_RDWR))
    except OSError as error:
        raise CannotRun(
            f"{os.devnull} can't be opened ({error.strerror}): mknod -m 666 {os.devnull} c 1 3"
        ) from None


class _Run:
    """A run over as many processes as it takes: one method for each event that they report.

    A result is yielded only when the next event comes: if the process dies before that, the death
    is charged to the test that ended last.
    """

    def __init__(self, folder: Path, selection: Selection, *, collect: bool) -> None:
        self._folder, self._selection, self._collect = folder, selection, collect
        self._plan: Plan | None = None
        #: How many tests of the plan have ended, in all processes.
        self._ended = 0
        #: The test that runs now, and when it started.
        self._running: Planned | None = None
        self._started = 0.0
        #: The result that is not yielded yet.
        self._last: Result | None = None

    def results(self) -> Generator[Plan | Result, None, None]:
        """The plan and the results, as run() yields them."""
        while not self._complete:
            before = self._ended
            with _Process(
                self._folder, self._selection, self._ended, collect=self._collect
            ) as process:
                for event in process.events():
                    yield from self._handle(event)
                    if self._collect and self._plan:
                        return
            yield from self._process_ended(process, progress=self._ended > before)

    @property
    def _complete(self) -> bool:
        return self._plan is not None and self._ended == len(self._plan.tests)

    def _handle(self, event: Event) -> Iterator[Plan | Result]:
        if event["event"] == "nothing":
            raise BadSelection(f"{event['why']} (--list shows what there is)")
        if event["event"] == "plan":
            return self._planned(event)
        if event["event"] == "start":
            return self._start(event)
        return self._end(event)

    def _planned(self, event: PlanEvent) -> Iterator[Plan | Result]:
        """The tests have been found."""
        tests = tuple(
            Planned(test["test"], tuple(test["rules"]), test["about"]) for test in event["tests"]
        )
        self._plan = Plan(tests, event["host"], event["sentences"])
        yield self._plan

    def _start(self, event: StartEvent) -> Iterator[Plan | Result]:
        """A test starts."""
        yield from self._take_last()
        self._running, self._started = self._next(), time.monotonic()
        if event["test"] != self._running.test:
            raise CannotRun(f"the plan says {self._running.test}, but {event['test']} runs")

    def _end(self, event: EndEvent) -> Iterator[Plan | Result]:
        """A test has ended, or a file could not be collected."""
        yield from self._take_last()
        self._last = Result(*self._next(), **event["result"])
        self._running = None
        self._ended += 1

    def _process_ended(self, process: _Process, *, progress: bool) -> Iterator[Plan | Result]:
        """The process is gone: at the end of its tests, or with one of them."""
        if self._plan is None and process.status == _PYTEST_USAGE:
            raise BadSelection(process.said.removeprefix("ERROR: "))
        culprit = self._running or self._last
        kind = SHORTAGE if process.lacking else TIMEOUT if process.killed else CRASHED
        if self._running:
            seconds = time.monotonic() - self._started
            detail = "\n".join(filter(None, [process.how if process.lacking else "", process.said]))
            yield Result(*self._running, kind, process.lacking or process.how, detail, seconds)
            self._running = None
            self._ended += 1
        elif self._last:
            if not self._complete or process.killed or process.status not in _PYTEST_ENDED:
                self._charge(self._last, kind, process)
            yield from self._take_last()
        elif not progress:
            lacking = shortage.of_error(None, process.said) or shortage.of_descriptors()
            if lacking and not process.killed:
                raise CannotRun(f"pytest ended before the first test: {lacking}")
            said = f": {process.said}" if process.said else ""
            raise CannotRun(f"pytest ended before the first test, {process.how}{said}")
        if culprit and not process.gone:
            raise CannotRun(f"{culprit.test} hangs in the kernel and can't be killed")

    def _charge(self, last: Result, kind: str, process: _Process) -> None:
        """The process died after its last test had ended: that test failed, if it had not yet."""
        how = f"after the test: {process.how}"
        detail = "\n".join(filter(None, [last.detail, how, process.said]))
        self._last = last._replace(detail=detail)
        if last.result in (PASSED, SKIPPED, KNOWN_DEFECT):
            self._last = self._last._replace(result=kind, message=process.lacking or how)

    def _next(self) -> Planned:
        assert self._plan is not None, "the plan comes first"
        return self._plan.tests[self._ended]

    def _take_last(self) -> Iterator[Plan | Result]:
        if self._last:
            yield self._last
            self._last = None


class _Process:
    """pytest in a forked process with a session of its own: Ctrl-C reaches only the parent."""

    killed = False
    gone = False
    #: The exit status; minus the signal's number if a signal ended it.
    status = 0

    def __init__(self, folder: Path, selection: Selection, skip: int, *, collect: bool) -> None:
        self._job = folder, selection, skip
        self._collect = collect
        #: What it wrote to its error output, after its end.
        self.said = ""
        #: What it ran out of, if that ended it.
        self.lacking = ""
        #: For how long it had waited for a CPU when the test that runs now started; its time limit.
        self._waited: float | None = None
        self._timeout = 0.0

    def __enter__(self) -> _Process:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or parent and child would both write what is buffered
        self._before = shortage.Before.now()
        with ExitStack() as opened:
            try:
                self._errors = opened.enter_context(os.fdopen(os.memfd_create("errors"), "w+b"))
                self._pipe, writable = os.pipe()
                opened.callback(os.close, self._pipe)
                opened.callback(os.close, writable)
                self._pid = os.fork()
            except OSError as error:
                why = shortage.of_error(error, "") or error.strerror
                raise CannotRun(f"no process can be made for the tests: {why}") from None
            opened.pop_all()
        if self._pid == 0:
            self._be_pytest(writable)
        os.close(writable)
        return self

    def _be_pytest(self, pipe: int) -> NoReturn:
        status = _PYTEST_INTERNAL
        try:
            os.setsid()
            os.close(self._pipe)  # then writes fail once the parent is gone
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            for number, target in enumerate((null, null, self._errors.fileno())):
                os.dup2(target, number)
            faulthandler.enable(self._errors.fileno())  # pytest redirects 2 while it captures
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

    def events(self) -> Iterator[Event]:
        """What the process reports until it has ended, or was killed for its silence."""
        rest = b""
        deadline = time.monotonic() + BETWEEN
        while True:
            ended = self._has_ended()  # asked before the last events are read
            wait = 0.0 if ended else min(0.5, max(0.0, deadline - time.monotonic()))
            if select.select([self._pipe], [], [], wait)[0]:
                data = os.read(self._pipe, 1 << 16)
                if data:
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        event: Event = json.loads(line)
                        allowed = BETWEEN
                        if event["event"] == "start":
                            allowed = event["timeout"] + GRACE
                            self._waited, self._timeout = shortage.waited(self._pid), allowed
                        deadline = time.monotonic() + allowed
                        yield event
                    continue
                ended = self._wait(deadline - time.monotonic())
            if ended:
                return
            if time.monotonic() > deadline:
                self.killed = True
                self.lacking = shortage.of_time(self._waited, self._pid, self._timeout)
                os.kill(self._pid, signal.SIGABRT)  # faulthandler writes where it hangs
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
                os.killpg(self._pid, signal.SIGKILL)  # and what the tests have left running
            os.kill(self._pid, signal.SIGKILL)
            self.gone = self._wait(_DYING)
            if self.gone:
                _, status, usage = os.wait4(self._pid, 0)
                self.status = os.waitstatus_to_exitcode(status)
                if not self.killed:
                    seconds = usage.ru_utime + usage.ru_stime
                    self.lacking = shortage.of_death(self._before, self.status, seconds)
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
