"""Offsets and sizes: which page of the file and of host memory belongs to which gfn."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from kvmpriv import Kvm
from kvmpriv.exits import MemoryFaultExit, MmioExit
from kvmpriv.guest.puppet import GuestExit
from kvmpriv.private import PrivateSlot

from .support.large_pages import huge_pages, need_large_pages
from .support.rig import LARGE, MakeRig, Rig, only, two_backings
from .support.rules import rule
from .support.syscalls import GIB, MIB, PAGE, answer

pytestmark = pytest.mark.usefixtures("no_leak")

holes = pytest.mark.known_defect("notified-in-bytes", "hole-before-binding", "pages-not-zeroed")


@dataclass(frozen=True)
class Layout:
    """Where a slot is, and where it begins in its file and in host memory; in bytes."""

    gpa: int
    size: int
    offset: int
    memory_offset: int

    def pages(self) -> range:
        return range(0, self.size, PAGE)


#: No two numbers of a layout alike, nor multiples of each other's large pages.
LAYOUTS = {
    "odd": Layout(4 * GIB + 3 * PAGE, 7 * PAGE, 5 * PAGE, 11 * PAGE),
    "one page, far": Layout((64 * GIB) + 7 * PAGE, PAGE, (1 << 40) + 9 * PAGE, 2 * PAGE),
    "across 4 GiB": Layout(4 * GIB - PAGE, LARGE + PAGE, 3 * LARGE - PAGE, PAGE),
    "large": Layout(5 * GIB + LARGE, 2 * LARGE, 3 * LARGE, 0),
    "unlike": Layout(5 * GIB + LARGE, LARGE + 9 * PAGE, LARGE + 255 * PAGE, 3 * PAGE),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def stamp(kind: bytes, at: int) -> bytes:
    """The 8 bytes that mark the page at `at`."""
    return kind + struct.pack("<I", at // PAGE)


def stamps(data: bytes) -> list[bytes]:
    """The first 8 bytes of each page."""
    return [data[at : at + 8] for at in range(0, len(data), PAGE)]


class Laid:
    """A slot with this layout; each page of both sides is stamped with its number."""

    def __init__(self, rig: Rig, layout: Layout) -> None:
        self.rig, self.layout = rig, layout
        # One more page at both ends, which must not change.
        self.memory = rig.memory(layout.memory_offset + layout.size + PAGE)
        self.file = rig.file(layout.offset + layout.size + LARGE)
        self.slot = rig.bind(
            layout.gpa, layout.size, self.file, layout.offset,
            memory=self.memory, memory_offset=layout.memory_offset,
        )  # fmt: skip
        for at in layout.pages():
            self.memory.write(layout.memory_offset + at, stamp(b"host", at))
            rig.guest.store(layout.gpa + at, 8, int.from_bytes(stamp(b"mine", at), "little"))

    def seen(self) -> list[bytes]:
        return stamps(self.rig.guest.read(self.layout.gpa, self.layout.size))

    def expected(self, kind: bytes) -> list[bytes]:
        return [stamp(kind, at) for at in self.layout.pages()]


@rule("private.layout.both-sides")
@pytest.mark.known_defect("private-prefetch")
@layouts
@two_backings
def test_each_page_has_its_place(rig: Rig, layout: Layout) -> None:
    """Each private and shared page is where the offsets put it, and nowhere else."""
    laid = Laid(rig, layout)
    assert laid.seen() == laid.expected(b"mine")
    shared = laid.memory.read(layout.memory_offset, layout.size)
    assert stamps(shared) == laid.expected(b"host"), "no private write came here"
    rig.convert(layout.gpa, layout.size, private=False)
    assert laid.seen() == laid.expected(b"host")
    for at in layout.pages():
        rig.guest.store(layout.gpa + at, 8, int.from_bytes(stamp(b"both", at), "little"))
    whole = stamps(laid.memory.read(0, laid.memory.size))
    before, after = layout.memory_offset // PAGE, 1
    assert whole == [bytes(8)] * before + laid.expected(b"both") + [bytes(8)] * after
    rig.convert(layout.gpa, layout.size, private=True)
    assert laid.seen() == laid.expected(b"mine")


@rule("private.layout.holes")
@pytest.mark.known_defect("private-prefetch")
@holes
@layouts
def test_each_hole_has_its_place(rig: Rig, layout: Layout) -> None:
    """A hole in one page of the file empties that page of the guest, at both ends and between."""
    laid = Laid(rig, layout)
    expected = laid.expected(b"mine")
    beside = (layout.offset - PAGE, layout.offset + layout.size)
    for offset in beside:
        laid.file.punch_hole(offset, PAGE)
        assert laid.seen() == expected, hex(offset)
    last = layout.size - PAGE
    for at in sorted({0, last, last // 2 // PAGE * PAGE, min(last, LARGE)}):
        laid.file.punch_hole(layout.offset + at, PAGE)
        expected[at // PAGE] = bytes(8)
        assert laid.seen() == expected, hex(at)
    # From before the slot's part until behind it.
    laid.file.punch_hole(layout.offset - PAGE, layout.size + 2 * PAGE)
    assert laid.seen() == [bytes(8)] * len(expected)
    assert stamps(laid.memory.read(layout.memory_offset, layout.size)) == laid.expected(b"host")


@rule("private.layout.convert")
@pytest.mark.known_defect("private-prefetch")
@layouts
@two_backings
def test_each_conversion_has_its_place(rig: Rig, layout: Layout) -> None:
    """Single pages are converted, at both ends and between: each has the other memory then."""
    laid = Laid(rig, layout)
    expected = laid.expected(b"mine")
    last = layout.size - PAGE
    for at in sorted({0, last, last // 2 // PAGE * PAGE, min(last, LARGE)}):
        rig.convert(layout.gpa + at, PAGE, private=False)
        expected[at // PAGE] = stamp(b"host", at)
        assert laid.seen() == expected, hex(at)
    rig.convert(layout.gpa - PAGE, layout.size + 2 * PAGE, private=True)
    assert laid.seen() == laid.expected(b"mine")


# -- several slots ---------------------------------------------------------------------------------

LOW, HIGH = 2 * GIB, 4 * GIB


@rule("private.layout.split")
@pytest.mark.timeout(600)  # 6.12 converts page by page, slowly in a debug kernel
@pytest.mark.known_defect("far-conversion")  # looked for after the harmless ones below
@holes
@two_backings
def test_split_layout(rig: Rig) -> None:
    """QEMU's layout: 2 GiB at 0, and the rest of the file at 4 GiB."""
    guest, file = rig.guest, rig.file(LOW + GIB)
    memory = rig.memory(LOW + GIB)
    rig.bind(0, LOW, file, 0, memory=memory)
    rig.bind(HIGH, GIB, file, LOW, memory=memory, memory_offset=LOW)
    where = {0: 0, MIB: MIB, LOW - PAGE: LOW - PAGE, HIGH: LOW, HIGH + GIB - PAGE: LOW + GIB - PAGE}

    def seen() -> dict[int, bytes]:
        return {gpa: guest.read(gpa, 8) for gpa in where}

    for gpa, offset in where.items():
        memory.write(offset, stamp(b"host", offset))
        guest.write(gpa, stamp(b"mine", offset))
    mine = {gpa: stamp(b"mine", offset) for gpa, offset in where.items()}
    host = {gpa: stamp(b"host", offset) for gpa, offset in where.items()}
    assert seen() == mine
    # One hole in the file, at the end of the one slot and the beginning of the other.
    file.punch_hole(LOW - PAGE, 2 * PAGE)
    assert seen() == {**mine, LOW - PAGE: bytes(8), HIGH: bytes(8)}
    for gpa in (LOW - PAGE, HIGH):
        guest.write(gpa, mine[gpa])
    # One conversion over both, and over what is between them.
    rig.convert(MIB, HIGH + PAGE - MIB, private=False)
    shared = (MIB, LOW - PAGE, HIGH)
    assert seen() == {gpa: (host if gpa in shared else mine)[gpa] for gpa in where}
    for gpa, size in ((0, LOW), (HIGH, GIB)):  # not between them: there the puppet is at home
        rig.convert(gpa, size, private=True)
    assert seen() == mine
    for gpa in (LOW, HIGH - PAGE, HIGH + GIB):
        with pytest.raises(GuestExit) as stopped:
            guest.load(gpa, 4)
        assert isinstance(stopped.value.exit, (MmioExit, MemoryFaultExit))
        guest.reset()


@rule("private.layout.gpa-0", "private.layout.last-gpa")
@holes
@two_backings
def test_both_ends_of_the_address_space(rig: Rig, kvm: Kvm) -> None:
    """Slots at gpa 0 and up to the processor's last address work; one page beyond is EINVAL."""
    (bits,) = {entry.eax & 0xFF for entry in kvm.get_supported_cpuid() if entry[0] == 0x80000008}
    size = 4 * PAGE
    top = (1 << bits) - size
    guest, file, memory = rig.guest, rig.file(64 * PAGE), rig.memory(64 * PAGE)
    for gpa in (top + PAGE, top + size, (1 << 52) - PAGE):
        if bits < 52:
            said = answer(lambda at=gpa: rig.bind(at, size, file, 0, memory=memory))
            assert said == "EINVAL", hex(gpa)
    rig.bind(0, size, file, 3 * PAGE, memory=memory, memory_offset=PAGE)
    rig.bind(top, size, file, 9 * PAGE, memory=memory, memory_offset=20 * PAGE)
    for gpa, offset in ((0, PAGE), (top, 20 * PAGE)):
        for at in range(0, size, PAGE):
            memory.write(offset + at, stamp(b"host", gpa + at & 0xFFFFF000))
            guest.write(gpa + at, stamp(b"mine", gpa + at & 0xFFFFF000))
    for gpa in (0, top):
        for at, private in ((0, True), (PAGE, False), (2 * PAGE, True), (3 * PAGE, False)):
            rig.convert(gpa + at, PAGE, private=private)
        kinds = (b"mine", b"host", b"mine", b"host")
        expected = [stamp(kind, gpa + n * PAGE & 0xFFFFF000) for n, kind in enumerate(kinds)]
        assert stamps(guest.read(gpa, size)) == expected
    assert guest.load((1 << bits) - 1, 1) == 0, "the very last byte"
    file.punch_hole(9 * PAGE, PAGE)
    assert (guest.read(0, 8), guest.read(top, 8)) == (stamp(b"mine", 0), bytes(8))


@rule("private.layout.across-slots")
@pytest.mark.known_defect("private-prefetch")
@holes
@two_backings
def test_ranges_across_slots(rig: Rig) -> None:
    """One conversion covers private slots, an ordinary one and a gap: each gets its part."""
    guest, gpa, each = rig.guest, 6 * GIB, 3 * PAGE
    memory, plain = rig.memory(each * 8), rig.memory(each)
    one, other = rig.file(64 * PAGE), rig.file(64 * PAGE)
    first, ordinary, second, third = gpa, gpa + each, gpa + 2 * each, gpa + 4 * each
    rig.bind(first, each, one, 7 * PAGE, memory=memory)
    rig.vm.map(plain, ordinary)
    rig.bind(second, each, other, 5 * PAGE, memory=memory, memory_offset=each)
    rig.bind(third, each, one, 13 * PAGE, memory=memory, memory_offset=2 * each)
    slots = (first, second, third)
    memory.write(0, b"".join(stamp(b"host", n) + bytes(PAGE - 8) for n in range(0, 9 * PAGE, PAGE)))
    for number, slot in enumerate(slots):
        for at in range(0, each, PAGE):
            guest.write(slot + at, stamp(b"mine", number * each + at))

    def seen() -> list[bytes]:
        return [one for slot in slots for one in stamps(guest.read(slot, each))]

    mine = [stamp(b"mine", at) for at in range(0, 9 * PAGE, PAGE)]
    host = [stamp(b"host", at) for at in range(0, 9 * PAGE, PAGE)]
    assert seen() == mine
    # From the first slot's second page until the third one's first.
    rig.convert(first + PAGE, third - first, private=False)
    assert seen() == mine[:1] + host[1:7] + mine[7:]
    guest.write(ordinary - 3, b"across")
    assert guest.read(ordinary - 3, 6) == b"across"
    assert memory.read(each - 3, 3) + plain.read(0, 3) == b"across"
    rig.convert(first, third + each - first, private=True)
    assert seen() == mine
    # What an ordinary slot is said to be: v9 does not ask, guest_memfd has nothing private there.
    if rig.abi.traits.default_private:
        assert guest.read(ordinary, 3) == b"oss"
    else:
        with pytest.raises(GuestExit) as stopped:
            guest.read(ordinary, 3)
        assert rig.fault_of(stopped.value) == (ordinary, PAGE, True)
        rig.convert(ordinary, each, private=False)
        assert guest.resume() == b"oss"
    # A hole is its file's: the other one's slot at the same offset keeps its page.
    one.punch_hole(7 * PAGE, 9 * PAGE)
    assert seen() == [bytes(8)] * 3 + mine[3:6] + [bytes(8)] * 3


# -- large pages -----------------------------------------------------------------------------------

GPA, OFFSET, SIZE = 4 * GIB, 2 * GIB + LARGE, 3 * LARGE


def large_slot(rig: Rig, offset: int = OFFSET) -> None:
    """A slot whose gfns and host memory are aligned for large pages."""
    memory, start = rig.large_memory(SIZE)
    memory.write(start, b"\x11" * SIZE)
    file = rig.file(OFFSET + 2 * SIZE)
    rig.bind(GPA, SIZE, file, offset, memory=memory, memory_offset=start)
    # The puppet's own pages are to be mapped before any are counted.
    rig.vm.map(rig.memory(PAGE), 64 * GIB)
    rig.guest.fill(64 * GIB, 1, PAGE)
    rig.guest.span(64 * GIB, 1, PAGE)


@rule("v9.large-pages.made", "v9.large-pages.broken", "v9.large-pages.joined")
@pytest.mark.known_defect(
    "notified-in-bytes",
    "mixed-large-page",
    "split-loses-pages",
    "private-prefetch",
    "pages-not-zeroed",
)
@only("restrictedmem")
def test_large_pages(rig: Rig) -> None:
    """2 MiB mappings, by KVM's counters: conversions and holes split them, and no data is lost."""
    guest = rig.guest
    with huge_pages():
        large_slot(rig)
        small, large = rig.mapped()
        guest.fill(GPA, 0x22, SIZE)
        need_large_pages(rig)
        assert rig.mapped() == (small, large + 3)

        # One page of the second is shared: its neighbours are mapped one by one.
        rig.convert(GPA + LARGE + 5 * PAGE, PAGE, private=False)
        assert rig.mapped() == (small, large + 2), "it is taken away as a whole"
        assert guest.span(GPA, 0x22, SIZE) == LARGE + 5 * PAGE
        assert guest.span(GPA + LARGE + 5 * PAGE, 0x11, LARGE) == PAGE
        rest = 2 * LARGE - 6 * PAGE
        assert guest.span(GPA + LARGE + 6 * PAGE, 0x22, rest) == rest
        assert rig.mapped() == (small + 512, large + 2)

        # All of it is private again: the next access finds a large page.
        rig.convert(GPA + LARGE + 5 * PAGE, PAGE, private=True)
        assert guest.load(GPA + LARGE + 5 * PAGE, 1) == 0x22
        assert rig.mapped()[1] == large + 3
        assert guest.span(GPA, 0x22, SIZE) == SIZE

        # A hole of one page of the third: the file's large page is split, for good.
        (slot,) = (one for one in rig.vm.slots.values() if one.guest_phys_addr == GPA)
        assert isinstance(slot, PrivateSlot)
        slot.punch_hole(GPA + 2 * LARGE + 7 * PAGE, PAGE)
        assert rig.mapped()[1] == large + 2
        assert guest.span(GPA, 0x22, SIZE) == 2 * LARGE + 7 * PAGE
        assert guest.span(GPA + 2 * LARGE + 7 * PAGE, 0, LARGE) == PAGE
        rest = LARGE - 8 * PAGE
        assert guest.span(GPA + 2 * LARGE + 8 * PAGE, 0x22, rest) == rest
        assert rig.mapped()[1] == large + 2


@rule("v9.large-pages.shared")
@only("restrictedmem")
def test_large_pages_of_both_kinds(rig: Rig) -> None:
    """One large page is shared beside private ones; it is mapped as host memory is."""
    guest = rig.guest
    with huge_pages():
        large_slot(rig)
        guest.fill(GPA, 0x22, SIZE)
        need_large_pages(rig)
        _, large = rig.mapped()
        rig.convert(GPA + LARGE, LARGE, private=False)
        assert rig.mapped()[1] == large - 1
        assert guest.span(GPA, 0x22, SIZE) == LARGE
        assert guest.span(GPA + LARGE, 0x11, LARGE + PAGE) == LARGE
        assert guest.span(GPA + 2 * LARGE, 0x22, LARGE) == LARGE
        rig.convert(GPA + LARGE, LARGE, private=True)
        assert guest.span(GPA, 0x22, SIZE) == SIZE
        assert rig.mapped()[1] == large


@rule("v9.large-pages.alignment")
@only("restrictedmem")
def test_no_large_pages_where_the_file_lies_otherwise(rig: Rig) -> None:
    """A slot that is one page off in its file has the same memory, in small pages only."""
    guest = rig.guest
    with huge_pages():
        large_slot(rig, OFFSET + PAGE)
        small, large = rig.mapped()
        guest.fill(GPA, 0x22, SIZE)
        assert guest.span(GPA, 0x22, SIZE) == SIZE
        assert rig.mapped() == (small + SIZE // PAGE, large)


@rule("gm.large-pages.none")
@only("guest_memfd")
def test_guest_memfd_has_small_pages(make_rig: MakeRig) -> None:
    """guest_memfd has small pages only: pre-faulted or touched, converted, or with a hole."""
    rig = make_rig()
    guest = rig.guest
    large_slot(rig)
    small, large = rig.mapped()
    rig.abi.populate(guest.vcpu, GPA, LARGE)
    assert rig.mapped() == (small + 512, large), "pre-faulted, not touched"
    guest.fill(GPA, 0x22, SIZE)
    assert rig.mapped() == (small + SIZE // PAGE, large)
    rig.convert(GPA + LARGE + 5 * PAGE, PAGE, private=False)
    assert rig.mapped() == (small + SIZE // PAGE - 1, large), "one page, and no more"
    assert guest.load(GPA + LARGE + 5 * PAGE, 1) == 0x11
    rig.convert(GPA + LARGE + 5 * PAGE, PAGE, private=True)
    (slot,) = (one for one in rig.vm.slots.values() if one.guest_phys_addr == GPA)
    assert isinstance(slot, PrivateSlot)
    assert guest.span(GPA, 0x22, SIZE) == SIZE
    slot.punch_hole(GPA + 2 * LARGE + 7 * PAGE, PAGE)
    assert rig.mapped() == (small + SIZE // PAGE - 1, large)
    assert guest.span(GPA, 0x22, SIZE) == 2 * LARGE + 7 * PAGE
    assert guest.span(GPA + 2 * LARGE + 7 * PAGE, 0, LARGE) == PAGE
    assert rig.mapped() == (small + SIZE // PAGE, large)
