"""How a Linux guest ends, and the object that every part of its machine reports the end to."""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

from ...exit_status import ExitStatus
from ...fd import Fd

__all__ = ["EXIT_STATUSES", "Ending", "Interrupted", "Outcome", "crashed"]

#: How a guest can end other than by a status of its own, and the exit status for a shell.
EXIT_STATUSES = {
    "no progress": ExitStatus.NO_PROGRESS,
    "timeout": ExitStatus.TIMEOUT,
    "crash": ExitStatus.CRASH,
    "panic": ExitStatus.PANIC,
}


class Outcome(NamedTuple):
    """How a guest ended.

    `how` is "exit" (the guest wrote to port 0xf4), "off" (it turned itself off), "reset", "panic",
    "crash", "timeout" or "no progress", or what the caller of `LinuxMachine.end` chose.
    """

    how: str
    #: For a shell: 0 to 255.
    status: int
    #: One or more lines for a person.
    why: str


def crashed(why: str) -> Outcome:
    """The outcome of a guest that can't go on."""
    return Outcome("crash", EXIT_STATUSES["crash"], why)


class Interrupted(BaseException):
    """Ends `LinuxMachine.run`, which stops the guest and returns `outcome`.

    For signal handlers, and for what `run` calls: `output`, `look` and the console's `source`.
    """

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.why)
        self.outcome = outcome


class Ending:
    """The end of a guest: the first outcome that is reported counts.

    Every thread, and a signal handler, may report one.  The thread in `LinuxMachine.run` waits for
    `wake` to become readable.
    """

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        #: An eventfd.
        self.wake: Fd = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        # Re-entrant: a signal handler may end the guest while this thread is here.
        self._lock = threading.RLock()

    def end(self, outcome: Outcome) -> None:
        """The guest is to end with `outcome`, unless an earlier outcome was reported."""
        with self._lock:
            if self.outcome is None:
                self.outcome = outcome
            self.alert()

    def alert(self) -> None:
        """Wake the thread in `LinuxMachine.run`.  Without effect after close."""
        with self._lock:  # the number may not go to another file between the check and the write
            if not self.wake.closed:
                os.eventfd_write(self.wake.fileno(), 1)

    def close(self) -> None:
        with self._lock:
            self.wake.close()
