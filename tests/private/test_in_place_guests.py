"""Conversion in place, with guests: content, mappings of guest and host, and what is precise."""

from __future__ import annotations

import errno
import faulthandler
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from kvmpriv import HostMemory, Kvm, libc
from kvmpriv.cdefs import kvm as k
from kvmpriv.exits import ExitReason, HypercallExit, IoExit, MmioExit
from kvmpriv.guest.puppet import GuestExit, Puppet, PuppetCpu
from kvmpriv.private import ConversionError, serve_conversion
from kvmpriv.private.guest_memfd import pre_fault_memory

from .support.accounting import BIG, Unevictable
from .support.in_place import (
    GPA,
    OFFSET,
    SIZE,
    FileRig,
    convert,
    dies_of_a_load,
    host_can,
    must_convert,
    states,
)
from .support.pins import READERS, USES, a_disk, in_a_pipe
from .support.processes import in_child
from .support.rig import LARGE, MakeRig, only
from .support.rules import rule
from .support.syscalls import GIB, PAGE, address_of, answer, call, errno_of, vector_of

pytestmark = pytest.mark.usefixtures("no_leak")

PAGES = SIZE // PAGE
in_place = only("guest_memfd_in_place")


@pytest.fixture
def one(make_rig: MakeRig) -> FileRig:
    """A guest with one slot of one file, all of it shared."""
    return make_rig(FileRig)


# -- content ---------------------------------------------------------------------------------------


@rule("gip.content.shared", "gip.content.to-private", "gip.content.to-shared")
@in_place
def test_content_in_each_direction(one: FileRig) -> None:
    """The page stays: after a conversion guest and host find in it what was there before.

    KVM's own VM type encrypts nothing.  Shared, both see each write of the other.
    """
    one.shared.write(0, b"by the host!")
    assert one.guest.read(GPA, 12) == b"by the host!"
    one.guest.write(GPA + 12, b" and the guest")
    assert one.shared.read(0, 26) == b"by the host! and the guest"
    one.to(0, private=True)
    assert one.guest.read(GPA, 26) == b"by the host! and the guest"
    one.guest.write(GPA, b"private")
    assert not host_can(one.shared, 0)
    one.to(0, private=False)
    assert one.shared.read(0, 26) == b"privatehost! and the guest"
    one.shared.write(0, b"by the ")
    assert one.guest.read(GPA, 12) == b"by the host!"
    assert one.guest.exits == []


@rule("gip.content.fresh")
@in_place
def test_fresh_pages_are_zero(one: FileRig) -> None:
    """A page that nobody has touched is zero, whoever touches it first, and in whichever state."""
    with HostMemory(4 * BIG) as secrets:  # something to be found in the host's free memory
        secrets.write(0, b"\xa5" * secrets.size)
    half = SIZE // 2
    one.to(0, half, private=True)
    assert one.guest.span(GPA, 0, half) == half
    assert one.shared.read(half, half // 2) == bytes(half // 2)
    assert one.guest.span(GPA + half, 0, half) == half
    one.guest.fill(GPA, 0x22, SIZE)
    one.one.punch_hole(OFFSET, SIZE)
    assert one.guest.span(GPA, 0, SIZE) == SIZE
    one.to(0, half, private=False)
    assert one.shared.read(0, SIZE) == bytes(SIZE)


@rule("gip.content.fresh")
@in_place
@pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])
def test_a_hole_alone_unmaps(one: FileRig, private: bool) -> None:
    """A hole takes pages from the guest that are nowhere else: userspace_addr is other memory."""
    file, gpa = one.file(PAGE), 64 * GIB
    one.bind_shared(gpa, PAGE, file, memory=one.memory(PAGE))
    must_convert(file, 0, PAGE, private=private)
    one.guest.fill(gpa, 0x22, PAGE)
    file.punch_hole(0, PAGE)
    assert one.guest.span(gpa, 0, PAGE) == PAGE


@rule("gip.content.layout")
@in_place
def test_each_page_has_its_place(one: FileRig) -> None:
    """Single pages of either kind, written by guest and host in turn, far from each other."""
    for page in range(PAGES):
        one.guest.store(GPA + page * PAGE, 8, 0x1000 + page)
    private = set(range(0, PAGES, 3))
    for page in private:
        one.to(page * PAGE, private=True)
    for page in range(PAGES):
        if page not in private:
            one.shared.write(page * PAGE, (0x2000 + page).to_bytes(8, "little"))
    assert states(one.shared) == [page in private for page in range(PAGES)]
    for page in range(PAGES):
        expected = (0x1000 if page in private else 0x2000) + page
        assert one.guest.load(GPA + page * PAGE, 8) == expected, page
    one.to(0, SIZE, private=False)
    for page in range(PAGES):
        expected = (0x1000 if page in private else 0x2000) + page
        assert int.from_bytes(one.shared.read(page * PAGE, 8), "little") == expected, page


@rule("gip.content.before-allocation")
@in_place
@pytest.mark.parametrize("private", [True, False], ids=["private", "shared"])
def test_converted_before_allocation(one: FileRig, private: bool) -> None:
    """A conversion allocates nothing; the first touch does."""
    memory = Unevictable()
    file = one.file(BIG)
    one.bind_shared(64 * GIB, BIG, file)
    for at in range(0, BIG, PAGE):
        must_convert(file, at, PAGE, private=True)
    for kind in (True, False, private):
        must_convert(file, 0, BIG, private=kind)
    assert memory.is_about(0)
    one.guest.touch(64 * GIB, PAGE, BIG // PAGE, byte=0x5A)
    assert memory.is_about(BIG)
    with one.abi.create_memory(file, 0, BIG) as seen:
        assert host_can(seen, 0) != private
    file.punch_hole(0, BIG)
    assert memory.is_about(0)


@rule("gip.memory.once")
@in_place
def test_one_page_in_either_state(one: FileRig) -> None:
    """A guest that converts everything to and fro, and touches it, has each page once."""
    memory = Unevictable()
    file, gpa = one.file(BIG), 64 * GIB
    slot = one.bind_shared(gpa, BIG, file, memory=one.abi.create_memory(file, 0, BIG))
    for turn in range(3):
        for private in (True, False):
            slot.convert(private=private)
            one.guest.touch(gpa, PAGE, BIG // PAGE, byte=turn)
            assert memory.is_about(BIG)
    assert slot.memory is not None
    assert slot.memory.read(0, 1) == b"\2"
    slot.delete()
    slot.memory.close()
    file.close()
    assert memory.is_about(0)


# -- what the host can't do ------------------------------------------------------------------------


@rule("gip.host.sigbus", "gip.host.mapping-stays")
@in_place
def test_a_load_of_a_private_page(one: FileRig) -> None:
    """SIGBUS, for a store as well; the mapping stays, and works again when the page is shared."""
    one.guest.fill(GPA, 0x33, SIZE)
    view = one.shared.view()
    assert view[PAGE] == 0x33, "mapped before"

    def store() -> None:
        view[PAGE] = 1

    from .support.in_place import signal_of

    one.to(PAGE, private=True)
    assert dies_of_a_load(one.shared, PAGE)
    assert signal_of(store) == 7
    assert view[0] == view[2 * PAGE] == 0x33, "the twins beside it"
    one.to(PAGE, private=False)
    assert not dies_of_a_load(one.shared, PAGE)
    assert signal_of(store) == 0
    assert view[PAGE] == 1, "MAP_SHARED: what the child has stored"
    view.release()


def _by_write(address: int) -> None:
    fd = os.memfd_create("copy")
    try:
        call("write", fd, address, 8)
    finally:
        os.close(fd)


def _by_read(address: int) -> None:
    fd = os.memfd_create("copy")
    try:
        os.pwrite(fd, b"by read", 0)
        call("pread64", fd, address, 8, 0)
    finally:
        os.close(fd)


def _by_vmsplice(address: int) -> None:
    with in_a_pipe(address):
        pass


def _by_process_vm(name: str, address: int) -> None:
    buffer = k.ffi.new("char[8]")
    ours, theirs = vector_of(address_of(buffer), 8), vector_of(address, 8)
    call(name, os.getpid(), address_of(ours), 1, address_of(theirs), 1, 0)


def _by_direct(name: str, address: int) -> None:
    with a_disk() as disk:
        call(name, disk.fd, address, PAGE, 0)


def _by_proc_mem(address: int) -> None:
    with Path("/proc/self/mem").open("r+b", buffering=0) as mem:
        os.pread(mem.fileno(), 8, address)


#: Ways of the kernel to a page of this process, and the errno for a private one.
WAYS = {
    "write": (_by_write, "EFAULT"),
    "read": (_by_read, "EFAULT"),
    "vmsplice": (_by_vmsplice, "EFAULT"),
    "process_vm_readv": (lambda address: _by_process_vm("process_vm_readv", address), "EFAULT"),
    "process_vm_writev": (lambda address: _by_process_vm("process_vm_writev", address), "EFAULT"),
    "direct-write": (lambda address: _by_direct("pwrite64", address), "EFAULT"),
    "direct-read": (lambda address: _by_direct("pread64", address), "EFAULT"),
    "proc-mem": (_by_proc_mem, "EIO"),
}


@rule("gip.host.kernel")
@in_place
@pytest.mark.parametrize("way", WAYS)
def test_system_calls_on_a_private_page(one: FileRig, way: str) -> None:
    """The kernel reaches a private page by no system call; its shared twins it does."""
    access, expected = WAYS[way]
    one.guest.fill(GPA, 0x44, SIZE)
    one.to(PAGE, private=True)
    assert answer(lambda: access(one.address(PAGE))) == expected
    assert answer(lambda: access(one.address(2 * PAGE))) == "ok"
    assert one.guest.span(GPA + PAGE, 0x44, PAGE) == PAGE, "untouched"
    one.to(PAGE, private=False)
    assert answer(lambda: access(one.address(PAGE))) == "ok", "the twin in time"


@rule("gip.host.processes")
@in_place
def test_mappings_of_other_processes(one: FileRig) -> None:
    """Also a mapping in another process loses its page, before the conversion returns."""
    one.guest.fill(GPA, 0x55, SIZE)
    to_child, to_parent = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # this process is to end by a signal
        status = 3
        try:
            with one.abi.create_memory(one.one, OFFSET, SIZE) as own:
                seen = own.view()
                status = int(seen[PAGE] != 0x55 or one.shared.view()[PAGE] != 0x55)
                os.write(to_parent[1], b"mapped")
                os.read(to_child[0], 1)
                both = [answer(lambda one=one: one.read(PAGE, 1)) for one in (own, one.shared)]
                status |= 2 * (both != ["EFAULT", "EFAULT"])
                os.write(to_parent[1], b"seen")
                seen[PAGE]  # SIGBUS
                del seen
        finally:
            os._exit(status)
    try:
        assert os.read(to_parent[0], 6) == b"mapped"
        assert one.answer(PAGE, private=True) == ("ok", None)
        os.write(to_child[1], b"x")
        assert os.read(to_parent[0], 4) == b"seen"
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), os.WEXITSTATUS(status)
        assert os.WTERMSIG(status) == 7
    finally:
        for fd in (*to_child, *to_parent):
            os.close(fd)
    assert one.guest.span(GPA + PAGE, 0x55, PAGE) == PAGE


# -- pages in use ----------------------------------------------------------------------------------


@rule("gip.busy", "gip.busy.offset", "gip.busy.unchanged", "gip.busy.again")
@in_place
@pytest.mark.parametrize("use", USES)
def test_a_page_in_use(one: FileRig, use: str) -> None:
    """EAGAIN with the page's offset, and nothing has changed; afterwards the same call succeeds."""
    one.guest.fill(GPA, 0x66, SIZE)
    one.to(PAGE, private=True)
    before = states(one.shared)
    with USES[use](one.address(5 * PAGE), PAGE):
        one.warm()  # a fork, which one of the uses needs, unmaps what else the guest has
        mapped = one.mapped_pages()
        for at, size in ((0, SIZE), (0, 6 * PAGE), (5 * PAGE, PAGE), (3 * PAGE, 10 * PAGE)):
            assert one.answer(at, size, private=True) == ("EAGAIN", 5 * PAGE)
            assert states(one.shared) == before
            assert one.mapped_pages() == mapped, "no mapping of the guest was lost"
        # Beside it, and in the other direction, nothing is in the way.
        assert one.answer(0, 5 * PAGE, private=True) == ("ok", None)
        assert one.answer(6 * PAGE, SIZE - 6 * PAGE, private=True) == ("ok", None)
        assert one.answer(0, SIZE, private=False) == ("ok", None)
        assert one.answer(0, SIZE, private=True) == ("EAGAIN", 5 * PAGE)
        assert one.guest.span(GPA, 0x66, SIZE) == SIZE
    assert one.answer(0, SIZE, private=True) == ("ok", None)
    assert states(one.shared) == [True] * PAGES
    assert one.guest.span(GPA, 0x66, SIZE) == SIZE


@rule("gip.busy.first")
@in_place
def test_the_first_of_several_pages_in_use(one: FileRig) -> None:
    """Of several pages in use the first one's offset is reported, as they are let go of in turn."""
    one.guest.fill(GPA, 0x66, SIZE)
    with in_a_pipe(one.address(9 * PAGE)):
        with in_a_pipe(one.address(3 * PAGE), 2 * PAGE) as pipe:
            assert one.answer(0, SIZE, private=True) == ("EAGAIN", 3 * PAGE)
            assert one.answer(4 * PAGE, SIZE - 4 * PAGE, private=True) == ("EAGAIN", 4 * PAGE)
            pipe.read(PAGE)  # which lets go of the first
            assert one.answer(0, SIZE, private=True) == ("EAGAIN", 4 * PAGE)
        assert one.answer(0, SIZE, private=True) == ("EAGAIN", 9 * PAGE)
    assert one.answer(0, SIZE, private=True) == ("ok", None)


@rule("gip.busy.content")
@in_place
@pytest.mark.parametrize("use", READERS)
def test_what_is_in_use_stays_readable(one: FileRig, use: str) -> None:
    """Who reads gets what the page has, though a conversion of it was tried meanwhile."""
    one.guest.fill(GPA, 0x66, 2 * PAGE)
    with READERS[use](one.address(0), PAGE) as used:
        assert one.answer(0, private=True) == ("EAGAIN", 0)
        assert used.content() == b"\x66" * PAGE
        assert one.answer(0, private=True) == ("ok", None)


@rule("gip.busy.hole")
@in_place
@pytest.mark.parametrize("use", USES)
def test_a_page_in_use_that_a_hole_took(one: FileRig, use: str) -> None:
    """The page that is in use is the file's no more: the range has a new one, and is converted."""
    one.guest.fill(GPA, 0x66, 2 * PAGE)
    with USES[use](one.address(0), PAGE):
        assert one.answer(0, private=True) == ("EAGAIN", 0)
        one.one.punch_hole(OFFSET, PAGE)
        assert one.answer(0, private=True) == ("ok", None)
        assert one.guest.span(GPA, 0, PAGE) == PAGE
    assert one.guest.span(GPA, 0, PAGE) == PAGE, "whatever a disk has written"


@rule("gip.mapped")
@in_place
@pytest.mark.parametrize("lock", [False, True], ids=["mapped", "mlock"])
def test_pages_that_are_mapped(one: FileRig, lock: bool) -> None:
    """That the host has pages mapped, or locked, is not in the way: the mappings are removed."""
    one.shared.write(0, b"\x77" * SIZE)
    if lock:
        assert libc.syscall(149, one.address(), SIZE) == 0  # mlock
    with one.abi.create_memory(one.one, OFFSET, SIZE) as again:
        assert bytes(again.view()[::PAGE]) == b"\x77" * PAGES
        assert one.answer(0, SIZE, private=True) == ("ok", None)
        assert dies_of_a_load(again, 0)
        assert dies_of_a_load(one.shared, SIZE - PAGE)
        assert one.answer(0, SIZE, private=False) == ("ok", None)
        assert bytes(again.view()[::PAGE]) == b"\x77" * PAGES
    if lock:
        assert libc.syscall(150, one.address(), SIZE) == 0  # munlock


@rule("gip.mapped")
@in_place
def test_a_page_that_another_cpu_has_allocated(one: FileRig) -> None:
    """The CPU that allocated it keeps a reference for a while, which is not in the way."""
    cpus = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(cpus)})
        one.one.allocate(OFFSET, PAGE)
        os.sched_setaffinity(0, {min(cpus)})
        assert one.answer(0, private=True) == ("ok", None)
    finally:
        os.sched_setaffinity(0, cpus)


@rule("gip.binding.stops")
@in_place
def test_how_far_a_conversion_came(one: FileRig) -> None:
    """Two slots: the first one's part is converted, and the page in the second is named."""
    file = one.file(8 * PAGE)
    memory = one.stack.enter_context(one.abi.create_memory(file, 0, 8 * PAGE))
    one.bind_shared(GPA + SIZE, 8 * PAGE, file, memory=memory)
    memory.write(3 * PAGE, b"x")
    with (
        in_a_pipe(memory.userspace_addr + 3 * PAGE),
        pytest.raises(ConversionError, match="in use") as stopped,
    ):
        one.abi.convert(one.vm, GPA + PAGE, SIZE + 7 * PAGE, private=True)
    error = stopped.value
    assert (error.errno, error.offset) == (errno.EAGAIN, 3 * PAGE)
    assert (error.gpa, error.converted) == (GPA + SIZE + 3 * PAGE, SIZE - PAGE)
    assert states(one.shared) == [page > 0 for page in range(PAGES)]
    assert states(memory) == [False] * 8
    one.abi.convert(one.vm, GPA + PAGE, SIZE + 7 * PAGE, private=True)
    assert states(memory) == [True] * 8


# -- the guest's mappings --------------------------------------------------------------------------


@rule("gip.precise.neighbours", "gip.precise.other-kind", "gip.precise.again")
@in_place
def test_only_what_changes_is_unmapped(one: FileRig) -> None:
    """KVM's counters: pages beside the range, and those that are so already, stay mapped."""
    one.to(0, SIZE // 2, private=True)  # pages 0 to 31 are private
    one.warm()
    whole = one.mapped_pages()
    for at, size, private, lost in (
        (0, SIZE // 2, True, 0),  # so already
        (SIZE // 2, SIZE // 2, False, 0),
        (0, SIZE, False, 32),  # half of it is so already
        (0, SIZE, False, 0),
        (3 * PAGE, PAGE, True, 1),
        (0, 8 * PAGE, True, 7),
        (0, SIZE, True, 56),
        (63 * PAGE, PAGE, False, 1),
        (0, PAGE, False, 1),
    ):
        one.warm()
        assert one.mapped_pages() == whole
        one.to(at, size, private=private)
        assert one.mapped_pages() == whole - lost, (at // PAGE, size // PAGE, private)
    one.warm()
    one.to(8 * PAGE, 8 * PAGE, private=False)
    faults = one.faults()
    for page in (*range(8), *range(16, PAGES)):
        one.guest.load(GPA + page * PAGE, 8)
    assert one.faults() == faults, "no fault beside the range"
    for page in range(8, 16):
        one.guest.load(GPA + page * PAGE, 8)
    assert one.faults() == faults + 8, "one for each page in it"


@rule("gip.precise.host")
@in_place
def test_the_hosts_mappings_beside_the_range(one: FileRig) -> None:
    """The host's page tables lose the pages that become private, and no others."""
    one.shared.write(0, b"x" * SIZE)

    def present() -> list[bool]:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            entries = os.pread(pagemap.fileno(), 8 * PAGES, one.address() // PAGE * 8)
        return [entry >> 63 == 1 for (entry,) in struct.iter_unpack("<Q", entries)]

    for page in range(PAGES):  # by loads, which map
        assert one.shared.view()[page * PAGE] == ord("x")
    assert present() == [True] * PAGES
    one.to(4 * PAGE, 4 * PAGE, private=True)
    assert present() == [not 4 <= page < 8 for page in range(PAGES)]
    one.to(2 * PAGE, 8 * PAGE, private=False)  # four of them are shared, and stay mapped
    assert present() == [not 4 <= page < 8 for page in range(PAGES)]


@rule("gip.slots.one-call")
@in_place
def test_a_range_of_two_slots(one: FileRig) -> None:
    """One call for the parts of two slots: both lose just its pages."""
    other = 64 * GIB
    file = one.file(2 * SIZE)
    first = one.bind_shared(other, SIZE, file)
    one.bind_shared(other + GIB, SIZE, file, SIZE)
    for gpa in (other, other + GIB):
        one.guest.touch(gpa, PAGE, PAGES, byte=0x31)
    one.warm()
    mapped = one.mapped_pages()
    assert convert(file, SIZE - 2 * PAGE, 5 * PAGE) == ("ok", None)
    assert one.mapped_pages() == mapped - 5
    assert one.guest.load(other + SIZE - PAGE, 1) == one.guest.load(other + GIB, 1) == 0x31
    # Deleted and made again elsewhere: the file has kept the state.
    first.delete()
    one.bind_shared(other + 2 * GIB, SIZE, file)
    with one.abi.create_memory(file, 0, 2 * SIZE) as memory:
        private = [not host_can(memory, page * PAGE) for page in range(2 * PAGES)]
    assert private == [PAGES - 2 <= page < PAGES + 3 for page in range(2 * PAGES)]
    assert one.guest.load(other + 2 * GIB + SIZE - PAGE, 1) == 0x31


@rule("gip.large-ranges.guest")
@in_place
def test_two_megabytes(make_rig: MakeRig) -> None:
    """2 MiB and a page on both sides: each conversion of a part is seen page by page."""
    size = LARGE + 2 * PAGE
    one = make_rig(FileRig, gpa=GIB - PAGE, offset=LARGE - PAGE, size=size)
    one.guest.fill(one.gpa, 0x21, size)
    expected = [False] * (size // PAGE)
    for first, count, private in (
        (1, 512, True),
        (257, 1, False),
        (0, 2, True),
        (512, 2, False),
        (1, 512, False),
        (0, 514, True),
        (0, 514, False),
    ):
        one.to(first * PAGE, count * PAGE, private=private)
        expected[first : first + count] = [private] * count
        assert states(one.shared) == expected, (first, count, private)
        assert one.guest.span(one.gpa, 0x21, size) == size
    assert one.shared.read(0, size) == b"\x21" * size


# -- pre-faulting ----------------------------------------------------------------------------------


@rule("gip.prefault")
@in_place
def test_pre_faulting(one: FileRig) -> None:
    """KVM_PRE_FAULT_MEMORY maps pages of both kinds from the file; a conversion unmaps them."""
    file, gpa = one.file(SIZE), 64 * GIB
    one.bind_shared(gpa, SIZE, file)
    with one.abi.create_memory(file, 0, SIZE) as memory:
        memory.write(0, b"\x12" * SIZE)
        assert convert(file, 0, SIZE // 2) == ("ok", None)
        one.warm()
        assert pre_fault_memory(one.guest.vcpu, gpa, SIZE) == 0
        mapped, faults = one.mapped_pages(), one.faults()
        assert one.guest.span(gpa, 0x12, SIZE) == SIZE
        assert (one.mapped_pages(), one.faults()) == (mapped, faults)
        assert convert(file, 0, SIZE) == ("ok", None)
        assert one.mapped_pages() == mapped - PAGES // 2
        assert pre_fault_memory(one.guest.vcpu, gpa, SIZE) == 0
        assert one.mapped_pages() == mapped
        assert one.guest.span(gpa, 0x12, SIZE) == SIZE


# -- a guest that asks -----------------------------------------------------------------------------


@rule("gip.guest.asks", "gip.guest.eagain")
@in_place
def test_a_guest_that_converts_while_the_host_pins(one: FileRig) -> None:
    """The guest gets -EAGAIN while a page is in use, and 0 afterwards, as often as it asks."""
    one.vm.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1 << k.KVM_HC_MAP_GPA_RANGE)
    one.guest.serve = lambda cpu, exit_: serve_conversion(one.vm, cpu.vcpu, exit_)

    def ask(*, private: bool) -> int:
        kind = k.KVM_MAP_GPA_RANGE_ENCRYPTED if private else k.KVM_MAP_GPA_RANGE_DECRYPTED
        return one.guest.hypercall(k.KVM_HC_MAP_GPA_RANGE, GPA, PAGES, kind)

    one.guest.fill(GPA, 0x77, SIZE)
    with in_a_pipe(one.address(7 * PAGE)):
        for _ in range(20):
            assert ask(private=True) == -errno.EAGAIN
            assert ask(private=False) == 0
    for _ in range(20):
        assert (ask(private=True), ask(private=False)) == (0, 0)
    assert one.shared.read(0, SIZE) == b"\x77" * SIZE
    assert {type(exit_) for exit_ in one.guest.exits} == {HypercallExit}


@rule("gip.puppet")
@in_place
def test_the_puppet_and_its_slot(make_rig: MakeRig, kvm: Kvm) -> None:
    """What kvmpriv makes of it: memory that follows, and errors where the host looks at it."""
    with make_rig().abi.create_vm(kvm) as vm, Puppet(vm) as guest:
        slot = vm.add_private_memory(GPA, SIZE)
        assert slot.memory is not None
        with pytest.raises(OSError, match="is private") as refused:
            slot.memory.read(0, 8)
        assert refused.value.errno == errno.EFAULT
        guest.write(GPA + 4 * PAGE, b"secret")
        assert slot.memory.find(b"secret") == -1
        guest.convert(GPA + 4 * PAGE, PAGE, private=False)
        assert slot.memory.find(b"secret") == 4 * PAGE
        slot.memory.write(4 * PAGE, b"public")
        guest.convert(GPA + 4 * PAGE, PAGE, private=True)
        assert guest.read(GPA + 4 * PAGE, 6) == b"public"
        assert slot.memory.find(b"public") == -1
        slot.delete()


@rule("gip.child.forks")
@in_place
def test_a_child_has_the_same_state(one: FileRig) -> None:
    """What a child converts, its parent and the parent's guest see."""
    one.guest.write(GPA, b"before")

    def child() -> Any:
        said = convert(one.one, OFFSET, PAGE)
        return said, answer(lambda: one.shared.read(0, 1))

    assert in_child(child) == (("ok", None), "EFAULT")
    assert not host_can(one.shared, 0)
    assert one.guest.read(GPA, 6) == b"before"


# -- KVM's own accesses ----------------------------------------------------------------------------

PORT = 0x42


@rule("gip.emulator.shared", "gip.emulator.private", "gip.emulator.elsewhere")
@in_place
def test_the_emulators_eyes(make_rig: MakeRig) -> None:
    """KVM's emulator reads userspace_addr: the file's mapping, where a private page is none.

    A mapping of something else would be what it reads, though the guest's own access is to the
    file: that is why userspace_addr should be a mapping of the same range.
    """
    one = make_rig(FileRig)
    code = one.gpa
    data = code + PAGE
    # lea data, %rsi; mov $PORT, %dx; outsl; ret
    target = struct.pack("<i", PAGE - 7)
    text = b"\x48\x8d\x35" + target + b"\x66\xba" + bytes([PORT, 0]) + b"\x6f\xc3"
    one.guest.write(code, text)
    one.guest.write(data, b"mine")

    def serve(cpu: PuppetCpu, exit_: Any) -> bool:
        if isinstance(exit_, MmioExit):
            cpu.vcpu.reply(bytes(4))
        return True

    one.guest.serve = serve

    def sent() -> list[Any]:
        one.guest.exits.clear()
        one.guest.run(code)
        return list(one.guest.exits)

    (shown,) = sent()
    assert isinstance(shown, IoExit)
    assert (shown.port, shown.data) == (PORT, b"mine")
    one.to(PAGE, private=True)
    read, shown = sent()
    assert read == MmioExit(ExitReason.MMIO, False, data, 4, b""), "it can't read this RAM"
    assert shown.data == bytes(4), "what the host has answered"
    # The same with memory of the host's own at userspace_addr.
    one.slot.delete()
    with HostMemory(SIZE) as elsewhere:
        elsewhere.write(0, text)
        elsewhere.write(PAGE, b"host")
        slot = one.bind_shared(GPA, SIZE, one.one, OFFSET, memory=elsewhere)
        (shown,) = sent()
        assert shown.data == b"host"
        assert one.guest.read(data, 4) == b"mine"
        one.to(PAGE, private=False)
        (shown,) = sent()
        assert shown.data == b"host", "shared as well: only the guest's own accesses go to the file"
        assert one.guest.read(data, 4) == b"mine"
        slot.delete()


@rule("gip.fault.no-slot", "gip.fault.closed")
@in_place
def test_accesses_without_slot_or_file(one: FileRig) -> None:
    """Without a slot there is no state, so MMIO; a slot that has lost its file is a fault exit."""
    one.to(0, private=True)
    one.guest.write(GPA, b"kept")
    one.slot.delete()
    with pytest.raises(GuestExit) as stopped:
        one.guest.load(GPA, 4)
    assert isinstance(stopped.value.exit, MmioExit)
    one.guest.reset()
    one.bind_shared(GPA, SIZE, one.one, OFFSET, memory=one.shared)
    # KVM has cached that the gfn has no memory, and takes the access for a shared one.
    one.guest.serve = lambda cpu, exit_: serve_conversion(one.vm, cpu.vcpu, exit_)
    assert one.guest.read(GPA, 4) == b"kept"
    one.guest.serve = None
    file = one.abi.create_file(one.vm, 2 * PAGE)
    slots = one.behaviour.slots(one.vm, file, 0)
    where = {"guest_phys_addr": 64 * GIB, "memory_size": 2 * PAGE, "guest_memfd_offset": 0}
    with slots.held(**where):
        must_convert(file, PAGE, PAGE, private=True)
        for gpa in (64 * GIB, 64 * GIB + PAGE):
            one.guest.write(gpa, b"there")
        file.close()
        for gpa in (64 * GIB, 64 * GIB + PAGE):
            with pytest.raises(GuestExit) as stopped:
                one.guest.load(gpa, 4)
            assert one.fault_of(stopped.value) == (gpa, PAGE, False)
            one.guest.reset()
    assert errno_of(errno.EFAULT) == "EFAULT"
