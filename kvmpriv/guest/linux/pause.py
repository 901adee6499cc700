"""The gate at which the threads of a guest wait while the guest is paused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

__all__ = ["Gate"]

_AGAIN = 0.05  # seconds between two kicks of a thread that has not come yet


class Gate:
    """Where threads wait while it is closed.  Any thread may call any method."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: set[threading.Thread] = set()
        #: Whether threads have to wait.
        self.closed: bool = False

    def enter(self) -> None:
        """Wait, in one of the threads, until the gate is open."""
        if not self.closed:
            return
        me = threading.current_thread()
        with self._changed:
            self._waiting.add(me)
            self._changed.notify_all()  # once: in the loop, two threads would wake each other
            while self.closed:
                self._changed.wait()
            self._waiting.discard(me)

    def shut(self, threads: Sequence[threading.Thread], kick: Callable[[], object]) -> None:
        """Close the gate, and return when each of `threads` waits there or has ended.

        `kick` is called until they have come.  RuntimeError in one of them; after any exception
        the gate is as it was.
        """
        if threading.current_thread() in threads:
            raise RuntimeError(
                "a thread of the guest can't pause it, as it would wait for itself: let a thread"
                " of yours do it"
            )
        with self._changed:
            before, self.closed = self.closed, True
            try:
                while any(each.is_alive() and each not in self._waiting for each in threads):
                    kick()
                    self._changed.wait(_AGAIN)
            except BaseException:
                self.closed = before
                self._changed.notify_all()
                raise

    def open(self) -> None:
        """Let the threads go on."""
        with self._changed:
            self.closed = False
            self._changed.notify_all()
