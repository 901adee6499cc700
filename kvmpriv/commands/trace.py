"""``kvmpriv trace``: what a recorded run was, in words and as a picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..exit_status import ExitStatus
from ..output import is_same_file, write_file
from ..trace import TraceError, document, page, read, text
from . import fail, warn
from ._options import parse_path

__all__ = ["EXAMPLES", "EXIT_STATUS", "add_arguments", "main"]


EXAMPLES = (
    ("kvmpriv boot --kernel bzImage --trace linux.trace", "record a run"),
    ("kvmpriv trace linux.trace --page linux.html", "print its summary, and draw it"),
)
EXIT_STATUS: dict[ExitStatus | str, str] = {
    ExitStatus.OK: "the recording was shown",
    ExitStatus.USAGE: "the command line or the recording can't be used",
    ExitStatus.UNABLE: "the page or standard output can't be written",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kvmpriv trace``."""
    parser.description = (
        "Print the summary of a run that `kvmpriv boot --trace` recorded: its exits, its "
        "conversions between private and shared memory, and its use of memory and CPU time."
    )
    parser.add_argument(
        "file", type=parse_path, metavar="FILE", help="a recording of `kvmpriv boot --trace FILE`"
    )
    parser.add_argument(
        "--page",
        type=parse_path,
        metavar="HTML",
        help="also draw memory, conversions, exits, CPU time and resident memory over time, as one"
        " HTML page",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the summary as one JSON document"
    )


def main(options: argparse.Namespace) -> int:
    """Print the summary and write the page; returns the exit status."""
    if options.page is not None and is_same_file(options.file, options.page):
        return fail("trace", f"--page {options.page} is the recording itself", ExitStatus.USAGE)
    try:
        recording = read(Path(options.file))
    except (TraceError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return fail("trace", f"{options.file}: {reason}", ExitStatus.USAGE)
    if options.json:
        print(json.dumps(document(recording), indent=2))
    else:
        for line in text(recording):
            print(line)
    if recording.cut_off:
        warn("trace", "the last line is incomplete and was left out")
    if options.page is None:
        return ExitStatus.OK
    sys.stdout.flush()  # the page may go there, too
    try:
        write_file(options.page, "".join(page(recording)))
    except OSError as error:
        return fail("trace", f"{options.page}: {error.strerror}", ExitStatus.UNABLE)
    return ExitStatus.OK
