"""v9: memfd_restricted(2), KVM_MEM_PRIVATE, conversion by REG/UNREG_REGION.

LKML, 25 October 2022, 20221025151344.3784230-1-chao.p.peng@linux.intel.com.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

from .. import libc
from ..cdefs import kvm as kvm_h
from ..cdefs import restrictedmem as restrictedmem_h
from ..faults import FaultLayout, register_fault_layout
from ..fd import Structs, new_struct
from ..slots import Slot
from ..wakeup import SignalsBlocked
from .backing import PrivateFile, PrivateSlot, check_loff, converted

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
    "RestrictedMem",
    "ask_memfd_restricted",
    "bind",
    "convert",
    "create_file",
    "create_vm",
    "memory_encrypt_reg_region",
    "memory_encrypt_unreg_region",
    "populate",
    "set_user_memory_region_ext",
]

_REGIONS = Structs(restrictedmem_h.ffi.typeof("struct kvm_userspace_memory_region_ext *"))
_RANGE = kvm_h.ffi.typeof("struct kvm_enc_region *")

NAME = "restrictedmem"

#: What a gfn is until it is converted.
DEFAULT_PRIVATE = True

#: Guests have a wish of their own for each gfn: a fault asks for a conversion.
ACCESS_FOLLOWS_STATE = False

#: KVM_RUN returns 0; v10 widened `flags` over the padding, which is 0 in v9: one layout reads both.
FAULT_LAYOUT = FaultLayout(
    abi=NAME,
    reason=restrictedmem_h.KVM_EXIT_MEMORY_FAULT,
    struct="struct kvm_run_memory_fault",
    ffi=restrictedmem_h.ffi,
    private_flag=restrictedmem_h.KVM_MEMORY_EXIT_FLAG_PRIVATE,
    errnos=frozenset(),
)
register_fault_layout(FAULT_LAYOUT)

_SYS_MEMFD_RESTRICTED = restrictedmem_h.__NR_memfd_restricted  # noqa: SLF001  # the kernel's name
_BAD_FLAGS = 0xFFFFFFFF


def ask_memfd_restricted() -> int:
    """Ask whether system call 451 is memfd_restricted, without any effect; returns the errno.

    EINVAL: it is (it looks at its flags first).  EBADF: it is cachestat(2), 451 in mainline since
    6.5 (commit cf264e1329fb).  ENOSYS: neither; EPERM, EACCES: a seccomp filter hides it.
    """
    # As cachestat's fd, -1 can't be open, so its other arguments are never looked at.
    if libc.syscall(_SYS_MEMFD_RESTRICTED, _BAD_FLAGS) >= 0:
        return 0
    return libc.last_errno()


class RestrictedMem(PrivateFile):
    """A file made by ``memfd_restricted(0)``, close-on-exec.

    Raises OSError: ENOSYS where system call 451 is not memfd_restricted (it is not called then),
    EMFILE, ENFILE.

    The kernel's slot counts the file itself: closing the fd frees nothing while a slot has it.
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
                raise libc.os_error(libc.last_errno(), "memfd_restricted(0)")
            super().__init__(fd)
        try:
            magic = libc.fstatfs_type(fd)
            if magic != restrictedmem_h.RESTRICTEDMEM_MAGIC:
                raise OSError(
                    _errno.ENOSYS,
                    f"system call 451 made a file of type {magic:#x}, not RESTRICTEDMEM_MAGIC",
                )
            os.set_inheritable(fd, False)  # noqa: FBT003  # v9 has no flag for it
        except BaseException:
            self.close()
            raise

    def ftruncate(self, size: int) -> None:
        """Set the size, once: bytes, page aligned.  OSError: EINVAL, EPERM when it has one."""
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

    Private pages come from the file at `restricted_offset`, shared ones from `memory` at
    `memory_offset` (None: userspace_addr 0); all in bytes, page aligned.  OSError: EINVAL for
    whatever is not right, a bad fd too; EEXIST when it overlaps another slot.
    """
    fd = restrictedmem_file if isinstance(restrictedmem_file, int) else restrictedmem_file.fileno()
    held = (memory,) if memory else ()  # not the file: the kernel's slot counts it itself
    userspace_addr = memory.userspace_addr + memory_offset if memory else 0
    new = Slot(vm, slot, guest_phys_addr, memory_size, flags, held, userspace_addr)
    ordinary = (slot, flags, guest_phys_addr, memory_size, userspace_addr)
    region = _REGIONS.take((ordinary, restricted_offset, fd & 0xFFFFFFFF))
    vm.set_region(kvm_h.KVM_SET_USER_MEMORY_REGION, region, new)
    _REGIONS.give_back(region)
    return new


def memory_encrypt_reg_region(vm: Vm, gpa: int, size: int) -> None:
    """KVM_MEMORY_ENCRYPT_REG_REGION: make a range of guest physical addresses private.

    Bytes, page aligned.  OSError: EINVAL for a bad range, ENOTTY where this VM has no private
    memory.  On a kernel that is not v9's the same request takes a host address: know your ABI.
    """
    vm.ioctl(kvm_h.KVM_MEMORY_ENCRYPT_REG_REGION, new_struct(_RANGE, (gpa, size)))


def memory_encrypt_unreg_region(vm: Vm, gpa: int, size: int) -> None:
    """KVM_MEMORY_ENCRYPT_UNREG_REGION: make a range shared, on the terms of its opposite."""
    vm.ioctl(kvm_h.KVM_MEMORY_ENCRYPT_UNREG_REGION, new_struct(_RANGE, (gpa, size)))


# -- the protocol: see PrivateAbi --------------------------------------------------------------


def create_vm(kvm: Kvm) -> Vm:
    """A default VM; whether it has private memory an arch hook says, when a slot is bound."""
    return kvm.create_vm()


def create_file(vm: Vm, size: int) -> RestrictedMem:
    """A file for any VM, its size set (v9 binds and faults beyond it all the same)."""
    file = RestrictedMem()
    try:
        file.ftruncate(size)
    except BaseException:
        file.close()
        raise
    return file


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
    """Beside `flags`, KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY are allowed.

    A slot may have a range of the file that another has; the kernel leaves undefined what that
    means.  OSError: EINVAL, EEXIST as :func:`set_user_memory_region_ext` has them.
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
    flags |= restrictedmem_h.KVM_MEM_PRIVATE
    new = PrivateSlot(
        vm, slot, guest_phys_addr, memory_size, flags, file, offset, memory, memory_offset
    )
    ordinary = (slot, flags, guest_phys_addr, memory_size, new.userspace_addr)
    fd = file.fileno()
    region = _REGIONS.take((ordinary, offset, fd))
    vm.set_region(kvm_h.KVM_SET_USER_MEMORY_REGION, region, new)
    _REGIONS.give_back(region)
    return new


def convert(vm: Vm, gpa: int, size: int, *, private: bool, keep: bool = False) -> None:
    """By KVM_MEMORY_ENCRYPT_REG_REGION and UNREG_REGION.

    Literal v9 stores state page by page, under a lock: pass it no huge range.
    """
    request = memory_encrypt_reg_region if private else memory_encrypt_unreg_region
    with vm.slots_lock:
        request(vm, gpa, size)
        converted(vm, gpa, size, private=private, keep=keep)


def populate(vcpu: Vcpu, gpa: int, size: int) -> None:
    """v9 can not: OSError, EOPNOTSUPP."""
    raise libc.os_error(
        _errno.EOPNOTSUPP, "v9 maps nothing ahead; PrivateSlot.allocate fills the file"
    )
