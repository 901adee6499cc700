"""What this host's KVM can do with private memory, tried for real."""

from __future__ import annotations

from . import checks, host
from .records import FAIL, PASS, SKIP, VERDICTS, Asked, Check, Group, Report, Step

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


def probe(device: str = DEVICE, *, verbose: bool = False) -> Report:
    """Probe the KVM at `device`; `verbose` also lists its users.  Raises no OSError."""
    facts = host.facts()
    found = checks.run(device, facts)
    return Report(found, facts, host.holders(device) if verbose else None)
