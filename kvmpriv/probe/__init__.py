"""What this host's KVM can do with private memory, tried for real."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import checks, host
from .records import FAIL, PASS, SKIP, VERDICTS, Asked, Check, Group, Report, Step

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DEVICE",
    "FAIL",
    "PASS",
    "SKIP",
    "VERDICTS",
    "Asked",
    "Check",
    "Group",
    "Report",
    "Step",
    "probe",
]

DEVICE = "/dev/kvm"


def probe(
    device: str = DEVICE, *, verbose: bool = False, out_of_time: Callable[[], object] = bool
) -> Report:
    """Probe the KVM at `device`; `verbose` also lists its users.  Raises no OSError.

    `out_of_time` is called after each step.  If it returns true, the probe ends, and its verdict is
    ``could not probe`` unless usable private memory was found before.
    """
    facts = host.facts()
    found = checks.run(device, facts, out_of_time)
    return Report(found, facts, host.holders(device) if verbose else None)
