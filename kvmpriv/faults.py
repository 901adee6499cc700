"""KVM_EXIT_MEMORY_FAULT: a number and a layout a generation, as each of them hands it down."""

from typing import Any, NamedTuple

__all__ = ["FAULT_LAYOUTS", "FaultLayout", "register_fault_layout"]


class FaultLayout(NamedTuple):
    """How one generation lays out KVM_EXIT_MEMORY_FAULT."""

    abi: str
    reason: int
    struct: str  # the C type at kvm_run's union
    ffi: Any  # the FFI that knows it
    private_flag: int
    errnos: frozenset[int]  # what KVM_RUN fails with; empty where it returns 0


#: exit reason -> layout
FAULT_LAYOUTS: dict[int, FaultLayout] = {}


def register_fault_layout(layout: FaultLayout) -> None:
    """Make KVM_RUN and its exits know a generation's memory fault."""
    FAULT_LAYOUTS[layout.reason] = layout
