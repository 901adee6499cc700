"""Linux, brought up by a script: kernels taken apart, a machine for them, and what became of it."""

from . import initrd, recording
from .kernel import LinuxImage, load_bzimage, load_linux, load_vmlinux
from .layout import Range, plan, private_cmdline
from .machine import EXIT_STATUSES, Cost, LinuxMachine, Outcome

__all__ = [
    "EXIT_STATUSES",
    "Cost",
    "LinuxImage",
    "LinuxMachine",
    "Outcome",
    "Range",
    "initrd",
    "load_bzimage",
    "load_linux",
    "load_vmlinux",
    "plan",
    "private_cmdline",
    "recording",
]
