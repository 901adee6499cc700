"""The protocol between this process and the agent in a guest: frames, channels, flow control.

A frame is a header of 12 bytes and a payload of at most PAYLOAD_MAX:

===== ======= =================================================================================
bytes field
===== ======= =================================================================================
1     kind    `Kind`
1     stream  0 to 2, for DATA, END and CREDIT: standard input, output and error
2             0
4     channel the number of a command, chosen by this side; 0 for the guest itself
4     size    of the payload
===== ======= =================================================================================

All numbers are little-endian.  A sender of DATA may have a window of bytes on the way for each
stream; the receiver's CREDIT adds to it.  agent.c is the other end.

What the agent sends is data of the guest.  Every number in it is checked, no more than the windows
is kept, and a frame that breaks a rule ends the connection: ProtocolError.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from ...errors import ClosedError

__all__ = [
    "OUTPUT_WINDOW",
    "PAYLOAD_MAX",
    "STDIN_WINDOW",
    "VERSION",
    "Channel",
    "Decoder",
    "Failure",
    "Frame",
    "Kind",
    "Link",
    "ProtocolError",
    "What",
    "encode",
    "start_payload",
]

VERSION = 1
#: In bytes.
PAYLOAD_MAX = 64 << 10
#: How many bytes of a stream may be on the way, or not yet taken by their reader.
STDIN_WINDOW, OUTPUT_WINDOW = 256 << 10, 256 << 10

_HEADER = struct.Struct("<BBHII")
_HELLO = struct.Struct("<8sII")
_MAGIC = b"kvmpriv\0"
_START = struct.Struct("<IIIIHH")
_U32, _I32, _TWO = struct.Struct("<I"), struct.Struct("<i"), struct.Struct("<II")
_ON_TERMINAL, _WITH_ENVIRONMENT = 1, 2
_PIECE = 32 << 10
_ERRNO_MAX = 4095


class Kind(IntEnum):
    """What a frame is."""

    START = 1
    DATA = 2
    END = 3
    CREDIT = 4
    SIGNAL = 5
    RESIZE = 6
    CLOSE = 7
    POWER_OFF = 8
    HELLO = 64
    STARTED = 65
    FAILED = 66
    EXITED = 67


class What(IntEnum):
    """What START starts."""

    COMMAND = 0
    GET = 1
    PUT = 2


#: What the agent may send: kind -> (least, most) bytes of the payload.
_FROM_AGENT = {
    Kind.HELLO: (_HELLO.size, _HELLO.size),
    Kind.STARTED: (4, 4),
    Kind.FAILED: (8, 8),
    Kind.EXITED: (4, 4),
    Kind.DATA: (1, PAYLOAD_MAX),
    Kind.END: (0, 0),
    Kind.CREDIT: (4, 4),
}


class ProtocolError(Exception):
    """The agent broke the protocol; the message completes "the agent ..."."""


class Frame(NamedTuple):
    """A frame."""

    kind: Kind
    channel: int
    payload: bytes = b""
    stream: int = 0


class Failure(NamedTuple):
    """Why a command could not be started."""

    #: 1: its working directory, 2: its execution, 3: anything else.
    where: int
    #: An errno.
    error: int


def encode(frame: Frame) -> bytes:
    """The bytes of a frame."""
    header = _HEADER.pack(frame.kind, frame.stream, 0, frame.channel, len(frame.payload))
    return header + frame.payload


def start_payload(
    what: What,
    arguments: Sequence[bytes],
    *,
    environment: Sequence[bytes] | None = None,
    directory: bytes = b"",
    terminal: tuple[int, int] | None = None,
) -> bytes:
    """The payload of START; `terminal` is the number of rows and columns of a new terminal.

    It may be longer than PAYLOAD_MAX; then it can't be sent.
    """
    flags = (_ON_TERMINAL if terminal else 0) | (
        _WITH_ENVIRONMENT if environment is not None else 0
    )
    variables = environment or ()
    rows, columns = terminal or (0, 0)
    head = _START.pack(what, flags, len(arguments), len(variables), rows, columns)
    return head + b"".join(text + b"\0" for text in (directory, *arguments, *variables))


class Decoder:
    """Cuts what the agent sends into frames.  It keeps less than one frame."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete now.  ProtocolError for what the agent must not send."""
        self._data += data
        at = 0
        try:
            while len(self._data) - at >= _HEADER.size:
                number, stream, zero, channel, size = _HEADER.unpack_from(self._data, at)
                kind = _checked_kind(number, stream, zero, size)
                end = at + _HEADER.size + size
                if len(self._data) < end:
                    return
                payload = bytes(self._data[at + _HEADER.size : end])
                at = end
                yield Frame(kind, channel, payload, stream)
        finally:
            del self._data[:at]


def _checked_kind(number: int, stream: int, zero: int, size: int) -> Kind:
    limits = _FROM_AGENT.get(number)  # type: ignore[call-overload]  # an IntEnum is an int
    if limits is None:
        raise ProtocolError(f"sent a frame of kind {number}")
    if zero or stream > 2:
        raise ProtocolError(f"sent a frame with the bytes {stream}, {zero} in its header")
    if not limits[0] <= size <= limits[1]:
        raise ProtocolError(f"sent a {Kind(number).name} of {size} bytes")
    return Kind(number)


class _Output:
    """A stream from the guest: what has arrived and was not read yet."""

    def __init__(self) -> None:
        self.data: bytearray = bytearray()
        self.ended: bool = False
        self.allowed = OUTPUT_WINDOW
        self.owed = 0
        self.dropped: bool = False


class Channel:
    """A command in the guest, as the two ends see it.

    Any thread may call.  A method that waits raises what `Link.fail` was given when the connection
    has ended; what has arrived until then can be read first.
    """

    def __init__(self, link: Link, number: int, lock: threading.RLock) -> None:
        self.number = number
        self._link = link
        self._changed = threading.Condition(lock)
        self._outputs = (_Output(), _Output())
        self._credit = STDIN_WINDOW
        #: The process in the guest.
        self.pid: int = 0
        self._began = False
        self._failure: Failure | None = None
        #: The exit status, or the negative number of the signal; None while it runs.
        self.status: int | None = None
        #: Whether the command has closed its standard input.
        self.input_closed: bool = False
        #: Whether this side takes nothing from the channel any more.
        self.closed: bool = False
        self._on_change: Callable[[], object] = lambda: None

    # -- in the thread of the devices, with the lock -------------------------------------------

    def take(self, frame: Frame) -> None:
        """Take a frame of this channel."""
        kind = frame.kind
        if kind is Kind.STARTED:
            self._only_once()
            (self.pid,) = _U32.unpack(frame.payload)
        elif kind is Kind.FAILED:
            self._only_once()
            where, error = _TWO.unpack(frame.payload)
            if not 0 < error <= _ERRNO_MAX:
                raise ProtocolError(f"sent the errno {error}")
            self._failure = Failure(where, error)
            self.status = 127
            for output in self._outputs:
                output.ended = True
        elif kind is Kind.EXITED:
            if self.status is not None or not self._began:
                raise ProtocolError("sent a second exit status, or one before the start")
            (self.status,) = _I32.unpack(frame.payload)
            if not -64 <= self.status <= 255:
                raise ProtocolError(f"sent the exit status {self.status}")
        elif kind is Kind.CREDIT:
            (more,) = _U32.unpack(frame.payload)
            self._credit += more
            if self._credit > STDIN_WINDOW:
                raise ProtocolError(f"sent a credit of {more} bytes, more than it was sent")
        else:
            self._take_stream(frame)
        self.notify()

    def _only_once(self) -> None:
        if self._began:
            raise ProtocolError("started a command twice")
        self._began = True

    def _take_stream(self, frame: Frame) -> None:
        if frame.stream == 0:
            if frame.kind is not Kind.END:
                raise ProtocolError("sent data on a standard input")
            self.input_closed = True
            return
        output = self._outputs[frame.stream - 1]
        if output.ended:
            raise ProtocolError("sent more after the end of a stream")
        if frame.kind is Kind.END:
            output.ended = True
            return
        output.allowed -= len(frame.payload)
        if output.allowed < 0:
            raise ProtocolError("sent more than it was allowed to")
        if not output.dropped:
            output.data += frame.payload

    def notify(self) -> None:
        """Wake those who wait."""
        self._changed.notify_all()
        self._on_change()

    @property
    def complete(self) -> bool:
        """Whether no frame can come any more."""
        return self.status is not None and all(output.ended for output in self._outputs)

    # -- in the callers' threads ---------------------------------------------------------------

    def _wait(self, ready: Callable[[], bool], deadline: float | None) -> bool:
        """Wait, with the lock, until `ready()`; False at the deadline (of time.monotonic)."""
        while not ready():
            self._link.check()
            if self.closed:
                raise ClosedError("the command's streams are closed")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._changed.wait(left)
        return True

    def _hold(self) -> threading.Condition:
        """The lock.  ClosedError after a fork: another thread may have held it then."""
        self._link.check_ours()
        return self._changed

    def on_change(self, changed: Callable[[], object]) -> None:
        """Call `changed`, in the thread of the devices, when something has changed from now on."""
        with self._hold():
            self._on_change = changed

    def wait_for_start(self, deadline: float | None = None) -> Failure | None:
        """Wait until the command has started; why it could not be, or None.  TimeoutError."""
        with self._hold():
            if not self._wait(lambda: self._began, deadline):
                raise TimeoutError("the agent has not started the command in time")
            return self._failure

    def wait_for_exit(self, deadline: float | None = None) -> int | None:
        """Wait for the exit status; None at the deadline."""
        with self._hold():
            self._wait(lambda: self.status is not None, deadline)
            return self.status

    def read(self, stream: int, most: int, deadline: float | None = None) -> bytes:
        """Wait for bytes of `stream` (1 or 2), at most `most`; b"" at its end.  TimeoutError."""
        output = self._outputs[stream - 1]
        with self._hold():
            if not self._wait(lambda: bool(output.data) or output.ended, deadline):
                raise TimeoutError("the command has written nothing in time")
            return self._consume(stream, most)

    def available(self, stream: int) -> bytes:
        """What has arrived on `stream`, without waiting."""
        with self._hold():
            return self._consume(stream, OUTPUT_WINDOW)

    def ended(self, stream: int) -> bool:
        """Whether everything of `stream` was read."""
        output = self._outputs[stream - 1]
        return output.ended and not output.data

    def _consume(self, stream: int, most: int) -> bytes:
        output = self._outputs[stream - 1]
        data = bytes(output.data[:most])
        del output.data[:most]
        output.owed += len(data)
        if output.owed >= OUTPUT_WINDOW // 4 and not output.ended:
            output.allowed += output.owed
            self.tell(Kind.CREDIT, _U32.pack(output.owed), stream)
            output.owed = 0
        return data

    def write_some(self, data: memoryview) -> int:
        """Send as much of `data` as the command's window has room for; how much that was.

        BrokenPipeError if the command has closed its standard input.
        """
        with self._hold():
            self._link.check()
            if self.input_closed or self.status is not None:
                raise BrokenPipeError("the command has closed its standard input")
            size = min(len(data), self._credit, _PIECE)
            if size:
                self._credit -= size
                self.tell(Kind.DATA, bytes(data[:size]))
            return size

    def write(self, data: memoryview) -> None:
        """Send all of `data`; waits for room.  BrokenPipeError as with `write_some`."""
        while data:
            with self._hold():
                self._wait(
                    lambda: bool(self._credit) or self.input_closed or self.status is not None, None
                )
                data = data[self.write_some(data) :]

    def wait_for_any(self, deadline: float | None, *, input_too: bool) -> bool:
        """Wait for something to read, with `input_too` also for room to write.

        False at the deadline.
        """
        with self._hold():
            return self._wait(
                lambda: (
                    self.complete
                    or any(output.data for output in self._outputs)
                    or (input_too and (bool(self._credit) or self.input_closed))
                ),
                deadline,
            )

    def drop(self, stream: int) -> None:
        """Read nothing more of `stream`: the command that writes to it gets SIGPIPE."""
        output = self._outputs[stream - 1]
        with self._hold():
            output.dropped = True
            output.data.clear()
            if not output.ended:
                self.tell(Kind.CLOSE, stream=stream)

    def end_input(self) -> None:
        """The command reads the end of its standard input, after what was sent."""
        if self.status is None:
            self.tell(Kind.END)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the command, with `group` to all of its process group."""
        self.tell(Kind.SIGNAL, _TWO.pack(number, int(group)))

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        self.tell(Kind.RESIZE, _TWO.pack(rows, columns))

    def tell(self, kind: Kind, payload: bytes = b"", stream: int = 0) -> None:
        """Send a frame of this channel."""
        self._link.check_ours()
        if not self.closed:
            self._link.send(Frame(kind, self.number, payload, stream))

    def close(self) -> None:
        """Take nothing more: the agent closes its ends of the command's streams."""
        if not self._link.ours:
            return
        with self._hold():
            if not self.closed:
                if not self.complete:
                    self.tell(Kind.CLOSE)
                self.closed = True
                self._link.forget(self)
                self.notify()


class Link:
    """This side of the connection to an agent.

    `send` is called with the bytes for the agent, from any thread.
    """

    def __init__(self, send: Callable[[bytes], object]) -> None:
        self._send = send
        self._decoder = Decoder()
        # Re-entrant: a signal handler may use the guest while this thread is here.
        self._lock = threading.RLock()
        self._greeted = threading.Condition(self._lock)
        self._channels: dict[int, Channel] = {}
        self._next = 1
        self._failure: Callable[[], Exception] | None = None
        self._pid = os.getpid()
        #: Whether the agent has said hello.
        self.ready: bool = False

    @property
    def ours(self) -> bool:
        """Whether this process made the link, not one that it was forked from."""
        return os.getpid() == self._pid

    def received(self, data: bytes) -> None:
        """Take what the agent has sent; after it broke the protocol, drop it."""
        with self._lock:
            if self._failure is not None:
                return
            try:
                for frame in self._decoder.feed(data):
                    self._take(frame)
            except ProtocolError as error:
                why = f"the agent {error}"
                self.fail(lambda: ProtocolError(why))

    def _take(self, frame: Frame) -> None:
        if not self.ready or frame.kind is Kind.HELLO:
            self._greet(frame)
            return
        channel = self._channels.get(frame.channel)
        if channel is None:
            if not 0 < frame.channel < self._next:
                raise ProtocolError(f"sent a frame of channel {frame.channel}, which there is not")
            return  # it was closed while the frame was on its way
        channel.take(frame)
        if channel.complete:
            self.forget(channel)

    def _greet(self, frame: Frame) -> None:
        if self.ready or frame.kind is not Kind.HELLO:
            raise ProtocolError(f"sent {frame.kind.name} instead of a first HELLO")
        magic, version, _ = _HELLO.unpack(frame.payload)
        if magic != _MAGIC or version != VERSION:
            raise ProtocolError(f"speaks version {version} of the protocol, not {VERSION}")
        self.ready = True
        self._greeted.notify_all()

    def fail(self, failure: Callable[[], Exception]) -> None:
        """End the connection: who waits, and who comes later, raises `failure()`.

        The first failure counts.
        """
        with self._lock:
            if self._failure is None:
                self._failure = failure
            self._greeted.notify_all()
            for channel in self._channels.values():
                channel.notify()

    @property
    def failed(self) -> bool:
        """Whether the connection has ended."""
        return self._failure is not None

    def check_ours(self) -> None:
        """ClosedError in a process that was forked from the one that made the link."""
        if not self.ours:
            raise ClosedError("the guest belongs to the process that this one was forked from")

    def settle(self, known: Callable[[], bool], timeout: float) -> None:
        """Wait until `known()`, which a call of `fail` makes true; `timeout`: in seconds."""
        with self._greeted:
            self._greeted.wait_for(known, timeout)

    def check(self) -> None:
        """Raise what ended the connection, if it has ended."""
        if self._failure is not None:
            raise self._failure()

    def wait_until_ready(self, timeout: float | None) -> bool:
        """Wait for the agent's hello; False after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while not self.ready:
                self.check()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._greeted.wait(left)
        return True

    def open(self, payload: bytes) -> Channel:
        """Start what `payload` (of `start_payload`) describes."""
        with self._lock:
            self.check()
            channel = Channel(self, self._next, self._lock)
            self._next += 1
            self._channels[channel.number] = channel
            channel.tell(Kind.START, payload)
        return channel

    def power_off(self) -> None:
        """Let the agent turn the guest off."""
        self.send(Frame(Kind.POWER_OFF, 0))

    def send(self, frame: Frame) -> None:
        """Send a frame; without effect after the end of the connection."""
        with self._lock:
            if self._failure is None:
                self._send(encode(frame))

    def forget(self, channel: Channel) -> None:
        """Nothing more can come for `channel`, or no caller takes it."""
        self._channels.pop(channel.number, None)
