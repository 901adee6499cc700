"""Linux, brought up by a script: kernels taken apart, a machine for them, and what became of it."""

from .image import LinuxImage, load_bzimage, load_linux, load_vmlinux
from .layout import Range, plan
from .machine import EXIT_STATUSES, LinuxMachine, Outcome

__all__ = [
    "EXIT_STATUSES",
    "LinuxImage",
    "LinuxMachine",
    "Outcome",
    "Range",
    "load_bzimage",
    "load_linux",
    "load_vmlinux",
    "plan",
]
