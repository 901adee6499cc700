"""Guests of the kernel guest_memfd-in-place with conversion in place switched on.

`make test-in-place` runs these; `make test` does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kbuild.kernels import IN_PLACE
from vm.test_kernels import image, run_examples, vm
from vm.test_linux import hide_a_marker

NAME, ABI = "guest_memfd-in-place", "guest_memfd_in_place"
OPTIONS = ("--append", IN_PLACE)

pytestmark = pytest.mark.timeout(1000)


def test_the_examples() -> None:
    """The guest finds the same page after a conversion, and the host no private one."""
    printed = run_examples(NAME, *OPTIONS)
    assert "ok     the upper half shared: the same page" in printed
    assert "ok     which the host does not find any more" in printed


def test_a_marker_in_private_memory(tmp_path: Path) -> None:
    """What a guest's programs have in private memory the host does not find."""
    hide_a_marker(NAME, ABI, tmp_path, *OPTIONS)


def test_boot_private() -> None:
    """`kvmpriv boot --private` runs a command in Linux, and returns its status."""
    boot = (sys.executable, "-m", "kvmpriv", "boot", "--private", "--memory", "256M")
    command = ("--kernel", image(NAME), "--run", "grep -c Movable /proc/zoneinfo; exit 5")
    done = vm(NAME, *boot, *command, options=OPTIONS, timeout=300)
    assert (done.returncode, done.stdout) == (5, "1\n"), done.stderr
