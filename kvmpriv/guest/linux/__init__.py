"""Linux guests: load a kernel, give it a machine, run it, and learn how it ended.

`LinuxGuest` is a guest that runs in the background; a program runs commands in it:

    from kvmpriv.guest.linux import LinuxGuest

    with LinuxGuest("/boot/vmlinuz") as guest:
        print(guest.run("uname -a", text=True).stdout)

`LinuxMachine` is the machine alone:

    from pathlib import Path

    from kvmpriv import Kvm
    from kvmpriv.guest.linux import LinuxMachine, initrd, load_linux, plan

    kernel = load_linux(Path("/boot/vmlinuz").read_bytes())
    files = initrd.busybox("uname -a; poweroff -f")
    ranges = plan(256 << 20)
    with Kvm() as kvm, LinuxMachine(kvm, kernel, ranges, initrd=files, output=print) as linux:
        outcome = linux.run(timeout=60)

`initrd.busybox`, and `LinuxGuest` without an initrd, need a statically linked busybox on the host.
"""

from . import initrd
from .bus import Bus
from .device import Device
from .guest import GuestDied, LinuxGuest
from .kernel import LinuxImage, load_bzimage, load_linux, load_vmlinux
from .layout import Range, plan, private_cmdline
from .machine import LinuxMachine
from .outcome import EXIT_STATUSES, Interrupted, Outcome
from .process import GuestProcess
from .protocol import ProtocolError
from .supervisor import Input
from .usage import Cost, RangeUse
from .virtio import Chain, Queue, RingError, VirtioDevice

__all__ = [
    "EXIT_STATUSES",
    "Bus",
    "Chain",
    "Cost",
    "Device",
    "GuestDied",
    "GuestProcess",
    "Input",
    "Interrupted",
    "LinuxGuest",
    "LinuxImage",
    "LinuxMachine",
    "Outcome",
    "ProtocolError",
    "Queue",
    "Range",
    "RangeUse",
    "RingError",
    "VirtioDevice",
    "initrd",
    "load_bzimage",
    "load_linux",
    "load_vmlinux",
    "plan",
    "private_cmdline",
]
