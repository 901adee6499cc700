"""A VM with private memory by either ABI, a puppet in it, and slots as each test lays them out."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from kvmpriv import HostMemory, Kvm
from kvmpriv.exits import MemoryFaultExit
from kvmpriv.guest.puppet import Puppet

from .syscalls import MIB

if TYPE_CHECKING:
    from kvmpriv.guest.puppet import PuppetCpu
    from kvmpriv.private import PrivateAbi, PrivateFile, PrivateSlot, PrivateVm

#: A large page.
LARGE = 2 * MIB


class Rig:
    """A puppet (its home at 3 GiB) in a VM without any other slot; `stack` ends what is made."""

    def __init__(
        self,
        stack: ExitStack,
        abi: PrivateAbi,
        vm: PrivateVm,
        kvm: Kvm,
        *,
        cpus: int = 1,
        irqchip: bool = False,
    ) -> None:
        self.stack, self.abi, self.vm = stack, abi, vm
        if irqchip:
            vm.create_irqchip()
        self.guest = stack.enter_context(
            Puppet(vm, cpus=cpus, cpuid=kvm.get_supported_cpuid(), serve_conversions=False)
        )

    def memory(self, size: int, *, fd: int = -1) -> HostMemory:
        """Host memory for shared sides; what is never touched costs nothing."""
        return self.stack.enter_context(HostMemory(size, fd=fd, reserve=False))

    def large_memory(self, size: int) -> tuple[HostMemory, int]:
        """Host memory, and the offset in it from which `size` bytes may be large pages."""
        memory = self.memory(size + LARGE)
        return memory, -memory.userspace_addr % LARGE

    def file(self, size: int) -> PrivateFile:
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
        """Make a slot, all of it private."""
        made = self.abi.bind(
            self.vm, gpa, size, file, offset,
            memory=memory, memory_offset=memory_offset, slot=slot, flags=flags,
        )  # fmt: skip
        self.convert(gpa, size, private=True)
        return made

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        """As the kernel does it, which frees nothing."""
        self.abi.convert(self.vm, gpa, size, private=private, keep=True)

    def mapped(self) -> tuple[int, int]:
        """How many small and how many large pages the guest has mapped, as KVM counts."""
        with self.vm.get_stats_fd() as stats:
            counts = stats.read()
        small, large = counts["pages_4k"], counts["pages_2m"]
        assert isinstance(small, int)
        assert isinstance(large, int)
        return small, large


class Marker:
    """Random bytes that a guest has and that this process does not, until it asks for `value`.

    Two halves are here; byte by byte they make the marker in the guest.
    """

    size = 32

    def __init__(self) -> None:
        self._halves = os.urandom(self.size), os.urandom(self.size)

    def write(self, guest: PuppetCpu, gpa: int) -> None:
        """Have the guest write it, a byte at a time."""
        for number, (one, other) in enumerate(zip(*self._halves, strict=True)):
            guest.store(gpa + number, 1, one ^ other)

    def is_at(self, guest: PuppetCpu, gpa: int) -> bool:
        """Whether the guest has it there: seen a byte at a time, so that it is not put together."""
        pairs = enumerate(zip(*self._halves, strict=True))
        return all(guest.load(gpa + number, 1) == one ^ other for number, (one, other) in pairs)

    def value(self) -> bytes:
        return bytes(one ^ other for one, other in zip(*self._halves, strict=True))


MakeRig = Callable[..., Rig]


def only(name: str) -> pytest.MarkDecorator:
    """The test is about one ABI."""
    return pytest.mark.parametrize("make_rig", [name], indirect=True)


def run_again(abi: PrivateAbi) -> Callable[[PuppetCpu, object], bool]:
    """What a vCPU beside conversions is served with: a fault that tells of one is run again.

    6.12 tells of a conversion that came between what an access is and what the page is
    (arch/x86/kvm/mmu/mmu.c, kvm_faultin_pfn), once; v9's guests never see one.
    """
    return lambda _cpu, exit_: (
        isinstance(exit_, MemoryFaultExit) and abi.traits.access_follows_state
    )
