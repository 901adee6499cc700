"""Where a Linux guest's memory is: ranges, as data; and the bytes behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...memory import PAGE_SIZE, HostMemory

__all__ = [
    "HIGH",
    "LOW_MAX",
    "MMIO",
    "PRIVATE_LOW_MIN",
    "GuestAddressError",
    "GuestMemory",
    "Range",
    "plan",
    "private_cmdline",
    "resident",
]

_GIB = 1 << 30
#: RAM ends here below 4 GiB, devices have the rest, and what is left of the RAM begins at HIGH.
LOW_MAX, HIGH = 3 * _GIB, 4 * _GIB
#: How much of a guest with private memory is shared, at least.
PRIVATE_LOW_MIN = 128 << 20
_ALIGNMENT = 4 << 20
#: In what pieces the kernel gives bounce buffers out, and how much it has of them at least; it
#: rounds up to a power of two (kernel/dma/swiotlb.c).
_BOUNCE_SLOT, _BOUNCE_MIN = 2048, 1 << 20
#: The virtio devices' registers, a page each.
MMIO = 0xD0000000
#: RAM that the first megabyte has for whoever wants it; from there to 1 MiB are tables.
CONVENTIONAL_END = 0x9F000


class Range(NamedTuple):
    """Guest physical addresses of one kind; `gpa` and `size` in bytes, page aligned."""

    gpa: int
    size: int
    kind: str  # "shared" or "private": who can read what the guest writes there
    purpose: str

    @property
    def end(self) -> int:
        return self.gpa + self.size


def plan(memory_size: int, *, private: bool = False) -> list[Range]:
    """The ranges of a guest with `memory_size` bytes of RAM.

    All of it is shared, or it is laid out for private memory: a stock kernel's image, its page
    tables, its devices' rings and bounce buffers have to be where KVM and the host can read them,
    and it can be told to keep all RAM from an address on for what it can move, its applications'
    memory (`private_cmdline`).  So the lower part is shared, up to PRIVATE_LOW_MIN or a quarter,
    and what is private begins at 4 GiB.  ValueError when nothing is left for that.
    """
    if memory_size <= 0 or memory_size % PAGE_SIZE:
        raise ValueError(f"memory size {memory_size:#x} is not a multiple of {PAGE_SIZE}")
    if private:
        low = min(max(PRIVATE_LOW_MIN, memory_size // 4 & ~(_ALIGNMENT - 1)), LOW_MAX)
        if memory_size < low + PRIVATE_LOW_MIN // 4:
            raise ValueError(
                f"too little memory to have a private part: {low >> 20}M are shared, and"
                f" {memory_size >> 20}M are all"
            )
        return [
            Range(0, low, "shared", "kernel, rings and bounce buffers"),
            Range(HIGH, memory_size - low, "private", "applications"),
        ]
    low = min(memory_size, LOW_MAX)
    ranges = [Range(0, low, "shared", "RAM")]
    if memory_size > low:
        ranges.append(Range(HIGH, memory_size - low, "shared", "RAM"))
    return ranges


def private_cmdline(ranges: Sequence[Range], bounced: int = 0) -> str:
    """What a kernel has to be told of such ranges; "" where all is shared.

    `bounced`: bytes that its drivers may have under way to devices, and from them.

    kernelcore: how much RAM it keeps for itself.  It counts from below and, whatever the number,
    takes all there is below the highest zone, which begins at 4 GiB: half of the lower part is
    surely not too much.  swiotlb: the bounce buffers of all devices; the kernel clears them as it
    starts, and would have 64 MiB for itself, were it not told.
    nokaslr: a kernel that chooses its own place may choose a private one.
    """
    if all(part.kind == "shared" for part in ranges):
        return ""
    pool = max(_BOUNCE_MIN, 1 << (bounced - 1).bit_length())
    bounce = f"{pool // _BOUNCE_SLOT},force" if bounced else "noforce"
    return f"nokaslr kernelcore={ranges[0].size >> 21}M swiotlb={bounce}"


class GuestAddressError(ValueError):
    """A guest physical address behind which there is no memory that host and guest share."""


class GuestMemory:
    """The shared ranges, by guest physical address: the way devices and loaders get at them.

    Every access is checked: GuestAddressError for one that is not inside one range.
    """

    def __init__(self, parts: Sequence[tuple[Range, HostMemory]]) -> None:
        self._parts = [
            (part.gpa, part.end, memory) for part, memory in parts if part.kind == "shared"
        ]

    def _find(self, gpa: int, size: int) -> tuple[int, HostMemory]:
        for start, end, memory in self._parts:
            if start <= gpa <= gpa + size <= end:
                return gpa - start, memory
        raise GuestAddressError(
            f"{size:#x} bytes at {gpa:#x} are not inside memory that the host shares"
        )

    def read(self, gpa: int, size: int) -> bytes:
        offset, memory = self._find(gpa, size)
        return memory.read(offset, size)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        offset, memory = self._find(gpa, len(data))
        memory.write(offset, data)

    def view(self, gpa: int, size: int) -> memoryview:
        """The bytes in place, for as long as the guest's memory is open."""
        offset, memory = self._find(gpa, size)
        return memory.view()[offset : offset + size]


_PRESENT = bytes(value >> 7 for value in range(256))


def resident(memory: HostMemory) -> int:
    """How many bytes of a mapping are in RAM: as /proc/self/pagemap has it, bit 63 a page."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(memory.userspace_addr // PAGE_SIZE * 8)
        entries = pagemap.read(memory.size // PAGE_SIZE * 8)
    return entries[7::8].translate(_PRESENT).count(1) * PAGE_SIZE
