"""Buses: which device an access to a port or to device memory goes to."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ...errors import ArgumentError

__all__ = ["Bus", "BusRange", "Registers", "ranges_overlap", "shown"]

_SMALL = 4096  # addresses; such a device is found by one look into a table


class Registers(Protocol):
    """What a bus needs of a device; `device.Device` is the base class for programs.

    Any vCPU's thread may call it at any time, also several at once.  `offset` counts from the
    device's first address; `size` is 1 to 8 bytes.  An exception that a method raises ends the
    guest, and `LinuxMachine.run` raises it.
    """

    def read(self, offset: int, size: int) -> int:
        """The value that the guest reads; what exceeds `size` bytes is cut off."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes `value`."""
        ...


class BusRange(NamedTuple):
    """The addresses of a device: `size` addresses from `start` on."""

    start: int
    size: int
    #: For a person.
    name: str

    def __str__(self) -> str:
        return f"{self.name} ({shown(self.start, self.size)})"


def shown(start: int, size: int) -> str:
    """A range for a person: ``0x3f8…0x3ff``."""
    return f"{start:#x}…{start + size - 1:#x}"


def ranges_overlap(start: int, size: int, other: BusRange) -> bool:
    """Whether some of `size` addresses from `start` on are in `other`."""
    return start < other.start + other.size and other.start < start + size


class Bus:
    """Devices by address.  Where there is none, reads give all ones and writes have no effect."""

    def __init__(self) -> None:
        self._devices: dict[int, tuple[Registers, int]] = {}
        self._large: list[tuple[Registers, BusRange]] = []
        #: The devices, in the order in which they were added.
        self.ranges: list[BusRange] = []

    def add(self, device: Registers, start: int, size: int, name: str = "") -> None:
        """Give `device` the `size` addresses from `start` on.

        A recording calls it `name`, or by its class without one.  ArgumentError if it has no
        address, or if another device has one of them.
        """
        added = BusRange(start, size, name or type(device).__name__)
        if start < 0 or size < 1:
            raise ArgumentError(f"a device has at least 1 address, from 0 on: {added}")
        for other in self.ranges:
            if ranges_overlap(start, size, other):
                raise ArgumentError(f"{added} overlaps {other}")
        if size > _SMALL:
            self._large.append((device, added))
        else:
            for address in range(start, start + size):
                self._devices[address] = (device, address - start)
        self.ranges.append(added)

    def _find(self, address: int) -> tuple[Registers, int] | None:
        for device, (start, size, _) in self._large:
            if start <= address < start + size:
                return device, address - start
        return None

    def read(self, address: int, size: int) -> int:
        """Read `size` bytes from the device at `address`."""
        found = self._devices.get(address) or self._find(address)
        if found is None:
            return (1 << 8 * size) - 1
        device, offset = found
        return device.read(offset, size)

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` bytes to the device at `address`."""
        found = self._devices.get(address) or self._find(address)
        if found is not None:
            found[0].write(found[1], size, value)
