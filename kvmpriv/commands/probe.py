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

    from ..probe.profiles import Profile

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
    ("kvmpriv probe --for qemu-guest-memfd", "find out whether a VMM's feature works here"),
)
FORMATS = ("text", "json", "prometheus", "nfd", "ansible")
EXIT_STATUS: dict[ExitStatus | str, str] = {
    ExitStatus.OK: "usable private memory; with --for: all profiles are usable",
    ExitStatus.NEGATIVE: "probed, none usable; with --for: one of the profiles is not usable",
    ExitStatus.USAGE: "the command line or a profile can't be used",
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
        "--for",
        dest="profiles",
        action="append",
        metavar="PROFILE,...",
        help="report whether this host has what a VMM's feature needs, and what is missing. The"
        " exit status is about these profiles. --for help lists them",
    )
    parser.add_argument(
        "--profiles",
        dest="folder",
        type=parse_path,
        metavar="DIR",
        help="use the profiles in this folder, too: files NAME.profile"
        " (`pydoc kvmpriv.probe.profiles` describes them)",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="also list the processes that have the device open (takes longer)",
    )
    add_device(parser)


def main(arguments: argparse.Namespace) -> int:
    """Probe and print; returns the exit status."""
    wanted: list[Profile] = []
    if arguments.profiles or arguments.folder:
        from ..probe.profiles import ProfileError, judge

        try:
            wanted = _choose(arguments)
        except ProfileError as error:
            return fail("probe", str(error), ExitStatus.USAGE)
        if not wanted:
            return ExitStatus.OK
    verbose = arguments.verbose and not arguments.quiet
    found = probe(arguments.device, verbose=verbose, out_of_time=_cpu_time_ends())
    if wanted:
        found = found._replace(profiles=tuple(judge(profile, found) for profile in wanted))
    to_terminal = arguments.output is None and colour_wanted()
    if arguments.quiet and wanted:
        text = "".join(f"{one.profile.name}: {one.verdict}\n" for one in found.profiles or ())
    elif arguments.quiet:
        text = f"{found.verdict}\n"
    elif arguments.format == FORMATS[0]:
        render = report.profiles_text if wanted else report.text
        text = render(found, colour=to_terminal)
    else:
        from ..probe.formats import FORMATS as RENDERERS

        text = RENDERERS[arguments.format](found)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        from ..output import is_same_file, write_file

        if is_same_file(
            arguments.output, sys.argv[0]
        ):  # the link that is a fact script leads to it
            message = f"--output {arguments.output} is the program itself"
            return fail("probe", message, ExitStatus.USAGE)
        try:
            write_file(arguments.output, text, replace_only=True)
        except OSError as error:
            return fail("probe", f"{arguments.output}: {error.strerror}", ExitStatus.UNABLE)
    if found.exit_status == ExitStatus.UNABLE:
        fail("probe", f"{COULD_NOT_PROBE}: {found.meaning}", ExitStatus.UNABLE)
    return found.exit_status


def _choose(arguments: argparse.Namespace) -> list[Profile]:
    """The profiles of --for; none if it asks for the list, which is printed.  ProfileError."""
    from ..probe import profiles

    names = [name.strip() for text in arguments.profiles or ["help"] for name in text.split(",")]
    if "help" in names:
        folders = [profiles.BUILT_IN, *filter(None, [arguments.folder])]
        for folder in folders:
            for profile in profiles.read_folder(folder):
                sys.stdout.write(f"{profile.name}\n    {profile.summary}\n")
        return []
    try:
        return profiles.find(names, arguments.folder)
    except KeyError as error:
        known = profiles.available(profiles.BUILT_IN)
        if arguments.folder:
            known += profiles.available(arguments.folder)
        message = f"there is no profile {error.args[0]!r}: {', '.join(known)}"
        raise profiles.ProfileError(message) from None


def _cpu_time_ends() -> Callable[[], object]:
    """Return a function that returns true when this process's CPU time is about to end.

    At the soft limit of RLIMIT_CPU the kernel sends SIGXCPU, at the hard limit SIGKILL; `ulimit -t`
    sets both.
    """
    limit = soft_limit(RLIMIT_CPU)
    return bool if limit is None else lambda: time.process_time() > limit - _TO_PRINT
