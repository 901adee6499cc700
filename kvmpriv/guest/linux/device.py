"""A device of your own for a Linux guest.

Behind ports, or at a guest physical address, it is a `Device`:

    class Doubler(Device):
        value = 0

        def read(self, offset, size):
            return 2 * self.value

        def write(self, offset, size, value):
            self.value = value


    guest.add_device(Doubler(), port=0x500, size=4)
    guest.add_device(Doubler(), mmio=0xE0000000, size=8)

A virtio device derives from `VirtioDevice`: ``guest.add_device(device)``; the machine chooses its
address and its interrupt, and describes it to the guest's kernel, which has a driver for it.
scripts/examples/linux_device.py shows each kind.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import ArgumentError
from ...fd import Fd
from .bus import BusRange, ranges_overlap, shown
from .layout import MMIO, VIRTIO_END, Range

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["INTERRUPTS", "Device", "InterruptLine", "check_interrupt", "check_mmio", "check_port"]

#: The interrupt lines that a device of your own may have: inputs of the interrupt controllers that
#: no other device of the machine uses.
INTERRUPTS = (5, 6, 7, 10, 11, 12, 14, 15)
_PORT_END, _ADDRESS_END = 1 << 16, 1 << 52
# KVM emulates these itself: another device there would see no access.
_PORTS_OF_KVM = (
    BusRange(0x20, 2, "KVM's interrupt controller"),
    BusRange(0x40, 4, "KVM's timer"),
    BusRange(0x61, 1, "KVM's timer"),
    BusRange(0xA0, 2, "KVM's interrupt controller"),
    BusRange(0x4D0, 2, "KVM's interrupt controller"),
)
_MMIO_TAKEN = (
    BusRange(MMIO, VIRTIO_END - MMIO, "the virtio devices"),
    BusRange(0xFEC00000, 0x1000, "KVM's I/O APIC"),
    BusRange(0xFEE00000, 0x1000, "the local APICs"),
    BusRange(0xFFFBC000, 0x4000, "KVM's own pages"),
)


class Device:
    """A device behind ports or in device memory: derive from it, and override `read` and `write`.

    Any vCPU's thread may call them at any time, also several at once.  An exception that a method
    raises ends the guest.  Whatever the guest writes is data of the guest: trust none of it.
    """

    #: For recordings and messages; "" for the name of the class.
    name: str = ""
    #: Its interrupt line; set when the device is added with ``irq``.
    line: InterruptLine | None = None

    def read(self, offset: int, size: int) -> int:
        """The value that the guest reads; what exceeds `size` bytes is cut off.

        `offset` counts from the device's first address; `size` is 1, 2 or 4 bytes, in device memory
        also 8.  An access that begins in the device may end behind it.
        """
        return (1 << 8 * size) - 1  # as where there is no device

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes `value`; `offset` and `size` as for `read`."""

    def interrupt(self) -> None:
        """Raise the device's interrupt line for a moment (an edge), from any thread.

        RuntimeError if it was added without ``irq``; without effect after the guest's end.
        """
        if self.line is None:
            raise RuntimeError(
                f"the device {self.name or type(self).__name__} has no interrupt line: add it with"
                " irq=N"
            )
        self.line.pulse()

    def close(self) -> None:
        """Close what the device has opened: its machine is closed."""


class InterruptLine:
    """An input of the guest's interrupt controllers."""

    def __init__(self) -> None:
        self._fd = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._lock = threading.Lock()

    def attach(self, irqfd: Callable[[int, int], object], gsi: int) -> None:
        """Let KVM raise `gsi` when the line is pulsed."""
        irqfd(self._fd.fileno(), gsi)

    def pulse(self) -> None:
        """Raise and lower it.  Without effect after close."""
        with self._lock:  # the number may not go to another file between the check and the write
            if not self._fd.closed:
                os.eventfd_write(self._fd.fileno(), 1)

    def close(self) -> None:
        with self._lock:
            self._fd.close()


def check_port(port: int, size: int) -> None:
    """ArgumentError unless `size` ports from `port` on may belong to a device."""
    _check(port, size, _PORT_END, "ports", _PORTS_OF_KVM)


def check_mmio(address: int, size: int, ram: Sequence[Range]) -> None:
    """ArgumentError unless `size` bytes at `address` may belong to a device."""
    taken = [BusRange(part.gpa, part.size, f"RAM ({part.purpose})") for part in ram]
    _check(address, size, _ADDRESS_END, "addresses", [*taken, *_MMIO_TAKEN])


def _check(start: int, size: int, end: int, what: str, taken: Sequence[BusRange]) -> None:
    if size < 1 or start < 0 or start + size > end:
        raise ArgumentError(
            f"{size} {what} from {start:#x} on: a device has at least 1, all of them from 0 to"
            f" {end - 1:#x}"
        )
    for other in taken:
        if ranges_overlap(start, size, other):
            raise ArgumentError(f"{what} {shown(start, size)} overlap {other}")


def check_interrupt(irq: int, taken: Sequence[int]) -> None:
    """ArgumentError unless a device may have the line `irq`; `taken` are those of other devices."""
    free = [line for line in INTERRUPTS if line not in taken]
    if irq not in free:
        which = "belongs to another device" if irq in taken else "is not for devices of your own"
        raise ArgumentError(
            f"irq {irq} {which}; free are {', '.join(map(str, free)) or 'none any more'}"
        )
