"""What a guest uses: memory by range, CPU time, exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...exits import exit_name
from ...memory import PAGE_SIZE
from .layout import Range

if TYPE_CHECKING:
    from .dispatch import GuestThread
    from .io import IoThread

__all__ = ["Cost", "RangeUse", "emulation", "mapped_bytes", "measure_cost", "range_use"]

_MAPPED = {"pages_4k": PAGE_SIZE, "pages_2m": 2 << 20, "pages_1g": 1 << 30}
# KVM emulates one instruction for nearly each exit of a guest that the processor runs.  A KVM that
# emulates all of the guest's code emulates far more.
_EMULATED_MIN, _EMULATED_PER_EXIT = 20_000, 20


class RangeUse(NamedTuple):
    """How much of a range is in use, in bytes."""

    range: Range
    #: Shared memory of the range that is populated.  Of a private range it should be 0: anything
    #: else is shared memory that the guest does not use.
    resident: int
    #: Private memory that KVM has mapped into the guest.  It is a lower limit: KVM reports how
    #: much is mapped in all, and all populated shared memory counts as mapped here.
    private: int


class Cost(NamedTuple):
    """What this process has spent on a guest so far.

    `rss`, `shared` and `others` are those of the process: if it has several guests, of all of them.
    Everything else is the guest's own.
    """

    #: Resident memory of the process, in bytes.
    rss: int
    #: The part of `rss` that is shared with a file or another process, in bytes.
    shared: int
    #: CPU time of each vCPU's thread, in seconds, user and system: the guest's code is part of it.
    cpu: tuple[float, ...]
    #: CPU time of all other threads of the process, in seconds.
    others: float
    #: Exits to user space of each vCPU.
    exits: tuple[int, ...]
    #: Exits to user space of all vCPUs by their reason, such as ``KVM_EXIT_IO``.
    kinds: dict[str, int]
    #: CPU time of the thread that serves the queues of virtio devices, in seconds; also in
    #: `others`.
    devices: float
    #: Seconds from the start of the guest until its end, or until now.
    wall: float
    #: Shared memory of the guest that is populated, in bytes.
    memory: int
    #: Private memory that KVM has mapped into the guest, in bytes: a lower limit, as in `RangeUse`;
    #: 0 where KVM has no statistics.
    private: int


def mapped_bytes(stats: Mapping[str, int]) -> int:
    """The bytes that KVM has mapped into a guest, by the statistics of its VM."""
    return sum(stats.get(name, 0) * size for name, size in _MAPPED.items())


def range_use(ranges: Sequence[Range], resident: Sequence[int], mapped: int) -> list[RangeUse]:
    """What each of `ranges` uses.

    `resident` is the populated shared memory of each, `mapped` what KVM has mapped in all; in
    bytes.  KVM does not report by range: of several private ranges the first ones get all.
    """
    held = list(zip(ranges, resident, strict=True))
    left = max(0, mapped - sum(size for part, size in held if part.kind == "shared"))
    found = []
    for part, size in held:
        private = min(part.size, left) if part.kind == "private" else 0
        left -= private
        found.append(RangeUse(part, size, private))
    return found


def measure_cost(
    threads: Sequence[GuestThread],
    exits: Sequence[Mapping[int, int]],
    io: IoThread,
    wall: float,
    usage: Sequence[RangeUse],
) -> Cost:
    """What this process has spent so far.

    `threads` are those of the vCPUs, and `exits` the numbers of their exits by reason; `io` serves
    the queues.
    """
    import psutil

    process = psutil.Process()
    info = process.memory_info()
    used = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    cpu = tuple(thread.seconds or used.pop(thread.native_id or 0, 0.0) for thread in threads)
    counts = [dict(each) for each in exits]  # one step each: the vCPUs' threads go on counting
    kinds: dict[str, int] = {}
    for reason, count in (item for each in counts for item in each.items()):
        name = exit_name(reason)
        kinds[name] = kinds.get(name, 0) + count
    return Cost(
        rss=info.rss,
        shared=info.shared,
        cpu=cpu,
        others=sum(used.values()),
        exits=tuple(sum(each.values()) for each in counts),
        kinds=kinds,
        devices=io.seconds or used.get(io.native_id or 0, 0.0),
        wall=wall,
        memory=sum(use.resident for use in usage),
        private=sum(use.private for use in usage),
    )


def emulation(stats: Mapping[str, int]) -> str:
    """Why Linux can't run, if KVM emulates all of the guest's code; else "".

    `stats` are those of a vCPU.  A paravirtual KVM emulates a kernel that was not built for it,
    and would take hours to boot it.
    """
    emulated, exits = stats.get("insn_emulation", 0), stats.get("exits", 0)
    if emulated <= max(_EMULATED_MIN, _EMULATED_PER_EXIT * exits):
        return ""
    return (
        f"this KVM emulates the guest's kernel instruction by instruction ({emulated} instructions"
        f" in {exits} exits so far), as a paravirtual KVM does: Linux can't run"
    )
