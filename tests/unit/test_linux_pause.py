"""The gate at which the threads of a paused guest wait."""

from __future__ import annotations

import threading
import time

import pytest

from kvmpriv.guest.linux.pause import Gate


class Guest:
    """Threads that count while the gate is open, and how often each went to sleep there."""

    def __init__(self, threads: int) -> None:
        self.gate = Gate()
        self.counts = [0] * threads
        self.sleeps = 0
        self.over = False
        wait = self.gate._changed.wait

        def counted(timeout: float | None = None) -> bool:
            self.sleeps += 1
            return wait(timeout)

        self.gate._changed.wait = counted  # type: ignore[method-assign]
        self.threads = [
            threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self.over:
            self.counts[number] += 1
            self.gate.enter()
            time.sleep(0)

    def shut(self) -> None:
        self.gate.shut(self.threads, lambda: None)

    def end(self) -> None:
        self.over = True
        self.gate.open()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


def moves(guest: Guest) -> bool:
    """Whether each thread counts on, within ten seconds."""
    before = list(guest.counts)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if all(now > then for now, then in zip(guest.counts, before, strict=True)):
            return True
        time.sleep(0.001)
    return False


def test_waiting_threads_sleep() -> None:
    """Threads at a closed gate do not wake each other: a paused guest uses no CPU time."""
    guest = Guest(3)
    try:
        for _ in range(5):
            assert moves(guest)
            guest.shut()
            counts = list(guest.counts)
            time.sleep(0.05)  # the last one that has come may have woken the others
            sleeps = guest.sleeps
            time.sleep(0.2)
            assert guest.sleeps == sleeps
            assert guest.counts == counts
            guest.gate.open()
        assert guest.sleeps >= 5 * 3
    finally:
        guest.end()


def test_a_gate_that_is_shut_again_at_once() -> None:
    """A thread may not have left when the gate is shut again; it waits then, and is counted."""
    guest = Guest(2)
    try:
        for _ in range(200):
            guest.shut()
            guest.gate.open()
            guest.shut()
            counts = list(guest.counts)
            time.sleep(0.001)
            assert guest.counts == counts
            guest.gate.open()
        assert moves(guest)
    finally:
        guest.end()


def test_an_exception_opens_it() -> None:
    """After an exception in the middle of shutting the threads go on."""
    guest = Guest(2)
    still = threading.Event()
    never = threading.Thread(target=still.wait, daemon=True)
    never.start()

    def kick() -> None:
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            guest.gate.shut([*guest.threads, never], kick)
        assert not guest.gate.closed
        assert moves(guest)
    finally:
        still.set()
        guest.end()
