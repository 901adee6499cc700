"""guest_memfd: the edge values of every integer field, against the documented checks.

support/edges.py states the checks; where the kernel answers something else, one of them is wrong.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.private.guest_memfd import GuestMemfd

from .support.defects import mainline_defect
from .support.edges import (
    EDGES,
    SHORT_EDGES,
    TOP,
    Limits,
    attributes_answer,
    changes,
    create_answer,
    pre_fault_answer,
    slot_answer,
)
from .support.leaks import open_fds
from .support.mappings import flags_of
from .support.rules import rule
from .support.slot_requests import GuestMemfdSlots
from .support.syscalls import MIB, PAGE, errno_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmpriv import Vcpu, Vm

pytestmark = pytest.mark.usefixtures("no_leak", "guest_memfd_kvm")

PRIVATE = gm.KVM_MEMORY_ATTRIBUTE_PRIVATE
#: A size that a conversion to private, which takes memory and time for each page, may have here.
MOST = 16 * MIB
#: The last page of a file that loff_t can represent the offset of.
LAST_OFFSET = (1 << 63) - PAGE


@pytest.fixture
def limits(gm_vm: Vm, kvm: Kvm) -> Limits:
    """What the answers in this VM depend on."""
    (bits,) = {entry.eax & 0xFF for entry in kvm.get_supported_cpuid() if entry[0] == 0x80000008}
    # Five-level paging lets user space reach further; an ordinary slot shows it.
    far = {"slot": 9, "flags": 0, "userspace_addr": 1 << 52}
    reach = 56 if GuestMemfdSlots(gm_vm, 0, 0).set(**far) == "ok" else 47
    if reach == 56:
        assert GuestMemfdSlots(gm_vm, 0, 0).delete(**far) == "ok"
    return Limits(
        file_flags=flags_of(gm_vm),
        attributes=gm_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES),
        slots=gm_vm.check_extension(k.KVM_CAP_NR_MEMSLOTS),
        spaces=max(1, gm_vm.check_extension(k.KVM_CAP_MULTI_ADDRESS_SPACE)),
        user_end=(1 << reach) - PAGE,
        gpa_bits=bits,
    )


class Findings:
    """The requests that the kernel answers otherwise than stated, and all of its answers."""

    def __init__(self) -> None:
        self.differ: list[tuple[dict[str, int], str]] = []
        self.answers: dict[str, int] = {}

    def add(self, request: dict[str, int], said: object, stated: object, answer: str) -> None:
        self.answers[answer] = self.answers.get(answer, 0) + 1
        if said != stated:
            fields = ", ".join(f"{name}={value:#x}" for name, value in request.items())
            self.differ.append((request, f"{fields}: {said}, stated: {stated}"))

    def check(self, *answers: str) -> None:
        """Nothing differs, and each of these answers, and no other, was given."""
        shown = "\n".join(text for _, text in self.differ[:20])
        assert not self.differ, f"{len(self.differ)} requests differ:\n{shown}"
        assert set(self.answers) == set(answers)


@rule("gm.edges.create")
def test_creation(gm_vm: Vm, limits: Limits) -> None:
    """KVM_CREATE_GUEST_MEMFD answers every edge of size, flags and reserved as documented."""
    found = Findings()
    fields = dict.fromkeys(("size", "flags", "reserved"), EDGES)
    for request in changes(fields, ("size", "flags")):
        whole = {"size": PAGE, "flags": 0, **request}
        stated = create_answer(limits, **whole)
        struct = gm.ffi.new("struct kvm_create_guest_memfd *", {"size": whole["size"]})
        struct.flags = whole["flags"]
        for at in range(6):
            struct.reserved[at] = request.get("reserved", 0)
        try:
            os.close(gm_vm.ioctl(gm.KVM_CREATE_GUEST_MEMFD, struct))
            said = "ok"
        except OSError as error:
            said = errno_of(error.errno or 0)
        found.add(request, said, stated, said)
    found.check("ok", "EINVAL")


SLOT_FIELDS = {
    "slot": SHORT_EDGES,
    "flags": SHORT_EDGES,
    "guest_phys_addr": EDGES,
    "memory_size": EDGES,
    "userspace_addr": EDGES,
    "guest_memfd_offset": EDGES,
    "guest_memfd": SHORT_EDGES,
    "pad1": SHORT_EDGES,
    "pad2": EDGES,
}
#: The starts of ranges, each of which has this size.
SIZED = [
    (name, "memory_size") for name in ("guest_phys_addr", "userspace_addr", "guest_memfd_offset")
]


@pytest.fixture(params=[MIB, LAST_OFFSET], ids=["small", "largest"])
def file(request: pytest.FixtureRequest, gm_vm: Vm) -> Iterator[GuestMemfd]:
    """A file, and the largest one that there can be."""
    with GuestMemfd(gm_vm, request.param) as made:
        yield made


@rule("gm.edges.slot")
def test_slots(gm_vm: Vm, file: GuestMemfd, memory: HostMemory, limits: Limits) -> None:
    """KVM_SET_USER_MEMORY_REGION2 answers every edge, alone and with every size, as documented."""
    slots = GuestMemfdSlots(gm_vm, file, memory.userspace_addr)
    found = Findings()
    # Where the file is the largest, it is not the file that refuses.
    for request in changes(SLOT_FIELDS, *(SIZED if file.size > MIB else ())):
        whole = {**slots.good, **request}
        stated = slot_answer(
            limits, file=file.fileno(), file_size=file.size, open_files=open_fds(), **whole
        )
        said = slots.set(**request)
        if said == "ok":
            kept = {name: whole[name] for name in ("slot", "flags")}
            assert slots.delete(**kept) == "ok", request
        found.add(request, said, stated, said)
    if found.differ and all(
        request.get("guest_memfd_offset") == LAST_OFFSET for request, _ in found.differ
    ):
        mainline_defect("signed-offset", found.differ[0][1])
    found.check("ok", "EINVAL", "EBADF")


@rule("gm.edges.attributes")
@pytest.mark.parametrize("value", [PRIVATE, 0], ids=["private", "shared"])
def test_attributes(attributes_vm: Vm, limits: Limits, value: int) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES answers every edge of every field as documented.

    The memory of the VM is shared, so that a conversion to shared of any size has nothing to do.
    """
    found, left_out = Findings(), 0
    fields = dict.fromkeys(("address", "size", "attributes", "flags"), EDGES)
    for request in changes(fields, ("address", "size")):
        whole = {"address": 0, "size": PAGE, "attributes": value, "flags": 0, **request}
        stated = attributes_answer(limits, **whole)
        if stated == "ok" and whole["size"] > MOST and whole["attributes"]:
            left_out += 1
            continue
        struct = gm.ffi.new("struct kvm_memory_attributes *", whole)
        said = errno_of(attributes_vm.ioctl_errno(gm.KVM_SET_MEMORY_ATTRIBUTES, struct))
        if said == "ok" and whole["attributes"]:
            struct.attributes = 0
            attributes_vm.ioctl(gm.KVM_SET_MEMORY_ATTRIBUTES, struct)
        found.add(request, said, stated, said)
    found.check("ok", "EINVAL")
    assert bool(left_out) == bool(value)


@rule("gm.edges.prefault")
@pytest.mark.parametrize("kind", ["file", "ordinary"])
def test_pre_fault(
    gm_vm: Vm, gm_slots: GuestMemfdSlots, gm_vcpu: Vcpu, limits: Limits, kind: str
) -> None:
    """KVM_PRE_FAULT_MEMORY answers every edge as documented, and reports what it has done."""
    start, size = gm_slots.good["guest_phys_addr"], gm_slots.good["memory_size"]
    assert start in EDGES, "a slot begins at an edge"
    found = Findings()
    fields = dict.fromkeys(("gpa", "size", "flags"), EDGES)
    with gm_slots.held(flags=gm.KVM_MEM_GUEST_MEMFD if kind == "file" else 0):
        for request in changes(fields, ("gpa", "size")):
            whole = {"gpa": start, "size": PAGE, "flags": 0, **request}
            stated = pre_fault_answer(**whole, start=start, end=start + size)
            struct: Any = gm.ffi.new("struct kvm_pre_fault_memory *", whole)
            struct.padding = [TOP - 1] * 5
            said = errno_of(gm_vcpu.ioctl_errno(gm.KVM_PRE_FAULT_MEMORY, struct))
            found.add(request, (said, struct.gpa, struct.size), stated, said)
    found.check("ok", "EINVAL", "ENOENT")
