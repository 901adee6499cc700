"""``kvmpriv probe``: what this host's KVM can do with private memory, tried for real."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from ..exit_status import ExitStatus
from ..libc import RLIMIT_CPU, soft_limit
from ..probe import VERDICTS, probe, report
from ..probe.records import COULD_NOT_PROBE
from ..terminal import colour_wanted
from . import fail
from ._options import add_device

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

__all__ = ["EXAMPLES", "EXIT_STATUS", "add_arguments", "main"]


_TO_PRINT = 0.1  # seconds of CPU time that are kept for the answer

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
    verbose = arguments.verbose and not arguments.quiet
    found = probe(arguments.device, verbose=verbose, out_of_time=_cpu_time_ends())
    if arguments.quiet:
        sys.stdout.write(f"{found.verdict}\n")
    elif arguments.json:
        import json

        json.dump(found.to_json(), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(report.text(found, colour=colour_wanted()))
    if found.verdict == COULD_NOT_PROBE:
        fail("probe", f"{found.verdict}: {found.meaning}", ExitStatus.UNABLE)
    return found.exit_status


def _cpu_time_ends() -> Callable[[], object]:
    """Return a function that returns true when this process's CPU time is about to end.

    At the soft limit of RLIMIT_CPU the kernel sends SIGXCPU, at the hard limit SIGKILL; `ulimit -t`
    sets both.
    """
    limit = soft_limit(RLIMIT_CPU)
    return bool if limit is None else lambda: time.process_time() > limit - _TO_PRINT
