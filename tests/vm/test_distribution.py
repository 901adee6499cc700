"""Debian, made from its own packages, as a guest in the kernels of scripts/kernel.

`make test-distribution` runs it: Debian boots for minutes in an emulated processor.  The tests are
in distribution.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from private.support.requirements import REQUIRED, missing
from vm.test_kernels import SCRIPTS, image

pytestmark = [pytest.mark.xdist_group("distribution"), pytest.mark.timeout(3600)]
TESTS = [
    ("guest_memfd", "test_stock_kernel"),
    ("guest_memfd", "test_shared"),
    ("guest_memfd", "test_private"),
    ("restrictedmem", "test_private"),
    ("guest_memfd", "test_console"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the disk, the kernel and the initrd; the guests write to this disk."""
    if "distribution" not in REQUIRED:
        missing("distribution", "`make test-distribution` was not called")
    made = subprocess.run([SCRIPTS / "distribution"], check=True, stdout=subprocess.PIPE, text=True)
    folder = tmp_path_factory.mktemp("distribution")
    command = ["cp", "--sparse=always", "-R", f"{made.stdout.strip()}/.", str(folder)]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.parametrize(("kernel", "test"), TESTS)
def test_debian(folder: Path, kernel: str, test: str) -> None:
    image(kernel)
    command: list[str | Path] = [SCRIPTS / "vm", kernel, "-q", "--memory", "3G"]
    command += ["--timeout", "1500", "--output-dir", folder, "--", sys.executable, "-m", "pytest"]
    command += ["-p", "no:cacheprovider", "-rA", "--timeout=1400"]
    command += [f"--linux-kernel={folder}/vmlinuz", f"tests/vm/distribution.py::{test}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
