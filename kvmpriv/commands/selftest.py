"""``kvmpriv selftest``: holds the running kernel to the rules of private memory."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, NoReturn

from ..exit_status import ExitStatus
from ..selftest.records import INTERRUPTED, Result, Run
from . import fail
from ._options import parse_path, parse_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from ..selftest.runner import Plan

__all__ = ["EXAMPLES", "EXIT_STATUS", "add_arguments", "main"]

#: What the suite needs beside kvmpriv: module -> the distribution that has it.
_NEEDS = {
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
}


EXAMPLES = (
    ("kvmpriv selftest", "run all tests that this kernel can run; print a table"),
    ("kvmpriv selftest --list 'slot.*'", "list the rules about slots and their tests"),
    ("kvmpriv selftest --json > a.json", "keep the results of this kernel"),
    ("kvmpriv selftest --compare a.json b.json", "show what differs between two kernels"),
)
EXIT_STATUS: dict[ExitStatus | str, str] = {
    ExitStatus.OK: "every test that could run has passed",
    ExitStatus.NEGATIVE: "a test failed, crashed or hung, or --compare found a difference",
    ExitStatus.USAGE: "the command line can't be used, or it selects no test",
    ExitStatus.UNABLE: "the suite could not be run, or standard output can't be written",
    ExitStatus.ALL_SKIPPED: "every test was skipped",
    "128+N": "signal N ended the command",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kvmpriv selftest``."""
    parser.description = (
        "Test the running kernel against the rules of guest private memory, through the ABI that "
        "it has: memfd_restricted (v9) or guest_memfd. Tests that need what this kernel or this "
        "host does not have are skipped, and each skip names what is missing. The suite needs "
        "pytest: pip install 'kvmpriv[test]'.\n\n"
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
        help="run nothing; print a line for each rule and test: RULE<TAB>TEST",
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
        help="run nothing; show two documents of --json side by side, differences first",
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

    if arguments.compare:
        if arguments.rules or arguments.expression:
            return fail(
                "selftest", "--compare takes whole documents, no RULE and no -k", ExitStatus.USAGE
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
    from importlib.util import find_spec

    from ..selftest.runner import CannotRun

    lacking = [name for module, name in _NEEDS.items() if find_spec(module) is None]
    if lacking:
        names = " and ".join(lacking)
        raise CannotRun(f"the suite needs {names}: pip install 'kvmpriv[test]'")


def _selection(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "rules": arguments.rules,
        "expression": arguments.expression,
        "dangerous": arguments.dangerous,
        "timeout": arguments.timeout,
    }


def _list(folder: Path, selection: dict[str, Any]) -> int:
    from ..selftest.runner import Plan, run

    with closing(run(folder, selection, collect=True)) as found:
        for plan in found:
            assert isinstance(plan, Plan)
            for test in plan.tests:
                for rule in test.rules or ("",):
                    sys.stdout.write(f"{rule}\t{test.test}\n")
    return 0


def _run(folder: Path, arguments: argparse.Namespace) -> int:
    from ..selftest import report, runner
    from ..selftest.kernel_log import KernelLog
    from ..terminal import colour_wanted

    unseen = KernelLog().unseen()
    selection = _selection(arguments)
    plan: Plan | None = None
    results: list[Result] = []
    started = time.monotonic()
    stopped = ""
    ending: BaseException | None = None
    progress = _Progress()
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with closing(runner.run(folder, selection)) as events:
            for event in events:
                if isinstance(event, Result):
                    results.append(event)
                    if arguments.ktap:
                        sys.stdout.write(report.ktap_result(len(results), event))
                else:
                    plan = event
                    if arguments.ktap:
                        sys.stdout.write(report.ktap_head(plan, unseen))
                if arguments.ktap:
                    sys.stdout.flush()
                elif plan:
                    progress.show(len(results), plan)
    except runner.CannotRun as error:
        stopped, ending = str(error), error
    except (KeyboardInterrupt, SystemExit) as error:  # then what has been found is told, too
        stopped, ending = INTERRUPTED, error
    finally:
        signal.signal(signal.SIGTERM, before)
        progress.clear()
    if plan is None:
        assert ending is not None
        raise ending
    seconds = time.monotonic() - started
    run = Run(plan.host, selection, len(plan.tests), tuple(results), seconds, stopped)
    if arguments.ktap:
        sys.stdout.write(report.ktap_end(run))
    elif arguments.json:
        import json

        json.dump(run.to_json(), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(report.text(run, unseen, colour=colour_wanted()))
    sys.stdout.flush()
    if ending is None:
        return run.exit_status
    if isinstance(ending, runner.CannotRun):
        return fail("selftest", stopped, run.exit_status)
    raise ending


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(ExitStatus.SIGNALLED + signal.SIGTERM)


class _Progress:
    """On a terminal, how far the run is: a line on the error output, written over."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, number: int, plan: Plan) -> None:
        """That so many tests have ended, and which is next."""
        if self._on:
            name = plan.tests[number].test if number < len(plan.tests) else ""
            sys.stderr.write(f"\r\x1b[K{number}/{len(plan.tests)} {name[:60]}")
            sys.stderr.flush()

    def clear(self) -> None:
        """The line is gone."""
        if self._on:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _compare(*paths: str) -> int:
    import json
    from pathlib import Path

    from ..selftest import report
    from ..terminal import colour_wanted

    runs = []
    for path in paths:
        try:
            runs.append(Run.from_json(json.loads(Path(path).read_bytes())))
        except OSError as error:
            return fail("selftest", f"{path}: {error.strerror}", ExitStatus.USAGE)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            return fail("selftest", f"{path}: no JSON: {error}", ExitStatus.USAGE)
        except ValueError as error:
            return fail("selftest", f"{path}: {error}", ExitStatus.USAGE)
    words, differ = report.compare((runs[0], runs[1]), (paths[0], paths[1]), colour=colour_wanted())
    sys.stdout.write(words)
    return ExitStatus.NEGATIVE if differ else ExitStatus.OK
