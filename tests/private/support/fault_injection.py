"""Allocations that fail on request: CONFIG_FAULT_INJECTION."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .requirements import missing

FAULT_INJECTION = Path("/sys/kernel/debug/failslab")


def require_fault_injection() -> None:
    """Skip the test if allocations can't be made to fail."""
    if not Path("/proc/self/make-it-fail").exists() or not os.access(FAULT_INJECTION, os.W_OK):
        missing("fault-injection", "no CONFIG_FAULT_INJECTION, CONFIG_FAILSLAB, debugfs, or root")


@contextmanager
def fault_injection(**settings: str) -> Iterator[None]:
    """Set up failslab and fail_page_alloc for allocations of every size and kind, quietly."""
    require_fault_injection()
    wanted = {"ignore-gfp-wait": "N", "verbose": "0", **settings}
    both = [(FAULT_INJECTION / name, value) for name, value in wanted.items()]
    pages = FAULT_INJECTION.parent / "fail_page_alloc"
    both += [(pages / name, wanted[name]) for name in ("ignore-gfp-wait", "verbose")]
    both += [(pages / "ignore-gfp-highmem", "N"), (pages / "min-order", "0")]
    before = [(path, path.read_text()) for path, _ in both]
    try:
        for path, value in both:
            path.write_text(value)
        yield
    finally:
        for path, text in before:
            path.write_text(text)


@contextmanager
def failing_allocations(**settings: str) -> Iterator[None]:
    """Every slab allocation of the kernel for this thread fails inside.

    With ``ignore-gfp-wait`` Y those that may wait for memory succeed.
    """
    more = {"task-filter": "Y", "probability": "100", "interval": "1", "times": "1000000"}
    more.update(settings)
    with fault_injection(**more):
        # Opened before: opening it allocates, too.
        marked = os.open(f"/proc/self/task/{threading.get_native_id()}/make-it-fail", os.O_RDWR)
        try:
            os.write(marked, b"1")
            yield
        finally:
            os.write(marked, b"0")
            os.close(marked)


class FailNth:
    """Make the n-th allocation of this thread fail, from the next call on: fail-nth in /proc."""

    def __init__(self) -> None:
        self._fd = os.open(f"/proc/self/task/{threading.get_native_id()}/fail-nth", os.O_RDWR)

    def start(self, number: int) -> None:
        """Make the allocation with this number fail, counted from 1."""
        os.pwrite(self._fd, b"%d" % number, 0)

    def stop(self) -> bool:
        """Whether a failure was injected; none is injected from now on."""
        left = os.pread(self._fd, 16, 0)
        os.pwrite(self._fd, b"0", 0)
        return int(left) == 0

    def close(self) -> None:
        os.close(self._fd)
