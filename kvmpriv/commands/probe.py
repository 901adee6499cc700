"""``kvmpriv probe``: what this host's KVM can do with private memory, tried for real."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..exit_status import ExitStatus
from ..probe import DEVICE, VERDICTS, probe, report
from ..probe.records import FAIL
from ..terminal import colour_wanted
from . import fail

if TYPE_CHECKING:
    import argparse

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvmpriv probe``."""
    parser.description = (
        "Find out what this host's KVM can do with guest private memory, by trying it. The first "
        f"line is the verdict: {', '.join(VERDICTS)}. PASS: asked or tried, and it does; FAIL: it "
        "does not; SKIP: not tried or undecided. Nothing on the host is changed."
    )
    parser.epilog = (
        "exit status: 0 usable private memory; 1 probed, none usable; 2 usage; 3 could not probe"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json",
        action="store_true",
        help="one JSON document, as kvmpriv/probe/schema.json describes it",
    )
    form.add_argument("-q", "--quiet", action="store_true", help="the verdict alone, on one line")
    parser.add_argument(
        "--verbose", action="store_true", help="say also who holds the device (takes longer)"
    )
    parser.add_argument(
        "--device", default=DEVICE, metavar="PATH", help="KVM's device node (%(default)s)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Probe and print; returns the exit status."""
    found = probe(arguments.device, verbose=arguments.verbose and not arguments.quiet)
    if arguments.quiet:
        sys.stdout.write(f"{found.verdict}\n")
    elif arguments.json:
        import json

        json.dump(found.to_json(), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(report.text(found, colour=colour_wanted()))
    if found.exit_status == ExitStatus.UNABLE:
        failed = next(check for check in found.checks if check.status == FAIL and check.tried)
        why = f"{failed.tried}: {failed.result}{f' ({failed.hint})' if failed.hint else ''}"
        fail("probe", f"could not probe: {why}", ExitStatus.UNABLE)
    return found.exit_status
