"""Interrupt routes: what KVM_SET_GSI_ROUTING's table consists of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from .cdefs import kvm as kvm_h
from .fd import check_range, new_struct

if TYPE_CHECKING:
    from .cdefs.cffi_types import Cdata

__all__ = ["IrqchipRoute", "MsiRoute", "routing_table"]


class MsiRoute(NamedTuple):
    """An interrupt number (GSI) that becomes a message: `address` of 64 bits, `data` of 32."""

    gsi: int
    address: int
    data: int
    flags: int = 0
    devid: int = 0


class IrqchipRoute(NamedTuple):
    """An interrupt number (GSI) that is a pin of an in-kernel chip.

    `irqchip` is 0 for the first PIC (pins 0 to 7), 1 for the second (8 to 15, counted on), 2 for
    the IOAPIC (0 to 23).
    """

    gsi: int
    irqchip: int
    pin: int
    flags: int = 0


def routing_table(routes: Iterable[MsiRoute | IrqchipRoute]) -> Cdata:
    """A ``struct kvm_irq_routing *``.  ArgumentError for a number that does not fit its field."""
    entries = [_entry(route) for route in routes]
    return new_struct("struct kvm_irq_routing *", {"nr": len(entries), "entries": entries})


def _entry(route: MsiRoute | IrqchipRoute) -> dict[str, object]:
    for name, value in route._asdict().items():
        check_range(name, value, 1 << (64 if name == "address" else 32))
    if isinstance(route, MsiRoute):
        kind = kvm_h.KVM_IRQ_ROUTING_MSI
        msi = {
            "address_lo": route.address & 0xFFFFFFFF,
            "address_hi": route.address >> 32,
            "data": route.data,
            "devid": route.devid,
        }
        target: dict[str, object] = {"msi": msi}
    else:
        kind = kvm_h.KVM_IRQ_ROUTING_IRQCHIP
        target = {"irqchip": {"irqchip": route.irqchip, "pin": route.pin}}
    return {"gsi": route.gsi, "type": kind, "flags": route.flags, "u": target}
