"""VMs without private memory, on a kernel that can give private memory to others."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from kvmpriv import HostMemory, Kvm, Vm
from kvmpriv.cdefs import kvm as k
from kvmpriv.guest.puppet import Puppet

from .support.kernels import require_nested_paging, require_scripts_vm
from .support.ordinary import GPAS, PAGES, SIZE, stale_page, words_in, words_of
from .support.races import eventually
from .support.requirements import missing
from .support.rig import LARGE
from .support.rules import rule
from .support.settings import write_setting
from .support.syscalls import GIB, MAP_PRIVATE, PAGE, PROT_READ, PROT_WRITE, answer, call

pytestmark = pytest.mark.usefixtures("no_leak")

MAP_FIXED, MAP_ANONYMOUS = 0x10, 0x20
MADV_COLLAPSE = 25  # Python's mmap lacks it
GPA = 4 * GIB
TURNS = 4


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test has opened."""
    with ExitStack() as made:
        yield made


@pytest.fixture
def guest(vm: Vm, kvm: Kvm, stack: ExitStack) -> Puppet:
    """A guest of two vCPUs in a default VM."""
    return stack.enter_context(Puppet(vm, cpus=3, cpuid=kvm.get_supported_cpuid()))


def pages_of(bitmap: bytes) -> set[int]:
    """The numbers of the bits that are set."""
    return {8 * at + bit for at, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}


# -- two slots on one range of host memory ---------------------------------------------------------


@rule("ordinary.two-slots")
@pytest.mark.known_defect("invalidation-of-one-slot")
@pytest.mark.parametrize("change", ["MADV_DONTNEED", "munmap"])
def test_two_slots_on_one_host_range(vm: Vm, guest: Puppet, stack: ExitStack, change: str) -> None:
    """Pages that the host frees are unmapped from both slots, while a vCPU faults on them."""
    memory = stack.enter_context(HostMemory(SIZE))

    def unmap() -> None:
        """The old mapping goes and another one comes in one call, so that no access fails."""
        how = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS
        call("mmap", memory.userspace_addr, SIZE, PROT_READ | PROT_WRITE, how, -1, 0)

    free = unmap if change == "munmap" else partial(memory.discard, 0, SIZE)
    assert not stale_page(vm, guest, memory, free)
    for number, gpa in enumerate(GPAS):
        for page in range(PAGES):
            guest.store(gpa + page * PAGE, 8, 0x3300 * number + page)
        expected = [0x3300 * number + page for page in range(PAGES)]
        assert words_of(memory, range(PAGES)) == expected
        assert all(words_in(guest, one, range(PAGES)) == expected for one in GPAS)


# -- pages that the host merges and splits ---------------------------------------------------------


@contextmanager
def merging() -> Iterator[Path]:
    """The kernel merges equal pages meanwhile (KSM); the folder of its settings."""
    folder = Path("/sys/kernel/mm/ksm")
    if not folder.exists():
        missing("ksm", "the kernel has no CONFIG_KSM")
    wanted = {"pages_to_scan": "10000", "sleep_millisecs": "1", "run": "1"}
    before = {name: (folder / name).read_text() for name in wanted}
    try:
        for name, value in wanted.items():
            write_setting(str(folder / name), value, "ksm")
        yield folder
    finally:
        for name, value in {**before, "run": "2"}.items():  # 2: stop, and separate all pages
            (folder / name).write_text(value)
        (folder / "run").write_text(before["run"])


@rule("ordinary.ksm")
def test_pages_that_the_kernel_merges(vm: Vm, guest: Puppet, stack: ExitStack) -> None:
    """Equal pages are merged under the guest; a write of guest or host separates its page only."""
    require_scripts_vm("may the test have the kernel merge pages")
    count, turns = 64, 0
    size = count * PAGE
    memory = stack.enter_context(HostMemory(size))
    vm.map(memory, GPA)
    for turn in range(3):
        memory.write(0, bytes([0x41 + turn]) * size)
        guest.touch(GPA, PAGE, count)  # mapped before they are merged
        with merging() as folder:
            memory.madvise(mmap.MADV_MERGEABLE)
            deadline = time.monotonic() + 60
            while int((folder / "pages_sharing").read_text()) < count - 1:
                assert time.monotonic() < deadline, "the kernel has not merged the pages"
                time.sleep(0.05)
            assert guest.span(GPA, 0x41 + turn, size) == size
            expected = [bytes([0x41 + turn]) * PAGE] * count
            for page in range(0, count, 3):
                guest.fill(GPA + page * PAGE, page, PAGE)
                expected[page] = bytes([page]) * PAGE
            for page in range(1, count, 3):
                memory.write(page * PAGE, bytes([0x80 + page]) * PAGE)
                expected[page] = bytes([0x80 + page]) * PAGE
            assert guest.read(GPA, size) == b"".join(expected)
            assert memory.read(0, size) == b"".join(expected)
            memory.madvise(mmap.MADV_UNMERGEABLE)
        assert guest.read(GPA, size) == memory.read(0, size) == b"".join(expected)
        turns += 1
    assert turns == 3


@rule("ordinary.huge-pages")
def test_huge_pages_made_and_split(vm: Vm, guest: Puppet, stack: ExitStack) -> None:
    """Small pages become a huge one, and that is split, under two slots of a running guest."""
    memory = stack.enter_context(HostMemory(2 * LARGE))
    start, turns, count = -memory.userspace_addr % LARGE, 0, LARGE // PAGE
    looked_at = [*range(0, count, 8), count - 1]
    for gpa in GPAS:
        vm.map(memory, gpa, size=LARGE, offset=start)

    def collapse() -> str:
        return answer(lambda: call("madvise", memory.userspace_addr + start, LARGE, MADV_COLLAPSE))

    def both_see(what: str) -> None:
        expected = words_of(memory, looked_at, start)
        assert all(words_in(guest, gpa, looked_at) == expected for gpa in GPAS), (what, turns)

    for turn in range(TURNS):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.discard(start, LARGE)
        for page in range(count):  # each of its own, mapped by KVM as a small page
            memory.write(start + page * PAGE, b"%08d" % (page + turn))
        for gpa in GPAS:
            guest.touch(gpa, PAGE, count)
        memory.madvise(mmap.MADV_HUGEPAGE)
        # EAGAIN: the kernel has a page in use for a moment.
        assert eventually(lambda: collapse() != "EAGAIN", seconds=20), turns
        if (said := collapse()) != "ok":
            missing("huge-pages", f"MADV_COLLAPSE: {said}")
        assert words_of(memory, (8,), start) == [int.from_bytes(b"%08d" % (8 + turn), "little")]
        both_see("collapsed")
        for number, page in enumerate((16 + 8 * turn, count - 1)):
            guest.store(GPAS[number] + page * PAGE, 8, 0x6100 + number)
            assert words_of(memory, (page,), start) == [0x6100 + number]
        # The host gives one page back: the huge page is split.
        memory.discard(start + 8 * PAGE, PAGE)
        assert words_of(memory, (0, 8, 16 + 8 * turn), start)[1:] == [0, 0x6100]
        both_see("split")
        guest.store(GPAS[1] + 8 * PAGE, 8, 0x63)
        assert words_of(memory, (8,), start) == [0x63]
        both_see("written")
        turns += 1
    assert turns == TURNS


# -- the dirty log ---------------------------------------------------------------------------------


@rule("ordinary.dirty-log")
@pytest.mark.parametrize("huge", [False, True], ids=["small pages", "huge pages"])
def test_dirty_log_of_two_slots(vm: Vm, guest: Puppet, stack: ExitStack, huge: bool) -> None:
    """Each slot's log has the pages written through it, and none that the other slot wrote."""
    require_nested_paging()
    count = LARGE // PAGE
    memory = stack.enter_context(HostMemory(2 * LARGE))
    start, turns = -memory.userspace_addr % LARGE, 0
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    memory.write(0, b"\1" * memory.size)
    log = k.KVM_MEM_LOG_DIRTY_PAGES
    for number, gpa in enumerate(GPAS):
        vm.map(memory, gpa, size=LARGE, offset=start, flags=log, slot=3 + number)
        guest.touch(gpa, PAGE, count)  # KVM may map what is read as writable, and logs it then
        vm.get_dirty_log(3 + number)
    for turn in range(TURNS):
        written = [{turn, 63, 64, count - 1 - turn}, {1 + turn, 100 + turn, count // 2}]
        for number, pages in enumerate(written):
            for page in pages:
                guest.store(GPAS[number] + page * PAGE, 8, 1000 * turn + page)
        for number, pages in enumerate(written):
            assert pages_of(vm.get_dirty_log(3 + number)) == pages, (turn, number)
            assert pages_of(vm.get_dirty_log(3 + number)) == set(), (turn, number)
            for page in pages:
                content = memory.read(start + page * PAGE, 8)
                assert int.from_bytes(content, "little") == 1000 * turn + page
                assert guest.load(GPAS[1 - number] + page * PAGE, 8) == 1000 * turn + page
        turns += 1
    assert turns == TURNS
    # A page that the host has given back is logged when the guest writes to the fresh one.
    memory.discard(start + 7 * PAGE, PAGE)
    guest.store(GPAS[0] + 7 * PAGE, 8, 7)
    assert 7 in pages_of(vm.get_dirty_log(3))
    assert memory.read(start + 7 * PAGE, 8) == (7).to_bytes(8, "little")
