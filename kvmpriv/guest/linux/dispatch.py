"""What a guest's exits ask for, served in its vCPUs' threads."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from ...cdefs import kvm as kvm_h
from ...errors import ClosedError
from ...exits import Exit, HypercallExit, MemoryFaultExit, exit_name
from ...memory import PAGE_SIZE
from ...private import PrivateVm, serve_conversion
from ...threads import VcpuThread
from .. import crash
from .bus import Bus
from .outcome import Ending, Outcome, crashed
from .pause import Gate

if TYPE_CHECKING:
    from ...memory import HostMemory
    from ...vcpu import Vcpu
    from ...vm import Vm

__all__ = ["Dispatcher", "GuestThread", "Record"]

# The exits' part of struct kvm_run, read in one go: every exit comes by here.  A test compares the
# three with the layout of cdefs/kvm.h.
_UNION = 32
_IO = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset
_MMIO = struct.Struct("<Q8sIB")  # phys_addr, data, len, is_write
_MMIO_DATA = _UNION + 8

_SVM_EXIT_CPUID = 0x72  # <asm/svm.h>
_CPUID_SIZE = 2  # bytes of the instruction: 0f a2

_int = int.from_bytes


class Record(Protocol):
    """Writes one event of a recording, as `kvmpriv.trace.Recorder.event` does."""

    def __call__(self, **fields: object) -> None: ...


class GuestThread(VcpuThread[Outcome]):
    """A vCPU's thread, which calls `ended` as its last action.

    With `cpu` it runs on that CPU of the host only.  While `gate` is closed, a kick makes it wait.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        handler: Callable[[Vcpu, int], Outcome | None],
        ended: Callable[[], object],
        cpu: int | None,
        gate: Gate,
    ) -> None:
        super().__init__(vcpu, handler)
        self._gate = gate
        self._ended = ended
        self._cpu = cpu
        #: CPU time that the thread has used in all, in seconds; 0 until it has ended.
        self.seconds: float = 0.0
        #: Whether `ended` was called or is about to be; is_alive() becomes false only later.
        self.over: bool = False

    def run(self) -> None:
        try:
            if self._cpu is not None:
                os.sched_setaffinity(0, {self._cpu})  # 0: this thread
            self._gate.enter()
        except OSError as error:  # a cpuset took the CPU away; result() raises it
            self._error = error
        else:
            super().run()
        del self._handler  # it has a view of kvm_run, which keeps the vCPU's descriptor open
        self.seconds = time.thread_time()
        self.over = True
        self._ended()

    def _interrupted(self) -> None:
        self._gate.enter()

    def kick(self) -> None:
        """Let the thread see that the gate is closed."""
        with suppress(ClosedError):
            self._vcpu.kick()

    def stop_soon(self) -> None:
        """Let the thread end when its vCPU stops next: a gate that opens does not let it run."""
        self._stopping = True


class Dispatcher:
    """Serves the exits of all vCPUs of a guest.

    Accesses to `ports` and `mmio` go to the devices there; conversions are made if `vm` is a
    PrivateVm; every other exit ends the guest as a crash, whose report quotes code from
    `low_memory` (the memory at guest physical address 0).
    """

    def __init__(
        self,
        vm: Vm,
        ending: Ending,
        ports: Bus,
        mmio: Bus,
        *,
        low_memory: HostMemory,
        reset: Callable[[], object],
    ) -> None:
        self._vm = vm
        self._ending = ending
        self._ports = ports
        self._mmio = mmio
        self._low_memory = low_memory
        self._reset = reset

    def handler(
        self,
        vcpu: Vcpu,
        kvm_run_size: int,
        exits: MutableMapping[int, int],
        record: Record | None,
    ) -> Callable[[Vcpu, int], Outcome | None]:
        """The handler for the thread of `vcpu`: it returns the outcome once there is one.

        It counts in `exits`, by reason, which begins with 0 for each, and reports exits and
        conversions to `record`.
        """
        number = vcpu.vcpu_id
        raw = memoryview(kvm_h.ffi.buffer(vcpu.kvm_run, kvm_run_size)).cast("B")
        io_of, mmio_of = _IO.unpack_from, _MMIO.unpack_from
        read_port, write_port = self._ports.read, self._ports.write
        read_mmio, write_mmio = self._mmio.read, self._mmio.write
        ending = self._ending

        def serve(vcpu: Vcpu, reason: int) -> Outcome | None:
            exits[reason] += 1
            if reason == kvm_h.KVM_EXIT_IO:
                direction, size, port, count, at = io_of(raw, _UNION)
                if direction and size == count == 1:  # most exits: a byte written to the console
                    write_port(port, 1, raw[at])
                    return ending.outcome
                for _ in range(count):
                    if direction:
                        write_port(port, size, _int(raw[at : at + size], "little"))
                    else:
                        value = read_port(port, size) & (1 << 8 * size) - 1
                        raw[at : at + size] = value.to_bytes(size, "little")
                    at += size
            elif reason == kvm_h.KVM_EXIT_MMIO:
                address, data, size, is_write = mmio_of(raw, _UNION)
                if is_write:
                    write_mmio(address, size, _int(data[:size], "little"))
                else:
                    value = read_mmio(address, size) & (1 << 8 * size) - 1
                    raw[_MMIO_DATA : _MMIO_DATA + size] = value.to_bytes(size, "little")
            else:
                self._other_exit(vcpu, reason, record)
            return ending.outcome

        if record is None:
            return serve

        def recorded(vcpu: Vcpu, reason: int) -> Outcome | None:
            where: dict[str, int | bool] = {}
            if reason == kvm_h.KVM_EXIT_IO:
                direction, _, port, *_ = io_of(raw, _UNION)
                where = {"port": port, "write": bool(direction)}
            elif reason == kvm_h.KVM_EXIT_MMIO:
                address, *_, is_write = mmio_of(raw, _UNION)
                where = {"gpa": address, "write": bool(is_write)}
            record(cpu=number, exit=exit_name(reason), **where)
            return serve(vcpu, reason)

        return recorded

    def _other_exit(self, vcpu: Vcpu, reason: int, record: Record | None) -> None:
        """Serve a conversion or a system event; every other exit but a false one is a crash."""
        if reason == kvm_h.KVM_EXIT_SYSTEM_EVENT and vcpu.kvm_run.system_event.type in (
            kvm_h.KVM_SYSTEM_EVENT_SHUTDOWN,
            kvm_h.KVM_SYSTEM_EVENT_RESET,
        ):
            self._reset()
            return
        if reason == kvm_h.KVM_EXIT_INTERNAL_ERROR and (
            _is_false_delivery(vcpu) or _finish_cpuid(vcpu)
        ):
            return
        exit_ = vcpu.exit()
        if isinstance(self._vm, PrivateVm) and serve_conversion(self._vm, vcpu, exit_):
            if record is not None:
                self._record_conversion(vcpu, exit_, record)
            return
        why = crash.describe_exit(exit_)
        if reason != kvm_h.KVM_EXIT_FAIL_ENTRY:  # after which the registers mean nothing
            why = crash.report(vcpu, self._low_memory, why)
        self._ending.end(crashed(f"vCPU {vcpu.vcpu_id}: {why}"))

    def _record_conversion(self, vcpu: Vcpu, exit_: Exit, record: Record) -> None:
        """Record a conversion that was made.

        A hypercall may have been refused.  A memory fault converts nothing where the guest's
        access follows KVM's own state.
        """
        assert isinstance(self._vm, PrivateVm)
        if isinstance(exit_, HypercallExit):
            if vcpu.kvm_run.hypercall.ret != 0:
                return
            gpa, size = exit_.args[0], exit_.args[1] * PAGE_SIZE
            private, by = bool(exit_.args[2] & kvm_h.KVM_MAP_GPA_RANGE_ENCRYPTED), "hypercall"
        elif not isinstance(exit_, MemoryFaultExit) or self._vm.abi.traits.access_follows_state:
            return
        else:
            gpa, size, private, by = exit_.gpa, exit_.size, exit_.private, "fault"
        kind = "private" if private else "shared"
        record(cpu=vcpu.vcpu_id, convert=kind, gpa=gpa, size=size, by=by)


def _is_false_delivery(vcpu: Vcpu) -> bool:
    """Whether KVM reports an access to device memory while it delivers an event, and has no event.

    The vCPU can run again then: it executes the instruction once more.  Linux 7.3 on AMD
    (svm_check_emulate_instruction) reads the type of the event in EXITINTINFO, and not whether the
    event is valid.  A processor leaves both clear; that which QEMU emulates leaves the type of the
    guest's last exception.
    """
    if vcpu.kvm_run.internal.suberror != kvm_h.KVM_INTERNAL_ERROR_DELIVERY_EV:
        return False
    events = vcpu.get_vcpu_events()
    return not (events.exception.injected or events.interrupt.injected or events.nmi.injected)


def _finish_cpuid(vcpu: Vcpu) -> bool:
    """Go on after a CPUID instruction that KVM has executed and can't skip; whether it was one.

    An AMD processor without NRIPS, such as the one that QEMU emulates, does not report where the
    next instruction is.  KVM then reads the instruction, to learn its size, by the slot's
    userspace_addr (svm_skip_emulated_instruction).  If that is a mapping of the guest_memfd, as in
    conversion in place, KVM can't read a private page.  It has written the result to the registers
    before, and only rip is left.
    """
    internal = vcpu.kvm_run.internal
    if internal.suberror != kvm_h.KVM_INTERNAL_ERROR_EMULATION or internal.ndata < 2:
        return False
    flags, exit_code = internal.data[0], internal.data[1]
    if flags or exit_code != _SVM_EXIT_CPUID:
        return False
    with vcpu.regs() as regs:
        regs.rip += _CPUID_SIZE
    return True
