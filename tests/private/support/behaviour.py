"""How the ABIs differ in what the tests see, beyond the traits of kvmpriv.private.

An ABI that is not in the table gets the behaviour of its newest kin, guest_memfd, and is required
by trying: a third ABI runs the shared tests without an entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .arch_hook import hook
from .kernels import (
    require_in_place,
    require_private_slots,
    require_shared_files,
    require_sw_protected_vm,
)
from .requirements import missing
from .slot_requests import GuestMemfdSlots, RestrictedSlots, Slots

if TYPE_CHECKING:
    from kvmpriv import Kvm, Vm
    from kvmpriv.fd import Fd
    from kvmpriv.private import PrivateAbi

__all__ = ["Behaviour", "behaviour_of"]


@dataclass(frozen=True)
class Behaviour:
    """What one ABI does where the others do something else."""

    #: Sets slots by the ABI's request.
    slots: Callable[[Vm, Fd | int, int], Slots]
    #: Skips the test if this kernel does not have the ABI.
    require: Callable[[Kvm], None]
    #: A slot holds a reference to its file, so that closing the descriptor frees nothing.
    slots_hold_files: bool
    #: One file may be in two VMs, and one range of it in two slots.
    shares_files: bool
    #: A private access where no slot is: MMIO (True), or a fault exit.
    mmio_without_slot: bool
    #: The file's pages come from shmem: they count as such, and an inode may be ENOSPC.
    shmem: bool


def _require(abi: PrivateAbi, kvm: Kvm) -> None:
    try:
        with hook(on=True):
            abi.try_out(kvm)
    except OSError as error:
        missing(abi.name, str(error))


_GUEST_MEMFD = Behaviour(
    slots=GuestMemfdSlots,
    require=require_sw_protected_vm,
    slots_hold_files=False,
    shares_files=False,
    mmio_without_slot=False,
    shmem=False,
)
_BEHAVIOURS = {
    "guest_memfd": _GUEST_MEMFD,
    "guest_memfd_shared": replace(_GUEST_MEMFD, require=require_shared_files),
    # Without a slot there is no file, and so no state: such an access is one of shared memory.
    "guest_memfd_in_place": replace(_GUEST_MEMFD, require=require_in_place, mmio_without_slot=True),
    "restrictedmem": Behaviour(
        slots=RestrictedSlots,
        require=require_private_slots,
        slots_hold_files=True,
        shares_files=True,
        mmio_without_slot=True,
        shmem=True,
    ),
}


def behaviour_of(abi: PrivateAbi) -> Behaviour:
    """The behaviour of an ABI."""
    known = _BEHAVIOURS.get(abi.name)
    return known or replace(_GUEST_MEMFD, require=lambda kvm: _require(abi, kvm))
