"""Detectors for the known defects of v9, one per defect; each of them finds only its own.

A detector that is not marked dangerous does no harm to a kernel with the defect: it frees no page
that a guest has mapped, and writes nothing outside the guest's memory.  It observes the defect
indirectly: in KVM's counters, in an unrelated mapping that is lost, in a time limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.guest.puppet import GuestExit
from kvmpriv.private import ABIS, PrivateSlot, PrivateVm
from kvmpriv.private.restrictedmem import RestrictedMem

from .accounting import BIG, meminfo
from .arch_hook import hook
from .defects import DEFECTS
from .fault_injection import failing_allocations
from .large_pages import huge_pages, need_large_pages
from .races import CpuTimeError, beside, rounds, within_cpu_time
from .requirements import missing
from .rig import LARGE, Rig
from .settings import write_setting
from .slot_requests import RestrictedSlots
from .syscalls import GIB, MIB, PAGE, address_of, answer, errno_of

__all__ = ["DETECTORS", "detect"]


GPA = 4 * GIB

#: Defect -> its detector, which returns what it observed, or None.
DETECTORS: dict[str, Callable[[], str | None]] = {}


def detect(name: str) -> str | None:
    """What the detector of a defect observes, or None; it runs once in a process."""
    return DETECTORS[name]()


def _detects(name: str) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    assert name in DEFECTS

    def note(function: Callable[[], str | None]) -> Callable[[], str | None]:
        DETECTORS[name] = cache(function)
        return function

    return note


class DetectorRig(Rig):
    """A v9 rig with a file that has no size."""

    def __init__(self, stack: ExitStack, vm: PrivateVm, kvm: Kvm, **how: Any) -> None:
        super().__init__(stack, vm, kvm, **how)
        self.unsized = stack.enter_context(RestrictedMem())

    def bind_at_gpa(
        self, size: int, offset: int = 0, memory: HostMemory | None = None, flags: int = 0
    ) -> PrivateSlot:
        """Make a slot of the file at GPA; all of it is private, as v9 has it at first."""
        return self.abi.bind(self.vm, GPA, size, self.unsized, offset, memory=memory, flags=flags)

    def loses_mappings(self, change: Callable[[], object], first: int = 0) -> bool:
        """Whether `change` unmaps the 8 pages of the slot from page `first` on."""
        self.guest.touch(GPA + first * PAGE, PAGE, 8)
        before = self.mapped_pages()
        assert before >= 8
        change()
        return self.mapped_pages() <= before - 8  # the puppet's own slot has fewer pages


@contextmanager
def detector_rig(cpus: int = 1) -> Iterator[DetectorRig]:
    """A rig that a detector uses alone."""
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        with hook(on=True):
            vm = stack.enter_context(ABIS["restrictedmem"].create_vm(kvm))
        yield DetectorRig(stack, vm, kvm, cpus=cpus)


# -- notifications of the file --------------------------------------------------------------------


@_detects("notified-in-bytes")
def _in_bytes() -> str | None:
    """A hole at byte 4096 does not belong to page 4096."""
    with detector_rig() as b:
        b.bind_at_gpa(32 * MIB)
        if b.loses_mappings(lambda: b.unsized.punch_hole(PAGE, PAGE), first=5000):
            return "a hole in page 1 unmapped page 5000"
    return None


@_detects("allocation-notified")
def _allocation() -> str | None:
    with detector_rig() as b:
        b.bind_at_gpa(MIB)
        if b.loses_mappings(lambda: b.unsized.allocate(0, 8 * PAGE)):
            return "allocating pages again unmapped them"
    return None


@_detects("hole-before-binding")
def _before_binding() -> str | None:
    with detector_rig() as b:
        b.bind_at_gpa(MIB, offset=64 * MIB)
        if b.loses_mappings(lambda: b.unsized.punch_hole(0, PAGE)):
            return "a hole in page 0 of the file unmapped a slot that begins at 64 MiB"
    return None


@_detects("size-0-frees")
def _size_0() -> str | None:
    """Observed in the slot's shared pages: a hole unmaps them too, and they are not freed."""
    with detector_rig() as b, HostMemory(MIB) as memory:
        b.bind_at_gpa(MIB, memory=memory)
        b.convert(GPA, MIB, private=False)
        if not b.loses_mappings(lambda: b.unsized.punch_hole(0, MIB)):
            missing(
                "shared-pages-unmapped",
                "on this kernel a hole leaves the slot's shared pages mapped",
            )
        if not b.loses_mappings(lambda: b.unsized.ftruncate(0)):
            return "ftruncate unmapped nothing"
    return None


# -- conversion ----------------------------------------------------------------------------------


@_detects("conversion-by-page")
def _by_page() -> str | None:
    """Observed in the growth of the kernel's slab; the 4 GiB have no slot."""
    with detector_rig() as b:
        before = meminfo("Slab")
        b.convert(GPA, 4 * GIB, private=False)
        grown = meminfo("Slab") - before
    return f"4 GiB took {grown // 1024} KiB" if grown > 3 * MIB else None


@_detects("failed-conversion-erases")
def _erases() -> str | None:
    """Convert 65 pages: the first 64 of them are in a node of the xarray that exists already.

    Every other page of the first is shared, so that a kernel that keeps ranges needs memory, too.
    """
    with detector_rig() as b, HostMemory(MIB) as memory:
        memory.write(5 * PAGE, b"shared")
        for page in range(5, 45, 2):
            b.convert(GPA + page * PAGE, PAGE, private=False)
        region = k.ffi.new("struct kvm_enc_region *", (GPA, 65 * PAGE))
        with failing_allocations():
            errno = b.vm.ioctl_errno(k.KVM_MEMORY_ENCRYPT_UNREG_REGION, region)
        if not errno:
            missing("fault-injection", "the conversion succeeds although every allocation fails")
        assert errno_of(errno) == "ENOMEM"
        b.bind_at_gpa(MIB, memory=memory)
        if b.guest.read(GPA + 5 * PAGE, 6) != b"shared":
            return "after ENOMEM, a page that had been shared was private"
    return None


@_detects("far-conversion")
def _far() -> str | None:
    """Passes unless the kernel crashes or complains: the defect has no other effect."""
    for _ in range(4):
        with detector_rig() as b:
            b.bind_at_gpa(2 * MIB)
            b.convert(GPA, 6 * GIB, private=False)
    return None


@_detects("mixed-large-page")
def _mixed() -> str | None:
    with huge_pages(), detector_rig() as b, HostMemory(2 * LARGE) as memory:
        start = -memory.userspace_addr % LARGE  # else the slot can't have large pages
        b.abi.bind(b.vm, GPA, LARGE, b.unsized, memory=memory, memory_offset=start)
        b.guest.fill(GPA, 0x5A, LARGE)
        need_large_pages(b)
        memory.write(start, b"shared")
        b.convert(GPA, PAGE, private=False)
        b.guest.load(GPA + PAGE, 8)
        if b.guest.read(GPA, 6) != b"shared":
            return "the guest read private memory in a shared page of a large one"
    return None


# -- pages that can't be allocated or written ------------------------------------------------------


@_detects("no-page-spins")
def _no_page() -> str | None:
    """An offset at which no file can have a page."""
    with detector_rig() as b:
        b.bind_at_gpa(MIB, offset=1 << 63)
        return _spins(b, lambda: b.guest.read(GPA, 1))


@_detects("read-only-spins")
def _read_only() -> str | None:
    with detector_rig() as b:
        b.bind_at_gpa(MIB, flags=k.KVM_MEM_READONLY)
        b.guest.load(GPA, 4)
        return _spins(b, lambda: b.guest.store(GPA, 4, 0x12345678))


def _spins(b: DetectorRig, access: Callable[[], object]) -> str | None:
    try:
        with within_cpu_time(3):
            access()
    except CpuTimeError:
        b.guest.reset()
        return "KVM_RUN had not ended after 3 s of CPU time"
    except (OSError, GuestExit):
        b.guest.reset()
    return None


@_detects("private-fault-without-file")
def _without_file() -> str | None:
    with detector_rig() as b, HostMemory(MIB) as memory:
        b.vm.map(memory, GPA)
        memory.write(0, b"plain")
        b.guest.hypercall(k.KVM_HC_MAP_GPA_RANGE, GPA, 1, rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE)
        seen = b.guest.read(GPA, 5)
        return None if seen == b"plain" else f"the guest read {seen!r} in an ordinary slot"


# -- content and place of pages ---------------------------------------------------------


@_detects("pages-not-zeroed")
def _not_zeroed() -> str | None:
    size = 16 * MIB
    with detector_rig() as b:
        b.bind_at_gpa(size)
        with HostMemory(4 * size) as secrets:
            secrets.write(0, b"\xa5" * secrets.size)
        b.unsized.allocate(size // 2, size // 2)
        found = b.guest.span(GPA, 0, size)
    return None if found == size else f"something else than 0 in page {found // PAGE}"


@_detects("pages-migrate")
def _migrate() -> str | None:
    """Observed for unmapped pages in /proc/kpageflags."""
    pages = 4096
    with RestrictedMem() as file, HostMemory(64 * MIB) as memory:
        file.allocate(0, pages * PAGE)
        # Compaction moves pages into memory that is partly in use.
        memory.write(0, bytes(memory.size))
        for start in range(0, memory.size, 2 * MIB):
            memory.discard(start, MIB)
        before = unevictable_pages()
        write_setting("/proc/sys/vm/compact_memory", "1", "compaction")
        after = unevictable_pages()
    assert before.count(1) >= pages
    old, new = (int.from_bytes(one, "little") for one in (before, after))
    moved = (old & ~new).bit_count()
    return f"{moved} of {pages} pages are elsewhere" if moved > pages // 100 else None


def unevictable_pages() -> bytes:
    """A byte for each page frame: 1 if it is unevictable."""
    flags = b""
    try:
        with Path("/proc/kpageflags").open("rb", buffering=0) as file:  # takes whole words only
            while more := file.read(MIB):
                flags += more
    except OSError as error:
        missing("page-flags", str(error))
    # KPF_UNEVICTABLE is bit 18 of 64.
    return flags[2::8].translate(bytes(value >> 2 & 1 for value in range(256)))


@_detects("drop-caches")
def _drop_caches() -> str | None:
    """Pages that the guest has only read, in a read-only slot, so that they are not dirty."""
    with detector_rig() as b:
        before = meminfo("Unevictable")
        slot = b.bind_at_gpa(BIG, flags=k.KVM_MEM_READONLY)
        b.guest.touch(GPA, PAGE, BIG // PAGE)
        slot.delete()
        have = meminfo("Unevictable") - before
        assert have > BIG // 2
        write_setting("/proc/sys/vm/drop_caches", "1", "drop-caches")
        left = meminfo("Unevictable") - before
    return f"{left // MIB} MiB of {have // MIB} are left" if left < have // 2 else None


@_detects("split-loses-pages")
def _split() -> str | None:
    with huge_pages(), detector_rig() as b:
        before = meminfo("Unevictable")
        slot = b.bind_at_gpa(BIG)
        b.guest.touch(GPA, PAGE, BIG // PAGE, byte=1)
        need_large_pages(b)
        slot.delete()
        have = meminfo("Unevictable") - before
        assert have > BIG // 2
        for start in range(0, BIG, LARGE):
            b.unsized.punch_hole(start, PAGE)
        left = meminfo("Unevictable") - before
    return f"{left // MIB} MiB of {have // MIB} are left" if left < have // 2 else None


# -- references and their lifetimes ----------------------------------------------------


@_detects("fstat")
def _fstat() -> str | None:
    with RestrictedMem() as file:
        file.ftruncate(16 * PAGE)
        file.allocate(0, 8 * PAGE)
        found = os.fstat(file.fileno())
        seen = found.st_size, found.st_blocks * 512
    return None if seen == (16 * PAGE, 8 * PAGE) else f"(size, allocated) is {seen}"


@_detects("private-flag-cleared")
def _flag_cleared() -> str | None:
    with detector_rig() as b:
        slots = RestrictedSlots(b.vm, b.unsized, 0)
        for change in ({}, {"guest_phys_addr": 5 * GIB}):
            assert slots.set() == "ok"
            said = slots.set(flags=0, **change)
            assert slots.delete(flags=0) == "ok"
            b.unsized.punch_hole(0, 64 * PAGE)
            if said != "EINVAL":
                return f"flags 0 for a private slot: {said}"
    return None


@_detects("path-outlives-file")
def _path() -> str | None:
    file = RestrictedMem()
    path = os.open(f"/proc/self/fd/{file.fileno()}", os.O_PATH)
    try:
        file.close()
        said = answer(lambda: os.truncate(f"/proc/self/fd/{path}", PAGE))
    finally:
        os.close(path)
    return None if said in ("ok", "EPERM") else f"truncate by it: {said}"


# -- races ---------------------------------------------------------------------------------------


@_detects("notifiers-unlocked")
def _unlocked() -> str | None:
    with detector_rig() as b, HostMemory(MIB) as memory:
        slots = RestrictedSlots(b.vm, b.unsized, memory.userspace_addr)
        made, gone = slots.struct(restricted_offset=0), slots.struct(memory_size=0)

        def change() -> None:
            b.unsized.allocate(0, MIB)
            b.unsized.punch_hole(0, MIB)

        with beside(change) as holes:
            for _ in rounds(1000):
                assert slots.set_at(address_of(made)) == "ok"
                memory.discard(0, PAGE)  # an MMU notifier
                assert slots.set_at(address_of(gone)) == "ok"
        assert holes[0] > 0
        b.bind_at_gpa(MIB)
        return _spins(b, lambda: b.guest.load(GPA, 8))


@_detects("vm-closed-during-hole")
def _vm_closed() -> str | None:
    """Passes unless the kernel crashes or complains: the defect has no other effect."""
    with RestrictedMem() as file:
        file.allocate(0, MIB)
        with beside(lambda: file.punch_hole(0, MIB)) as holes:
            for _ in rounds(100):
                with hook(on=True), Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu():
                    assert RestrictedSlots(vm, file, 0).set(restricted_offset=0) == "ok"
        assert holes[0] > 0
    return None


@_detects("fault-beside-hole")
def _beside_hole() -> str | None:
    with huge_pages(), detector_rig(cpus=2) as b:
        b.bind_at_gpa(LARGE)
        b.guest.store(GPA, 8, 1)
        need_large_pages(b)
        other = b.guest.cpus[1]
        with beside(lambda: other.touch(GPA + LARGE // 2, PAGE, 16)) as touched:
            for turn in rounds(200):
                b.guest.store(GPA, 8, turn + 1)
                b.unsized.punch_hole(0, PAGE)
                seen = b.guest.load(GPA, 8)
                if seen:
                    return f"after hole {turn} the guest read {seen} in it"
                b.unsized.punch_hole(0, LARGE)
        assert touched[0] > 0
    return None
