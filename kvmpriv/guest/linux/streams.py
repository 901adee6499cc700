"""The ways by which the agent of a guest may come; it chooses one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

__all__ = ["Stream", "Streams"]


class Stream(Protocol):
    """A stream of bytes to the agent: a `Port`, or a `Vsock`."""

    def send(self, data: bytes) -> object:
        """Send `data`, from any thread, without waiting."""
        ...


_S = TypeVar("_S", bound=Stream)


class Streams:
    """Several streams, of which the agent uses one: that which has brought the first bytes.

    `came` is called with the name of this one before `received` is called with its bytes, and
    `ended` at its end, or at that of any stream before the agent has chosen.
    """

    def __init__(
        self,
        received: Callable[[bytes], object],
        ended: Callable[[], object],
        came: Callable[[str], object],
    ) -> None:
        self._received, self._ended, self._came = received, ended, came
        self._lock = threading.RLock()  # a signal handler may send something
        self._streams: dict[str, Stream] = {}
        self._waiting: list[bytes] = []
        #: The name of the agent's stream; None until it is known.
        self.chosen: str | None = None

    def add(
        self, name: str, make: Callable[[Callable[[bytes], object], Callable[[], object]], _S]
    ) -> _S:
        """A stream that `make` makes, given what to call for its bytes and at its end."""
        made = make(partial(self._take, name), partial(self._end, name))
        self._streams[name] = made
        return made

    def send(self, data: bytes) -> None:
        """Send `data` to the agent, from any thread; before it has come, `data` waits for it."""
        with self._lock:
            if self.chosen is None:
                self._waiting.append(data)
            else:
                self._streams[self.chosen].send(data)

    def _take(self, name: str, data: bytes) -> None:
        if self.chosen is None:
            self._choose(name)
        if self.chosen == name:
            self._received(data)

    def _choose(self, name: str) -> None:
        with self._lock:
            if self.chosen is not None:
                return
            self.chosen = name
            for data in self._waiting:
                self._streams[name].send(data)
            self._waiting.clear()
        self._came(name)

    def _end(self, name: str) -> None:
        if self.chosen in (None, name):
            self._ended()
