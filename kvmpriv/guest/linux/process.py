"""A command in a guest: what `subprocess.Popen` is for a command on the host."""

from __future__ import annotations

import errno as _errno
import io
import os
import signal as _signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, AnyStr, Generic, TypeAlias, cast

from ...errors import ArgumentError
from .protocol import PAYLOAD_MAX, Channel, Failure, Link, What, start_payload

__all__ = ["Argument", "Command", "Environment", "GuestProcess", "exchange", "shown", "start"]

#: A word of a command.
Argument: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
#: A command: its words, or a line for the guest's ``/bin/sh -c``.
Command: TypeAlias = str | bytes | Sequence[Argument]
#: Variables.
Environment: TypeAlias = Mapping[str, str] | Mapping[bytes, bytes]

_IN_CHDIR, _IN_EXEC = 1, 2
_JOBS_BUSY = "64 commands run in the guest already, the most that its agent serves"


def _words(command: Command) -> list[bytes]:
    if isinstance(command, str | bytes):
        return [b"/bin/sh", b"-c", os.fsencode(command)]
    words = [os.fsencode(word) for word in command]
    if not words:
        raise ArgumentError("the command is empty: give at least the name of a program")
    return words


def _variables(environment: Environment | None) -> list[bytes] | None:
    if environment is None:
        return None
    found = []
    for name, value in environment.items():
        key = os.fsencode(name)
        if not key or b"=" in key:
            raise ArgumentError(f"{name!r} is not the name of an environment variable")
        found.append(key + b"=" + os.fsencode(value))
    return found


def start(
    link: Link,
    what: What,
    command: Command,
    *,
    env: Environment | None = None,
    cwd: Argument | None = None,
    terminal: tuple[int, int] | None = None,
    deadline: float | None = None,
) -> Channel:
    """Start a command and wait until it runs; raises what `subprocess.Popen` raises.

    TimeoutError at the deadline.
    """
    words = _words(command)
    directory = b"" if cwd is None else os.fsencode(cwd)
    variables = _variables(env)
    if any(b"\0" in text for text in (directory, *words, *(variables or ()))):
        raise ArgumentError("a word of the command, of its environment or cwd contains a zero byte")
    payload = start_payload(
        what, words, environment=variables, directory=directory, terminal=terminal
    )
    if len(payload) > PAYLOAD_MAX:
        raise OSError(
            _errno.E2BIG,
            f"the command and its environment have {len(payload)} bytes, at most {PAYLOAD_MAX}"
            " can be sent",
        )
    channel = link.open(payload)
    try:
        failure = channel.wait_for_start(deadline)
    except BaseException:
        channel.signal(_signal.SIGKILL, group=True)
        channel.close()
        raise
    if failure is not None:
        channel.close()
        raise _error(failure, words, directory)
    return channel


def _error(failure: Failure, words: Sequence[bytes], directory: bytes) -> OSError:
    if failure.where == _IN_CHDIR:
        name = directory
    elif failure.where == _IN_EXEC:
        name = words[0]
    elif failure.error == _errno.EAGAIN:
        return OSError(failure.error, _JOBS_BUSY)
    else:
        return OSError(failure.error, os.strerror(failure.error) + " (in the guest)")
    return OSError(failure.error, os.strerror(failure.error) + " (in the guest)", os.fsdecode(name))


def exchange(
    channel: Channel,
    source: Iterable[bytes],
    deadline: float | None,
    take: Callable[[int, bytes], object],
) -> bool:
    """Send all of `source`, and call `take(stream, data)` with what comes, until the command ends.

    False at the deadline.  A command that has closed its standard input gets no more of `source`.
    """
    pieces: Iterator[bytes] = iter(source)
    left = memoryview(b"")
    feeding = True
    while True:
        while feeding:
            if not left:
                piece = next(pieces, None)
                if piece is None:
                    channel.end_input()
                    feeding = False
                    break
                left = memoryview(piece)
            try:
                sent = channel.write_some(left)
            except BrokenPipeError:
                feeding = False
                break
            left = left[sent:]
            if not sent:
                break
        for stream in (1, 2):
            while data := channel.available(stream):
                take(stream, data)
        if channel.complete and channel.ended(1) and channel.ended(2):
            return True
        if not channel.wait_for_any(deadline, input_too=feeding):
            return False


class _Reader(io.RawIOBase):
    """A stream from the command."""

    def __init__(self, channel: Channel, stream: int) -> None:
        self._channel, self._stream = channel, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # typeshed's Buffer needs Python 3.12
        data = self._channel.read(self._stream, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._channel.drop(self._stream)


class _Writer(io.RawIOBase):
    """The command's standard input."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._channel.write(view)
        return len(view)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._channel.end_input()


class GuestProcess(Generic[AnyStr]):
    """A command that runs in a guest, made by `LinuxGuest.popen`.

    It is used as a `subprocess.Popen` with three pipes; the streams carry text if `encoding` was
    given.  Leaving its ``with`` block closes the streams and waits for the command.  It runs in a
    session and process group of its own.
    """

    #: The command as it was given.
    args: Command
    #: Its process id in the guest.
    pid: int
    #: Its streams.
    stdin: IO[AnyStr]
    stdout: IO[AnyStr]
    stderr: IO[AnyStr]

    def __init__(
        self, channel: Channel, args: Command, encoding: str | None, errors: str | None
    ) -> None:
        self.args = args
        self.pid = channel.pid
        self._channel = channel
        self._encoding, self._errors = encoding, errors
        streams = (
            io.BufferedWriter(_Writer(channel)),
            *(io.BufferedReader(_Reader(channel, number)) for number in (1, 2)),
        )
        self.stdin, self.stdout, self.stderr = (
            cast(
                "IO[AnyStr]",
                stream
                if encoding is None
                else io.TextIOWrapper(stream, encoding, errors, write_through=True),
            )
            for stream in streams
        )

    @property
    def returncode(self) -> int | None:
        """The exit status, or -N if signal N killed the command; None while it runs."""
        return self._channel.status

    def poll(self) -> int | None:
        """`returncode`; raises GuestDied if the guest ended before the command."""
        if self._channel.status is None:
            self._channel.wait_for_exit(0.0)
        return self._channel.status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command to end; its `returncode`.  subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        status = self._channel.wait_for_exit(deadline)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(shown(self.args), timeout)
        return status

    def communicate(
        self,
        input: AnyStr | None = None,  # noqa: A002  # subprocess calls it so
        timeout: float | None = None,
        *,
        limit: int | None = None,
    ) -> tuple[AnyStr, AnyStr]:
        """Send `input`, read both streams to their ends, and wait for the command.

        subprocess.TimeoutExpired with what has come; the command runs on.  OSError (EFBIG) if more
        than `limit` bytes come.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        data = self._bytes(input)
        streams = (bytearray(), bytearray())

        def take(stream: int, piece: bytes) -> None:
            streams[stream - 1].extend(piece)
            if limit is not None and sum(map(len, streams)) > limit:
                raise OSError(
                    _errno.EFBIG, f"the command has written more than the limit of {limit} bytes"
                )

        if not self.stdin.closed:
            with suppress(BrokenPipeError):
                self.stdin.flush()
        if not exchange(self._channel, (data,) if data else (), deadline, take):
            assert timeout is not None
            output, error = map(bytes, streams)
            raise subprocess.TimeoutExpired(shown(self.args), timeout, output, error)
        first, second = map(self._decoded, streams)
        return first, second

    def _bytes(self, data: AnyStr | None) -> bytes:
        if data is None:
            return b""
        if isinstance(data, str):
            if self._encoding is None:
                raise ArgumentError("input is a str: give bytes, or text=True or an encoding")
            return data.encode(self._encoding, self._errors or "strict")
        if self._encoding is not None:
            raise ArgumentError("input is bytes: with text=True or an encoding give a str")
        return bytes(data)

    def _decoded(self, data: bytearray) -> Any:
        if self._encoding is None:
            return bytes(data)
        text = data.decode(self._encoding, self._errors or "strict")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def send_signal(self, number: int) -> None:
        """Send a signal to the command, unless it has ended."""
        self._channel.signal(_signal_number(number))

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(_signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(_signal.SIGKILL)

    def kill_group(self) -> None:
        """Send SIGKILL to all processes of the command's group."""
        self._channel.signal(_signal.SIGKILL, group=True)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal, in characters."""
        for number in (rows, columns):
            if not 0 < number <= 0xFFFF:
                raise ArgumentError(f"a terminal has 1 to 65535 rows and columns, not {number}")
        self._channel.resize(rows, columns)

    def close(self) -> None:
        """Close the streams: the command that writes on gets SIGPIPE."""
        for stream in (self.stdin, self.stdout, self.stderr):
            with suppress(Exception):  # what was not written yet has no reader
                stream.close()
        self._channel.close()

    def __enter__(self) -> GuestProcess[AnyStr]:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None:
            self.kill_group()
            self.close()
            return
        try:
            with suppress(BrokenPipeError):
                self.stdin.close()
            self.stdout.close()
            self.stderr.close()
            self.wait()
        finally:
            self.close()


def _signal_number(number: int) -> int:
    if not 0 <= number <= 64:
        raise ArgumentError(f"{number} is not the number of a signal (1 to 64)")
    return int(number)


def shown(command: Command) -> str | list[str | bytes]:
    """A command as subprocess's exceptions and results contain it."""
    if isinstance(command, bytes):
        return os.fsdecode(command)
    return command if isinstance(command, str) else [os.fspath(word) for word in command]
