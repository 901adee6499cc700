"""``kvmpriv probe``: what this host's KVM can do with private memory, tried for real."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..exit_status import ExitStatus
from ..probe import VERDICTS, probe, report
from ..probe.records import FAIL
from ..terminal import colour_wanted
from . import fail
from ._options import add_device

if TYPE_CHECKING:
    import argparse

__all__ = ["EXAMPLES", "EXIT_STATUS", "add_arguments", "main"]


EXAMPLES = (
    ("kvmpriv probe", "print the verdict, each check with its hint, and facts about the host"),
    ("kvmpriv probe -q && echo usable", "use the verdict in a script"),
    ("kvmpriv probe --json > host.json", "keep the findings"),
)
EXIT_STATUS: dict[ExitStatus | str, str] = {
    ExitStatus.OK: "usable private memory",
    ExitStatus.NEGATIVE: "probed, none usable",
    ExitStatus.USAGE: "the command line can't be used",
    ExitStatus.UNABLE: "could not probe, or standard output can't be written",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kvmpriv probe``."""
    parser.description = (
        "Find out what this host's KVM can do with guest private memory, by trying it. The first "
        f"line is the verdict: {', '.join(VERDICTS)}.\n\n"
        "PASS: asked or tried, and KVM does it. FAIL: KVM refused it. SKIP: not tried, or "
        "undecided. The probe changes nothing on the host."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document; kvmpriv/probe/schema.json describes it",
    )
    form.add_argument(
        "-q", "--quiet", action="store_true", help="print the verdict alone, on one line"
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="also list the processes that have the device open (takes longer)",
    )
    add_device(parser)


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
