"""System calls by name, their constants, and the errno that each returned."""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmpriv import libc
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k

if TYPE_CHECKING:
    from kvmpriv.fd import Fd

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE = 1, 2
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64
HOLE = PUNCH_HOLE | KEEP_SIZE
AT_FDCWD, AT_EMPTY_PATH, AT_SYMLINK_FOLLOW = -100, 0x1000, 0x400

#: Numbers (x86-64) of system calls that Python lacks, or precedes with a stat(2).
NUMBERS = {
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "mremap": 25,
    "madvise": 28,
    "pread64": 17,
    "pwrite64": 18,
    "readv": 19,
    "writev": 20,
    "read": 0,
    "write": 1,
    "sendfile": 40,
    "fcntl": 72,
    "mlock": 149,
    "munlock": 150,
    "fsetxattr": 190,
    "fgetxattr": 193,
    "readahead": 187,
    "fadvise64": 221,
    "mbind": 237,
    "set_mempolicy": 238,
    "get_mempolicy": 239,
    "linkat": 265,
    "splice": 275,
    "sync_file_range": 277,
    "vmsplice": 278,
    "move_pages": 279,
    "preadv": 295,
    "pwritev": 296,
    "syncfs": 306,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "execveat": 322,
    "userfaultfd": 323,
    "copy_file_range": 326,
    "preadv2": 327,
    "pwritev2": 328,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
}
#: An address that is not canonical.
NOWHERE = 1 << 63


def errno_of(number: int) -> str:
    """The name of an errno; "ok" for 0."""
    if number == _errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # errno.errorcode has its other name
    if number == gm.EHWPOISON:
        return "EHWPOISON"  # errno.errorcode lacks it
    return _errno.errorcode.get(number, str(number)) if number else "ok"


def answer(call: Callable[..., Any]) -> str:
    """The kernel's answer: "ok", or the name of the errno."""
    try:
        call()
    except OSError as error:
        return errno_of(error.errno or 0)
    return "ok"


def call(name: str, *arguments: int) -> int:
    """Make a system call by name; OSError if it fails."""
    result = libc.syscall(NUMBERS[name], *arguments)
    if result < 0:
        raise libc.os_error(-result, name)
    return result


def fallocate(file: Fd | int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); OSError if it fails."""
    number = file if isinstance(file, int) else file.fileno()
    if error := libc.fallocate(number, mode, offset, length):
        raise libc.os_error(-error, "fallocate")


def address_of(buffer: Any) -> int:
    """The address of a cffi object."""
    return int(k.ffi.cast("uintptr_t", buffer))


def vector_of(address: int, size: int = PAGE) -> Any:
    """A struct iovec of one range."""
    return k.ffi.new("__u64[2]", (address, size))
