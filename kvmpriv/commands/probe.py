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
from ._options import add_device, parse_path

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

__all__ = ["EXAMPLES", "EXIT_STATUS", "add_arguments", "main"]


_TO_PRINT = 0.1  # seconds of CPU time that are kept for the answer

EXAMPLES = (
    ("kvmpriv probe", "print the verdict, each check with its hint, and facts about the host"),
    ("kvmpriv probe -q && echo usable", "use the verdict in a script"),
    ("kvmpriv probe --json > host.json", "keep the findings"),
    (
        "kvmpriv probe --format prometheus --output /var/lib/node_exporter/kvmpriv.prom",
        "write metrics for node_exporter's textfile collector",
    ),
    (
        'ln -s "$(command -v kvmpriv)" /etc/ansible/facts.d/kvmpriv.fact',
        "let Ansible read the findings as the fact ansible_local.kvmpriv",
    ),
)
FORMATS = ("text", "json", "prometheus", "nfd", "ansible")
EXIT_STATUS: dict[ExitStatus | str, str] = {
    ExitStatus.OK: "usable private memory",
    ExitStatus.NEGATIVE: "probed, none usable",
    ExitStatus.USAGE: "the command line can't be used",
    ExitStatus.UNABLE: "could not probe, or the output can't be written",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kvmpriv probe``."""
    parser.description = (
        "Find out what this host's KVM can do with guest private memory, by trying it. The first "
        f"line is the verdict: {', '.join(VERDICTS)}.\n\n"
        "PASS: asked or tried, and KVM does it. FAIL: KVM refused it. SKIP: not tried, or "
        "undecided. The probe changes nothing on the host.\n\n"
        "The formats of --format: text for people. json: one document; kvmpriv/probe/schema.json "
        "describes it. prometheus: metrics for node_exporter's textfile collector. nfd: a feature "
        "file for Kubernetes' node-feature-discovery, to be written to "
        "/etc/kubernetes/node-feature-discovery/features.d/. ansible: a local fact, in JSON. A "
        "link to kvmpriv whose name ends with .fact in /etc/ansible/facts.d is a fact script: "
        "without arguments it prints the fact, and it exits with 0 whatever the verdict is, as "
        "Ansible does not read the output of a script that fails."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="the format of the output (default: %(default)s)",
    )
    form.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="format",
        help="the same as --format json",
    )
    form.add_argument(
        "-q", "--quiet", action="store_true", help="print the verdict alone, on one line"
    )
    parser.add_argument(
        "--output",
        type=parse_path,
        metavar="FILE",
        help="write to FILE instead of standard output: FILE is replaced in one step, and stays as "
        "it is if that fails",
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
    to_terminal = arguments.output is None and colour_wanted()
    if arguments.quiet:
        text = f"{found.verdict}\n"
    elif arguments.format == FORMATS[0]:
        text = report.text(found, colour=to_terminal)
    else:
        from ..probe.formats import FORMATS as RENDERERS

        text = RENDERERS[arguments.format](found)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        from ..output import write_file

        try:
            write_file(arguments.output, text, replace_only=True)
        except OSError as error:
            return fail("probe", f"{arguments.output}: {error.strerror}", ExitStatus.UNABLE)
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
