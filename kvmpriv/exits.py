"""Exits of a vCPU, decoded from ``kvm_run``.

:data:`Exit` is the union of the tuples below, so that a type checker follows a ``match``::

    match vcpu.exit():
        case IoExit(port=0x3F8, is_write=True, data=data): ...
        case MemoryFaultExit(gpa=gpa, private=private): ...
        case SimpleExit(reason=ExitReason.HLT): ...

Every tuple begins with ``reason``, an :class:`ExitReason`, which is an int; a number that kvmpriv
does not know is shown as ``exit 77``.  ``str`` of a tuple is one line for a log.  What KVM puts
into ``kvm_run`` is described in the kernel's Documentation/virt/kvm/api.rst, section 5.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

from .cdefs import kvm as kvm_h
from .cdefs.exit_reason import ExitReason
from .faults import FAULT_LAYOUTS, FaultLayout, layout_of

if TYPE_CHECKING:
    from .cdefs.enums import InternalError, SystemEvent
    from .cdefs.guest_memfd_structs import kvm_run_memory_fault
    from .cdefs.kvm_structs import kvm_run

__all__ = [
    "DebugExit",
    "Exit",
    "ExitReason",
    "FailEntryExit",
    "HypercallExit",
    "InternalErrorExit",
    "IoExit",
    "MemoryFaultExit",
    "MmioExit",
    "MsrExit",
    "OtherExit",
    "SimpleExit",
    "SystemEventExit",
    "decode",
    "exit_name",
]

_ffi = kvm_h.ffi


@lru_cache(256)
def _name(reason: int) -> str:
    return str(ExitReason(reason))


def exit_name(reason: int) -> str:
    """The name of an exit reason: ``KVM_EXIT_IO`` for 2, ``exit 77`` for an unknown number."""
    if reason in FAULT_LAYOUTS:
        return "KVM_EXIT_MEMORY_FAULT"
    return _name(reason)


def _documented(tuple_: type[tuple[object, ...]], **fields: str) -> None:
    """Give the fields of a named tuple their docstrings, which a class body can't."""
    for name, doc in fields.items():
        getattr(tuple_, name).__doc__ = doc


_REASON = "Why KVM_RUN returned: an ExitReason, which is an int."


class SimpleExit(NamedTuple):
    """An exit with nothing but its reason: HLT, SHUTDOWN, INTR, IRQ_WINDOW_OPEN and others."""

    reason: ExitReason

    def __str__(self) -> str:
        return exit_name(self.reason)


_documented(SimpleExit, reason=_REASON)


class OtherExit(NamedTuple):
    """An exit that kvmpriv does not decode, with the bytes that KVM gave."""

    reason: ExitReason
    data: bytes

    def __str__(self) -> str:
        return f"{exit_name(self.reason)}: {self.data.rstrip(bytes(1)).hex(' ', 8) or 'all 0'}"


_documented(OtherExit, reason=_REASON, data="The 256 bytes of kvm_run's union, not decoded.")


class IoExit(NamedTuple):
    """KVM_EXIT_IO: the guest executed IN, OUT, INS or OUTS.

    :meth:`kvmpriv.Vcpu.reply` answers a read; KVM completes it in the next KVM_RUN.
    """

    reason: ExitReason
    is_write: bool
    port: int
    size: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    data: bytes

    def __str__(self) -> str:
        what = f"out {self.data.hex()}" if self.is_write else f"in {self.size * self.count} bytes"
        return f"{exit_name(self.reason)}: {what}, port {self.port:#x}"


_documented(
    IoExit,
    reason=_REASON,
    is_write="True for OUT and OUTS, False for IN and INS.",
    port="The port, 0 to 0xffff.",
    size="Bytes of one item: 1, 2 or 4.",
    count="The number of items; more than 1 only for INS and OUTS with REP.",
    data="What the guest wrote, size * count bytes; empty for a read.",
)


class MmioExit(NamedTuple):
    """KVM_EXIT_MMIO: the guest accessed a guest physical address where no slot is.

    A write to a slot with KVM_MEM_READONLY also exits so.  :meth:`kvmpriv.Vcpu.reply` answers a
    read; KVM completes it in the next KVM_RUN.
    """

    reason: ExitReason
    is_write: bool
    phys_addr: int
    size: int
    data: bytes

    def __str__(self) -> str:
        what = f"write {self.data.hex()} to" if self.is_write else f"read {self.size} bytes at"
        return f"{exit_name(self.reason)}: {what} {self.phys_addr:#x}"


_documented(
    MmioExit,
    reason=_REASON,
    is_write="True for a write, False for a read.",
    phys_addr="The guest physical address, in bytes.",
    size="Bytes of the access: 1 to 8.",
    data="What the guest wrote, size bytes; empty for a read.",
)


class HypercallExit(NamedTuple):
    """KVM_EXIT_HYPERCALL: a hypercall that KVM leaves to user space.

    The caller sets ``vcpu.kvm_run.hypercall.ret``, which the guest gets in rax.
    """

    reason: ExitReason
    nr: int
    args: tuple[int, ...]
    longmode: bool

    def __str__(self) -> str:
        shown = ", ".join(f"{value:#x}" for value in self.args)
        return f"{exit_name(self.reason)}: nr {self.nr} ({shown})"


_documented(
    HypercallExit,
    reason=_REASON,
    nr="The hypercall's number, KVM_HC_*: what the guest had in rax.",
    args="Its six arguments: rbx, rcx, rdx, rsi, and two that are 0.",
    longmode="True if the guest was in 64-bit mode.",
)


class MemoryFaultExit(NamedTuple):
    """KVM_EXIT_MEMORY_FAULT: the guest accessed private memory as shared, or the other way round.

    The VM's private-memory ABI says what the exit looks like and what KVM_RUN returns for it.
    """

    reason: ExitReason
    gpa: int
    size: int
    private: bool
    flags: int
    errno: int
    abi: str

    def __str__(self) -> str:
        how = "private" if self.private else "shared"
        return (
            f"KVM_EXIT_MEMORY_FAULT ({self.abi}): the guest accessed {self.gpa:#x}"
            f"…{self.gpa + self.size:#x} as {how} memory, flags {self.flags:#x}"
        )


_documented(
    MemoryFaultExit,
    reason=_REASON,
    gpa="Where the faulting range begins: a guest physical address, in bytes.",
    size="The length of the faulting range, in bytes.",
    private="True if the guest accessed the range as private memory.",
    flags="KVM's flags, in the ABI's own values.",
    errno="What KVM_RUN failed with (EFAULT, EHWPOISON), or 0 where it returned 0 (v9).",
    abi="The name of the ABI whose layout was read.",
)


class FailEntryExit(NamedTuple):
    """KVM_EXIT_FAIL_ENTRY: the CPU refused to enter the guest."""

    reason: ExitReason
    hardware_entry_failure_reason: int
    cpu: int

    def __str__(self) -> str:
        return (
            f"{exit_name(self.reason)}: hardware reason {self.hardware_entry_failure_reason:#x}"
            f" on cpu {self.cpu}"
        )


_documented(
    FailEntryExit,
    reason=_REASON,
    hardware_entry_failure_reason="The CPU's own code; Intel's and AMD's manuals list theirs.",
    cpu="The host CPU on which it happened.",
)


class InternalErrorExit(NamedTuple):
    """KVM_EXIT_INTERNAL_ERROR: KVM could not go on, for example with an instruction to emulate."""

    reason: ExitReason
    suberror: InternalError
    data: tuple[int, ...]
    instruction: bytes

    def __str__(self) -> str:
        name = str(self.suberror).removeprefix("KVM_INTERNAL_ERROR_")
        text = f"{exit_name(self.reason)}: {name}"
        if self.instruction:
            return f"{text}, instruction {self.instruction.hex(' ')}"
        return f"{text}, data {' '.join(map(hex, self.data)) or 'none'}"


_documented(
    InternalErrorExit,
    reason=_REASON,
    suberror="What went wrong: an InternalError, which is an int.",
    data="Up to 16 words; their meaning depends on suberror.",
    instruction="The bytes that KVM could not emulate; empty unless KVM reported them.",
)


class SystemEventExit(NamedTuple):
    """KVM_EXIT_SYSTEM_EVENT: the guest asked for a shutdown or a reset, or it crashed."""

    reason: ExitReason
    type: SystemEvent
    data: tuple[int, ...]

    def __str__(self) -> str:
        event = str(self.type).removeprefix("KVM_SYSTEM_EVENT_")
        return f"{exit_name(self.reason)}: {event}"


_documented(
    SystemEventExit,
    reason=_REASON,
    type="Which event: a SystemEvent, which is an int.",
    data="Up to 16 words; their meaning depends on type.",
)


class MsrExit(NamedTuple):
    """KVM_EXIT_X86_RDMSR or KVM_EXIT_X86_WRMSR: user space handles a model specific register.

    The caller answers in ``vcpu.kvm_run.msr``: ``data`` for a read, ``error`` 1 for a #GP.
    """

    reason: ExitReason
    index: int  # type: ignore[assignment]  # hides tuple.index
    data: int
    why: int

    def __str__(self) -> str:
        return f"{exit_name(self.reason)}: msr {self.index:#x}, data {self.data:#x}"


_documented(
    MsrExit,
    reason=_REASON,
    index="The register's number.",
    data="What a WRMSR wrote, 64 bits.",
    why="Why KVM did not handle it: KVM_MSR_EXIT_REASON_*, kvm_run.msr.reason.",
)


class DebugExit(NamedTuple):
    """KVM_EXIT_DEBUG: a breakpoint or a single step that set_guest_debug asked for."""

    reason: ExitReason
    exception: int
    pc: int
    dr6: int
    dr7: int

    def __str__(self) -> str:
        return f"{exit_name(self.reason)}: exception {self.exception} at {self.pc:#x}"


_documented(
    DebugExit,
    reason=_REASON,
    exception="The exception's vector: 1 is #DB, 3 is #BP.",
    pc="The linear address of the instruction: cs.base + rip.",
    dr6="The guest's DR6: which debug condition was met.",
    dr7="The guest's DR7.",
)

#: Any exit.  ``isinstance(value, Exit)`` works, too.
Exit: TypeAlias = (
    SimpleExit
    | IoExit
    | MmioExit
    | HypercallExit
    | MemoryFaultExit
    | FailEntryExit
    | InternalErrorExit
    | SystemEventExit
    | MsrExit
    | DebugExit
    | OtherExit
)

_SIMPLE = frozenset(
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


#: Exit reason -> its member: calling the enum takes ten times as long.
_REASONS = {int(reason): reason for reason in ExitReason}


def decode(run: kvm_run, errno: int = 0, fault_layout: FaultLayout | None = None) -> Exit:
    """The exit that `run`, a ``struct kvm_run *``, describes.

    `errno` is what KVM_RUN failed with, or 0 if it succeeded.  `fault_layout` is the VM's own
    layout of a memory fault, if a private-memory ABI made the VM.
    """
    number = run.exit_reason
    reason = _REASONS.get(number) or ExitReason(number)
    if number in _SIMPLE:
        return SimpleExit(reason)
    if number == kvm_h.KVM_EXIT_IO:
        io = run.io
        is_write = io.direction == kvm_h.KVM_EXIT_IO_OUT
        data = b""
        if is_write:
            start = _ffi.cast("char *", run) + io.data_offset
            data = _ffi.buffer(start, io.size * io.count)[:]
        return IoExit(reason, is_write, io.port, io.size, io.count, data)
    if number == kvm_h.KVM_EXIT_MMIO:
        mmio = run.mmio
        size = min(mmio.len, 8)
        data = bytes(mmio.data[0:size]) if mmio.is_write else b""
        return MmioExit(reason, bool(mmio.is_write), mmio.phys_addr, mmio.len, data)
    if number == kvm_h.KVM_EXIT_HYPERCALL:
        call = run.hypercall
        return HypercallExit(reason, call.nr, tuple(call.args), bool(call.longmode & 1))
    layout = layout_of(number, fault_layout)
    if layout is not None:
        return _decode_memory_fault(reason, run, layout, errno)
    if number == kvm_h.KVM_EXIT_FAIL_ENTRY:
        entry = run.fail_entry
        return FailEntryExit(reason, entry.hardware_entry_failure_reason, entry.cpu)
    if number == kvm_h.KVM_EXIT_INTERNAL_ERROR:
        return _decode_internal_error(reason, run)
    if number == kvm_h.KVM_EXIT_SYSTEM_EVENT:
        from .cdefs.enums import SystemEvent

        event = run.system_event
        words = tuple(event.data)[: min(event.ndata, 16)]
        return SystemEventExit(reason, SystemEvent(event.type), words)
    if number in (kvm_h.KVM_EXIT_X86_RDMSR, kvm_h.KVM_EXIT_X86_WRMSR):
        return MsrExit(reason, run.msr.index, run.msr.data, run.msr.reason)
    if number == kvm_h.KVM_EXIT_DEBUG:
        arch = run.debug.arch
        return DebugExit(reason, arch.exception, arch.pc, arch.dr6, arch.dr7)
    return OtherExit(reason, _ffi.buffer(_ffi.addressof(run.hw), 256)[:])


def _decode_memory_fault(
    reason: ExitReason, run: kvm_run, layout: FaultLayout, errno: int
) -> MemoryFaultExit:
    # The fields have the same names in every ABI, and different offsets.
    fault = cast(
        "kvm_run_memory_fault",
        layout.ffi.cast(f"{layout.struct} *", layout.ffi.addressof(run.hw)),
    )
    return MemoryFaultExit(
        reason,
        gpa=fault.gpa,
        size=fault.size,
        private=bool(fault.flags & layout.private_flag),
        flags=fault.flags,
        errno=errno,
        abi=layout.abi,
    )


def _decode_internal_error(reason: ExitReason, run: kvm_run) -> InternalErrorExit:
    from .cdefs.enums import InternalError

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
    words = tuple(error.data)[:ndata]
    return InternalErrorExit(reason, InternalError(error.suberror), words, instruction)
