"""Private slots that are read-only, have a dirty log, or are in another address space."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

import pytest

from kvmpriv.cdefs import kvm as k
from kvmpriv.exits import ExitReason, IoExit, MemoryFaultExit, MmioExit
from kvmpriv.guest.puppet import GuestExit

from .support.large_pages import huge_pages
from .support.requirements import missing
from .support.rig import LARGE, Rig, only
from .support.rules import rule
from .support.syscalls import GIB, PAGE, answer

if TYPE_CHECKING:
    from kvmpriv import HostMemory
    from kvmpriv.private import PrivateFile

pytestmark = pytest.mark.usefixtures("no_leak")

LOG, READONLY = k.KVM_MEM_LOG_DIRTY_PAGES, k.KVM_MEM_READONLY
GPA, PAGES = 4 * GIB + 3 * PAGE, 200
SIZE = PAGES * PAGE
OFFSET, MEMORY_OFFSET = 5 * PAGE, 2 * PAGE


class Flagged:
    """A slot at GPA with flags, over a file and host memory that outlive it."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.guest = rig, rig.guest
        self.memory = rig.memory(MEMORY_OFFSET + SIZE)
        self.file = rig.file(OFFSET + SIZE)

    def bind(self, flags: int) -> None:
        self.slot = self.rig.bind(
            GPA, SIZE, self.file, OFFSET,
            memory=self.memory, memory_offset=MEMORY_OFFSET, flags=flags, slot=3,
        )  # fmt: skip

    def rebind(self, flags: int) -> None:
        self.slot.delete()
        self.bind(flags)


@pytest.fixture
def flagged(rig: Rig) -> Flagged:
    return Flagged(rig)


# -- read-only -------------------------------------------------------------------------------------


@rule("v9.readonly.private-write", "v9.readonly.read")
@pytest.mark.known_defect("read-only-spins")
@only("restrictedmem")
@pytest.mark.parametrize("first", ["read", "write"])
def test_a_private_write_to_a_read_only_slot(flagged: Flagged, first: str) -> None:
    """The write is exit 38, private, without the data; reads work, and the page does not change."""
    guest, at = flagged.guest, GPA + 7 * PAGE
    flagged.bind(0)
    guest.write(at, b"before")
    flagged.rebind(READONLY)
    if first == "read":  # so that there is a mapping
        assert guest.read(at, 6) == b"before"
    value = b"\xde\xc0\xad\xde\xef\xbe\xaf\x1d"
    expected = MemoryFaultExit(ExitReason.MEMORY_FAULT_V9, at, PAGE, True, 1, 0, "restrictedmem")
    with pytest.raises(GuestExit) as stopped:
        guest.store(at + 8, 8, int.from_bytes(value, "little"))
    for again in (False, True):
        if again:
            with pytest.raises(GuestExit) as stopped:
                guest.resume()
        assert stopped.value.exit == expected
        page = bytes(k.ffi.buffer(guest.vcpu.kvm_run))
        assert value not in page, "the exit does not have the data of a private write"
        assert value[:4] not in page
    assert flagged.memory.read(0, flagged.memory.size) == bytes(flagged.memory.size)
    # Where the slot may be written, the guest goes on as if nothing had been.
    flagged.rebind(0)
    guest.resume()
    assert guest.read(at, 16) == b"before\0\0" + value


@rule("v9.readonly.shared-write")
@only("restrictedmem")
def test_a_shared_write_to_a_read_only_slot(flagged: Flagged) -> None:
    """The write is MMIO with the data; reads work, and the host's page does not change."""
    guest, at = flagged.guest, GPA + 7 * PAGE
    flagged.bind(READONLY)
    flagged.memory.write(MEMORY_OFFSET + 7 * PAGE, b"before")
    flagged.rig.convert(at, PAGE, private=False)
    assert guest.read(at, 6) == b"before"
    with pytest.raises(GuestExit) as stopped:
        guest.store(at, 4, 0x12345678)
    assert stopped.value.exit == MmioExit(ExitReason.MMIO, True, at, 4, b"\x78\x56\x34\x12")
    guest.resume()
    assert guest.read(at, 6) == b"before"
    assert flagged.memory.read(MEMORY_OFFSET + 7 * PAGE, 6) == b"before"


@rule("v9.readonly.shared-write")
@only("restrictedmem")
def test_a_shared_write_where_there_is_no_memory(flagged: Flagged) -> None:
    """The write is MMIO too, as KVM does not look for memory; a read finds that there is none."""
    rig, guest, at = flagged.rig, flagged.guest, GPA + 7 * PAGE
    rig.abi.bind(rig.vm, GPA, SIZE, flagged.file, flags=READONLY)
    rig.convert(at, PAGE, private=False)
    with pytest.raises(GuestExit) as stopped:
        guest.store(at, 4, 0x12345678)
    assert stopped.value.exit == MmioExit(ExitReason.MMIO, True, at, 4, b"\x78\x56\x34\x12")
    guest.resume()
    with pytest.raises(OSError, match="KVM_RUN") as failed:
        guest.load(at, 4)
    assert failed.value.errno == errno.EFAULT


@rule("gm.readonly", "gm.dirty-log")
@only("guest_memfd")
@pytest.mark.parametrize("flags", [LOG, READONLY, LOG | READONLY])
def test_guest_memfd_takes_no_flags(flagged: Flagged, flags: int) -> None:
    """LOG_DIRTY_PAGES and READONLY are EINVAL with GUEST_MEMFD, and can't be added later."""
    assert answer(lambda: flagged.bind(flags)) == "EINVAL"
    flagged.bind(0)
    assert answer(lambda: flagged.bind(flags)) == "EINVAL"
    said = answer(
        lambda: flagged.rig.vm.set_user_memory_region(
            3, GPA, SIZE, flagged.memory.userspace_addr + MEMORY_OFFSET, flags
        )
    )
    assert said == "EINVAL"
    flagged.guest.write(GPA, b"works")
    assert flagged.guest.read(GPA, 5) == b"works"


# -- the dirty log ---------------------------------------------------------------------------------


def pages_of(bitmap: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}


WRITTEN = {0, 1, 5, 63, 64, 127, 128, PAGES - 1}


@rule("v9.dirty-log.private", "v9.dirty-log.reads")
@only("restrictedmem")
@pytest.mark.parametrize("kind", ["private", "ordinary"])
def test_dirty_log(flagged: Flagged, kind: str) -> None:
    """The log has each page that was written since the last call, as for an ordinary slot.

    KVM maps a page that is read as writable, and the log counts it once as written.
    """
    guest, vm = flagged.guest, flagged.rig.vm
    if kind == "private":
        flagged.bind(LOG)
    else:
        flagged.memory.write(0, b"\1" * flagged.memory.size)  # no pages of zeros, mapped to be read
        vm.map(flagged.memory, GPA, size=SIZE, offset=MEMORY_OFFSET, flags=LOG, slot=3)
    assert pages_of(vm.get_dirty_log(3)) == set()
    for number in WRITTEN:
        guest.store(GPA + number * PAGE, 8, number)
    assert pages_of(vm.get_dirty_log(3)) == WRITTEN
    assert pages_of(vm.get_dirty_log(3)) == set()
    guest.touch(GPA, PAGE, PAGES)
    assert pages_of(vm.get_dirty_log(3)) == set(range(PAGES)) - WRITTEN
    guest.touch(GPA, PAGE, PAGES)
    assert pages_of(vm.get_dirty_log(3)) == set()
    for number in (5, 6):
        guest.store(GPA + number * PAGE, 8, number)
    assert pages_of(vm.get_dirty_log(3)) == {5, 6}, "written again"


@rule("v9.dirty-log.converted", "v9.dirty-log.shared")
@only("restrictedmem")
def test_dirty_log_of_converted_pages(flagged: Flagged) -> None:
    """The log is kept by gfn, for both kinds of memory; a conversion does not mark pages."""
    guest, vm = flagged.guest, flagged.rig.vm
    flagged.bind(LOG)
    guest.touch(GPA, PAGE, PAGES, byte=1)
    assert len(pages_of(vm.get_dirty_log(3))) == PAGES
    for private in (False, True):
        flagged.rig.convert(GPA + 5 * PAGE, 4 * PAGE, private=private)
        assert pages_of(vm.get_dirty_log(3)) == set()
        guest.store(GPA + 6 * PAGE, 8, 1)
        guest.store(GPA + 9 * PAGE, 8, 1)
        assert pages_of(vm.get_dirty_log(3)) == {6, 9}
    assert flagged.memory.read(MEMORY_OFFSET + 6 * PAGE, 1) == b"\1"


@rule("v9.dirty-log.kvm-writes")
@only("restrictedmem")
def test_dirty_log_of_kvms_own_writes(flagged: Flagged) -> None:
    """KVM's own writes go to the shared side of a private page; the log has the page too."""
    guest, vm = flagged.guest, flagged.rig.vm
    flagged.bind(LOG)
    guest.fill(GPA, 0x5A, SIZE)
    assert len(pages_of(vm.get_dirty_log(3))) == PAGES
    guest.wrmsr(0x4B564D00, GPA + 7 * PAGE)  # MSR_KVM_WALL_CLOCK_NEW
    assert pages_of(vm.get_dirty_log(3)) == {7}
    assert guest.span(GPA, 0x5A, SIZE) == SIZE, "but no private page has changed"
    assert flagged.memory.read(MEMORY_OFFSET + 7 * PAGE, 4) != bytes(4)


@rule("v9.dirty-log.clear")
@only("restrictedmem")
def test_dirty_log_cleared_by_hand(flagged: Flagged) -> None:
    """With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 only KVM_CLEAR_DIRTY_LOG clears bits, by range."""
    guest, vm = flagged.guest, flagged.rig.vm
    if not vm.check_extension(k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2):
        missing("manual-dirty-log", "the log clears itself")
    vm.enable_cap(k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
    flagged.bind(LOG)
    written = {1, 63, 64, 70, PAGES - 1}
    for number in written:
        guest.store(GPA + number * PAGE, 8, number)
    for _ in range(2):
        assert pages_of(vm.get_dirty_log(3)) == written
    bitmap = k.ffi.new("unsigned char[]", bytes([0xFF] * 8))
    clear = k.ffi.new("struct kvm_clear_dirty_log *")
    clear.slot, clear.first_page, clear.num_pages, clear.dirty_bitmap = 3, 64, 64, bitmap
    vm.ioctl(k.KVM_CLEAR_DIRTY_LOG, clear)
    assert pages_of(vm.get_dirty_log(3)) == written - {64, 70}
    guest.store(GPA + 70 * PAGE, 8, 0)
    assert pages_of(vm.get_dirty_log(3)) == written - {64}


@rule("v9.dirty-log.small-pages")
@only("restrictedmem")
def test_dirty_log_by_small_pages(rig: Rig) -> None:
    """A slot with a dirty log is mapped with 4 KiB pages only, so that a bit is a page."""
    gpa = 8 * GIB
    memory, start = rig.large_memory(LARGE)
    with huge_pages():
        file = rig.file(LARGE)
        slot = rig.bind(gpa, LARGE, file, memory=memory, memory_offset=start)
        rig.guest.fill(gpa, 1, LARGE)
        if not rig.mapped()[1]:
            missing("huge-pages", "shmem_enabled=always, and no large page came of it")
        slot.delete()
        assert rig.mapped()[1] == 0
        number = rig.bind(gpa, LARGE, file, memory=memory, memory_offset=start, flags=LOG).slot
        for page in (3, 300):
            rig.guest.store(gpa + page * PAGE, 1, 2)
        assert rig.mapped()[1] == 0
        assert pages_of(rig.vm.get_dirty_log(number)) == {3, 300}
        assert rig.guest.span(gpa, 1, LARGE) == 3 * PAGE


# -- the other address space: what system management mode sees ------------------------------------

KVM_SMI = 0xAEB7  # _IO(KVMIO, 0xb7)
SMRAM, SMM_PORT = 0x30000, 0x77
SECOND = 1 << 16
WHERE = GIB + 3 * PAGE


class SmmMonitor:
    """At each SMI it sends the word at WHERE, as that mode sees it, and writes another there."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        memory = rig.memory(16 * PAGE)
        code = b"".join(
            (
                b"\x66\xbb" + struct.pack("<I", WHERE),  # mov $WHERE, %ebx
                b"\x67\x66\x8b\x03",  # mov (%ebx), %eax
                b"\x66\xe7" + bytes([SMM_PORT]),  # out %eax, $SMM_PORT
                b"\x67\x66\xc7\x03SMM!",  # movl $…, (%ebx)
                b"\x0f\xaa",  # rsm
            )
        )
        memory.write(0x8000, code)
        rig.vm.map(memory, SMRAM, slot=SECOND | 1)

    def interrupt(self) -> bytes:
        """What was at WHERE."""
        guest, heard = self.rig.guest, []

        def serve(_: object, exit_: Any) -> bool:
            heard.append(exit_)
            return isinstance(exit_, IoExit) and exit_.port == SMM_PORT

        guest.serve = serve
        guest.vcpu.ioctl(KVM_SMI)
        guest.rdtsc()
        guest.serve = None
        (exit_,) = heard
        return bytes(exit_.data)


@rule("v9.address-space.slots", "v9.address-space.convert", "v9.address-space.holes")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
@only("restrictedmem")
def test_two_address_spaces(rig: Rig) -> None:
    """Each space has a private slot at the same gpa with its own memory; a conversion is for both.

    A hole affects the slots of its file.
    """
    vm, guest = rig.vm, rig.guest
    if vm.check_extension(k.KVM_CAP_MULTI_ADDRESS_SPACE) != 2 or not vm.check_extension(
        k.KVM_CAP_X86_SMM
    ):
        missing("second-address-space", "KVM has no system management mode")

    def lay(number: int, offset: int, content: bytes) -> tuple[PrivateFile, HostMemory]:
        file, memory = rig.file(64 * PAGE), rig.memory(64 * PAGE)
        memory.write(offset + PAGE, content)
        rig.bind(
            WHERE, 4 * PAGE, file, offset, memory=memory, memory_offset=offset + PAGE, slot=number
        )
        return file, memory

    file0, memory0 = lay(5, 7 * PAGE, b"hst0")
    file1, memory1 = lay(SECOND | 5, 9 * PAGE, b"hst1")
    monitor = SmmMonitor(rig)
    guest.write(WHERE, b"mine")
    assert monitor.interrupt() == bytes(4), "not what the guest has written"
    assert monitor.interrupt() == b"SMM!", "but what the monitor has"
    assert guest.read(WHERE, 4) == b"mine"
    assert (memory0.read(8 * PAGE, 4), memory1.read(10 * PAGE, 4)) == (b"hst0", b"hst1")

    rig.convert(WHERE, PAGE, private=False)
    assert guest.read(WHERE, 4) == b"hst0"
    assert monitor.interrupt() == b"hst1"
    assert memory1.read(10 * PAGE, 4) == b"SMM!"
    guest.write(WHERE, b"both")
    assert (memory0.read(8 * PAGE, 4), memory1.read(10 * PAGE, 4)) == (b"both", b"SMM!")

    rig.convert(WHERE, PAGE, private=True)
    assert guest.read(WHERE, 4) == b"mine"
    file1.punch_hole(7 * PAGE, PAGE)  # where the other slot's page would be
    assert (guest.read(WHERE, 4), monitor.interrupt()) == (b"mine", b"SMM!")
    file1.punch_hole(9 * PAGE, PAGE)
    assert (guest.read(WHERE, 4), monitor.interrupt()) == (b"mine", bytes(4))
    file0.punch_hole(7 * PAGE, PAGE)
    assert (guest.read(WHERE, 4), monitor.interrupt()) == (bytes(4), b"SMM!")


@rule("v9.address-space.overlap", "v9.address-space.delete")
@only("restrictedmem")
def test_slots_of_two_address_spaces(rig: Rig) -> None:
    """The same guest range and file range may be in both; EEXIST applies within one."""
    if rig.vm.check_extension(k.KVM_CAP_MULTI_ADDRESS_SPACE) != 2:
        missing("second-address-space", "KVM_CAP_MULTI_ADDRESS_SPACE is not 2")
    file = rig.file(4 * PAGE)
    one = rig.bind(WHERE, PAGE, file, 0, slot=5)
    other = rig.bind(WHERE, PAGE, file, 0, slot=SECOND | 5)
    for number in (6, SECOND | 6):
        assert answer(lambda slot=number: rig.bind(WHERE, PAGE, file, 0, slot=slot)) == "EEXIST"
    assert answer(lambda: rig.bind(WHERE, PAGE, file, 0, slot=2 * SECOND | 6)) == "EINVAL"
    rig.guest.write(WHERE, b"works")
    other.delete()
    assert rig.guest.read(WHERE, 5) == b"works", (
        "only the slot of the other address space was deleted"
    )
    rig.bind(WHERE, PAGE, file, 0, slot=SECOND | 6).delete()
    one.delete()
    with pytest.raises(GuestExit) as stopped:
        rig.guest.load(WHERE, 4)
    assert stopped.value.exit == MmioExit(ExitReason.MMIO, False, WHERE, 4, b"")


@rule("gm.address-space")
@only("guest_memfd")
def test_guest_memfd_has_one_address_space(rig: Rig) -> None:
    """A VM with private memory has no second address space: its slots are EINVAL."""
    assert rig.vm.check_extension(k.KVM_CAP_MULTI_ADDRESS_SPACE) == 1
    file, memory = rig.file(4 * PAGE), rig.memory(4 * PAGE)
    assert answer(lambda: rig.bind(WHERE, PAGE, file, 0, slot=SECOND | 5)) == "EINVAL"
    assert answer(lambda: rig.vm.map(memory, WHERE, slot=SECOND | 5)) == "EINVAL"
    rig.bind(WHERE, PAGE, file, 0, slot=5)
