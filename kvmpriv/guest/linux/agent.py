"""What a program does in a guest through its agent: run commands, and copy files."""

from __future__ import annotations

import os
import signal as _signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, overload

from ...errors import ArgumentError
from .archive import Contents, Tree, Unpacker, pack_bytes, pack_path
from .process import Argument, Command, Environment, GuestProcess, exchange, shown, start
from .protocol import Channel, Link, What

__all__ = ["LIMIT", "Agent"]

#: How many bytes `run` and `get` take from the guest unless their caller says otherwise.
LIMIT = 1 << 30


class Agent:
    """The agent at the other end of `link`.

    Every method may be called from any thread, several at a time; up to 64 commands run at a time.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def _check_started(self) -> None:
        """Raise an exception if the guest can't be used now."""
        self._link.check_ours()
        self._link.check()

    # -- commands ------------------------------------------------------------------------------

    @overload
    def popen(
        self,
        args: Command,
        *,
        env: Environment | None = ...,
        cwd: Argument | None = ...,
        text: Literal[False] = ...,
        encoding: None = ...,
        errors: None = ...,
        terminal: tuple[int, int] | None = ...,
    ) -> GuestProcess[bytes]: ...
    @overload
    def popen(
        self,
        args: Command,
        *,
        env: Environment | None = ...,
        cwd: Argument | None = ...,
        text: Literal[True],
        encoding: str | None = ...,
        errors: str | None = ...,
        terminal: tuple[int, int] | None = ...,
    ) -> GuestProcess[str]: ...
    @overload
    def popen(
        self,
        args: Command,
        *,
        env: Environment | None = ...,
        cwd: Argument | None = ...,
        text: bool = ...,
        encoding: str,
        errors: str | None = ...,
        terminal: tuple[int, int] | None = ...,
    ) -> GuestProcess[str]: ...

    def popen(
        self,
        args: Command,
        *,
        env: Environment | None = None,
        cwd: Argument | None = None,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
        terminal: tuple[int, int] | None = None,
    ) -> GuestProcess[Any]:
        """Start a command, and return once it runs.

        `args` are its words, or a line for ``/bin/sh -c``.  `env` replaces its environment, which
        by default has HOME, TERM and PATH; `cwd` is its working directory (default: ``/``).  Its
        streams carry bytes, or text with `text` (UTF-8) or `encoding`.  `terminal`, rows and
        columns, gives it a terminal of its own, whose output comes on stdout.

        Raises what subprocess.Popen raises: FileNotFoundError for a program or a `cwd` that does
        not exist, PermissionError, OSError; GuestDied.
        """
        self._check_started()
        channel = start(self._link, What.COMMAND, args, env=env, cwd=cwd, terminal=terminal)
        return GuestProcess(channel, args, _encoding(text, encoding), errors)

    @overload
    def run(
        self,
        args: Command,
        *,
        input: bytes | None = ...,
        env: Environment | None = ...,
        cwd: Argument | None = ...,
        timeout: float | None = ...,
        check: bool = ...,
        text: Literal[False] = ...,
        encoding: None = ...,
        errors: None = ...,
        limit: int = ...,
    ) -> subprocess.CompletedProcess[bytes]: ...
    @overload
    def run(
        self,
        args: Command,
        *,
        input: str | None = ...,
        env: Environment | None = ...,
        cwd: Argument | None = ...,
        timeout: float | None = ...,
        check: bool = ...,
        text: Literal[True],
        encoding: str | None = ...,
        errors: str | None = ...,
        limit: int = ...,
    ) -> subprocess.CompletedProcess[str]: ...
    @overload
    def run(
        self,
        args: Command,
        *,
        input: str | None = ...,
        env: Environment | None = ...,
        cwd: Argument | None = ...,
        timeout: float | None = ...,
        check: bool = ...,
        text: bool = ...,
        encoding: str,
        errors: str | None = ...,
        limit: int = ...,
    ) -> subprocess.CompletedProcess[str]: ...

    def run(
        self,
        args: Command,
        *,
        input: str | bytes | None = None,  # noqa: A002  # subprocess calls it so
        env: Environment | None = None,
        cwd: Argument | None = None,
        timeout: float | None = None,
        check: bool = False,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
        limit: int = LIMIT,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command and wait for it, as subprocess.run with capture_output=True.

        The parameters are those of `popen` and of subprocess.run: `input` for its standard input
        (default: nothing), `timeout` in seconds, `check`.  `limit` is the most bytes of output that
        are kept.

        subprocess.TimeoutExpired after `timeout`, subprocess.CalledProcessError with `check`,
        OSError (EFBIG) beyond `limit`, GuestDied, and what `popen` raises.  Whatever is raised, the
        processes of the command's group are killed.
        """
        self._check_started()
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            channel = start(self._link, What.COMMAND, args, env=env, cwd=cwd, deadline=deadline)
        except TimeoutError:
            assert timeout is not None
            raise subprocess.TimeoutExpired(shown(args), timeout) from None
        process = GuestProcess[Any](channel, args, _encoding(text, encoding), errors)
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            output, error = process.communicate(input, left, limit=limit)
        except subprocess.TimeoutExpired as expired:
            assert timeout is not None
            process.kill_group()
            raise subprocess.TimeoutExpired(
                expired.cmd, timeout, expired.output, expired.stderr
            ) from None
        except BaseException:
            process.kill_group()
            raise
        finally:
            process.close()
        status = process.wait()
        done = subprocess.CompletedProcess(shown(args), status, output, error)
        if check:
            done.check_returncode()
        return done

    def shell(self, command: Command = ("/bin/sh",)) -> int:
        """Connect the terminal to `command` in the guest until it ends; its exit status.

        The terminal is in raw mode meanwhile; Ctrl-A x kills the command.  ArgumentError if
        standard input is not a terminal.
        """
        from .shell import converse

        self._check_started()
        return converse(self, command)

    # -- files ---------------------------------------------------------------------------------

    def put(
        self,
        source: bytes | str | os.PathLike[str],
        target: Argument,
        *,
        mode: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Copy a file, or a folder with all that is in it, to the path `target` in the guest.

        `source` is a path on the host, or the contents of a file as bytes.  Modes are kept; `mode`
        is that of `target` (for bytes 0o644 by default).  Symbolic links in a folder stay links.  A
        file that is there is replaced; into a folder that is there the files are added.

        OSError with the path in the guest: ENOENT for a folder that is missing, ENOSPC if the guest
        has no room (the file that it names is incomplete).  ArgumentError for a device, a pipe or a
        socket.  TimeoutError, GuestDied.
        """
        self._check_started()
        if mode is not None and not 0 <= mode <= 0o7777:
            raise ArgumentError(f"the mode {mode:#o} must be 0 to 0o7777")
        if isinstance(source, bytes):
            pieces = pack_bytes(source, 0o644 if mode is None else mode)
        else:
            os.stat(source)  # noqa: PTH116  # before the guest makes anything
            pieces = pack_path(source, mode)
        self._copy(What.PUT, target, pieces, None, timeout)

    @overload
    def get(
        self,
        source: Argument,
        target: None = ...,
        *,
        timeout: float | None = ...,
        limit: int = ...,
    ) -> bytes: ...
    @overload
    def get(
        self,
        source: Argument,
        target: str | os.PathLike[str],
        *,
        timeout: float | None = ...,
        limit: int = ...,
    ) -> None: ...

    def get(
        self,
        source: Argument,
        target: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        limit: int = LIMIT,
    ) -> bytes | None:
        """The contents of the file `source` in the guest; with `target` it is copied there instead.

        With `target`, `source` may be a folder: all that is in it is copied.  Permissions are kept,
        but no setuid, setgid and sticky bits.  `target` appears when all of it has come: a file
        there is replaced then, and a folder must not exist yet (FileExistsError).

        OSError with the path in the guest: ENOENT, EINVAL for a device, a pipe or a socket.
        OSError (EFBIG) if more than `limit` bytes come.  ProtocolError if the guest sends a name,
        or a symbolic link in the folder, that leads out of it.  TimeoutError, GuestDied.
        """
        self._check_started()
        if target is None:
            contents = Contents()
            self._copy(What.GET, source, (), Unpacker(contents, limit), timeout)
            return bytes(contents.data)
        with Tree(target) as tree:
            self._copy(What.GET, source, (), Unpacker(tree, limit), timeout)
            tree.commit()
        return None

    def _copy(
        self,
        what: What,
        path: Argument,
        pieces: Iterator[bytes] | Sequence[bytes],
        unpacker: Unpacker | None,
        timeout: float | None,
    ) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        channel = start(self._link, what, [path], deadline=deadline)
        answer = unpacker if unpacker is not None else Unpacker.answer()
        try:
            _transfer(channel, pieces, answer, deadline)
        except BaseException:
            with suppress(Exception):
                channel.signal(_signal.SIGKILL, group=True)
            raise
        finally:
            channel.close()
        if not answer.done:
            why = "killed" if (channel.status or 0) < 0 else "the guest sent no end of it"
            raise OSError(f"{os.fsdecode(path)}: not copied: {why}")


def _transfer(
    channel: Channel,
    pieces: Iterator[bytes] | Sequence[bytes],
    answer: Unpacker,
    deadline: float | None,
) -> None:
    def take(stream: int, data: bytes) -> None:
        if stream == 1:
            answer.feed(data)

    if not exchange(channel, pieces, deadline, take):
        raise TimeoutError("the file was not copied in time")


def _encoding(text: bool, encoding: str | None) -> str | None:
    return encoding or ("utf-8" if text else None)
