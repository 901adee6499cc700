"""KVM_EXIT_MEMORY_FAULT: each ABI of private memory has its own number and layout for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .cdefs.cffi_types import Ffi

__all__ = ["FAULT_LAYOUTS", "FaultLayout", "layout_of", "register_fault_layout"]


class FaultLayout(NamedTuple):
    """How one ABI reports KVM_EXIT_MEMORY_FAULT."""

    #: The name of the ABI.
    abi: str
    #: The exit reason.
    reason: int
    #: The C type in the union of struct kvm_run; it has the fields `flags`, `gpa` and `size`.
    struct: str
    #: The FFI that declares `struct`.
    ffi: Ffi
    #: The bit of `flags` that is set for an access to private memory.
    private_flag: int
    #: The errnos with which KVM_RUN reports the exit; empty if KVM_RUN returns 0.
    errnos: frozenset[int]


#: Exit reason -> the layout for VMs that were not made by an ABI.
FAULT_LAYOUTS: dict[int, FaultLayout] = {}


def register_fault_layout(layout: FaultLayout) -> None:
    """Use `layout` for VMs that were not made by an ABI; the first of each exit reason stays."""
    FAULT_LAYOUTS.setdefault(layout.reason, layout)


def layout_of(reason: int, own: FaultLayout | None) -> FaultLayout | None:
    """The layout for an exit of a VM with the layout `own`; None if it is no memory fault."""
    if own is not None and own.reason == reason:
        return own
    return FAULT_LAYOUTS.get(reason)
