"""The kernel's complaints are assigned to the test that caused them; a stand-in for /dev/kmsg."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvmpriv.selftest import kernel_log, report
from kvmpriv.selftest.documents import HostAbout
from kvmpriv.selftest.kernel_log import KernelLog
from kvmpriv.selftest.runner import Plan
from private import conftest

WARNING = "WARNING: CPU: 0 PID: 63 at foo+0xa/0x10"
Write = Callable[[str], object]


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a record to the stand-in, which returns one record per read, as /dev/kmsg does."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs, ours:
        ours.setblocking(False)

        def seek(fd: int, position: int, how: int) -> None:
            assert (fd, position, how) == (ours.fileno(), 0, os.SEEK_END)
            with suppress(BlockingIOError):
                while ours.recv(1 << 14):
                    pass

        monkeypatch.setattr(os, "lseek", seek)
        monkeypatch.setattr(conftest.KERNEL_LOG, "_fd", ours.fileno())
        yield lambda record: theirs.send(record.encode())


@contextmanager
def a_test() -> Iterator[None]:
    """The body of a test, inside the suite's own fixtures."""
    fixture: Any = conftest.untainted
    around = fixture.__wrapped__()
    next(around)
    yield
    assert next(around, "the end") == "the end"


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (f"4,12,345,-;{WARNING}\n", True),
        (f"4,12,345,-,caller=T63;{WARNING}\n SUBSYSTEM=cpu\n DEVICE=+cpu:0\n", True),
        (r"3,12,345,-;==\x0aBUG: KASAN: slab-use-after-free in foo", True),
        (f"12,12,345,-;{WARNING}\n", False),  # a daemon's
        ("6,12,345,-;device\n WARNING: not a message\n", False),
        ("6,12,345,-;traps: python3[12] general protection fault ip:1 sp:2 error:0\n", False),
    ],
)
def test_a_complaint_fails_the_test_it_came_in(write: Write, record: str, told: bool) -> None:
    """Also on a kernel that is tainted already, whose taint does not change."""
    write(record)
    with a_test():
        write("6,13,346,-;all is well\n")
    if not told:
        with a_test():
            write(record)
        return
    with pytest.raises(AssertionError, match=r"the kernel complained: (WARNING|BUG): "), a_test():
        write(record)
    with a_test():
        pass


def test_records_that_are_overwritten(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports the loss once; later records are read."""
    read, errors = os.read, [BrokenPipeError()]

    def lose(fd: int, size: int) -> bytes:
        if errors:
            raise errors.pop()
        return read(fd, size)

    monkeypatch.setattr(os, "read", lose)
    write(f"4,12,345,-;{WARNING}\n")
    assert conftest.KERNEL_LOG.complaints() == [WARNING]


def test_a_log_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning is printed only on a kernel that is tainted already."""
    taint = tmp_path / "tainted"
    monkeypatch.setattr(kernel_log, "TAINT", taint)
    log = KernelLog(str(tmp_path / "none"))
    log.mark()
    assert log.complaints() == []
    taint.write_text("0\n")
    assert log.unseen() == ""
    taint.write_text("512\n")
    note = log.unseen()
    assert note.startswith("the kernel is tainted (512) and /dev/kmsg can't be read: ")
    assert KernelLog(str(taint)).unseen() == ""
    monkeypatch.setattr(conftest, "KERNEL_LOG", log)
    assert conftest.pytest_report_header() == [note]
    host: HostAbout = {
        "release": "x", "version": "x", "machine": "x", "kvmpriv": "x", "verdict": "x", "abis": [],
    }  # fmt: skip
    assert report.heading(host, note).splitlines()[1] == note
    assert report.ktap_plan(Plan((), host, {}), note).splitlines()[2] == f"# {note}"


def test_the_log_is_closed(tmp_path: Path, no_leak: object) -> None:
    """After close(), by hand or at the end of `with`, there is nothing to read."""
    path = tmp_path / "log"
    path.write_text(f"4,12,345,-;{WARNING}\n")
    with KernelLog(str(path)) as log:
        record = os.read(log._fd, 1 << 14)
        assert WARNING.encode() in record
    assert log.complaints() == []
    log.mark()
    log.close()
