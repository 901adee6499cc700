"""The commands: a module for each, with `add_arguments` and `main`, and what they share."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from ..terminal import printable

if TYPE_CHECKING:
    from ..exit_status import ExitStatus

__all__ = ["COMMANDS", "fail", "warn"]


#: The name of each command, which is its module's too, and its help in one line.
COMMANDS = {
    "probe": "find out what private memory this host can give to guests",
    "ps": "list the processes that have KVM, VMs and private memory open",
    "run": "run a guest from a flat binary or an ELF file",
    "boot": "boot Linux from a bzImage or a vmlinux",
    "trace": "summarise a recording of `boot --trace`, as text or HTML",
    "selftest": "test the running kernel against the rules of private memory",
}


def fail(command: str, message: str, status: ExitStatus) -> ExitStatus:
    """Print the message of a command that failed to standard error; returns `status`."""
    warn(command, message)
    return status


def warn(command: str, message: str) -> None:
    """Print a message of a command to standard error, if that can be written."""
    lines = "\n".join(printable(line) for line in message.splitlines())
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"{' '.join(filter(None, ['kvmpriv', command]))}: {lines}", file=sys.stderr)
