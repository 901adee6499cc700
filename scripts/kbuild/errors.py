"""How the commands of this package fail: a message, and an exit status that tells the reason."""

from __future__ import annotations

import sys
from enum import IntEnum


class Status(IntEnum):
    """Exit statuses that the commands share."""

    FAILED = 1
    USAGE = 2  # also: something is missing and cannot be installed here
    NO_SOURCE = 3
    PATCH = 4
    CONFIG = 5
    COMPILE = 6
    SPACE = 7


class Refused(Exception):  # noqa: N818 (like SystemExit, it ends a run)
    """A problem that the caller has to solve: a paragraph of text and an exit status."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def say(text: str) -> None:
    """Print a message for people, on stderr."""
    print(text, file=sys.stderr, flush=True)
