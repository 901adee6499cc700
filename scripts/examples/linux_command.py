#!/usr/bin/env python3
"""Boot a Linux kernel, run a command in it, and return the command's exit status.

    scripts/examples/linux_command.py /boot/vmlinuz-6.1.0-56-amd64 'nproc; free -m; exit 3'

The command runs in a root file system of its own, made here, which holds busybox and nothing else.
Exit status: the command's; 2 for bad usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvmpriv import Kvm
from kvmpriv.guest.linux import LinuxMachine, initrd, load_linux, plan


def run(kernel: str, command: str) -> int:
    script = f"({command})\necho exit $? >/dev/ttyS1\npoweroff -f"
    with (
        Kvm() as kvm,
        LinuxMachine(
            kvm,
            load_linux(Path(kernel).read_bytes()),
            plan(256 << 20),
            initrd=initrd.busybox(script),
            cmdline="quiet",
            output=sys.stdout.buffer.write,
        ) as guest,
    ):
        outcome = guest.run(timeout=120)
    if outcome.how != "off":
        print(f"linux_command.py: {outcome.how}: {outcome.why}", file=sys.stderr)
    return outcome.status


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(run(*sys.argv[1:]))
    except (OSError, ValueError) as error:
        sys.exit(f"linux_command.py: {error}")
