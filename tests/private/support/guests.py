"""A guest with one private slot, by either ABI: what the tests of running guests share."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvmpriv import HostMemory, private
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.guest.puppet import GuestExit, Puppet

if TYPE_CHECKING:
    from kvmpriv import Kvm
    from kvmpriv.private import PrivateAbi, PrivateSlot, PrivateVm

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
#: QEMU's layout, where memory above 4 GiB goes on in the file at 2 GiB; and 2 MiB more.
GPA, OFFSET, SIZE = 4 * GIB, 2 * GIB + 2 * MIB, 6 * MIB


class PrivateGuest:
    """A puppet and one slot of SIZE at GPA, its file used from OFFSET on, all of it private."""

    protocol: PrivateAbi
    #: What a fault exit's errno is.
    fault_errno: int

    def __init__(self, stack: ExitStack, vm: PrivateVm, kvm: Kvm, cpus: int) -> None:
        self.vm = vm
        self.memory = stack.enter_context(HostMemory(SIZE))
        self.guest = stack.enter_context(
            Puppet(vm, cpus=cpus, cpuid=kvm.get_supported_cpuid(), serve_conversions=False)
        )
        self.file = stack.enter_context(self.protocol.create_file(vm, OFFSET + SIZE + 8 * MIB))
        self.slot = self.bind(1, GPA, SIZE, OFFSET, self.memory)
        if not self.protocol.traits.default_private:
            self.convert(GPA, SIZE, private=True)

    @property
    def abi(self) -> str:
        return self.protocol.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def bind(
        self, slot: int, gpa: int, size: int, offset: int, memory: HostMemory | None, flags: int = 0
    ) -> PrivateSlot:
        return self.protocol.bind(
            self.vm, gpa, size, self.file, offset, memory=memory, slot=slot, flags=flags
        )

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        """As the kernel does it, which frees nothing."""
        self.protocol.convert(self.vm, gpa, size, private=private, keep=True)

    def punch_hole(self, gpa: int, size: int) -> None:
        """In the file, beside the slot too."""
        self.file.punch_hole(OFFSET + gpa - GPA, size)

    def allocate(self, gpa: int, size: int) -> None:
        self.file.allocate(OFFSET + gpa - GPA, size)


class RestrictedGuest(PrivateGuest):
    """v9: everything is private at first, the fault exit comes with KVM_RUN's 0."""

    protocol = private.ABIS["restrictedmem"]
    fault_errno = 0

    def want(self, gpa: int, size: int, *, private: bool | None) -> int:
        """Have the guest say how it is going to access a range; None: as it is."""
        bits = {
            True: rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE,
            False: rm.KVM_MAP_GPA_RANGE_WANT_SHARED,
            None: rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE | rm.KVM_MAP_GPA_RANGE_WANT_SHARED,
        }[private]
        return self.guest.hypercall(k.KVM_HC_MAP_GPA_RANGE, gpa, size // PAGE, bits)


class MemfdGuest(PrivateGuest):
    """guest_memfd in a software-protected VM: the slot's range is made private first."""

    protocol = private.ABIS["guest_memfd"]
    fault_errno = errno.EFAULT


def fault_of(private_guest: PrivateGuest, stopped: GuestExit) -> tuple[int, int, bool]:
    """(gpa, size, private) of a fault exit, which is of the ABI's own kind."""
    fault = stopped.exit
    assert fault.abi == private_guest.abi
    assert fault.errno == private_guest.fault_errno
    return fault.gpa, fault.size, fault.private
