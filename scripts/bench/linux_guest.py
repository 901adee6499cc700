"""Our side of linux.py: a guest whose console is standard output.

Usage: linux_guest.py KERNEL INITRD WORDS shared|private|virtio TAP-FD MEMORY VHOST DISK

With virtio its console is a virtio console.  VHOST is 1 if the host's kernel moves the packets,
else 0; DISK is the file of a disk, or empty.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from kvmpriv import Kvm, private
from kvmpriv.guest.linux import LinuxMachine, VirtioDevice, load_linux, plan
from kvmpriv.guest.linux.disk import Block
from kvmpriv.guest.linux.net import Net


def output(data: bytes) -> None:
    os.write(1, data)


def main(
    kernel: str,
    root: str,
    words: str,
    kind: str,
    tap: str,
    memory: str,
    vhost: str,
    disk: str,
) -> None:
    created = time.monotonic()
    devices: list[VirtioDevice] = []
    if int(tap) >= 0:
        devices.append(Net(int(tap), vhost=vhost == "1"))
    if disk:
        devices.append(Block(disk))
    with Kvm() as kvm:
        abi = private.choose(kvm) if kind == "private" else None
        with LinuxMachine(
            kvm,
            load_linux(Path(kernel).read_bytes()),
            plan(int(memory), private=abi is not None),
            initrd=Path(root).read_bytes(),
            cmdline=f"quiet {words}",
            abi=abi,
            devices=devices,
            output=output,
            console="virtio" if kind == "virtio" else "serial",
        ) as machine:
            output(b"created %f\n" % created)
            machine.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
