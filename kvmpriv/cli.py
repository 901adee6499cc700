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

#: Ours, where a command has no better: usage, output that could not be written, Ctrl-C.
EXIT_USAGE, EXIT_OUTPUT = 2, 3
_SIGNALLED = 128
_STDOUT = "standard output"

#: command -> (module with add_arguments() and main(), one line of help)
COMMANDS = {
    "probe": ("kvmpriv.probe", "what private memory this machine can give to guests"),
    "run": ("kvmpriv.guest.run", "bring up a guest from a flat binary or an ELF file"),
    "boot": ("kvmpriv.guest.linux.command", "bring up Linux from a bzImage or a vmlinux"),
    "trace": ("kvmpriv.trace", "show a recorded run, in words and as a picture"),
    "selftest": ("kvmpriv.selftest", "hold the running kernel to the rules of private memory"),
}


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
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed: what would be said there must not go anywhere else
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    parser = _Parser(
        prog="kvmpriv", description="KVM guest private memory: probe it, use it, test it."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if arguments[:1] == [name]:  # only the one that is asked for is imported
            import_module(module).add_arguments(command)
    parsed = parser.parse_args(arguments)
    if sys.stdout is None:
        print("kvmpriv: standard output is closed", file=sys.stderr)
        return EXIT_OUTPUT
    if argv is None:  # we are the process, and its output is ours
        _prepare_output()
    try:
        status: int = import_module(COMMANDS[parsed.command][0]).main(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        status = _SIGNALLED + 13  # as if SIGPIPE had ended us: whoever read has read enough
    except KeyboardInterrupt:
        status = _SIGNALLED + 2
        with suppress(OSError):  # what was printed before it is no less true
            sys.stdout.flush()
    except OSError as error:
        if error.filename != _STDOUT:
            raise
        print(f"kvmpriv: {_STDOUT}: {error.strerror}", file=sys.stderr)
        status = EXIT_OUTPUT
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
