"""Work in a forked process, and in a memory cgroup."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .races import eventually
from .requirements import missing
from .syscalls import answer


def in_child(work: Callable[[], Any]) -> Any:
    """The result of `work` in a forked process, or what it raised; fails if a signal ends it."""
    status, result = child_status(work)
    assert os.WIFEXITED(status), f"killed by signal {os.WTERMSIG(status)}"
    if isinstance(result, BaseException):
        raise result
    return result


def child_status(work: Callable[[], Any]) -> tuple[int, Any]:
    """The wait status of a forked process, and what `work` returned or raised in it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # the test may want the process to die by a signal
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  # raised again in the parent
            result = error
        try:
            os.write(write_end, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    return status, pickle.loads(data) if data else None


def killed_after(
    work: Callable[[Callable[[], None]], object], seconds: float, most: float
) -> float:
    """How long a process that does `work` lives on after SIGKILL, in seconds; `most` if longer.

    `work` gets a function that it calls when it is ready; the signal comes `seconds` later.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        os.close(read_end)
        try:
            work(lambda: os.close(write_end))
        finally:
            os._exit(1)
    os.close(write_end)
    os.read(read_end, 1)  # it is ready, or it has ended
    os.close(read_end)
    time.sleep(seconds)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the process has ended by itself"
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    if not eventually(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, most):
        return most
    return time.monotonic() - start


@contextmanager
def in_cgroup() -> Iterator[Path]:
    """A new memory cgroup, for child processes; it is removed at the end."""
    top = Path("/sys/fs/cgroup")
    try:
        if "memory" not in (top / "cgroup.subtree_control").read_text().split():
            missing("memory-cgroup", "the memory controller is not enabled below the root")
        group = top / f"kvmpriv-{os.getpid()}-{time.monotonic_ns()}"
        group.mkdir()
    except OSError as error:
        missing("memory-cgroup", str(error))
    try:
        yield group
    finally:
        assert eventually(lambda: answer(group.rmdir) != "EBUSY"), f"{group} is in use"
