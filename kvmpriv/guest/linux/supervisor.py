"""The loop of the thread that calls `LinuxMachine.run`: the console, and when to end the guest."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from .outcome import EXIT_STATUSES, Ending, Outcome

__all__ = ["Console", "Input", "Periodic", "Supervisor"]

_PANIC = b"Kernel panic - not syncing: "
#: What to do after a panic that is a wrong choice of files: words of the kernel -> advice.
_ADVICE = {
    "VFS: Unable to mount root fs": "give a disk with a file system, its name as root=, and a"
    " kernel with virtio_mmio, virtio_blk and the file system's driver: built in, or as modules"
    " of the initrd that belongs to it",
    "No working init found": "the root file system must have /sbin/init, the initrd /init",
}
_PANIC_GRACE = 5.0  # seconds that a kernel which has panicked has to reset the machine itself
_TICK = 0.02  # seconds between two writes while the guest prints
_INPUT_TICK = 0.05  # seconds between two looks at whether the guest has read its input
_OUTPUT_MAX = 64 << 10  # bytes; a vCPU that prints more has to wait
_LINE_MAX = 4096
_NEVER = float("inf")
_PROGRESS_EVERY = 0.5  # seconds between two checks for progress


class Input(Protocol):
    """Where the console's input comes from."""

    def fileno(self) -> int:
        """A descriptor that is readable when `read` has something to return."""
        ...

    def read(self) -> bytes | None:
        """Bytes for the guest; None at the end of the input."""
        ...


class Console(Protocol):
    """Where the console's input goes."""

    def receive(self, data: bytes) -> None:
        """Let the guest receive `data`."""
        ...

    def pending(self) -> int:
        """How many bytes the guest has not read yet."""
        ...


class Periodic:
    """A function to call every `every` seconds, the first time at once."""

    def __init__(self, call: Callable[[], object], every: float) -> None:
        self.call = call
        self.every = every
        self.due: float = 0.0


class Supervisor:
    """Passes the console's bytes on, and ends a guest whose time is up or that can't get on.

    `output` is called in the thread that calls `run`, with the bytes the guest has printed.
    `stuck` returns why the guest will make no progress, or ""; it is asked until the guest has
    printed something.
    """

    def __init__(
        self, ending: Ending, output: Callable[[bytes], object], stuck: Callable[[], str]
    ) -> None:
        self._ending = ending
        self._output = output
        self._stuck = stuck
        #: Called before `output`, with the same bytes.
        self.observe: Callable[[bytes], object] = lambda data: None
        #: Called when `output` has taken what waited for it.
        self.drained: Callable[[], object] = lambda: None
        #: Whether `put` returns at once, however much waits for `output`.
        self.unlimited: bool = False
        self._pending = bytearray()
        self._alerted = False
        self._output_failed = False
        self._drained = threading.Event()
        self._last_line = b""
        self._panic = ""
        self._panicked_at = 0.0

    # -- in the vCPUs' threads -----------------------------------------------------------------

    def put(self, value: int) -> None:
        """Take a byte of the console; blocks while too many of them wait for `output`."""
        self._pending.append(value)
        if not self._alerted:
            self._alerted = True
            self._ending.alert()
        while (
            len(self._pending) >= _OUTPUT_MAX
            and self._ending.outcome is None
            and not self.unlimited
        ):
            self._drained.clear()
            self._drained.wait(0.05)

    # -- in the thread of the devices ----------------------------------------------------------

    def put_all(self, data: bytes) -> None:
        """Take bytes of the console, without waiting; see `has_room`."""
        self._pending += data
        if not self._alerted:
            self._alerted = True
            self._ending.alert()

    def has_room(self) -> bool:
        """Whether more bytes should come; `drained` is called when there is room again."""
        return len(self._pending) < _OUTPUT_MAX

    # -- in the thread that calls run ----------------------------------------------------------

    def watch(
        self,
        is_over: Callable[[], bool],
        console: Console,
        source: Input | None,
        timeout: float | None,
        calls: Sequence[Periodic],
    ) -> None:
        """Return when the guest has an outcome, or `is_over` returns True after a wake-up.

        Raises what `output`, `source` and `calls` raise.
        """
        started = time.monotonic()
        deadline = _NEVER if timeout is None else started + timeout
        check_at = started + _PROGRESS_EVERY
        poll = select.poll()
        wake = self._ending.wake.fileno()
        poll.register(wake, select.POLLIN)
        listening = False
        while self._ending.outcome is None and not is_over():
            if source is not None and listening != (console.pending() < _OUTPUT_MAX):
                listening = not listening
                if listening:
                    poll.register(source.fileno(), select.POLLIN)
                else:
                    poll.unregister(source.fileno())
            now = time.monotonic()
            for periodic in calls:
                if now >= periodic.due:
                    periodic.call()
                    periodic.due = now + periodic.every
            until = min(deadline, check_at, *(periodic.due for periodic in calls))
            if self._alerted:
                until = min(until, now + _TICK)
            if self._panic:
                until = min(until, self._panicked_at + _PANIC_GRACE)
            if source is not None and not listening:
                until = min(until, now + _INPUT_TICK)
            wait = None if until == _NEVER else max(0.0, until - now) * 1000
            ready = [fd for fd, _ in poll.poll(wait)]
            if wake in ready:
                with suppress(BlockingIOError):
                    os.eventfd_read(wake)
            if source is not None and listening and source.fileno() in ready:
                data = source.read()
                if data is None:
                    poll.unregister(source.fileno())
                    source = None
                else:
                    console.receive(data)
            self._flush_or_rest()
            if self._last_line:
                check_at = _NEVER
            self._check(time.monotonic(), deadline, check_at)
            if time.monotonic() >= check_at:
                check_at += _PROGRESS_EVERY

    def release(self) -> None:
        """Let a vCPU that waits for room for its output go on."""
        self._drained.set()

    def _flush_or_rest(self) -> None:
        if self._pending:
            self.flush()
        else:
            self._alerted = False
            if self._pending:  # a byte came before its thread could see that we wait for an alert
                self._alerted = True

    def flush(self) -> None:
        """Give `output` what the guest has printed; nothing more once it has raised."""
        size = len(self._pending)
        data = bytes(self._pending[:size])
        del self._pending[:size]
        self._drained.set()
        if data and not self._output_failed:
            self._look_for_panic(data)
            self.observe(data)
            self.drained()
            try:
                self._output(data)
            except Exception:  # but not what a signal handler raises
                self._output_failed = True
                raise

    def _look_for_panic(self, data: bytes) -> None:
        if self._panic:
            return
        lines = self._last_line + data
        at = lines.find(_PANIC)
        if at >= 0 and b"\n" in lines[at:]:
            self._panic = lines[at:].split(b"\n", 1)[0].decode(errors="replace").strip()
            self._panicked_at = time.monotonic()
        self._last_line = lines[max(0, at) if at >= 0 else -len(_PANIC) :][-_LINE_MAX:]

    def _check(self, now: float, deadline: float, check_at: float) -> None:
        """End a guest whose time is up, that has panicked, or that makes no progress."""
        if now >= deadline:
            why = "the time limit is reached"
            self._ending.end(Outcome("timeout", EXIT_STATUSES["timeout"], why))
        elif self._panic and now >= self._panicked_at + _PANIC_GRACE:
            self._ending.end(self._panicked())
        elif now >= check_at and (why := self._stuck()):
            self._ending.end(Outcome("no progress", EXIT_STATUSES["no progress"], why))

    def _panicked(self) -> Outcome:
        advice = [text for words, text in _ADVICE.items() if words in self._panic]
        return Outcome("panic", EXIT_STATUSES["panic"], "; ".join([self._panic, *advice]))

    def judge(self, outcome: Outcome) -> Outcome:
        """The outcome for the caller: a kernel that resets or crashes after a panic has panicked.

        It resets the machine by whatever way works.
        """
        return self._panicked() if self._panic and outcome.how in ("reset", "crash") else outcome
