"""The registers by which a guest turns its machine off, resets it, or ends it with a status."""

from __future__ import annotations

from collections.abc import Callable

from . import acpi
from .bus import Bus

__all__ = ["add_power"]

_KEYBOARD_COMMAND, _PULSE_RESET = 0x64, 0xFE
_PM1_SIZE, _PM1_CONTROL = 8, acpi.PM1_CONTROL - acpi.PM1_EVENT
_SCI_ENABLED = 1
_SLEEP_BITS = acpi.SLEEP_TYPE_OFF << 10 | acpi.SLEEP_ENABLE


class _Port:
    """A port that calls `act` with each value written to it, and reads as 0."""

    def __init__(self, act: Callable[[int], object]) -> None:
        self._act = act

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._act(value)


class _PowerManagement:
    """ACPI's PM1 event and control registers (ACPI 6.4, 4.8.3)."""

    def __init__(self, turn_off: Callable[[], object]) -> None:
        self._turn_off = turn_off
        self._values = bytearray(_PM1_SIZE)

    def read(self, offset: int, size: int) -> int:
        value = int.from_bytes(self._values[offset : offset + size], "little")
        return value | _SCI_ENABLED if offset == _PM1_CONTROL else value

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= _PM1_CONTROL and value & ~0x3FF == _SLEEP_BITS:
            self._turn_off()
        elif offset >= 2:  # the status below is cleared by writing ones, and is always 0
            size = min(size, _PM1_SIZE - offset)
            kept = value & (1 << 8 * size) - 1
            self._values[offset : offset + size] = kept.to_bytes(size, "little")


def add_power(
    ports: Bus,
    exit_port: int,
    *,
    leave: Callable[[int], object],
    turn_off: Callable[[], object],
    reset: Callable[[], object],
) -> None:
    """Put the registers on `ports`.

    `leave` gets each byte that is written to `exit_port`.  The guest can reset its machine by the
    keyboard controller's port and by ACPI's reset register.
    """

    def keyboard(value: int) -> None:
        if value == _PULSE_RESET:
            reset()

    def reset_register(value: int) -> None:
        if value & acpi.RESET_VALUE == acpi.RESET_VALUE:
            reset()

    ports.add(_Port(lambda value: leave(value & 0xFF)), exit_port, 1, "exit status")
    # It reads as 0: no command is under way.
    ports.add(_Port(keyboard), _KEYBOARD_COMMAND, 1, "keyboard controller")
    ports.add(_Port(reset_register), acpi.RESET_PORT, 1, "ACPI reset")
    ports.add(_PowerManagement(turn_off), acpi.PM1_EVENT, _PM1_SIZE, "ACPI power")
