"""Work in a forked process, and in a memory cgroup."""

from __future__ import annotations

import faulthandler
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .races import eventually
from .requirements import missing
from .syscalls import answer


def in_child(work: Callable[[], Any]) -> Any:
    """`work`'s result, or its OSError, from a forked process; a signal's death is an assertion."""
    status, result = child_status(work)
    assert os.WIFEXITED(status), f"killed by signal {os.WTERMSIG(status)}"
    if isinstance(result, BaseException):
        raise result
    return result


def child_status(work: Callable[[], Any]) -> tuple[int, Any]:
    """How a forked process ended (as os.wait says), and what `work` gave or raised."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # a death by signal may be what is asked for
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  # it is raised again in the parent
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


@contextmanager
def in_cgroup() -> Iterator[Path]:
    """A new memory cgroup, for children to enter; what it still holds at the end is given up."""
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
