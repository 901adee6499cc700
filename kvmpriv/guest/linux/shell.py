"""A command in a guest whose streams are those of this process: a terminal, pipes or files."""

from __future__ import annotations

import os
import select
import signal as _signal
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from ...exit_status import ExitStatus
from ...fd import Fd
from .console import Keyboard, keyboard
from .outcome import Interrupted

if TYPE_CHECKING:
    from .agent import Agent
    from .process import Command, GuestProcess

__all__ = ["converse", "relay"]

_SIZE_EVERY = 250  # milliseconds between two looks at the size of the terminal
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def converse(agent: Agent, command: Command) -> int:
    """Connect standard input and output to `command`, on a terminal of its own, until it ends.

    Returns its exit status as a shell has it: 128+N if signal N killed it.  ArgumentError if
    standard input is not a terminal, or is that of another job.
    """
    if sys.stdin is None or not os.isatty(sys.stdin.fileno()):
        raise ArgumentError("standard input is not a terminal: use `run` or `popen`")
    terminal = sys.stdin.fileno()
    size = _size(terminal)
    with keyboard() as keys:
        if keys is None:
            raise ArgumentError("the terminal belongs to another job: bring this one to the front")
        raw = termios.tcgetattr(terminal)
        raw[1] &= ~termios.OPOST  # the guest's terminal has added the carriage returns
        termios.tcsetattr(terminal, termios.TCSADRAIN, raw)
        variables = {"HOME": "/root", "PATH": _PATH, "TERM": os.environ.get("TERM", "linux")}
        process = agent.popen(command, terminal=size, env=variables)

        def look() -> None:
            nonlocal size
            now = _size(terminal)
            if now != size:
                size = now
                process.resize(*size)

        try:
            return relay(process, keys, sys.stdout.fileno(), sys.stderr.fileno(), look)
        except Interrupted as interrupted:
            return interrupted.outcome.status


def relay(
    process: GuestProcess[Any],
    source: Keyboard | None,
    output: int,
    error: int,
    look: Callable[[], object] | None = None,
) -> int:
    """Connect a command's streams to descriptors until it ends; its exit status as a shell has it.

    `look` is called several times a second.  If an exception ends this, the command's group is
    killed.
    """
    channel = process._channel  # noqa: SLF001  # a part of the same thing
    wake = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    poll = select.poll()
    poll.register(wake.fileno(), select.POLLIN)
    listening = False
    waiting = memoryview(b"")
    standard_input = -1
    if source is None:
        channel.end_input()
    else:
        standard_input = source.fileno()
    try:
        channel.on_change(lambda: os.eventfd_write(wake.fileno(), 1))
        while True:
            if waiting:
                try:
                    waiting = waiting[channel.write_some(waiting) :]
                except BrokenPipeError:  # it reads no more; this process need not, either
                    waiting, source = memoryview(b""), None
                    if listening:
                        poll.unregister(standard_input)
                        listening = False
            for stream, fd in ((1, output), (2, error)):
                while data := channel.available(stream):
                    _write(fd, data)
            status = channel.wait_for_exit(0.0)
            if status is not None and channel.ended(1) and channel.ended(2):
                return status if status >= 0 else ExitStatus.SIGNALLED - status
            if source is not None and listening == bool(waiting):
                listening = not listening
                if listening:
                    poll.register(standard_input, select.POLLIN)
                else:
                    poll.unregister(standard_input)
            ready = [fd for fd, _ in poll.poll(None if look is None else _SIZE_EVERY)]
            with suppress(BlockingIOError):
                os.eventfd_read(wake.fileno())
            if source is not None and listening and standard_input in ready:
                typed = source.read()
                if typed is None:
                    poll.unregister(standard_input)
                    source, listening = None, False
                    channel.end_input()
                else:
                    waiting = memoryview(typed)
            if look is not None:
                look()
    except BaseException:
        channel.signal(_signal.SIGKILL, group=True)
        raise
    finally:
        channel.on_change(lambda: None)
        process.close()
        wake.close()


def _size(terminal: int) -> tuple[int, int]:
    """Rows and columns of a terminal; 24 and 80 if it does not know."""
    try:
        found = os.get_terminal_size(terminal)
    except OSError:
        return 24, 80
    return found.lines or 24, found.columns or 80


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:  # a descriptor that another process has set so
            select.select([], [fd], [])
