"""CPUID leaves: struct kvm_cpuid2 and its entries (api.rst, "KVM_GET_SUPPORTED_CPUID")."""

from __future__ import annotations

import errno as _errno
from typing import Any, NamedTuple

from .cdefs import kvm as kvm_h
from .fd import Fd

__all__ = ["CpuidEntry", "read_cpuid", "read_cpuid_growing"]

_ffi = kvm_h.ffi


class CpuidEntry(NamedTuple):
    """One leaf: struct kvm_cpuid_entry2."""

    function: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def read_cpuid(cpuid: Any) -> list[CpuidEntry]:
    """The entries of a ``struct kvm_cpuid2``."""
    return [
        CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
        for e in cpuid.entries[0 : cpuid.nent]
    ]


def read_cpuid_growing(fd: Fd, request: int) -> list[CpuidEntry]:
    """Ask for a CPUID list with room for more and more entries, as KVM can't say how many."""
    room = 64
    while True:
        cpuid = _ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
        errno = fd.ioctl_errno(request, cpuid)
        if not errno:
            return read_cpuid(cpuid)
        if errno != _errno.E2BIG or room > 4096:
            fd.ioctl(request, cpuid)  # raises
        room *= 2
