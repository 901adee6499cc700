"""Axes: where the ticks are and what stands beside them; and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BYTES", "CPUS", "LEAST", "PER_SECOND", "SECONDS", "Axis", "Unit", "axis"]
__all__ += ["format_bytes", "format_seconds"]


class Unit(NamedTuple):
    """A unit, and from which value on an axis has it."""

    size: float
    name: str
    least: float


_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
BYTES: tuple[Unit, ...] = tuple(Unit(1024.0**n, name, 1024.0**n) for n, name in enumerate(_BYTES))
SECONDS = (
    Unit(1e-6, "µs", 0),
    Unit(1e-3, "ms", 1e-3),
    Unit(1, "s", 1),
    Unit(60, "min", 600),
    Unit(3600, "h", 36_000),
    Unit(86_400, "d", 864_000),
)
PER_SECOND = (Unit(1, "/s", 0), Unit(1e3, "k/s", 1e4), Unit(1e6, "M/s", 1e7))
CPUS = (Unit(1, "CPU", 0),)


class Axis(NamedTuple):
    """The scale of a picture, from 0 to `end`."""

    end: float
    #: Each tick's value and text.
    ticks: list[tuple[float, str]]

    def part(self, value: float) -> float:
        """Where `value` is between 0 and the end: 0.0 to 1.0."""
        return min(1.0, max(0.0, value / self.end))


#: Values below this are drawn as 0: nothing is recorded in smaller parts than nanoseconds.
LEAST = 1e-12


def axis(most: float, units: Sequence[Unit], steps: int, *, round_up: bool = True) -> Axis:
    """A scale for values from 0 to `most`, with at most `steps` steps of 1, 2 or 5 times 10^n.

    The scale ends with a tick; without `round_up` it ends with `most`.
    """
    unit = [each for each in units if most >= each.least or each is units[0]][-1]
    if most < LEAST:
        return Axis(unit.size, [(0.0, "0")])
    step = _step(most / unit.size / steps)
    if unit.name == "B":
        step = max(step, 1.0)
    count = most / unit.size / step
    # A tick may be at the end itself, which the division may just miss.
    last = math.ceil(count - 1e-9) if round_up else math.floor(count + 1e-9)
    ticks = [(0.0, "0")]
    ticks += [(n * step * unit.size, f"{n * step:g} {unit.name}") for n in range(1, last + 1)]
    return Axis(ticks[-1][0] if round_up else most, ticks)


def _step(least: float) -> float:
    """The smallest of 1, 2 and 5 times 10^n that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    for factor in (1, 2, 5, 10):
        if factor * power >= least * (1 - 1e-9):
            return factor * power
    return 10 * power


def format_seconds(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 600:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_bytes(count: int) -> str:
    """A size in three digits, or four from 1000 on."""
    size, name, _ = [each for each in BYTES if count >= each.least or each is BYTES[0]][-1]
    value = count / size
    return f"{value:.0f} {name}" if value >= 100 else f"{value:.3g} {name}"
