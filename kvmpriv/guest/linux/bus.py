"""Buses: which device an access to a port or to device memory goes to."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ...errors import ArgumentError

__all__ = ["Bus", "BusRange", "Device"]


class Device(Protocol):
    """A device on a bus.  Any vCPU's thread may call it at any time, also several at once.

    `offset` counts from the device's first address; `size` is 1 to 8 bytes.  An exception that a
    method raises ends the guest, and `LinuxMachine.run` raises it.
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


class Bus:
    """Devices by address.  Where there is none, reads give all ones and writes have no effect."""

    def __init__(self) -> None:
        self._devices: dict[int, tuple[Device, int]] = {}
        #: The devices, in the order in which they were added.
        self.ranges: list[BusRange] = []

    def add(self, device: Device, start: int, size: int, name: str = "") -> None:
        """Give `device` the `size` addresses from `start` on.

        A recording calls it `name`, or by its class without one.  ArgumentError if another device
        has one of the addresses.
        """
        for address in range(start, start + size):
            if address in self._devices:
                raise ArgumentError(f"address {address:#x} already belongs to another device")
        for address in range(start, start + size):
            self._devices[address] = (device, address - start)
        self.ranges.append(BusRange(start, size, name or type(device).__name__))

    def read(self, address: int, size: int) -> int:
        """Read `size` bytes from the device at `address`."""
        found = self._devices.get(address)
        if found is None:
            return (1 << 8 * size) - 1
        device, offset = found
        return device.read(offset, size)

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` bytes to the device at `address`."""
        found = self._devices.get(address)
        if found is not None:
            found[0].write(found[1], size, value)
