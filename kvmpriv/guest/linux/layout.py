"""Where a Linux guest's memory is: ranges, as data; and the bytes behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...memory import PAGE_SIZE, HostMemory

__all__ = [
    "HIGH",
    "LOW_MAX",
    "MMIO",
    "GuestAddressError",
    "GuestMemory",
    "Range",
    "plan",
]

_GIB = 1 << 30
#: RAM ends here below 4 GiB, devices have the rest, and what is left of the RAM begins at HIGH.
LOW_MAX, HIGH = 3 * _GIB, 4 * _GIB
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


def plan(memory_size: int) -> list[Range]:
    """The ranges of a guest with `memory_size` bytes of RAM, all of it shared."""
    if memory_size <= 0 or memory_size % PAGE_SIZE:
        raise ValueError(f"memory size {memory_size:#x} is not a multiple of {PAGE_SIZE}")
    low = min(memory_size, LOW_MAX)
    ranges = [Range(0, low, "shared", "RAM")]
    if memory_size > low:
        ranges.append(Range(HIGH, memory_size - low, "shared", "RAM"))
    return ranges


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
