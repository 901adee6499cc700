"""Where an access to a port or to device memory goes: addresses to devices."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Bus", "Device"]


class Device(Protocol):
    """What sits on a bus.  `offset` counts from where the device begins, `size` is 1 to 8 bytes.

    Any vCPU's thread may call at any time.
    """

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...


class Bus:
    """Devices by address.  Where nothing is, reads give all ones and writes are lost."""

    def __init__(self) -> None:
        self._devices: dict[int, tuple[Device, int]] = {}

    def add(self, device: Device, start: int, size: int) -> None:
        """Let `device` have `size` addresses from `start`.  ValueError where one is taken."""
        for address in range(start, start + size):
            if address in self._devices:
                raise ValueError(f"two devices want address {address:#x}")
        for address in range(start, start + size):
            self._devices[address] = (device, address - start)

    def read(self, address: int, size: int) -> int:
        """Ask the device at `address`."""
        found = self._devices.get(address)
        if found is None:
            return (1 << 8 * size) - 1
        device, offset = found
        return device.read(offset, size)

    def write(self, address: int, size: int, value: int) -> None:
        """Tell the device at `address`."""
        found = self._devices.get(address)
        if found is not None:
            found[0].write(found[1], size, value)
