"""``kvmpriv selftest``: checks whether the running kernel keeps the rules of private memory."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from contextlib import closing
from typing import TYPE_CHECKING, NoReturn

from ..exit_status import ExitStatus
from ..selftest.records import INTERRUPTED, SHORTAGE, Result, Run
from . import fail
from ._options import parse_path, parse_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from ..selftest.documents import Selection
    from ..selftest.runner import Plan

__all__ = ["EXAMPLES", "EXIT_STATUS", "add_arguments", "main"]

#: What the suite needs beside kvmpriv: module -> the distribution that has it.
_NEEDS = {
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
    "jsonschema": "jsonschema",
}


EXAMPLES = (
    ("kvmpriv selftest", "run all tests that this kernel can run; print a table"),
    ("kvmpriv selftest --list 'slot.*'", "list the rules about slots and their tests"),
    ("kvmpriv selftest --json > a.json", "keep the results of this kernel"),
    ("kvmpriv selftest --ktap --junit results.xml", "print KTAP, and write a file for a CI server"),
    ("kvmpriv selftest --compare a.json b.json", "show what differs between two kernels"),
)
EXIT_STATUS: dict[ExitStatus | str, str] = {
    ExitStatus.OK: "every test that could run has passed",
    ExitStatus.NEGATIVE: "a test failed, crashed or hung, or --compare found a difference",
    ExitStatus.USAGE: "the command line can't be used, or it selects no test",
    ExitStatus.UNABLE: "the suite could not be run, a test ran out of descriptors, memory or CPU "
    "time (and no test failed), or the output can't be written",
    ExitStatus.ALL_SKIPPED: "every test was skipped",
    "128+N": "signal N ended the command",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kvmpriv selftest``."""
    parser.description = (
        "Test the running kernel against the rules of guest private memory, through the ABI that "
        "it has: memfd_restricted (v9) or guest_memfd. Tests that need what this kernel or this "
        "host does not have are skipped, and each skip names what is missing. A test that ran out "
        "of descriptors, memory or CPU time gives no result for the kernel: it is a shortage, and "
        "no failure. The suite needs pytest: pip install 'kvmpriv[test]'.\n\n"
        "KVMPRIV_REQUIRE=restrictedmem,guest_memfd in the environment turns the skips that begin "
        "with these names into failures."
    )
    add = parser.add_argument
    add(
        "rules",
        nargs="*",
        metavar="RULE",
        help="test these rules only; * and ? stand for any characters",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--list",
        action="store_true",
        help="run nothing; print a line for each rule and test: RULE<TAB>TEST<TAB>SENTENCE",
    )
    form.add_argument(
        "--ktap", action="store_true", help="print KTAP, each test as soon as it has ended"
    )
    form.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document; kvmpriv/selftest/schema.json describes it",
    )
    form.add_argument(
        "--compare",
        nargs=2,
        type=parse_path,
        metavar=("A.JSON", "B.JSON"),
        help="run nothing; print the rules whose results differ in two documents of --json",
    )
    add(
        "--junit",
        type=parse_path,
        metavar="FILE",
        help="also write the results to FILE as JUnit XML; FILE is replaced in one step",
    )
    add(
        "-v",
        "--verbose",
        action="store_true",
        help="print a line for each rule that was skipped, too",
    )
    add(
        "-k",
        dest="expression",
        default="",
        metavar="EXPR",
        help="run the tests that the expression selects, as pytest's -k",
    )
    add(
        "--dangerous",
        action="store_true",
        help="also run tests that crash or hang a kernel that has the defect they look for",
    )
    add(
        "--timeout",
        type=parse_seconds,
        default=120.0,
        metavar="SECONDS",
        help="time limit of a test that sets none itself (default: %(default)g)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run, list or compare; returns the exit status."""
    from ..selftest import runner

    if arguments.junit is not None and (arguments.compare or arguments.list):
        return fail("selftest", "--junit needs a run of the suite", ExitStatus.USAGE)
    if arguments.compare:
        if arguments.rules or arguments.expression:
            return fail(
                "selftest", "--compare reads whole documents: remove RULE and -k", ExitStatus.USAGE
            )
        return _compare(*arguments.compare)
    try:
        _check_installed()
        folder = runner.suite()
        if arguments.list:
            return _list(folder, _selection(arguments))
        return _run(folder, arguments)
    except runner.BadSelection as error:
        return fail("selftest", str(error), ExitStatus.USAGE)
    except runner.CannotRun as error:
        return fail("selftest", str(error), ExitStatus.UNABLE)


def _check_installed() -> None:
    """Raise CannotRun if a distribution of the `test` extra is missing."""
    from importlib.util import find_spec

    from ..selftest.runner import CannotRun

    lacking = [name for module, name in _NEEDS.items() if find_spec(module) is None]
    if lacking:
        names = " and ".join(lacking)
        raise CannotRun(f"the suite needs {names}: pip install 'kvmpriv[test]'")


def _selection(arguments: argparse.Namespace) -> Selection:
    return {
        "rules": arguments.rules,
        "expression": arguments.expression,
        "dangerous": arguments.dangerous,
        "timeout": arguments.timeout,
    }


def _list(folder: Path, selection: Selection) -> int:
    from ..selftest.runner import Plan, run

    with closing(run(folder, selection, collect=True)) as found:
        for plan in found:
            assert isinstance(plan, Plan)
            for test in plan.tests:
                for rule in test.rules or ("",):
                    sentence = plan.sentences.get(rule, "")
                    sys.stdout.write(f"{rule}\t{test.test}\t{sentence}\n")
    return 0


def _run(folder: Path, arguments: argparse.Namespace) -> int:
    from ..output import check_file
    from ..selftest import runner
    from ..selftest.kernel_log import KernelLog

    if arguments.junit is not None:
        try:
            check_file(arguments.junit)
        except OSError as error:
            return _unwritten(arguments.junit, error)
    selection = _selection(arguments)
    output = _FORMS["ktap" if arguments.ktap else "json" if arguments.json else "text"](
        KernelLog().unseen(), verbose=arguments.verbose
    )
    plan: Plan | None = None
    results: list[Result] = []
    started = time.monotonic()
    stopped = ""
    ending: BaseException | None = None
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        output.begin()
        with closing(runner.run(folder, selection)) as events:
            for event in events:
                if isinstance(event, Result):
                    assert plan is not None, "the plan comes first"
                    results.append(event)
                    output.result(len(results), event, plan)
                else:
                    plan = event
                    output.plan(plan)
    except (runner.CannotRun, runner.BadSelection) as error:
        stopped, ending = str(error), error
    except (KeyboardInterrupt, SystemExit) as error:  # the results so far are reported
        stopped, ending = INTERRUPTED, error
    finally:
        signal.signal(signal.SIGTERM, before)
        output.clear()
    if plan is None:
        assert ending is not None
        output.never_began(stopped)
        raise ending
    assert plan.host is not None, "only --list leaves it out"
    seconds = time.monotonic() - started
    run = Run(
        plan.host, selection, len(plan.tests), tuple(results), seconds, stopped, plan.sentences
    )
    output.end(run)
    sys.stdout.flush()
    if arguments.junit is not None:
        from ..output import write_file
        from ..selftest.junit import junit

        try:
            write_file(arguments.junit, junit(run), replace_only=True)
        except OSError as error:
            return _unwritten(arguments.junit, error)
    if ending is None:
        if short := run.totals[SHORTAGE]:
            what = "test was" if short == 1 else "tests were"
            fail("selftest", f"{short} {what} not tested, for a shortage", ExitStatus.UNABLE)
        return run.exit_status
    if isinstance(ending, runner.CannotRun):
        return fail("selftest", stopped, run.exit_status)
    raise ending


def _unwritten(path: str, error: OSError) -> ExitStatus:
    return fail("selftest", f"{path}: {error.strerror}", ExitStatus.UNABLE)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(ExitStatus.SIGNALLED + signal.SIGTERM)


class _Output(ABC):
    """What the user sees of a run: on a terminal its progress, on the error output."""

    def __init__(self, note: str, *, verbose: bool) -> None:
        self._note = note
        self._verbose = verbose
        self._shows_progress = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def begin(self) -> None:
        """Before the tests are known."""
        self._progress("looking for the tests")

    def never_began(self, why: str) -> None:  # noqa: B027  # nor then
        """The tests could not be found."""

    def plan(self, plan: Plan) -> None:
        """The tests are known."""
        self._next(0, plan)

    def result(self, number: int, result: Result, plan: Plan) -> None:
        """The test with this number (from 1) has ended."""
        self._next(number, plan)

    @abstractmethod
    def end(self, run: Run) -> None:
        """All tests have ended, or the run was stopped."""

    def _next(self, ended: int, plan: Plan) -> None:
        name = plan.tests[ended].test if ended < len(plan.tests) else ""
        self._progress(f"{ended}/{len(plan.tests)} {name[:60]}")

    def _progress(self, words: str) -> None:
        if self._shows_progress:
            sys.stderr.write(f"\r\x1b[K{words}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Remove the line of the progress."""
        if self._shows_progress:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class _Text(_Output):
    """The kernel as soon as the tests are known, and the report at the end."""

    def plan(self, plan: Plan) -> None:
        from ..selftest import report
        from ..terminal import colour_wanted

        self.clear()
        sys.stdout.write(report.heading(plan.host, self._note, colour=colour_wanted()))
        sys.stdout.flush()
        super().plan(plan)

    def end(self, run: Run) -> None:
        from ..selftest import report
        from ..terminal import colour_wanted

        sys.stdout.write(report.text(run, colour=colour_wanted(), verbose=self._verbose))


class _Json(_Output):
    """The report as one JSON document, at the end."""

    def end(self, run: Run) -> None:
        import json

        json.dump(run.to_json(), sys.stdout, indent=2)
        sys.stdout.write("\n")


class _Ktap(_Output):
    """KTAP, each line as soon as it is known."""

    def __init__(self, note: str, *, verbose: bool) -> None:
        super().__init__(note, verbose=verbose)
        self._shows_progress = False

    def begin(self) -> None:
        from ..selftest import report

        self._write(report.ktap_version())

    def never_began(self, why: str) -> None:
        from ..selftest import report

        self._write(report.ktap_bail_out(why))

    def plan(self, plan: Plan) -> None:
        from ..selftest import report

        self._write(report.ktap_plan(plan, self._note))

    def result(self, number: int, result: Result, plan: Plan) -> None:
        from ..selftest import report

        self._write(report.ktap_result(number, result, plan.sentences))

    def end(self, run: Run) -> None:
        from ..selftest import report

        self._write(report.ktap_end(run))

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


_FORMS: dict[str, type[_Output]] = {"text": _Text, "json": _Json, "ktap": _Ktap}


def _compare(*paths: str) -> int:
    import json
    from pathlib import Path

    from ..selftest import report
    from ..terminal import colour_wanted

    runs = []
    for path in paths:
        try:
            document = json.loads(Path(path).read_bytes(), parse_constant=_no_constant)
            runs.append(Run.from_json(document))
        except ImportError:
            return fail(
                "selftest",
                "--compare needs jsonschema: pip install 'kvmpriv[test]'",
                ExitStatus.UNABLE,
            )
        except OSError as error:
            return fail("selftest", f"{path}: {error.strerror}", ExitStatus.USAGE)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            return fail("selftest", f"{path}: not JSON: {error}", ExitStatus.USAGE)
        except ValueError as error:
            return fail("selftest", f"{path}: {error}", ExitStatus.USAGE)
    words, differ = report.compare((runs[0], runs[1]), (paths[0], paths[1]), colour=colour_wanted())
    sys.stdout.write(words)
    return ExitStatus.NEGATIVE if differ else ExitStatus.OK


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is not a JSON number")
