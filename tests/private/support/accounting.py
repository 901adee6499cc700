"""What the kernel counts: memory, VMs and open files."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .requirements import missing
from .syscalls import MIB


def meminfo(name: str) -> int:
    """A value of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"no {name} in /proc/meminfo")


#: An amount that shows in /proc/meminfo, and how far those counters may be off.
BIG, SLACK = 16 * MIB, 4 * MIB


class Unevictable:
    """The growth of unevictable memory since it was made: pages of private files."""

    def __init__(self) -> None:
        self.before = meminfo("Unevictable")

    def is_about(self, size: int) -> bool:
        """Whether it is about `size` bytes, within 5 seconds: the kernel frees some pages later."""
        deadline = time.monotonic() + 5
        while abs(meminfo("Unevictable") - self.before - size) > SLACK:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def vms_alive() -> set[str]:
    """The names of the kernel's VMs in debugfs."""
    folder = Path("/sys/kernel/debug/kvm")
    if not os.access(folder, os.R_OK):
        missing("debugfs", "/sys/kernel/debug/kvm can't be read")
    return {name for name in os.listdir(folder) if name[0].isdigit()}


def files_open() -> int:
    """The number of open files in the system."""
    return int(Path("/proc/sys/fs/file-nr").read_text().split()[0])
