"""Mappings of files that a guest has too, and a guest whose slot is such a file."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from kvmpriv import HostMemory, Kvm, Vm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.guest.puppet import Puppet
from kvmpriv.private import guest_memfd
from kvmpriv.private.guest_memfd import GuestMemfd

from .processes import child_status
from .requirements import missing
from .syscalls import GIB, MAP_SHARED, PAGE, PROT_READ, PROT_WRITE, answer, call

MMAP, INIT_SHARED = gm.GUEST_MEMFD_FLAG_MMAP, gm.GUEST_MEMFD_FLAG_INIT_SHARED
#: Where the slot of a mapped guest is, and where it begins in its file: not at 0, so that an offset
#: that the kernel forgets, or counts in another unit, is noticed.
GPA, OFFSET = 4 * GIB, 3 * PAGE


def flags_of(vm: Vm) -> int:
    """The flags that guest_memfd files of this VM can have."""
    return vm.check_extension(gm.KVM_CAP_GUEST_MEMFD_FLAGS)


def require_flags(vm: Vm, flags: int) -> None:
    """Skip the test if guest_memfd files of this VM can't have these flags."""
    if flags_of(vm) & flags != flags:
        missing("guest-memfd-flags", f"KVM_CAP_GUEST_MEMFD_FLAGS is {flags_of(vm)}, not {flags}")


class Mapping:
    """A shared mapping that a test may move, protect and unmap; HostMemory guards against that."""

    def __init__(self, fd: int, size: int, offset: int = 0) -> None:
        self.size = size
        self.address = call("mmap", 0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset)

    def _bytes(self, at: int, size: int) -> Any:
        assert 0 <= at <= at + size <= self.size
        return k.ffi.buffer(k.ffi.cast("char *", self.address + at), size)

    def read(self, at: int, size: int) -> bytes:
        return bytes(self._bytes(at, size))

    def write(self, at: int, data: bytes) -> None:
        self._bytes(at, len(data))[:] = data

    def advise(self, advice: int, at: int = 0, size: int = 0) -> str:
        """The answer of madvise(2) for a part of the mapping, or all of it."""
        return answer(lambda: call("madvise", self.address + at, size or self.size - at, advice))

    def close(self) -> None:
        if self.size:
            call("munmap", self.address, self.size)
            self.size = 0

    def __enter__(self) -> Mapping:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def signal_of(work: Callable[[], object]) -> str:
    """The name of the signal that ends a forked process that does `work`; "" if none does."""

    def quiet() -> None:
        work()

    status, result = child_status(quiet)
    if isinstance(result, BaseException):
        raise result
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""


class MappedGuest:
    """A puppet with a slot at GPA that is a mappable file from OFFSET on, and a mapping of it.

    The slot's userspace_addr is another mapping of the same range, which no test changes.
    """

    def __init__(self, stack: ExitStack, vm: Vm, kvm: Kvm, *, pages: int = 8) -> None:
        require_flags(vm, MMAP | INIT_SHARED)
        self.vm, self.size, self._stack = vm, pages * PAGE, stack
        self.file = stack.enter_context(
            GuestMemfd(vm, OFFSET + self.size + PAGE, MMAP | INIT_SHARED)
        )
        self.slot_memory = stack.enter_context(
            HostMemory(self.size, fd=self.file.fileno(), offset=OFFSET)
        )
        self.guest = stack.enter_context(Puppet(vm, cpuid=kvm.get_supported_cpuid()))
        self.slot = guest_memfd.set_user_memory_region2(
            vm, 1, GPA, self.size, self.slot_memory, self.file, OFFSET
        )
        stack.callback(self.unbind)
        self.memory = self.map()

    def map(self) -> Mapping:
        """Another mapping of the slot's part of the file."""
        return self._stack.enter_context(Mapping(self.file.fileno(), self.size, OFFSET))

    def unbind(self) -> None:
        """Delete the slot if it is there."""
        if not self.slot.deleted:
            self.slot.delete()

    def punch_hole(self, at: int, size: int = PAGE) -> None:
        """Punch a hole where the slot has GPA + `at`."""
        self.file.punch_hole(OFFSET + at, size)

    def both_see(self, at: int, byte: int, size: int = PAGE) -> bool:
        """Whether guest and host see `size` times `byte` at `at`."""
        host = self.memory.read(at, size) == bytes([byte]) * size
        return host and self.guest.span(GPA + at, byte, size) == size


#: Advice of madvise(2) that <asm-generic/mman-common.h> has and older modules mmap lack.
MADV = {
    "NORMAL": mmap.MADV_NORMAL,
    "RANDOM": mmap.MADV_RANDOM,
    "SEQUENTIAL": mmap.MADV_SEQUENTIAL,
    "WILLNEED": mmap.MADV_WILLNEED,
    "DONTNEED": mmap.MADV_DONTNEED,
    "FREE": mmap.MADV_FREE,
    "REMOVE": mmap.MADV_REMOVE,
    "DONTFORK": mmap.MADV_DONTFORK,
    "DOFORK": mmap.MADV_DOFORK,
    "MERGEABLE": mmap.MADV_MERGEABLE,
    "UNMERGEABLE": mmap.MADV_UNMERGEABLE,
    "HUGEPAGE": mmap.MADV_HUGEPAGE,
    "NOHUGEPAGE": mmap.MADV_NOHUGEPAGE,
    "DONTDUMP": mmap.MADV_DONTDUMP,
    "DODUMP": mmap.MADV_DODUMP,
    "WIPEONFORK": 18,
    "KEEPONFORK": 19,
    "COLD": 20,
    "PAGEOUT": 21,
    "POPULATE_READ": 22,
    "POPULATE_WRITE": 23,
    "COLLAPSE": 25,
    "HWPOISON": 100,
}
