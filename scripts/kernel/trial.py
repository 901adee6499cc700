"""Inside the VM, for `mutate`: try breaks one after the other, each in a process of its own.

    python trial.py '[["NAME", ["test_file.py::test", …]], …]'

Lines that begin with `@@` are for mutate: `@@ NAME`, then what pytest prints while the break is in
force, `@@ ended STATUS`; and where tests failed, which of them, tried again without the break:
`@@ without STATUS`.  The suite is imported once for all of them: in an emulated machine that takes
longer than most tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

SELECTED = Path("/sys/module/restrictedmem/parameters/break")
SUITE = Path("tests/private")
#: Seconds for one test: spins are made to end.
ONE = 60


def tell(*words: object) -> None:
    print("@@", *words, flush=True)


def run_tests(tests: list[str]) -> int:
    """pytest's exit status; -N when signal N ended it, which may be ours after a long time."""
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
    end = time.monotonic() + 4 * ONE
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            end += 1e6
        time.sleep(0.02)


def main(jobs: list[tuple[str, list[str]]]) -> int:
    """Try them all."""
    if code := pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", str(SUITE)]):
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


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
