"""Faults that a test serves: a struct that changes between the kernel's two reads of it."""

from __future__ import annotations

import os
import struct
import threading

from kvmpriv import HostMemory, libc
from kvmpriv.cdefs import kvm as k

from .requirements import missing
from .slot_requests import Slots
from .syscalls import PAGE, address_of, answer, call

#: Modes of UFFDIO_REGISTER.
MISSING, MINOR = 1, 4


def set_with_late_flags(slots: Slots, late_flags: int, **changes: int) -> str:
    """The answer to a struct whose flags become `late_flags` after the kernel's first read.

    The flags are at the start of a page that exists; what precedes them is at the end of a page
    that does not.  Reading the flags alone does not fault, but copying the struct does.  The thread
    that serves the fault (userfaultfd) changes the flags before the copy continues.
    """
    uffd = open_userfaultfd()
    data = bytes(k.ffi.buffer(slots.struct(**changes)))
    memory = HostMemory(2 * PAGE)
    source = HostMemory(PAGE)
    served: list[int] = []
    try:
        low = memory.userspace_addr
        register_range(uffd, low, PAGE, MISSING)
        source.write(PAGE - 4, data[:4])
        memory.write(PAGE, data[4:])

        def serve() -> None:
            import select

            if not select.select([uffd], [], [], 20)[0]:
                return
            message = os.read(uffd, 32)
            served.append(struct.unpack_from("<Q", message, 16)[0] & -PAGE)
            memory.write(PAGE, struct.pack("<I", late_flags))
            _uffd(uffd, 0x03, struct.pack("<QQQQq", low, source.userspace_addr, PAGE, 0, 0))

        thread = threading.Thread(target=serve)
        thread.start()
        said = slots.set_at(low + PAGE - 4)
        thread.join()
        assert served == [low], "the kernel copied the struct without a fault"
        return said
    finally:
        os.close(uffd)
        memory.close()
        source.close()


def register(address: int, size: int, mode: int) -> str:
    """The answer of UFFDIO_REGISTER for a range; it ends at once."""
    uffd = open_userfaultfd()
    try:
        return answer(lambda: register_range(uffd, address, size, mode))
    finally:
        os.close(uffd)


def open_userfaultfd() -> int:
    """A userfaultfd for faults of the kernel, too."""
    try:
        return call("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        missing("userfaultfd", str(error))


def register_range(uffd: int, address: int, size: int, mode: int) -> None:
    """Have the faults of a range reported; closing `uffd` ends that."""
    _uffd(uffd, 0x3F, struct.pack("<QQQ", 0xAA, 0, 0))
    _uffd(uffd, 0x00, struct.pack("<QQQQ", address, size, mode, 0))


def _uffd(fd: int, number: int, argument: bytes) -> None:
    buffer = k.ffi.new("char[]", argument)
    request = 3 << 30 | len(argument) << 16 | 0xAA << 8 | number
    if libc.ioctl(fd, request, address_of(buffer)) < 0:
        raise libc.os_error(libc.last_errno(), f"userfaultfd {number:#x}")
