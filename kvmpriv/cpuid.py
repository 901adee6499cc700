"""CPUID leaves: struct kvm_cpuid2 and its entries (api.rst, "KVM_GET_SUPPORTED_CPUID")."""

from __future__ import annotations

import errno as _errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from .cdefs import kvm as kvm_h
from .fd import Fd, new_struct

if TYPE_CHECKING:
    from .cdefs.cffi_types import Cdata
    from .cdefs.kvm_structs import kvm_cpuid2

__all__ = ["CpuidEntry", "read_cpuid", "read_cpuid_growing", "write_cpuid"]

_ffi = kvm_h.ffi


class CpuidEntry(NamedTuple):
    """One leaf: struct kvm_cpuid_entry2.

    EAX, EBX, ECX and EDX are returned when CPUID is called with `function` in EAX and, if `flags`
    has KVM_CPUID_FLAG_SIGNIFCANT_INDEX, with `index` in ECX.
    """

    function: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def read_cpuid(cpuid: kvm_cpuid2) -> list[CpuidEntry]:
    """The entries of a ``struct kvm_cpuid2``."""
    return [
        CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
        for e in cpuid.entries[0 : cpuid.nent]
    ]


def write_cpuid(entries: Iterable[CpuidEntry]) -> Cdata:
    """A ``struct kvm_cpuid2 *`` with these entries; ArgumentError for one that does not fit."""
    wanted = [entry._asdict() for entry in entries]
    return new_struct("struct kvm_cpuid2 *", {"nent": len(wanted), "entries": wanted})


def read_cpuid_growing(fd: Fd, request: int) -> list[CpuidEntry]:
    """The entries that `request` returns.  KVM does not say how many: the room is doubled."""
    room = 64
    while True:
        cpuid = _ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
        errno = fd.ioctl_errno(request, cpuid)
        if not errno:
            return read_cpuid(cpuid)
        if errno != _errno.E2BIG or room > 4096:
            fd.ioctl(request, cpuid)  # raises
        room *= 2
