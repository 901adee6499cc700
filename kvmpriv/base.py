"""What a VM and a vCPU have in common: capabilities, counters, and belonging to one process."""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

from .cdefs import kvm as kvm_h
from .errors import ArgumentError, ClosedError
from .fd import REQUEST_NAMES, Fd, new_struct
from .wakeup import SignalsBlocked

if TYPE_CHECKING:
    from .stats import StatsFd

__all__ = ["KvmFd"]

_ffi = kvm_h.ffi
_CAP_ARGUMENTS = 4


class KvmFd(Fd):
    """A VM or a vCPU."""

    def __init__(self, fd: int) -> None:
        self._pid = os.getpid()
        super().__init__(fd)

    def _error(self, request: int, argument: object = 0) -> OSError | ClosedError:
        return self._of_another_process(super()._error(request, argument))

    def _of_another_process(self, error: OSError | ClosedError) -> OSError | ClosedError:
        """Say why KVM returns EIO to a process that has the descriptor by fork."""
        if isinstance(error, OSError) and error.errno == _errno.EIO and os.getpid() != self._pid:
            return OSError(error.errno, f"{error.strerror} (the VM belongs to process {self._pid})")
        return error

    def _set(self, request: int, pointer: str, value: object) -> None:
        """Issue `request` with a struct that the caller gives, which must be of this type."""
        given = _ffi.typeof(value).cname  # by name: the struct may be of another FFI
        if given != pointer:
            name = REQUEST_NAMES[request]
            raise ArgumentError(f"{name} takes a {pointer}, not a {given}")
        self.ioctl(request, value)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP, with up to four arguments of 64 bits.

        OSError (EINVAL) for a capability that can't be enabled, or not with these arguments.
        """
        if len(args) > _CAP_ARGUMENTS:
            raise ArgumentError(f"KVM_ENABLE_CAP takes {_CAP_ARGUMENTS} arguments, not {len(args)}")
        fields = {"cap": cap, "flags": flags, "args": args}
        self.ioctl(kvm_h.KVM_ENABLE_CAP, new_struct("struct kvm_enable_cap *", fields))

    def get_stats_fd(self) -> StatsFd:
        """KVM_GET_STATS_FD: the counters and their descriptions, to be read again and again.

        OSError (ENOTTY) before Linux 5.14.
        """
        from .stats import StatsFd

        with SignalsBlocked():
            return StatsFd(self.ioctl(kvm_h.KVM_GET_STATS_FD))

    def stats(self) -> dict[str, int]:
        """The counters now: name -> value.  Errors as :meth:`get_stats_fd`.

        ``get_stats_fd().descriptors`` has the units.
        """
        with self.get_stats_fd() as stats:
            return stats.read()

    def histograms(self) -> dict[str, list[int]]:
        """The histograms now: name -> how often each bucket was hit.  Errors as `get_stats_fd`."""
        with self.get_stats_fd() as stats:
            return stats.read_histograms()
