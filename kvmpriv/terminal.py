"""What a terminal can show: plain text, colours, and sizes as people read them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BOLD", "DIM", "GREEN", "MAGENTA", "RED", "YELLOW", "OutputError"]
__all__ += ["colour_wanted", "format_size", "painter", "plain", "printable"]

#: Codes for `painter`'s function (ECMA-48, SGR).
BOLD, DIM, RED, GREEN, YELLOW, MAGENTA = "1", "2", "31", "32", "33", "35"


class OutputError(OSError):
    """Standard output can't be written."""


def colour_wanted() -> bool:
    """Whether standard output is a terminal with colours, and NO_COLOR is not set."""
    dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not dumb


def painter(colour: bool) -> Callable[[str, str], str]:
    """Return a function of a code and a text; without `colour` it returns the text as it is."""
    return lambda code, text: f"\x1b[{code}m{text}\x1b[0m" if colour else text


def plain(text: str) -> str:
    """Escape everything but printable ASCII.

    Names that come from elsewhere may hold control characters, or characters that the terminal's
    encoding lacks.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if " " <= char <= "~" else ascii(char)[1:-1] for char in text)


def printable(text: str) -> str:
    """Escape control characters and undecodable bytes, so that a name can't move the cursor."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def format_size(count: int | None) -> str:
    """Bytes in the largest binary unit that leaves at least 1; None is "unknown"."""
    if count is None:
        return "unknown"
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"
