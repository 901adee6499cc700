#!/usr/bin/env python3
"""Linux whose applications' memory is private: a program fills it with a marker.  The host, that
looks for it in all it can read, does not find it; another in shared memory it does find.

    scripts/linux_private.py KERNEL [ABI]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from kvmpriv import Kvm, private
from kvmpriv.guest.linux import LinuxMachine, initrd, load_linux, plan, private_cmdline

MEMORY = 512 << 20
SKIP = 77  # the exit status that test harnesses take for "can't be tried here"
MIB = 1 << 20

# The marker is put together in the guest, so that the host has never had it.  Each copy is a
# string in awk's memory, and none of them passes through the kernel's.
PROGRAM = r"""
mebibytes=$(awk '/^MemAvailable/ { print int($2 / 1024) - 48 }' /proc/meminfo)
awk -v count="$mebibytes" 'BEGIN {
    piece = "the guest" " keeps this " "to itself. "
    while (length(piece) < 1048000) piece = piece piece
    piece = substr(piece, 1, 1048000)
    for (at = 0; at < count; at++) copy[at] = piece at
    print "movable " count >"/dev/ttyS1"
}'
awk '/Movable/ { here = 1 }
    here && /managed/ { print "managed " $2 >"/dev/ttyS1"; exit }' /proc/zoneinfo
echo exit 0 >/dev/ttyS1
poweroff -f
"""
SECRET, OPEN = b"the guest keeps this to itself. ", b"kvmpriv.open=what-everybody-may-read"


def main(kernel: str, name: str | None = None) -> int:
    try:
        kvm = Kvm()
        abi = private.choose(kvm, name)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return SKIP
    busybox = Path(shutil.which("busybox") or "/bin/busybox").read_bytes()
    ranges = plan(MEMORY, private=True)
    with (
        kvm,
        LinuxMachine(
            kvm,
            load_linux(Path(kernel).read_bytes()),
            ranges,
            initrd=initrd.busybox(busybox, PROGRAM),
            cmdline=f"quiet {OPEN.decode()}",
            abi=abi,
            output=sys.stderr.buffer.write,
        ) as guest,
    ):
        outcome = guest.run(timeout=400)
        usage = guest.usage()
        found = {marker: guest.search(marker) for marker in (SECRET, OPEN)}
    said = dict(line.split(" ", 1) for line in guest.said)
    movable = int(said.get("managed", 0)) * 4096
    filled = int(said.get("movable", 0)) * MIB
    result = {
        "abi": abi.NAME,
        "outcome": outcome._asdict(),
        "told": private_cmdline(ranges),
        "ranges": [{**use.range._asdict(), "resident": use.resident} for use in usage],
        "movable": movable,
        "filled": filled,
        "private": sum(use.private for use in usage),
        "found": {marker.decode(): addresses for marker, addresses in found.items()},
    }
    print(json.dumps(result, indent=2))
    right = outcome.how == "off" and not found[SECRET] and found[OPEN] and filled
    words = "hidden while private, found when shared" if right else "NOT AS IT SHOULD BE"
    print(words, file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
