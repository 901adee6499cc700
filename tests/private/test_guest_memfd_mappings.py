"""guest_memfd files that guest and host have mapped: what the memory manager does to the mapping.

The guest's slot is the file; whatever the host does to its own mapping, the guest's bytes stay, and
what takes pages from the file takes them from both.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.exits import MemoryFaultExit
from kvmpriv.guest.puppet import GuestExit, Puppet
from kvmpriv.private import guest_memfd
from kvmpriv.private.guest_memfd import GuestMemfd

from .support.accounting import BIG, Unevictable
from .support.file_operations import mapping
from .support.kernels import answer_to_in_place, require_nested_paging, require_scripts_vm
from .support.mappings import (
    GPA,
    INIT_SHARED,
    MADV,
    MMAP,
    OFFSET,
    MappedGuest,
    Mapping,
    require_flags,
    signal_of,
)
from .support.pins import PINS, READERS, in_a_direct_read, read_all_the_time
from .support.processes import in_cgroup, in_child
from .support.races import ROUNDS, eventually, rounds
from .support.requirements import missing
from .support.rig import MakeRig, only
from .support.rules import rule
from .support.settings import write_setting
from .support.syscalls import (
    HOLE,
    MAP_SHARED,
    MIB,
    PAGE,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    address_of,
    answer,
    call,
    fallocate,
    vector_of,
)
from .support.userfaultfd import MINOR, MISSING, register

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmpriv import Vm

pytestmark = pytest.mark.usefixtures("no_leak", "guest_memfd_kvm")

#: What the guest writes before a test, and what the host writes in it.
OURS, THEIRS = 0x5A, 0xA5


@pytest.fixture
def mapped(gm_vm: Vm, kvm: Kvm) -> Iterator[MappedGuest]:
    """A guest of 8 pages that the host has mapped; the guest has written OURS to all of them."""
    with ExitStack() as stack:
        made = MappedGuest(stack, gm_vm, kvm)
        made.guest.fill(GPA, OURS, made.size)
        yield made


# -- whose page it is ------------------------------------------------------------------------------


@rule("gm.mmap.fault", "gm.mmap.userspace_addr", "gip.fault.from-file")
def test_faults_are_served_from_the_file(gm_vm: Vm, kvm: Kvm) -> None:
    """The guest has the file's pages; what is at userspace_addr it neither reads nor changes.

    The twin, whose file can't be mapped, has the pages at userspace_addr for shared accesses;
    where files are converted, its accesses have the file's pages, too.
    """
    require_flags(gm_vm, MMAP | INIT_SHARED)
    require_nested_paging()
    size = 4 * PAGE
    unmapped = 0 if answer_to_in_place() == "" else THEIRS
    with ExitStack() as stack:
        guest = stack.enter_context(Puppet(gm_vm, cpuid=kvm.get_supported_cpuid()))
        for flags, seen in ((MMAP | INIT_SHARED, 0), (0, unmapped)):
            other = stack.enter_context(HostMemory(size))
            other.write(0, bytes([THEIRS]) * size)
            with GuestMemfd(gm_vm, OFFSET + size, flags) as file:
                slot = guest_memfd.set_user_memory_region2(gm_vm, 1, GPA, size, other, file, OFFSET)
                assert guest.span(GPA, seen, size) == size, flags
                guest.fill(GPA + PAGE, OURS, PAGE)
                assert other.read(PAGE, PAGE) == bytes([OURS if seen else THEIRS]) * PAGE
                if flags:
                    with Mapping(file.fileno(), size, OFFSET) as mapping:
                        expected = bytes(PAGE) + bytes([OURS]) * PAGE + bytes(2 * PAGE)
                        assert mapping.read(0, size) == expected
                slot.delete()


@rule("gm.mmap.hole.both")
@pytest.mark.parametrize("first", ["guest", "host"])
@pytest.mark.parametrize(("at", "pages"), [(0, 1), (3, 2), (7, 1), (0, 8)])
def test_holes_take_pages_from_both(mapped: MappedGuest, first: str, at: int, pages: int) -> None:
    """A hole reads as zeros for guest and host; both have the same new page, whoever touches it."""
    assert mapped.both_see(0, OURS, mapped.size)
    hole, size = at * PAGE, pages * PAGE
    mapped.punch_hole(hole, size)
    if first == "guest":
        assert mapped.guest.span(GPA + hole, 0, size) == size
        mapped.guest.fill(GPA + hole, THEIRS, size)
    else:
        assert mapped.memory.read(hole, size) == bytes(size)
        mapped.memory.write(hole, bytes([THEIRS]) * size)
    assert mapped.both_see(hole, THEIRS, size)
    for beside in {0, hole - PAGE, hole + size, mapped.size - PAGE}:
        if not hole <= beside < hole + size and 0 <= beside < mapped.size:
            assert mapped.both_see(beside, OURS), beside


@rule("gm.mmap.prefault")
def test_filled_ahead_from_the_file(gm_vm: Vm, kvm: Kvm) -> None:
    """KVM_PRE_FAULT_MEMORY allocates the file's pages, which guest and host then have."""
    if not gm_vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
        missing("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0")
    with ExitStack() as stack:
        mapped = MappedGuest(stack, gm_vm, kvm, pages=BIG // PAGE)
        mapped.guest.load(mapped.guest.base, 8)  # what it needs itself is there then
        mapped.memory.write(0, bytes([THEIRS]) * PAGE)
        memory = Unevictable()
        done = 0
        while done < BIG // 2:
            left = guest_memfd.pre_fault_memory(mapped.guest.vcpu, GPA + done, BIG // 2 - done)
            assert left < BIG // 2 - done
            done = BIG // 2 - left
        assert memory.is_about(BIG // 2), "the rest is not allocated"
        before = mapped.guest.vcpu.stats()["pf_taken"]
        assert mapped.guest.span(GPA, THEIRS, PAGE) == PAGE
        assert mapped.guest.load(GPA + BIG // 2 - PAGE, 1) == 0
        assert mapped.guest.vcpu.stats()["pf_taken"] == before, "the guest did not fault"
        mapped.memory.write(BIG // 2 - PAGE, bytes([OURS]))
        assert mapped.guest.load(GPA + BIG // 2 - PAGE, 1) == OURS
        assert mapped.guest.load(GPA + BIG // 2, 1) == 0
        assert mapped.guest.vcpu.stats()["pf_taken"] > before, "where nothing was filled it did"


@rule("gm.mmap.private-vm")
@only("guest_memfd")
def test_mapped_in_a_vm_with_private_memory(make_rig: MakeRig) -> None:
    """Without INIT_SHARED accesses of both kinds have the file's page, and the host has none."""
    rig = make_rig()
    require_flags(rig.vm, MMAP)
    with (
        GuestMemfd(rig.vm, OFFSET + 4 * PAGE, MMAP) as file,
        HostMemory(4 * PAGE) as other,
        Mapping(file.fileno(), 4 * PAGE, OFFSET) as mapping,
    ):
        other.write(0, bytes([THEIRS]) * 4 * PAGE)
        slot = guest_memfd.set_user_memory_region2(rig.vm, 5, GPA, 4 * PAGE, other, file, OFFSET)
        for private in (False, True, False):
            rig.convert(GPA, 4 * PAGE, private=private)
            if not private:
                assert rig.guest.load(GPA + PAGE, 8) in (0, 0x1234)
                rig.guest.store(GPA + PAGE, 8, 0x1234)
            assert rig.guest.load(GPA + PAGE, 8) == 0x1234, private
        assert other.read(0, 4 * PAGE) == bytes([THEIRS]) * 4 * PAGE
        assert signal_of(lambda: mapping.read(PAGE, 1)) == "SIGBUS"
        assert signal_of(lambda: other.read(PAGE, 1)) == ""
        slot.delete()


@rule("gm.fault.exit.kind")
@only("guest_memfd")
def test_fault_exits_of_both_kinds(make_rig: MakeRig) -> None:
    """Each exit names the kind of its own access, whatever the one before it was.

    The slot is made by the descriptor's number, so that the file is closed under it.
    """
    rig = make_rig()
    require_flags(rig.vm, MMAP)
    with HostMemory(4 * PAGE) as other:
        with GuestMemfd(rig.vm, OFFSET + 4 * PAGE, MMAP) as file:
            slot = guest_memfd.set_user_memory_region2(
                rig.vm, 5, GPA, 4 * PAGE, other, file.fileno(), OFFSET
            )
        for private in (True, False, True):
            rig.convert(GPA, 4 * PAGE, private=private)
            with pytest.raises(GuestExit) as stopped:
                rig.guest.load(GPA + PAGE, 8)
            assert rig.fault_of(stopped.value) == (GPA + PAGE, PAGE, private)
            rig.guest.reset()
        slot.delete()


# -- where a touch is SIGBUS -----------------------------------------------------------------------


def _write(address: int) -> None:
    read_end, write_end = os.pipe()
    try:
        call("write", write_end, address, 1)
    finally:
        os.close(read_end)
        os.close(write_end)


def _read(address: int) -> None:
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"x")
        call("read", read_end, address, 1)
    finally:
        os.close(read_end)
        os.close(write_end)


def _vm_readv(address: int) -> None:
    buffer = k.ffi.new("char[8]")
    here, there = vector_of(address_of(buffer), 1), vector_of(address, 1)
    call("process_vm_readv", os.getpid(), address_of(here), 1, address_of(there), 1, 0)


#: Name -> what reads or writes a byte of this process's memory in the kernel.
KERNEL_ACCESSES: dict[str, Callable[[int], object]] = {
    "write": _write,
    "read": _read,
    "process_vm_readv": _vm_readv,
    "populate-read": lambda address: call("madvise", address, PAGE, MADV["POPULATE_READ"]),
    "populate-write": lambda address: call("madvise", address, PAGE, MADV["POPULATE_WRITE"]),
}


@rule("gm.mmap.efault")
@pytest.mark.parametrize("name", KERNEL_ACCESSES)
def test_system_calls_where_a_touch_is_sigbus(gm_vm: Vm, name: str) -> None:
    """A system call that accesses memory beyond the end of the file, or not shared, is EFAULT."""
    require_flags(gm_vm, MMAP)
    shared = INIT_SHARED if not gm_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES) else 0

    def said(mapping: Mapping, page: int) -> str:
        return answer(lambda: KERNEL_ACCESSES[name](mapping.address + page * PAGE))

    with GuestMemfd(gm_vm, 2 * PAGE, MMAP) as file, Mapping(file.fileno(), 2 * PAGE) as mapping:
        assert said(mapping, 0) == "EFAULT", "not shared"
    require_flags(gm_vm, MMAP | shared)
    if shared:
        with (
            GuestMemfd(gm_vm, 2 * PAGE, MMAP | INIT_SHARED) as file,
            Mapping(file.fileno(), 4 * PAGE) as mapping,
        ):
            assert [said(mapping, page) for page in range(4)] == ["ok"] * 2 + ["EFAULT"] * 2


# -- what the host does to its mapping -------------------------------------------------------------

#: Advice -> the answer of madvise(2) on a mapping of such a file.
ADVICE = {
    "ok": "NORMAL RANDOM SEQUENTIAL WILLNEED DONTNEED DONTFORK DOFORK MERGEABLE UNMERGEABLE "
    "HUGEPAGE NOHUGEPAGE DONTDUMP DODUMP KEEPONFORK COLD PAGEOUT POPULATE_READ POPULATE_WRITE",
    "EINVAL": "FREE WIPEONFORK COLLAPSE",
}
ADVICE_ROWS = [(name, said) for said, names in ADVICE.items() for name in names.split()]


@rule("gm.mmap.madvise", "gm.mmap.madvise.collapse")
@pytest.mark.parametrize(("name", "expected"), ADVICE_ROWS)
def test_advice(mapped: MappedGuest, name: str, expected: str) -> None:
    """Advice about the mapping has its answer, and takes no byte from guest or host."""
    said = mapped.memory.advise(MADV[name])
    # What the kernel was not built with it does not know.
    if said != expected and name in ("MERGEABLE", "UNMERGEABLE", "HUGEPAGE", "NOHUGEPAGE"):
        with HostMemory(PAGE) as other:
            assert answer(lambda: other.madvise(MADV[name])) == said
    else:
        assert said == expected
    assert mapped.both_see(0, OURS, mapped.size)
    mapped.guest.fill(GPA + PAGE, THEIRS, PAGE)
    assert mapped.both_see(PAGE, THEIRS)


@rule("gm.mmap.madvise.remove")
def test_advice_to_remove(mapped: MappedGuest) -> None:
    """MADV_REMOVE is a hole: guest and host read zeros in it, and their bytes beside it."""
    assert mapped.memory.advise(MADV["REMOVE"], 2 * PAGE, 3 * PAGE) == "ok"
    assert mapped.both_see(2 * PAGE, 0, 3 * PAGE)
    assert mapped.both_see(PAGE, OURS)
    assert mapped.both_see(5 * PAGE, OURS, 3 * PAGE)


@rule("gm.mmap.populate")
def test_advice_to_populate(gm_vm: Vm, kvm: Kvm) -> None:
    """MADV_POPULATE_WRITE allocates the file's pages, MADV_DONTNEED frees none, a hole does."""
    memory = Unevictable()
    with ExitStack() as stack:
        mapped = MappedGuest(stack, gm_vm, kvm, pages=BIG // PAGE)
        assert memory.is_about(0)
        assert mapped.memory.advise(MADV["POPULATE_WRITE"]) == "ok"
        assert memory.is_about(BIG)
        assert mapped.memory.advise(MADV["DONTNEED"]) == "ok"
        assert memory.is_about(BIG)
        mapped.punch_hole(0, BIG)
        assert memory.is_about(0)


@rule("gm.mmap.clean-pages")
def test_pages_that_nobody_has_mapped(gm_vm: Vm, kvm: Kvm) -> None:
    """What the host has written stays when it unmaps the file, and caches are dropped.

    Such a page is clean for the memory manager and in no page table; there is no other copy of it.
    """
    require_scripts_vm("all caches of the machine are dropped")
    with ExitStack() as stack:
        mapped = MappedGuest(stack, gm_vm, kvm)
        mapped.memory.write(0, bytes([THEIRS]) * mapped.size)
        mapped.memory.close()
        os.posix_fadvise(mapped.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        write_setting("/proc/sys/vm/drop_caches", "3", "drop-caches")
        assert mapped.guest.span(GPA, THEIRS, mapped.size) == mapped.size


@rule("gm.mmap.noexec")
def test_not_executable(mapped: MappedGuest) -> None:
    """The file can't be executed: PROT_EXEC is EPERM for mmap(2) and EACCES for mprotect(2)."""
    size, fd = mapped.size, mapped.file.fileno()
    for protection, said in ((PROT_READ | PROT_EXEC, "EPERM"), (PROT_READ, "ok")):
        assert answer(lambda prot=protection: mapping(prot, MAP_SHARED)(fd)) == said
    for protection, said in ((PROT_READ | PROT_EXEC, "EACCES"), (PROT_READ, "ok")):
        protect = (mapped.memory.address, size, protection)
        assert answer(lambda what=protect: call("mprotect", *what)) == said


@rule("gm.mmap.munmap")
def test_unmapped(mapped: MappedGuest) -> None:
    """After munmap(2) the guest goes on, and another mapping has its bytes."""
    mapped.memory.close()
    assert mapped.guest.span(GPA, OURS, mapped.size) == mapped.size
    mapped.guest.fill(GPA + PAGE, THEIRS, PAGE)
    mapped.memory = mapped.map()
    assert mapped.both_see(PAGE, THEIRS)
    assert mapped.both_see(0, OURS)


@rule("gm.mmap.mremap")
def test_moved(mapped: MappedGuest) -> None:
    """mremap(2) moves the mapping: the same bytes are at its new address; the slot stays."""
    maymove, old = 1, mapped.memory.address
    blocker = Mapping(mapped.file.fileno(), PAGE, OFFSET)
    try:
        longer = mapped.size + PAGE  # the file has one page more, behind it is nothing
        mapped.memory.address = call("mremap", old, mapped.size, longer, maymove)
        mapped.memory.size = longer
        assert mapped.both_see(0, OURS, mapped.size)
        assert mapped.memory.read(mapped.size, PAGE) == bytes(PAGE)
        fixed = 2
        there = mapped.map()
        moved = call(
            "mremap", mapped.memory.address, longer, mapped.size, maymove | fixed, there.address
        )
        assert moved == there.address
        mapped.memory.size = 0  # it is at the other one's address now
        mapped.memory = there
        assert mapped.both_see(0, OURS, mapped.size)
        there.write(PAGE, bytes([THEIRS]) * PAGE)
        assert mapped.both_see(PAGE, THEIRS)
        mapped.punch_hole(PAGE)
        assert mapped.both_see(PAGE, 0)
    finally:
        blocker.close()


@rule("gm.mmap.mprotect")
@pytest.mark.parametrize(
    ("protection", "read", "write"),
    [
        (PROT_NONE, "SIGSEGV", "SIGSEGV"),
        (PROT_READ, "", "SIGSEGV"),
        (PROT_READ | PROT_WRITE, "", ""),
    ],
    ids=["none", "read", "write"],
)
def test_protected(mapped: MappedGuest, protection: int, read: str, write: str) -> None:
    """mprotect(2) limits the host's accesses and not the guest's."""
    call("mprotect", mapped.memory.address, mapped.size, protection)
    assert signal_of(lambda: mapped.memory.read(0, 1)) == read
    assert signal_of(lambda: mapped.memory.write(0, bytes([OURS]))) == write
    mapped.guest.fill(GPA, THEIRS, PAGE)
    call("mprotect", mapped.memory.address, mapped.size, PROT_READ | PROT_WRITE)
    assert mapped.both_see(0, THEIRS)


@rule("gm.mmap.fork")
def test_forked(mapped: MappedGuest) -> None:
    """A forked process has the same pages: it sees the guest's writes, and the guest sees its own.

    MADV_DONTFORK takes the mapping from it.
    """

    def child() -> bytes:
        mapped.memory.write(PAGE, bytes([THEIRS]) * PAGE)
        return mapped.memory.read(0, 2 * PAGE)

    assert in_child(child) == bytes([OURS]) * PAGE + bytes([THEIRS]) * PAGE
    assert mapped.both_see(PAGE, THEIRS)
    assert signal_of(lambda: mapped.memory.read(0, 1)) == ""
    assert mapped.memory.advise(MADV["DONTFORK"]) == "ok"
    assert signal_of(lambda: mapped.memory.read(0, 1)) == "SIGSEGV"
    assert mapped.both_see(0, OURS)


@rule("gm.mmap.mlock")
def test_locked(mapped: MappedGuest) -> None:
    """A hole takes the pages of a locked mapping too; MADV_DONTNEED and MADV_REMOVE are EINVAL."""
    call("mlock", mapped.memory.address, mapped.size)
    for name in ("DONTNEED", "REMOVE"):
        assert mapped.memory.advise(MADV[name]) == "EINVAL", name
    assert mapped.both_see(0, OURS, mapped.size)
    mapped.punch_hole(PAGE)
    assert mapped.both_see(PAGE, 0)
    mapped.guest.fill(GPA + PAGE, THEIRS, PAGE)
    assert mapped.both_see(PAGE, THEIRS)
    call("munlock", mapped.memory.address, mapped.size)
    assert mapped.memory.advise(MADV["DONTNEED"]) == "ok"
    assert mapped.both_see(PAGE, THEIRS)


@rule("gm.mmap.userfaultfd")
@pytest.mark.parametrize("mode", [MISSING, MINOR], ids=["missing", "minor"])
def test_userfaultfd(mapped: MappedGuest, mode: int) -> None:
    """UFFDIO_REGISTER of a mapping is EINVAL; the twin is a mapping of an ordinary memfd."""
    memfd = os.memfd_create("other")
    try:
        os.ftruncate(memfd, mapped.size)
        with Mapping(memfd, mapped.size) as other:
            assert register(other.address, mapped.size, mode) == "ok"
        assert register(mapped.memory.address, mapped.size, mode) == "EINVAL"
    finally:
        os.close(memfd)
    assert mapped.both_see(0, OURS, mapped.size)


# -- pages in use ----------------------------------------------------------------------------------

#: What a disk has.
DISK = 0x3C


@rule("gm.mmap.pinned.hole")
@pytest.mark.parametrize("use", READERS)
def test_a_hole_in_pages_that_are_being_read(mapped: MappedGuest, use: str) -> None:
    """A hole gives guest and host new pages at once; who reads gets the old ones' content."""
    with READERS[use](mapped.memory.address, 2 * PAGE) as used:
        mapped.punch_hole(PAGE)
        assert mapped.both_see(PAGE, 0)
        mapped.guest.fill(GPA + PAGE, THEIRS, PAGE)
        mapped.guest.fill(GPA, THEIRS, PAGE)
        assert mapped.both_see(0, THEIRS, 2 * PAGE)
        # Page 0 is the file's, and is read as it is at the end; page 1 is the reader's alone.
        assert used.content() == bytes([THEIRS]) * PAGE + bytes([OURS]) * PAGE
    assert mapped.both_see(0, THEIRS, 2 * PAGE)
    assert mapped.both_see(2 * PAGE, OURS)


@rule("gm.mmap.pinned.direct-read")
def test_a_hole_in_pages_that_a_disk_writes(mapped: MappedGuest) -> None:
    """The disk's data goes to the page that the hole took; the twin is the page beside it."""
    data = bytes([DISK]) * 2 * PAGE
    with in_a_direct_read(mapped.memory.address, 2 * PAGE, data) as transfer:
        mapped.punch_hole(PAGE)
        assert mapped.both_see(0, OURS)
        assert mapped.both_see(PAGE, 0)
        transfer.end()
        assert mapped.both_see(0, DISK)
        assert mapped.both_see(PAGE, 0)
    mapped.guest.fill(GPA, THEIRS, 2 * PAGE)
    assert mapped.both_see(0, THEIRS, 2 * PAGE)
    assert mapped.both_see(2 * PAGE, OURS)


@rule("gm.mmap.pinned.unbind")
@pytest.mark.parametrize("how", ["slot", "file"])
@pytest.mark.parametrize("use", ["vmsplice", "direct-write"])
def test_unbinding_pages_that_are_being_read(gm_vm: Vm, kvm: Kvm, how: str, use: str) -> None:
    """The slot is deleted, the file closed: the pages live until they have been read."""
    with ExitStack() as stack:
        mapped = MappedGuest(stack, gm_vm, kvm)
        mapped.guest.fill(GPA, OURS, mapped.size)
        with READERS[use](mapped.memory.address, mapped.size) as used:
            mapped.unbind()
            if how == "file":
                close_file(mapped)
                with GuestMemfd(gm_vm, BIG) as other:  # takes pages that were freed
                    other.allocate(0, BIG)
                    assert used.content() == bytes([OURS]) * mapped.size
                return
            assert used.content() == bytes([OURS]) * mapped.size
        bind_again(mapped)
        assert mapped.both_see(0, OURS, mapped.size)


@rule("gm.mmap.pinned.unbind")
@pytest.mark.parametrize("how", ["slot", "file"])
def test_unbinding_pages_that_a_disk_writes(gm_vm: Vm, kvm: Kvm, how: str) -> None:
    """The disk's data is in the file for the next slot; with a closed file it is nowhere."""
    with ExitStack() as stack:
        mapped = MappedGuest(stack, gm_vm, kvm)
        mapped.guest.fill(GPA, OURS, mapped.size)
        data = bytes([DISK]) * mapped.size
        with in_a_direct_read(mapped.memory.address, mapped.size, data) as transfer:
            mapped.unbind()
            if how == "file":
                close_file(mapped)
                with (
                    GuestMemfd(gm_vm, BIG, MMAP | INIT_SHARED) as other,
                    Mapping(other.fileno(), BIG) as memory,
                ):
                    other.allocate(0, BIG)
                    transfer.end()
                    assert memory.read(0, BIG) == bytes(BIG)
                return
            transfer.end()
        bind_again(mapped)
        assert mapped.both_see(0, DISK, mapped.size)


def close_file(mapped: MappedGuest) -> None:
    """Close the file and its mappings, one of which has the pages in use."""
    mapped.memory.close()
    mapped.slot_memory.close()
    mapped.file.close()


def bind_again(mapped: MappedGuest) -> None:
    """Make the slot again."""
    mapped.slot = guest_memfd.set_user_memory_region2(
        mapped.vm, 1, GPA, mapped.size, mapped.slot_memory, mapped.file, OFFSET
    )


@rule("gm.mmap.pinned.io_uring", "gm.mmap.pinned.memory")
@pytest.mark.parametrize("pin", PINS)
def test_a_hole_in_pinned_pages(gm_vm: Vm, kvm: Kvm, pin: str) -> None:
    """A hole gives guest and host new pages at once; the old ones are freed when the pin ends."""
    memory = Unevictable()
    with ExitStack() as stack:
        mapped = MappedGuest(stack, gm_vm, kvm, pages=BIG // PAGE)
        mapped.guest.touch(GPA, PAGE, BIG // PAGE, byte=OURS)
        with PINS[pin](mapped.memory.address, BIG):
            mapped.punch_hole(0, BIG)
            assert memory.is_about(BIG), "the old pages are pinned"
            assert mapped.guest.load(GPA, 8) == 0
            mapped.guest.touch(GPA, PAGE, BIG // PAGE, byte=THEIRS)
            assert mapped.memory.read(BIG - PAGE, 1) == bytes([THEIRS])
            assert memory.is_about(2 * BIG)
        assert memory.is_about(BIG), "unpinned"
        assert mapped.guest.load(GPA + BIG - PAGE, 1) == THEIRS
    assert memory.is_about(0)


@rule("gm.mmap.process_vm")
def test_read_and_written_by_another_process(mapped: MappedGuest) -> None:
    """process_vm_readv(2) and process_vm_writev(2) of another process reach the guest's pages."""
    parent, buffer = os.getpid(), k.ffi.new(f"char[{2 * PAGE}]")
    here = vector_of(address_of(buffer), 2 * PAGE)
    there = vector_of(mapped.memory.address, 2 * PAGE)

    def transfer(name: str) -> bytes:
        k.ffi.buffer(buffer)[:] = bytes([THEIRS]) * 2 * PAGE
        done = call(name, parent, address_of(here), 1, address_of(there), 1, 0)
        assert done == 2 * PAGE
        return bytes(k.ffi.buffer(buffer))

    mapped.punch_hole(PAGE)
    expected = bytes([OURS]) * PAGE + bytes(PAGE)
    assert in_child(lambda: transfer("process_vm_readv")) == expected
    in_child(lambda: transfer("process_vm_writev"))
    assert mapped.both_see(0, THEIRS, 2 * PAGE)
    assert mapped.both_see(2 * PAGE, OURS)


@rule("gm.mmap.process_vm.race")
def test_read_all_the_time_by_another_process(mapped: MappedGuest) -> None:
    """Another process reads while the guest writes and holes take pages: what was there, or zeros.

    A page that was freed and has other content would show here.
    """
    there, turns = bytes(range(0xA0, 0xB0)), 0
    mapped.guest.fill(GPA, there[0], mapped.size)
    with read_all_the_time(mapped.memory.address, mapped.size, b"\0" + there) as reads:
        for turn in rounds(300, until=lambda: reads.whole > 0):
            byte = there[turn % 16]
            mapped.guest.fill(GPA, byte, mapped.size)
            assert mapped.both_see(0, byte, mapped.size)
            mapped.punch_hole(PAGE, mapped.size - PAGE)
            assert mapped.both_see(PAGE, 0, mapped.size - PAGE)
            turns = turn + 1
        assert (reads.part, reads.refused) == (0, 0)
    assert turns >= ROUNDS
    assert mapped.both_see(0, byte)


# -- poisoned pages --------------------------------------------------------------------------------


def poisoned(mapped: MappedGuest, at: int) -> str:
    """The signal that ends a process which poisons the page at `at`, as it is the first to use it.

    A process of its own: the kernel sends SIGBUS to the one that asks.
    """

    def poison() -> None:
        with Mapping(mapped.file.fileno(), mapped.size, OFFSET) as own:
            own.read(at, 1)
            said = own.advise(MADV["HWPOISON"], at, PAGE)
            assert said == "ok", said
            own.read(at, 1)

    return signal_of(poison)


@rule("gm.poison.host", "gm.poison.guest", "gm.poison.hole")
def test_a_poisoned_page(mapped: MappedGuest) -> None:
    """A poisoned page is SIGBUS for the host, and for the guest EHWPOISON with a MEMORY_FAULT exit.

    Its neighbours stay; a hole in its place ends it.
    """
    require_scripts_vm("a page of the machine is poisoned")
    at = 3 * PAGE
    assert poisoned(mapped, at) == "SIGBUS"
    assert signal_of(lambda: mapped.memory.read(at, 1)) == "SIGBUS"
    for enter in (lambda: mapped.guest.load(GPA + at + 8, 8), mapped.guest.resume):
        with pytest.raises(GuestExit) as stopped:
            enter()
        fault = stopped.value.exit
        assert isinstance(fault, MemoryFaultExit)
        assert (fault.gpa, fault.size, fault.private) == (GPA + at, PAGE, False)
        assert fault.errno == gm.EHWPOISON
        if mapped.vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
            said = answer(lambda: guest_memfd.pre_fault_memory(mapped.guest.vcpu, GPA + at, PAGE))
            assert said == "EHWPOISON"
    mapped.punch_hole(at)
    assert mapped.guest.resume() == 0, "the load that was stopped"
    assert mapped.both_see(at, 0)
    for beside in (at - PAGE, at + PAGE):
        assert mapped.both_see(beside, OURS)
    mapped.guest.fill(GPA + at, THEIRS, PAGE)
    assert mapped.both_see(at, THEIRS)


# -- who pays, and who else has it -----------------------------------------------------------------


def charge(group: Path) -> int:
    return int((group / "memory.current").read_text())


@rule("gm.mmap.charged")
@pytest.mark.parametrize("how", ["touch", "populate"])
def test_pages_that_a_mapping_allocates_are_charged(gm_vm: Vm, kvm: Kvm, how: str) -> None:
    """They are charged to the memory cgroup of the process that touches them, until a hole."""
    with in_cgroup() as group, ExitStack() as stack:
        mapped = MappedGuest(stack, gm_vm, kvm, pages=BIG // PAGE)

        def child() -> tuple[int, int]:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            before = charge(group)
            if how == "touch":
                for at in range(0, BIG, PAGE):
                    mapped.memory.write(at, bytes([OURS]))
            else:
                assert mapped.memory.advise(MADV["POPULATE_WRITE"]) == "ok"
            return before, charge(group)

        before, after = in_child(child)
        assert 0 <= after - before - BIG < 2 * MIB
        assert charge(group) >= BIG, "they outlive the process"
        mapped.guest.touch(GPA, PAGE, BIG // PAGE)
        assert charge(group) >= BIG, "nothing is charged anew to the guest"
        mapped.punch_hole(0, BIG)
        assert eventually(lambda: charge(group) < 2 * MIB)


@rule("gm.mmap.scm_rights")
def test_mapped_by_a_process_that_received_it(mapped: MappedGuest) -> None:
    """A process that receives the file maps it, and has the guest's bytes; a hole is for it too."""
    ours, theirs = socket.socketpair()

    def receive() -> tuple[bytes, bytes]:
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        with Mapping(fds[0], mapped.size, OFFSET) as own:
            before = own.read(0, 2 * PAGE)
            own.write(0, bytes([THEIRS]) * PAGE)
            fallocate(fds[0], HOLE, OFFSET + PAGE, PAGE)
            return before, own.read(0, 2 * PAGE)

    with ours, theirs:
        socket.send_fds(ours, [b"x"], [mapped.file.fileno()])
        before, after = in_child(receive)
    assert before == bytes([OURS]) * 2 * PAGE
    assert after == bytes([THEIRS]) * PAGE + bytes(PAGE)
    assert mapped.both_see(0, THEIRS)
    assert mapped.both_see(PAGE, 0)


@rule("gm.mmap.exec")
def test_mapped_by_a_program_that_inherits_it(mapped: MappedGuest) -> None:
    """A program that inherits the descriptor maps the file: it and the guest share pages."""
    program = textwrap.dedent(
        """\
        import mmap, os, sys
        fd, size, offset = map(int, sys.argv[1:])
        with mmap.mmap(fd, size, offset=offset) as memory:
            sys.stdout.buffer.write(memory[:8])
            memory[:8] = b"by exec."
        """
    )
    inherited = os.dup(mapped.file.fileno())
    os.set_inheritable(inherited, True)
    try:
        arguments = [str(inherited), str(mapped.size), str(OFFSET)]
        done = subprocess.run(
            [sys.executable, "-S", "-c", program, *arguments],
            pass_fds=[inherited],
            stdout=subprocess.PIPE,
            check=True,
        )
    finally:
        os.close(inherited)
    assert done.stdout == bytes([OURS]) * 8
    assert mapped.guest.read(GPA, 8) == b"by exec."
    assert mapped.memory.read(0, 9) == b"by exec." + bytes([OURS])
