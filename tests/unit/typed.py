"""What a type checker must know of kvmpriv.  test_exits runs mypy and pyright over this file.

It is never executed.  A ``type: ignore`` here stands for a mistake that a checker must find:
one that it does not need is reported.
"""

from __future__ import annotations

from typing_extensions import assert_never, assert_type

from kvmpriv import Vcpu, exits, uapi
from kvmpriv.cdefs.exit_reason import ExitReason
from kvmpriv.cdefs.guest_memfd_structs import kvm_create_guest_memfd
from kvmpriv.cdefs.kvm_structs import kvm_regs, kvm_segment
from kvmpriv.exits import Exit, IoExit, MemoryFaultExit, MmioExit, SimpleExit


def registers(vcpu: Vcpu) -> None:
    regs = vcpu.get_regs()
    assert_type(regs, kvm_regs)
    regs.rip = 0x1000
    regs.ripp = 0x1000  # type: ignore[attr-defined]
    sregs = vcpu.get_sregs()
    assert_type(sregs.cs, kvm_segment)
    sregs.interrupt_bitmap[0] = 1
    vcpu.set_sregs(sregs)
    vcpu.set_regs(sregs)  # type: ignore[arg-type]
    with vcpu.regs() as regs:
        regs.rax = 1
    assert_type(vcpu.kvm_run.io.port, int)


def run(vcpu: Vcpu) -> bytes:
    assert_type(vcpu.run(), int)
    assert_type(vcpu.exit(), Exit)
    match vcpu.exit():
        case IoExit(port=0x3F8, is_write=True, data=data):
            assert_type(data, bytes)
            return data
        case IoExit(size=size) | MmioExit(size=size):
            assert_type(size, int)
            return bytes(size)
        case MemoryFaultExit(private=private):
            assert_type(private, bool)
        case SimpleExit(reason=reason):
            assert_type(reason, ExitReason)
        case exits.OtherExit() as other:
            return other.data
        case exits.MsrExit() | exits.DebugExit() | exits.HypercallExit():
            pass
        case exits.SystemEventExit() | exits.InternalErrorExit() | exits.FailEntryExit():
            pass
        case never:
            assert_never(never)
    return b""


def mistaken(found: Exit) -> None:
    if isinstance(found, MemoryFaultExit):
        print(found.gpaa)  # type: ignore[attr-defined]


def numbers() -> None:
    assert_type(uapi.kvm.KVM_RUN, int)
    print(uapi.kvm.KVM_RUNN)  # type: ignore[attr-defined]
    assert_type(uapi.kvm.ffi.new("struct kvm_regs *"), kvm_regs)
    assert_type(uapi.guest_memfd.ffi.new("struct kvm_create_guest_memfd *"), kvm_create_guest_memfd)
