"""guest_memfd: its files, KVM_SET_USER_MEMORY_REGION2, KVM_SET_MEMORY_ATTRIBUTES.

Linux 6.8, commit a7800aa80ea4 ("KVM: Add KVM_CREATE_GUEST_MEMFD ioctl() for guest-specific backing
memory"); files that can be mapped since 6.18, commit 44c6cb9fe988.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

from ..cdefs import guest_memfd as guest_memfd_h
from ..faults import FaultLayout
from ..fd import Structs, new_struct, register_requests
from ..slots import Slot
from ..wakeup import SignalsBlocked
from .abi import PrivateAbi, Traits
from .backing import PrivateFile, fd_field

if TYPE_CHECKING:
    from ..memory import HostMemory
    from ..vcpu import Vcpu
    from ..vm import Vm
    from .backing import PrivateSlot
    from .vm import PrivateVm

__all__ = [
    "GuestMemfd",
    "GuestMemfdAbi",
    "pre_fault_memory",
    "set_memory_attributes",
    "set_user_memory_region2",
]

_SET_REGION2 = guest_memfd_h.KVM_SET_USER_MEMORY_REGION2
_REGIONS = Structs(guest_memfd_h.ffi.typeof("struct kvm_userspace_memory_region2 *"))
_CREATE = guest_memfd_h.ffi.typeof("struct kvm_create_guest_memfd *")
_ATTRIBUTES = guest_memfd_h.ffi.typeof("struct kvm_memory_attributes *")
_PRE_FAULT = guest_memfd_h.ffi.typeof("struct kvm_pre_fault_memory *")

register_requests(guest_memfd_h.REQUESTS)


class GuestMemfd(PrivateFile):
    """A file made by KVM_CREATE_GUEST_MEMFD for one VM, close-on-exec.

    `size` in bytes, page aligned; `flags` of ``GUEST_MEMFD_FLAG_*``, of which the capability
    KVM_CAP_GUEST_MEMFD_FLAGS reports those that are supported.  OSError: EINVAL for a bad size or
    flag, ENOTTY if KVM has no guest_memfd.

    The kernel's slot holds no reference to the file: closing the last fd takes the memory away from
    the guest.  So a slot made by this module keeps the fd open until the slot is deleted.
    """

    _what = "guest_memfd file"

    def __init__(self, vm: Vm, size: int, flags: int = 0) -> None:
        argument = new_struct(_CREATE, {"size": size, "flags": flags})
        self.size = size
        self.flags = flags
        with SignalsBlocked():
            super().__init__(vm.ioctl(guest_memfd_h.KVM_CREATE_GUEST_MEMFD, argument))
        try:
            os.set_inheritable(self._fd, False)  # noqa: FBT003  # the ioctl has no flag for it
        except BaseException:
            self.close()
            raise


def set_user_memory_region2(
    vm: Vm,
    slot: int,
    guest_phys_addr: int,
    memory_size: int,
    memory: HostMemory | None,
    file: GuestMemfd | int = 0,
    guest_memfd_offset: int = 0,
    *,
    memory_offset: int = 0,
    flags: int = guest_memfd_h.KVM_MEM_GUEST_MEMFD,
) -> Slot:
    """KVM_SET_USER_MEMORY_REGION2.

    Private pages come from `file` (an int: a descriptor, of anything) at `guest_memfd_offset`,
    shared ones from `memory` at `memory_offset` (None: userspace_addr 0); all in bytes, page
    aligned.  OSError: EBADF for a bad fd, EEXIST if it overlaps another slot, EINVAL for any other
    bad argument.
    """
    fd = file if isinstance(file, int) else file.fileno()
    held = tuple(thing for thing in (memory, file) if thing and not isinstance(thing, int))
    userspace_addr = memory.userspace_addr + memory_offset if memory else 0
    new = Slot(vm, slot, guest_phys_addr, memory_size, flags, held, userspace_addr)
    fd = fd_field(fd)
    vm.set_slot(new, _SET_REGION2, _REGIONS, lambda new: _region2(new, guest_memfd_offset, fd))
    return new


def _region2(slot: Slot, offset: int, fd: int) -> tuple[int, ...]:
    """The fields of struct kvm_userspace_memory_region2."""
    return (
        slot.slot,
        slot.flags,
        slot.guest_phys_addr,
        slot.memory_size,
        slot.userspace_addr,
        offset,
        fd,
    )


def _private_region2(slot: PrivateSlot) -> tuple[int, ...]:
    return _region2(slot, slot.offset, slot.file.fileno())


def set_memory_attributes(vm: Vm, address: int, size: int, attributes: int) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES: KVM_MEMORY_ATTRIBUTE_PRIVATE makes a range private, 0 shared.

    Guest physical addresses, bytes, page aligned; all or nothing.  OSError: EINVAL for a bad range
    or an attribute that this VM does not support, ENOTTY if KVM has no attributes.
    """
    argument = new_struct(_ATTRIBUTES, (address, size, attributes, 0))
    vm.ioctl(guest_memfd_h.KVM_SET_MEMORY_ATTRIBUTES, argument)


def pre_fault_memory(vcpu: Vcpu, gpa: int, size: int) -> int:
    """KVM_PRE_FAULT_MEMORY: map a range; returns how many bytes at its end are not mapped.

    OSError: ENOENT if there is no slot, EINVAL for a bad range, ENOTTY before Linux 6.11.
    """
    argument = new_struct(_PRE_FAULT, {"gpa": gpa, "size": size})
    vcpu.ioctl(guest_memfd_h.KVM_PRE_FAULT_MEMORY, argument)
    return int(argument.size)


class GuestMemfdAbi(PrivateAbi):
    """guest_memfd: VMs of `vm_type`, and files made with `file_flags`.

    `file_flags` of ``GUEST_MEMFD_FLAG_*``.  A file that can be mapped has a page's private and
    shared data in the same page.  To register a variant, give it another `name`.

    bind: no other slot flag is allowed, and the range must be inside the file and in no other
    slot; OSError as :func:`set_user_memory_region2`.
    """

    slot_flag: int = guest_memfd_h.KVM_MEM_GUEST_MEMFD

    def __init__(
        self,
        name: str = "guest_memfd",
        *,
        vm_type: int = guest_memfd_h.KVM_X86_SW_PROTECTED_VM,
        file_flags: int = 0,
    ) -> None:
        self.name = name
        self.vm_type = vm_type
        self.file_flags = file_flags
        self.traits: Traits = Traits(
            default_private=False,
            # Without hardware that tells the two apart, an access is of the kind that the page is
            # (arch/x86/kvm/mmu/mmu_internal.h, kvm_mmu_do_page_fault).
            access_follows_state=vm_type
            in (guest_memfd_h.KVM_X86_DEFAULT_VM, guest_memfd_h.KVM_X86_SW_PROTECTED_VM),
            backings=1 if file_flags & guest_memfd_h.GUEST_MEMFD_FLAG_MMAP else 2,
            converts="vm",
        )
        #: KVM_RUN fails with EFAULT, or EHWPOISON for a poisoned page, and fills in kvm_run.
        self.fault_layout: FaultLayout = FaultLayout(
            abi=name,
            reason=guest_memfd_h.KVM_EXIT_MEMORY_FAULT,
            struct="struct kvm_run_memory_fault",
            ffi=guest_memfd_h.ffi,
            private_flag=guest_memfd_h.KVM_MEMORY_EXIT_FLAG_PRIVATE,
            errnos=frozenset((_errno.EFAULT, guest_memfd_h.EHWPOISON)),
        )

    def create_file(self, vm: PrivateVm, size: int) -> GuestMemfd:
        """A file for this VM alone; it keeps the kernel's VM alive."""
        return GuestMemfd(vm, size, self.file_flags)

    def set_slot(self, slot: PrivateSlot) -> None:
        slot.vm.set_slot(slot, _SET_REGION2, _REGIONS, _private_region2)

    def convert_vm(self, vm: PrivateVm, gpa: int, size: int, *, private: bool) -> None:
        attributes = guest_memfd_h.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        set_memory_attributes(vm, gpa, size, attributes)

    def populate(self, vcpu: Vcpu, gpa: int, size: int) -> None:
        """By KVM_PRE_FAULT_MEMORY.  OSError: ENOENT without a slot, ENOTTY before Linux 6.11.

        Commit bc1a5cd00211 ("KVM: Add KVM_PRE_FAULT_MEMORY vcpu ioctl to pre-populate guest
        memory").
        """
        end = gpa + size
        while size:
            try:
                size = pre_fault_memory(vcpu, end - size, size)
            except InterruptedError:  # a signal came before the first page was mapped
                continue
