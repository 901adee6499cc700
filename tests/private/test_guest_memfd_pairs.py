"""guest_memfd: everything that can happen, against everything else that can happen."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from kvmpriv import Kvm

from .support.accounting import Unevictable
from .support.defects import mainline_defect
from .support.kernels import VM_TYPES
from .support.pairs import Arena
from .support.races import rounds
from .support.requirements import missing
from .support.rules import rule
from .support.watchdog import WedgeError, race

if TYPE_CHECKING:
    from kvmpriv import Vm

pytestmark = pytest.mark.usefixtures("no_leak", "guest_memfd_kvm", "gm_vm")

WORKS = (
    "pre-fault",
    "rebind",
    "move",
    "hole",
    "allocate",
    "convert",
    "guest",
    "host",
    "close file",
    "close VM",
    "exec",
    "fork",
    "munmap",
    "mbind",
    "madvise",
)
#: What some works need: the identifier, and what is missing without it.
NEEDS = {
    "pre-fault": ("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0"),
    "convert": ("private-attribute", "KVM_CAP_MEMORY_ATTRIBUTES lacks PRIVATE for this VM type"),
    **dict.fromkeys(
        ("host", "munmap", "mbind", "madvise"),
        ("guest-memfd-flags", "KVM_CAP_GUEST_MEMFD_FLAGS lacks MMAP or INIT_SHARED"),
    ),
}
#: A vCPU that runs in one thread can't run in another.
ALONE = ("guest",)
#: Seconds for each pair, and how often each of its works is done at least.
EACH, LEAST = 0.03, 2
#: Pre-faulting waits for ever for a deletion of a slot that waits for it: the known defects.
DELETIONS = ("rebind", "move", "close file")


@rule("gm.race.pairs")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.converts] if name == "convert" else [])
        for name in WORKS
    ],
)
def test_every_pair(vm_type: int, kvm: Kvm, name: str) -> None:
    """Each work against itself and the later ones of the table: every call ends, all works then."""
    memory, raced = Unevictable(), 0
    wedges: list[str] = []
    with ExitStack() as stack:
        arena = Arena(stack, kvm, vm_type)
        assert set(arena.works) <= set(WORKS)
        if name not in arena.works:
            missing(*NEEDS[name])
        for other in WORKS[WORKS.index(name) :]:
            if not {name, other} <= arena.works.keys() or (name == other and name in ALONE):
                continue
            if wedges and other in DELETIONS:
                continue
            try:
                one, two = ((each, arena.works[each]) for each in (name, other))
                done = race(one, two, EACH, arena.over, least=LEAST)
                assert min(done) >= LEAST, (name, other)
            except WedgeError as wedge:
                if name != "pre-fault" or other not in DELETIONS:
                    raise
                wedges.append(str(wedge))
            arena.settles()
            raced += 1
        assert raced
    assert memory.is_about(0)
    if wedges:
        mainline_defect(wedged(vm_type), wedges[0])


def wedged(vm_type: int) -> str:
    """The defect by which pre-faulting in a VM of this type waits for ever."""
    is_default = vm_type == VM_TYPES["default"]
    return "pre-fault-against-deletion" if is_default else "pre-fault-of-deleted-slot"


@rule("gm.prefault.eagain")
def test_pre_fault_while_a_slot_is_deleted(attributes_vm: Vm, kvm: Kvm, vm_type: int) -> None:
    """It is EAGAIN while the slot is being deleted, and ENOENT when the slot is gone."""
    with ExitStack() as stack:
        arena = Arena(stack, kvm, vm_type)
        if "pre-fault" not in arena.works:
            missing(*NEEDS["pre-fault"])
        pair = [(name, arena.works[name]) for name in ("pre-fault", "rebind")]
        try:
            for _ in rounds(40, least=2, until=lambda: {"EAGAIN", "ENOENT"} <= arena.filled):
                race(pair[0], pair[1], 0.2, arena.over)
        except WedgeError as wedge:
            mainline_defect(wedged(vm_type), str(wedge))
        arena.settles()
