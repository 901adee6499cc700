"""The command line: which command, and what every command does about its output and Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

#: Ours, where a command has no better: usage, output that could not be written, Ctrl-C.
EXIT_USAGE, EXIT_OUTPUT = 2, 3
_SIGNALLED = 128

#: command -> (module with add_arguments() and main(), one line of help)
COMMANDS = {
    "probe": ("kvmpriv.probe", "what private memory this machine can give to guests"),
    "run": ("kvmpriv.guest.run", "bring up a guest from a flat binary or an ELF file"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        prog="kvmpriv", description="KVM guest private memory: probe it, use it, test it."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if arguments[:1] == [name]:  # only the one that is asked for is imported
            import_module(module).add_arguments(command)
    parsed = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # a terminal that can't show a character is no reason to fail
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if sys.stdout is None:
        print("kvmpriv: standard output is closed", file=sys.stderr)
        return EXIT_OUTPUT
    try:
        status: int = import_module(COMMANDS[parsed.command][0]).main(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        status = _SIGNALLED + 13  # as if SIGPIPE had ended us: whoever read has read enough
    except KeyboardInterrupt:
        status = _SIGNALLED + 2
    except OSError as error:
        if error.filename is not None or not _stdout_broken(error):
            raise
        print(f"kvmpriv: standard output: {error.strerror}", file=sys.stderr)
        status = EXIT_OUTPUT
    else:
        return status
    _discard_stdout()
    return status


def _stdout_broken(error: OSError) -> bool:
    """Whether writing to standard output is what failed: then it fails again."""
    try:
        sys.stdout.flush()
    except OSError as again:
        return again.errno == error.errno
    return False


def _discard_stdout() -> None:
    """What is still buffered has nowhere to go; Python must not try once more at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
