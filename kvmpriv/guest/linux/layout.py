"""The layout of a Linux guest's memory, and access to the part that the host can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import ArgumentError
from ...memory import PAGE_SIZE, HostMemory

__all__ = [
    "HIGH",
    "LOW_MAX",
    "MMIO",
    "PRIVATE_LOW_MIN",
    "VIRTIO_END",
    "VIRTIO_MAX",
    "GuestAddressError",
    "GuestMemory",
    "Range",
    "plan",
    "private_cmdline",
    "resident",
]

_GIB = 1 << 30
#: RAM below 4 GiB ends at LOW_MAX or earlier; the rest of the RAM begins at HIGH.
LOW_MAX, HIGH = 3 * _GIB, 4 * _GIB
#: How much memory of a guest with private memory is shared, at least, in bytes.
PRIVATE_LOW_MIN = 128 << 20
_ALIGNMENT = 4 << 20
# The size of a bounce buffer slot, and the least size of the pool; the kernel rounds it up to a
# power of two (kernel/dma/swiotlb.c).
_BOUNCE_SLOT, _BOUNCE_MIN = 2048, 1 << 20
#: The guest physical address of the virtio devices' registers, one page for each device.
MMIO = 0xD0000000
#: At most so many virtio devices, and the first address after theirs.
VIRTIO_MAX = 9
VIRTIO_END = MMIO + VIRTIO_MAX * PAGE_SIZE
#: Where the RAM of the first megabyte ends; from there to 1 MiB are ACPI's tables.
CONVENTIONAL_END = 0x9F000


class Range(NamedTuple):
    """A range of a guest's RAM."""

    #: The guest physical address, page aligned.
    gpa: int
    #: In bytes, page aligned.
    size: int
    #: "shared", or "private" for memory that the host can't read.
    kind: str
    #: For a person.
    purpose: str

    @property
    def end(self) -> int:
        """The first address after the range."""
        return self.gpa + self.size


def plan(memory_size: int, *, private: bool = False) -> list[Range]:
    """The ranges of a guest with `memory_size` bytes of RAM.

    Without `private` all of it is shared.  With `private` the lower part is shared, a quarter but
    at least PRIVATE_LOW_MIN and at most 3 GiB, and the rest, from 4 GiB on, is private.  A stock
    kernel's image, page tables, rings and bounce buffers have to be where KVM and the host can
    read them; `private_cmdline` makes it use the rest for memory that it can move, which is its
    applications'.

    ArgumentError if `memory_size` is not a positive multiple of 4096, or too small for `private`.
    """
    if memory_size <= 0 or memory_size % PAGE_SIZE:
        raise ArgumentError(
            f"the memory size {memory_size:#x} is not a positive multiple of {PAGE_SIZE}"
        )
    if private:
        low = min(max(PRIVATE_LOW_MIN, memory_size // 4 & ~(_ALIGNMENT - 1)), LOW_MAX)
        if memory_size < low + PRIVATE_LOW_MIN // 4:
            needed = PRIVATE_LOW_MIN + PRIVATE_LOW_MIN // 4
            raise ArgumentError(
                f"private memory needs at least {needed >> 20}M: the first"
                f" {PRIVATE_LOW_MIN >> 20}M are always shared"
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
    """What a kernel's command line needs for such ranges; "" if all are shared.

    `bounced`: how many bytes its drivers may have in bounce buffers at a time.

    kernelcore: how much RAM the kernel keeps for what it can't move.  It counts from below and,
    whatever the number, takes all RAM below the highest zone, which begins at 4 GiB; so half of
    the lower part is never too much.  swiotlb: the bounce buffers of all devices; the kernel clears
    them as it starts, and takes 64 MiB by default.  nokaslr: a kernel that chooses its own address
    may choose a private one.
    """
    if all(part.kind == "shared" for part in ranges):
        return ""
    pool = max(_BOUNCE_MIN, 1 << (bounced - 1).bit_length())
    bounce = f"{pool // _BOUNCE_SLOT},force" if bounced else "noforce"
    return f"nokaslr kernelcore={ranges[0].size >> 21}M swiotlb={bounce}"


class GuestAddressError(ValueError):
    """A guest physical address that is not inside a shared range."""


class GuestMemory:
    """Access to the shared ranges by guest physical address, for devices and loaders.

    Every access must be inside one range: GuestAddressError otherwise.
    """

    def __init__(self, parts: Sequence[tuple[Range, HostMemory]]) -> None:
        self._parts = [
            (part.gpa, part.end, memory) for part, memory in parts if part.kind == "shared"
        ]

    def _find(self, gpa: int, size: int) -> tuple[int, HostMemory]:
        for start, end, memory in self._parts:
            if start <= gpa <= gpa + size <= end:
                return gpa - start, memory
        raise GuestAddressError(f"{size:#x} bytes at {gpa:#x} are not inside shared memory")

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes from the address `gpa` on."""
        offset, memory = self._find(gpa, size)
        return memory.read(offset, size)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` to the address `gpa`."""
        offset, memory = self._find(gpa, len(data))
        memory.write(offset, data)

    def view(self, gpa: int, size: int) -> memoryview:
        """The bytes in place.  Do not use the view after the machine is closed."""
        offset, memory = self._find(gpa, size)
        return memory.view()[offset : offset + size]

    def views(self) -> list[tuple[int, int, memoryview]]:
        """Each range: its first address, the address after its last, and its bytes in place."""
        return [(start, end, memory.view()) for start, end, memory in self._parts]

    def regions(self) -> list[tuple[int, int, int]]:
        """Each range: its first address, its size in bytes, and where this process has it."""
        return [(start, end - start, memory.userspace_addr) for start, end, memory in self._parts]

    def userspace_addr(self, gpa: int, size: int) -> int:
        """Where this process has the `size` bytes from the address `gpa` on."""
        offset, memory = self._find(gpa, size)
        return memory.userspace_addr + offset


_PRESENT = bytes(value >> 7 for value in range(256))


def resident(memory: HostMemory) -> int:
    """How many bytes of a mapping are in RAM, by bit 63 of each entry of /proc/self/pagemap."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(memory.userspace_addr // PAGE_SIZE * 8)
        entries = pagemap.read(memory.size // PAGE_SIZE * 8)
    return entries[7::8].translate(_PRESENT).count(1) * PAGE_SIZE
