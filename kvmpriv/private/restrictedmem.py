"""v9: memfd_restricted(2), KVM_MEM_PRIVATE, conversion by REG/UNREG_REGION.

LKML, 25 October 2022, 20221025151344.3784230-1-chao.p.peng@linux.intel.com.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

from .. import libc
from ..cdefs import kvm, restrictedmem
from ..faults import FaultLayout, register_fault_layout
from ..fd import Fd
from ..vm import Slot
from ..wakeup import uninterrupted

if TYPE_CHECKING:
    from ..memory import HostMemory
    from ..vm import Vm

__all__ = [
    "FAULT_LAYOUT",
    "RestrictedMem",
    "ask_memfd_restricted",
    "memory_encrypt_reg_region",
    "memory_encrypt_unreg_region",
    "set_user_memory_region_ext",
]

#: KVM_RUN returns 0; v10 widened `flags` over the padding, which is 0 in v9: one layout reads both.
FAULT_LAYOUT = FaultLayout(
    abi="restrictedmem",
    reason=restrictedmem.KVM_EXIT_MEMORY_FAULT,
    struct="struct kvm_run_memory_fault",
    ffi=restrictedmem.ffi,
    private_flag=restrictedmem.KVM_MEMORY_EXIT_FLAG_PRIVATE,
    errnos=frozenset(),
)
register_fault_layout(FAULT_LAYOUT)

_SYS_MEMFD_RESTRICTED = restrictedmem.__NR_memfd_restricted  # noqa: SLF001  # the kernel's name
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


class RestrictedMem(Fd):
    """A file made by ``memfd_restricted(0)``, close-on-exec.

    Raises OSError: ENOSYS where system call 451 is not memfd_restricted (it is not called then),
    EMFILE, ENFILE.
    """

    _what = "restrictedmem file"

    def __init__(self) -> None:
        errno = ask_memfd_restricted()
        if errno != _errno.EINVAL:
            if errno in (0, _errno.EBADF):
                errno = _errno.ENOSYS
            raise libc.os_error(errno, "memfd_restricted")
        with uninterrupted():
            fd = libc.syscall(_SYS_MEMFD_RESTRICTED, 0)
            if fd < 0:
                raise libc.os_error(libc.last_errno(), "memfd_restricted(0)")
            super().__init__(fd)
        try:
            magic = libc.fstatfs_type(fd)
            if magic != restrictedmem.RESTRICTEDMEM_MAGIC:
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
        os.ftruncate(self.fileno(), size)


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
    flags: int = restrictedmem.KVM_MEM_PRIVATE,
) -> Slot:
    """KVM_SET_USER_MEMORY_REGION with ``struct kvm_userspace_memory_region_ext``.

    Private pages come from the file at `restricted_offset`, shared ones from `memory` at
    `memory_offset` (None: userspace_addr 0); all in bytes, page aligned.  OSError: EINVAL for
    whatever is not right, a bad fd too; EEXIST when it overlaps another slot.
    """
    fd = restrictedmem_file if isinstance(restrictedmem_file, int) else restrictedmem_file.fileno()
    region = restrictedmem.ffi.new("struct kvm_userspace_memory_region_ext *")
    region.region.slot = slot
    region.region.flags = flags
    region.region.guest_phys_addr = guest_phys_addr
    region.region.memory_size = memory_size
    region.region.userspace_addr = memory.userspace_addr + memory_offset if memory else 0
    region.restricted_offset = restricted_offset
    region.restricted_fd = fd & 0xFFFFFFFF
    # The kernel's slot counts the file itself: a closed fd frees nothing, nothing to hold here.
    held = (memory,) if memory else ()
    new = Slot(vm, slot, guest_phys_addr, memory_size, flags, held)
    vm.set_region(kvm.KVM_SET_USER_MEMORY_REGION, region, new)
    return new


def _convert(vm: Vm, request: int, gpa: int, size: int) -> None:
    vm.ioctl(request, kvm.ffi.new("struct kvm_enc_region *", (gpa, size)))


def memory_encrypt_reg_region(vm: Vm, gpa: int, size: int) -> None:
    """KVM_MEMORY_ENCRYPT_REG_REGION: make a range of guest physical addresses private.

    Bytes, page aligned.  OSError: EINVAL for a bad range, ENOTTY where this VM has no private
    memory.  On a kernel that is not v9's the same request takes a host address: know your ABI.
    """
    _convert(vm, kvm.KVM_MEMORY_ENCRYPT_REG_REGION, gpa, size)


def memory_encrypt_unreg_region(vm: Vm, gpa: int, size: int) -> None:
    """KVM_MEMORY_ENCRYPT_UNREG_REGION: make a range shared, on the terms of its opposite."""
    _convert(vm, kvm.KVM_MEMORY_ENCRYPT_UNREG_REGION, gpa, size)
