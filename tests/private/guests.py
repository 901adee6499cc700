"""A guest with one private slot, by either ABI: what the tests of running guests share."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from kvmpriv import HostMemory
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.guest.puppet import GuestExit, Puppet
from kvmpriv.private import guest_memfd, restrictedmem
from kvmpriv.private.guest_memfd import GuestMemfd
from kvmpriv.private.restrictedmem import RestrictedMem

if TYPE_CHECKING:
    from kvmpriv import Kvm, Slot, Vm

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
#: QEMU's layout, where memory above 4 GiB goes on in the file at 2 GiB; and 2 MiB more.
GPA, OFFSET, SIZE = 4 * GIB, 2 * GIB + 2 * MIB, 6 * MIB


class PrivateGuest(Protocol):
    """A puppet and one slot of SIZE at GPA, its file used from OFFSET on."""

    abi: str
    vm: Vm
    memory: HostMemory
    guest: Puppet
    slot: Slot
    #: What a fault exit's errno is.
    fault_errno: int

    def convert(self, gpa: int, size: int, *, private: bool) -> None: ...
    def bind(
        self, slot: int, gpa: int, size: int, offset: int, memory: HostMemory | None, flags: int = 0
    ) -> Slot: ...
    def punch_hole(self, gpa: int, size: int) -> None: ...
    def allocate(self, gpa: int, size: int) -> None: ...


class _Base:
    def __init__(self, stack: ExitStack, vm: Vm, kvm: Kvm, cpus: int) -> None:
        self.vm = vm
        self.memory = stack.enter_context(HostMemory(SIZE))
        self.guest = stack.enter_context(Puppet(vm, cpus=cpus, cpuid=kvm.get_supported_cpuid()))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class RestrictedGuest(_Base):
    """v9: everything is private at first, the fault exit comes with KVM_RUN's 0."""

    abi = "restrictedmem"
    fault_errno = 0

    def __init__(self, stack: ExitStack, vm: Vm, kvm: Kvm, cpus: int) -> None:
        super().__init__(stack, vm, kvm, cpus)
        self.file = stack.enter_context(RestrictedMem())
        self.slot = self.bind(1, GPA, SIZE, OFFSET, self.memory)

    def bind(
        self, slot: int, gpa: int, size: int, offset: int, memory: HostMemory | None, flags: int = 0
    ) -> Slot:
        return restrictedmem.set_user_memory_region_ext(
            self.vm, slot, gpa, size, memory, self.file, offset, flags=flags | rm.KVM_MEM_PRIVATE
        )

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        if private:
            restrictedmem.memory_encrypt_reg_region(self.vm, gpa, size)
        else:
            restrictedmem.memory_encrypt_unreg_region(self.vm, gpa, size)

    def punch_hole(self, gpa: int, size: int) -> None:
        self.file.punch_hole(OFFSET + gpa - GPA, size)

    def allocate(self, gpa: int, size: int) -> None:
        self.file.fallocate(1, OFFSET + gpa - GPA, size)

    def want(self, gpa: int, size: int, *, private: bool | None) -> int:
        """Have the guest say how it is going to access a range; None: as it is."""
        bits = {
            True: rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE,
            False: rm.KVM_MAP_GPA_RANGE_WANT_SHARED,
            None: rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE | rm.KVM_MAP_GPA_RANGE_WANT_SHARED,
        }[private]
        return self.guest.hypercall(k.KVM_HC_MAP_GPA_RANGE, gpa, size // PAGE, bits)


class MemfdGuest(_Base):
    """guest_memfd in a software-protected VM: the slot's range is made private first."""

    abi = "guest_memfd"
    fault_errno = errno.EFAULT

    def __init__(self, stack: ExitStack, vm: Vm, kvm: Kvm, cpus: int) -> None:
        super().__init__(stack, vm, kvm, cpus)
        self.file = stack.enter_context(GuestMemfd(vm, OFFSET + SIZE + 8 * MIB))
        self.slot = self.bind(1, GPA, SIZE, OFFSET, self.memory)
        self.convert(GPA, SIZE, private=True)

    def bind(
        self, slot: int, gpa: int, size: int, offset: int, memory: HostMemory | None, flags: int = 0
    ) -> Slot:
        return guest_memfd.set_user_memory_region2(
            self.vm, slot, gpa, size, memory, self.file, offset,
            flags=flags | gm.KVM_MEM_GUEST_MEMFD,
        )  # fmt: skip

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        attributes = gm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        guest_memfd.set_memory_attributes(self.vm, gpa, size, attributes)

    def punch_hole(self, gpa: int, size: int) -> None:
        self.file.punch_hole(OFFSET + gpa - GPA, size)

    def allocate(self, gpa: int, size: int) -> None:
        self.file.fallocate(1, OFFSET + gpa - GPA, size)


def fault_of(private_guest: PrivateGuest, stopped: GuestExit) -> tuple[int, int, bool]:
    """(gpa, size, private) of a fault exit, which is of the ABI's own kind."""
    fault = stopped.exit
    assert fault.abi == private_guest.abi
    assert fault.errno == private_guest.fault_errno
    return fault.gpa, fault.size, fault.private
