"""Getting a thread out of KVM_RUN, with no wake-up lost.

Two things may want a vCPU's thread back: another thread (`Vcpu.kick`), and a signal that has a
Python handler (Ctrl-C).  Both can come at the worst moment, after the last look and before the
ioctl.

*A kick* sets ``kvm_run.immediate_exit`` and then sends KICK_SIGNAL to the thread: before the
ioctl the flag makes KVM_RUN return at once, inside it the signal does.  KICK_SIGNAL is SIGRTMIN,
as with other users of KVM.  kvmpriv installs its handler, a C function that does nothing, when a
vCPU first runs in a thread; a handler that is there already is left alone.  A thread that runs a
vCPU has the signal unblocked.

*A signal with a Python handler* (SIGINT) is only noted by Python's handler in C; Python code runs
when the main thread is back from C.  So as long as the main thread has vCPUs that it runs, kvmpriv
has `signal.set_wakeup_fd`: a thread of kvmpriv reads there that a signal has come, and kicks them.
The wake-up fd that was set before is given every byte it would have had, and is set again when
the last of those vCPUs is closed.  Code that sets it later (asyncio's add_signal_handler) replaces
kvmpriv's: such a program must run its vCPUs in other threads.

Off the main thread there is nothing to watch: Python runs signal handlers in the main thread
alone, whose waiting (``Thread.join``, ``Event.wait``) they interrupt.  The handler, or the code
that catches KeyboardInterrupt, kicks the vCPUs it wants back (`VcpuThread` does).
"""

from __future__ import annotations

import os
import sys
import weakref
from _thread import RLock  # threading's own, as in slots.py
from contextlib import suppress
from typing import Protocol

from . import libc
from .fd import Fd

__all__ = ["KICK_SIGNAL", "SignalsBlocked", "prepare_thread", "unwatch", "watch"]

#: Interrupts KVM_RUN; 34 on x86-64 with glibc.
KICK_SIGNAL = libc.SIGRTMIN

#: Seconds for which the watching thread waits for a kick, before it looks whether it is to end.
_TRY = 0.01


class Kickable(Protocol):
    """A vCPU, for this module."""

    def try_kick(self, timeout: float) -> bool:
        """Make its run return; False if that was not possible for `timeout` seconds."""


def prepare_thread() -> None:
    """Let KICK_SIGNAL interrupt system calls of the calling thread, and do nothing else."""
    libc.signal_ignored_in_c(KICK_SIGNAL)
    libc.pthread_sigmask_unblock(KICK_SIGNAL)


class SignalsBlocked:
    """Blocks signals while a raw descriptor is between two owners.

    A signal handler that raises at that moment would leak the descriptor.  Only the calling thread
    is protected: a signal that the kernel delivers to another thread of the process is not blocked.
    """

    def __enter__(self) -> None:
        self._before = libc.signal_mask()
        try:
            libc.block_signals()
            libc.run_signal_handlers()  # for signals that have come until now
        except BaseException:
            libc.set_signal_mask(self._before)
            raise

    def __exit__(self, *_: object) -> None:
        libc.set_signal_mask(self._before)


# Re-entrant: a signal handler may interrupt the holder and run, kick or close a vCPU itself.
_lock = RLock()
_watched: weakref.WeakSet[Kickable] = weakref.WeakSet()
_watch: _SignalWatch | None = None


def in_main_thread() -> bool:
    """Whether the calling thread is the one that runs Python's signal handlers."""
    import threading

    return threading.current_thread() is threading.main_thread()


def watch(vcpu: Kickable) -> None:
    """Kick `vcpu` whenever a signal with a Python handler comes.  In the main thread only."""
    global _watch
    with SignalsBlocked(), _lock:
        _watched.add(vcpu)
        if _watch is None:
            _watch = _SignalWatch()


def unwatch(vcpu: Kickable) -> None:
    """Forget a vCPU that is being closed.  The main thread ends the watch with the last one."""
    global _watch
    with _lock:
        _watched.discard(vcpu)
        # At exit nothing can be imported, and the daemon thread can't be joined: it ends with the
        # process.
        if _watched or _watch is None or sys.is_finalizing() or not in_main_thread():
            return
        ending, _watch = _watch, None
    ending.close()  # not under the lock, which its thread may be waiting for


def _kick_all() -> None:
    with _lock:
        vcpus = list(_watched)
    for vcpu in vcpus:
        # The main thread may be in a kick of it, interrupted by a signal handler that has closed
        # the last vCPU and waits for this thread to end.
        with suppress(ValueError):  # closed meanwhile
            while _is_watched(vcpu) and not vcpu.try_kick(_TRY):
                pass


def _is_watched(vcpu: Kickable) -> bool:
    with _lock:
        return vcpu in _watched


class _SignalWatch:
    """A pipe whose write end is the wake-up fd, and the thread that reads it."""

    def __init__(self) -> None:
        import threading
        from signal import set_wakeup_fd  # a process without a running vCPU needs no enum of it

        self._set_wakeup_fd = set_wakeup_fd
        read, self._write = os.pipe2(os.O_CLOEXEC)
        # Closed with its last reference, the thread's or ours: when a signal interrupts start(),
        # the thread may have begun.
        self._read = Fd(read)
        os.set_blocking(self._write, False)
        self._previous = self._set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._serve, name="kvmpriv-signals", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._restore()
            del self._thread
            raise

    def _serve(self) -> None:
        while numbers := os.read(self._read.fileno(), 512):
            if self._previous >= 0:
                with suppress(OSError):  # its owner may have closed it, or not be reading
                    os.write(self._previous, numbers)
            # If the program has a Python handler for KICK_SIGNAL, kicks arrive here too: to kick
            # because of a kick would never end.
            if numbers.strip(bytes((KICK_SIGNAL,))):
                _kick_all()

    def _restore(self) -> None:
        current = self._set_wakeup_fd(self._previous, warn_on_full_buffer=False)
        if current != self._write:  # another one has been set since: it stays
            self._set_wakeup_fd(current, warn_on_full_buffer=False)
        os.close(self._write)

    def close(self) -> None:
        """Restore the wake-up fd and end the thread, which reads first what has come until now."""
        self._restore()
        self._thread.join()

    def forget(self) -> None:
        """For a child made by fork, which has the pipe but neither the thread nor our vCPUs."""
        with suppress(ValueError):  # not in the main thread, which alone may set the wake-up fd
            if self._set_wakeup_fd(-1) != self._write:
                return
        self._read.close()
        os.close(self._write)


def _after_fork() -> None:
    global _lock, _watched, _watch
    _lock, _watched = RLock(), weakref.WeakSet()
    if _watch is not None:
        _watch.forget()
        _watch = None


os.register_at_fork(after_in_child=_after_fork)
