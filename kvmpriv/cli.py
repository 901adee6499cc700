"""The command line: which command, and what every command does about its output and Ctrl-C."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from .commands import COMMANDS
from .exit_status import ExitStatus

_STDOUT = "standard output"


class _Formatter(argparse.HelpFormatter):
    """argparse makes one for every argument, and looks up the width with a module of 4 ms."""

    def __init__(self, prog: str, **options: Any) -> None:
        try:
            width = os.get_terminal_size().columns
        except (OSError, ValueError):
            width = 80
        super().__init__(prog, **{"width": width - 2, **options})


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitStatus.USAGE, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def _module(command: str) -> Any:
    return import_module(f".commands.{command}", __package__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed: what would be said there must not go anywhere else
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    parser = _Parser(
        prog="kvmpriv", description="KVM guest private memory: probe it, use it, test it."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS:
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if arguments[:1] == [name]:  # only the one that is asked for is imported
            _module(name).add_arguments(command)
    parsed = parser.parse_args(arguments)
    if sys.stdout is None:
        print("kvmpriv: standard output is closed", file=sys.stderr)
        return ExitStatus.UNABLE
    if argv is None:  # we are the process, and its output is ours
        _prepare_output()
    try:
        status: int = _module(parsed.command).main(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        status = ExitStatus.SIGNALLED + 13  # as if SIGPIPE had ended this process
    except KeyboardInterrupt:
        status = ExitStatus.SIGNALLED + 2
        with suppress(OSError):  # what was printed before it is no less true
            sys.stdout.flush()
    except OSError as error:
        if error.filename != _STDOUT:
            raise
        print(f"kvmpriv: {_STDOUT}: {error.strerror}", file=sys.stderr)
        status = ExitStatus.UNABLE
    else:
        return status
    _discard_stdout()
    return status


class _Stdout(io.FileIO):
    """File descriptor 1, whose errors say that it was the output that failed."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            error.filename = _STDOUT
            raise


def _prepare_output() -> None:
    """A terminal that can't show a character is no reason to fail; a full disk is one to say so."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    raw = _Stdout(sys.stdout.fileno(), "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=sys.stdout.encoding,
        errors="backslashreplace",
        line_buffering=raw.isatty(),
    )


def _discard_stdout() -> None:
    """What is still buffered has nowhere to go; Python must not try once more at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
