"""KVM guest private memory, for Python: the binding, the probe, and guests to try it with."""

from . import private
from .cdecl import DeclarationError, Declared, declare
from .exits import exit_name
from .kvm import Kvm
from .memory import HostMemory
from .vcpu import CpuidEntry, Vcpu, VcpuThread
from .vm import Slot, Vm

__all__ = [
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
