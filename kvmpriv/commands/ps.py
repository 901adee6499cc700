"""``kvmpriv ps``: who has KVM, VMs and private memory open."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from .. import ps
from ..exit_status import ExitStatus
from ..ps import report
from ..terminal import colour_wanted
from . import fail
from ._options import DEVICE, parse_seconds

if TYPE_CHECKING:
    import argparse

__all__ = ["EXAMPLES", "EXIT_STATUS", "add_arguments", "main"]


EXAMPLES = (
    ("kvmpriv ps", "print who has KVM, VMs and private memory open"),
    ("kvmpriv ps --watch 5", "print it every 5 seconds, until Ctrl-C"),
    ("kvmpriv ps --json | jq '.vms[] | select(.left_behind)'", "find VMs without their creator"),
)
EXIT_STATUS: dict[ExitStatus | str, str] = {
    ExitStatus.OK: "it was printed",
    ExitStatus.USAGE: "the command line can't be used",
    ExitStatus.UNABLE: "could not read /proc, or standard output can't be written",
    "128+N": "signal N ended the command (130: Ctrl-C)",
}
_INTERVAL = 2.0
_CLEAR = "\x1b[H\x1b[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kvmpriv ps``."""
    parser.description = (
        "Print the processes that have KVM open, their VMs and their files of private memory "
        "(guest_memfd, memfd_restricted). A VM exists until the last descriptor of it, of one of "
        "its vCPUs, devices, statistics or guest_memfd files is closed, and the last mapping of "
        "them is removed. A VM that is kept alive without the process that made it is named.\n\n"
        "What is not reported is printed as ?. Nothing on the host is changed, and no descriptor "
        "of another process is taken over. Root sees all processes, and with debugfs mounted also "
        "which process made a VM and how much memory the VM's page tables map (IN GUEST); other "
        "users see their own processes.\n\n"
        "What can't be seen: descriptors in messages that no process has received yet "
        "(SCM_RIGHTS), in io_uring, or in the table of a thread that shares none with its process, "
        "as /proc lists the table of the first thread. To which VM a file belongs, if its process "
        "has several VMs, as no file names its VM. The VMs that a vfio device keeps alive. The "
        "memory slots: KVM's statistics have no total, and the counters that imply one "
        "(mmu_rmaps_stat) stop the VM's page faults while they are read. How much of a "
        "guest_memfd is allocated, unless its kernel counts that.\n\n"
        "An irqfd and a file of memfd_restricted do not keep a VM alive. A slot keeps a file of "
        "memfd_restricted, also after its last descriptor was closed: then it is not shown. A "
        "slot does not keep a guest_memfd."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document; kvmpriv/ps/schema.json describes it",
    )
    form.add_argument(
        "--watch",
        nargs="?",
        type=parse_seconds,
        const=_INTERVAL,
        metavar="SECONDS",
        help=f"print it again and again, with SECONDS between (default: {_INTERVAL:g})",
    )
    parser.add_argument(
        "--stat-restricted",
        action="store_true",
        help="read the sizes of memfd_restricted files, too. This crashes a kernel that has the "
        "v9 series without this project's fixes",
    )


def main(options: argparse.Namespace) -> int:
    """Print who has it open; returns the exit status."""
    try:
        while True:
            _show(options)
            if options.watch is None:
                return ExitStatus.OK
            sys.stdout.flush()
            time.sleep(options.watch)
    except ps.ProcError as error:
        return fail("ps", str(error), ExitStatus.UNABLE)


def _show(options: argparse.Namespace) -> None:
    found = ps.snapshot(DEVICE, stat_restricted=options.stat_restricted)
    if options.json:
        import json

        json.dump(found.to_json(), sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    terminal = sys.stdout.isatty()
    if options.watch is not None and terminal:
        sys.stdout.write(_CLEAR)
    sys.stdout.write(report.text(found, colour=colour_wanted(), width=_columns(terminal)))
    if options.watch is not None and not terminal:
        sys.stdout.write("\n")


def _columns(terminal: bool) -> int | None:
    """The width of the terminal, None if standard output is none."""
    from shutil import get_terminal_size

    return get_terminal_size().columns if terminal else None
