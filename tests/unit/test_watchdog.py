"""The watchdog of the suite's races: it finds calls that do not end, and ends them by a signal."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from kvmpriv.cdefs import kvm as k
from private.support import watchdog
from private.support.syscalls import address_of, answer, call
from private.support.watchdog import WedgeError, race


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE", 0.4)


def short() -> None:
    time.sleep(0.001)


def test_both_works_are_repeated() -> None:
    over = threading.Event()
    one, other = race(("one", short), ("other", short), 0.05, over)
    assert min(one, other) >= 3
    assert over.is_set()


def test_an_error_of_a_work_is_raised() -> None:
    def fails() -> None:
        raise OSError(22, "it failed")

    with pytest.raises(OSError, match="it failed"):
        race(("short", short), ("fails", fails), 5, threading.Event())


def read_from(fd: int) -> Callable[[], None]:
    """Reads from a pipe, to which nobody writes; a signal ends the call."""
    buffer = k.ffi.new("char[8]")

    def work() -> None:
        assert answer(lambda: call("read", fd, address_of(buffer), 1)) == "EINTR"

    return work


def test_a_call_that_waits_is_a_wedge() -> None:
    """The report has the name, how often it was done, and that it uses no CPU time."""
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(WedgeError) as wedge:
            race(("short", short), ("waiting", read_from(read_end)), 0.01, threading.Event())
    finally:
        os.close(read_end)
        os.close(write_end)
    text = str(wedge.value)
    assert text.startswith("short against waiting: a call does not end\n")
    assert "\nwaiting waits after 0 calls:\n" in text
    assert threading.active_count() == 1, "the signal has ended the call, and the thread"


def test_a_call_that_uses_cpu_time_is_a_wedge() -> None:
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            pass

    with pytest.raises(WedgeError, match="spinning spins after 0 calls"):
        race(("spinning", spin), ("short", short), 0.01, over)


def test_a_slow_call_is_no_wedge() -> None:
    """What ends now and then is slow, and the race waits until there were enough rounds."""
    done = race(("slow", lambda: time.sleep(0.2)), ("short", short), 0.01, threading.Event())
    assert done[0] >= 3
    assert done[1] > done[0]
