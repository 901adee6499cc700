#!/usr/bin/env python3
"""Linux whose applications' memory is private: a program fills it with a marker.  The host, that
looks for it in all it can read, does not find it; another in shared memory it does find.

The kernel is in shared memory, and so is what it has of a program: what goes through a
pipe or socket, and the registers of one that was interrupted.  64 bytes of the marker have been
seen there, on their way from one page to another.  So what is looked for is longer than that.

    scripts/examples/linux_private.py KERNEL [ABI [MEBIBYTES [FILE]]]

`kvmpriv trace FILE` shows what happened meanwhile.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvmpriv import Kvm, private
from kvmpriv.guest.linux import LinuxMachine, initrd, load_linux, plan

SKIP = 77  # the exit status that test harnesses take for "can't be tried here"
MIB, PAGE_SIZE = 1 << 20, 4096

# The marker is put together in the guest, so that the host has never had it.  Each copy is a
# string in awk's memory, and none of them passes through the kernel's.
PROGRAM = r"""
pages=$(awk '/Movable/ { here = 1 } here && /managed/ { print $2; exit }' /proc/zoneinfo)
echo movable $pages >/dev/ttyS1
# All but what the kernel keeps free, and would take from elsewhere rather than give away.
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
OPEN = b"kvmpriv.open=what-everybody-may-read"


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
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except (OSError, ValueError) as error:  # no such kernel, not a number, an ABI of no name
        sys.exit(f"linux_private.py: {error}")
