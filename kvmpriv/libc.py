"""The C library's calls that kvmpriv needs, prototyped once; the only user of ctypes.

Each function returns what C returns, -1 for failure; :func:`last_errno` then says why.  ctypes
keeps errno per thread and lets go of the GIL during a call, but for the signal mask's.
"""

from __future__ import annotations

import ctypes
import os
import signal
from ctypes import c_int, c_long, c_ulong, c_void_p

__all__ = [
    "FALLOC_FL_KEEP_SIZE",
    "FALLOC_FL_PUNCH_HOLE",
    "block_signals",
    "fallocate",
    "fstatfs_type",
    "ioctl",
    "last_errno",
    "os_error",
    "pthread_sigmask_unblock",
    "run_signal_handlers",
    "set_errno",
    "set_signal_mask",
    "signal_ignored_in_c",
    "signal_mask",
    "syscall",
    "tgkill",
]

_libc = ctypes.CDLL(None, use_errno=True)

last_errno, set_errno = ctypes.get_errno, ctypes.set_errno

#: ``int ioctl(int fd, unsigned long request, unsigned long argument)``: a pointer goes as a number.
ioctl = _libc.ioctl
ioctl.argtypes = (c_int, c_ulong, c_ulong)
ioctl.restype = c_int

_syscall = _libc.syscall
_syscall.argtypes = (c_long,) * 7
_syscall.restype = c_long

_fallocate = _libc.fallocate64
_fallocate.argtypes = (c_int, c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = c_int

_SYS_tgkill = 234  # x86-64

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # <linux/falloc.h>


def os_error(errno: int, what: str) -> OSError:
    """The exception for an errno: its subclass chosen by Python, `what` in the message."""
    return OSError(errno, f"{what}: {os.strerror(errno)}")


def syscall(number: int, *arguments: int) -> int:
    """``syscall(2)`` with six arguments, those not given being 0: no register holds garbage."""
    if len(arguments) > 6:
        raise ValueError(f"a system call takes 6 arguments, not {len(arguments)}")
    return int(_syscall(number, *arguments, *(0,) * (6 - len(arguments))))


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """``fallocate(2)``; `offset` and `length` in bytes."""
    return int(_fallocate(fd, mode, offset, length))


class _Statfs(ctypes.Structure):
    # struct statfs of x86-64: f_type comes first, 120 bytes in all.
    _fields_ = (("f_type", c_long), ("rest", c_long * 14))


_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (c_int, ctypes.POINTER(_Statfs))
_fstatfs.restype = c_int


def fstatfs_type(fd: int) -> int:
    """``fstatfs(2)``'s f_type (the file system's magic number), or -1."""
    buffer = _Statfs()
    return int(buffer.f_type) if _fstatfs(fd, ctypes.byref(buffer)) == 0 else -1


def tgkill(tid: int, signum: int) -> int:
    """Send a signal to one thread of this process; -1 when it is gone.

    errno is left alone: signal handlers kick, and may come between a call and its errno.
    """
    before = last_errno()
    result = syscall(_SYS_tgkill, os.getpid(), tid, signum)
    set_errno(before)
    return result


class _Sigaction(ctypes.Structure):
    # struct sigaction of glibc and musl on x86-64.
    _fields_ = (
        ("handler", c_void_p),
        ("mask", c_ulong * 16),
        ("flags", c_int),
        ("restorer", c_void_p),
    )


_sigaction = _libc.sigaction
_sigaction.argtypes = (c_int, ctypes.POINTER(_Sigaction), ctypes.POINTER(_Sigaction))
_sigaction.restype = c_int

_SIG_IGN = 1


def signal_ignored_in_c(signum: int) -> None:
    """Let `signum` interrupt a system call and do nothing else, unless it has a handler already.

    Its handler becomes libc's ``getpid``, which looks at no argument and may be called at any
    moment (signal-safety(7)).  Unlike ``signal.signal`` this works in any thread, and no
    Python code runs when the signal comes.
    """
    action = _Sigaction()
    if _sigaction(signum, None, ctypes.byref(action)) != 0:
        raise os_error(last_errno(), f"sigaction({signum})")
    if (action.handler or 0) > _SIG_IGN:
        return
    action = _Sigaction(handler=ctypes.cast(_libc.getpid, c_void_p).value)
    if _sigaction(signum, ctypes.byref(action), None) != 0:
        raise os_error(last_errno(), f"sigaction({signum})")


# signal.pthread_sigmask makes a set of enum members each time, which takes longer than making a VM;
# and who keeps the GIL need not wait for another thread to give it back.
_SignalMask = c_ulong * 16  # sigset_t of glibc and musl on x86-64
_held = ctypes.PyDLL(None)
_pthread_sigmask = _held.pthread_sigmask
_pthread_sigmask.argtypes = (c_int, c_void_p, c_void_p)
_pthread_sigmask.restype = c_int
_ALL_SIGNALS = _SignalMask()
_held.sigfillset(ctypes.byref(_ALL_SIGNALS))  # but those that the C library keeps for itself

#: Runs the Python handlers of signals that have come, in the main thread; they may raise.
run_signal_handlers = ctypes.pythonapi.PyErr_CheckSignals
run_signal_handlers.argtypes = ()


def signal_mask() -> ctypes.Array[c_ulong]:
    """Which signals the calling thread has blocked."""
    mask = _SignalMask()
    _pthread_sigmask(signal.SIG_BLOCK, None, mask)
    return mask


def block_signals() -> None:
    """Block all signals in the calling thread."""
    _pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS, None)


def set_signal_mask(mask: ctypes.Array[c_ulong]) -> None:
    """Block these signals in the calling thread, and no others."""
    _pthread_sigmask(signal.SIG_SETMASK, mask, None)


def pthread_sigmask_unblock(signum: int) -> None:
    """Unblock a signal in the calling thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signum,))
