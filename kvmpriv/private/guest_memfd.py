"""Mainline: guest_memfd files, KVM_SET_USER_MEMORY_REGION2, memory attributes.

Linux 6.8, commit a7800aa80ea4 ("KVM: Add KVM_CREATE_GUEST_MEMFD ioctl() for guest-specific backing
memory"); files that can be mapped since 6.18, commit 44c6cb9fe988.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

from ..cdefs import guest_memfd as guest_memfd_h
from ..faults import FaultLayout, register_fault_layout
from ..fd import Structs, new_struct
from ..slots import Slot
from ..wakeup import SignalsBlocked
from .backing import PrivateFile, PrivateSlot, converted

if TYPE_CHECKING:
    from ..kvm import Kvm
    from ..memory import HostMemory
    from ..vcpu import Vcpu
    from ..vm import Vm

__all__ = [
    "ACCESS_FOLLOWS_STATE",
    "DEFAULT_PRIVATE",
    "FAULT_LAYOUT",
    "NAME",
    "GuestMemfd",
    "bind",
    "convert",
    "create_file",
    "create_vm",
    "populate",
    "pre_fault_memory",
    "set_memory_attributes",
    "set_user_memory_region2",
]

_REGIONS = Structs(guest_memfd_h.ffi.typeof("struct kvm_userspace_memory_region2 *"))
_CREATE = guest_memfd_h.ffi.typeof("struct kvm_create_guest_memfd *")
_ATTRIBUTES = guest_memfd_h.ffi.typeof("struct kvm_memory_attributes *")
_PRE_FAULT = guest_memfd_h.ffi.typeof("struct kvm_pre_fault_memory *")

NAME = "guest_memfd"

#: What a gfn is until it is converted.
DEFAULT_PRIVATE = False

#: A software-protected VM's access is of the kind that the gfn is (arch/x86/kvm/mmu/mmu_internal.h,
#: kvm_mmu_do_page_fault), so that a fault in private-capable memory tells of a conversion that came
#: between: nothing is to be done but to run again.
ACCESS_FOLLOWS_STATE = True

#: KVM_RUN fails with EFAULT (EHWPOISON for a poisoned page) and describes the fault in kvm_run.
FAULT_LAYOUT = FaultLayout(
    abi=NAME,
    reason=guest_memfd_h.KVM_EXIT_MEMORY_FAULT,
    struct="struct kvm_run_memory_fault",
    ffi=guest_memfd_h.ffi,
    private_flag=guest_memfd_h.KVM_MEMORY_EXIT_FLAG_PRIVATE,
    errnos=frozenset((_errno.EFAULT, guest_memfd_h.EHWPOISON)),
)
register_fault_layout(FAULT_LAYOUT)


class GuestMemfd(PrivateFile):
    """A file made by KVM_CREATE_GUEST_MEMFD for one VM, close-on-exec.

    `size` in bytes, page aligned; `flags` of ``GUEST_MEMFD_FLAG_*`` (KVM_CAP_GUEST_MEMFD_FLAGS says
    which).  OSError: EINVAL for a bad size or flag, ENOTTY where KVM has no guest_memfd.

    The file does not stay by being bound: closing its last fd takes the memory from the guest.  A
    slot made here therefore keeps the fd open until it is deleted.
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

    Private pages come from `file` at `guest_memfd_offset`, shared ones from `memory` at
    `memory_offset` (None: userspace_addr 0); all in bytes, page aligned.  OSError: EBADF for a bad
    fd, EEXIST when it overlaps another slot, EINVAL for whatever else is not right.
    """
    fd = file if isinstance(file, int) else file.fileno()
    held = tuple(thing for thing in (memory, file) if thing and not isinstance(thing, int))
    userspace_addr = memory.userspace_addr + memory_offset if memory else 0
    new = Slot(vm, slot, guest_phys_addr, memory_size, flags, held, userspace_addr)
    fields = (slot, flags, guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset)
    region = _REGIONS.take((*fields, fd & 0xFFFFFFFF))
    vm.set_region(guest_memfd_h.KVM_SET_USER_MEMORY_REGION2, region, new)
    _REGIONS.give_back(region)
    return new


def set_memory_attributes(vm: Vm, address: int, size: int, attributes: int) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES: KVM_MEMORY_ATTRIBUTE_PRIVATE makes a range private, 0 shared.

    Guest physical addresses, bytes, page aligned; all or nothing.  OSError: EINVAL for a bad range
    or an attribute that this VM does not have, ENOTTY where KVM has none.
    """
    argument = new_struct(_ATTRIBUTES, (address, size, attributes, 0))
    vm.ioctl(guest_memfd_h.KVM_SET_MEMORY_ATTRIBUTES, argument)


def pre_fault_memory(vcpu: Vcpu, gpa: int, size: int) -> int:
    """KVM_PRE_FAULT_MEMORY: map a range ahead; returns how many bytes were left undone.

    OSError: ENOENT where no slot is, EINVAL for a bad range, ENOTTY before Linux 6.11.
    """
    argument = new_struct(_PRE_FAULT, {"gpa": gpa, "size": size})
    vcpu.ioctl(guest_memfd_h.KVM_PRE_FAULT_MEMORY, argument)
    return int(argument.size)


# -- the protocol: see PrivateAbi --------------------------------------------------------------


def create_vm(kvm: Kvm) -> Vm:
    """A VM of type KVM_X86_SW_PROTECTED_VM.  OSError: EINVAL where KVM has no such VMs."""
    return kvm.create_vm(guest_memfd_h.KVM_X86_SW_PROTECTED_VM)


def create_file(vm: Vm, size: int) -> GuestMemfd:
    """A file for this VM; it keeps the kernel's VM alive."""
    return GuestMemfd(vm, size)


def bind(
    vm: Vm,
    guest_phys_addr: int,
    memory_size: int,
    file: PrivateFile,
    offset: int = 0,
    *,
    memory: HostMemory | None = None,
    memory_offset: int = 0,
    slot: int | None = None,
    flags: int = 0,
) -> PrivateSlot:
    """No other flag is allowed; the range is inside the file and no other slot's.

    OSError: EINVAL, EBADF, EEXIST as :func:`set_user_memory_region2` has them.
    """
    if slot is None:
        with vm.slots_lock:
            return bind(
                vm,
                guest_phys_addr,
                memory_size,
                file,
                offset,
                memory=memory,
                memory_offset=memory_offset,
                slot=vm.free_slot(),
                flags=flags,
            )
    flags |= guest_memfd_h.KVM_MEM_GUEST_MEMFD
    new = PrivateSlot(
        vm, slot, guest_phys_addr, memory_size, flags, file, offset, memory, memory_offset
    )
    fd = file.fileno()
    fields = (slot, flags, guest_phys_addr, memory_size, new.userspace_addr, offset, fd)
    region = _REGIONS.take(fields)
    vm.set_region(guest_memfd_h.KVM_SET_USER_MEMORY_REGION2, region, new)
    _REGIONS.give_back(region)
    return new


def convert(vm: Vm, gpa: int, size: int, *, private: bool, keep: bool = False) -> None:
    """By KVM_SET_MEMORY_ATTRIBUTES."""
    with vm.slots_lock:
        attributes = guest_memfd_h.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        set_memory_attributes(vm, gpa, size, attributes)
        converted(vm, gpa, size, private=private, keep=keep)


def populate(vcpu: Vcpu, gpa: int, size: int) -> None:
    """By KVM_PRE_FAULT_MEMORY; ENOENT where no slot is, ENOTTY before Linux 6.11.

    Commit bc1a5cd00211 ("KVM: Add KVM_PRE_FAULT_MEMORY vcpu ioctl to pre-populate guest memory").
    """
    end = gpa + size
    while size:
        try:
            size = pre_fault_memory(vcpu, end - size, size)
        except InterruptedError:  # nothing was mapped before a signal came
            continue
