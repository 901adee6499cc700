"""/dev/kvm itself."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from .cdefs import kvm as kvm_h
from .fd import REQUEST_NAMES, Fd, check_range, unowned
from .libc import ioctl as _ioctl
from .libc import last_errno, os_error
from .vm import Vm
from .wakeup import SignalsBlocked

if TYPE_CHECKING:
    from .cpuid import CpuidEntry

__all__ = ["Kvm"]

_ffi = kvm_h.ffi
_CHECK_EXTENSION = kvm_h.KVM_CHECK_EXTENSION
_VmT = TypeVar("_VmT", bound=Vm)


class Kvm(Fd):
    """The system's KVM: an open /dev/kvm (`path`).

    A context manager; ClosedError after close.  Raises OSError: ENOENT (no such device node: is the
    module loaded?), EACCES (not permitted: group kvm), ENXIO or ENODEV (a node without a driver),
    ENOTTY (not KVM), EPROTO (an API version other than 12).
    """

    _what = "/dev/kvm"

    def __init__(self, path: str | os.PathLike[str] = "/dev/kvm") -> None:
        name = os.fspath(path)
        with SignalsBlocked():
            try:
                fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror}{_hint(error.errno)}", name) from None
            super().__init__(fd)
        try:
            version = _ioctl(fd, kvm_h.KVM_GET_API_VERSION, 0)
            if version < 0:
                errno = last_errno()
                raise OSError(errno, f"not KVM: KVM_GET_API_VERSION: {os.strerror(errno)}", name)
            if version != kvm_h.KVM_API_VERSION:
                raise OSError(_errno.EPROTO, f"KVM's API version is {version}, not 12", name)
            self._vcpu_mmap_size: int = _ioctl(fd, kvm_h.KVM_GET_VCPU_MMAP_SIZE, 0)
            if self._vcpu_mmap_size < 0:
                errno = last_errno()
                raise OSError(errno, f"KVM_GET_VCPU_MMAP_SIZE: {os.strerror(errno)}", name)
        except BaseException:
            self.close()
            raise

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12, since 2007."""
        return self.ioctl(kvm_h.KVM_GET_API_VERSION)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: the size of a vCPU's mapping in bytes.

        That is struct kvm_run and the pages that follow it.
        """
        return self._vcpu_mmap_size

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION.

        Returns 0 if `cap` is not supported; otherwise a positive int whose meaning depends on the
        capability.  A VM may support less or more: :meth:`Vm.check_extension`.
        """
        result: int = _ioctl(self._fd, _CHECK_EXTENSION, cap)
        # The check costs time, and only a number that ctypes has cut to 64 bits needs it.
        if result <= 0 or cap > 0x3FFFFFFF or cap < 0:
            check_range("cap", cap, 1 << 64)
            if result < 0:
                raise self._error(_CHECK_EXTENSION, cap)
        return result

    def create_vm(self, vm_type: int = 0) -> Vm:
        """KVM_CREATE_VM: a VM of a type that KVM_CAP_VM_TYPES lists; 0, the default, always works.

        OSError: EINVAL for a type that is not offered, ENOMEM, EMFILE.
        """
        return self.create_vm_as(Vm, vm_type)

    def create_vm_as(self, make: Callable[[int, int], _VmT], vm_type: int = 0) -> _VmT:
        """As :meth:`create_vm`, for subclasses of :class:`Vm`.

        ``make(fd, vcpu_mmap_size)`` makes the object: the class or a function.  If it raises
        before the object has the descriptor, the descriptor is closed.
        """
        check_range("vm_type", vm_type, 1 << 64)
        while True:
            with SignalsBlocked():
                fd = _ioctl(self._fd, kvm_h.KVM_CREATE_VM, vm_type)
                if fd >= 0:
                    unowned.add(fd)
                    try:
                        return make(fd, self._vcpu_mmap_size)
                    finally:
                        if fd in unowned:  # `make` has raised, before an Fd took it
                            unowned.discard(fd)
                            os.close(fd)
                if last_errno() != _errno.EINTR or self._fd < 0:
                    raise self._error(kvm_h.KVM_CREATE_VM, vm_type)

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID: the CPUID leaves that KVM can give a guest here."""
        from .cpuid import read_cpuid_growing

        return read_cpuid_growing(self, kvm_h.KVM_GET_SUPPORTED_CPUID)

    def get_emulated_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_EMULATED_CPUID: leaves whose features KVM emulates, slower than the hardware."""
        from .cpuid import read_cpuid_growing

        return read_cpuid_growing(self, kvm_h.KVM_GET_EMULATED_CPUID)

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the model specific registers of a guest's state."""
        return self._msr_list(kvm_h.KVM_GET_MSR_INDEX_LIST)

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: the model specific registers of the host's features."""
        return self._msr_list(kvm_h.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def _msr_list(self, request: int) -> list[int]:
        count = 0
        while True:
            msrs = _ffi.new("struct kvm_msr_list *", {"nmsrs": count, "indices": count})
            errno = self.ioctl_errno(request, msrs)
            if not errno:
                return list(msrs.indices[0 : msrs.nmsrs])
            if errno != _errno.E2BIG or msrs.nmsrs <= count:
                raise os_error(errno, f"{REQUEST_NAMES[request]}(nmsrs={count})")
            count = msrs.nmsrs


def _hint(errno: int | None) -> str:
    if errno in (_errno.EACCES, _errno.EPERM):
        return " (this user needs read and write access to it, often by the group kvm)"
    if errno in (_errno.ENOENT, _errno.ENXIO, _errno.ENODEV):
        return " (load KVM: modprobe kvm_amd or kvm_intel; in a VM: enable nesting)"
    return ""
