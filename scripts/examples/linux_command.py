#!/usr/bin/env python3
"""Boot a Linux kernel, run a command in it, and return the command's exit status.

    scripts/examples/linux_command.py /boot/vmlinuz-6.1.0-56-amd64 'nproc; free -m; exit 3'

The command runs in a root file system of its own, made here.  It holds busybox, and the virtio
drivers of a kernel that has them as modules (from /lib/modules).
`kvmpriv boot --kernel KERNEL --run COMMAND` does the same.  Exit status: the command's; 2 for bad
usage.
"""

from __future__ import annotations

import sys

from kvmpriv.guest.linux import GuestDied, LinuxGuest


def run(kernel: str, command: str) -> int:
    with LinuxGuest(kernel) as guest:
        done = guest.run(command)
    sys.stdout.buffer.write(done.stdout)
    sys.stderr.buffer.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(run(*sys.argv[1:]))
    except GuestDied as died:
        print(f"linux_command.py: {died}", file=sys.stderr)
        sys.exit(died.outcome.status)
    except (OSError, ValueError) as error:
        sys.exit(f"linux_command.py: {error}")
