"""Operations to try on any file descriptor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from kvmpriv.cdefs import kvm as k

from .processes import in_child
from .rules import rule
from .syscalls import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_SYMLINK_FOLLOW,
    MAP_PRIVATE,
    MAP_SHARED,
    NOWHERE,
    PAGE,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    address_of,
    call,
)


def _with_buffer(name: str, *, length: int = 8, offset: int | None = 0) -> Callable[[int], Any]:
    def operation(fd: int) -> Any:
        buffer = k.ffi.new("char[8]")
        more = () if offset is None else (offset,)
        return call(name, fd, address_of(buffer), length, *more)

    return operation


def _vectored(name: str, *more: int) -> Callable[[int], Any]:
    def operation(fd: int) -> Any:
        buffer = k.ffi.new("char[8]")
        vector = k.ffi.new("__u64[2]", (address_of(buffer), 8))
        return call(name, fd, address_of(vector), 1, *more)

    return operation


def mapping(prot: int, flags: int, size: int = PAGE) -> Callable[[int], None]:
    """An operation that maps the file, and unmaps it again."""

    def operation(fd: int) -> None:
        call("munmap", call("mmap", 0, size, prot, flags, fd, 0), size)

    return operation


def _between(name: str, *, out: bool, kind: str) -> Callable[[int], Any]:
    """An operation that moves 8 bytes between the file and a pipe or another file."""

    def operation(fd: int) -> Any:
        if kind == "pipe":
            read_end, write_end = os.pipe()
            ends = [read_end, write_end]
            os.write(write_end, b"12345678")
            other = write_end if out else read_end
        else:
            other = os.memfd_create("other")
            ends = [other]
            os.pwrite(other, b"12345678", 0)
        try:
            if name == "sendfile":
                return call(name, *((other, fd) if out else (fd, other)), 0, 8)
            source, target = (fd, other) if out else (other, fd)
            return call(name, source, 0, target, 0, 8, 0)
        finally:
            for end in ends:
                os.close(end)

    return operation


def _epoll(fd: int) -> None:
    import select

    with select.epoll() as epoll:
        epoll.register(fd)


def _linkat(fd: int) -> None:
    paths = k.ffi.new("char[]", f"/proc/self/fd/{fd}".encode()), k.ffi.new("char[]", b"/tmp/linked")
    call(
        "linkat", AT_FDCWD, address_of(paths[0]), AT_FDCWD, address_of(paths[1]), AT_SYMLINK_FOLLOW
    )


def _fexecve(fd: int) -> None:
    def execute() -> None:
        empty = k.ffi.new("char[]", b"")
        call("execveat", fd, address_of(empty), 0, 0, AT_EMPTY_PATH)

    in_child(execute)


def _reopen(flags: int) -> Callable[[int], None]:
    return lambda fd: os.close(os.open(f"/proc/self/fd/{fd}", flags))


def _xattr(name: str) -> Callable[[int], Any]:
    def operation(fd: int) -> Any:
        key = k.ffi.new("char[]", b"user.kvmpriv")
        value = k.ffi.new("char[8]")
        return call(name, fd, address_of(key), address_of(value), 8, 0)

    return operation


def _flock(fd: int) -> None:
    import fcntl

    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _seals(request: int) -> Callable[[int], Any]:
    return lambda fd: call("fcntl", fd, request, 1 if request == 1033 else 0)


#: Name -> the operation on a descriptor; it raises OSError if the kernel refuses.
OPERATIONS: dict[str, Callable[[int], Any]] = {
    "read": _with_buffer("read", offset=None),
    "read.empty": _with_buffer("read", length=0, offset=None),
    "read.bad_pointer": lambda fd: call("read", fd, NOWHERE, 8),
    "write": _with_buffer("write", offset=None),
    "write.empty": _with_buffer("write", length=0, offset=None),
    "write.bad_pointer": lambda fd: call("write", fd, NOWHERE, 8),
    "readv": _vectored("readv"),
    "writev": _vectored("writev"),
    "pread": _with_buffer("pread64"),
    "pread.negative": _with_buffer("pread64", offset=-1),
    "pwrite": _with_buffer("pwrite64"),
    "pwrite.negative": _with_buffer("pwrite64", offset=-1),
    "preadv": _vectored("preadv", 0, 0),
    "pwritev": _vectored("pwritev", 0, 0),
    "preadv2.current": _vectored("preadv2", -1, -1, 0),
    "pwritev2.current": _vectored("pwritev2", -1, -1, 0),
    "lseek": lambda fd: call("lseek", fd, 0, os.SEEK_SET),
    "lseek.end": lambda fd: call("lseek", fd, 0, os.SEEK_END),
    "lseek.data": lambda fd: call("lseek", fd, 0, os.SEEK_DATA),
    "lseek.bad_whence": lambda fd: call("lseek", fd, 0, 77),
    "mmap.shared": mapping(PROT_READ | PROT_WRITE, MAP_SHARED),
    "mmap.shared.read": mapping(PROT_READ, MAP_SHARED),
    "mmap.private": mapping(PROT_READ | PROT_WRITE, MAP_PRIVATE),
    "mmap.private.read": mapping(PROT_READ, MAP_PRIVATE),
    "mmap.none": mapping(PROT_NONE, MAP_SHARED),
    "mmap.shared.exec": mapping(PROT_READ | PROT_EXEC, MAP_SHARED),
    "mmap.private.exec": mapping(PROT_READ | PROT_EXEC, MAP_PRIVATE),
    "sendfile.from": _between("sendfile", out=True, kind="file"),
    "sendfile.to": _between("sendfile", out=False, kind="file"),
    "splice.from": _between("splice", out=True, kind="pipe"),
    "splice.to": _between("splice", out=False, kind="pipe"),
    "copy_file_range.from": _between("copy_file_range", out=True, kind="file"),
    "copy_file_range.to": _between("copy_file_range", out=False, kind="file"),
    "linkat": _linkat,
    "epoll": _epoll,
    "fexecve": _fexecve,
    "xattr.set": _xattr("fsetxattr"),
    "xattr.get": _xattr("fgetxattr"),
    "seals.add": _seals(1033),
    "seals.get": _seals(1034),
    "fsync": os.fsync,
    "fdatasync": os.fdatasync,
    "open": _reopen(os.O_RDWR),
    "open.read": _reopen(os.O_RDONLY),
    "open.path": _reopen(os.O_PATH),
    "fchmod": lambda fd: os.fchmod(fd, 0o600),
    "fchown": lambda fd: os.fchown(fd, os.geteuid(), os.getegid()),
    "futimens": os.utime,
    "flock": _flock,
    "syncfs": lambda fd: call("syncfs", fd),
    "fadvise": lambda fd: call("fadvise64", fd, 0, PAGE, 4),
}


def operations(prefix: str, table: dict[str, str]) -> pytest.MarkDecorator:
    """Parametrize a test by the operations in `table`: answer -> names separated by blanks."""
    rows = [
        pytest.param(OPERATIONS[name], expected, id=name, marks=rule(f"{prefix}.{name}"))
        for expected, names in table.items()
        for name in names.split()
    ]
    return pytest.mark.parametrize(("operation", "expected"), rows)
