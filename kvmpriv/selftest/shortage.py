"""What this process or this machine ran out of: then a test gives no result for the kernel.

An error alone does not prove it: a kernel with a defect may return EMFILE or ENOMEM, too.  So each
function also looks at the limit that would explain the error.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..terminal import format_size

__all__ = ["Before", "of_death", "of_descriptors", "of_error", "of_time", "waited"]

#: So many descriptors may be fewer than what a test uses.
_FEW_DESCRIPTORS = 256
#: So much memory may be less than what a test uses, in bytes.
_LITTLE_MEMORY = 512 << 20
#: A test that waited for a CPU for at least this part of its time limit was not slow by itself.
_STARVED = 0.5
#: Less than so many seconds is no shortage: a busy machine lets a process wait for a part of them.
_LEAST_WAIT = 1.0

#: The name or the text of such an error on the left of a comparison, or without one: a test that
#: expects it has it on the right.
_DESCRIPTORS = re.compile(r"^(?:(?!==).)*(?:\bE[MN]FILE\b|Too many open files)", re.DOTALL)
_MEMORY = re.compile(
    r"^(?:(?!==).)*(?:\bENOMEM\b|Cannot allocate memory|\bMemoryError\b)", re.DOTALL
)


def of_error(error: BaseException | None, message: str) -> str:
    """The shortage because of which a test ended with `error` and with `message`; empty if none.

    The causes of the error count, too: a test may have raised it while it handled another one.
    """
    numbers: set[int | None] = set()
    memory = False
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        memory = memory or isinstance(error, MemoryError)
        if isinstance(error, OSError):
            numbers.add(error.errno)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if numbers & {errno.EMFILE, errno.ENFILE} or _DESCRIPTORS.match(message):
        return of_descriptors()
    if memory or errno.ENOMEM in numbers or _MEMORY.match(message):
        return _memory()
    return ""


def of_descriptors() -> str:
    """The shortage if this process or the host has few descriptors left; empty if not."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:  # it needs a descriptor itself
        used = limit
    if limit != resource.RLIM_INFINITY and used + _FEW_DESCRIPTORS > limit:
        return f"descriptors: this process may have {limit} open files: ulimit -n 1024"
    allocated, most = _numbers("/proc/sys/fs/file-nr", 0, 2)
    if allocated is not None and most is not None and allocated + _FEW_DESCRIPTORS > most:
        return f"descriptors: this host may have {most} open files: sysctl fs.file-max"
    return ""


def _memory() -> str:
    for name, limit in (("-v", resource.RLIMIT_AS), ("-d", resource.RLIMIT_DATA)):
        size = resource.getrlimit(limit)[0]
        if size != resource.RLIM_INFINITY:
            return f"memory: this process may use {format_size(size)}: ulimit {name} unlimited"
    if _numbers("/proc/sys/vm/overcommit_memory", 0) == [2]:
        return "memory: this host does not overcommit it: sysctl vm.overcommit_memory"
    fields = dict(line.split(":") for line in _read("/proc/meminfo").splitlines())
    with suppress(KeyError, ValueError):
        available = int(fields["MemAvailable"].split()[0]) * 1024
        if available < _LITTLE_MEMORY:
            return f"memory: this host has {format_size(available)} available"
    group = "/sys/fs/cgroup" + _read("/proc/self/cgroup").partition("0::")[2].strip()
    (used,), (most,) = (_numbers(f"{group}/memory.{which}", 0) for which in ("current", "max"))
    if used is not None and most is not None and used + _LITTLE_MEMORY > most:
        return f"memory: this process's memory cgroup may use {format_size(most)}"
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, MemoryError):
        return ""


def _numbers(path: str, *columns: int) -> list[int | None]:
    words = _read(path).split()
    return [
        int(words[column]) if column < len(words) and words[column].isdecimal() else None
        for column in columns
    ]


# -- CPU time --------------------------------------------------------------------------------------


def waited(pid: int) -> float | None:
    """For how many seconds the main thread of a process has waited for a CPU, None if unknown.

    Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat".
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def of_time(before: float | None, pid: int, timeout: float) -> str:
    """The shortage if a test ran into its timeout because it got no CPU.

    `before` is what waited() returned when it began.
    """
    now = waited(pid)
    if before is None or now is None or now - before < max(timeout * _STARVED, _LEAST_WAIT):
        return ""
    return f"CPU time: the test waited for a CPU for half of its {timeout:g} s, or longer"


class Before(NamedTuple):
    """What of_death() compares with, as it was when the process started."""

    oom_kills: int

    @classmethod
    def now(cls) -> Before:
        """Look at it now."""
        return cls(_oom_kills())


def _oom_kills() -> int:
    counters = re.search(r"^oom_kill (\d+)$", _read("/proc/vmstat"), re.MULTILINE)
    return int(counters[1]) if counters else 0


def of_death(before: Before, status: int, seconds: float) -> str:
    """The shortage because of which the kernel ended a process; empty if there is none.

    `status` is minus the signal's number; `seconds` is the CPU time that the process had.
    """
    limit = resource.getrlimit(resource.RLIMIT_CPU)[0]
    by_limit = limit != resource.RLIM_INFINITY and seconds >= limit - 1
    if status in (-signal.SIGXCPU, -signal.SIGKILL) and by_limit:
        return f"CPU time: a process may use {limit} s: ulimit -t unlimited"
    if status == -signal.SIGKILL and _oom_kills() > before.oom_kills:
        return "memory: the kernel killed the process, as the host or its cgroup had none left"
    return ""
