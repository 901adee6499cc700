"""The kernel's reports that something is wrong (scripts/vm loads this file alone)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

__all__ = ["TAINT", "TROUBLE", "KernelLog", "complaints"]

_Self = TypeVar("_Self", bound="KernelLog")

TAINT = Path("/proc/sys/kernel/tainted")

# What the kernel prints when something is wrong, at the start of a message.
TROUBLE = re.compile(
    r"^(?:\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? )?(?:"
    r"WARNING: |BUG: |[Kk]ernel BUG at |Oops[: ]|INFO: task .* blocked for more than|"
    r"INFO: (?:possible|suspicious|trying to register)|rcu: INFO: .*stall|"
    r"general protection fault|Kernel panic|KASAN: |UBSAN: |kmemleak: \d+ new suspected|"
    r"watchdog: BUG|list_(?:add|del) corruption|refcount_t: |ODEBUG: |double fault|"
    r"unreferenced object|Unable to handle kernel|invalid opcode: |"
    r"BUG \S+ \(.*\): )"
)


def complaints(log: str) -> list[str]:
    """The lines in which the kernel complains."""
    return [line for line in log.splitlines() if TROUBLE.match(line)]


class KernelLog:
    """/dev/kmsg from a mark on, where this user may read it: Documentation/ABI/testing/dev-kmsg."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            self._fd = -1

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; complaints() returns nothing from now on."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def mark(self) -> None:
        """Later calls of complaints() leave out what is in the log now."""
        if self._fd >= 0:
            os.lseek(self._fd, 0, os.SEEK_END)

    def complaints(self) -> list[str]:
        """The kernel's complaints since the mark; records of user space are left out."""
        found: list[str] = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, 1 << 14).decode(errors="replace")
            except BlockingIOError:
                break
            except BrokenPipeError:  # records were overwritten; read on with the oldest
                continue
            prefix, _, message = record.partition(";")
            if int(prefix.partition(",")[0]) >> 3 == 0:  # the facility
                line, *_ = message.split("\n")  # then: of which device
                found += complaints(line.replace(r"\x0a", "\n"))
        return found

    def unseen(self) -> str:
        """A warning if complaints can be missed: no log can be read, and the taint is set."""
        taint = TAINT.read_text().strip()
        if self._fd >= 0 or taint == "0":
            return ""
        return (
            f"the kernel is tainted ({taint}) and /dev/kmsg can't be read: another complaint of "
            "the same kind can't be seen"
        )
