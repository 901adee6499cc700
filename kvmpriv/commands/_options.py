"""Types of arguments, and options that several commands have."""

from __future__ import annotations

import argparse
import os
import re

from ..memory import PAGE_SIZE

__all__ = ["parse_number", "parse_seconds", "parse_size"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZES = "write bytes (4096, 0x1000) or a whole number with K, M, G or T (512M)"


def parse_size(text: str) -> int:
    """``16M``, ``0x10000``, ``4096``: bytes, page aligned, no more than the host has."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)([KMGT]?)(?:i?B)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: {_SIZES}")
    size = int(match[1], 0 if match[1][:2] in ("0x", "0X") else 10) * _UNITS[match[2]]
    if size == 0:
        raise argparse.ArgumentTypeError("the size must be more than 0")
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > host:
        raise argparse.ArgumentTypeError(f"{text} is more than this host has ({host >> 20}M)")
    if size % PAGE_SIZE:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {PAGE_SIZE} bytes")
    return size


def parse_number(text: str) -> int:
    """An address: decimal, or hexadecimal with 0x."""
    try:
        number = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def parse_seconds(text: str) -> float:
    """A time limit: seconds, more than 0, up to 1000000."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1_000_000:  # beyond it, a poll can't wait
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0 and up to 1000000"
        )
    return seconds
