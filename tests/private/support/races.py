"""Two threads against each other, and limits on what must end soon."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: How many rounds of a race there are at least, however slow the machine.
ROUNDS = 12


#: How long a race goes on, in seconds, for what has to be seen of it.
PATIENCE = 60


def rounds(
    most: int, seconds: float = 4, least: int = ROUNDS, until: Callable[[], object] = lambda: True
) -> Iterator[int]:
    """0, 1, … below `most`, or until time is up and `least` rounds are over.

    And as many more as it takes for `until` to say that the race has been one: not for ever.
    """
    start = time.monotonic()
    for turn in itertools.count():
        late = time.monotonic() - start
        if turn >= most or (turn >= least and late > seconds):
            if until():
                return
            assert late < PATIENCE, f"not met in {turn} rounds"
        yield turn


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[list[int]]:
    """`work` goes on in another thread, again and again; the list says how often it was done."""
    over = threading.Event()
    done, errors = [0], []

    def repeat() -> None:
        try:
            while not over.is_set():
                work()
                done[0] += 1
                time.sleep(0)  # whoever waits for a lock that `work` takes may have it
        except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
            errors.append(error)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join(60)
    assert not thread.is_alive(), "stuck"
    if errors:
        raise errors[0]


class CpuTimeError(Exception):
    """What was to end soon has not."""


@contextmanager
def within_cpu_time(seconds: float) -> Iterator[None]:
    """CpuTimeError when more CPU time than that is used inside; for the main thread.

    A vCPU that spins in the kernel uses it up; one on a slow machine does not.
    """

    def stop(*_: object) -> None:
        raise CpuTimeError(f"{seconds} s of CPU time are gone")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def eventually(check: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether `check` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
