"""Small files of /proc and /sys: what can't be read is None or empty, never an error."""

from __future__ import annotations

import os

__all__ = ["fields", "kib", "link", "names", "number", "read"]


def read(path: str, size: int = 65536) -> str | None:
    """The beginning of a file, None if it can't be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, size).decode(errors="replace").strip("\0\n ")
    except OSError:
        return None
    finally:
        os.close(fd)


def names(path: str) -> list[str]:
    """The names in a folder, sorted; none if it can't be listed."""
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def link(path: str) -> str | None:
    """The target of a link, None if it can't be read."""
    try:
        return os.readlink(path)
    except OSError:
        return None


def fields(text: str | None) -> dict[str, str]:
    """``name: value`` lines."""
    lines = (line.partition(":") for line in (text or "").splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def number(text: str | None) -> int | None:
    """The number that a text begins with, None if it begins with another word."""
    digits = (text or "").split(" ")[0]
    return int(digits) if digits.isdigit() else None


def kib(text: str | None) -> int | None:
    """The number of bytes of ``1024 kB``."""
    count = number(text)
    return None if count is None else count * 1024
