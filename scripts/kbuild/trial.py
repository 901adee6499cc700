"""Inside the VM, for `mutate`: try breaks one after the other, each in a process of its own.

    scripts/launch.py kbuild.trial '[["NAME", ["test_file.py::test", …]], …]'

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

SELECTED = Path("/sys/module/restrictedmem/parameters/break")
SUITE = Path("tests/private")
#: Seconds for one test: spins are made to end.
ONE = 60
#: Our exit status when a process of ours can't be ended.
STUCK = 99


def tell(*words: object) -> None:
    print("@@", *words, flush=True)


def run_tests(tests: list[str]) -> int:
    """pytest's exit status; -N when signal N ended it, which is ours when it takes too long."""
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
    # The whole suite takes its time.
    end = time.monotonic() + (4 * ONE if tests != [""] else 1e6)
    killed = False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            if killed:
                tell("stuck")
                os._exit(STUCK)
            os.kill(pid, signal.SIGKILL)
            killed, end = True, time.monotonic() + ONE / 2
        time.sleep(0.02)


def main(arguments: list[str]) -> int:
    """Try them all."""
    import pytest

    jobs: list[tuple[str, list[str]]] = json.loads(arguments[0])
    files = {str(SUITE / test.partition("::")[0]) for _, tests in jobs for test in tests}
    if code := pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *sorted(files)]):
        return int(code)
    booted_with = SELECTED.read_text().strip()
    for name, tests in jobs:
        if booted_with == "none":
            SELECTED.write_text(name)
        assert SELECTED.read_text().strip() == name, f"the kernel knows no break {name}"
        tell(name)
        code = run_tests(tests)
        tell("ended", code)
        if booted_with == "none":
            SELECTED.write_text("none")
            if code != 0:
                tell("without", run_tests(tests))
    return 0
