"""A shortage of the machine is told from a failure of the kernel: by the error and by the limit."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmpriv.selftest import shortage
from kvmpriv.selftest.shortage import Before, of_death, of_descriptors, of_error, of_time, waited

PLENTY = {
    "/proc/sys/fs/file-nr": "1000\t0\t9223372036854775807\n",
    "/proc/sys/vm/overcommit_memory": "0\n",
    "/proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nHugePages_Free: 0\n",
    "/proc/self/cgroup": "0::/some\n",
    "/sys/fs/cgroup/some/memory.current": "1000000\n",
    "/sys/fs/cgroup/some/memory.max": "max\n",
    "/proc/vmstat": "nr_free_pages 1\noom_kill 3\n",
}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of a host where nothing is short; a test changes some."""
    files = dict(PLENTY)
    monkeypatch.setattr(shortage, "_read", lambda path: files.get(path, ""))
    return files


@contextmanager
def limit(which: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def caused(error: BaseException, *, hidden: bool = False) -> BaseException:
    """Another error, which was raised while `error` was handled; `hidden`: instead of it."""
    try:
        try:
            raise error
        except type(error):
            if hidden:
                raise AssertionError("its own") from None
            raise AssertionError("its own")  # noqa: B904
    except AssertionError as outer:
        return outer


DESCRIPTORS = [
    (OSError(errno.EMFILE, "KVM_CREATE_VM"), ""),
    (OSError(errno.ENFILE, "x"), ""),
    (caused(OSError(errno.EMFILE, "x")), ""),
    (AssertionError(), "assert 'EMFILE' == 'EINVAL'"),
    (AssertionError(), "assert ('ok', 'ENFILE') == ('ok', 'ok')"),
    (None, "restrictedmem: memfd_restricted: Too many open files"),
]


@pytest.mark.parametrize(("error", "message"), DESCRIPTORS)
def test_descriptors(error: BaseException | None, message: str, host: dict[str, str]) -> None:
    """The same error is a failure of the kernel where descriptors are left."""
    few = shortage._FEW_DESCRIPTORS
    with limit(resource.RLIMIT_NOFILE, few):
        expected = f"descriptors: this process may have {few} open files: ulimit -n 1024"
        assert of_error(error, message) == expected
        assert of_descriptors() == expected
    with limit(resource.RLIMIT_NOFILE, few + 500):
        assert of_error(error, message) == ""
        host["/proc/sys/fs/file-nr"] = "9900 0 10000"
        assert of_error(error, message) == (
            "descriptors: this host may have 10000 open files: sysctl fs.file-max"
        )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EINVAL, "x"), "OSError: [Errno 22] x"),
        (AssertionError(), "assert 'EINVAL' == 'EMFILE'"),
        (AssertionError(), "assert 'ok' == 'ENOMEM'"),
        (AssertionError(), "assert 1 == 2"),
        (caused(OSError(errno.EMFILE, "x"), hidden=True), ""),
        (None, ""),
    ],
)
def test_what_is_no_shortage(
    error: BaseException | None, message: str, host: dict[str, str]
) -> None:
    """Another error, or one that the test expected, although every limit is low."""
    host["/proc/meminfo"] = "MemAvailable: 1 kB\n"
    with limit(resource.RLIMIT_NOFILE, shortage._FEW_DESCRIPTORS):
        assert of_error(error, message) == ""


MEMORY = [
    (MemoryError(), ""),
    (OSError(errno.ENOMEM, "mmap"), ""),
    (caused(MemoryError()), ""),
    (AssertionError(), "assert 'ENOMEM' == 'ok'"),
    (None, "OSError: [Errno 12] Cannot allocate memory"),
]


@pytest.mark.parametrize(("error", "message"), MEMORY)
def test_memory(error: BaseException | None, message: str, host: dict[str, str]) -> None:
    """The same error is a failure of the kernel where memory is left."""
    assert of_error(error, message) == ""
    for which, option in ((resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")):
        with limit(which, 1 << 43):
            assert of_error(error, message) == (
                f"memory: this process may use 8 TiB: ulimit {option} unlimited"
            )
    for path, text, expected in (
        ("/proc/meminfo", "MemAvailable: 1024 kB\n", "memory: this host has 1 MiB available"),
        (
            "/proc/sys/vm/overcommit_memory",
            "2\n",
            "memory: this host does not overcommit it: sysctl vm.overcommit_memory",
        ),
        (
            "/sys/fs/cgroup/some/memory.max",
            "2097152\n",
            "memory: this process's memory cgroup may use 2 MiB",
        ),
    ):
        host[path] = text
        assert of_error(error, message) == expected
        host[path] = PLENTY[path]
    assert of_error(error, message) == ""


def test_a_host_that_tells_nothing(host: dict[str, str]) -> None:
    host.clear()
    assert of_error(MemoryError(), "") == ""
    assert Before.now() == Before(0)
    assert of_death(Before.now(), -signal.SIGKILL, 1.0) == ""


def test_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time limit spent in the queue of a CPU is a shortage, less is none."""
    now: list[float | None] = [10.0]
    monkeypatch.setattr(shortage, "waited", lambda _: now[0])
    assert of_time(8.9, 1, 2.0) == (
        "CPU time: the test waited for a CPU for half of its 2 s, or longer"
    )
    assert of_time(9.1, 1, 2.0) == ""
    assert of_time(9.1, 1, 0.3) == "", "a short limit: any machine lets a process wait so long"
    assert of_time(None, 1, 2.0) == ""
    now[0] = None
    assert of_time(8.0, 1, 2.0) == ""


def test_waited() -> None:
    """The kernel's number, in seconds; it grows, and a process that is gone has none."""
    first = waited(os.getpid())
    assert first is not None
    second = waited(os.getpid())
    assert second is not None
    assert 0 <= first <= second < 1e6
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert waited(pid) is None


def test_a_process_that_was_killed(host: dict[str, str]) -> None:
    """By the kernel for memory, or at its limit of CPU time; for all else it has crashed."""
    before = Before.now()
    assert before == Before(3)
    assert of_death(before, -signal.SIGKILL, 1.0) == ""
    host["/proc/vmstat"] = "oom_kill 4\n"
    killed = "memory: the kernel killed the process, as the host or its cgroup had none left"
    assert of_death(before, -signal.SIGKILL, 1.0) == killed
    assert of_death(before, -signal.SIGSEGV, 1.0) == ""
    assert of_death(before, 1, 1.0) == ""
    with limit(resource.RLIMIT_CPU, 1000):
        for number in (signal.SIGXCPU, signal.SIGKILL):
            assert of_death(Before(4), -number, 999.5) == (
                "CPU time: a process may use 1000 s: ulimit -t unlimited"
            )
            assert of_death(Before(4), -number, 500) == ""
        assert of_death(Before(4), -signal.SIGSEGV, 999.5) == ""
    assert of_death(Before(4), -signal.SIGXCPU, sys.maxsize) == ""
