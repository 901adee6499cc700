"""Used by all ABIs: files with private pages, and the slots that have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import libc
from ..errors import ArgumentError, ClosedError
from ..fd import Fd, check_range
from ..slots import HeldBySlots, Slot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..memory import HostMemory
    from ..slots import Held
    from .vm import PrivateVm

__all__ = ["LOFF_END", "PrivateFile", "PrivateSlot", "check_loff", "fd_field"]

#: The first number that loff_t can't represent.
LOFF_END = 1 << 63
HOLE = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE


def check_loff(*values: int) -> None:
    """ArgumentError for a number that loff_t can't represent: ctypes would cut it silently."""
    for value in values:
        if not -LOFF_END <= value < LOFF_END:
            raise ArgumentError(f"file offsets are less than 2^63: {value:#x} is out of range")


def fd_field(fd: int) -> int:
    """A descriptor as a field of 32 bits without a sign.  ArgumentError if it does not fit."""
    if not -(1 << 31) <= fd < 1 << 32:
        raise ArgumentError(f"a descriptor has 32 bits: {fd:#x} is out of range")
    return fd & 0xFFFF_FFFF


class PrivateFile(HeldBySlots, Fd):
    """A file with guest memory; while a page is private, the host can't read it.

    `size` is in bytes.  After :meth:`close` the object can't be used any more; the descriptor is
    closed when, in addition, no slot uses the file.  Slots call :meth:`hold`, :meth:`release` and
    :meth:`fallocate_held`.
    """

    size = 0

    def __init__(self, fd: int) -> None:
        HeldBySlots.__init__(self)
        Fd.__init__(self, fd)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return not self._open or self._fd < 0

    def fileno(self) -> int:
        """The descriptor's number.  ClosedError after close."""
        if not self._open or self._fd < 0:
            raise self._closed_error()
        return self._fd

    def _end(self) -> None:
        Fd.close(self)

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"{self._what} is closed")

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2) with ``FALLOC_FL_*``; bytes.  OSError; ArgumentError out of range."""
        self.fileno()
        self.fallocate_held(mode, offset, length)

    def allocate(self, offset: int, length: int) -> None:
        """Allocate pages of the file; its size stays.  Bytes."""
        self.fallocate(libc.FALLOC_FL_KEEP_SIZE, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Free pages of the file, which removes them from every guest that maps them.  Bytes."""
        self.fallocate(HOLE, offset, length)

    def fallocate_held(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2) for a slot that holds the file; also works after `close`."""
        check_range("mode", mode, 1 << 31)
        check_loff(offset, length)
        if error := libc.fallocate(Fd.fileno(self), mode, offset, length):
            what = f"fallocate(mode {mode:#x}, {offset:#x}, {length:#x})"
            raise libc.os_error(-error, what)


class _Owned:
    """A file or memory that the slot closes when the slot ends."""

    def __init__(self, thing: PrivateFile | HostMemory) -> None:
        self._thing = thing

    def hold(self) -> None:
        self._thing.hold()

    def release(self) -> None:
        self._thing.release()
        self._thing.close()


class PrivateSlot(Slot):
    """A slot whose private pages are in `file`, from `offset` on.

    Its shared pages are in `memory` from `memory_offset` on; `memory` is None if the slot was made
    without (userspace_addr 0).  The slot keeps both alive.  Addresses are guest physical, sizes in
    bytes, both page aligned.  Without `gpa` a method means the whole slot, without `size` all from
    `gpa` on.  ArgumentError if the range is not inside the slot, ClosedError if it is deleted.
    """

    vm: PrivateVm

    def __init__(
        self,
        vm: PrivateVm,
        slot: int | None,
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
                raise ArgumentError(
                    f"{memory_size:#x} bytes at {memory_offset:#x} are not inside {memory!r}"
                )
            held = (memory, file)
            userspace_addr = memory.userspace_addr + memory_offset
        Slot.__init__(self, vm, slot, guest_phys_addr, memory_size, flags, held, userspace_addr)
        self.file = file
        self.offset = offset
        self.memory = memory
        self.memory_offset = memory_offset

    def own(self, things: Iterable[PrivateFile | HostMemory]) -> None:
        """Close these, of the file and the memory, when the slot ends."""
        things = list(things)
        self.held: tuple[Held, ...] = tuple(
            _Owned(one) if one in things else one for one in self.held
        )

    def convert(
        self,
        gpa: int | None = None,
        size: int | None = None,
        *,
        private: bool,
        keep: bool = False,
    ) -> None:
        """Make a range of the slot private, or shared: see :meth:`PrivateAbi.convert`."""
        gpa, size = self._range(gpa, size)
        self.vm.abi.convert(self.vm, gpa, size, private=private, keep=keep)

    def allocate(self, gpa: int | None = None, size: int | None = None) -> None:
        """Allocate the pages in the file now.  OSError: ENOMEM and others of fallocate(2)."""
        self.file.fallocate_held(libc.FALLOC_FL_KEEP_SIZE, *self._in_file(gpa, size))

    def punch_hole(self, gpa: int | None = None, size: int | None = None) -> None:
        """Free the pages in the file; the guest finds zeros at its next access."""
        self.file.fallocate_held(HOLE, *self._in_file(gpa, size))

    def _range(self, gpa: int | None, size: int | None) -> tuple[int, int]:
        gpa = self.guest_phys_addr if gpa is None else gpa
        size = self.end - gpa if size is None else size
        if self.deleted:  # another slot may have the same part of the file now
            raise ClosedError(f"{self!r} is deleted")
        if not (self.guest_phys_addr <= gpa and 0 < size <= self.end - gpa):
            raise ArgumentError(f"{size:#x} bytes at {gpa:#x} are not inside {self!r}")
        return gpa, size

    def _in_file(self, gpa: int | None, size: int | None) -> tuple[int, int]:
        gpa, size = self._range(gpa, size)
        return self.offset + gpa - self.guest_phys_addr, size
