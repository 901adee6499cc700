"""Two threads against each other, and limits on what must end soon."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: The least number of rounds of a race, on any machine.
ROUNDS = 12


#: The seconds after which a race that has not met its condition fails.
PATIENCE = 60


def rounds(
    most: int, seconds: float = 4, least: int = ROUNDS, until: Callable[[], object] = lambda: True
) -> Iterator[int]:
    """Yield 0, 1, … up to `most` rounds, or until `seconds` and `least` rounds are over.

    Then go on until `until` is true, which says that the threads have met; fail after PATIENCE.
    """
    start = time.monotonic()
    for turn in itertools.count():
        late = time.monotonic() - start
        if turn >= most or (turn >= least and late > seconds):
            if until():
                return
            assert late < PATIENCE, f"the threads have not met in {turn} rounds"
        yield turn


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[list[int]]:
    """Repeat `work` in another thread meanwhile; the list holds how often it was done."""
    over = threading.Event()
    done, errors = [0], []

    def repeat() -> None:
        try:
            while not over.is_set():
                work()
                done[0] += 1
                time.sleep(0)  # let a thread have a lock that `work` takes
        except BaseException as error:  # noqa: BLE001  # raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join(60)
    assert not thread.is_alive(), "the thread did not end"
    if errors:
        raise errors[0]


class CpuTimeError(Exception):
    """The time limit of within_cpu_time was exceeded."""


@contextmanager
def within_cpu_time(seconds: float) -> Iterator[None]:
    """Raise CpuTimeError if this takes more CPU time; main thread only.

    A vCPU that spins in the kernel uses CPU time; one that waits on a slow machine does not.
    """

    def stop(*_: object) -> None:
        raise CpuTimeError(f"more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def eventually(check: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether `check` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
