"""Who has KVM, VMs and private memory open."""

from .collect import ProcError, snapshot
from .records import Snapshot

__all__ = ["ProcError", "Snapshot", "snapshot"]
