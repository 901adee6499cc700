#!/usr/bin/env python3
"""Boot a Linux kernel, run a command in it, return its exit status.

    scripts/linux_command.py /boot/vmlinuz-6.1.0-56-amd64 'nproc; free -m; exit 3'

The command has busybox's tools, in a root file system that is made here; root's files stay away.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from kvmpriv import Kvm
from kvmpriv.guest.linux import LinuxMachine, initrd, load_linux, plan


def run(kernel: str, command: str) -> int:
    busybox = Path(shutil.which("busybox") or "/bin/busybox").read_bytes()
    script = f"({command})\necho exit $? >/dev/ttyS1\npoweroff -f"
    with (
        Kvm() as kvm,
        LinuxMachine(
            kvm,
            load_linux(Path(kernel).read_bytes()),
            plan(256 << 20),
            initrd=initrd.busybox(busybox, script),
            cmdline="quiet",
            output=sys.stdout.buffer.write,
        ) as guest,
    ):
        return guest.run(timeout=120).status


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:3]))
