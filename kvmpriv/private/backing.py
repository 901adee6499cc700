"""What both ABIs have: a file whose pages only guests see, a slot with two sides, tidiness.

A gfn of a private-capable slot has two homes: a page of the file (its private side) and a page at
userspace_addr (its shared side).  A kernel that converts it frees neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from .. import libc
from ..fd import Fd
from ..slots import Slot, slots_alive

if TYPE_CHECKING:
    from ..memory import HostMemory
    from ..slots import Held
    from ..vm import Vm

__all__ = [
    "NotFreedError",
    "PrivateFile",
    "PrivateSlot",
    "check_loff",
    "conversions",
    "converted",
]

#: VM -> how many conversions it has had by `convert`.
conversions: WeakKeyDictionary[Vm, int] = WeakKeyDictionary()

_LOFF_END = 1 << 63
HOLE = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE


def check_loff(*values: int) -> None:
    """ValueError for what no loff_t can be: passed on, it would be another number."""
    for value in values:
        if not -_LOFF_END <= value < _LOFF_END:
            raise ValueError(f"{value:#x} is beyond any file")


class PrivateFile(Fd):
    """A file of guest memory that the host can neither read nor, as a rule, map.

    `size` in bytes.  `close` ends the use through this object; the fd itself goes with the last
    slot that holds it.
    """

    size = 0

    def __init__(self, fd: int) -> None:
        self._slots = 0
        self._wanted = True
        super().__init__(fd)

    @property
    def closed(self) -> bool:
        return not self._wanted or super().closed

    def fileno(self) -> int:
        if not self._wanted or self._fd < 0:
            raise self._closed_error()
        return self._fd

    def hold(self) -> None:
        """A slot begins to use the file."""
        if not self._wanted or self._fd < 0:
            raise self._closed_error()
        self._slots += 1

    def release(self) -> None:
        """A slot has ended."""
        self._slots -= 1
        if not self._wanted:
            self._close_if_unused()

    def close(self) -> None:
        """End the use through this object; the fd goes with the last slot that has it."""
        self._wanted = False
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self._wanted and self._slots == 0:
            super().close()

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2): ``FALLOC_FL_*``, bytes.  OSError; ValueError beyond 2^63."""
        self.fileno()
        self.fallocate_held(mode, offset, length)

    def allocate(self, offset: int, length: int) -> None:
        """Give the file pages, without changing its size; bytes."""
        self.fallocate(libc.FALLOC_FL_KEEP_SIZE, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Take pages away from the file, and so from every guest that has them; bytes."""
        self.fallocate(HOLE, offset, length)

    def fallocate_held(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2), for a slot that holds the file: works when its maker has closed it."""
        check_loff(offset, length)
        if libc.fallocate(super().fileno(), mode, offset, length) != 0:
            what = f"fallocate(mode {mode:#x}, {offset:#x}, {length:#x})"
            raise libc.os_error(libc.last_errno(), what)


class PrivateSlot(Slot):
    """A slot with a private side (`file` from `offset` on) and a shared one (`memory`).

    It holds both.  `memory` is None where the slot has no shared side (userspace_addr 0);
    ValueError when the slot's shared side is not inside it.  Addresses are guest physical, bytes,
    page aligned; ValueError when not inside the slot.
    """

    def __init__(
        self,
        vm: Vm,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        flags: int,
        file: PrivateFile,
        offset: int,
        memory: HostMemory | None,
        memory_offset: int,
    ) -> None:
        held: tuple[Held, ...] = (file,)
        userspace_addr = 0
        if memory is not None:
            if not 0 <= memory_offset <= memory.size - memory_size:
                raise ValueError(
                    f"{memory_size:#x} bytes at {memory_offset:#x} are not inside {memory!r}"
                )
            held = (memory, file)
            userspace_addr = memory.userspace_addr + memory_offset
        Slot.__init__(self, vm, slot, guest_phys_addr, memory_size, flags, held, userspace_addr)
        self.file = file
        self.offset = offset
        self.memory = memory
        self.memory_offset = memory_offset

    def allocate(self, gpa: int, size: int) -> None:
        """Give the private side its pages now.  OSError: ENOMEM and what fallocate(2) says."""
        self.file.fallocate_held(libc.FALLOC_FL_KEEP_SIZE, *self._in_file(gpa, size))

    def punch_hole(self, gpa: int, size: int) -> None:
        """Take pages of the private side away; a guest that comes back finds zeros."""
        self.file.fallocate_held(HOLE, *self._in_file(gpa, size))

    def _in_file(self, gpa: int, size: int) -> tuple[int, int]:
        if self.deleted:  # and its part of the file may be another slot's
            raise ValueError(f"{self!r} has no memory")
        if not (self.guest_phys_addr <= gpa and 0 < size <= self.end - gpa):
            raise ValueError(f"{size:#x} bytes at {gpa:#x} are not inside {self!r}")
        return self.offset + gpa - self.guest_phys_addr, size


class NotFreedError(OSError):
    """A range has been converted, but not all that the guest can't reach any more was freed.

    errno is fallocate(2)'s or madvise(2)'s: ENOMEM where a large page could not be split, EINVAL
    where the shared side is locked.  To convert it once more, the same way, tries again.
    """


def converted(vm: Vm, gpa: int, size: int, *, private: bool, keep: bool) -> None:
    """A range has been made private, or shared; the caller holds the VM's `slots_lock`.

    Unless they are to be kept, frees the pages that the guest can't reach any more, as far as slots
    made by `bind` have them.  What a slot of any VM has at another address stays.  NotFreedError.
    """
    conversions[vm] = conversions.get(vm, 0) + 1
    if keep:
        return
    failure: OSError | None = None
    for slot in [one for one in vm.slots.values() if isinstance(one, PrivateSlot)]:
        start = max(gpa, slot.guest_phys_addr) - slot.guest_phys_addr
        end = min(gpa + size, slot.end) - slot.guest_phys_addr
        home = _home(slot, slot, private=not private)
        if start >= end or home is None:
            continue
        used = list(_in_use(slot, gpa, size, private=not private))
        for first, last in _without(used, home + start, home + end):
            try:
                _free(slot, first, last - first, private=not private)
            except OSError as error:
                failure = failure or error
    if failure is not None:
        what = f"{gpa:#x}…{gpa + size:#x} is {'private' if private else 'shared'} now, but"
        raise NotFreedError(failure.errno, f"{what} not all of its old pages are freed: {failure}")


def _home(slot: Slot, like: PrivateSlot, *, private: bool) -> int | None:
    """Where a slot's private side begins in the file that `like` has, or its shared side in memory.

    None where it has none.
    """
    if private:
        return slot.offset if isinstance(slot, PrivateSlot) and slot.file is like.file else None
    return slot.userspace_addr or None


def _in_use(slot: PrivateSlot, gpa: int, size: int, *, private: bool) -> Iterator[tuple[int, int]]:
    """What other slots have of `slot`'s file, or of memory: but for what is converted with it."""
    for other in slots_alive():
        home = _home(other, slot, private=private)
        if other is slot or home is None:
            continue
        first, last = home, home + other.memory_size
        low, high = max(gpa, other.guest_phys_addr), min(gpa + size, other.end)
        if other.vm is slot.vm and isinstance(other, PrivateSlot) and low < high:
            yield first, home + low - other.guest_phys_addr
            first = home + high - other.guest_phys_addr
        yield first, last


def _free(slot: PrivateSlot, at: int, size: int, *, private: bool) -> None:
    if not private:
        assert slot.memory is not None
        slot.memory.discard_held(at - slot.memory.userspace_addr, size)
    elif at < _LOFF_END:  # a slot may lie beyond what a file can have
        slot.file.fallocate_held(HOLE, at, min(size, _LOFF_END - at))


def _without(used: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """What is left of [start, end) without the ranges in `used`."""
    for first, last in sorted(used):
        if last <= start or first >= end or first == last:
            continue
        if first > start:
            yield start, first
        start = max(start, last)
    if start < end:
        yield start, end
