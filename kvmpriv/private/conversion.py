"""What can go wrong in a conversion, and freeing the pages that it leaves unused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..slots import slots_alive
from .backing import HOLE, LOFF_END, PrivateSlot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..slots import Slot
    from .vm import PrivateVm

__all__ = ["ConversionError", "NotFreedError", "covered", "free_unused", "in_slots"]


class ConversionError(OSError):
    """The kernel stopped at a page that it could not convert.

    `offset` is that page's offset in its file, `gpa` its guest physical address.  `converted` is
    how many bytes from the start of the range are converted; what comes after them is unchanged.
    errno is EAGAIN if the page is in use (pinned, or mapped elsewhere), so that the same
    call may succeed later; ENOMEM if the kernel had no memory; another one if slots before this
    page are converted and the kernel refused the rest.

    Only an ABI whose files are converted (``traits.converts == "file"``) raises it.
    """

    def __init__(
        self, errno: int, strerror: str, *, offset: int, gpa: int = 0, converted: int = 0
    ) -> None:
        super().__init__(errno, strerror)
        self.offset = offset
        self.gpa = gpa
        self.converted = converted


class NotFreedError(OSError):
    """The range is converted, but not all pages that the guest can't reach any more were freed.

    errno is that of fallocate(2) or madvise(2): ENOMEM if a large page could not be split, EINVAL
    if the shared memory is locked.  Convert the range once more, the same way, to try again.
    """


def in_slots(vm: PrivateVm, gpa: int, size: int) -> list[tuple[PrivateSlot, int, int]]:
    """The parts of a range that private slots have, in order: (slot, gpa, size)."""
    with vm.slots_lock:
        slots = [slot for slot in vm.slots.values() if isinstance(slot, PrivateSlot)]
    parts = []
    for slot in sorted(slots, key=lambda one: one.guest_phys_addr):
        start, end = max(gpa, slot.guest_phys_addr), min(gpa + size, slot.end)
        if start < end:
            parts.append((slot, start, end - start))
    return parts


def covered(vm: PrivateVm, gpa: int, size: int) -> bool:
    """Whether private slots cover the whole range."""
    end = gpa + size
    for _, start, part in in_slots(vm, gpa, size):
        if start > gpa:
            return False
        gpa = max(gpa, start + part)
    return gpa >= end


def free_unused(vm: PrivateVm, gpa: int, size: int, *, private: bool) -> None:
    """Free the shared pages of a range that is `private` now, or its private pages if not.

    For an ABI with two backings; the caller holds the VM's `slots_lock`.  Pages stay that a slot of
    any VM of this process has at another address.  Raises NotFreedError.
    """
    failure: OSError | None = None
    for slot, start, length in in_slots(vm, gpa, size):
        backing = _backing(slot, slot, private=not private)
        if backing is None:
            continue
        first = backing + start - slot.guest_phys_addr
        used = list(_in_use(slot, gpa, size, private=not private))
        for low, high in _without(used, first, first + length):
            try:
                _free(slot, low, high - low, private=not private)
            except OSError as error:
                failure = failure or error
    if failure is not None:
        what = f"{gpa:#x}…{gpa + size:#x} is {'private' if private else 'shared'} now, but"
        raise NotFreedError(failure.errno, f"{what} not all of its old pages are freed: {failure}")


def _backing(slot: Slot, like: PrivateSlot, *, private: bool) -> int | None:
    """Where the private pages of `slot` begin in the file of `like`; None if it has another file.

    With `private=False`, where its shared pages begin in this process; None without any.
    """
    if private:
        return slot.offset if isinstance(slot, PrivateSlot) and slot.file is like.file else None
    return slot.userspace_addr or None


def _in_use(slot: PrivateSlot, gpa: int, size: int, *, private: bool) -> Iterator[tuple[int, int]]:
    """The ranges of `slot`'s file, or memory, that other slots have outside the converted range."""
    for other in slots_alive():
        backing = _backing(other, slot, private=private)
        if other is slot or backing is None:
            continue
        first, last = backing, backing + other.memory_size
        low, high = max(gpa, other.guest_phys_addr), min(gpa + size, other.end)
        if other.vm is slot.vm and isinstance(other, PrivateSlot) and low < high:
            yield first, backing + low - other.guest_phys_addr
            first = backing + high - other.guest_phys_addr
        yield first, last


def _free(slot: PrivateSlot, at: int, size: int, *, private: bool) -> None:
    if not private:
        assert slot.memory is not None
        slot.memory.discard_held(at - slot.memory.userspace_addr, size)
    elif at < LOFF_END:  # the kernel lets a slot lie beyond the end of any file
        slot.file.fallocate_held(HOLE, at, min(size, LOFF_END - at))


def _without(used: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that none of the ranges in `used` covers."""
    for first, last in sorted(used):
        if last <= start or first >= end or first == last:
            continue
        if first > start:
            yield start, first
        start = max(start, last)
    if start < end:
        yield start, end
