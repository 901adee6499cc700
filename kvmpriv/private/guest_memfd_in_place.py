"""guest_memfd with conversion in place: private or shared is a property of the file.

KVM_SET_MEMORY_ATTRIBUTES2 on the file's own descriptor, of the series "guest_memfd: In-place
conversion support", v13 of 10 September 2026, applied after Linux 7.3.  Where the module parameter
``kvm.gmem_in_place_conversion`` is off, or the kernel does not have it, the ioctl is ENOTTY.
"""

from __future__ import annotations

import errno as _errno
import time
import warnings
from typing import TYPE_CHECKING

from ..cdefs import guest_memfd as guest_memfd_h
from ..errors import ArgumentError
from ..fd import new_struct
from ..libc import os_error
from ..memory import PAGE_SIZE
from .conversion import ConversionError
from .guest_memfd import GuestMemfd, GuestMemfdAbi

if TYPE_CHECKING:
    from ..kvm import Kvm
    from .abi import Traits
    from .backing import PrivateFile

__all__ = ["GuestMemfdInPlaceAbi", "ask_set_memory_attributes2", "set_memory_attributes2"]

_REQUEST = guest_memfd_h.KVM_SET_MEMORY_ATTRIBUTES2
_ATTRIBUTES2 = guest_memfd_h.ffi.typeof("struct kvm_memory_attributes2 *")
_BAD_FLAG = 1 << 63
#: The errnos with which the kernel writes `error_offset`.
_STOPPED = (_errno.EAGAIN, _errno.ENOMEM)
_PAUSE = 0.001  # seconds between two attempts


def ask_set_memory_attributes2(file: PrivateFile) -> int:
    """Ask whether a guest_memfd can be converted, without any effect; returns the errno.

    EINVAL: it can, as the ioctl checks its flags first.  ENOTTY: the kernel does not have the
    ioctl, or its parameter gmem_in_place_conversion is off.  0: the flag 1<<63 means something to
    this kernel, which is newer than this header.
    """
    values = {"size": PAGE_SIZE, "flags": _BAD_FLAG}
    return file.ioctl_errno(_REQUEST, new_struct(_ATTRIBUTES2, values))


def set_memory_attributes2(file: PrivateFile, offset: int, size: int, attributes: int) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES2: KVM_MEMORY_ATTRIBUTE_PRIVATE makes a range private, 0 shared.

    Offsets of the file, bytes, page aligned; all or nothing.  The pages keep their content, and the
    mappings of a range that becomes private lose its pages.  ConversionError: EAGAIN with the
    offset of a page that is in use (pinned, or mapped again meanwhile), ENOMEM with the offset that
    was asked for.  OSError: EINVAL for a bad range, an attribute that does not exist or a VM that
    can't have private memory, ENOTTY where :func:`ask_set_memory_attributes2` reports it.

    RuntimeWarning if the kernel has written to words that are reserved in this header.
    """
    argument = new_struct(_ATTRIBUTES2, {"offset": offset, "size": size, "attributes": attributes})
    try:
        file.ioctl(_REQUEST, argument)
    except OSError as error:
        if error.errno not in _STOPPED:
            raise
        at = int(argument.error_offset)
        why = "this page is in use: pinned, or mapped"
        if error.errno == _errno.ENOMEM:
            why = "the kernel has no memory for it"
        what = f"converting {size:#x} bytes at {offset:#x} of the file: {why}: offset {at:#x}"
        raise ConversionError(error.errno, what, offset=at) from None
    if any(argument.reserved):
        warnings.warn(
            "the kernel has written to reserved words of struct kvm_memory_attributes2: it is newer"
            " than this kvmpriv",
            RuntimeWarning,
            stacklevel=2,
        )


class GuestMemfdInPlaceAbi(GuestMemfdAbi):
    """guest_memfd whose files are converted: one page is private or shared, and keeps its content.

    `file_flags` of ``GUEST_MEMFD_FLAG_*``: with INIT_SHARED the pages of a new file are shared,
    without it private; without MMAP the host has no way to shared pages.  The state belongs to the
    file: it needs no slot, and it survives slots, their deletion, and holes.

    `patience`: for how many seconds a conversion that is refused with EAGAIN is tried again, every
    millisecond; 0 passes the kernel's answer on.  A page fault that another vCPU or the host is
    about to finish has a reference to its page, for some microseconds; a page that is pinned (by
    io_uring, VFIO) is in use for long.  Meanwhile the VM's slots can't be changed.

    bind: guest accesses of both kinds reach the file.  KVM's own (its emulator's) go to `memory`,
    which should be a mapping of the same range: :meth:`create_memory` makes it.
    """

    def __init__(
        self,
        name: str = "guest_memfd_in_place",
        *,
        vm_type: int = guest_memfd_h.KVM_X86_SW_PROTECTED_VM,
        file_flags: int = (
            guest_memfd_h.GUEST_MEMFD_FLAG_MMAP | guest_memfd_h.GUEST_MEMFD_FLAG_INIT_SHARED
        ),
        patience: float = 0.05,
    ) -> None:
        if patience < 0:
            raise ArgumentError(f"patience must be 0 or more seconds, not {patience}")
        super().__init__(name, vm_type=vm_type, file_flags=file_flags)
        self.patience = patience
        shared = bool(file_flags & guest_memfd_h.GUEST_MEMFD_FLAG_INIT_SHARED)
        self.traits: Traits = self.traits._replace(
            default_private=not shared, backings=1, converts="file"
        )

    def convert_file(self, file: PrivateFile, offset: int, size: int, *, private: bool) -> None:
        """By KVM_SET_MEMORY_ATTRIBUTES2, again and again for `patience` seconds after EAGAIN."""
        attributes = guest_memfd_h.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        deadline = time.monotonic() + self.patience if self.patience else 0.0
        while True:
            try:
                set_memory_attributes2(file, offset, size, attributes)
            except ConversionError as error:
                if error.errno != _errno.EAGAIN or time.monotonic() >= deadline:
                    raise
                time.sleep(_PAUSE)
            else:
                return

    def try_out(self, kvm: Kvm) -> None:
        """Ask by a flag that does not exist, then as any ABI.  OSError: what the kernel refused."""
        with self.create_vm(kvm) as vm, GuestMemfd(vm, PAGE_SIZE) as file:
            answer = ask_set_memory_attributes2(file)
        if answer == 0:
            raise OSError(
                _errno.EPROTO,
                "KVM_SET_MEMORY_ATTRIBUTES2 takes a flag that this kvmpriv does not know: the"
                " kernel is newer",
            )
        if answer != _errno.EINVAL:
            what = "KVM_SET_MEMORY_ATTRIBUTES2, which needs kvm.gmem_in_place_conversion=1"
            raise os_error(answer, what)
        super().try_out(kvm)
