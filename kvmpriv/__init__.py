"""KVM guest private memory, for Python: the binding, the probe, and guests to try it with."""

from typing import TYPE_CHECKING, Any

from . import private
from .cpuid import CpuidEntry
from .errors import ArgumentError, ClosedError
from .kvm import Kvm
from .memory import HostMemory
from .slots import Slot
from .threads import VcpuThread
from .vcpu import Vcpu
from .vm import Vm

if TYPE_CHECKING:
    from .cdecl import DeclarationError, Declared, declare
    from .exits import exit_name

__all__ = [
    "ArgumentError",
    "ClosedError",
    "CpuidEntry",
    "DeclarationError",
    "Declared",
    "HostMemory",
    "Kvm",
    "Slot",
    "Vcpu",
    "VcpuThread",
    "Vm",
    "declare",
    "exit_name",
    "private",
]

__version__ = "0.1.0"


#: What not every program needs is loaded when it is asked for: name -> module.
_LATER = {
    "DeclarationError": "cdecl",
    "Declared": "cdecl",
    "declare": "cdecl",
    "exit_name": "exits",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)
