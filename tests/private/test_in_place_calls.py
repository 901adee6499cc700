"""Conversion in place: what KVM_SET_MEMORY_ATTRIBUTES2 refuses, in which order, what it sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from kvmpriv import Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.private import PrivateFile
from kvmpriv.private.guest_memfd import GuestMemfd

from .support.in_place import (
    PRIVATE,
    REQUEST,
    UNTOUCHED,
    FileRig,
    convert,
    dies_of_a_load,
    host_can,
    must_convert,
    states,
    struct,
)
from .support.processes import in_child
from .support.rig import MakeRig, Rig, only
from .support.rules import rule
from .support.slot_requests import Edge
from .support.syscalls import GIB, MIB, NOWHERE, PAGE, address_of, answer, errno_of

pytestmark = pytest.mark.usefixtures("no_leak")

MMAP, INIT_SHARED = gm.GUEST_MEMFD_FLAG_MMAP, gm.GUEST_MEMFD_FLAG_INIT_SHARED
TOP = 1 << 64
PAGES = 16
SIZE = PAGES * PAGE
in_place = only("guest_memfd_in_place")


@pytest.fixture
def file(rig: Rig) -> PrivateFile:
    """A file of 16 pages that can be mapped, all of them shared."""
    return rig.file(SIZE)


# -- what says that it is there --------------------------------------------------------------------


@rule("gip.cap.vm", "gip.attr.off", "gip.cap.number")
@in_place
def test_what_the_vm_reports(rig: Rig, kvm: Kvm) -> None:
    """The VM's own attributes are gone, and a new capability reports the file's."""
    for fd in (kvm, rig.vm):
        assert fd.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES) == 0
    attributes = gm.ffi.new("struct kvm_memory_attributes *", (0, PAGE, PRIVATE, 0))
    assert errno_of(rig.vm.ioctl_errno(gm.KVM_SET_MEMORY_ATTRIBUTES, attributes)) == "ENOTTY"
    attributes.attributes = 0
    assert errno_of(rig.vm.ioctl_errno(gm.KVM_SET_MEMORY_ATTRIBUTES, attributes)) == "ENOTTY"
    new = {number: rig.vm.check_extension(number) for number in range(252, 300)}
    assert list(new.values()).count(PRIVATE) == 1, new
    with kvm.create_vm() as plain:
        (number,) = (number for number, value in new.items() if value == PRIVATE)
        assert plain.check_extension(number) in (0, PRIVATE)


@rule("gip.create.init_shared")
@in_place
def test_files_that_begin_shared(rig: Rig) -> None:
    """INIT_SHARED is a flag of VMs with private memory, too."""
    listed = rig.vm.check_extension(gm.KVM_CAP_GUEST_MEMFD_FLAGS)
    assert listed == MMAP | INIT_SHARED
    for bit in range(64):
        expected = "ok" if listed >> bit & 1 else "EINVAL"
        assert answer(lambda flag=1 << bit: GuestMemfd(rig.vm, PAGE, flag).close()) == expected, bit
    GuestMemfd(rig.vm, PAGE, MMAP | INIT_SHARED).close()


@rule("gip.fd.others")
@in_place
def test_other_descriptors(rig: Rig, kvm: Kvm, file: PrivateFile) -> None:
    """Of all descriptors only a guest_memfd has the ioctl; a duplicate of one has it as well."""
    pipe = os.pipe()
    ordinary = os.memfd_create("ordinary", os.MFD_CLOEXEC)
    path = os.open(f"/proc/self/fd/{file.fileno()}", os.O_PATH)
    duplicate = os.dup(file.fileno())
    asked = struct()
    try:
        for fd, expected in (
            (kvm.fileno(), "EINVAL"),
            (rig.vm.fileno(), "ENOTTY"),
            (rig.guest.vcpu.fileno(), "EINVAL"),
            (pipe[0], "ENOTTY"),
            (ordinary, "ENOTTY"),
            (path, "EBADF"),
            (duplicate, "ok"),
            (file.fileno(), "ok"),
        ):
            assert said_of(fd, asked) == expected, fd
    finally:
        for fd in (*pipe, ordinary, path, duplicate):
            os.close(fd)


def said_of(fd: int, argument: Any) -> str:
    """The kernel's answer to a descriptor that no object owns."""
    from kvmpriv.libc import syscall

    return errno_of(max(0, -syscall(16, fd, REQUEST, address_of(argument))))


# -- refusals --------------------------------------------------------------------------------------

#: Every refusal but EFAULT, in the order in which the kernel makes it: changes to a good call.
REFUSED: dict[str, dict[str, Any]] = {
    "flag": {"flags": 1},
    "reserved": {"reserved": (0, 1)},
    "attribute": {"attributes": PRIVATE | 1},
    "size 0": {"size": 0},
    "wrap": {"offset": TOP - PAGE, "size": 2 * PAGE},
    "offset unaligned": {"offset": PAGE + 1},
    "size unaligned": {"size": PAGE + 1},
    "beyond": {"offset": SIZE},
}


def refuses(file: PrivateFile, expected: str = "EINVAL", **changes: Any) -> None:
    """The call with these changes is refused without effect, and its twin is not."""
    good = {"offset": 3 * PAGE, "size": 2 * PAGE, "attributes": PRIVATE}
    assert convert(file, **{**good, **changes}) == (expected, None), changes
    assert convert(file, **good) == ("ok", None), "the twin"


@rule("gip.refused.einval", "gip.refused.no-effect", "gip.error_offset.einval")
@in_place
@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal(rig: Rig, file: PrivateFile, name: str) -> None:
    """EINVAL, error_offset is not written, and no page has changed; the twin works."""
    with rig.abi.create_memory(file, 0, SIZE) as memory:
        assert convert(file, **{"offset": 3 * PAGE, **REFUSED[name]}) == ("EINVAL", None)
        assert states(memory) == [False] * PAGES
        refuses(file, **REFUSED[name])
        assert states(memory) == [page in (3, 4) for page in range(PAGES)]


@rule("gip.order.efault")
@in_place
def test_efault_comes_first(file: PrivateFile) -> None:
    """All 128 bytes are read before anything is looked at."""
    edge = Edge()
    for changes in (*REFUSED.values(), {}):
        made = struct(**changes)
        for readable, expected in ((127, "EFAULT"), (128, "EINVAL" if changes else "ok")):
            said = errno_of(file.ioctl_errno(REQUEST, edge.put(made, readable)))
            assert said == expected, (changes, readable)
    for address in (0, 1, NOWHERE):
        assert errno_of(file.ioctl_errno(REQUEST, address)) == "EFAULT"
    edge.close()


@rule("gip.order.einval")
@in_place
def test_two_mistakes_at_once(file: PrivateFile) -> None:
    """Of two mistakes each is EINVAL, whichever comes first."""
    tried = 0
    for one in REFUSED.values():
        for other in REFUSED.values():
            if one.keys().isdisjoint(other):
                refuses(file, **one, **other)
                tried += 1
    assert tried > 20


@rule("gip.flags")
@in_place
def test_every_flag(file: PrivateFile) -> None:
    """No flag is known."""
    for bit in range(64):
        refuses(file, flags=1 << bit)


@rule("gip.reserved")
@in_place
def test_every_reserved_word(file: PrivateFile) -> None:
    """Each of the 11 reserved words must be 0."""
    for word in range(11):
        for value in (1, 1 << 63):
            refuses(file, reserved=(word, value))
    assert len(struct().reserved) == 11


@rule("gip.error_offset.ignored", "gip.error_offset.ok")
@in_place
def test_error_offset_is_only_written(file: PrivateFile) -> None:
    """Its value before does not matter, and success leaves it."""
    for value in (0, 1, PAGE, TOP - 1, UNTOUCHED):
        for attributes in (PRIVATE, PRIVATE, 0, 0):
            said = convert(file, 0, PAGE, attributes, error_offset=value)
            assert said == ("ok", None), (value, attributes)


@rule("gip.attributes")
@in_place
def test_every_attribute(file: PrivateFile) -> None:
    """PRIVATE is the only attribute."""
    for bit in range(64):
        if 1 << bit == PRIVATE:
            continue
        refuses(file, attributes=1 << bit)
        refuses(file, attributes=PRIVATE | 1 << bit)


@rule("gip.range.size-0", "gip.range.wrap", "gip.range.aligned", "gip.range.beyond")
@in_place
@pytest.mark.parametrize("attributes", [PRIVATE, 0], ids=["private", "shared"])
def test_every_bad_range(file: PrivateFile, attributes: int) -> None:
    """What is empty, wraps, is not page aligned or leaves the file."""
    for offset, size in (
        (0, 0),
        (PAGE, 0),
        (SIZE, 0),
        (TOP - PAGE, PAGE),
        (TOP - PAGE, 2 * PAGE),
        (PAGE, TOP - PAGE),
        (1, PAGE),
        (2048, 2048),
        (PAGE, 1),
        (PAGE, PAGE + 1),
        (PAGE - 1, PAGE + 1),
        (SIZE, PAGE),
        (SIZE - PAGE, 2 * PAGE),
        (0, SIZE + PAGE),
        (1 << 63, PAGE),
        ((1 << 63) - PAGE, PAGE),
        (0, 1 << 63),
        (0, TOP - PAGE),
    ):
        said = convert(file, offset, size, attributes)
        assert said == ("EINVAL", None), (hex(offset), hex(size))
    for offset, size in ((0, PAGE), (SIZE - PAGE, PAGE), (0, SIZE)):
        assert convert(file, offset, size, attributes) == ("ok", None)


@rule("gip.range.aligned.each")
@in_place
def test_every_offset_within_a_page(file: PrivateFile) -> None:
    """Each offset and each size from 1 to 4095 is EINVAL."""
    made, said = struct(), []
    address = address_of(made)
    for odd in range(1, PAGE):
        made.offset, made.size = odd, PAGE
        said.append(file.ioctl_errno(REQUEST, address))
        made.offset, made.size = 0, odd
        said.append(file.ioctl_errno(REQUEST, address))
    assert (len(said), {errno_of(number) for number in said}) == (2 * 4095, {"EINVAL"})
    assert convert(file) == ("ok", None)


@rule("gip.no-private-memory")
@in_place
def test_a_vm_without_private_memory(rig: Rig, kvm: Kvm, file: PrivateFile) -> None:
    """The file of a default VM is EINVAL, to shared as well; EFAULT comes first."""
    with kvm.create_vm() as plain, GuestMemfd(plain, SIZE, MMAP | INIT_SHARED) as other:
        for attributes in (PRIVATE, 0):
            assert convert(other, 0, PAGE, attributes) == ("EINVAL", None)
            assert convert(file, 0, PAGE, attributes) == ("ok", None), "the twin"
        assert errno_of(other.ioctl_errno(REQUEST, 0)) == "EFAULT"
        with rig.abi.create_memory(other, 0, SIZE) as memory:
            assert states(memory) == [False] * PAGES


@rule("gip.fd.process")
@in_place
def test_another_process_converts(rig: Rig, file: PrivateFile) -> None:
    """A process that inherited the file converts it, though its VM is EIO there."""
    with rig.abi.create_memory(file, 0, SIZE) as memory:
        assert in_child(lambda: convert(file, 0, PAGE)) == ("ok", None)
        assert states(memory) == [page == 0 for page in range(PAGES)]
        assert in_child(lambda: answer(lambda: rig.vm.enable_cap(201, 0))) == "EIO"


# -- state -----------------------------------------------------------------------------------------


@pytest.fixture(params=[MMAP | INIT_SHARED, MMAP], ids=["INIT_SHARED", "private at first"])
def fresh(request: pytest.FixtureRequest, rig: Rig) -> Iterator[tuple[GuestMemfd, bool]]:
    """A file of each kind, and whether its pages are private at first."""
    with GuestMemfd(rig.vm, SIZE, request.param) as made:
        yield made, request.param == MMAP


@rule("gip.state.first", "gip.state.first.allocated")
@in_place
def test_the_state_at_first(rig: Rig, fresh: tuple[GuestMemfd, bool]) -> None:
    """With INIT_SHARED all pages are shared, without it private; allocation does not matter."""
    file, private = fresh
    with rig.abi.create_memory(file, 0, SIZE) as memory:
        file.allocate(0, 2 * PAGE)
        assert states(memory) == [private] * PAGES
        assert dies_of_a_load(memory, 5 * PAGE) == private
        must_convert(file, 4 * PAGE, 3 * PAGE, private=not private)
        assert states(memory) == [private ^ (4 <= page < 7) for page in range(PAGES)]
        assert dies_of_a_load(memory, 5 * PAGE) != private
        must_convert(file, 0, SIZE, private=private)
        assert states(memory) == [private] * PAGES


@rule("gip.state.single-page", "gip.state.layouts")
@in_place
def test_precise_to_the_page(rig: Rig, fresh: tuple[GuestMemfd, bool]) -> None:
    """Each page alone, and layouts of many, each compared page by page."""
    file, first = fresh
    with rig.abi.create_memory(file, 0, SIZE) as memory:
        expected = [first] * PAGES

        def change(at: int, count: int, *, private: bool) -> None:
            must_convert(file, at * PAGE, count * PAGE, private=private)
            expected[at : at + count] = [private] * count
            assert states(memory) == expected, (at, count, private)

        for page in range(PAGES):
            change(page, 1, private=not first)
            change(page, 1, private=first)
        for page in range(0, PAGES, 2):
            change(page, 1, private=not first)
        # Over borders of ranges, from within one into another, over several, and over all.
        for at, count, private in (
            (3, 4, first),
            (5, 8, not first),
            (6, 2, first),
            (1, 13, not first),
            (0, 16, first),
            (8, 8, not first),
            (7, 2, first),
            (7, 2, not first),
            (0, 16, not first),
        ):
            change(at, count, private=private)
        change(0, 16, private=first)


@rule("gip.state.again")
@in_place
def test_what_is_so_already(rig: Rig, file: PrivateFile) -> None:
    """A range that is so, or in part, is no error."""
    with rig.abi.create_memory(file, 0, SIZE) as memory:
        for private in (False, True, True, False, False):
            must_convert(file, 0, SIZE, private=private)
            assert states(memory) == [private] * PAGES
        must_convert(file, 2 * PAGE, PAGE, private=True)
        must_convert(file, 0, 4 * PAGE, private=True)
        assert states(memory) == [page < 4 for page in range(PAGES)]
        must_convert(file, 3 * PAGE, 5 * PAGE, private=True)
        assert states(memory) == [page < 8 for page in range(PAGES)]


@rule("gip.state.hole", "gip.state.allocation")
@in_place
def test_holes_keep_the_state(rig: Rig, file: PrivateFile) -> None:
    """A hole, and what is allocated in it, has the state of before; only the content is gone."""
    with rig.abi.create_memory(file, 0, SIZE) as memory:
        memory.write(0, b"\x11" * SIZE)
        must_convert(file, 4 * PAGE, 8 * PAGE, private=True)
        expected = [4 <= page < 12 for page in range(PAGES)]
        for act in (file.punch_hole, file.allocate, file.punch_hole):
            act(2 * PAGE, 12 * PAGE)
            assert states(memory) == expected
        must_convert(file, 0, SIZE, private=False)
        kept, gone = b"\x11" * PAGE, bytes(PAGE)
        assert memory.read(0, SIZE) == kept * 2 + gone * 12 + kept * 2


@rule("gip.state.no-slot", "gip.state.slots")
@in_place
def test_no_slot_is_needed_and_none_changes_it(rig: Rig, file: PrivateFile) -> None:
    """Converted before, between and after slots, at other addresses; one state for all of them."""
    with rig.abi.create_memory(file, 0, SIZE) as memory:
        must_convert(file, 2 * PAGE, PAGE, private=True)
        for gpa, offset, size in ((GIB, 0, SIZE), (2 * GIB, 2 * PAGE, 2 * PAGE)):
            slot = rig.abi.bind(rig.vm, gpa, size, file, offset)
            assert states(memory) == [page == 2 for page in range(PAGES)]
            slot.delete()
            assert states(memory) == [page == 2 for page in range(PAGES)]
        low = rig.abi.bind(rig.vm, GIB, 8 * PAGE, file)
        high = rig.abi.bind(rig.vm, 4 * GIB, 8 * PAGE, file, 8 * PAGE)
        must_convert(file, 7 * PAGE, 2 * PAGE, private=True)  # one call, both slots
        assert states(memory) == [page in (2, 7, 8) for page in range(PAGES)]
        low.delete()
        must_convert(file, 7 * PAGE, 2 * PAGE, private=False)  # one slot, and none
        high.delete()
        assert states(memory) == [page == 2 for page in range(PAGES)]


@rule("gip.state.mappings", "gip.state.file")
@in_place
def test_one_state_for_all_mappings(rig: Rig, file: PrivateFile) -> None:
    """Every mapping of the file sees a conversion, and no other file does."""
    other = rig.file(SIZE)
    with (
        rig.abi.create_memory(file, 0, SIZE) as one,
        rig.abi.create_memory(file, 4 * PAGE, 4 * PAGE) as part,
        rig.abi.create_memory(other, 0, SIZE) as beside,
    ):
        for memory in (one, part, beside):
            memory.write(0, b"x" * memory.size)
        must_convert(file, 4 * PAGE, 2 * PAGE, private=True)
        assert states(one) == [page in (4, 5) for page in range(PAGES)]
        assert states(part) == [True, True, False, False]
        assert states(beside) == [False] * PAGES
        must_convert(file, 5 * PAGE, PAGE, private=False)
        assert states(part) == [True, False, False, False]
        assert part.read(PAGE, PAGE) == b"x" * PAGE


@rule("gip.state.two-vms")
@in_place
def test_files_of_two_vms(make_rig: MakeRig) -> None:
    """A file belongs to its VM; a conversion of one VM's file changes nothing of the other's."""
    one, two = make_rig(FileRig), make_rig(FileRig)
    assert answer(lambda: two.abi.bind(two.vm, 64 * GIB, PAGE, one.one)) == "EINVAL"
    for rig, word in ((one, b"one"), (two, b"two")):
        rig.guest.write(rig.gpa, word)
    one.to(0, private=True)
    assert (host_can(one.shared, 0), host_can(two.shared, 0)) == (False, True)
    assert (one.guest.read(one.gpa, 3), two.guest.read(two.gpa, 3)) == (b"one", b"two")
    two.to(0, private=True)
    one.to(0, private=False)
    assert (host_can(one.shared, 0), host_can(two.shared, 0)) == (True, False)
    one.guest.close()
    one.vm.close()
    assert two.guest.read(two.gpa, 3) == b"two"


@rule("gip.range.2m", "gip.range.1g")
@in_place
@pytest.mark.parametrize("size", [2 * MIB, GIB], ids=["2 MiB", "1 GiB"])
def test_large_ranges(rig: Rig, size: int) -> None:
    """One call for a range of which few pages exist; at both ends and beside it nothing changes."""
    file = rig.file(size + 2 * PAGE)
    looked = (0, PAGE, 2 * PAGE, size // 2, size - PAGE, size, size + PAGE)
    with rig.abi.create_memory(file, 0, size + 2 * PAGE) as memory:
        for at in looked[::2]:
            memory.write(at, b"there")
        for private in (True, False, True):
            must_convert(file, PAGE, size, private=private)
            seen = [not host_can(memory, at) for at in looked]
            assert seen == [False, *[private] * 5, False]
        must_convert(file, size // 2, PAGE, private=False)
        assert [host_can(memory, size // 2 + at) for at in (-PAGE, 0, PAGE)] == [False, True, False]
        must_convert(file, 0, size + 2 * PAGE, private=False)
        for at in looked[::2]:
            assert memory.read(at, 5) == b"there"
