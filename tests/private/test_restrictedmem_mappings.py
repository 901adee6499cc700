"""v9: what is unmapped and when, in large and small pages, while other vCPUs fault."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmpriv import HostMemory
from kvmpriv.exits import MemoryFaultExit
from kvmpriv.guest.puppet import GuestExit
from kvmpriv.private.restrictedmem import RestrictedMem

from .support.large_pages import huge_pages, shmem_huge_pages
from .support.requirements import missing
from .support.rig import LARGE, MakeRig, Rig, only, run_again, two_backings
from .support.rules import rule
from .support.slot_requests import RestrictedSlots
from .support.syscalls import GIB, MIB, PAGE

pytestmark = pytest.mark.usefixtures("no_leak")

GPA, OFFSET = 4 * GIB, 2 * GIB + 32 * MIB
v9 = only("restrictedmem")


# -- which mappings go ---------------------------------------------------------------------------

SLOT = 16
#: Where in the slot's part of the file a hole begins and how long it is, in pages.
HOLES = {
    "ends before": (-4, 2, 0),
    "ends where it begins": (-2, 2, 0),
    "reaches into it": (-3, 4, 1),
    "first": (0, 1, 1),
    "inside": (5, 3, 3),
    "last": (15, 1, 1),
    "reaches out of it": (14, 6, 2),
    "begins where it ends": (16, 4, 0),
    "begins behind": (20, 4, 0),
    "around": (-4, 24, 16),
}


@rule("v9.hole.unmaps.exactly")
@pytest.mark.known_defect("notified-in-bytes", "hole-before-binding")
@v9
def test_a_hole_unmaps_just_its_pages(rig: Rig) -> None:
    """A hole unmaps exactly its pages in the slot; the slots beside it keep their mappings."""
    file, plain = rig.file(OFFSET + 64 * PAGE), rig.memory(2 * SLOT * PAGE)
    size = SLOT * PAGE
    rig.bind(GPA, size, file, OFFSET)
    rig.vm.map(plain, GPA - size, offset=0, size=size, slot=8)
    rig.vm.map(plain, GPA + size, offset=size, size=size, slot=9)
    for name, (first, count, expected) in HOLES.items():
        rig.guest.touch(GPA - size, PAGE, 3 * SLOT)
        before = rig.mapped()
        file.punch_hole(OFFSET + first * PAGE, count * PAGE)
        assert rig.mapped() == (before[0] - expected, before[1]), name


@rule("v9.file.size.frees")
@pytest.mark.known_defect("size-0-frees", "pages-not-zeroed")
@v9
def test_a_file_emptied_by_its_size(rig: Rig) -> None:
    """ftruncate(2) to 0 of a file without a size frees its pages and unmaps them from the guest."""
    file = rig.stack.enter_context(RestrictedMem())
    rig.bind(GPA, MIB, file, OFFSET)
    for _ in range(3):
        rig.guest.fill(GPA, 0x5A, MIB)
        file.ftruncate(0)
        assert rig.guest.span(GPA, 0, MIB) == MIB
        rig.guest.write(GPA, b"again")
        assert rig.guest.read(GPA, 5) == b"again"


@rule("v9.fault.neighbours")
@pytest.mark.known_defect("private-prefetch", "pages-not-zeroed")
@v9
def test_neighbours_of_a_fault(rig: Rig) -> None:
    """If KVM maps more than the faulting page, private pages stay private."""
    memory = rig.memory(SLOT * PAGE)
    rig.bind(GPA, SLOT * PAGE, rig.file(MIB), memory=memory)
    memory.write(0, b"\x11" * SLOT * PAGE)
    rig.guest.load(GPA + 8 * PAGE, 8)
    assert rig.guest.span(GPA, 0, SLOT * PAGE) == SLOT * PAGE
    rig.convert(GPA + 4 * PAGE, PAGE, private=False)
    rig.guest.load(GPA + 4 * PAGE, 8)
    assert rig.guest.span(GPA, 0, SLOT * PAGE) == 4 * PAGE
    assert rig.guest.span(GPA + 5 * PAGE, 0, 11 * PAGE) == 11 * PAGE


# -- what the file is, what it keeps -------------------------------------------------------------


@rule("v9.file.stat.identity")
@pytest.mark.known_defect("fstat")
@pytest.mark.usefixtures("v9")
def test_the_file_that_stat_tells_of() -> None:
    """fstat(2) reports the device and inode of the file, not those of the shmem file behind it."""
    ordinary = os.memfd_create("ordinary")
    try:
        with RestrictedMem() as one, RestrictedMem() as two:
            seen = [os.fstat(file.fileno()) for file in (one, two)]
            for file, stat in zip((one, two), seen, strict=True):
                lines = Path(f"/proc/self/fdinfo/{file.fileno()}").read_text().splitlines()
                assert f"ino:\t{stat.st_ino}" in lines
            assert seen[0].st_dev == seen[1].st_dev != os.fstat(ordinary).st_dev
            assert seen[0].st_ino != seen[1].st_ino
    finally:
        os.close(ordinary)


@rule("v9.slot.file.refused_reference")
def test_a_file_that_is_refused_is_let_go_of(slots: RestrictedSlots) -> None:
    """A slot that is refused for its file holds no reference: a pipe's end closes at once."""
    read_end, write_end = os.pipe()
    try:
        os.set_blocking(read_end, False)
        with pytest.raises(BlockingIOError):
            os.read(read_end, 1)
        assert slots.set(restricted_fd=write_end) == "EINVAL"
        os.close(write_end)
        assert os.read(read_end, 1) == b"", "the other end is still open"
    finally:
        os.close(read_end)
    slots.accepts()


# -- large pages ---------------------------------------------------------------------------------


@pytest.fixture
def large(make_rig: MakeRig) -> Iterator[Rig]:
    """A rig of two vCPUs, and files that get large pages."""
    with huge_pages():
        yield make_rig(cpus=2)


def bind_large(rig: Rig, size: int, *, apart: int = 0) -> tuple[RestrictedMem, HostMemory, int]:
    """A slot at GPA + `apart` of a file without a size, with shared memory aligned the same way.

    The file, the memory, and where in the memory GPA would be.
    """
    memory, start = rig.large_memory(size + LARGE)
    file = rig.stack.enter_context(RestrictedMem())
    rig.bind(GPA + apart, size, file, memory=memory, memory_offset=start + apart)
    return file, memory, start


def gained(rig: Rig, access: Callable[[], object]) -> int:
    """How many large mappings an access adds."""
    before = rig.mapped()[1]
    access()
    return rig.mapped()[1] - before


def fill_large(rig: Rig, size: int) -> None:
    """Have the guest fill the slot, all of it in large pages."""
    before = shmem_huge_pages()
    brought = gained(rig, lambda: rig.guest.fill(GPA, 0x5A, size))
    if shmem_huge_pages() - before < size:
        missing("huge-pages", "the kernel has none for the file")
    assert brought == size // LARGE


@rule("v9.large.mapped")
@pytest.mark.known_defect("pages-not-zeroed")
@v9
def test_large_mappings(make_rig: MakeRig) -> None:
    """A large page of the file is mapped as a large page, and small ones are not."""
    rig = make_rig()
    bind_large(rig, 2 * LARGE)

    def touch() -> None:
        """In an order in which some pages, made one behind the other, lie as a large one would."""
        rig.guest.touch(GPA, 2 * PAGE, 512)
        rig.guest.touch(GPA + PAGE, 2 * PAGE, 512)

    assert gained(rig, touch) == 0
    with huge_pages():
        other = make_rig()
        bind_large(other, 2 * LARGE)
        fill_large(other, 2 * LARGE)
    assert rig.guest.span(GPA, 0, 2 * LARGE) == 2 * LARGE


@rule("v9.large.alike")
@pytest.mark.known_defect("large-page-misplaced")
@v9
def test_large_pages_that_lie_otherwise(large: Rig) -> None:
    """If guest range and file range are not aligned alike, a large page is mapped with small
    pages.
    """
    at, size = GPA + PAGE, 3 * LARGE
    bind_large(large, size, apart=PAGE)
    assert gained(large, lambda: large.guest.fill(at, 0x5A, size)) == 0
    large.guest.store(at + size - 8, 8, 1)
    large.guest.store(at, 8, 2)
    assert (large.guest.load(at + size - 8, 8), large.guest.load(at, 8)) == (1, 2)
    assert large.guest.span(at + 8, 0x5A, size - 16) == size - 16
    with RestrictedMem() as file:
        large.bind(GPA + GIB, LARGE, file)
        assert gained(large, lambda: large.guest.load(GPA + GIB, 8)) == 1, "the twin"


@rule("v9.large.alike.shared")
@pytest.mark.known_defect("large-page-misplaced")
@v9
def test_shared_large_pages_that_lie_otherwise(make_rig: MakeRig) -> None:
    """If guest range and host range are not aligned alike, a huge page of the host is mapped with
    small pages, also if the range of the file is aligned as the guest range is.
    """
    rig, size = make_rig(), 3 * LARGE
    memory, start = rig.large_memory(size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pages = [bytes([page % 251 + 1]) * PAGE for page in range(size // PAGE)]
    memory.write(start, b"".join(pages))
    at = GPA + MIB
    rig.bind(at, size, rig.file(MIB + size), MIB, memory=memory, memory_offset=start)
    rig.convert(at, size, private=False)
    assert gained(rig, lambda: rig.guest.touch(at, PAGE, size // PAGE)) == 0
    for page in (0, 255, 256, 511, 512, 767):
        rig.guest.fill(at + page * PAGE, 0xFE, PAGE)
        pages[page] = b"\xfe" * PAGE
    assert rig.guest.read(at, size) == b"".join(pages)
    assert memory.read(start, size) == b"".join(pages)
    rig.bind(GPA + GIB, LARGE, rig.file(LARGE), memory=memory, memory_offset=start)
    rig.convert(GPA + GIB, LARGE, private=False)
    if gained(rig, lambda: rig.guest.load(GPA + GIB, 8)) != 1:
        missing("huge-pages", "the kernel has none for host memory")


@rule("v9.large.zeroed")
@pytest.mark.known_defect("pages-not-zeroed")
@v9
def test_fresh_large_pages_are_zero(large: Rig) -> None:
    """A large page is all zeros at first touch."""
    secrets = large.memory(128 * MIB)
    secrets.madvise(mmap.MADV_HUGEPAGE)
    secrets.write(0, b"\xa5" * secrets.size)
    secrets.discard(0, secrets.size)
    bind_large(large, 8 * LARGE)
    assert gained(large, lambda: large.guest.touch(GPA, LARGE, 8)) == 8
    assert large.guest.span(GPA, 0, 8 * LARGE) == 8 * LARGE


@rule("v9.large.hole")
@pytest.mark.known_defect(
    "notified-in-bytes", "split-loses-pages", "size-0-frees", "pages-not-zeroed"
)
@v9
@pytest.mark.parametrize("emptied", [False, True], ids=["fresh", "emptied"])
def test_a_hole_in_a_large_page(large: Rig, emptied: bool) -> None:
    """A hole in a large page beyond the file's size frees its own pages only."""
    file, _, _ = bind_large(large, 2 * LARGE)
    if emptied:
        large.guest.fill(GPA, 0x77, LARGE)
        file.ftruncate(0)
    fill_large(large, 2 * LARGE)
    for page in (0, 100, 511, 512):
        file.punch_hole(page * PAGE, PAGE)
    large.convert(GPA, 2 * LARGE, private=True)  # KVM looks again for large pages of the file
    seen = large.guest.read(GPA, 2 * LARGE)
    for page in range(1024):
        expected = 0 if page in (0, 100, 511, 512) else 0x5A
        assert seen[page * PAGE : (page + 1) * PAGE] == bytes([expected]) * PAGE, page


@rule("v9.large.mixed")
@pytest.mark.known_defect("mixed-large-page")
@v9
@pytest.mark.parametrize("page", [0, 1, 200, 510, 511])
def test_parts_of_a_large_page(large: Rig, page: int) -> None:
    """A large page with one shared page is mapped with small pages; the next large page is not
    affected.
    """
    _, memory, start = bind_large(large, 2 * LARGE)
    fill_large(large, 2 * LARGE)
    memory.write(start + page * PAGE, b"\x11" * PAGE)
    large.convert(GPA + page * PAGE, PAGE, private=False)
    assert gained(large, lambda: large.guest.touch(GPA, 257 * PAGE, 2)) == 0
    seen = large.guest.read(GPA, LARGE)
    assert seen[page * PAGE : (page + 1) * PAGE] == b"\x11" * PAGE
    assert seen.count(0x5A) == LARGE - PAGE
    large.guest.store(GPA + page * PAGE, 4, 0x33333333)
    assert memory.read(start + page * PAGE, 4) == b"\x33" * 4
    # The next large page is of one kind, and is mapped so although its neighbour is not.
    large.convert(GPA + LARGE, LARGE, private=True)
    assert gained(large, lambda: large.guest.load(GPA + LARGE, 8)) == 1
    # And so is this one, when it is of one kind again.
    large.convert(GPA, LARGE, private=True)
    assert gained(large, lambda: large.guest.load(GPA, 8)) == 1
    assert large.guest.span(GPA, 0x5A, 2 * LARGE) == 2 * LARGE


@rule("v9.large.wishes")
@pytest.mark.known_defect("mixed-large-page")
@v9
@pytest.mark.parametrize("page", [0, 200, 511])
def test_wishes_for_parts_of_a_large_page(large: Rig, page: int) -> None:
    """If the guest chooses another access for one page, a large page faults in that page only."""
    bind_large(large, LARGE)
    fill_large(large, LARGE)
    at = GPA + page * PAGE
    assert large.guest.hypercall(12, at, 1, 1 << 9) == 0
    assert gained(large, lambda: large.guest.touch(GPA + 3 * PAGE, 100 * PAGE, 4)) == 0
    with pytest.raises(GuestExit) as stopped:
        large.guest.load(at, 8)
    assert stopped.value.exit == large.fault_at(at, private=False)
    assert large.guest.cpus[1].hypercall(12, at, 1, 3 << 8) == 0
    assert large.guest.resume() == 0x5A5A5A5A5A5A5A5A


# -- faults under way ----------------------------------------------------------------------------

ROUNDS, READ = 12, 24


@contextmanager
def reading(rig: Rig, turn: int) -> Iterator[None]:
    """The second vCPU reads page after page, and the first may do something else meanwhile."""
    before = rig.mapped()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(rig.guest.cpus[1].touch, GPA, PAGE, READ)
        if turn % 2:  # else it may be that nothing is mapped yet
            while rig.mapped() == before and not under_way.done():
                pass
        time.sleep(turn % 6 * 0.0005)
        yield
        under_way.result(60)


def unmap(rig: Rig, *, private: bool) -> None:
    """The slot's pages have to fault again; what is in them stays."""
    rig.convert(GPA, READ * PAGE, private=not private)
    rig.convert(GPA, READ * PAGE, private=private)


@rule("private.race.read-against-hole")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
def test_reads_against_holes(make_rig: MakeRig) -> None:
    """Reads during a hole leave no mapping of the old page."""
    rig, size = make_rig(cpus=2), READ * PAGE
    file = rig.file(OFFSET + MIB)
    rig.bind(GPA, size, file, OFFSET)
    for turn in range(ROUNDS):
        rig.guest.fill(GPA, 0x5A, size)
        unmap(rig, private=True)
        with reading(rig, turn):
            file.punch_hole(OFFSET, size)
        assert rig.guest.span(GPA, 0, size) == size, turn
        # A page that was given back may have come back since, zeroed, for another gfn: two are one.
        distinct = b"".join(bytes([1 + turn + page]) * PAGE for page in range(READ))
        rig.guest.write(GPA, distinct)
        assert rig.guest.read(GPA, size) == distinct, turn


@rule("private.race.read-against-host")
@two_backings
def test_reads_against_the_hosts_own_holes(make_rig: MakeRig) -> None:
    """Reads of shared memory while the host frees it leave no mapping of the old page."""
    rig, size = make_rig(cpus=2), READ * PAGE
    memory = rig.memory(size)
    rig.bind(GPA, size, rig.file(MIB), memory=memory)
    for turn in range(ROUNDS):
        memory.write(0, b"\x5a" * size)
        unmap(rig, private=False)
        with reading(rig, turn):
            memory.discard(0, size)
        rig.guest.fill(GPA, turn + 1, size)
        assert memory.read(0, size) == bytes([turn + 1]) * size, turn


@rule("private.race.read-against-conversion")
@pytest.mark.known_defect("kind-read-twice", "private-prefetch")
@two_backings
def test_reads_against_conversions(make_rig: MakeRig) -> None:
    """Reads during a conversion leave no mapping of the other memory."""
    rig, size = make_rig(cpus=2), READ * PAGE
    memory = rig.memory(size)
    rig.bind(GPA, size, rig.file(MIB), memory=memory)
    memory.write(0, b"\x11" * size)
    rig.guest.fill(GPA, 0x5A, size)
    rig.guest.cpus[1].serve = run_again(rig.abi)
    for turn in range(ROUNDS):
        to_private = bool(turn % 2)
        unmap(rig, private=not to_private)
        with reading(rig, turn // 2):
            rig.convert(GPA, size, private=to_private)
        assert rig.guest.span(GPA, 0x5A if to_private else 0x11, size) == size, turn
    assert len(rig.guest.cpus[1].exits) <= (ROUNDS if rig.abi.traits.access_follows_state else 0)


@rule("v9.race.beside-hole")
@pytest.mark.known_defect("notified-in-bytes", "fault-beside-hole", "pages-not-zeroed")
@v9
@pytest.mark.parametrize("beside", [0, 511], ids=["before", "behind"])
def test_reads_beside_holes_in_a_large_page(large: Rig, beside: int) -> None:
    """A read of another part of a large page, while a hole is made in it, maps nothing stale."""
    others = shmem_huge_pages()
    file, _, _ = bind_large(large, LARGE)
    over, reads = threading.Event(), [0]

    def read() -> None:
        while not over.is_set():
            large.guest.cpus[1].load(GPA + beside * PAGE, 8)
            reads[0] += 1

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            for turn in range(20):
                large.guest.store(GPA + 256 * PAGE, 8, turn + 1)
                assert large.mapped()[1] * LARGE <= shmem_huge_pages() - others, turn
                file.punch_hole(256 * PAGE, PAGE)
                assert large.mapped()[1] * LARGE <= shmem_huge_pages() - others, turn
                assert large.guest.load(GPA + 256 * PAGE, 8) == 0, turn
                file.punch_hole(0, LARGE)
        finally:
            over.set()
            reader.result(60)
    assert reads[0] > 20


#: At page 0, subject in page 2: copies the subject's word to page 1 (at 8) and counts (at 0),
#: until the word at 16 ends it.
WATCH = bytes.fromhex(
    "488d3df91f0000"  # lea 0x2000(start), %rdi
    "488d35f20f0000"  # lea 0x1000(start), %rsi
    "488b07"  # again: mov (%rdi), %rax
    "48894608"  # mov %rax, 8(%rsi)
    "48ff06"  # incq (%rsi)
    "48837e1000"  # cmpq $0, 16(%rsi)
    "74ef"  # je again
    "c3"
)


@contextmanager
def apart(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Keep the thread of `pool` and this one off each other's CPU: neither has to leave it."""
    cpus = os.sched_getaffinity(0)
    first, *others = cpus
    if others:
        pool.submit(os.sched_setaffinity, 0, {others[0]}).result()
        os.sched_setaffinity(0, {first})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


@rule("private.unmap.at-once")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed", "kind-read-twice")
@pytest.mark.parametrize("change", ["hole", "conversion"])
@two_backings
def test_a_guest_that_runs_sees_it_at_once(make_rig: MakeRig, change: str) -> None:
    """A vCPU that stays in the guest loses the mapping too: its TLB is flushed."""
    rig, turns = make_rig(cpus=2), 10
    if rig.abi.traits.access_follows_state:  # a conversion between KVM's two reads is a fault
        rig.guest.cpus[1].serve = lambda _, exit_: isinstance(exit_, MemoryFaultExit)
    memory, file = rig.memory(16 * PAGE), rig.file(16 * PAGE)
    rig.bind(GPA, 16 * PAGE, file, memory=memory)
    rig.convert(GPA, 2 * PAGE, private=False)
    memory.write(0, WATCH)
    words = memory.view().cast("Q")
    counter, value, end = (PAGE // 8 + number for number in range(3))

    def seen() -> int:
        """What the guest reads next."""
        at = words[counter]
        deadline = time.monotonic() + 20
        while words[counter] < at + 2:
            assert time.monotonic() < deadline, "the guest does not go on"
        return words[value]

    with ThreadPoolExecutor(1) as pool, apart(pool):
        try:
            for turn in range(turns):
                rig.guest.store(GPA + 2 * PAGE, 8, 100 + turn)
                words[2 * PAGE // 8] = 0
                words[end] = 0
                watch = pool.submit(rig.guest.cpus[1].run, GPA)
                deadline = time.monotonic() + 20
                while words[value] != 100 + turn:
                    assert time.monotonic() < deadline, "the guest does not run"
                if change == "hole":
                    file.punch_hole(2 * PAGE, PAGE)
                else:
                    rig.convert(GPA + 2 * PAGE, PAGE, private=False)
                assert seen() == 0, turn
                words[end] = 1
                watch.result(60)
                rig.convert(GPA + 2 * PAGE, PAGE, private=True)
        finally:
            words[end] = 1
            words.release()
