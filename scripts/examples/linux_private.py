#!/usr/bin/env python3
"""Boot Linux with its applications' memory private, and search for their data from the host.

A program in the guest fills its memory with a marker.  Afterwards the host searches everything that
it can read: it must not find this marker, and must find another one, which is in shared memory.

    scripts/examples/linux_private.py KERNEL [ABI [MEBIBYTES [FILE]]]

The guest's kernel is in shared memory, and so is what the kernel holds of a program: data in pipes
and sockets, and the registers of a program that was interrupted.  Up to 64 bytes of the marker have
been seen there while the program copied it.  The host therefore searches for a longer string.

FILE gets a recording, which `kvmpriv trace FILE` shows.  Standard output gets the result as JSON.
Exit status: 0 if the host found what it may find, 1 if not, 2 for bad usage, 77 without private
memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvmpriv import Kvm, private
from kvmpriv.guest.linux import LinuxMachine, initrd, load_linux, plan

SKIP = 77  # the exit status by which test harnesses recognise a skipped test
MIB, PAGE_SIZE = 1 << 20, 4096

# The guest puts the marker together, so that the host never had it.  Each copy is a string in awk's
# memory; none passes through the kernel's memory.
PROGRAM = r"""
pages=$(awk '/Movable/ { here = 1 } here && /managed/ { print $2; exit }' /proc/zoneinfo)
echo movable $pages >/dev/ttyS1
# Fill all but 6 %: the kernel keeps some pages free, and would use shared memory before those.
awk -v count=$((pages * 94 / 100 / 256)) 'BEGIN {
    piece = "the guest" " keeps this " "to itself. "
    while (length(piece) < 1048000) piece = piece piece
    piece = substr(piece, 1, 1048000)
    for (at = 0; at < count; at++) copy[at] = piece at
    print "filled " count >"/dev/ttyS1"
}'
echo exit 0 >/dev/ttyS1
poweroff -f
"""
SECRET = b"the guest keeps this to itself. " * 64  # 2 KiB: more than all vector registers
OPEN = b"kvmpriv.open=readable-by-the-host"


def main(
    kernel: str, name: str | None = None, mebibytes: str = "512", trace: str | None = None
) -> int:
    try:
        files = initrd.busybox(PROGRAM)
        kvm = Kvm()
        abi = private.choose(kvm, name)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return SKIP
    with (
        kvm,
        LinuxMachine(
            kvm,
            load_linux(Path(kernel).read_bytes()),
            plan(int(mebibytes) * MIB, private=True),
            initrd=files,
            cmdline=f"quiet {OPEN.decode()}",
            abi=abi,
            output=sys.stderr.buffer.write,
        ) as guest,
    ):
        outcome = guest.run(timeout=900, trace=trace)
        usage = guest.usage()
        found = {"secret": guest.search(SECRET), "open": guest.search(OPEN)}
    said = dict(line.split(" ", 1) for line in guest.said)
    filled = int(said.get("filled", 0)) * MIB
    result = {
        "abi": abi.name,
        "outcome": outcome._asdict(),
        "cmdline": guest.cmdline,
        "ranges": [{**use.range._asdict(), "resident": use.resident} for use in usage],
        "movable": int(said.get("movable", 0)) * PAGE_SIZE,
        "filled": filled,
        "private": sum(use.private for use in usage),
        "found": found,
    }
    print(json.dumps(result, indent=2))
    as_expected = outcome.how == "off" and not found["secret"] and found["open"] and filled
    words = "the host found only the shared marker" if as_expected else "UNEXPECTED RESULT"
    print(words, file=sys.stderr)
    return 0 if as_expected else 1


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 5:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(main(*sys.argv[1:]))
    except (OSError, ValueError) as error:  # the kernel, the size or the ABI can't be used
        sys.exit(f"linux_private.py: {error}")
