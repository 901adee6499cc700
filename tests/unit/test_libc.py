"""The calls of the C library: what they return, and that they preserve errno."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator

import pytest

from kvmpriv import libc

NO_FD = 1 << 30


@pytest.fixture(autouse=True)
def errno_of_an_interrupted_call() -> Iterator[None]:
    """What the code that a signal handler has interrupted is about to read."""
    libc.set_errno(errno.EXDEV)
    yield
    assert libc.last_errno() == errno.EXDEV


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: libc.syscall(1 << 20), errno.ENOSYS),
        (lambda: libc.syscall(3, NO_FD), errno.EBADF),  # close
        (lambda: libc.fallocate(NO_FD, 0, 0, 4096), errno.EBADF),
        (lambda: libc.fstatfs_type(NO_FD), errno.EBADF),
        (lambda: libc.unshare(1), errno.EINVAL),
        (lambda: libc.copy_out(1, 1, 1), errno.EFAULT),
        (lambda: libc.copy_in(1, 1, 1), errno.EFAULT),
        (lambda: libc.tgkill(1, 0), errno.ESRCH),
    ],
    ids=["syscall", "close", "fallocate", "fstatfs", "unshare", "copy_out", "copy_in", "tgkill"],
)
def test_a_failure_is_a_negated_errno(call: Callable[[], int], expected: int) -> None:
    assert call() == -expected


def test_failures_that_raise() -> None:
    with pytest.raises(OSError, match=r"sigaction\(1000\)") as refused:
        libc.signal_ignored_in_c(1000)
    assert refused.value.errno == errno.EINVAL
    assert libc.soft_limit(1000) is None


def test_copies_within_this_process() -> None:
    one, other = ctypes.create_string_buffer(b"from here"), ctypes.create_string_buffer(16)
    at, there = ctypes.addressof(one), ctypes.addressof(other)
    assert libc.copy_out(at, 4, there) == 4
    assert libc.copy_in(there + 4, 5, at + 4) == 5
    assert other.value == b"from here"


def test_success(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert libc.syscall(39) > 1  # getpid
    with (tmp_path_factory.mktemp("libc") / "file").open("wb") as file:
        assert libc.fallocate(file.fileno(), 0, 0, 8192) == 0
        assert file.seek(0, 2) == 8192
        assert libc.fstatfs_type(file.fileno()) > 0
