"""Exits by name, decoded from kvm_run when somebody asks.

The numbers of the shared core are in ``cdefs/kvm.h``; KVM_EXIT_MEMORY_FAULT is read as the
generations of private memory say (:mod:`kvmpriv.faults`).
"""

from typing import Any, NamedTuple

from .cdefs import kvm as kvm_h
from .faults import FAULT_LAYOUTS, FaultLayout, layout_of

__all__ = [
    "DebugExit",
    "Exit",
    "FailEntryExit",
    "HypercallExit",
    "InternalErrorExit",
    "IoExit",
    "MemoryFaultExit",
    "MmioExit",
    "MsrExit",
    "OtherExit",
    "SystemEventExit",
    "decode",
    "exit_name",
]

_ffi = kvm_h.ffi

_NAMES: dict[int, str] = {
    value: name
    for name, value in vars(kvm_h).items()
    if name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_IO_")
}


def exit_name(reason: int) -> str:
    """``KVM_EXIT_IO`` for 2; a number that nobody has named is shown as ``exit 77``."""
    if reason in FAULT_LAYOUTS:
        return "KVM_EXIT_MEMORY_FAULT"
    return _NAMES.get(reason, f"exit {reason}")


class Exit(NamedTuple):
    """An exit that says nothing but its reason: HLT, SHUTDOWN, INTR, IRQ_WINDOW_OPEN…"""

    reason: int

    def __str__(self) -> str:
        return exit_name(self.reason)


class OtherExit(NamedTuple):
    """An exit that kvmpriv does not know: its number and the 256 bytes that came with it."""

    reason: int
    data: bytes

    def __str__(self) -> str:
        return f"{exit_name(self.reason)}: {self.data.rstrip(bytes(1)).hex(' ', 8) or 'all 0'}"


class IoExit(NamedTuple):
    """Port I/O: `count` items of `size` (1, 2, 4) bytes; `data` is what an OUT wrote."""

    reason: int
    is_write: bool
    port: int
    size: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    data: bytes

    def __str__(self) -> str:
        what = f"out {self.data.hex()}" if self.is_write else f"in {self.size * self.count} bytes"
        return f"{exit_name(self.reason)}: {what}, port {self.port:#x}"


class MmioExit(NamedTuple):
    """An access to guest memory without a slot, 1 to 8 bytes; `data` is what a write wrote."""

    reason: int
    is_write: bool
    phys_addr: int
    size: int
    data: bytes

    def __str__(self) -> str:
        what = f"write {self.data.hex()} to" if self.is_write else f"read {self.size} bytes at"
        return f"{exit_name(self.reason)}: {what} {self.phys_addr:#x}"


class HypercallExit(NamedTuple):
    """A hypercall that user space answers by setting ``run.hypercall.ret``."""

    reason: int
    nr: int
    args: tuple[int, ...]
    longmode: bool

    def __str__(self) -> str:
        shown = ", ".join(f"{value:#x}" for value in self.args)
        return f"{exit_name(self.reason)}: nr {self.nr} ({shown})"


class MemoryFaultExit(NamedTuple):
    """The guest's access and the state of the page disagree, in any generation's layout.

    `gpa` and `size` in bytes; `private`: the guest meant its private memory.  `errno` is what
    KVM_RUN failed with, or 0 where it returned 0 (v9).
    """

    reason: int
    gpa: int
    size: int
    private: bool
    flags: int
    errno: int
    abi: str

    def __str__(self) -> str:
        wish = "private" if self.private else "shared"
        return (
            f"KVM_EXIT_MEMORY_FAULT ({self.abi}): guest wants {self.gpa:#x}"
            f"…{self.gpa + self.size:#x} {wish}, flags {self.flags:#x}"
        )


class FailEntryExit(NamedTuple):
    """The hardware would not enter the guest; the reason is the hardware's."""

    reason: int
    hardware_entry_failure_reason: int
    cpu: int

    def __str__(self) -> str:
        return (
            f"{exit_name(self.reason)}: hardware reason {self.hardware_entry_failure_reason:#x}"
            f" on cpu {self.cpu}"
        )


_SUBERRORS = {
    value: name.removeprefix("KVM_INTERNAL_ERROR_")
    for name, value in vars(kvm_h).items()
    if name.startswith("KVM_INTERNAL_ERROR_") and "FLAG" not in name
}


class InternalErrorExit(NamedTuple):
    """KVM gave up.  `instruction`: the bytes it could not emulate, where it tells them."""

    reason: int
    suberror: int
    data: tuple[int, ...]
    instruction: bytes

    def __str__(self) -> str:
        name = _SUBERRORS.get(self.suberror, str(self.suberror))
        text = f"{exit_name(self.reason)}: {name}"
        if self.instruction:
            return f"{text}, instruction {self.instruction.hex(' ')}"
        return f"{text}, data {' '.join(map(hex, self.data)) or 'none'}"


_EVENTS = {
    value: name.removeprefix("KVM_SYSTEM_EVENT_")
    for name, value in vars(kvm_h).items()
    if name.startswith("KVM_SYSTEM_EVENT_")
}


class SystemEventExit(NamedTuple):
    """Shutdown, reset, crash…: `type` is one of ``KVM_SYSTEM_EVENT_*``."""

    reason: int
    type: int
    data: tuple[int, ...]

    def __str__(self) -> str:
        return f"{exit_name(self.reason)}: {_EVENTS.get(self.type, str(self.type))}"


class MsrExit(NamedTuple):
    """A model specific register that user space handles; `data` is what a WRMSR wrote."""

    reason: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    data: int
    why: int

    def __str__(self) -> str:
        return f"{exit_name(self.reason)}: msr {self.index:#x}, data {self.data:#x}"


class DebugExit(NamedTuple):
    """A breakpoint or a single step."""

    reason: int
    exception: int
    pc: int
    dr6: int
    dr7: int

    def __str__(self) -> str:
        return f"{exit_name(self.reason)}: exception {self.exception} at {self.pc:#x}"


def decode_memory_fault(run: Any, layout: FaultLayout, errno: int = 0) -> MemoryFaultExit:
    """Read kvm_run as `layout` says."""
    fault: Any = layout.ffi.cast(f"{layout.struct} *", layout.ffi.addressof(run.hw))
    flags = int(fault.flags)
    return MemoryFaultExit(
        run.exit_reason,
        gpa=fault.gpa,
        size=fault.size,
        private=bool(flags & layout.private_flag),
        flags=flags,
        errno=errno,
        abi=layout.abi,
    )


_PLAIN = frozenset(
    (
        kvm_h.KVM_EXIT_HLT,
        kvm_h.KVM_EXIT_SHUTDOWN,
        kvm_h.KVM_EXIT_INTR,
        kvm_h.KVM_EXIT_IRQ_WINDOW_OPEN,
        kvm_h.KVM_EXIT_NMI,
        kvm_h.KVM_EXIT_SET_TPR,
        kvm_h.KVM_EXIT_DIRTY_RING_FULL,
        kvm_h.KVM_EXIT_AP_RESET_HOLD,
        kvm_h.KVM_EXIT_X86_BUS_LOCK,
    )
)


def decode(run: Any, errno: int = 0, fault_layout: FaultLayout | None = None) -> Any:
    """The exit that kvm_run describes, as one of this module's tuples.

    `run` is a cffi ``struct kvm_run *``; `errno` what KVM_RUN failed with, 0 for success;
    `fault_layout` the VM's own layout of a memory fault, if an ABI made the VM.
    """
    reason = run.exit_reason
    if reason in _PLAIN:
        return Exit(reason)
    if reason == kvm_h.KVM_EXIT_IO:
        io = run.io
        is_write = io.direction == kvm_h.KVM_EXIT_IO_OUT
        data = b""
        if is_write:
            start = _ffi.cast("char *", run) + io.data_offset
            data = _ffi.buffer(start, io.size * io.count)[:]
        return IoExit(reason, is_write, io.port, io.size, io.count, data)
    if reason == kvm_h.KVM_EXIT_MMIO:
        mmio = run.mmio
        size = min(mmio.len, 8)
        data = bytes(mmio.data[0:size]) if mmio.is_write else b""
        return MmioExit(reason, bool(mmio.is_write), mmio.phys_addr, mmio.len, data)
    if reason == kvm_h.KVM_EXIT_HYPERCALL:
        call = run.hypercall
        return HypercallExit(reason, call.nr, tuple(call.args), bool(call.longmode & 1))
    layout = layout_of(reason, fault_layout)
    if layout is not None:
        return decode_memory_fault(run, layout, errno)
    if reason == kvm_h.KVM_EXIT_FAIL_ENTRY:
        entry = run.fail_entry
        return FailEntryExit(reason, entry.hardware_entry_failure_reason, entry.cpu)
    if reason == kvm_h.KVM_EXIT_INTERNAL_ERROR:
        return _decode_internal_error(run)
    if reason == kvm_h.KVM_EXIT_SYSTEM_EVENT:
        event = run.system_event
        return SystemEventExit(reason, event.type, tuple(event.data)[: min(event.ndata, 16)])
    if reason in (kvm_h.KVM_EXIT_X86_RDMSR, kvm_h.KVM_EXIT_X86_WRMSR):
        return MsrExit(reason, run.msr.index, run.msr.data, run.msr.reason)
    if reason == kvm_h.KVM_EXIT_DEBUG:
        arch = run.debug.arch
        return DebugExit(reason, arch.exception, arch.pc, arch.dr6, arch.dr7)
    return OtherExit(reason, _ffi.buffer(_ffi.addressof(run.hw), 256)[:])


def _decode_internal_error(run: Any) -> InternalErrorExit:
    error = run.internal
    ndata = min(error.ndata, 16)
    instruction = b""
    failure = run.emulation_failure
    if (
        error.suberror == kvm_h.KVM_INTERNAL_ERROR_EMULATION
        and ndata >= 3  # flags, and two words that hold the size and the bytes
        and failure.flags & kvm_h.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    ):
        instruction = bytes(failure.insn_bytes[0 : min(failure.insn_size, 15)])
    return InternalErrorExit(
        run.exit_reason, error.suberror, tuple(error.data)[:ndata], instruction
    )
