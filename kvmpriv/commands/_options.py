"""Types of arguments, and options that several commands have."""

from __future__ import annotations

import argparse
import os
import re

from ..memory import PAGE_SIZE

__all__ = [
    "add_device",
    "device_error",
    "parse_number",
    "parse_path",
    "parse_seconds",
    "parse_size",
]

DEVICE = "/dev/kvm"

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


def parse_path(text: str) -> str:
    """The name of a file.  As the type of an argument it makes shells complete file names."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file is empty")
    return text


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``: which node to open for KVM."""
    parser.add_argument(
        "--device",
        type=parse_path,
        default=DEVICE,
        metavar="PATH",
        help="KVM's device node (default: %(default)s)",
    )


def device_error(device: str, error: OSError) -> str:
    """Say why the device that was given as ``--device`` can't be used, and what to do."""
    from ..probe import host

    if hint := host.device_hint(device, error.errno, host.facts()):
        return f"{device}: {os.strerror(error.errno or 0)} ({hint})"
    return f"{device}: {error.strerror}"


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
