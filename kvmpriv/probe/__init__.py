"""What this host's KVM can do with private memory, tried for real."""

from __future__ import annotations

from . import checks, host
from .records import VERDICTS, Asked, Check, Report

__all__ = ["DEVICE", "VERDICTS", "Asked", "Check", "Report", "probe"]

DEVICE = "/dev/kvm"


def probe(device: str = DEVICE, *, verbose: bool = False) -> Report:
    """Probe the KVM at `device`; `verbose` also looks for who holds it.  Raises no OSError."""
    facts = host.facts()
    found = checks.run(device, facts)
    return Report(found, facts, host.holders(device) if verbose else None)
