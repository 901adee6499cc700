"""guest_memfd: files, slots, attributes, pre-faulting; what the kernel accepts and refuses."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import threading
import time
from contextlib import nullcontext
from struct import pack, pack_into
from typing import TYPE_CHECKING, Any

import pytest

from kvmpriv import HostMemory, Kvm, libc
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.private.guest_memfd import GuestMemfd

from .support.accounting import BIG, Unevictable
from .support.defects import mainline_defect
from .support.file_operations import mapping, operations
from .support.kernels import answer_to_in_place
from .support.mappings import INIT_SHARED, MMAP, Mapping, flags_of, require_flags, signal_of
from .support.races import CpuTimeError, within_cpu_time
from .support.requirements import missing
from .support.rules import rule
from .support.slot_requests import FILE_OVERLAP, Edge, GuestMemfdSlots
from .support.syscalls import (
    COLLAPSE,
    GIB,
    HOLE,
    INSERT,
    KEEP_SIZE,
    MAP_PRIVATE,
    MAP_SHARED,
    MIB,
    NOWHERE,
    PAGE,
    PROT_READ,
    PROT_WRITE,
    PUNCH_HOLE,
    UNSHARE,
    ZERO,
    address_of,
    answer,
    call,
    errno_of,
    fallocate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmpriv import Vcpu, Vm

pytestmark = pytest.mark.usefixtures("no_leak", "guest_memfd_kvm")

GUEST_MEMFD, LOG, READONLY = gm.KVM_MEM_GUEST_MEMFD, k.KVM_MEM_LOG_DIRTY_PAGES, k.KVM_MEM_READONLY
PRIVATE = gm.KVM_MEMORY_ATTRIBUTE_PRIVATE
UNKNOWN = 1 << 31
TOP = 1 << 64


def create(vm: Vm, size: int, flags: int = 0) -> str:
    """The errno of KVM_CREATE_GUEST_MEMFD; a file that it made is closed."""
    return answer(lambda: GuestMemfd(vm, size, flags).close())


# -- capabilities --------------------------------------------------------------------------------


@rule("gm.cap.kvm", "gm.cap.vm")
def test_capabilities(kvm: Kvm, any_vm: Vm, vm_type: int) -> None:
    """On /dev/kvm a capability reports what is built in, on a VM what this VM supports."""
    assert kvm.check_extension(gm.KVM_CAP_USER_MEMORY2) == 1
    assert any_vm.check_extension(gm.KVM_CAP_USER_MEMORY2) == 1
    assert kvm.check_extension(gm.KVM_CAP_MEMORY_FAULT_INFO) == 1
    for cap in (gm.KVM_CAP_GUEST_MEMFD, gm.KVM_CAP_MEMORY_ATTRIBUTES):
        assert any_vm.check_extension(cap) & ~kvm.check_extension(cap) == 0
    assert any_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES) in (0, PRIVATE)
    if vm_type == gm.KVM_X86_SW_PROTECTED_VM:
        assert any_vm.check_extension(gm.KVM_CAP_GUEST_MEMFD) == 1
        # Where files are converted in place, VMs are not.
        expected = PRIVATE if answer_to_in_place() else 0
        assert any_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES) == expected
    else:
        assert any_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES) == 0


@rule("gm.cap.vm_types")
def test_vm_types(kvm: Kvm) -> None:
    """KVM_CAP_VM_TYPES is a bitmap: listed types can be made, others are EINVAL."""
    types = kvm.check_extension(gm.KVM_CAP_VM_TYPES)
    assert types & 1, "default VMs always exist"
    for number in (*range(2), *range(6, 32), 0xFFFF):
        expected = "ok" if types >> number & 1 else "EINVAL"
        assert answer(lambda n=number: kvm.create_vm(n).close()) == expected, number


@rule("gm.cap.flags")
def test_flags_capability(gm_vm: Vm) -> None:
    """KVM_CAP_GUEST_MEMFD_FLAGS lists the flags; INIT_SHARED is listed where all memory is shared,
    and only there.
    """
    flags = flags_of(gm_vm)
    private = gm_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES) & PRIVATE
    assert flags in (0, MMAP if private else MMAP | INIT_SHARED)


@rule("gm.successor_of.v9")
def test_predecessors(any_vm: Vm) -> None:
    """v9's capability KVM_CAP_PRIVATE_MEM reads 0."""
    assert any_vm.check_extension(224) == 0


# -- making the file -----------------------------------------------------------------------------


@rule("gm.create.size")
def test_size(any_vm: Vm) -> None:
    """A size of 0 or one that is not page aligned is EINVAL."""
    for size in (0, 1, 2, 4, 101, 2048, PAGE - 1, PAGE + 1, NOWHERE, NOWHERE + PAGE, TOP - PAGE):
        assert create(any_vm, size) == "EINVAL", size
    for size in (PAGE, 7 * PAGE, 1 << 40, NOWHERE - PAGE):
        assert create(any_vm, size) == "ok", hex(size)


@rule("gm.create.size.each")
def test_every_size_within_a_page(any_vm: Vm) -> None:
    """Each size from 1 to 4095 is EINVAL."""
    argument = gm.ffi.new("struct kvm_create_guest_memfd *")
    said = []
    for size in range(1, PAGE):
        argument.size = size
        said.append(any_vm.ioctl_errno(gm.KVM_CREATE_GUEST_MEMFD, argument))
    assert {errno_of(number) for number in said} == {"EINVAL"}
    assert len(said) == 4095
    assert create(any_vm, PAGE) == "ok"


@rule("gm.create.flags")
def test_flags(any_vm: Vm) -> None:
    """Each listed flag is accepted, alone and with others; every other flag is EINVAL."""
    known = flags_of(any_vm)
    for flags in (*(1 << bit for bit in range(64)), MMAP | INIT_SHARED, TOP - 1, 0):
        assert create(any_vm, PAGE, flags) == ("EINVAL" if flags & ~known else "ok"), hex(flags)


@rule("gm.create.reserved")
def test_reserved(any_vm: Vm) -> None:
    """The kernel ignores `reserved`."""
    argument = gm.ffi.new("struct kvm_create_guest_memfd *", {"size": PAGE})
    for at in range(6):
        argument.reserved[at] = TOP - 1
    fd = any_vm.ioctl(gm.KVM_CREATE_GUEST_MEMFD, argument)
    try:
        assert os.fstat(fd).st_size == PAGE
    finally:
        os.close(fd)


@rule("gm.create.pointer")
def test_create_bad_pointers(any_vm: Vm) -> None:
    """A struct that can't be read in full is EFAULT."""
    edge = Edge()
    struct = gm.ffi.new("struct kvm_create_guest_memfd *", {"size": PAGE})
    for address in (0, 1, NOWHERE, edge.put(struct, 63)):
        assert errno_of(any_vm.ioctl_errno(gm.KVM_CREATE_GUEST_MEMFD, address)) == "EFAULT"
    os.close(any_vm.ioctl(gm.KVM_CREATE_GUEST_MEMFD, edge.put(struct, 64)))
    edge.close()


@rule("gm.create.order.efault", "gm.create.order.emfile")
def test_order_of_creation(any_vm: Vm) -> None:
    """EFAULT comes before EINVAL of size and flags, and that before EMFILE."""
    edge, most = Edge(), resource.getrlimit(resource.RLIMIT_NOFILE)
    good, unaligned = ((PAGE, 0), (PAGE + 1, 0))
    bad = ((0, 0), unaligned, (NOWHERE, 0), (PAGE, UNKNOWN), (PAGE + 1, UNKNOWN))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, most[1]))
    try:
        full = [create(any_vm, *one) for one in (*bad, good)]
        struct = gm.ffi.new("struct kvm_create_guest_memfd *", unaligned)
        cut, whole = (
            errno_of(any_vm.ioctl_errno(gm.KVM_CREATE_GUEST_MEMFD, edge.put(struct, readable)))
            for readable in (63, 64)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert full == ["EINVAL"] * 5 + ["EMFILE"]
    assert (cut, whole) == ("EFAULT", "EINVAL")
    assert [create(any_vm, *one) for one in (*bad, good)] == ["EINVAL"] * 5 + ["ok"]
    edge.close()


@rule("gm.file.identity", "gm.file.cloexec")
def test_identity(any_vm: Vm) -> None:
    """The file is read-write with O_LARGEFILE, not close-on-exec, and named guest_memfd."""
    argument = gm.ffi.new("struct kvm_create_guest_memfd *", {"size": 3 * PAGE})
    fd = any_vm.ioctl(gm.KVM_CREATE_GUEST_MEMFD, argument)
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == 0
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_APPEND == 0x8002
        assert "[kvm-gmem]" in os.readlink(f"/proc/self/fd/{fd}")
        assert os.fstat(fd).st_size == 3 * PAGE
    finally:
        os.close(fd)


#: The magic numbers of the file systems that such files are in, and the link that /proc then shows:
#: that of anonymous inodes, and in later releases one of their own.
FILE_SYSTEMS = {
    0x474D454D: "/[kvm-gmem] (deleted)",
    0x09041934: "anon_inode:[kvm-gmem]",
}


@rule("gm.file.magic")
def test_magic(gm_file: GuestMemfd) -> None:
    """fstatfs(2) reports GUEST_MEMFD_MAGIC or that of anonymous inodes, and the link agrees."""
    magic = libc.fstatfs_type(gm_file.fileno())
    assert os.readlink(f"/proc/self/fd/{gm_file.fileno()}") == FILE_SYSTEMS[magic]


@rule("gm.file.distinct")
def test_two_files_differ(gm_vm: Vm) -> None:
    """Each call makes a new file."""
    with GuestMemfd(gm_vm, BIG) as one, GuestMemfd(gm_vm, 2 * BIG) as two:
        assert os.fstat(one.fileno()).st_ino != os.fstat(two.fileno()).st_ino
        sizes = [os.fstat(file.fileno()).st_size for file in (one, two)]
        assert sizes == [BIG, 2 * BIG]
        memory = Unevictable()
        fallocate(one, KEEP_SIZE, 0, BIG)
        fallocate(two, HOLE, 0, BIG)
        assert memory.is_about(BIG)


# -- the file's operations -----------------------------------------------------------------------


@operations(
    "gm.file",
    {
        "EINVAL": "read read.empty write write.empty readv writev pread.negative pwrite.negative "
        "lseek.bad_whence splice.from splice.to seals.add seals.get fsync fdatasync",
        "ESPIPE": "pread pwrite preadv pwritev lseek lseek.end lseek.data",
        "ENODEV": "mmap.shared mmap.shared.read mmap.none",
        "EPERM": "epoll",
        "ENXIO": "open open.read",
        "ok": "open.path",
    },
)
def test_operation(gm_file: GuestMemfd, operation: Callable[[int], Any], expected: str) -> None:
    """Each operation has its result, on a file with and without pages."""
    assert answer(lambda: operation(gm_file.fileno())) == expected
    fallocate(gm_file, KEEP_SIZE, 0, 16 * PAGE)
    assert answer(lambda: operation(gm_file.fileno())) == expected


@rule("gm.file.size.fixed")
def test_the_size_is_fixed(gm_file: GuestMemfd) -> None:
    """ftruncate(2) is EINVAL for every size."""
    for size in (0, PAGE, 256 * PAGE, 512 * PAGE, 1, -1):
        assert answer(lambda new=size: os.ftruncate(gm_file.fileno(), new)) == "EINVAL", size
    assert os.fstat(gm_file.fileno()).st_size == 256 * PAGE


@rule("gm.file.fallocate.keep_size", "gm.file.fallocate.modes")
def test_modes(gm_file: GuestMemfd) -> None:
    """fallocate needs KEEP_SIZE, alone or with PUNCH_HOLE; else EOPNOTSUPP."""
    others = [0, PUNCH_HOLE, 4, ZERO, ZERO | KEEP_SIZE, COLLAPSE, INSERT, UNSHARE | KEEP_SIZE]
    for mode in others:
        assert answer(lambda m=mode: fallocate(gm_file, m, 0, PAGE)) == "EOPNOTSUPP", mode
    for mode in (KEEP_SIZE, HOLE):
        assert answer(lambda m=mode: fallocate(gm_file, m, 0, PAGE)) == "ok", mode


@rule("gm.file.fallocate.aligned", "gm.file.hole.aligned")
@pytest.mark.parametrize("mode", [KEEP_SIZE, HOLE], ids=["allocate", "hole"])
def test_fallocate_alignment(gm_file: GuestMemfd, mode: int) -> None:
    """Offset and length must be page aligned, not negative, and the length not 0; else EINVAL."""
    odd = [(0, 1), (1, 1), (0, PAGE - 1), (0, PAGE + 1), (1, PAGE), (PAGE - 1, PAGE)]
    odd += [(1, PAGE - 1), (PAGE // 2, PAGE), (PAGE, PAGE // 2), (300 * PAGE, 1)]
    odd += [(0, 0), (-PAGE, PAGE), (0, -PAGE)]
    for offset, length in odd:
        said = answer(lambda a=offset, b=length: fallocate(gm_file, mode, a, b))
        assert said == "EINVAL", (offset, length)
    assert len(odd) == 13
    assert answer(lambda: fallocate(gm_file, mode, PAGE, PAGE)) == "ok"


@rule("gm.file.fallocate.beyond_size", "gm.file.hole.beyond_size")
def test_beyond_the_end(gm_file: GuestMemfd) -> None:
    """An allocation beyond the end is EINVAL; a hole there succeeds."""
    end = 256 * PAGE
    for offset, length in ((end, PAGE), (end - PAGE, 2 * PAGE), (1 << 40, PAGE), (0, end + PAGE)):
        said = [
            answer(lambda m=mode, a=offset, b=length: fallocate(gm_file, m, a, b))
            for mode in (KEEP_SIZE, HOLE)
        ]
        assert said == ["EINVAL", "ok"], (offset, length)
    assert answer(lambda: fallocate(gm_file, KEEP_SIZE, end - PAGE, PAGE)) == "ok"


@rule("gm.file.fallocate.order")
def test_order_of_fallocate(gm_file: GuestMemfd) -> None:
    """EINVAL of length 0 and negative values, then EOPNOTSUPP of the mode, then EINVAL of
    alignment.
    """
    modes = [0, PUNCH_HOLE, ZERO, ZERO | KEEP_SIZE, COLLAPSE, UNSHARE | KEEP_SIZE, 1 << 30]
    rows = {
        (0, 0): ["EINVAL", "EINVAL"],
        (-PAGE, PAGE): ["EINVAL", "EINVAL"],
        (0, -PAGE): ["EINVAL", "EINVAL"],
        (1, PAGE): ["EOPNOTSUPP", "EINVAL"],
        (0, 1): ["EOPNOTSUPP", "EINVAL"],
        (256 * PAGE, PAGE): ["EOPNOTSUPP", "EINVAL"],
        (0, PAGE): ["EOPNOTSUPP", "ok"],
    }
    for (offset, length), expected in rows.items():
        for mode in modes:
            said = [
                answer(lambda m=one, a=offset, b=length: fallocate(gm_file, m, a, b))
                for one in (mode, KEEP_SIZE)
            ]
            assert said == expected, (offset, length, mode)


@rule("gm.pages.allocated", "gm.pages.freed")
def test_pages(gm_vm: Vm) -> None:
    """fallocate(2) allocates unevictable pages once; a hole and the last close free them."""
    memory = Unevictable()
    with GuestMemfd(gm_vm, BIG) as file:
        assert memory.is_about(0), "a size alone allocates nothing"
        for _ in range(2):
            fallocate(file, KEEP_SIZE, 0, BIG)
            assert memory.is_about(BIG)
        fallocate(file, HOLE, 0, BIG // 2)
        assert memory.is_about(BIG // 2)
        other = os.dup(file.fileno())
    try:
        assert memory.is_about(BIG // 2), "a duplicate keeps the pages"
    finally:
        os.close(other)
    assert memory.is_about(0)


@rule("gm.pages.range")
def test_pages_one_by_one(gm_vm: Vm) -> None:
    """An allocation of one page allocates it, and a hole of one page frees it."""
    memory, size = Unevictable(), BIG
    with GuestMemfd(gm_vm, size) as file:
        for mode, left in ((KEEP_SIZE, size), (HOLE, 0)):
            for at in range(0, size, PAGE):
                fallocate(file, mode, at, PAGE)
            assert memory.is_about(left)


# -- mapping: 6.18 -------------------------------------------------------------------------------


@pytest.fixture
def mappable(gm_vm: Vm) -> Iterator[GuestMemfd]:
    """A file of 4 pages, MMAP and INIT_SHARED."""
    require_flags(gm_vm, MMAP | INIT_SHARED)
    with GuestMemfd(gm_vm, 4 * PAGE, MMAP | INIT_SHARED) as file:
        yield file


@rule("gm.mmap.shared", "gm.mmap.hole")
def test_mapped(mappable: GuestMemfd) -> None:
    """A file with MMAP and INIT_SHARED can be mapped, written and read; a hole reads as zeros."""
    with (
        HostMemory(4 * PAGE, fd=mappable.fileno()) as one,
        HostMemory(2 * PAGE, fd=mappable.fileno(), offset=2 * PAGE) as two,
    ):
        assert one.read(0, 4 * PAGE) == bytes(4 * PAGE)
        one.write(0, b"\xaa" * 4 * PAGE)
        assert two.read(0, 2 * PAGE) == b"\xaa" * 2 * PAGE
        fallocate(mappable, HOLE, 2 * PAGE, PAGE)
        assert one.read(0, 4 * PAGE) == b"\xaa" * 2 * PAGE + bytes(PAGE) + b"\xaa" * PAGE
        fallocate(mappable, KEEP_SIZE, 0, 4 * PAGE)
        assert one.read(0, PAGE) == b"\xaa" * PAGE, "allocating changes nothing"


@rule("gm.mmap.private")
def test_mapped_private(mappable: GuestMemfd) -> None:
    """mmap(2) with MAP_PRIVATE is EINVAL."""
    for prot in (PROT_READ, PROT_READ | PROT_WRITE):
        private, shared = mapping(prot, MAP_PRIVATE), mapping(prot, MAP_SHARED)
        assert answer(lambda do=private: do(mappable.fileno())) == "EINVAL"
        assert answer(lambda do=shared: do(mappable.fileno())) == "ok"


def touched(fd: int, offset: int, *, write: bool) -> str:
    """The signal that ends a process that touches a mapping of 8 pages, or ""."""

    def touch() -> None:
        with Mapping(fd, 8 * PAGE) as mapping:
            if write:
                mapping.write(offset, b"x")
            else:
                mapping.read(offset, 1)

    return signal_of(touch)


@rule("gm.mmap.beyond_size")
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_mapped_beyond_the_end(mappable: GuestMemfd, write: bool) -> None:
    """A mapping may be longer than the file; touching what is beyond the end is SIGBUS."""
    fd = mappable.fileno()
    assert [touched(fd, at * PAGE, write=write) for at in (0, 3, 4, 7)] == ["", "", *2 * ["SIGBUS"]]


@rule("gm.mmap.not_shared")
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_mapped_without_init_shared(gm_vm: Vm, write: bool) -> None:
    """A file with MMAP alone can be mapped; touching the mapping is SIGBUS."""
    require_flags(gm_vm, MMAP)
    with GuestMemfd(gm_vm, 4 * PAGE, MMAP) as file:
        assert touched(file.fileno(), 0, write=write) == "SIGBUS"


@rule("gm.mmap.flag")
def test_shared_without_mmap(mappable: GuestMemfd, gm_vm: Vm) -> None:
    """mmap(2) of a file with INIT_SHARED and without MMAP is ENODEV."""
    shared = mapping(PROT_READ, MAP_SHARED)
    with GuestMemfd(gm_vm, 4 * PAGE, INIT_SHARED) as file:
        assert answer(lambda: shared(file.fileno())) == "ENODEV"
    assert answer(lambda: shared(mappable.fileno())) == "ok"


# -- slots ---------------------------------------------------------------------------------------


@rule("gm.slot.vm_type")
def test_which_vms_take_slots(any_vm: Vm, memory: HostMemory) -> None:
    """KVM_MEM_GUEST_MEMFD is EINVAL for a VM whose KVM_CAP_GUEST_MEMFD is 0."""
    with GuestMemfd(any_vm, 256 * PAGE) as file:
        slots = GuestMemfdSlots(any_vm, file, memory.userspace_addr)
        taken = any_vm.check_extension(gm.KVM_CAP_GUEST_MEMFD)
        assert slots.set() == ("ok" if taken else "EINVAL")
        slots.accepts(flags=0, slot=4, guest_phys_addr=5 * GIB)


@rule("gm.slot.old_ioctl")
def test_the_old_ioctl(gm_slots: GuestMemfdSlots) -> None:
    """KVM_SET_USER_MEMORY_REGION with KVM_MEM_GUEST_MEMFD is EINVAL; without it deletes such
    slots.
    """
    new, gm_slots.request = gm_slots.request, k.KVM_SET_USER_MEMORY_REGION
    assert gm_slots.set() == "EINVAL"
    gm_slots.accepts(flags=0)
    gm_slots.request = new
    assert gm_slots.set() == "ok"
    gm_slots.request = k.KVM_SET_USER_MEMORY_REGION
    assert gm_slots.delete() == "EINVAL", "with the flag"
    assert gm_slots.delete(flags=0) == "ok"


@rule("gm.slot.copy")
def test_copied(gm_slots: GuestMemfdSlots) -> None:
    """KVM_SET_USER_MEMORY_REGION2 copies 160 bytes for every slot: with one byte less it is
    EFAULT.
    """
    edge = Edge()
    for flags in (GUEST_MEMFD, 0):
        struct = gm_slots.struct(flags=flags)
        for readable in (1, 8, 32, 40, 159, 160):
            said = gm_slots.set_at(edge.put(struct, readable))
            assert said == ("ok" if readable == 160 else "EFAULT"), readable
        assert gm_slots.delete() == "ok"
    for address in (0, 1, NOWHERE, 0xFFFF888000000000):
        assert gm_slots.set_at(address) == "EFAULT", hex(address)
    edge.close()


@rule("gm.slot.order.efault")
def test_efault_comes_first(gm_slots: GuestMemfdSlots) -> None:
    """EFAULT comes before every other refusal."""
    edge = Edge()
    with gm_slots.held():
        for expected, wrong in (
            ("EINVAL", {"flags": UNKNOWN}),
            ("EEXIST", {"slot": 4}),
            ("EBADF", {"slot": 4, "guest_phys_addr": 5 * GIB, "guest_memfd": 0xFFFFFFFF}),
        ):
            struct = gm_slots.struct(**wrong)
            assert gm_slots.set_at(edge.put(struct, 159)) == "EFAULT"
            assert gm_slots.set_at(edge.put(struct, 160)) == expected
    edge.close()


@rule("gm.slot.flags.unknown")
def test_unknown_flags(gm_slots: GuestMemfdSlots) -> None:
    """Flags from bit 3 on are EINVAL."""
    for bit in range(3, 32):
        assert gm_slots.set(flags=GUEST_MEMFD | 1 << bit) == "EINVAL", bit
        assert gm_slots.set(flags=1 << bit) == "EINVAL", bit
    assert gm_slots.asked == 58
    gm_slots.accepts()


@rule("gm.slot.flags.log_dirty", "gm.slot.flags.readonly")
@pytest.mark.parametrize("beside", [LOG, READONLY, LOG | READONLY])
def test_flags_beside_guest_memfd(gm_slots: GuestMemfdSlots, beside: int) -> None:
    """LOG_DIRTY_PAGES and READONLY beside GUEST_MEMFD are EINVAL."""
    gm_slots.refuses("EINVAL", flags=GUEST_MEMFD | beside)
    if gm_slots.vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES) == 0 or not beside & READONLY:
        gm_slots.accepts(flags=beside)


@rule("gm.slot.align")
@pytest.mark.parametrize(
    "name", ["memory_size", "guest_phys_addr", "userspace_addr", "guest_memfd_offset"]
)
def test_alignment(gm_slots: GuestMemfdSlots, name: str) -> None:
    """A size, address or offset that is not page aligned is EINVAL."""
    good = gm_slots.good[name]
    for off in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4095):
        assert gm_slots.set(**{name: good + off}) == "EINVAL", off
    assert gm_slots.asked == 13
    gm_slots.accepts()


@rule("gm.slot.offset.each")
def test_every_offset_within_a_page(gm_slots: GuestMemfdSlots) -> None:
    """Each guest_memfd_offset from 1 to 4095 is EINVAL."""
    struct, said = gm_slots.struct(), []
    for offset in range(1, PAGE):
        struct.guest_memfd_offset = offset
        said.append(gm_slots.vm.ioctl_errno(gm_slots.request, struct))
    assert {errno_of(number) for number in said} == {"EINVAL"}
    assert len(said) == 4095
    gm_slots.accepts(guest_memfd_offset=0)


@rule("gm.slot.offset.range")
def test_offset_range(gm_slots: GuestMemfdSlots) -> None:
    """offset + size beyond the file, and an offset that is negative or wraps, is EINVAL."""
    end, size = 256 * PAGE, 16 * PAGE
    for offset in (end - size + PAGE, end, 1 << 40, NOWHERE, TOP - PAGE, TOP - size):
        assert gm_slots.set(guest_memfd_offset=offset) == "EINVAL", hex(offset)
    gm_slots.accepts(guest_memfd_offset=end - size)
    gm_slots.accepts(guest_memfd_offset=0)


@rule("gm.slot.file.ebadf")
def test_closed_descriptors(gm_slots: GuestMemfdSlots, gm_file: GuestMemfd) -> None:
    """A guest_memfd descriptor that is not open or is O_PATH is EBADF."""
    closed = os.dup(0)
    os.close(closed)
    path = os.open(f"/proc/self/fd/{gm_file.fileno()}", os.O_PATH)
    try:
        for number in (0xFFFFFFFF, 0x7FFFFFFF, closed, path):
            gm_slots.refuses("EBADF", guest_memfd=number)
    finally:
        os.close(path)
    gm_slots.accepts(flags=0, guest_memfd=closed)


@rule("gm.slot.file.kind")
def test_other_files(gm_slots: GuestMemfdSlots, kvm: Kvm) -> None:
    """A descriptor of another kind of file is EINVAL."""
    with socket.socket() as sock, open("/dev/null") as null, open("/proc/self/maps") as proc:  # noqa: PTH123
        memfd = os.memfd_create("other")
        kinds = (memfd, sock.fileno(), null.fileno(), proc.fileno())
        for fd in (*kinds, kvm.fileno(), gm_slots.vm.fileno()):
            assert gm_slots.set(guest_memfd=fd) == "EINVAL"
        os.close(memfd)
    assert gm_slots.asked == 6
    gm_slots.accepts()


@rule("gm.slot.file.other_vm")
def test_another_vms_file(gm_slots: GuestMemfdSlots, guest_memfd_kvm: Kvm, vm_type: int) -> None:
    """A file of another VM is EINVAL."""
    with (
        guest_memfd_kvm.create_vm(vm_type) as other,
        GuestMemfd(other, 256 * PAGE) as file,
    ):
        gm_slots.refuses("EINVAL", guest_memfd=file.fileno())


@rule("gm.slot.overlap.guest")
def test_guest_overlap(gm_slots: GuestMemfdSlots) -> None:
    """A guest range that overlaps another slot's is EEXIST; adjacent slots succeed."""
    base, size = 4 * GIB, 16 * PAGE
    with gm_slots.held(guest_memfd_offset=0):
        for address, length in (
            (base, size),
            (base - PAGE, 2 * PAGE),
            (base + size - PAGE, 2 * PAGE),
            (base + PAGE, PAGE),
            (base - PAGE, size + 2 * PAGE),
        ):
            new = {"slot": 4, "guest_phys_addr": address, "memory_size": length}
            assert gm_slots.set(**new) == "EEXIST"
            assert gm_slots.set(**new, flags=0) == "EEXIST"
        gm_slots.accepts(slot=4, guest_phys_addr=base - size)
        gm_slots.accepts(slot=4, guest_phys_addr=base + size)


@rule("gm.slot.overlap.file")
def test_file_overlap(gm_slots: GuestMemfdSlots) -> None:
    """A range of the file can be in one slot only, of all address spaces; the errno (EINVAL or
    EEXIST) is always the same.
    """
    other = {"slot": 4, "guest_phys_addr": 5 * GIB}
    said = set()
    with gm_slots.held():
        for page, pages in ((32, 16), (31, 2), (47, 2), (33, 1), (31, 18)):
            where = {"guest_memfd_offset": page * PAGE, "memory_size": pages * PAGE}
            said.add(gm_slots.set(**other, **where))
        if gm_slots.vm.check_extension(k.KVM_CAP_MULTI_ADDRESS_SPACE) > 1:
            said.add(gm_slots.set(slot=1 << 16 | 4))
            gm_slots.accepts(slot=1 << 16 | 4, guest_memfd_offset=0)
        for page in (16, 48):
            gm_slots.accepts(**other, guest_memfd_offset=page * PAGE)
        for page in (32, 47):  # the slots on both sides are gone, and took nothing with them
            where = {"guest_memfd_offset": page * PAGE, "memory_size": PAGE}
            said.add(gm_slots.set(**other, **where))
    assert len(said) == 1
    assert said <= FILE_OVERLAP
    gm_slots.accepts(**other)


@rule("gm.slot.overlap.file.eexist")
def test_errno_of_a_file_overlap(gm_slots: GuestMemfdSlots) -> None:
    """A range of the file that another slot has is EEXIST; a free one of the same size succeeds."""
    other = {"slot": 4, "guest_phys_addr": 5 * GIB}
    with gm_slots.held():
        said = gm_slots.set(**other)
        gm_slots.accepts(**other, guest_memfd_offset=0)
    if said == "EINVAL":
        mainline_defect("file-overlap-einval", "EINVAL")
    assert said == "EEXIST"


@rule("gm.slot.order.eexist")
def test_order_around_eexist(gm_slots: GuestMemfdSlots) -> None:
    """EINVAL of flags and alignment comes before EEXIST, and EEXIST before refusals of the file."""
    with gm_slots.held():
        for wrong in (
            {"flags": GUEST_MEMFD | UNKNOWN},
            {"flags": GUEST_MEMFD | LOG},
            {"memory_size": 16 * PAGE + 1},
            {"guest_memfd_offset": 1},
            {"guest_memfd_offset": TOP - PAGE},
            {"userspace_addr": 1},
        ):
            assert gm_slots.set(slot=4, **wrong) == "EINVAL", wrong
        for wrong in (
            {"guest_memfd": 0xFFFFFFFF},
            {"guest_memfd": gm_slots.vm.fileno()},
            {"guest_memfd_offset": 1 << 40},
            {},
        ):
            assert gm_slots.set(slot=4, **wrong) == "EEXIST", wrong


@rule("gm.slot.order.immutable")
def test_immutable_comes_before_eexist(gm_slots: GuestMemfdSlots) -> None:
    """EINVAL of a change to a guest_memfd slot comes before EEXIST of an overlap."""
    there = {"guest_phys_addr": 5 * GIB, "guest_memfd_offset": 0}
    for flags in (GUEST_MEMFD, 0):
        with gm_slots.held(slot=4, flags=flags, **there):
            assert gm_slots.set(**there) == "EEXIST"
            with gm_slots.held():
                assert gm_slots.set(**there) == "EINVAL"
        gm_slots.accepts(**there)


@rule("gm.slot.order.number")
def test_the_number_comes_before_eexist(gm_slots: GuestMemfdSlots) -> None:
    """EINVAL of a slot number that is too large comes before EEXIST of an overlap."""
    limit = gm_slots.vm.check_extension(k.KVM_CAP_NR_MEMSLOTS)
    with gm_slots.held():
        for number in (limit, 0xFFFF):
            for flags in (GUEST_MEMFD, 0):
                assert gm_slots.set(slot=number, flags=flags) == "EINVAL"
                assert gm_slots.set(slot=limit - 1, flags=flags) == "EEXIST"
    gm_slots.accepts(slot=limit - 1)


@rule("gm.slot.order.ebadf")
def test_order_around_ebadf(gm_slots: GuestMemfdSlots) -> None:
    """EINVAL of flags and alignment comes before EBADF, and EBADF before EINVAL of the offset."""
    bad = {"guest_memfd": 0xFFFFFFFF}
    for wrong in (
        {"flags": GUEST_MEMFD | UNKNOWN},
        {"flags": GUEST_MEMFD | LOG},
        {"flags": GUEST_MEMFD | READONLY},
        {"memory_size": 16 * PAGE + 1},
        {"guest_memfd_offset": 1},
        {"guest_memfd_offset": PAGE // 2},
        {"guest_memfd_offset": TOP - PAGE},
        {"userspace_addr": 1},
    ):
        gm_slots.refuses("EINVAL", **wrong, **bad)
    for wrong in ({"guest_memfd_offset": 256 * PAGE}, {"guest_memfd_offset": 1 << 40}):
        gm_slots.refuses("EBADF", **wrong, **bad)
        gm_slots.refuses("EINVAL", **wrong)
    gm_slots.refuses("EBADF", **bad)


@rule("gm.slot.immutable")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guest_phys_addr": 5 * GIB},
        {"memory_size": 8 * PAGE},
        {"guest_memfd_offset": 0},
        {"userspace_addr": 0},
        {"guest_memfd": 0xFFFFFFFF},
    ],
    ids=lambda changes: next(iter(changes), "nothing"),
)
def test_slots_do_not_change(gm_slots: GuestMemfdSlots, changes: dict[str, int]) -> None:
    """Setting a guest_memfd slot that exists in any way is EINVAL."""
    assert gm_slots.set() == "ok"
    assert gm_slots.set(**changes) == "EINVAL"
    assert gm_slots.delete() == "ok"
    if "guest_memfd" not in changes:
        gm_slots.accepts(**changes)


@rule("gm.slot.immutable.cleared")
@pytest.mark.dangerous(
    "before commit 9935df5333aa (6.19) a slot without its flag is freed in use",
    safe=("guest_memfd", "guest_memfd-debug", "guest_memfd-in-place"),
)
def test_slots_do_not_become_ordinary(gm_slots: GuestMemfdSlots) -> None:
    """Clearing KVM_MEM_GUEST_MEMFD of a slot is EINVAL."""
    assert gm_slots.set() == "ok"
    assert gm_slots.set(flags=0) == "EINVAL"
    assert gm_slots.set(flags=0, guest_phys_addr=5 * GIB) == "EINVAL"
    assert gm_slots.delete() == "ok"


@rule("gm.slot.immutable.ordinary")
def test_ordinary_slots_do_not_get_a_file(gm_slots: GuestMemfdSlots) -> None:
    """Setting KVM_MEM_GUEST_MEMFD for an ordinary slot that exists is EINVAL."""
    assert gm_slots.set(flags=0) == "ok"
    assert gm_slots.set() == "EINVAL"
    assert gm_slots.set(flags=LOG) == "ok"
    assert gm_slots.delete(flags=0) == "ok"
    gm_slots.accepts()


@rule("gm.slot.delete")
def test_deletion(gm_slots: GuestMemfdSlots) -> None:
    """memory_size 0 deletes the slot, whatever fd and flag are; a second time is EINVAL."""
    for changes in ({}, {"flags": 0}, {"guest_memfd": 0xFFFFFFFF}, {"userspace_addr": 0}):
        assert gm_slots.delete(**changes) == "EINVAL", "the slot does not exist"
        assert gm_slots.set() == "ok"
        assert gm_slots.delete(slot=4, **changes) == "EINVAL"
        assert gm_slots.delete(**changes) == "ok"
    gm_slots.accepts(slot=4)


@rule("gm.slot.unchecked.pad", "gm.slot.unchecked.userspace_addr")
def test_unchecked(gm_slots: GuestMemfdSlots) -> None:
    """The kernel ignores pad1 and pad2, and userspace_addr need not be mapped."""
    gm_slots.accepts(pad1=0xFFFFFFFF, pad2=TOP - 1)
    gm_slots.accepts(userspace_addr=0)
    gm_slots.accepts(userspace_addr=1 << 40)


@rule("gm.slot.id")
def test_slot_numbers(gm_slots: GuestMemfdSlots) -> None:
    """A slot number of KVM_CAP_NR_MEMSLOTS or more, or an address space that does not exist, is
    EINVAL.
    """
    limit = gm_slots.vm.check_extension(k.KVM_CAP_NR_MEMSLOTS)
    spaces = max(1, gm_slots.vm.check_extension(k.KVM_CAP_MULTI_ADDRESS_SPACE))
    for number in (limit, 0xFFFF, spaces << 16 | 3):
        assert gm_slots.set(slot=number) == "EINVAL", number
    gm_slots.accepts(slot=limit - 1)
    gm_slots.accepts(slot=(spaces - 1) << 16 | 3)


@rule("gm.slot.gpa.wrap")
def test_guest_range(gm_slots: GuestMemfdSlots) -> None:
    """A guest_phys_addr + memory_size that wraps or exceeds what KVM can map is EINVAL."""
    for address in (TOP - PAGE, TOP - 16 * PAGE, 1 << 52):
        gm_slots.refuses("EINVAL", guest_phys_addr=address)


# -- attributes ----------------------------------------------------------------------------------


def attributes(vm: Vm, address: int, size: int, value: int = PRIVATE, flags: int = 0) -> str:
    """The errno of KVM_SET_MEMORY_ATTRIBUTES."""
    struct = gm.ffi.new("struct kvm_memory_attributes *", (address, size, value, flags))
    return errno_of(vm.ioctl_errno(gm.KVM_SET_MEMORY_ATTRIBUTES, struct))


@rule("gm.attr.not_built_in", "gm.attr.vm_type")
def test_which_vms_have_attributes(kvm: Kvm, any_vm: Vm) -> None:
    """ENOTTY if no attribute is built in; EINVAL for PRIVATE if the VM type does not have it."""
    if not kvm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES):
        said = [attributes(any_vm, 0, PAGE, value) for value in (PRIVATE, 0, 1)]
        assert said == ["ENOTTY"] * 3
        return
    private = any_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES) & PRIVATE
    assert attributes(any_vm, 0, PAGE, PRIVATE) == ("ok" if private else "EINVAL")
    assert attributes(any_vm, 0, PAGE, 0) == "ok"


@rule("gm.attr.no_slot", "gm.attr.again")
def test_attributes_without_a_slot(attributes_vm: Vm) -> None:
    """A range gets its attribute also without a slot, and if it has the attribute already."""
    for value in (PRIVATE, PRIVATE, 0, 0):
        for address, size in ((0, PAGE), (4 * GIB, 512 * PAGE), (3 * PAGE, 5 * PAGE)):
            assert attributes(attributes_vm, address, size, value) == "ok"


@rule("gm.attr.beyond_slot")
def test_attributes_beyond_the_slot(attributes_vm: Vm) -> None:
    """The slot ends in 1 GiB of which all else is private too, and has no slot.

    KVM keeps an array for each slot, with an entry of 4 bytes for each 2 MiB.  The entry of this
    slot for 2 MiB at `last` would be on the page behind the array's only one.
    """
    large = 2 * MIB
    begin, size = 2 * GIB - 8 * large, 8 * large + GIB + PAGE
    last = begin + PAGE // 4 * large
    with HostMemory(size) as memory:
        slots = GuestMemfdSlots(attributes_vm, 0, memory.userspace_addr)
        with slots.held(flags=0, guest_phys_addr=begin, memory_size=size):
            for gpa in range(3 * GIB + large, last + large, large):
                assert attributes(attributes_vm, gpa, PAGE) == "ok"
            for value in (PRIVATE, 0):
                assert attributes(attributes_vm, 3 * GIB - large, 2 * large, value) == "ok"


@rule("gm.attr.flags", "gm.attr.unknown")
def test_attribute_flags(attributes_vm: Vm) -> None:
    """Every flag is EINVAL, and every attribute but PRIVATE."""
    for bit in range(64):
        assert attributes(attributes_vm, 0, PAGE, flags=1 << bit) == "EINVAL", bit
        expected = "ok" if 1 << bit == PRIVATE else "EINVAL"
        assert attributes(attributes_vm, 0, PAGE, 1 << bit) == expected, bit
        if expected == "EINVAL":
            assert attributes(attributes_vm, 0, PAGE, PRIVATE | 1 << bit) == "EINVAL", bit


@rule("gm.attr.size", "gm.attr.wrap", "gm.attr.align")
@pytest.mark.parametrize("value", [PRIVATE, 0], ids=["private", "shared"])
def test_attribute_ranges(attributes_vm: Vm, value: int) -> None:
    """A size of 0, a range that wraps, and one that is not page aligned are EINVAL."""
    for address, size in (
        (0, 0),
        (PAGE, 0),
        (TOP - PAGE, PAGE),
        (TOP - PAGE, 2 * PAGE),
        (PAGE, TOP - PAGE),
        (1, PAGE),
        (PAGE, 1),
        (PAGE + 2048, PAGE),
        (PAGE, PAGE + 2048),
        (2048, 2048),
        (PAGE - 1, PAGE),
    ):
        assert attributes(attributes_vm, address, size, value) == "EINVAL", (address, size)
    for address, size in ((0, PAGE), (PAGE, PAGE), (TOP - 2 * PAGE, PAGE)):
        assert attributes(attributes_vm, address, size, value) == "ok", (address, size)


@rule("gm.attr.pointer")
def test_attribute_pointers(attributes_vm: Vm) -> None:
    """A struct that can't be read in full is EFAULT."""
    edge = Edge()
    struct = gm.ffi.new("struct kvm_memory_attributes *", (0, PAGE, PRIVATE, 0))
    request = gm.KVM_SET_MEMORY_ATTRIBUTES
    for address in (0, 1, NOWHERE, edge.put(struct, 31)):
        assert errno_of(attributes_vm.ioctl_errno(request, address)) == "EFAULT"
    assert errno_of(attributes_vm.ioctl_errno(request, edge.put(struct, 32))) == "ok"
    edge.close()


@rule("gm.attr.order.efault")
def test_attribute_efault_comes_first(attributes_vm: Vm) -> None:
    """EFAULT comes before every other refusal."""
    edge, request = Edge(), gm.KVM_SET_MEMORY_ATTRIBUTES
    for wrong, expected in (
        ((1, PAGE, PRIVATE, 0), "EINVAL"),
        ((0, 0, PRIVATE, 0), "EINVAL"),
        ((0, PAGE, UNKNOWN, 0), "EINVAL"),
        ((0, PAGE, PRIVATE, 0), "ok"),
    ):
        struct = gm.ffi.new("struct kvm_memory_attributes *", wrong)
        for readable, said in ((31, "EFAULT"), (32, expected)):
            number = attributes_vm.ioctl_errno(request, edge.put(struct, readable))
            assert errno_of(number) == said, wrong
    edge.close()


# -- pre-faulting --------------------------------------------------------------------------------


def pre_fault(vcpu: Vcpu, gpa: int, size: int, **more: Any) -> tuple[str, int, int]:
    """The errno of KVM_PRE_FAULT_MEMORY, and the gpa and size that it wrote back."""
    struct = gm.ffi.new("struct kvm_pre_fault_memory *", {"gpa": gpa, "size": size, **more})
    said = errno_of(vcpu.ioctl_errno(gm.KVM_PRE_FAULT_MEMORY, struct))
    return said, struct.gpa, struct.size


@rule("gm.prefault.range", "gm.prefault.flags")
def test_pre_fault_ranges(gm_slots: GuestMemfdSlots, gm_vcpu: Vcpu) -> None:
    """Flags, a size of 0, a range that wraps, and one that is not page aligned are EINVAL."""
    base = gm_slots.good["guest_phys_addr"]
    with gm_slots.held():
        for bad in (
            {"flags": 1},
            {"flags": NOWHERE},
            {"size": 0},
            {"size": 1},
            {"size": PAGE + 1},
            {"gpa": base + 1},
            {"gpa": TOP - PAGE, "size": 2 * PAGE},
            {"gpa": base, "size": TOP - PAGE},
        ):
            said, _, _ = pre_fault(gm_vcpu, **{"gpa": base, "size": PAGE, **bad})
            assert said == "EINVAL", bad
        assert pre_fault(gm_vcpu, base, PAGE) == ("ok", base + PAGE, 0)
        assert pre_fault(gm_vcpu, base, PAGE, padding=[TOP - 1] * 5)[0] == "ok"


@rule("gm.prefault.no_slot")
def test_pre_fault_without_a_slot(gm_slots: GuestMemfdSlots, gm_vcpu: Vcpu) -> None:
    """Without a slot it is ENOENT; a range that leaves the slot is filled to the slot's end."""
    base, size = gm_slots.good["guest_phys_addr"], gm_slots.good["memory_size"]
    assert pre_fault(gm_vcpu, base, PAGE) == ("ENOENT", base, PAGE)
    with gm_slots.held():
        assert pre_fault(gm_vcpu, base + size, PAGE)[0] == "ENOENT"
        last = base + size - PAGE
        assert pre_fault(gm_vcpu, last, 3 * PAGE) == ("ok", base + size, 2 * PAGE)
    assert pre_fault(gm_vcpu, base, PAGE)[0] == "ENOENT"


@rule("gm.prefault.order.enoent", "gm.prefault.order.efault")
def test_pre_fault_order(gm_slots: GuestMemfdSlots, gm_vcpu: Vcpu) -> None:
    """EFAULT comes before EINVAL of flags, size and alignment, and that before ENOENT."""
    edge, base = Edge(), gm_slots.good["guest_phys_addr"]
    bad = ({"flags": 1}, {"size": 0}, {"size": 1}, {"gpa": base + 1}, {"size": TOP - PAGE})
    for there in (False, True):
        with gm_slots.held() if there else nullcontext():
            for changes in (*bad, {}):
                good = "ok" if there else "ENOENT"
                expected = "EINVAL" if changes else good
                struct = {"gpa": base, "size": PAGE, **changes}
                assert pre_fault(gm_vcpu, **struct)[0] == expected, (there, changes)
                cut = edge.put(gm.ffi.new("struct kvm_pre_fault_memory *", struct), 63)
                said = errno_of(gm_vcpu.ioctl_errno(gm.KVM_PRE_FAULT_MEMORY, cut))
                assert said == "EFAULT", (there, changes)
    edge.close()


@rule("gm.prefault.pointer")
def test_pre_fault_pointers(gm_slots: GuestMemfdSlots, gm_vcpu: Vcpu) -> None:
    """A struct that can't be read is EFAULT."""
    with gm_slots.held():
        for address in (0, NOWHERE):
            said = errno_of(gm_vcpu.ioctl_errno(gm.KVM_PRE_FAULT_MEMORY, address))
            assert said == "EFAULT"
        good = gm.ffi.new("struct kvm_pre_fault_memory *", {"gpa": 4 * GIB, "size": PAGE})
        assert errno_of(gm_vcpu.ioctl_errno(gm.KVM_PRE_FAULT_MEMORY, address_of(good))) == "ok"


@rule("gm.prefault.read-only")
def test_pre_fault_of_a_struct_that_is_read_only(gm_slots: GuestMemfdSlots, gm_vm: Vm) -> None:
    """A struct that can't be written is EFAULT, and its pages are mapped; the twin can be."""
    if not gm_vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
        missing("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0")
    base = gm_slots.good["guest_phys_addr"]
    with HostMemory(PAGE) as holder, gm_vm.create_vcpu() as vcpu, gm_slots.held(flags=0):
        mapped = gm_vm.stats()["pages_4k"]
        for page, (protection, expected) in enumerate(
            ((PROT_READ, "EFAULT"), (PROT_READ | PROT_WRITE, "ok")), 1
        ):
            struct = gm.ffi.new(
                "struct kvm_pre_fault_memory *", {"gpa": base + page * PAGE, "size": PAGE}
            )
            holder.write(0, bytes(gm.ffi.buffer(struct)))
            call("mprotect", holder.userspace_addr, PAGE, protection)
            said = vcpu.ioctl_errno(gm.KVM_PRE_FAULT_MEMORY, holder.userspace_addr)
            assert errno_of(said) == expected
            assert gm_vm.stats()["pages_4k"] == mapped + page
            call("mprotect", holder.userspace_addr, PAGE, PROT_READ | PROT_WRITE)


@rule("gm.prefault.fills")
def test_pre_fault_fills(attributes_vm: Vm, gm_vcpu: Vcpu) -> None:
    """A private range is filled from the file, and its pages stay when it becomes shared."""
    memory = Unevictable()
    with GuestMemfd(attributes_vm, BIG) as file:
        slots = GuestMemfdSlots(attributes_vm, file, 0)
        with slots.held(memory_size=BIG, guest_memfd_offset=0):
            assert attributes(attributes_vm, 4 * GIB, BIG) == "ok"
            assert memory.is_about(0), "converting allocates nothing"
            assert pre_fault(gm_vcpu, 4 * GIB, BIG // 2) == ("ok", 4 * GIB + BIG // 2, 0)
            assert memory.is_about(BIG // 2)
            assert attributes(attributes_vm, 4 * GIB, BIG, 0) == "ok"
            assert memory.is_about(BIG // 2), "only a hole frees"
            fallocate(file, HOLE, 0, BIG)
            assert memory.is_about(0)


@rule("gm.prefault.efault")
@pytest.mark.parametrize("how", ["no memory", "file closed"])
def test_pre_fault_without_memory(gm_vm: Vm, gm_vcpu: Vcpu, memory: HostMemory, how: str) -> None:
    """A slot without memory is EFAULT: nothing at userspace_addr, or its file is closed."""
    private = bool(gm_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES))
    flags = flags_of(gm_vm) & (MMAP | INIT_SHARED)
    if how == "file closed" and not private and flags != MMAP | INIT_SHARED:
        missing("guest-memfd-flags", "no access of this VM has the file's pages")
    with GuestMemfd(gm_vm, 256 * PAGE, 0 if private else flags) as file:
        slots = GuestMemfdSlots(gm_vm, file, memory.userspace_addr)
        base = slots.good["guest_phys_addr"]
        if how == "no memory":
            with slots.held(flags=0, userspace_addr=1 << 40):
                assert pre_fault(gm_vcpu, base, PAGE) == ("EFAULT", base, PAGE)
            with slots.held(flags=0):
                assert pre_fault(gm_vcpu, base, PAGE)[0] == "ok"
            return
        assert slots.set() == "ok"
        if private:
            assert attributes(gm_vm, base, PAGE) == "ok"
        assert pre_fault(gm_vcpu, base, PAGE)[0] == "ok"
    assert pre_fault(gm_vcpu, base, PAGE) == ("EFAULT", base, PAGE)
    assert slots.delete() == "ok"


@rule("gm.prefault.efault.private")
@pytest.mark.parametrize("there", [False, True], ids=["no slot", "ordinary slot"])
def test_pre_fault_of_a_private_page(
    attributes_vm: Vm, gm_slots: GuestMemfdSlots, gm_vcpu: Vcpu, there: bool
) -> None:
    """A private gfn without a file is EFAULT, where a shared one is ENOENT or succeeds."""
    base = gm_slots.good["guest_phys_addr"]
    with gm_slots.held(flags=0) if there else nullcontext():
        assert pre_fault(gm_vcpu, base, PAGE)[0] == ("ok" if there else "ENOENT")
        assert attributes(attributes_vm, base, PAGE) == "ok"
        assert pre_fault(gm_vcpu, base, PAGE) == ("EFAULT", base, PAGE)
        assert pre_fault(gm_vcpu, base + PAGE, PAGE)[0] == ("ok" if there else "ENOENT")
    with gm_slots.held():
        assert pre_fault(gm_vcpu, base, PAGE)[0] == "ok", "the file is there"


@rule("gm.prefault.again")
def test_pre_fault_in_a_slot_that_was_made_again(any_vm: Vm, memory: HostMemory) -> None:
    """Pre-faulting succeeds in a slot that was deleted and made again, before the vCPU ever ran."""
    if not any_vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
        missing("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0")
    slots = GuestMemfdSlots(any_vm, 0, memory.userspace_addr)
    base = slots.good["guest_phys_addr"]
    with any_vm.create_vcpu() as vcpu:
        for turn in range(3):
            with slots.held(flags=0):
                try:
                    with within_cpu_time(5):
                        assert pre_fault(vcpu, base, PAGE)[0] == "ok", turn
                except CpuTimeError as error:
                    assert turn, "in a slot that is new"
                    mainline_defect("pre-fault-obsolete-root", str(error))


@rule("gm.prefault.eintr")
def test_pre_fault_interrupted(gm_vm: Vm, memory: HostMemory) -> None:
    """With a signal pending it is EINTR, and nothing was filled; the same call then succeeds.

    It waits for its vCPU, which runs in another thread; when that ends, the signal has come.
    """
    if not gm_vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
        missing("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0")
    gm_vm.create_irqchip()
    main = threading.get_ident()
    with (
        GuestMemfd(gm_vm, 256 * PAGE) as file,
        gm_vm.create_vcpu(1) as vcpu,  # not the first one: it waits for its INIT
    ):
        slots = GuestMemfdSlots(gm_vm, file, memory.userspace_addr)
        base = slots.good["guest_phys_addr"]
        struct = gm.ffi.new("struct kvm_pre_fault_memory *", {"gpa": base, "size": PAGE})
        said: list[str] = []

        def interrupt() -> None:
            time.sleep(0.2)
            signal.pthread_kill(main, signal.SIGUSR2)
            time.sleep(0.1)
            vcpu.kick()

        before = signal.signal(signal.SIGUSR2, lambda *_: None)
        try:
            with slots.held():
                while "EINTR" not in said and len(said) < 10:
                    threads = [threading.Thread(target=do) for do in (vcpu.run, interrupt)]
                    for thread in threads:
                        thread.start()
                    time.sleep(0.1)
                    request, argument = gm.KVM_PRE_FAULT_MEMORY, address_of(struct)
                    failed = libc.ioctl(vcpu.fileno(), request, argument) < 0
                    said.append(errno_of(libc.last_errno()) if failed else "ok")
                    for thread in threads:
                        thread.join()
                assert said[-1] == "EINTR", said
                assert (struct.gpa, struct.size) == (base, PAGE)
                assert pre_fault(vcpu, base, PAGE) == ("ok", base + PAGE, 0)
        finally:
            signal.signal(signal.SIGUSR2, before)


#: A vCPU whose guest runs a guest of its own (<asm/kvm.h>, <asm/svm.h>): KVM_SET_NESTED_STATE, the
#: feature in leaf 0x80000001, the bit in EFER.
SET_NESTED_STATE, SVM, SVME = 0x4080AEBF, 1 << 2, 1 << 12
GUEST_MODE, GIF_SET = 1, 0x100


def nested_state(flags: int) -> bytes:
    """A struct kvm_nested_state of SVM with a good VMCB, which has nested paging."""
    control, save = bytearray(0x400), bytearray(0xC00)
    for at, value in ((0x10, 1), (0x58, 1), (0x90, 1), (0xB0, GIB)):  # VMRUN, ASID, NP, nCR3
        pack_into("<Q", control, at, value)
    # EFER, CR0 with paging, DR7, DR6, RFLAGS
    for at, value in ((0xD0, SVME), (0x158, 0x80000011), (0x160, 0x400), (0x168, 0), (0x170, 2)):
        pack_into("<Q", save, at, value)
    head = pack("<HHIQ", flags, 1, 128 + 0x1000, 2 * GIB)
    return head.ljust(128, b"\0") + control + save


@rule("gm.prefault.nested")
def test_pre_fault_while_a_nested_guest_runs(
    gm_slots: GuestMemfdSlots, gm_vcpu: Vcpu, kvm: Kvm
) -> None:
    """EOPNOTSUPP, since the page tables of the nested guest are indexed by its own addresses."""
    cpuid = kvm.get_supported_cpuid()
    if not any(entry.function == 0x80000001 and entry.ecx & SVM for entry in cpuid):
        missing("nested-svm", "KVM_GET_SUPPORTED_CPUID has no SVM")
    base = gm_slots.good["guest_phys_addr"]
    gm_vcpu.set_cpuid2(cpuid)
    with gm_vcpu.sregs() as sregs:
        sregs.efer |= SVME
    with gm_slots.held(flags=0):
        for page in range(3):
            assert pre_fault(gm_vcpu, base + page * PAGE, PAGE)[0] == "ok"
            for flags, expected in ((GIF_SET | GUEST_MODE, "EOPNOTSUPP"), (GIF_SET, "ok")):
                state = gm.ffi.new("char[]", nested_state(flags))
                gm_vcpu.ioctl(SET_NESTED_STATE, address_of(state))
                assert pre_fault(gm_vcpu, base + page * PAGE, PAGE)[0] == expected
