"""The part of `mutate` that runs in the VM: try one break after the other, each in a process.

    scripts/launch.py kbuild.trial MODULE '[["NAME", ["test_file.py::test", …]], …]'

MODULE is that of the kernel whose parameter `break` selects a break.
Lines that begin with `@@` are for mutate: `@@ NAME`, then what pytest prints while the break is in
force, `@@ ended STATUS`; where tests failed `@@ without STATUS`, when they were tried again without
it; `@@ stuck` when a process cannot be ended.  The tests are imported once for all: in an emulated
machine that takes longer than most of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

SUITE = Path("tests/private")
#: Seconds for one test: spins are made to end.
ONE = 60
#: The exit status if a process can't be ended.
STUCK = 99


def report(*words: object) -> None:
    """Print a line for mutate.  A process that was killed may have left one without an end."""
    print("\n@@", *words, flush=True)


def run_tests(tests: list[str]) -> int:
    """The exit status of pytest; -N if signal N ended it, as SIGKILL does after too long."""
    import pytest

    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        options = ["-v", "-x", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
        options += ["-o", f"timeout={ONE}", "-o", "addopts="]
        code = 70
        try:
            code = int(pytest.main([*options, *(str(SUITE / test) for test in tests)]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    # The whole suite has no time limit here; scripts/vm and mutate have.
    end = time.monotonic() + (4 * ONE if tests != [""] else 1e6)
    killed = False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            if killed:
                report("stuck")
                os._exit(STUCK)
            os.kill(pid, signal.SIGKILL)
            killed, end = True, time.monotonic() + ONE / 2
        time.sleep(0.02)


def main(arguments: list[str]) -> int:
    """Try them all."""
    import pytest

    selected = Path("/sys/module", arguments[0], "parameters/break")
    jobs: list[tuple[str, list[str]]] = json.loads(arguments[1])
    files = {str(SUITE / test.partition("::")[0]) for _, tests in jobs for test in tests}
    if code := pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *sorted(files)]):
        return int(code)
    booted_with = selected.read_text().strip()
    for name, tests in jobs:
        if booted_with == "none":
            selected.write_text(name)
        assert selected.read_text().strip() == name, f"the kernel has no break {name}"
        report(name)
        code = run_tests(tests)
        report("ended", code)
        if booted_with == "none":
            selected.write_text("none")
            if code != 0:
                report("without", run_tests(tests))
    return 0
