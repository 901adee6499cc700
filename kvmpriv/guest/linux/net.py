"""A network card for a Linux guest: virtio-net over a tap (VIRTIO 1.2, 5.1)."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ...errors import ArgumentError
from .tap import HEADER_SIZE
from .virtio import Chain, Queue, RingError, VirtioDevice

__all__ = ["Cable", "Net", "parse_mac"]

_F_CSUM, _F_MAC, _F_HOST_TSO4, _F_HOST_TSO6 = 1 << 0, 1 << 5, 1 << 11, 1 << 12
_PACKETS_AT_ONCE = 64
_MAC_SIZE, _MULTICAST, _LOCAL = 6, 0x01, 0x02


class Cable(Protocol):
    """What a card sends packets to and receives them from: a `Tap`, or another open file.

    A read returns one packet, a write sends one.  Each begins with struct virtio_net_hdr with
    num_buffers: 12 bytes, as TUNSETVNETHDRSZ sets it.  The descriptor does not block.
    """

    def fileno(self) -> int:
        """The descriptor."""
        ...

    def close(self) -> object:
        """Close it; the card calls this when its machine is closed."""
        ...


class _Borrowed:
    """A descriptor that stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        pass


def parse_mac(text: str) -> bytes:
    """``52:54:00:12:34:56`` as 6 bytes.  ArgumentError for anything else."""
    parts = text.split(":")
    with suppress(ValueError):
        if len(parts) == _MAC_SIZE and all(len(part) == 2 for part in parts):
            return _checked(bytes(int(part, 16) for part in parts))
    raise ArgumentError(
        f"{text!r} is not the MAC address of a card: write six bytes such as 52:54:00:12:34:56,"
        " the first of them even, not all of them 0"
    )


def _checked(mac: bytes) -> bytes:
    if len(mac) != _MAC_SIZE or mac[0] & _MULTICAST or not any(mac):
        raise ArgumentError(
            f"{mac.hex(':') or 'nothing'} is not the MAC address of a card: it has 6 bytes, the"
            " first of them even, not all of them 0"
        )
    return mac


def _random_mac() -> bytes:
    """A locally administered address.  Two guests have the same one by a chance of 1 in 2^46."""
    first, *rest = os.urandom(_MAC_SIZE)
    return bytes((first & ~_MULTICAST | _LOCAL, *rest))


class Net(VirtioDevice):
    """A network card.

    `cable` is a descriptor, which stays the caller's, or an object such as a `Tap`, which the card
    closes.  `mac` is the card's MAC address, 6 bytes; a random one if it is None.  `complain` is
    called with a line of text when the other end is gone; the guest then has a card without a
    cable.
    """

    device_id = 1
    name = "virtio-net"
    # The guest may leave checksums and the division into packets to the host's kernel: everything
    # that the guest sends costs an exit and a system call, and so there are fewer of them.
    features = _F_CSUM | _F_MAC | _F_HOST_TSO4 | _F_HOST_TSO6
    queue_count = 2
    bounced = 3 << 20  # a page for each entry of both rings, and a few pieces of 64 KiB
    _RECEIVE = 0

    def __init__(
        self,
        cable: Cable | int,
        complain: Callable[[str], object] = lambda text: None,
        *,
        mac: bytes | None = None,
    ) -> None:
        #: The card's MAC address.
        self.mac: bytes = _random_mac() if mac is None else _checked(mac)
        self.config: bytes = self.mac.ljust(64, b"\0")
        self._cable = _Borrowed(cable) if isinstance(cable, int) else cable
        self._complain = complain
        self._gone = False
        self._listening = False
        self._kept: Chain | None = None  # a buffer for the next packet

    def host_fd(self) -> int:
        """The descriptor, if the guest has a buffer for a packet; else -1."""
        return self._cable.fileno() if self._listening and not self._gone else -1

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
            chain = self._buffer(queue)
            self._listening = chain is not None
            if chain is None:
                return done
            if sum(map(len, chain.writable)) < HEADER_SIZE or chain.readable:
                raise RingError("offered a receive buffer smaller than the packet header")
            try:
                size = os.readv(self._cable.fileno(), chain.writable)
            except BlockingIOError:
                self._kept = chain
                return done
            _write_at(chain.writable, HEADER_SIZE - 2, b"\1\0")  # it is in one buffer (5.1.6.4)
            queue.push(chain, size)
            done = True
        return done

    def _buffer(self, queue: Queue) -> Chain | None:
        kept, self._kept = self._kept, None
        return kept if kept is not None else queue.pop()

    def _send(self, queue: Queue) -> bool:
        done = False
        while (chain := queue.pop()) is not None:
            if sum(map(len, chain.readable)) < HEADER_SIZE:
                raise RingError("sent a packet shorter than its header")
            # A packet that the tap does not take is lost, as on a cable (EINVAL: a bad header).
            with suppress(BlockingIOError, InterruptedError):
                try:
                    os.writev(self._cable.fileno(), chain.readable)
                except OSError as error:
                    if error.errno not in (_errno.EINVAL, _errno.EIO, _errno.ENOBUFS):
                        raise
            queue.push(chain, 0)
            done = True
        return done

    def close(self) -> None:
        self._cable.close()


def _write_at(parts: list[memoryview], at: int, data: bytes) -> None:
    """Write `data` at the offset `at` of the parts, as if they were one piece."""
    for part in parts:
        if at >= len(part):
            at -= len(part)
            continue
        piece = data[: len(part) - at]
        part[at : at + len(piece)] = piece
        data, at = data[len(piece) :], 0
        if not data:
            return
