"""A virtual CPU: registers, KVM_RUN, and being called back from it."""

from __future__ import annotations

import errno as _errno
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fcntl import ioctl as _enter
from typing import TYPE_CHECKING, NoReturn, cast

from . import wakeup
from .base import KvmFd
from .cdefs import kvm as kvm_h
from .cdefs.kvm import KVM_EXIT_INTR, KVM_RUN
from .errors import ArgumentError, ClosedError
from .faults import layout_of
from .fd import check_range, new_struct
from .libc import ioctl as _ioctl
from .libc import last_errno, os_error, tgkill
from .wakeup import SignalsBlocked

if TYPE_CHECKING:
    from .cdefs.kvm_structs import (
        kvm_debugregs,
        kvm_fpu,
        kvm_lapic_state,
        kvm_msrs,
        kvm_regs,
        kvm_run,
        kvm_sregs,
        kvm_vcpu_events,
        kvm_xcrs,
    )
    from .cpuid import CpuidEntry
    from .exits import Exit
    from .slots import Lifeline

__all__ = ["Vcpu"]

_ffi = kvm_h.ffi

_MMIO_DATA = _ffi.offsetof("struct kvm_run", "mmio", "data")
_RFLAGS_FIXED = 2  # bit 1 is always set

# After a world switch every cache line counts: without a third argument fcntl.ioctl issues
# KVM_RUN at a sixth of ctypes' cost.  From Python 3.14 on it hides EINTR and calls again, and so
# would never come back from a kick.
_FCNTL_SHOWS_EINTR = sys.version_info < (3, 14)


class _Here(threading.local):
    """What tells threads apart: get_ident's numbers are used again for the next thread."""

    def __init__(self) -> None:
        self.me = object()


_here = _Here()


class _ClosedKvmRun:
    """Takes the place of struct kvm_run once the vCPU is closed: every use raises ClosedError.

    A __getattr__ of Vcpu would do the same, and make each attribute that run() reads slower.
    """

    def __getattr__(self, name: str) -> NoReturn:
        raise ClosedError("vCPU is closed")

    def __setattr__(self, name: str, value: object) -> None:
        raise ClosedError("vCPU is closed")


class Vcpu(KvmFd):
    """A vCPU; made by :meth:`Vm.create_vcpu`.

    One thread at a time may run it; any thread may `kick` it.  The methods named after an ioctl
    are that ioctl (Documentation/virt/kvm/api.rst), and raise OSError with the errno that it fails
    with.  ArgumentError is raised for a value that does not fit its field, ClosedError after
    close, RuntimeError while another thread runs the vCPU.

    `kvm_run` is the ``struct kvm_run *`` that the kernel shares with this process, read and written
    in place.  A part of it (``kvm_run.io``) does not keep it alive: get it anew after each run, and
    never after close.
    """

    _what = "vCPU"

    #: ``struct kvm_run *``, shared with the kernel
    kvm_run: kvm_run

    def __init__(
        self,
        fd: int,
        mmap_size: int,
        lifeline: Lifeline,
        vcpu_id: int,
    ) -> None:
        self.vcpu_id = vcpu_id
        self._fault_layout = lifeline.fault_layout
        #: The thread that is in KVM_RUN or about to be; at most one entry.
        self._runner: dict[str, object] = {}
        self._prepared: object = None  # the thread that has run it last …
        self._tid = 0  # … and its number in the kernel
        self._errno = 0  # what KVM_RUN failed with, when that is an exit
        # Re-entrant: a signal handler may kick while kick is under way.
        self._kick_lock = threading.RLock()
        self._lifeline: Lifeline | None = None
        super().__init__(fd)
        try:
            self._mmap = mmap.mmap(fd, mmap_size)
            self.kvm_run = cast(
                "kvm_run",
                _ffi.from_buffer("struct kvm_run *", self._mmap, require_writable=True),
            )
        except BaseException:
            super().close()
            raise
        self._lifeline = lifeline
        lifeline.join()

    # -- running -------------------------------------------------------------------------------

    def run(self) -> int:
        """KVM_RUN: enter the guest until the next exit; returns the exit reason.

        The reason is a plain int, one of ``KVM_EXIT_*`` or a number that kvmpriv does not know;
        :meth:`exit` decodes it, :attr:`kvm_run` has it in place.  KVM_EXIT_INTR means that a signal
        or a kick ended the call: Python's signal handlers have run by then.  A memory fault is an
        exit, also where KVM_RUN fails with EFAULT to report it (guest_memfd).

        A signal handler that interrupts this call may run the vCPU itself; afterwards this call
        enters the guest again, and a kick that the handler's run has answered is answered.

        Raises OSError with KVM_RUN's errno, RuntimeError when another thread runs this vCPU,
        ClosedError after close.
        """
        me = _here.me
        runner = self._runner
        # A signal handler may have interrupted this thread's run and call it anew: the mark stays
        # the outer call's.
        nested = runner.get("thread") is me if runner else False
        try:
            # One call, hence atomic; and what it did can be seen below, whatever came between.
            if runner.setdefault("thread", me) is not me:
                runner = {}  # the mark is not ours to clear
                raise self._busy_error()
            if self._prepared is not me or self._errno:
                self._prepare(me)
            if _FCNTL_SHOWS_EINTR:
                _enter(self._fd, KVM_RUN)
            elif _ioctl(self._fd, KVM_RUN, 0) != 0:
                return self._no_ordinary_exit(last_errno())
            return self.kvm_run.exit_reason
        except (OSError, ValueError) as error:
            # Signal handlers run in _enter: what they raise has their frames, and is not KVM's.
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise
            return self._no_ordinary_exit(getattr(error, "errno", _errno.EBADF))
        finally:
            # No call here, after which a signal handler might come.
            if runner and not nested and runner["thread"] is me:
                del runner["thread"]

    def _prepare(self, me: object) -> None:
        self.fileno()
        if self._errno:
            # KVM leaves exit_reason alone when KVM_RUN fails: an old one must not be seen twice.
            self._errno = 0
            self.kvm_run.exit_reason = kvm_h.KVM_EXIT_UNKNOWN
        if self._prepared is not me:
            wakeup.prepare_thread()
            if wakeup.in_main_thread():
                wakeup.watch(self)
            self._tid = threading.get_native_id()
            self._prepared = me

    def _no_ordinary_exit(self, errno: int) -> int:
        if errno == _errno.EBADF and self._fd < 0:
            raise self._closed_error() from None
        run = self.kvm_run
        if errno in (_errno.EINTR, _errno.EAGAIN):
            # Cleared only where the interruption is reported: a kick is never swallowed.
            run.immediate_exit = 0
            run.exit_reason = KVM_EXIT_INTR
            return KVM_EXIT_INTR
        reason = run.exit_reason
        layout = layout_of(reason, self._fault_layout)
        if layout is not None and errno in layout.errnos:
            self._errno = errno
            return reason
        raise self._of_another_process(os_error(errno, "KVM_RUN")) from None

    def exit(self) -> Exit:
        """The last exit, decoded: one of the tuples of :mod:`kvmpriv.exits`."""
        from .exits import decode

        self.fileno()
        return decode(self.kvm_run, self._errno, self._fault_layout)

    def reply(self, data: bytes | bytearray | memoryview) -> None:
        """Answer the last exit: what the guest reads when :meth:`run` is called next.

        The exit is an IN (`data` is its `size` times `count` bytes) or an MMIO read (`size` bytes).
        Bytes are in the order of memory: the value's lowest first.  ArgumentError for another exit
        or another length.

            match vcpu.exit():
                case IoExit(is_write=False, port=0x3FD):
                    vcpu.reply(bytes((status,)))
        """
        self._check_idle()
        data = bytes(memoryview(data))  # bytes(1) would be one byte of 0
        run = self.kvm_run
        reason = run.exit_reason
        if reason == kvm_h.KVM_EXIT_IO and run.io.direction == kvm_h.KVM_EXIT_IO_IN:
            start, size = run.io.data_offset, run.io.size * run.io.count
        elif reason == kvm_h.KVM_EXIT_MMIO and not run.mmio.is_write:
            start, size = _MMIO_DATA, run.mmio.len
        else:
            raise ArgumentError(f"the last exit does not read: {self.exit()}")
        if len(data) != size:
            raise ArgumentError(f"the guest reads {size} bytes, not {len(data)}: {self.exit()}")
        self._mmap[start : start + size] = data

    def kick(self) -> None:
        """Make the current :meth:`run` return KVM_EXIT_INTR, or the next one if there is none.

        May be called from any thread and from signal handlers.  Kicks that come before the vCPU is
        seen to stop count as one.  ClosedError after close, RuntimeError in a process that has the
        vCPU by fork.
        """
        with self._kick_lock:
            self.fileno()
            if os.getpid() != self._pid:
                raise RuntimeError(f"the vCPU belongs to process {self._pid}")
            self._interrupt()

    def try_kick(self, timeout: float) -> bool:
        """As :meth:`kick`, but False after `timeout` seconds in which another kick is under way."""
        if not self._kick_lock.acquire(timeout=timeout):
            return False
        try:
            self.kick()
        finally:
            self._kick_lock.release()
        return True

    def _interrupt(self) -> None:
        self.kvm_run.immediate_exit = 1
        if self._runner:
            tgkill(self._tid, wakeup.KICK_SIGNAL)

    def close(self) -> None:
        """Close the vCPU.  If another thread runs it, it is called back first.

        RuntimeError in a signal handler that interrupts this thread's own run of it.
        """
        if self._runner.get("thread") is _here.me:
            raise RuntimeError("a vCPU can't be closed by a signal handler that interrupts its run")
        with SignalsBlocked():
            with self._kick_lock:
                fd, self._fd = self._fd, -1
            if fd >= 0:
                self._let_go(fd)

    def _let_go(self, fd: int) -> None:
        try:
            wakeup.unwatch(self)
            while self._runner and os.getpid() == self._pid:
                self._interrupt()
                time.sleep(0.0005)
        finally:
            self.kvm_run = cast("kvm_run", _ClosedKvmRun())
            del self._mmap
            os.close(fd)
            if self._lifeline is not None:
                self._lifeline.leave()

    def _busy_error(self) -> RuntimeError | ClosedError:
        if self.closed:
            return self._closed_error()
        return RuntimeError(
            f"vCPU {self.vcpu_id} is being run by another thread: kick it and wait for it first"
        )

    def _check_idle(self) -> None:
        if self._runner and self._runner.get("thread") is not _here.me:
            raise self._busy_error()

    def ioctl(self, request: int, argument: object = 0) -> int:
        """As :meth:`Fd.ioctl`; RuntimeError while another thread runs the vCPU.

        The kernel would let the call wait until that thread comes back, perhaps for ever;
        :meth:`ioctl_errno` does.
        """
        if self._runner:
            self._check_idle()
        return super().ioctl(request, argument)

    # -- registers -----------------------------------------------------------------------------

    def get_regs(self) -> kvm_regs:
        """KVM_GET_REGS: the general purpose registers, as a new struct.

        :func:`kvmpriv.fd.describe` shows a struct as text.
        """
        regs = _ffi.new("struct kvm_regs *")
        self.ioctl(kvm_h.KVM_GET_REGS, regs)
        return regs

    def set_regs(self, regs: kvm_regs) -> None:
        """KVM_SET_REGS.  ArgumentError for another struct."""
        self._set(kvm_h.KVM_SET_REGS, "struct kvm_regs *", regs)

    @contextmanager
    def regs(self) -> Iterator[kvm_regs]:
        """Get the general purpose registers, let the block change them, and set them.

            with vcpu.regs() as regs:
                regs.rip += 2

        They are not set when the block raises.
        """
        regs = self.get_regs()
        yield regs
        self.set_regs(regs)

    def get_sregs(self) -> kvm_sregs:
        """KVM_GET_SREGS: segments, descriptor tables, control registers, EFER."""
        sregs = _ffi.new("struct kvm_sregs *")
        self.ioctl(kvm_h.KVM_GET_SREGS, sregs)
        return sregs

    def set_sregs(self, sregs: kvm_sregs) -> None:
        """KVM_SET_SREGS.

        ArgumentError for another struct; OSError (EINVAL) for control registers that contradict
        each other.
        """
        self._set(kvm_h.KVM_SET_SREGS, "struct kvm_sregs *", sregs)

    @contextmanager
    def sregs(self) -> Iterator[kvm_sregs]:
        """Get the special registers, let the block change them, and set them, as :meth:`regs`."""
        sregs = self.get_sregs()
        yield sregs
        self.set_sregs(sregs)

    def start_real_mode(self, rip: int, *, rsp: int = 0) -> None:
        """Let a new vCPU begin in real mode at `rip`, with every segment at 0.

        `rip` and `rsp` are 0 to 0xffff; a stack at 0 grows down from 0x10000.
        """
        check_range("rip", rip, 1 << 16)
        check_range("rsp", rsp, 1 << 16)
        with self.sregs() as sregs:
            for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
                segment.base = segment.selector = 0
        with self.regs() as regs:
            regs.rip, regs.rsp, regs.rflags = rip, rsp, _RFLAGS_FIXED

    def get_fpu(self) -> kvm_fpu:
        """KVM_GET_FPU: x87 and SSE registers."""
        fpu = _ffi.new("struct kvm_fpu *")
        self.ioctl(kvm_h.KVM_GET_FPU, fpu)
        return fpu

    def set_fpu(self, fpu: kvm_fpu) -> None:
        """KVM_SET_FPU.  ArgumentError for another struct."""
        self._set(kvm_h.KVM_SET_FPU, "struct kvm_fpu *", fpu)

    def get_lapic(self) -> kvm_lapic_state:
        """KVM_GET_LAPIC: the local APIC's register page.

        OSError (EINVAL) without an in-kernel irqchip.
        """
        lapic = _ffi.new("struct kvm_lapic_state *")
        self.ioctl(kvm_h.KVM_GET_LAPIC, lapic)
        return lapic

    def set_lapic(self, lapic: kvm_lapic_state) -> None:
        """KVM_SET_LAPIC.

        ArgumentError for another struct, OSError (EINVAL) without an in-kernel irqchip.
        """
        self._set(kvm_h.KVM_SET_LAPIC, "struct kvm_lapic_state *", lapic)

    def get_vcpu_events(self) -> kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS: pending exceptions, interrupts, NMIs."""
        events = _ffi.new("struct kvm_vcpu_events *")
        self.ioctl(kvm_h.KVM_GET_VCPU_EVENTS, events)
        return events

    def set_vcpu_events(self, events: kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS.

        ArgumentError for another struct, OSError (EINVAL) for unknown flags or exceptions.
        """
        self._set(kvm_h.KVM_SET_VCPU_EVENTS, "struct kvm_vcpu_events *", events)

    def get_debugregs(self) -> kvm_debugregs:
        """KVM_GET_DEBUGREGS: DR0 to DR3, DR6, DR7."""
        debugregs = _ffi.new("struct kvm_debugregs *")
        self.ioctl(kvm_h.KVM_GET_DEBUGREGS, debugregs)
        return debugregs

    def set_debugregs(self, debugregs: kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS.  ArgumentError for another struct, OSError (EINVAL) for flags."""
        self._set(kvm_h.KVM_SET_DEBUGREGS, "struct kvm_debugregs *", debugregs)

    def get_xcrs(self) -> kvm_xcrs:
        """KVM_GET_XCRS: the extended control registers (XCR0).  OSError (EINVAL) without XSAVE."""
        xcrs = _ffi.new("struct kvm_xcrs *")
        self.ioctl(kvm_h.KVM_GET_XCRS, xcrs)
        return xcrs

    def set_xcrs(self, xcrs: kvm_xcrs) -> None:
        """KVM_SET_XCRS.

        ArgumentError for another struct; OSError (EINVAL) for features that the guest's CPUID does
        not list, or without XSAVE.
        """
        self._set(kvm_h.KVM_SET_XCRS, "struct kvm_xcrs *", xcrs)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: one of ``KVM_MP_STATE_*``."""
        state = _ffi.new("struct kvm_mp_state *")
        self.ioctl(kvm_h.KVM_GET_MP_STATE, state)
        return state.mp_state

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE: one of ``KVM_MP_STATE_*``.

        OSError (EINVAL) for another state than KVM_MP_STATE_RUNNABLE without an in-kernel irqchip.
        """
        self.ioctl(
            kvm_h.KVM_SET_MP_STATE, new_struct("struct kvm_mp_state *", {"mp_state": mp_state})
        )

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: how fast the guest's time stamp counter runs, in kHz."""
        return self.ioctl(kvm_h.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: 1 to 2^32 - 1 kHz, or 0 for the host's.

        OSError (EINVAL) for a frequency that the host can't offer: without KVM_CAP_TSC_CONTROL it
        offers its own, give or take a tolerance.
        """
        check_range("khz", khz, 1 << 32)  # KVM takes the low 32 bits
        self.ioctl(kvm_h.KVM_SET_TSC_KHZ, khz)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: read model specific registers; returns index -> value.

        OSError (EINVAL) names the first that KVM refuses.
        """
        wanted = list(indices)
        msrs = self._msrs([(index, 0) for index in wanted])
        self._all_done(self.ioctl(kvm_h.KVM_GET_MSRS, msrs), wanted, "read")
        return {entry.index: entry.data for entry in msrs.entries[0 : len(wanted)]}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS: write model specific registers, in order.

        OSError (EINVAL) names the first that KVM refuses; those before it have been written.
        """
        msrs = self._msrs(list(values.items()))
        self._all_done(self.ioctl(kvm_h.KVM_SET_MSRS, msrs), list(values), "write")

    @staticmethod
    def _msrs(pairs: list[tuple[int, int]]) -> kvm_msrs:
        for index, value in pairs:
            check_range("an MSR's index", index, 1 << 32)
            check_range("an MSR's value", value, 1 << 64)
        entries = [(index, 0, value) for index, value in pairs]
        return _ffi.new("struct kvm_msrs *", {"nmsrs": len(pairs), "entries": entries})

    @staticmethod
    def _all_done(done: int, indices: list[int], verb: str) -> None:
        if done < len(indices):
            raise OSError(_errno.EINVAL, f"KVM does not {verb} MSR {indices[done]:#x}")

    def get_cpuid2(self) -> list[CpuidEntry]:
        """KVM_GET_CPUID2: the CPUID leaves that the guest sees."""
        from .cpuid import read_cpuid_growing

        self._check_idle()
        return read_cpuid_growing(self, kvm_h.KVM_GET_CPUID2)

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """KVM_SET_CPUID2: what CPUID returns in the guest.

        Start from :meth:`Kvm.get_supported_cpuid`.  OSError: E2BIG for too many entries, EINVAL for
        contradicting ones, or for others than before once the vCPU has run.
        """
        from .cpuid import write_cpuid

        self.ioctl(kvm_h.KVM_SET_CPUID2, write_cpuid(entries))

    # -- events and the rest -------------------------------------------------------------------

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue the interrupt with vector `irq`, 0 to 255.

        A vector that is queued already is replaced.  OSError: EINVAL for another vector, ENXIO with
        an in-kernel irqchip.
        """
        self.ioctl(kvm_h.KVM_INTERRUPT, new_struct("struct kvm_interrupt *", {"irq": irq}))

    def nmi(self) -> None:
        """KVM_NMI: queue a non-maskable interrupt."""
        self.ioctl(kvm_h.KVM_NMI)

    def translate(self, linear_address: int) -> int | None:
        """KVM_TRANSLATE: the guest physical address that the guest's page tables give.

        None where no page is mapped.
        """
        translation = new_struct("struct kvm_translation *", {"linear_address": linear_address})
        self.ioctl(kvm_h.KVM_TRANSLATE, translation)
        return int(translation.physical_address) if translation.valid else None

    def set_guest_debug(self, control: int) -> None:
        """KVM_SET_GUEST_DEBUG with ``KVM_GUESTDBG_*`` flags; 0 ends it.

        OSError: EBUSY when an exception is pending that the flags would inject.
        """
        self.ioctl(
            kvm_h.KVM_SET_GUEST_DEBUG, new_struct("struct kvm_guest_debug *", {"control": control})
        )

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell a guest that uses kvmclock that it was stopped.

        OSError (EINVAL) when the guest does not use kvmclock.
        """
        self.ioctl(kvm_h.KVM_KVMCLOCK_CTRL)
