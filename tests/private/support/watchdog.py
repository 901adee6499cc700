"""Two threads that repeat calls against each other, and a watchdog that finds a wedge.

A wedge is a call that does not end: it waits for ever, or it uses CPU time for ever.  A slow
machine is told from it by what the thread got: time in which it waited for a CPU does not count.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

#: A call that has made no progress for so many seconds, in which its thread could run, is wedged.
PATIENCE = 6.0
#: What ends a wedged call, if it can be interrupted; pytest-timeout and the wakeup use others.
SIGNAL = signal.SIGUSR2


class WedgeError(Exception):
    """A call did not end; the text has the calls under way and their kernel stacks."""


@dataclass
class Worker:
    """A thread that repeats `work` until `over`."""

    name: str
    work: Callable[[], object]
    over: threading.Event
    done: int = 0
    errors: list[BaseException] = field(default_factory=list)
    #: The thread's id in the kernel.
    number: int = 0
    thread: threading.Thread = field(init=False)
    _seen: tuple[int, float] = (0, 0.0)

    def start(self) -> None:
        self.thread = threading.Thread(target=self._repeat, daemon=True)
        self.thread.start()

    def _repeat(self) -> None:
        self.number = threading.get_native_id()
        try:
            while not self.over.is_set():
                self.work()
                self.done += 1
                time.sleep(0)  # let the other one have a lock that `work` takes
        except BaseException as error:  # noqa: BLE001  # raised again by race()
            self.errors.append(error)

    def stalled(self) -> float:
        """For how many seconds it has not ended a call, without those when it waited for a CPU."""
        now = time.monotonic() - self._waited()
        done, since = self._seen
        if done != self.done or not since or not self.thread.is_alive():
            self._seen = self.done, now
            return 0.0
        return now - since

    def _waited(self) -> float:
        try:
            text = Path(f"/proc/self/task/{self.number}/schedstat").read_text()
        except OSError:  # it has ended, or this kernel does not count it
            return 0.0
        return int(text.split()[1]) / 1e9

    def describe(self) -> str:
        """What it does: the call's name, its state, whether it uses CPU time, its kernel stack."""
        before = self._used() + self._waited()  # who waits for a CPU would use it
        time.sleep(0.3)
        how = "spins" if self._used() + self._waited() - before > 0.1 else "waits"
        try:
            stack = Path(f"/proc/self/task/{self.number}/stack").read_text()
        except OSError as error:
            stack = f"(no stack: {error})\n"
        return f"{self.name} {how} after {self.done} calls:\n{stack}"

    def _used(self) -> float:
        try:
            text = Path(f"/proc/self/task/{self.number}/stat").read_text()
        except OSError:
            return 0.0
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGNAL does nothing but end a call."""
    before = signal.signal(SIGNAL, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(SIGNAL, before)


def race(
    one: tuple[str, Callable[[], object]],
    other: tuple[str, Callable[[], object]],
    seconds: float,
    over: threading.Event,
    least: int = 3,
) -> tuple[int, int]:
    """Repeat two works in two threads for `seconds` and `least` rounds each; how many each did.

    `over` is set at the end, for works that wait.  WedgeError if a call does not end; a signal has
    then ended it if that is possible.  Main thread only.
    """
    over.clear()
    workers = [Worker(*one, over), Worker(*other, over)]
    with _interruptible():
        for worker in workers:
            worker.start()
        try:
            start = time.monotonic()
            while any(worker.thread.is_alive() for worker in workers):
                time.sleep(0.01)
                enough = time.monotonic() - start > seconds and all(
                    w.done >= least for w in workers
                )
                if enough or any(worker.errors for worker in workers):
                    over.set()
                if max(worker.stalled() for worker in workers) > PATIENCE:
                    raise WedgeError(_report(workers))
        finally:
            over.set()
            _end(workers)
    for worker in workers:
        if worker.errors:
            raise worker.errors[0]
    return workers[0].done, workers[1].done


def _report(workers: list[Worker]) -> str:
    names = " against ".join(worker.name for worker in workers)
    return f"{names}: a call does not end\n" + "".join(w.describe() for w in workers)


def _end(workers: list[Worker]) -> None:
    """Wait for the threads, and end their calls by a signal if they do not."""
    for attempt in range(100):
        for worker in workers:
            worker.thread.join(0.05 if attempt else 1)
        left = [worker for worker in workers if worker.thread.is_alive()]
        if not left:
            return
        for worker in left:
            if worker.thread.ident and max(worker.stalled(), attempt / 20) > 1:
                signal.pthread_kill(worker.thread.ident, SIGNAL)
    raise WedgeError(f"no signal ends the call\n{_report(left)}")
