"""A virtual CPU: registers, KVM_RUN, and being called back from it."""

from __future__ import annotations

import errno as _errno
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from fcntl import ioctl as _enter
from typing import TYPE_CHECKING, Any

from . import wakeup
from .cdefs import kvm as kvm_h
from .cdefs.kvm import KVM_EXIT_INTR, KVM_RUN
from .cpuid import CpuidEntry, read_cpuid_growing
from .faults import layout_of
from .fd import Fd
from .libc import ioctl as _ioctl
from .libc import last_errno, os_error, tgkill
from .wakeup import SignalsBlocked

if TYPE_CHECKING:
    from .slots import Lifeline
    from .stats import StatsFd

__all__ = ["Vcpu"]

_ffi = kvm_h.ffi

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
    """What is in the place of struct kvm_run once the vCPU is closed: every use says so.

    A __getattr__ of Vcpu itself would do, and make each attribute that run() looks at slower.
    """

    def __getattr__(self, name: str) -> Any:
        raise ValueError("vCPU is closed")

    def __setattr__(self, name: str, value: object) -> None:
        raise ValueError("vCPU is closed")


class Vcpu(Fd):
    """A vCPU; made by :meth:`Vm.create_vcpu`.

    One thread at a time may run it; any thread may `kick` it.  Where the methods are named after
    an ioctl they are that ioctl (Documentation/virt/kvm/api.rst of the kernel), and raise what
    it fails with as OSError.
    """

    _what = "vCPU"

    def __init__(self, fd: int, mmap_size: int, lifeline: Lifeline, vcpu_id: int) -> None:
        self.vcpu_id = vcpu_id
        #: The thread that is in KVM_RUN or about to be; at most one entry.
        self._runner: dict[str, object] = {}
        self._prepared: object = None  # the thread that has run it last …
        self._tid = 0  # … and its number in the kernel
        self._errno = 0  # what KVM_RUN failed with, when that is an exit
        # Re-entrant: a signal handler may kick while kick is under way.
        self._kick_lock = threading.RLock()
        self._pid = os.getpid()
        self._lifeline: Lifeline | None = None
        self._fault_layout = lifeline.fault_layout
        super().__init__(fd)
        try:
            self._mmap = mmap.mmap(fd, mmap_size)
            #: ``struct kvm_run *``, read and written in place.  A part of it (``kvm_run.io``) does
            #: not keep it alive: take it anew after each run, and never after close.
            self.kvm_run: Any = _ffi.from_buffer(
                "struct kvm_run *", self._mmap, require_writable=True
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

        Raises OSError with KVM_RUN's errno, RuntimeError when another thread runs this vCPU,
        ValueError after close.
        """
        me = _here.me
        runner = self._runner
        try:
            # One call, hence atomic; and what it did can be seen below, whatever came between.
            if runner.setdefault("thread", me) is not me:
                runner = {}  # not ours to clear
                raise self._busy_error()
            if self._prepared is not me or self._errno:
                self._prepare(me)
            if _FCNTL_SHOWS_EINTR:
                _enter(self._fd, KVM_RUN)
            elif _ioctl(self._fd, KVM_RUN, 0) != 0:
                return self._no_ordinary_exit(last_errno())
            return self.kvm_run.exit_reason  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            # Signal handlers run in _enter: what they raise has their frames, and is not KVM's.
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise
            return self._no_ordinary_exit(getattr(error, "errno", _errno.EBADF))
        finally:
            if (
                runner and runner["thread"] is me
            ):  # no call, after which a signal handler might come
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
        reason: int = run.exit_reason
        layout = layout_of(reason, self._fault_layout)
        if layout is not None and errno in layout.errnos:
            self._errno = errno
            return reason
        raise self._of_another_process(os_error(errno, "KVM_RUN")) from None

    def exit(self) -> Any:
        """The last exit, decoded: one of the tuples of :mod:`kvmpriv.exits`."""
        from .exits import decode

        self.fileno()
        return decode(self.kvm_run, self._errno, self._fault_layout)

    def kick(self) -> None:
        """Make :meth:`run`, in whichever thread, return KVM_EXIT_INTR: now, or as soon as called.

        Kicks that come before the vCPU is seen to stop count as one.  ValueError after close,
        RuntimeError in a process that has it by fork.
        """
        with self._kick_lock:
            self.fileno()
            if os.getpid() != self._pid:
                raise RuntimeError(f"the vCPU belongs to process {self._pid}")
            self._interrupt()

    def _interrupt(self) -> None:
        self.kvm_run.immediate_exit = 1
        if self._runner:
            tgkill(self._tid, wakeup.KICK_SIGNAL)

    def close(self) -> None:
        """Close the vCPU; one that is running elsewhere is called back first."""
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
            self.kvm_run = _ClosedKvmRun()
            del self._mmap
            os.close(fd)
            if self._lifeline is not None:
                self._lifeline.leave()

    def _busy_error(self) -> RuntimeError | ValueError:
        if self.closed:
            return self._closed_error()
        return RuntimeError(
            f"vCPU {self.vcpu_id} is being run by another thread: kick it and wait for it first"
        )

    def ioctl(self, request: int, argument: Any = 0) -> int:
        """As :meth:`Fd.ioctl`; RuntimeError while another thread runs the vCPU.

        The kernel would let the call wait until that thread comes back, for ever maybe;
        :meth:`Fd.ioctl_errno` does.
        """
        if self._runner and self._runner.get("thread") is not _here.me:
            raise self._busy_error()
        return super().ioctl(request, argument)

    def _error(self, request: int, argument: Any = 0) -> OSError | ValueError:
        return self._of_another_process(super()._error(request, argument))

    def _of_another_process(self, error: OSError | ValueError) -> OSError | ValueError:
        if isinstance(error, OSError) and error.errno == _errno.EIO and os.getpid() != self._pid:
            return OSError(error.errno, f"{error.strerror} (the VM belongs to process {self._pid})")
        return error

    # -- registers -----------------------------------------------------------------------------

    def get_regs(self) -> Any:
        """The general purpose registers: a ``struct kvm_regs *``."""
        return self._get(kvm_h.KVM_GET_REGS, "struct kvm_regs *")

    def set_regs(self, regs: Any) -> None:
        self.ioctl(kvm_h.KVM_SET_REGS, regs)

    def get_sregs(self) -> Any:
        """Segments, control registers, EFER: a ``struct kvm_sregs *``."""
        return self._get(kvm_h.KVM_GET_SREGS, "struct kvm_sregs *")

    def set_sregs(self, sregs: Any) -> None:
        self.ioctl(kvm_h.KVM_SET_SREGS, sregs)

    def get_fpu(self) -> Any:
        return self._get(kvm_h.KVM_GET_FPU, "struct kvm_fpu *")

    def set_fpu(self, fpu: Any) -> None:
        self.ioctl(kvm_h.KVM_SET_FPU, fpu)

    def get_lapic(self) -> Any:
        return self._get(kvm_h.KVM_GET_LAPIC, "struct kvm_lapic_state *")

    def set_lapic(self, lapic: Any) -> None:
        self.ioctl(kvm_h.KVM_SET_LAPIC, lapic)

    def get_vcpu_events(self) -> Any:
        return self._get(kvm_h.KVM_GET_VCPU_EVENTS, "struct kvm_vcpu_events *")

    def set_vcpu_events(self, events: Any) -> None:
        self.ioctl(kvm_h.KVM_SET_VCPU_EVENTS, events)

    def get_debugregs(self) -> Any:
        return self._get(kvm_h.KVM_GET_DEBUGREGS, "struct kvm_debugregs *")

    def set_debugregs(self, debugregs: Any) -> None:
        self.ioctl(kvm_h.KVM_SET_DEBUGREGS, debugregs)

    def get_xcrs(self) -> Any:
        return self._get(kvm_h.KVM_GET_XCRS, "struct kvm_xcrs *")

    def set_xcrs(self, xcrs: Any) -> None:
        self.ioctl(kvm_h.KVM_SET_XCRS, xcrs)

    def get_mp_state(self) -> int:
        """One of ``KVM_MP_STATE_*``."""
        state = self._get(kvm_h.KVM_GET_MP_STATE, "struct kvm_mp_state *")
        return int(state.mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        self.ioctl(
            kvm_h.KVM_SET_MP_STATE, _ffi.new("struct kvm_mp_state *", {"mp_state": mp_state})
        )

    def get_tsc_khz(self) -> int:
        return self.ioctl(kvm_h.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        self.ioctl(kvm_h.KVM_SET_TSC_KHZ, khz)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Read model specific registers: index -> value.

        OSError (EINVAL) names the first that KVM refuses.
        """
        wanted = list(indices)
        msrs = self._msrs([(index, 0) for index in wanted])
        self._all_done(self.ioctl(kvm_h.KVM_GET_MSRS, msrs), wanted, "read")
        return {entry.index: entry.data for entry in msrs.entries[0 : len(wanted)]}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Write model specific registers, in order.  OSError (EINVAL) names the first refused."""
        msrs = self._msrs(list(values.items()))
        self._all_done(self.ioctl(kvm_h.KVM_SET_MSRS, msrs), list(values), "write")

    @staticmethod
    def _msrs(pairs: list[tuple[int, int]]) -> Any:
        msrs = _ffi.new("struct kvm_msrs *", {"nmsrs": len(pairs), "entries": len(pairs)})
        for entry, (index, value) in zip(msrs.entries[0 : len(pairs)], pairs, strict=True):
            entry.index = index
            entry.data = value
        return msrs

    @staticmethod
    def _all_done(done: int, indices: list[int], verb: str) -> None:
        if done < len(indices):
            raise OSError(_errno.EINVAL, f"KVM does not {verb} MSR {indices[done]:#x}")

    def get_cpuid2(self) -> list[CpuidEntry]:
        return read_cpuid_growing(self, kvm_h.KVM_GET_CPUID2)

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """What CPUID says in the guest; :meth:`Kvm.get_supported_cpuid` is a start."""
        wanted = list(entries)
        cpuid = _ffi.new("struct kvm_cpuid2 *", {"nent": len(wanted), "entries": len(wanted)})
        for target, entry in zip(cpuid.entries[0 : len(wanted)], wanted, strict=True):
            for name, value in entry._asdict().items():
                setattr(target, name, value)
        self.ioctl(kvm_h.KVM_SET_CPUID2, cpuid)

    # -- events and the rest -------------------------------------------------------------------

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue vector `irq` (0 to 255); without an in-kernel irqchip only."""
        self.ioctl(kvm_h.KVM_INTERRUPT, _ffi.new("struct kvm_interrupt *", {"irq": irq}))

    def nmi(self) -> None:
        self.ioctl(kvm_h.KVM_NMI)

    def translate(self, linear_address: int) -> int | None:
        """The guest physical address behind a linear one; None where no page is mapped."""
        translation = _ffi.new("struct kvm_translation *", {"linear_address": linear_address})
        self.ioctl(kvm_h.KVM_TRANSLATE, translation)
        return int(translation.physical_address) if translation.valid else None

    def set_guest_debug(self, control: int) -> None:
        """KVM_SET_GUEST_DEBUG with ``KVM_GUESTDBG_*`` flags, 0 to end it."""
        self.ioctl(
            kvm_h.KVM_SET_GUEST_DEBUG, _ffi.new("struct kvm_guest_debug *", {"control": control})
        )

    def kvmclock_ctrl(self) -> None:
        """Tell a kvmclock guest that it was stopped; OSError (EINVAL) when it uses none."""
        self.ioctl(kvm_h.KVM_KVMCLOCK_CTRL)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        enable_cap(self, cap, args, flags)

    def get_stats_fd(self) -> StatsFd:
        """The vCPU's counters."""
        from .stats import StatsFd

        with SignalsBlocked():
            return StatsFd(self.ioctl(kvm_h.KVM_GET_STATS_FD))

    def _get(self, request: int, kind: str) -> Any:
        value = _ffi.new(kind)
        self.ioctl(request, value)
        return value


def enable_cap(fd: Fd, cap: int, args: tuple[int, ...], flags: int) -> None:
    """KVM_ENABLE_CAP on a VM or a vCPU: up to four arguments of 64 bits."""
    fd.ioctl(
        kvm_h.KVM_ENABLE_CAP,
        _ffi.new("struct kvm_enable_cap *", {"cap": cap, "flags": flags, "args": list(args)}),
    )
