"""v9: KVM_SET_USER_MEMORY_REGION with KVM_MEM_PRIVATE, check by check in the kernel's order."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.private.restrictedmem import RestrictedMem

from .support.accounting import BIG, Unevictable, files_open
from .support.requirements import missing
from .support.rules import rule
from .support.slot_requests import Edge, RestrictedSlots
from .support.syscalls import GIB, NOWHERE, PAGE, address_of, errno_of, fallocate
from .support.userfaultfd import set_with_late_flags

if TYPE_CHECKING:
    from kvmpriv import HostMemory, Kvm, Vm

pytestmark = pytest.mark.usefixtures("no_leak", "v9")

PRIVATE, LOG, READONLY = rm.KVM_MEM_PRIVATE, k.KVM_MEM_LOG_DIRTY_PAGES, k.KVM_MEM_READONLY
UNKNOWN = 1 << 31
TOP = 1 << 64


@pytest.fixture
def edge() -> Iterator[Edge]:
    made = Edge()
    yield made
    made.close()


@pytest.fixture(params=["accepted", "refused"])
def either(request: pytest.FixtureRequest) -> RestrictedSlots:
    """Slots of a VM that accepts private slots, and of one that refuses them."""
    name = "slots" if request.param == "accepted" else "refused_slots"
    made: RestrictedSlots = request.getfixturevalue(name)
    return made


# -- advertised, usable --------------------------------------------------------------------------


@rule("v9.cap.advertised", "v9.hook.on", "v9.hook.off")
def test_capability(kvm: Kvm, either: RestrictedSlots, request: pytest.FixtureRequest) -> None:
    """KVM_CAP_PRIVATE_MEM is 1 on /dev/kvm and on every VM, whether or not it accepts the flag."""
    assert kvm.check_extension(rm.KVM_CAP_PRIVATE_MEM) == 1
    assert either.vm.check_extension(rm.KVM_CAP_PRIVATE_MEM) == 1
    accepted = request.node.callspec.params["either"] == "accepted"
    assert either.set() == ("ok" if accepted else "EINVAL")


@rule("v9.cap.enable")
def test_enable_cap(either: RestrictedSlots) -> None:
    """KVM_CAP_PRIVATE_MEM can't be enabled: EINVAL."""
    cap = k.ffi.new("struct kvm_enable_cap *", {"cap": rm.KVM_CAP_PRIVATE_MEM})
    assert errno_of(either.vm.ioctl_errno(k.KVM_ENABLE_CAP, cap)) == "EINVAL"
    cap.cap, cap.args[0] = k.KVM_CAP_EXIT_HYPERCALL, 0
    assert errno_of(either.vm.ioctl_errno(k.KVM_ENABLE_CAP, cap)) == "ok"


@rule("v9.successors")
def test_successors(kvm: Kvm, either: RestrictedSlots) -> None:
    """The ioctls of later ABIs are ENOTTY, and VM type 1 is EINVAL."""
    space = k.ffi.new("char[160]")
    for request in (
        gm.KVM_SET_USER_MEMORY_REGION2,
        gm.KVM_SET_MEMORY_ATTRIBUTES,
        gm.KVM_CREATE_GUEST_MEMFD,
        0x8008AED2,  # v10's KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES
        0xC020AED3,  # v10's KVM_SET_MEMORY_ATTRIBUTES
    ):
        assert errno_of(either.vm.ioctl_errno(request, address_of(space))) == "ENOTTY", hex(request)
    assert errno_of(kvm.ioctl_errno(k.KVM_CREATE_VM, 1)) == "EINVAL"


@rule("v9.hook.off.slot", "v9.slot.flags.hook")
def test_refused(refused_slots: RestrictedSlots) -> None:
    """If the arch hook refuses the VM, KVM_MEM_PRIVATE is EINVAL, alone and beside other flags."""
    for beside in (0, LOG, READONLY, LOG | READONLY):
        refused_slots.refuses("EINVAL", {"flags": beside}, flags=PRIVATE | beside)
    refused_slots.refuses("EINVAL", {"flags": 0}, restricted_fd=0xFFFFFFFF)


# -- 1: what is copied ---------------------------------------------------------------------------


@rule("v9.slot.copy.flags", "v9.slot.copy.32", "v9.slot.copy.160")
@pytest.mark.parametrize(
    ("flags", "enough"), [(PRIVATE, 160), (0, 32)], ids=["private", "ordinary"]
)
def test_copied(slots: RestrictedSlots, edge: Edge, flags: int, enough: int) -> None:
    """KVM copies 160 bytes for a private slot, 32 for another: one byte less is EFAULT."""
    struct = slots.struct(flags=flags)
    for readable in (1, 4, 7, 8, 9, 31, 32, 33, 40, 44, 159, 160):
        said = slots.set_at(edge.put(struct, readable))
        assert said == ("ok" if readable >= enough else "EFAULT"), readable
        if said == "ok":
            assert slots.delete() == "ok"


@rule("v9.slot.order.efault")
def test_efault_comes_first(either: RestrictedSlots, edge: Edge) -> None:
    """EFAULT comes before every other refusal, also when the arch hook refuses the VM."""
    wrong: dict[str, dict[str, int]] = {
        "flags": {"flags": PRIVATE | UNKNOWN},
        "size": {"memory_size": 1},
        "address": {"guest_phys_addr": 1},
        "slot": {"slot": 0xFFFF},
        "nothing to delete": {"memory_size": 0},
        "good": {},
    }
    for what, changes in wrong.items():
        assert either.set_at(edge.put(either.struct(**changes), 159)) == "EFAULT", what
        assert either.set_at(edge.put(either.struct(**changes), 32)) == "EFAULT", what
        if what != "good":
            assert either.set_at(edge.put(either.struct(**changes), 160)) == "EINVAL", what
    assert either.set_at(edge.put(either.struct(flags=UNKNOWN), 31)) == "EFAULT"
    assert either.set_at(edge.put(either.struct(flags=UNKNOWN), 32)) == "EINVAL"
    assert either.set_at(edge.put(either.struct(flags=0), 32)) == "ok"
    # EEXIST of an overlap comes after it, too.
    other = edge.put(either.struct(slot=4), 159)
    assert either.set_at(other) == "EFAULT"


@rule("v9.slot.copy.pointer")
def test_bad_pointers(either: RestrictedSlots) -> None:
    """A pointer to unmapped memory, to kernel memory or to no valid address is EFAULT."""
    for address in (0, 1, NOWHERE, 0xFFFF888000000000, TOP - 4, TOP - 160):
        assert either.set_at(address) == "EFAULT", hex(address)
    assert either.set(flags=0) == "ok"


@contextmanager
def as_descriptor_0(file: RestrictedMem) -> Iterator[None]:
    """Fields that are not copied are 0: the slot's descriptor is then 0."""
    saved = os.dup(0)
    os.dup2(file.fileno(), 0)
    try:
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@rule("v9.slot.copy.recheck")
@pytest.mark.parametrize(
    ("first", "late", "expected"),
    [
        (0, PRIVATE, "EINVAL"),
        (PRIVATE, 0, "EINVAL"),
        (LOG, PRIVATE | LOG, "EINVAL"),
        (PRIVATE | LOG, LOG, "EINVAL"),
        (0, 0, "ok"),
        (PRIVATE, PRIVATE, "ok"),
        (0, LOG, "ok"),
        (PRIVATE, PRIVATE | LOG, "ok"),
        (UNKNOWN, 0, "ok"),
        (0, UNKNOWN, "EINVAL"),
    ],
)
def test_flags_that_change(
    slots: RestrictedSlots, file: RestrictedMem, first: int, late: int, expected: str
) -> None:
    """If KVM_MEM_PRIVATE in the copy differs from what KVM read first, it returns EINVAL."""
    with as_descriptor_0(file):
        assert set_with_late_flags(slots, late, flags=first) == expected
    if expected == "ok":
        log = k.ffi.new("struct kvm_dirty_log *", {"slot": slots.good["slot"]})
        bits = k.ffi.new("__u64[1]")
        log.dirty_bitmap = bits
        said = errno_of(slots.vm.ioctl_errno(k.KVM_GET_DIRTY_LOG, log))
        assert said == ("ok" if late & LOG else "ENOENT"), "the copy's flags count"
        assert slots.delete() == "ok"
    else:
        assert slots.delete() == "EINVAL", "no slot was made"
        slots.accepts(flags=first & ~UNKNOWN)


@rule("v9.slot.copy.recheck.race", "v9.slot.copy.zero")
def test_flags_under_attack(slots: RestrictedSlots, edge: Edge, file: RestrictedMem) -> None:
    """A thread that flips PRIVATE never gets a private slot from a 32-byte copy."""
    over = threading.Event()
    address = edge.put(slots.struct(flags=UNKNOWN, userspace_addr=0), 32)
    at = address - edge.memory.userspace_addr + 4

    def flip() -> None:
        one, other = UNKNOWN.to_bytes(4, "little"), PRIVATE.to_bytes(4, "little")
        write = edge.memory.write
        while not over.is_set():
            write(at, other)
            write(at, one)

    thread = threading.Thread(target=flip)
    said: dict[str, int] = {}
    thread.start()
    try:
        with as_descriptor_0(file):
            for _ in range(4000):
                what = slots.set_at(address)
                said[what] = said.get(what, 0) + 1
    finally:
        over.set()
        thread.join()
    assert set(said) == {"EINVAL", "EFAULT"}, said
    assert sum(said.values()) == 4000
    assert slots.delete() == "EINVAL", "no slot was made"


@rule("v9.slot.copy.readonly_struct")
def test_the_struct_is_not_written_to(slots: RestrictedSlots) -> None:
    """KVM does not write to the struct."""
    struct = slots.struct(pad1=7, pad2=9)
    before = bytes(rm.ffi.buffer(struct))
    assert slots.set_at(address_of(struct)) == "ok"
    assert bytes(rm.ffi.buffer(struct)) == before


# -- 2: flags ------------------------------------------------------------------------------------


@rule("v9.slot.flags.unknown")
def test_unknown_flags(either: RestrictedSlots) -> None:
    """Every flag but LOG_DIRTY_PAGES, READONLY and PRIVATE is EINVAL."""
    for bit in range(3, 32):
        assert either.set(flags=1 << bit) == "EINVAL", bit
        assert either.set(flags=PRIVATE | 1 << bit) == "EINVAL", bit
    assert either.asked == 58
    assert either.set(flags=0) == "ok"


@rule("v9.slot.flags.beside")
@pytest.mark.parametrize("beside", [0, LOG, READONLY, LOG | READONLY])
def test_flags_beside_private(slots: RestrictedSlots, beside: int) -> None:
    """LOG_DIRTY_PAGES and READONLY may be set beside PRIVATE when the slot is made."""
    slots.accepts(flags=PRIVATE | beside)


# -- 3 and 4: alignment --------------------------------------------------------------------------

BITS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4095]


@rule("v9.slot.align.size", "v9.slot.align.gpa", "v9.slot.align.userspace_addr")
@pytest.mark.parametrize("name", ["memory_size", "guest_phys_addr", "userspace_addr"])
def test_alignment(slots: RestrictedSlots, name: str) -> None:
    """memory_size, guest_phys_addr and userspace_addr must be page aligned, else EINVAL."""
    good = slots.good[name]
    for off in BITS:
        assert slots.set(**{name: good + off}) == "EINVAL", off
    assert slots.asked == 13
    slots.refuses("EINVAL", **{name: good + 1})


@rule("v9.slot.align.offset")
def test_offset_alignment(slots: RestrictedSlots) -> None:
    """A private slot's restricted_offset that is not page aligned is EINVAL; an ordinary slot's
    is not read.
    """
    for off in BITS:
        assert slots.set(restricted_offset=off) == "EINVAL", off
    assert slots.asked == 13
    slots.refuses("EINVAL", {"restricted_offset": 0}, restricted_offset=1)
    slots.accepts(restricted_offset=1, flags=0)


@rule("v9.slot.userspace_addr.range")
def test_userspace_addr_in_user_space(slots: RestrictedSlots) -> None:
    """userspace_addr to userspace_addr + memory_size must be a user range, else EINVAL; it need
    not be mapped.
    """
    for address in (NOWHERE, 0xFFFF888000000000, TOP - 16 * PAGE, TOP - PAGE):
        assert slots.set(userspace_addr=address) == "EINVAL", hex(address)
    for address in (0, PAGE, 1 << 40):
        slots.accepts(userspace_addr=address)


@rule("v9.slot.offset.wrap")
def test_offset_that_wraps(slots: RestrictedSlots) -> None:
    """restricted_offset + memory_size of 2^64 or more is EINVAL."""
    size = slots.good["memory_size"]
    for offset in (TOP - size, TOP - size + PAGE, TOP - PAGE):
        assert slots.set(restricted_offset=offset) == "EINVAL", hex(offset)
        slots.accepts(restricted_offset=offset, flags=0)
    slots.accepts(restricted_offset=TOP - size - PAGE)
    slots.accepts(restricted_offset=NOWHERE)


# -- 5: ranges -----------------------------------------------------------------------------------


@rule("v9.slot.id")
def test_slot_numbers(slots: RestrictedSlots) -> None:
    """A slot number of KVM_CAP_NR_MEMSLOTS or more is EINVAL."""
    limit = slots.vm.check_extension(k.KVM_CAP_NR_MEMSLOTS)
    for number in (limit, limit + 1, 0xFFFF):
        assert slots.set(slot=number) == "EINVAL", number
    slots.accepts(slot=limit - 1)
    slots.accepts(slot=0)


@rule("v9.slot.address_space")
def test_address_spaces(slots: RestrictedSlots) -> None:
    """An address space of KVM_CAP_MULTI_ADDRESS_SPACE or more is EINVAL."""
    spaces = max(1, slots.vm.check_extension(k.KVM_CAP_MULTI_ADDRESS_SPACE))
    for number in (spaces, 0xFFFF):
        assert slots.set(slot=number << 16 | 3) == "EINVAL", number
    slots.accepts(slot=(spaces - 1) << 16 | 3)


@rule("v9.slot.gpa.wrap")
def test_guest_range_that_wraps(slots: RestrictedSlots) -> None:
    """A guest_phys_addr + memory_size that wraps is EINVAL."""
    for address in (TOP - PAGE, TOP - 16 * PAGE, TOP - 8 * PAGE):
        assert slots.set(guest_phys_addr=address) == "EINVAL", hex(address)
    slots.refuses("EINVAL", {"guest_phys_addr": 1 << 34}, guest_phys_addr=TOP - PAGE)


@rule("v9.slot.pages")
def test_too_many_pages(slots: RestrictedSlots) -> None:
    """A slot of more than 2^31 - 1 pages is EINVAL."""
    whole = {"slot": 4, "guest_phys_addr": 0, "userspace_addr": 0}
    # Few hosts can address so much; the overlap is refused before the slot is prepared.
    with slots.held():
        for pages in (1 << 31, (1 << 31) + 1, 1 << 33):
            assert slots.set(**whole, memory_size=pages * PAGE) == "EINVAL"
        assert slots.set(**whole, memory_size=((1 << 31) - 1) * PAGE) == "EEXIST"
    slots.accepts(memory_size=(1 << 20) * PAGE, userspace_addr=0, guest_phys_addr=1 << 36)


# -- 6: deletion ---------------------------------------------------------------------------------


@rule("v9.slot.delete", "v9.slot.delete.missing")
@pytest.mark.parametrize("flags", [PRIVATE, 0])
def test_deletion(slots: RestrictedSlots, flags: int) -> None:
    """memory_size 0 deletes the slot, with or without PRIVATE; without a slot it is EINVAL."""
    assert slots.delete(flags=flags) == "EINVAL"
    assert slots.set() == "ok"
    assert slots.delete(flags=flags, slot=4) == "EINVAL"
    assert slots.delete(flags=flags) == "ok"
    assert slots.delete(flags=flags) == "EINVAL"


@rule("v9.slot.delete.checks")
@pytest.mark.parametrize(
    "wrong",
    [
        {"flags": UNKNOWN},
        {"flags": PRIVATE | UNKNOWN},
        {"guest_phys_addr": 4 * GIB + 1},
        {"userspace_addr": 1},
        {"userspace_addr": 0xFFFF888000000000},
        {"restricted_offset": 1},
        {"slot": 0xFFFF},
    ],
    ids=str,
)
def test_checks_before_deletion(slots: RestrictedSlots, wrong: dict[str, int]) -> None:
    """The checks of flags, alignment, ranges and slot number apply to a deletion; the slot
    stays.
    """
    assert slots.set() == "ok"
    assert slots.delete(**wrong) == "EINVAL"
    assert slots.set(slot=4) == "EEXIST", "the slot still exists"
    assert slots.delete() == "ok"
    assert slots.set(slot=4) == "ok"


@rule("v9.slot.delete.unchecked")
@pytest.mark.parametrize(
    "changes",
    [
        {"restricted_fd": 0xFFFFFFFF},
        {"guest_phys_addr": 0},
        {"userspace_addr": 0},
        {"restricted_offset": NOWHERE},
        {"flags": PRIVATE | LOG},
    ],
    ids=str,
)
def test_not_looked_at_by_deletion(slots: RestrictedSlots, changes: dict[str, int]) -> None:
    """A deletion ignores the fd, and addresses and offsets that are aligned."""
    assert slots.set() == "ok"
    assert slots.delete(**changes) == "ok"
    assert slots.set(slot=4) == "ok", "the range is free"


@rule("v9.hook.off.delete")
def test_deletion_where_private_is_refused(refused_slots: RestrictedSlots) -> None:
    """If the arch hook refuses the VM, a deletion with KVM_MEM_PRIVATE is EINVAL."""
    assert refused_slots.set(flags=0) == "ok"
    assert refused_slots.delete() == "EINVAL"
    assert refused_slots.delete(flags=0) == "ok"


# -- 7: private slots are immutable --------------------------------------------------------------

CHANGES: dict[str, dict[str, int]] = {
    "nothing": {},
    "dirty log": {"flags": PRIVATE | LOG},
    "read only": {"flags": PRIVATE | READONLY},
    "moved": {"guest_phys_addr": 5 * GIB},
    "smaller": {"memory_size": 8 * PAGE},
    "other file": {"restricted_fd": 0xFFFFFFFF},
    "other offset": {"restricted_offset": 0},
    "other memory": {"userspace_addr": 0},
}


@rule("v9.slot.immutable")
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_private_slots_do_not_change(slots: RestrictedSlots, changes: dict[str, int]) -> None:
    """Setting a slot that exists with KVM_MEM_PRIVATE is EINVAL; deleted, it can be made again."""
    assert slots.set() == "ok"
    assert slots.set(**changes) == "EINVAL"
    assert slots.delete() == "ok"
    if changes.get("restricted_fd") is None:
        slots.accepts(**changes)


@rule("v9.slot.immutable.ordinary")
def test_ordinary_slots_do_not_become_private(slots: RestrictedSlots) -> None:
    """Setting KVM_MEM_PRIVATE for an ordinary slot that exists is EINVAL; other changes succeed."""
    assert slots.set(flags=0) == "ok"
    assert slots.set() == "EINVAL"
    assert slots.set(flags=LOG) == "ok"
    assert slots.set(flags=0, guest_phys_addr=5 * GIB) == "ok"
    assert slots.set(guest_phys_addr=5 * GIB) == "EINVAL"
    assert slots.delete(flags=0) == "ok"
    slots.accepts()


@rule("v9.slot.immutable.cleared")
@pytest.mark.known_defect("private-flag-cleared")
@pytest.mark.parametrize(
    "changes",
    [{}, {"guest_phys_addr": 5 * GIB}, {"flags": LOG}, {"flags": READONLY}],
    ids=["cleared", "moved", "dirty log", "read only"],
)
def test_private_slots_do_not_become_ordinary(
    slots: RestrictedSlots, changes: dict[str, int]
) -> None:
    """Setting a private slot without KVM_MEM_PRIVATE is EINVAL."""
    assert slots.set() == "ok"
    assert slots.set(**{"flags": 0, **changes}) == "EINVAL"
    assert slots.delete() == "ok"
    slots.accepts(**{"flags": 0, **changes})


# -- 8: overlap ----------------------------------------------------------------------------------

BASE, SIZE = 4 * GIB, 16 * PAGE
OVERLAPS = {
    "equal": (BASE, SIZE),
    "first page": (BASE - PAGE, 2 * PAGE),
    "last page": (BASE + SIZE - PAGE, 2 * PAGE),
    "inside": (BASE + PAGE, PAGE),
    "around": (BASE - PAGE, SIZE + 2 * PAGE),
}


@rule("v9.slot.overlap")
@pytest.mark.parametrize(("address", "size"), OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("there", [PRIVATE, 0], ids=["beside private", "beside ordinary"])
def test_overlap(slots: RestrictedSlots, there: int, address: int, size: int) -> None:
    """A slot whose guest range overlaps another slot's is EEXIST, private or not."""
    new = {"slot": 4, "guest_phys_addr": address, "memory_size": size}
    with slots.held(flags=there):
        assert slots.set(**new) == "EEXIST"
        assert slots.set(**new, flags=0) == "EEXIST"
        slots.accepts(slot=4, memory_size=size, guest_phys_addr=BASE - size)
        slots.accepts(slot=4, memory_size=size, guest_phys_addr=BASE + SIZE)
    slots.accepts(**new)


@rule("v9.slot.overlap.address_space")
def test_no_overlap_between_address_spaces(slots: RestrictedSlots) -> None:
    """Slots of different address spaces do not overlap."""
    if slots.vm.check_extension(k.KVM_CAP_MULTI_ADDRESS_SPACE) < 2:
        missing("second-address-space", "KVM_CAP_MULTI_ADDRESS_SPACE is below 2")
    with slots.held():
        assert slots.set(slot=4) == "EEXIST"
        slots.accepts(slot=1 << 16 | 4)


EINVALS: dict[str, dict[str, int]] = {
    "flags": {"flags": PRIVATE | UNKNOWN},
    "size": {"memory_size": SIZE + 1},
    "gpa": {"guest_phys_addr": BASE + 1},
    "userspace_addr": {"userspace_addr": 1},
    "kernel address": {"userspace_addr": 0xFFFF888000000000},
    "offset": {"restricted_offset": 1},
    "offset wraps": {"restricted_offset": TOP - PAGE},
    "pages": {"memory_size": 1 << 43, "guest_phys_addr": 0, "userspace_addr": 0},
}


@rule("v9.slot.order.eexist")
@pytest.mark.parametrize("wrong", EINVALS.values(), ids=EINVALS)
def test_einval_comes_before_eexist(slots: RestrictedSlots, wrong: dict[str, int]) -> None:
    """EINVAL of flags, alignment and ranges comes before EEXIST of an overlap."""
    with slots.held():
        assert slots.set(slot=4, **wrong) == "EINVAL"
        assert slots.set(slot=4) == "EEXIST"


@rule("v9.slot.order.eexist.number")
def test_bad_number_comes_before_eexist(slots: RestrictedSlots) -> None:
    """EINVAL of a slot number that is too large comes before EEXIST of an overlap."""
    with slots.held():
        assert slots.set(slot=0xFFFF) == "EINVAL"
        assert slots.set(slot=4) == "EEXIST"


@rule("v9.slot.order.immutable")
def test_immutable_comes_before_eexist(slots: RestrictedSlots) -> None:
    """EINVAL of a change to a private slot comes before EEXIST of an overlap."""
    with slots.held(), slots.held(slot=4, guest_phys_addr=5 * GIB):
        assert slots.set(slot=4) == "EINVAL"
        assert slots.set(slot=5) == "EEXIST"


@rule("v9.hook.off.order")
def test_hook_comes_before_eexist(refused_slots: RestrictedSlots) -> None:
    """If the arch hook refuses the VM, KVM_MEM_PRIVATE onto another slot's range is EINVAL, not
    EEXIST.
    """
    with refused_slots.held(flags=0):
        assert refused_slots.set(slot=4) == "EINVAL"
        assert refused_slots.set(slot=4, flags=0) == "EEXIST"
        assert refused_slots.delete(flags=0) == "ok"
        assert refused_slots.set(flags=0) == "ok"


# -- 9: the file ---------------------------------------------------------------------------------


@rule("v9.slot.file")
def test_other_files(slots: RestrictedSlots, kvm: Kvm, file: RestrictedMem) -> None:
    """A restricted_fd that is not open, is O_PATH, or is not a restrictedmem file is EINVAL."""
    closed = os.dup(0)
    os.close(closed)
    for number in (0xFFFFFFFF, 0x7FFFFFFF, closed, 1 << 20):
        assert slots.set(restricted_fd=number) == "EINVAL", number
    opened = [
        os.memfd_create("other"),
        os.open("/dev/null", os.O_RDWR),
        os.open("/", os.O_RDONLY),
        *os.pipe(),
        socket.socket().detach(),
        os.open(f"/proc/self/fd/{file.fileno()}", os.O_PATH),
    ]
    try:
        for number in (*opened, kvm.fileno(), slots.vm.fileno()):
            assert slots.set(restricted_fd=number) == "EINVAL", number
            slots.accepts(restricted_fd=number, flags=0)  # an ordinary slot does not use it
    finally:
        for number in opened:
            os.close(number)
    assert slots.asked == 4 + 3 * 9
    slots.accepts()


@rule("v9.slot.file.dup")
def test_duplicates(slots: RestrictedSlots, file: RestrictedMem) -> None:
    """A duplicate of the descriptor works as the descriptor does."""
    other = os.dup(file.fileno())
    try:
        slots.accepts(restricted_fd=other)
    finally:
        os.close(other)
    assert slots.set(restricted_fd=other) == "EINVAL"


@rule("v9.slot.order.file")
def test_eexist_comes_before_the_file(slots: RestrictedSlots) -> None:
    """EEXIST of an overlap comes before EINVAL of a bad restricted_fd."""
    with slots.held():
        assert slots.set(slot=4, restricted_fd=0xFFFFFFFF) == "EEXIST"
        assert slots.set(slot=4, restricted_fd=slots.vm.fileno()) == "EEXIST"
        assert slots.set(slot=4, guest_phys_addr=5 * GIB, restricted_fd=0xFFFFFFFF) == "EINVAL"
        slots.accepts(slot=4, guest_phys_addr=5 * GIB)


@rule("v9.slot.unchecked.file_size")
def test_the_file_size_is_not_checked(slots: RestrictedSlots, file: RestrictedMem) -> None:
    """A slot may begin and end beyond the file's size."""
    slots.accepts(restricted_offset=0)
    file.ftruncate(PAGE)
    for offset in (0, PAGE, 1 << 40):
        slots.accepts(restricted_offset=offset)


@rule("v9.slot.unchecked.pad")
def test_padding_is_not_checked(slots: RestrictedSlots) -> None:
    """The kernel ignores pad1 and pad2."""
    slots.accepts(pad1=0xFFFFFFFF, pad2=TOP - 1)


@rule("v9.slot.unchecked.shared_range")
def test_a_range_in_two_slots(slots: RestrictedSlots) -> None:
    """Two slots may use the same range of one file, in whole or in part."""
    with slots.held():
        slots.accepts(slot=4, guest_phys_addr=5 * GIB)
        slots.accepts(slot=4, guest_phys_addr=5 * GIB, restricted_offset=40 * PAGE)


@rule("v9.slot.unchecked.two_vms")
def test_a_range_in_two_vms(
    make_private_vm: Callable[[], Vm], file: RestrictedMem, memory: HostMemory
) -> None:
    """Slots of two VMs may use the same range of one file."""
    one, two = (RestrictedSlots(make_private_vm(), file, memory.userspace_addr) for _ in range(2))
    with one.held(), two.held():
        assert (one.set(slot=4), two.set(slot=4)) == ("EEXIST", "EEXIST")
    fallocate(file, 3, 0, PAGE)


@rule("v9.slot.many")
def test_every_slot(slots: RestrictedSlots) -> None:
    """Some hundred private slots of one file are made, and deleted in another order."""
    count = min(slots.vm.check_extension(k.KVM_CAP_NR_MEMSLOTS), 500)
    where = [
        {"slot": n, "guest_phys_addr": n * 2 * PAGE, "memory_size": PAGE} for n in range(count)
    ]
    for one in where:
        assert slots.set(**one, userspace_addr=0, restricted_offset=one["slot"] * PAGE) == "ok"
    assert slots.asked == count
    for one in where[::2] + where[1::2]:
        assert slots.delete(slot=one["slot"]) == "ok"
    slots.accepts()


# -- 10: failing half-way -----------------------------------------------------------------------

FAILURES: dict[str, dict[str, int]] = {
    "prepared": {"guest_phys_addr": 1 << 52},
    "overlap": {"slot": 4},
    "immutable": {"slot": 5},
    "wrong file": {"restricted_fd": 0},
}


@rule("v9.slot.failure.leaks_nothing", "v9.slot.prepare")
@pytest.mark.parametrize("wrong", FAILURES.values(), ids=FAILURES)
def test_failures_leak_nothing(slots: RestrictedSlots, wrong: dict[str, int]) -> None:
    """3,000 slots that can't be made, for whatever reason, leave no reference to the file."""
    memory, files = Unevictable(), files_open()
    expected: dict[str, int] = {}
    with RestrictedMem() as file:
        fd = file.fileno()
        fallocate(file, 0, 0, BIG)
        assert slots.set(slot=5) == "ok"
        struct = slots.struct(**{"restricted_fd": fd, "guest_phys_addr": BASE, **wrong})
        if "slot" not in wrong and "guest_phys_addr" not in wrong:
            struct.region.slot, struct.region.guest_phys_addr = 4, 5 * GIB
        elif "guest_phys_addr" in wrong:
            struct.region.slot = 4
        for _ in range(3000):
            said = slots.set_at(address_of(struct))
            expected[said] = expected.get(said, 0) + 1
        assert expected == {"EEXIST" if wrong == {"slot": 4} else "EINVAL": 3000}
        # This calls every notifier that is still registered.
        fallocate(file, 3, 0, PAGE)
        slots.accepts(slot=4, guest_phys_addr=5 * GIB, restricted_fd=fd)
        assert memory.is_about(BIG)
    assert memory.is_about(0), "the file is freed with its last descriptor"
    assert abs(files_open() - files) < 200
