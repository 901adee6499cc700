"""A port of a virtio console: a stream of bytes between a program in the guest and this process.

VIRTIO 1.2, 5.3.  Linux makes a character device of it, /dev/vportNpM, which carries any byte.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ...fd import Fd
from .virtio import EVENT_INDEX, INDIRECT, Chain, Queue, RingError, VirtioDevice

__all__ = ["Console", "Port"]

_F_MULTIPORT = 1 << 1  # a port that is not a terminal, and its name
_CONFIG = struct.Struct("<HHII")  # columns, rows, ports, emergency write
_CONTROL = struct.Struct("<IHH")  # port, event, value
_DEVICE_READY, _PORT_ADD, _PORT_READY, _PORT_OPEN, _PORT_NAME = 0, 1, 3, 6, 7
_RECEIVE, _SEND, _CONTROL_RECEIVE, _CONTROL_SEND = range(4)
_SENT_AT_ONCE_MAX = 1 << 20  # Linux sends up to 32 KiB, or 16 pages for splice(2)
_MESSAGES_MAX = 64


class Port(VirtioDevice):
    """A console device with one port, called `name` in the guest.

    `received` is called with the bytes that the guest has written, in the thread of the devices;
    it must not block or raise.  `closed` is called when the program in the guest closes the port.
    """

    device_id = 3
    name = "virtio-console"
    features = _F_MULTIPORT | INDIRECT | EVENT_INDEX
    queue_count = 4
    queue_size = 64  # the driver fills two of the rings with pages as it starts
    host_queues: tuple[int, ...] = (_RECEIVE, _CONTROL_RECEIVE)
    bounced = 2 << 20  # 128 pages to receive into, and a few pieces of 32 KiB that are sent
    config: bytes = _CONFIG.pack(0, 0, 1, 0).ljust(64, b"\0")

    def __init__(
        self,
        name: str,
        received: Callable[[bytes], object],
        closed: Callable[[], object] = lambda: None,
    ) -> None:
        self._port_name = name.encode()
        self._received = received
        self._closed = closed
        self._lock = threading.Lock()
        self._outgoing: deque[memoryview] = deque()
        self._messages: deque[bytes] = deque()
        self._open = False
        self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def send(self, data: bytes) -> None:
        """Let the guest receive `data`, from any thread.  Without effect after `close`."""
        with self._lock:
            self._outgoing.append(memoryview(data))
            self._alert()

    def _alert(self) -> None:
        if not self._wake.closed:
            os.eventfd_write(self._wake.fileno(), 1)

    def host_fd(self) -> int:
        return self._wake.fileno()

    def reset(self) -> None:
        with self._lock:
            self._messages.clear()
        self._opened(now=False)

    def _opened(self, *, now: bool) -> None:
        before, self._open = self._open, now
        if before and not now:
            self._closed()

    def serve(self, number: int, queue: Queue) -> bool:
        if number == _RECEIVE:
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake.fileno())
            return self._fill(queue)
        if number == _CONTROL_RECEIVE:
            return self._tell(queue)
        done = False
        while self._has_room() and (chain := queue.pop()) is not None:
            size = sum(map(len, chain.readable))
            if size > _SENT_AT_ONCE_MAX:
                raise RingError(f"sent {size} bytes at once")
            data = b"".join(chain.readable)
            queue.push(chain, 0)
            done = True
            if number == _SEND:
                self._received(data)
            else:
                self._heed(data)
        return done

    def _has_room(self) -> bool:
        """Whether `received` may be called now."""
        return True

    def _fill(self, queue: Queue) -> bool:
        """Give the driver what waits for it."""
        done = False
        while self._outgoing and (chain := queue.pop()) is not None:
            written = 0
            for part in chain.writable:
                at = 0
                while at < len(part) and self._outgoing:
                    data = self._outgoing[0]
                    piece = data[: len(part) - at]
                    part[at : at + len(piece)] = piece
                    at += len(piece)
                    if len(piece) < len(data):
                        self._outgoing[0] = data[len(piece) :]
                    else:
                        self._outgoing.popleft()
                written += at
            if not written:
                raise RingError("offered a receive buffer without room")
            queue.push(chain, written)
            done = True
        return done

    def _heed(self, data: bytes) -> None:
        """A message of the driver."""
        if len(data) < _CONTROL.size:
            raise RingError(f"sent a control message of {len(data)} bytes")
        _, event, value = _CONTROL.unpack_from(data)
        if event == _DEVICE_READY and value:
            self._message(_PORT_ADD, 1)
        elif event == _PORT_READY and value:
            self._message(_PORT_NAME, 1, self._port_name)
            self._message(_PORT_OPEN, 1)
        elif event == _PORT_OPEN:
            self._opened(now=bool(value))

    def _message(self, event: int, value: int, more: bytes = b"") -> None:
        with self._lock:
            if len(self._messages) >= _MESSAGES_MAX:
                raise RingError("asks for the port's name again and again, and takes no answer")
            self._messages.append(_CONTROL.pack(0, event, value) + more)
            self._alert()

    def _tell(self, queue: Queue) -> bool:
        """Give the driver the messages that wait for it."""
        done = False
        while self._messages and (chain := queue.pop()) is not None:
            message = self._messages.popleft()
            _check_room(chain, len(message))
            chain.writable[0][: len(message)] = message
            queue.push(chain, len(message))
            done = True
        return done

    def close(self) -> None:
        with self._lock:
            self._wake.close()


class Console(Port):
    """A console device with nothing but the console, which Linux calls hvc0.

    `output` is called with the bytes that the guest has printed, while `has_room()`; call `alert`
    when there is room again.
    """

    name: str = "console (hvc0)"
    features: int = INDIRECT | EVENT_INDEX
    queue_count: int = 2
    queue_size: int = 16
    host_queues: tuple[int, ...] = (_RECEIVE, _SEND)
    bounced: int = 512 << 10  # pages to receive into, and pieces of a page that are printed
    config: bytes = bytes(64)

    def __init__(self, output: Callable[[bytes], object], has_room: Callable[[], bool]) -> None:
        super().__init__("", output)
        self._room = has_room

    def _has_room(self) -> bool:
        return self._room()

    def alert(self) -> None:
        """There is room again.  Any thread may call."""
        with self._lock:
            self._alert()

    def receive(self, data: bytes) -> None:
        """Let the guest receive `data`: it waits until a program has opened the console."""
        self.send(data)

    def pending(self) -> int:
        """How many bytes the guest has not received yet."""
        with self._lock:
            return sum(map(len, self._outgoing))


def _check_room(chain: Chain, size: int) -> None:
    if not chain.writable or len(chain.writable[0]) < size:
        raise RingError("offered a control buffer that is too small")
