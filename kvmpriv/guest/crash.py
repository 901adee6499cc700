"""Reports of a guest's crash: the reason in one line, the registers, and the code at rip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cdefs import kvm as kvm_h
from .x86 import EFER_LMA

if TYPE_CHECKING:
    from ..exits import Exit
    from ..memory import HostMemory
    from ..vcpu import Vcpu
    from .exceptions import GuestException

__all__ = ["GuestCrash", "GuestTimeout", "describe", "describe_exit", "report"]

_EXCEPTIONS = {
    0: "#DE divide error", 1: "#DB debug", 2: "NMI", 3: "#BP breakpoint", 4: "#OF overflow",
    5: "#BR bound range exceeded", 6: "#UD invalid opcode", 7: "#NM no FPU", 8: "#DF double fault",
    10: "#TS invalid TSS", 11: "#NP segment not present", 12: "#SS stack fault",
    13: "#GP general protection", 14: "#PF page fault", 16: "#MF x87 error",
    17: "#AC alignment check", 18: "#MC machine check", 19: "#XM SIMD error",
    20: "#VE virtualization", 21: "#CP control protection",
}  # fmt: skip
_PAGE_FAULT = 14
_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12",
            "r13", "r14", "r15")  # fmt: skip
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")


class GuestCrash(Exception):  # noqa: N818  # the guest's error, not this process's
    """The guest can't go on.

    `why` is the reason in one line; `report` has the registers and the code, too.
    """

    def __init__(self, why: str, report: str) -> None:
        super().__init__(report)
        self.why = why
        self.report = report


class GuestTimeout(GuestCrash):
    """The guest was still running when its time limit was reached."""


def describe(exception: GuestException, vcpu: Vcpu) -> str:
    """The name and the error code of an exception, on one line."""
    name = _EXCEPTIONS.get(exception.vector, "no handler for this interrupt")
    why = f"exception {exception.vector} ({name})"
    if exception.error_code is not None:
        why += f", error code {exception.error_code:#x}"
    if exception.vector == _PAGE_FAULT:
        why += f", address {vcpu.get_sregs().cr2:#x}"
    return why


def describe_exit(exit_: Exit) -> str:
    """An exit that a guest in good order does not cause, on one line."""
    if exit_.reason == kvm_h.KVM_EXIT_SHUTDOWN:
        return "triple fault (KVM_EXIT_SHUTDOWN)"
    if exit_.reason == kvm_h.KVM_EXIT_MMIO:
        return f"an access outside memory: {exit_}"
    return str(exit_)


def report(
    vcpu: Vcpu, memory: HostMemory, why: str, exception: GuestException | None = None, base: int = 0
) -> str:
    """`why`, the registers, and the bytes at rip, on several lines.

    `memory` is the guest's memory at the guest physical address `base`.
    """
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    rip, rsp, rflags, cs = regs.rip, regs.rsp, regs.rflags, sregs.cs.selector
    linear = sregs.cs.base + rip
    if exception is not None:  # not the registers of the handler
        _, _, rip, cs, rflags, rsp = exception
        linear = rip if sregs.efer & EFER_LMA else cs * 16 + rip
    values = [("rip", rip), ("rsp", rsp), ("rflags", rflags), ("cs", cs)]
    values += [(name, getattr(regs, name)) for name in _GENERAL]
    values += [(name, getattr(sregs, name)) for name in _CONTROL]
    lines = [f"{why} at rip {rip:#x}"]
    for first in range(0, len(values), 4):
        row = values[first : first + 4]
        lines.append("  " + "  ".join(f"{name:>6} {value:016x}" for name, value in row))
    lines.append(f"  code at {linear:#x}: {_code(vcpu, memory, linear, base)}")
    return "\n".join(lines)


def _code(vcpu: Vcpu, memory: HostMemory, linear: int, base: int) -> str:
    try:
        address = vcpu.translate(linear)
    except OSError as error:
        return f"KVM_TRANSLATE: {error.strerror}"
    if address is None:
        return "not mapped"
    if not base <= address < base + memory.size:
        return "outside memory"
    offset = address - base
    return memory.read(offset, min(16, memory.size - offset)).hex(" ")
