"""Conversion in place: the raw call, and a rig with one file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import guest_memfd as gm

from .processes import child_status
from .rig import Rig
from .syscalls import GIB, PAGE, address_of, answer, errno_of

if TYPE_CHECKING:
    from contextlib import ExitStack

    from kvmpriv.fd import Fd
    from kvmpriv.private import PrivateFile, PrivateSlot, PrivateVm

PRIVATE = gm.KVM_MEMORY_ATTRIBUTE_PRIVATE
REQUEST = gm.KVM_SET_MEMORY_ATTRIBUTES2
#: What a test puts into error_offset, to see whether the kernel writes it.
UNTOUCHED = 0x5555_5555_5555_5555
NAME = "guest_memfd_in_place"


def struct(
    offset: int = 0,
    size: int = PAGE,
    attributes: int = PRIVATE,
    *,
    flags: int = 0,
    error_offset: int = UNTOUCHED,
    reserved: tuple[int, int] | None = None,
) -> Any:
    """struct kvm_memory_attributes2; `reserved`: the number of a word, and its value."""
    made = gm.ffi.new("struct kvm_memory_attributes2 *")
    made.offset, made.size, made.attributes, made.flags = offset, size, attributes, flags
    made.error_offset = error_offset
    if reserved:
        made.reserved[reserved[0]] = reserved[1]
    return made


def convert(file: Fd, *where: int, **changes: Any) -> tuple[str, int | None]:
    """The kernel's answer to the call, and error_offset if the kernel has written it."""
    made = struct(*where, **changes)
    said = errno_of(file.ioctl_errno(REQUEST, address_of(made)))
    offset = int(made.error_offset)
    return said, None if offset == changes.get("error_offset", UNTOUCHED) else offset


def must_convert(file: Fd, offset: int, size: int, *, private: bool) -> None:
    """Convert a range, which must succeed and leave error_offset alone."""
    assert convert(file, offset, size, PRIVATE if private else 0) == ("ok", None)


def persist(file: Fd, offset: int, size: int, *, private: bool) -> int:
    """Convert a range beside which faults are served; returns how often it was EAGAIN.

    A fault in progress has a reference to its page for a moment.
    """
    refused = 0
    deadline = time.monotonic() + 20
    while True:
        said, at = convert(file, offset, size, PRIVATE if private else 0)
        if said == "ok":
            return refused
        assert (said, private) == ("EAGAIN", True)
        assert at is not None
        assert offset <= at < offset + size
        assert time.monotonic() < deadline, "the page is still in use at the deadline"
        refused += 1
        time.sleep(0)


# -- what the host can do with a page --------------------------------------------------------------


def host_can(memory: HostMemory, offset: int) -> bool:
    """Whether this process can access a page of the mapping; nothing of it is changed."""
    said = answer(lambda: memory.read(offset, 1))
    assert said in ("ok", "EFAULT"), said
    return said == "ok"


def states(memory: HostMemory) -> list[bool]:
    """For each page of the mapping whether it is private."""
    return [not host_can(memory, offset) for offset in range(0, memory.size, PAGE)]


def signal_of(access: Callable[[], object]) -> int:
    """The signal that ends a child process which makes this access, or 0."""
    status, result = child_status(access)
    if isinstance(result, BaseException):
        raise result
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def load(memory: HostMemory, offset: int) -> int:
    """The byte at an offset, by a load; SIGBUS ends a process that may not have it."""
    return memory.view()[offset]


def dies_of_a_load(memory: HostMemory, offset: int) -> bool:
    """Whether a load is SIGBUS."""
    ended = signal_of(lambda: load(memory, offset))
    assert ended in (0, signal.SIGBUS)
    return bool(ended)


# -- the rig ---------------------------------------------------------------------------------------

#: Where the rig's slot is, and where its part of the file begins: all different.
GPA, OFFSET, SIZE = 4 * GIB + 3 * PAGE, 5 * PAGE, 64 * PAGE
#: An ordinary page, at which the guest's commands can be tried.
ELSEWHERE = 63 * GIB


class FileRig(Rig):
    """A rig with one slot, whose file has more pages on both sides; all of them shared at first.

    `memory` is a mapping of the slot's part of the file.
    """

    def __init__(
        self,
        stack: ExitStack,
        vm: PrivateVm,
        kvm: Kvm,
        *,
        gpa: int = GPA,
        offset: int = OFFSET,
        size: int = SIZE,
        **how: Any,
    ) -> None:
        super().__init__(stack, vm, kvm, **how)
        self.gpa, self.offset, self.size = gpa, offset, size
        self.one = self.file(offset + size + 8 * PAGE)
        self.shared = stack.enter_context(self.abi.create_memory(self.one, offset, size))
        self.slot: PrivateSlot = self.bind_shared(gpa, size, self.one, offset, memory=self.shared)
        vm.map(self.memory(PAGE), ELSEWHERE)

    def bind_shared(
        self, gpa: int, size: int, file: PrivateFile, offset: int = 0, **how: Any
    ) -> PrivateSlot:
        """Make a slot, and convert nothing."""
        return self.abi.bind(self.vm, gpa, size, file, offset, **how)

    def to(self, at: int, size: int = PAGE, *, private: bool) -> None:
        """Convert a part of the slot; `at` counts from its beginning."""
        must_convert(self.one, self.offset + at, size, private=private)

    def persist(self, at: int, size: int = PAGE, *, private: bool) -> int:
        """As `to`, again while a page is in use for a moment; returns how often it was."""
        return persist(self.one, self.offset + at, size, private=private)

    def answer(self, at: int, size: int = PAGE, *, private: bool) -> tuple[str, int | None]:
        """The kernel's answer; an offset in it counts from the slot's beginning."""
        said, offset = convert(self.one, self.offset + at, size, PRIVATE if private else 0)
        return said, None if offset is None else offset - self.offset

    def address(self, at: int = 0) -> int:
        """Where this process has the slot's memory."""
        return self.shared.userspace_addr + at

    def warm(self) -> None:
        """Have the guest map its own pages and all of the slot, so that counters stand still."""
        for cpu in self.guest.cpus:
            cpu.fill(ELSEWHERE, 1, PAGE)
            assert cpu.span(ELSEWHERE, 1, PAGE) == PAGE
            cpu.touch(self.gpa, PAGE, self.size // PAGE)
            cpu.load(self.gpa, 8)
            cpu.store(self.gpa, 8, cpu.load(self.gpa, 8))

    def faults(self) -> int:
        """How many page faults KVM has served for the first vCPU."""
        return self.guest.vcpu.stats()["pf_taken"]
