"""For all tests with VMs: Python's byte code of what runs in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbuild import suite
from kbuild.locks import locked

#: The tests that tests of this folder run in a VM.
RUN_IN_VMS = ("tests/guest", "tests/host", "tests/vm/talk.py")


@pytest.fixture(scope="session", autouse=True)
def compiled(of_this_run: Path) -> None:
    """Python compiles in a VM what is not compiled here: in each VM anew, and slowly."""
    done = of_this_run / "compiled"
    with locked(of_this_run / "compiled.lock", "is compiling the tests"):
        if not done.exists():
            suite.compile_tests(RUN_IN_VMS)
            done.touch()
