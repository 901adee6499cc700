"""The C library's calls that kvmpriv needs, prototyped once; the only user of ctypes.

The functions return what C returns, or a negated errno for failure, and preserve errno: a signal
handler may call them between another call and its errno.  `ioctl` is C's own, as it is called most
often: it returns -1, and its caller reads :func:`last_errno`.  ctypes keeps errno per thread.  It
releases the GIL during a call, but not for the signal mask.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import c_int, c_long, c_ulong, c_void_p

from .errors import ArgumentError

__all__ = [
    "CLONE_NEWNET",
    "CLONE_NEWUSER",
    "FALLOC_FL_KEEP_SIZE",
    "FALLOC_FL_PUNCH_HOLE",
    "FALLOC_FL_ZERO_RANGE",
    "RLIMIT_AS",
    "RLIMIT_CPU",
    "RLIMIT_DATA",
    "RLIMIT_NOFILE",
    "RLIMIT_NPROC",
    "SIGRTMIN",
    "block_signals",
    "copy_in",
    "copy_out",
    "fallocate",
    "fstatfs_type",
    "ioctl",
    "kcmp_file",
    "last_errno",
    "madvise",
    "os_error",
    "pthread_sigmask_unblock",
    "run_signal_handlers",
    "set_errno",
    "set_signal_mask",
    "signal_ignored_in_c",
    "signal_mask",
    "soft_limit",
    "syscall",
    "tgkill",
    "unshare",
]

_libc = ctypes.CDLL(None, use_errno=True)

#: The errno of the calling thread's last call of C.
last_errno: Callable[[], int] = ctypes.get_errno
set_errno: Callable[[int], int] = ctypes.set_errno

#: ``int ioctl(int fd, unsigned long request, unsigned long argument)``: a pointer goes as a number.
_ioctl = _libc.ioctl
_ioctl.argtypes = (c_int, c_ulong, c_ulong)
_ioctl.restype = c_int
ioctl: Callable[[int, int, int], int] = _ioctl

_syscall = _libc.syscall
_syscall.argtypes = (c_long,) * 7
_syscall.restype = c_long

_fallocate = _libc.fallocate  # off_t has 64 bits on x86-64; musl has no fallocate64
_fallocate.argtypes = (c_int, c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = c_int

_madvise = _libc.madvise
_madvise.argtypes = (c_void_p, c_ulong, c_int)
_madvise.restype = c_int

_unshare = _libc.unshare
_unshare.argtypes = (c_int,)
_unshare.restype = c_int

CLONE_NEWUSER, CLONE_NEWNET = 0x1000_0000, 0x4000_0000  # <linux/sched.h>

_SYS_tgkill, _SYS_kcmp = 234, 312  # x86-64
_KCMP_FILE = 0  # <linux/kcmp.h>

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16  # <linux/falloc.h>


def os_error(errno: int, what: str) -> OSError:
    """The OSError for an errno, of the subclass that Python has for it; `what` failed."""
    return OSError(errno, f"{what}: {os.strerror(errno)}")


def _call(function: Callable[..., int], *arguments: object) -> int:
    """Call a function of C that returns -1 for failure; returns the negated errno for that."""
    before = last_errno()
    result = int(function(*arguments))
    if result == -1:
        result = -last_errno()
        set_errno(before)
    return result


def syscall(number: int, *arguments: int) -> int:
    """``syscall(2)`` with up to six arguments; the rest are 0.  ArgumentError for more."""
    if len(arguments) > 6:
        raise ArgumentError(f"a system call takes 6 arguments, not {len(arguments)}")
    return _call(_syscall, number, *arguments, *(0,) * (6 - len(arguments)))


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """``fallocate(2)``; `offset` and `length` in bytes."""
    return _call(_fallocate, fd, mode, offset, length)


def madvise(address: int, size: int, advice: int) -> int:
    """``madvise(2)``; `size` in bytes.  Unlike mmap.madvise, other threads run meanwhile."""
    return _call(_madvise, address, size, advice)


_SYS_process_vm_readv, _SYS_process_vm_writev = 310, 311  # x86-64
_Vector = c_ulong * 2  # struct iovec: address, length


def _copy(number: int, address: int, size: int, buffer: int) -> int:
    mapped, other = _Vector(address, size), _Vector(buffer, size)
    here = (ctypes.addressof(mapped), 1, ctypes.addressof(other), 1)
    return syscall(number, os.getpid(), *here)


def copy_out(address: int, size: int, buffer: int) -> int:
    """Copy memory of this process at `address` to `buffer`, by the kernel.

    A page that can't be read is no signal then: returns how many bytes before it were copied, or
    minus EFAULT if none were.  `process_vm_writev(2)` of this process: the kernel reads `address`
    as write(2) would, and takes no reference to its pages.
    """
    return _copy(_SYS_process_vm_writev, address, size, buffer)


def copy_in(address: int, size: int, buffer: int) -> int:
    """As :func:`copy_out`, from `buffer` to `address`: `process_vm_readv(2)`."""
    return _copy(_SYS_process_vm_readv, address, size, buffer)


class _Statfs(ctypes.Structure):
    # struct statfs of x86-64: f_type comes first, 120 bytes in all.
    _fields_ = (("f_type", c_long), ("rest", c_long * 14))


_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (c_int, ctypes.POINTER(_Statfs))
_fstatfs.restype = c_int


def fstatfs_type(fd: int) -> int:
    """``fstatfs(2)``'s f_type (the file system's magic number), or a negated errno."""
    buffer = _Statfs()
    return _call(_fstatfs, fd, ctypes.byref(buffer)) or int(buffer.f_type)


# <asm-generic/resource.h>
RLIMIT_CPU, RLIMIT_DATA, RLIMIT_NPROC, RLIMIT_NOFILE, RLIMIT_AS = 0, 2, 6, 7, 9
_RLIM_INFINITY = (1 << 64) - 1
_Limits = c_ulong * 2  # struct rlimit: soft, hard

_getrlimit = _libc.getrlimit
_getrlimit.argtypes = (c_int, c_void_p)
_getrlimit.restype = c_int


def soft_limit(resource: int) -> int | None:
    """``getrlimit(2)``'s soft limit for one of ``RLIMIT_*``; None if there is no limit.

    As resource.getrlimit, which can't be imported when no descriptor is left.
    """
    limits = _Limits()
    if _call(_getrlimit, resource, limits) != 0 or limits[0] == _RLIM_INFINITY:
        return None
    return int(limits[0])


def unshare(flags: int) -> int:
    """``unshare(2)``: move the calling thread into new namespaces (``CLONE_NEW*``).

    os.unshare does the same, from Python 3.12 on.
    """
    return _call(_unshare, flags)


def kcmp_file(pid: int, fd: int, other_pid: int, other_fd: int) -> int:
    """``kcmp(2)`` of two descriptors: 0 if both lead to one open file, -errno for failure.

    1 and 2 are "less" and "greater", in an order that is the same for all files until a reboot.
    """
    return syscall(_SYS_kcmp, pid, other_pid, _KCMP_FILE, fd, other_fd)


def tgkill(tid: int, signum: int) -> int:
    """Send a signal to one thread of this process; a negated errno when it is gone."""
    return syscall(_SYS_tgkill, os.getpid(), tid, signum)


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

    Its handler becomes libc's ``getpid``, which ignores its argument and may be called at any
    moment (signal-safety(7)).  Unlike ``signal.signal`` this works in any thread, and no
    Python code runs when the signal comes.
    """
    action = _Sigaction()
    if error := _call(_sigaction, signum, None, ctypes.byref(action)):
        raise os_error(-error, f"sigaction({signum})")
    if (action.handler or 0) > _SIG_IGN:
        return
    action = _Sigaction(handler=ctypes.cast(_libc.getpid, c_void_p).value)
    if error := _call(_sigaction, signum, ctypes.byref(action), None):
        raise os_error(-error, f"sigaction({signum})")


#: The first real-time signal that the C library leaves to programs: 34 with glibc, 35 with musl.
SIGRTMIN: int = _libc["__libc_current_sigrtmin"]()

# signal.pthread_sigmask makes a set of enum members each time, which takes longer than making a VM.
# PyDLL keeps the GIL, so that the caller does not wait for another thread to give it back.
_SignalMask = c_ulong * 16  # sigset_t of glibc and musl on x86-64
_held = ctypes.PyDLL(None)
_pthread_sigmask = _held.pthread_sigmask
_pthread_sigmask.argtypes = (c_int, c_void_p, c_void_p)
_pthread_sigmask.restype = c_int
_SIG_BLOCK, _SIG_SETMASK = 0, 2  # of the kernel on x86, signal.h
_ALL_SIGNALS = _SignalMask()
_held.sigfillset(ctypes.byref(_ALL_SIGNALS))  # except those that the C library keeps for itself

#: Run the Python handlers of signals that have come.  In the main thread only; they may raise.
run_signal_handlers: Callable[[], int] = ctypes.pythonapi.PyErr_CheckSignals
ctypes.pythonapi.PyErr_CheckSignals.argtypes = ()


def signal_mask() -> ctypes.Array[c_ulong]:
    """The signals that the calling thread has blocked."""
    mask = _SignalMask()
    _pthread_sigmask(_SIG_BLOCK, None, mask)
    return mask


def block_signals() -> None:
    """Block all signals in the calling thread."""
    _pthread_sigmask(_SIG_BLOCK, _ALL_SIGNALS, None)


def set_signal_mask(mask: ctypes.Array[c_ulong]) -> None:
    """Block these signals in the calling thread, and no others."""
    _pthread_sigmask(_SIG_SETMASK, mask, None)


def pthread_sigmask_unblock(signum: int) -> None:
    """Unblock a signal in the calling thread."""
    import signal  # a probe needs none of its enums

    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signum,))
