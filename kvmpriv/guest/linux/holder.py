"""Who has a file locked, for the message to one who wants it, too."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["holder_of"]

_LOCKS = Path("/proc/locks")


def holder_of(fd: int) -> str:
    """Whose lock by flock(2) is on the file `fd`: ``process 1234 (python3 guest.py)``.

    "this process" for a lock of our own; "another process" if the kernel does not tell, as for one
    of another PID namespace.
    """
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    found: dict[bool, int] = {}
    with suppress(OSError, ValueError):
        for line in _LOCKS.read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 1234 fe:00:131 0 EOF; one that waits has -> after the number
            words = line.split()
            if words[1] != "FLOCK" or not words[5].endswith(f":{status.st_ino}"):
                continue
            # On some file systems the device is not that of stat(2); the number alone is a hint.
            found[words[5].rpartition(":")[0] == device] = int(words[4])
    pid = found.get(True, found.get(False, 0))
    if pid == os.getpid():
        return "this process"
    if pid <= 0:
        return "another process"
    command = b""
    with suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    words = command.decode(errors="backslashreplace").split("\0")
    return f"process {pid}" + (f" ({' '.join(words).strip()[:100]})" if command else "")
