"""The console's input: standard input, which is a terminal in raw mode or a pipe."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from ...exit_status import ExitStatus
from .outcome import Interrupted, Outcome

__all__ = ["HELP", "Keyboard", "keyboard"]

_ESCAPE, _QUIT = b"\x01", b"xX"
_QUIT_OUTCOME = Outcome("signal", ExitStatus.SIGNALLED + signal.SIGINT, "Ctrl-A x")
#: For the user of a terminal.
HELP = "Ctrl-A x ends the guest, and Ctrl-A Ctrl-A sends it a Ctrl-A"


class Keyboard:
    """Reads bytes for the guest from `fd`; with `escape`, Ctrl-A x ends the guest."""

    def __init__(self, fd: int, *, escape: bool) -> None:
        self._fd = fd
        self._escape = escape
        self._escaped = False

    def fileno(self) -> int:
        """The descriptor that `read` reads."""
        return self._fd

    def read(self) -> bytes | None:
        """What was typed; None at the end of the input.  Ctrl-A x raises Interrupted."""
        try:
            data = os.read(self._fd, 4096)
        except BlockingIOError:
            return b""
        except OSError:  # the terminal was closed
            data = b""
        if not data:
            return None
        return self._unescape(data) if self._escape else data

    def _unescape(self, data: bytes) -> bytes:
        typed = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in _QUIT:
                    raise Interrupted(
                        Outcome("signal", ExitStatus.SIGNALLED + signal.SIGINT, "Ctrl-A x")
                    )
                typed.append(byte)
            elif byte == _ESCAPE[0]:
                self._escaped = True
            else:
                typed.append(byte)
        return bytes(typed)


class _Raw:
    """Puts a terminal into raw mode for a block, so that every key reaches the guest."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        self._before = termios.tcgetattr(self._fd)
        raw = termios.tcgetattr(self._fd)
        raw[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
        # Output processing stays on: messages of this process need carriage returns.
        raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        raw[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, raw)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)


def _is_ours(terminal: int) -> bool:
    """Whether this process is in the foreground of its session's terminal."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:  # it is another session's
        return False


@contextmanager
def keyboard() -> Iterator[Keyboard | None]:
    """Standard input as the console's input; a terminal is in raw mode until the block ends.

    None if there is nothing to read: standard input is closed, or it is the terminal of a job in
    the background or of another session (setsid), whose shell reads it.
    """
    if sys.stdin is None:
        yield None
        return
    fd = sys.stdin.fileno()
    if not os.isatty(fd):
        yield Keyboard(fd, escape=False)
    elif not _is_ours(fd):
        yield None
    else:
        with _Raw(fd):
            yield Keyboard(fd, escape=True)
