"""v9: memfd_restricted(2), KVM_MEM_PRIVATE, KVM_MEMORY_ENCRYPT_REG_REGION and UNREG_REGION.

Posted on 25 October 2022, 20221025151344.3784230-1-chao.p.peng@linux.intel.com.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

from .. import libc
from ..cdefs import kvm as kvm_h
from ..cdefs import restrictedmem as restrictedmem_h
from ..cdefs import restrictedmem_v10 as restrictedmem_v10_h
from ..faults import FaultLayout
from ..fd import Structs, new_struct, register_requests
from ..slots import Slot
from ..wakeup import SignalsBlocked
from .abi import PrivateAbi, Traits
from .backing import PrivateFile, check_loff, fd_field

if TYPE_CHECKING:
    from ..memory import HostMemory
    from ..vcpu import Vcpu
    from ..vm import Vm
    from .backing import PrivateSlot
    from .vm import PrivateVm

__all__ = [
    "RestrictedMem",
    "RestrictedMemAbi",
    "ask_memfd_restricted",
    "memory_encrypt_reg_region",
    "memory_encrypt_unreg_region",
    "set_user_memory_region_ext",
]

_SET_REGION = kvm_h.KVM_SET_USER_MEMORY_REGION
_REGIONS = Structs(restrictedmem_h.ffi.typeof("struct kvm_userspace_memory_region_ext *"))
_RANGE = kvm_h.ffi.typeof("struct kvm_enc_region *")

register_requests(restrictedmem_v10_h.REQUESTS)  # v9 adds none

_SYS_MEMFD_RESTRICTED = restrictedmem_h.__NR_memfd_restricted  # noqa: SLF001  # the kernel's name
_BAD_FLAGS = 0xFFFFFFFF


def ask_memfd_restricted() -> int:
    """Ask whether system call 451 is memfd_restricted, without any effect; returns the errno.

    EINVAL: it is, as it checks its flags first.  EBADF: it is cachestat(2), which is 451 in Linux
    since 6.5 (commit cf264e1329fb).  ENOSYS: neither.  EPERM, EACCES: a seccomp filter hides it.
    """
    # For cachestat this is fd -1, which is never open, so it ignores its other arguments.
    return max(0, -libc.syscall(_SYS_MEMFD_RESTRICTED, _BAD_FLAGS))


class RestrictedMem(PrivateFile):
    """A file made by ``memfd_restricted(0)``, close-on-exec.

    OSError: ENOSYS if system call 451 is not memfd_restricted (the call is not made then), EMFILE,
    ENFILE.

    The kernel's slot holds a reference to the file: closing the fd frees nothing as long as a slot
    uses it.
    """

    _what = "restrictedmem file"

    def __init__(self) -> None:
        errno = ask_memfd_restricted()
        if errno != _errno.EINVAL:
            if errno in (0, _errno.EBADF):
                errno = _errno.ENOSYS
            raise libc.os_error(errno, "memfd_restricted")
        with SignalsBlocked():
            fd = libc.syscall(_SYS_MEMFD_RESTRICTED, 0)
            if fd < 0:
                raise libc.os_error(-fd, "memfd_restricted(0)")
            super().__init__(fd)
        try:
            magic = libc.fstatfs_type(fd)
            if magic != restrictedmem_h.RESTRICTEDMEM_MAGIC:
                raise OSError(
                    _errno.ENOSYS,
                    f"system call 451 made a file with magic {magic:#x}, not RESTRICTEDMEM_MAGIC",
                )
            os.set_inheritable(fd, False)  # noqa: FBT003  # v9 has no flag for it
        except BaseException:
            self.close()
            raise

    def ftruncate(self, size: int) -> None:
        """Set the size, once; bytes, page aligned.  OSError: EINVAL; EPERM if it is set already."""
        check_loff(size)
        os.ftruncate(self.fileno(), size)
        self.size = size


def set_user_memory_region_ext(
    vm: Vm,
    slot: int,
    guest_phys_addr: int,
    memory_size: int,
    memory: HostMemory | None,
    restrictedmem_file: RestrictedMem | int,
    restricted_offset: int = 0,
    *,
    memory_offset: int = 0,
    flags: int = restrictedmem_h.KVM_MEM_PRIVATE,
) -> Slot:
    """KVM_SET_USER_MEMORY_REGION with ``struct kvm_userspace_memory_region_ext``.

    Private pages come from the file (an int: a descriptor, of anything) at `restricted_offset`,
    shared ones from `memory` at `memory_offset` (None: userspace_addr 0); all in bytes, page
    aligned.  OSError: EINVAL for a bad argument, a bad fd included; EEXIST if it overlaps another
    slot.
    """
    fd = restrictedmem_file if isinstance(restrictedmem_file, int) else restrictedmem_file.fileno()
    held = (memory,) if memory else ()  # not the file, to which the kernel's slot has a reference
    userspace_addr = memory.userspace_addr + memory_offset if memory else 0
    new = Slot(vm, slot, guest_phys_addr, memory_size, flags, held, userspace_addr)
    fd = fd_field(fd)
    vm.set_slot(new, _SET_REGION, _REGIONS, lambda new: _region_ext(new, restricted_offset, fd))
    return new


def _region_ext(slot: Slot, offset: int, fd: int) -> tuple[object, ...]:
    """The fields of struct kvm_userspace_memory_region_ext."""
    where = (slot.guest_phys_addr, slot.memory_size, slot.userspace_addr)
    return ((slot.slot, slot.flags, *where), offset, fd)


def _private_region_ext(slot: PrivateSlot) -> tuple[object, ...]:
    return _region_ext(slot, slot.offset, slot.file.fileno())


def memory_encrypt_reg_region(vm: Vm, gpa: int, size: int) -> None:
    """KVM_MEMORY_ENCRYPT_REG_REGION: make a range of guest physical addresses private.

    Bytes, page aligned.  OSError: EINVAL for a bad range, ENOTTY if this VM can't have private
    memory.  In every other kernel the same request takes a host address, for SEV.
    """
    vm.ioctl(kvm_h.KVM_MEMORY_ENCRYPT_REG_REGION, new_struct(_RANGE, (gpa, size)))


def memory_encrypt_unreg_region(vm: Vm, gpa: int, size: int) -> None:
    """KVM_MEMORY_ENCRYPT_UNREG_REGION: make a range shared; see its opposite."""
    vm.ioctl(kvm_h.KVM_MEMORY_ENCRYPT_UNREG_REGION, new_struct(_RANGE, (gpa, size)))


class RestrictedMemAbi(PrivateAbi):
    """v9.  Its VMs are of any type: an arch hook in the kernel decides which may be private.

    bind: KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY are allowed; OSError as
    :func:`set_user_memory_region_ext`.  Two slots may have the same range of a file; the kernel
    leaves undefined what that means.

    convert: the posted series keeps the state page by page, under a lock; pass it no huge range.
    """

    name = "restrictedmem"
    traits: Traits = Traits(
        default_private=True, access_follows_state=False, backings=2, converts="vm"
    )
    #: KVM_RUN returns 0.  v10 widened `flags` over the padding, which is 0 in v9, so that this
    #: layout reads both.
    fault_layout: FaultLayout = FaultLayout(
        abi=name,
        reason=restrictedmem_h.KVM_EXIT_MEMORY_FAULT,
        struct="struct kvm_run_memory_fault",
        ffi=restrictedmem_h.ffi,
        private_flag=restrictedmem_h.KVM_MEMORY_EXIT_FLAG_PRIVATE,
        errnos=frozenset(),
    )
    slot_flag: int = restrictedmem_h.KVM_MEM_PRIVATE

    def create_file(self, vm: PrivateVm, size: int) -> RestrictedMem:
        """A file with its size set; it may be used by any VM."""
        file = RestrictedMem()
        try:
            file.ftruncate(size)
        except BaseException:
            file.close()
            raise
        return file

    def set_slot(self, slot: PrivateSlot) -> None:
        slot.vm.set_slot(slot, _SET_REGION, _REGIONS, _private_region_ext)

    def convert_vm(self, vm: PrivateVm, gpa: int, size: int, *, private: bool) -> None:
        request = memory_encrypt_reg_region if private else memory_encrypt_unreg_region
        request(vm, gpa, size)

    def populate(self, vcpu: Vcpu, gpa: int, size: int) -> None:
        """OSError, EOPNOTSUPP: the ABI has no such call."""
        raise libc.os_error(
            _errno.EOPNOTSUPP,
            f"{self.name} can't map pages before they are touched; PrivateSlot.allocate allocates",
        )
