"""A network card for a Linux guest: virtio-net, over a tap (VIRTIO 1.2, 5.1)."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable
from contextlib import suppress

from .tap import HEADER_SIZE, Tap
from .virtio import Chain, Queue, RingError, VirtioDevice

__all__ = ["Net"]

_F_CSUM, _F_MAC, _F_HOST_TSO4, _F_HOST_TSO6 = 1 << 0, 1 << 5, 1 << 11, 1 << 12
_MAC = bytes((0x02, 0x6B, 0x76, 0x6D, 0x00, 0x01))  # locally administered
_PACKETS_AT_ONCE = 64


class Net(VirtioDevice):
    """A network card whose cable ends in `tap`.

    `complain` is told when the tap is gone; the guest then has a card without a cable.
    """

    device_id = 1
    name = "virtio-net"
    # The guest may leave checksums and the cutting into packets to the host's kernel: each piece
    # it sends costs an exit and a call, and so there are fewer.
    features = _F_CSUM | _F_MAC | _F_HOST_TSO4 | _F_HOST_TSO6
    queue_count = 2
    bounced = 3 << 20  # a page for each entry of both rings, and a few pieces of 64 KiB
    config = _MAC.ljust(64, b"\0")
    _RECEIVE = 0

    def __init__(self, tap: Tap, complain: Callable[[str], object] = lambda text: None) -> None:
        self._tap = tap
        self._complain = complain
        self._gone = False
        self._listening = False
        self._kept: Chain | None = None  # room for a packet that has not come yet

    def host_fd(self) -> int:
        """What to wait for before queue 0 is served; -1 when there is no room for a packet."""
        return self._tap.fileno() if self._listening and not self._gone else -1

    def reset(self) -> None:
        self._listening = False
        self._kept = None

    def serve(self, number: int, queue: Queue) -> bool:
        if self._gone:
            return False
        try:
            return self._receive(queue) if number == self._RECEIVE else self._send(queue)
        except OSError as error:
            self._gone = True
            self._complain(f"{self.name}: the tap is gone: {os.strerror(error.errno or 0)}")
            return False

    def _receive(self, queue: Queue) -> bool:
        done = False
        for _ in range(_PACKETS_AT_ONCE):
            chain = self._room(queue)
            self._listening = chain is not None
            if chain is None:
                return done
            if sum(map(len, chain.writable)) < HEADER_SIZE or chain.readable:
                raise RingError("a place for a packet that holds none")
            try:
                size = os.readv(self._tap.fileno(), chain.writable)
            except BlockingIOError:
                self._kept = chain
                return done
            _write_at(chain.writable, HEADER_SIZE - 2, b"\1\0")  # it is in one piece (5.1.6.4)
            queue.push(chain, size)
            done = True
        return done

    def _room(self, queue: Queue) -> Chain | None:
        kept, self._kept = self._kept, None
        return kept if kept is not None else queue.pop()

    def _send(self, queue: Queue) -> bool:
        done = False
        while (chain := queue.pop()) is not None:
            if sum(map(len, chain.readable)) < HEADER_SIZE:
                raise RingError("a packet that is shorter than its header")
            # What the tap can't take is lost, as on a cable (EINVAL: a header that says nonsense).
            with suppress(BlockingIOError, InterruptedError):
                try:
                    os.writev(self._tap.fileno(), chain.readable)
                except OSError as error:
                    if error.errno not in (_errno.EINVAL, _errno.EIO, _errno.ENOBUFS):
                        raise
            queue.push(chain, 0)
            done = True
        return done

    def close(self) -> None:
        self._tap.close()


def _write_at(parts: list[memoryview], at: int, data: bytes) -> None:
    """Put `data` behind the first `at` bytes of what the parts are together."""
    for part in parts:
        if at >= len(part):
            at -= len(part)
            continue
        piece = data[: len(part) - at]
        part[at : at + len(piece)] = piece
        data, at = data[len(piece) :], 0
        if not data:
            return
