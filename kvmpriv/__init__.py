"""Python tools for KVM guest private memory: probe a host, test a kernel, script guests.

This module has what most programs need: the objects of the binding (`Kvm`, `Vm`, `Vcpu`), what a
vCPU exits with (`Exit`), two kinds of guests (`Machine`, `Puppet`), the kernel's numbers (`uapi`),
and their names where they are shown (`ExitReason`, `Cap`).  `private` has the ABIs of private
memory, `guest.linux` boots Linux.

The Python API may change before version 1.0, and CHANGELOG.md lists every change that a program
can notice.  Names that are not in an ``__all__`` or that begin with an underscore may change at
any time.  What the commands print as JSON has a version of its own, and exit statuses stay.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import errors, exits, guest, private, uapi
    from .cdecl import DeclarationError, Declared, declare
    from .cdefs.enums import Cap, InternalError, MemFlag, MpState, SystemEvent, VmType
    from .cpuid import CpuidEntry
    from .errors import ArgumentError, ClosedError
    from .exits import (
        DebugExit,
        Exit,
        ExitReason,
        FailEntryExit,
        HypercallExit,
        InternalErrorExit,
        IoExit,
        MemoryFaultExit,
        MmioExit,
        MsrExit,
        OtherExit,
        SimpleExit,
        SystemEventExit,
        exit_name,
    )
    from .guest import GuestCrash, GuestExit, GuestTimeout, Machine, Puppet
    from .kvm import Kvm
    from .memory import PAGE_SIZE, HostMemory
    from .routing import IrqchipRoute, MsiRoute
    from .slots import Slot
    from .threads import VcpuThread
    from .vcpu import Vcpu
    from .vm import Vm

__all__ = [
    "PAGE_SIZE",
    "ArgumentError",
    "Cap",
    "ClosedError",
    "CpuidEntry",
    "DebugExit",
    "DeclarationError",
    "Declared",
    "Exit",
    "ExitReason",
    "FailEntryExit",
    "GuestCrash",
    "GuestExit",
    "GuestTimeout",
    "HostMemory",
    "HypercallExit",
    "InternalError",
    "InternalErrorExit",
    "IoExit",
    "IrqchipRoute",
    "Kvm",
    "Machine",
    "MemFlag",
    "MemoryFaultExit",
    "MmioExit",
    "MpState",
    "MsiRoute",
    "MsrExit",
    "OtherExit",
    "Puppet",
    "SimpleExit",
    "Slot",
    "SystemEvent",
    "SystemEventExit",
    "Vcpu",
    "VcpuThread",
    "Vm",
    "VmType",
    "declare",
    "errors",
    "exit_name",
    "exits",
    "guest",
    "private",
    "uapi",
]

__version__ = "0.1.0"

#: Everything is loaded when it is first used: name -> module.  So the command line can report that
#: there is not enough memory to load the rest.
_LAZY = {
    "ArgumentError": "errors",
    "ClosedError": "errors",
    "Kvm": "kvm",
    "HostMemory": "memory",
    "PAGE_SIZE": "memory",
    "Slot": "slots",
    "Vcpu": "vcpu",
    "Vm": "vm",
    "DeclarationError": "cdecl",
    "Declared": "cdecl",
    "declare": "cdecl",
    "Cap": "cdefs.enums",
    "InternalError": "cdefs.enums",
    "MemFlag": "cdefs.enums",
    "MpState": "cdefs.enums",
    "SystemEvent": "cdefs.enums",
    "VmType": "cdefs.enums",
    "CpuidEntry": "cpuid",
    "DebugExit": "exits",
    "Exit": "exits",
    "ExitReason": "exits",
    "FailEntryExit": "exits",
    "HypercallExit": "exits",
    "InternalErrorExit": "exits",
    "IoExit": "exits",
    "MemoryFaultExit": "exits",
    "MmioExit": "exits",
    "MsrExit": "exits",
    "OtherExit": "exits",
    "SimpleExit": "exits",
    "SystemEventExit": "exits",
    "exit_name": "exits",
    "GuestCrash": "guest",
    "GuestExit": "guest",
    "GuestTimeout": "guest",
    "Machine": "guest",
    "Puppet": "guest",
    "IrqchipRoute": "routing",
    "MsiRoute": "routing",
    "VcpuThread": "threads",
}
_LAZY_MODULES = ("errors", "exits", "guest", "private", "uapi")

if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _LAZY_MODULES:
            return import_module(f".{name}", __name__)
        if name in _LAZY:
            value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
