"""``kvmpriv trace``: what a recorded run was, in words and as a picture."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..exit_status import ExitStatus
from ..trace import TraceError, page, read, text
from . import fail

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="what `kvmpriv boot --trace FILE` wrote")
    parser.add_argument(
        "--page",
        metavar="HTML",
        help="draw it, too: memory, exits and conversions over time, as one HTML page",
    )


def main(options: argparse.Namespace) -> int:
    """Print the summary; returns the exit status."""
    try:
        recording = read(Path(options.file))
    except (TraceError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return fail("trace", f"{options.file}: {reason}", ExitStatus.USAGE)
    for line in text(recording):
        print(line)
    if recording.cut_off:
        print("kvmpriv trace: the last line is cut off, and left out", file=sys.stderr)
    if options.page is None:
        return ExitStatus.OK
    # A page is there whole or not at all: one that was there before is not lost either.
    beside = f"{options.page}.{os.getpid()}.new"
    try:
        with open(beside, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.writelines(page(recording))
        os.replace(beside, options.page)  # noqa: PTH105
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        return fail("trace", f"{options.page}: {error.strerror}", ExitStatus.UNABLE)
    return ExitStatus.OK
