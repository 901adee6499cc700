"""The rig of a test: a VM with private memory, a puppet in it, and the slots that a test makes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import pytest

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.exits import ExitReason, MemoryFaultExit
from kvmpriv.guest.puppet import GuestExit, Puppet, PuppetCpu
from kvmpriv.private import ConversionError

from .behaviour import behaviour_of
from .syscalls import GIB, MIB, PAGE

if TYPE_CHECKING:
    from kvmpriv.private import PrivateAbi, PrivateFile, PrivateSlot, PrivateVm

#: A vCPU of a puppet; the puppet itself stands for its first one.
Guest = Puppet | PuppetCpu
#: The size of a large page.
LARGE = 2 * MIB


class Rig:
    """A puppet in a VM that has no slot but the puppet's own, at 3 GiB.

    `stack` closes what the rig makes.  `abi` and `behaviour` say how the kernel's ABI works.
    """

    def __init__(
        self,
        stack: ExitStack,
        vm: PrivateVm,
        kvm: Kvm,
        *,
        cpus: int = 1,
        irqchip: bool = False,
    ) -> None:
        self.stack, self.vm = stack, vm
        self.abi, self.behaviour = vm.abi, behaviour_of(vm.abi)
        if irqchip:
            vm.create_irqchip()
        self.guest = stack.enter_context(
            Puppet(vm, cpus=cpus, cpuid=kvm.get_supported_cpuid(), serve_conversions=False)
        )

    def memory(self, size: int, *, fd: int = -1) -> HostMemory:
        """Host memory for the shared side of a slot, allocated page by page when touched."""
        return self.stack.enter_context(HostMemory(size, fd=fd, reserve=False))

    def large_memory(self, size: int) -> tuple[HostMemory, int]:
        """Host memory, and an offset in it from which `size` bytes can be large pages."""
        memory = self.memory(size + LARGE)
        return memory, -memory.userspace_addr % LARGE

    def file(self, size: int) -> PrivateFile:
        """A file for private pages."""
        return self.stack.enter_context(self.abi.create_file(self.vm, size))

    def bind(
        self,
        gpa: int,
        size: int,
        file: PrivateFile,
        offset: int = 0,
        *,
        memory: HostMemory | None = None,
        memory_offset: int = 0,
        slot: int | None = None,
        flags: int = 0,
    ) -> PrivateSlot:
        """Make a slot and convert all of it to private."""
        made = self.abi.bind(
            self.vm, gpa, size, file, offset,
            memory=memory, memory_offset=memory_offset, slot=slot, flags=flags,
        )  # fmt: skip
        self.convert(gpa, size, private=True)
        return made

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        """Convert a range as the kernel does, which frees no page.

        Where files are converted, a page fault that another vCPU is about to finish keeps its page
        in use for a moment: then again.
        """
        deadline = time.monotonic() + 20
        while True:
            try:
                return self.abi.convert(self.vm, gpa, size, private=private, keep=True)
            except ConversionError as error:
                if error.errno != errno.EAGAIN or time.monotonic() > deadline:
                    raise

    def convert_all(self, file: PrivateFile, gpa: int, *, private: bool) -> None:
        """Convert all of a file at `gpa`, where its slot may be one that kvmpriv does not know."""
        if self.abi.traits.converts == "file":
            self.abi.convert_file(file, 0, file.size, private=private)
        else:
            self.convert(gpa, file.size, private=private)

    def mapped(self) -> tuple[int, int]:
        """The number of small and of large pages that the guest has mapped, by KVM's counters."""
        counts = self.vm.stats()
        return counts["pages_4k"], counts["pages_2m"]

    def mapped_pages(self) -> int:
        """The same as a number of small pages."""
        small, large = self.mapped()
        return small + LARGE // PAGE * large

    def want(self, gpa: int, size: int, *, private: bool | None) -> int:
        """Have the guest state how it is going to access a range (None: by its state).

        Only where the guest chooses (not ``access_follows_state``): by the hypercall of v9's test
        vehicle.
        """
        bits = {
            True: rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE,
            False: rm.KVM_MAP_GPA_RANGE_WANT_SHARED,
            None: rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE | rm.KVM_MAP_GPA_RANGE_WANT_SHARED,
        }[private]
        return self.guest.hypercall(k.KVM_HC_MAP_GPA_RANGE, gpa, size // PAGE, bits)

    def fault_at(self, gpa: int, *, private: bool) -> MemoryFaultExit:
        """The fault exit of the ABI for an access to a page."""
        layout = self.abi.fault_layout
        error = errno.EFAULT if errno.EFAULT in layout.errnos else 0
        flags = layout.private_flag if private else 0
        return MemoryFaultExit(
            ExitReason(layout.reason), gpa & -PAGE, PAGE, private, flags, error, self.abi.name
        )

    def fault_of(self, stopped: GuestExit) -> tuple[int, int, bool]:
        """(gpa, size, private) of a fault exit, which must be of the ABI's own kind."""
        fault = stopped.exit
        assert isinstance(fault, MemoryFaultExit)
        assert fault.abi == self.abi.name
        assert fault.reason == self.abi.fault_layout.reason
        assert fault.errno in (self.abi.fault_layout.errnos or {0})
        return fault.gpa, fault.size, fault.private


#: QEMU's layout, in which memory above 4 GiB continues in the file at 2 GiB; and 2 MiB more.
GPA, OFFSET, SIZE = 4 * GIB, 2 * GIB + 2 * MIB, 6 * MIB


class OneSlotRig(Rig):
    """A rig with one private slot of SIZE at GPA, which uses its file from OFFSET on."""

    def __init__(self, stack: ExitStack, vm: PrivateVm, kvm: Kvm, **how: Any) -> None:
        super().__init__(stack, vm, kvm, **how)
        self.shared = stack.enter_context(HostMemory(SIZE))
        self.private_file = self.file(OFFSET + SIZE + 8 * MIB)
        self.slot = self.bind_again(1, GPA, SIZE, OFFSET, self.shared)
        if not self.abi.traits.default_private:
            self.convert(GPA, SIZE, private=True)

    def bind_again(
        self, slot: int, gpa: int, size: int, offset: int, memory: HostMemory | None, flags: int = 0
    ) -> PrivateSlot:
        """Make a slot of the file, and convert nothing."""
        return self.abi.bind(
            self.vm, gpa, size, self.private_file, offset, memory=memory, slot=slot, flags=flags
        )

    def punch_hole(self, gpa: int, size: int) -> None:
        """Punch a hole where the slot has `gpa`; it may reach beyond the slot."""
        self.private_file.punch_hole(OFFSET + gpa - GPA, size)

    def allocate(self, gpa: int, size: int) -> None:
        """Allocate pages where the slot has `gpa`."""
        self.private_file.allocate(OFFSET + gpa - GPA, size)


AnyRig = TypeVar("AnyRig", bound=Rig)


class Marker:
    """Random bytes that are in the guest's memory, and not in this process's until `value`.

    This process has two halves, and the guest combines them byte by byte.
    """

    size = 32

    def __init__(self) -> None:
        self._halves = os.urandom(self.size), os.urandom(self.size)

    def write(self, guest: Guest, gpa: int) -> None:
        """Have the guest write the marker, a byte at a time."""
        for number, (one, other) in enumerate(zip(*self._halves, strict=True)):
            guest.store(gpa + number, 1, one ^ other)

    def is_at(self, guest: Guest, gpa: int) -> bool:
        """Whether the guest finds the marker there; compared byte by byte, never assembled here."""
        pairs = enumerate(zip(*self._halves, strict=True))
        return all(guest.load(gpa + number, 1) == one ^ other for number, (one, other) in pairs)

    def value(self) -> bytes:
        """The marker, assembled in this process from now on."""
        return bytes(one ^ other for one, other in zip(*self._halves, strict=True))


class MakeRig(Protocol):
    """Makes a rig of a kind, with `cpus=` and `irqchip=`; see the fixture make_rig."""

    @overload
    def __call__(self, **how: Any) -> Rig: ...
    @overload
    def __call__(self, kind: type[AnyRig], **how: Any) -> AnyRig: ...


def only(name: str) -> pytest.MarkDecorator:
    """The test is about one ABI, by name."""
    return pytest.mark.parametrize("make_rig", [name], indirect=True)


#: The test is about two memories: for ABIs by which a private page and a shared one are two pages.
two_backings = pytest.mark.two_backings


def run_again(abi: PrivateAbi) -> Callable[[PuppetCpu, object], bool]:
    """A `serve` for vCPUs that run beside conversions: it runs the guest again after a fault.

    Where the access follows the state, a conversion between KVM's two reads of that state is
    reported as a fault once (arch/x86/kvm/mmu/mmu.c, kvm_faultin_pfn, in 6.12).
    """
    return lambda _cpu, exit_: (
        isinstance(exit_, MemoryFaultExit) and abi.traits.access_follows_state
    )
