#!/usr/bin/env python3
"""Run a command in a guest with private memory, and print beside it what the host can see.

    scripts/examples/linux_talk.py KERNEL [ABI]

The command keeps a text in its memory.  While it runs, this program searches all of the guest's RAM
that the host can read: for the text, and for a word of the kernel's command line, which is in
shared memory.  Exit status: 0 if the host found only the second, 1 if not, 2 for bad usage, 77
without private memory.
"""

from __future__ import annotations

import sys

from kvmpriv import Kvm, private
from kvmpriv.guest.linux import GuestDied, LinuxGuest

SKIP = 77  # the exit status by which test harnesses recognise a skipped test
OPEN = "kvmpriv.open=readable-by-the-host"
# The guest puts the text together, so that the host never had it.
PROGRAM = """BEGIN {
    text = "only the guest" " knows this. "
    while (length(text) < 1000000) text = text text
    print length(text) " bytes are in my memory: \\"only the guest knows ...\\""
    fflush()
    getline
}"""
SECRET = b"only the guest knows this. " * 64  # longer than what a CPU's registers hold


def main(kernel: str, name: str | None = None) -> int:
    try:
        with Kvm() as kvm:
            abi = private.choose(kvm, name)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return SKIP
    with (
        LinuxGuest(kernel, private=abi.name, cmdline=f"quiet {OPEN}") as guest,
        guest.popen(["awk", PROGRAM], text=True) as program,
    ):
        print("the guest prints:", program.stdout.readline().strip())
        secret, shown = guest.machine.search(SECRET), guest.machine.search(OPEN.encode())
        hidden = sum(part.size for part in guest.machine.ranges if part.kind == "private") >> 20
    print(f"the host finds:   that text at {len(secret)} addresses; {hidden} MiB are private")
    print(f"                  the word {OPEN} at {len(shown)} addresses")
    return 0 if shown and not secret else 1


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(main(*sys.argv[1:]))
    except (GuestDied, OSError, ValueError) as error:
        sys.exit(f"linux_talk.py: {error}")
