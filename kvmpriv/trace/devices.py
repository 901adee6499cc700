"""Which device of a recorded machine an exit is for."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import About, ExitEvent

__all__ = ["Devices"]

#: What a PC has at these ports, for those that no recorded device has: a kernel looks for them.
#: The first port, the number of ports, and the name.
_PC_PORTS = (
    (0x60, 5, "keyboard controller"),
    (0x70, 2, "clock (CMOS)"),
    (0x80, 1, "diagnostics (POST)"),
    (0x2E8, 8, "COM4"),
    (0x2F8, 8, "COM2"),
    (0x3B0, 48, "VGA"),
    (0x3E8, 8, "COM3"),
    (0x3F8, 8, "COM1"),
    (0xCF8, 8, "PCI"),
)


class _Places:
    """Ranges of addresses by their start, with names."""

    def __init__(self, found: list[tuple[int, int, str]]) -> None:
        self._found = sorted(found)
        self._starts = [start for start, *_ in self._found]

    def name(self, address: int) -> str:
        """The name of the range that contains `address`, or ""."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return ""
        start, size, name = self._found[at]
        return name if address < start + size else ""


class Devices:
    """The devices of the machine that `about` describes."""

    def __init__(self, about: About) -> None:
        devices = about.get("devices", [])
        # Recordings of earlier versions do not name their devices: then COM1 may well be there.
        absent = " (no device)" if devices else ""
        self._ports = _Places(
            [(each["port"], each["size"], each["name"]) for each in devices if "port" in each]
        )
        self._pc_ports = _Places([(at, size, name + absent) for at, size, name in _PC_PORTS])
        self._mmio = _Places(
            [(each["gpa"], each["size"], each["name"]) for each in devices if "gpa" in each]
        )

    def place(self, event: ExitEvent) -> str:
        """The device, or else the port or address, that `event` is for; "" if it is for none."""
        if "port" in event:
            port = event["port"]
            return self._ports.name(port) or self._pc_ports.name(port) or f"port {port:#x}"
        if "gpa" in event:
            return self._mmio.name(event["gpa"]) or f"{event['gpa']:#x}"
        return ""

    def label(self, event: ExitEvent) -> str:
        """As `place`, for a picture: the addresses without a device share a label, as do exits
        of a kind that is for no device.
        """
        place = self.place(event)
        if "port" in event:
            return "other ports" if place.startswith("port ") else place
        if "gpa" in event:
            return "other addresses" if place.startswith("0x") else place
        kind = event["exit"].removeprefix("KVM_EXIT_").replace("_", " ").lower()
        return {"hypercall": "hypercalls", "memory fault": "memory faults"}.get(kind, kind)
