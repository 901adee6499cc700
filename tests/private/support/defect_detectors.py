"""Detectors for the known defects of v9, one per defect; each of them finds only its own.

A detector that is not marked dangerous does no harm to a kernel with the defect: it frees no page
that a guest has mapped, and writes nothing outside the guest's memory.  It observes the defect
indirectly: in KVM's counters, in an unrelated mapping that is lost, in a time limit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.exits import MemoryFaultExit
from kvmpriv.guest.puppet import GuestExit, Puppet
from kvmpriv.private import ABIS, PrivateSlot, PrivateVm
from kvmpriv.private.restrictedmem import RestrictedMem
from kvmpriv.selftest.kernel_log import KernelLog

from . import ordinary
from .accounting import BIG, meminfo
from .arch_hook import hook
from .defects import DEFECTS
from .fault_injection import failing_allocations
from .kernels import need_kernel_symbol, need_shadow_mmu
from .large_pages import huge_pages, need_large_pages, shmem_huge_pages
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
        """Whether `change` unmaps any of the 8 pages of the slot from page `first` on.

        One page is enough: the shadow MMU walks its rmaps, and unmaps the first page alone where
        the end of the range has wrapped.
        """
        self.guest.touch(GPA + first * PAGE, PAGE, 8)
        before = self.mapped_pages()
        assert before >= 8
        change()
        return self.mapped_pages() < before


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
    """Far up in the file: the kernel subtracts the slot's offset from a gfn, which must be less."""
    offset = 3 * GPA
    with detector_rig() as b:
        b.bind_at_gpa(MIB, offset=offset)
        if b.loses_mappings(lambda: b.unsized.punch_hole(0, PAGE)):
            return f"a hole in page 0 of the file unmapped a slot that begins at {offset:#x}"
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


@cache
def _shared_after_failure() -> tuple[bool, ...]:
    """Which of 65 pages are shared after their conversion to shared has failed.

    The first 64 of them are in a node of the xarray that exists already.  Every other page from 5
    to 43 is shared before, so that a kernel that keeps ranges needs memory, too.
    """
    count = 65
    with detector_rig() as b, HostMemory(MIB) as memory:
        for page in range(count):
            memory.write(page * PAGE, b"shared")
        for page in range(5, 45, 2):
            b.convert(GPA + page * PAGE, PAGE, private=False)
        region = k.ffi.new("struct kvm_enc_region *", (GPA, count * PAGE))
        with failing_allocations():
            errno = b.vm.ioctl_errno(k.KVM_MEMORY_ENCRYPT_UNREG_REGION, region)
        if not errno:
            missing("fault-injection", "the conversion succeeds although every allocation fails")
        assert errno_of(errno) == "ENOMEM"
        b.bind_at_gpa(MIB, memory=memory)
        return tuple(b.guest.read(GPA + page * PAGE, 6) == b"shared" for page in range(count))


@_detects("failed-conversion-erases")
def _erases() -> str | None:
    if not all(_shared_after_failure()[5:45:2]):
        return "after ENOMEM, pages that had been shared were private"
    return None


@_detects("failed-conversion-keeps-first")
def _keeps_first() -> str | None:
    if _shared_after_failure()[0]:
        return "after ENOMEM, the first page of the range was shared"
    return None


@_detects("conversion-sleeps")
def _sleeps() -> str | None:
    """Observed in the log of a kernel with CONFIG_DEBUG_ATOMIC_SLEEP.

    Allocations that may not wait fail, so that the kernel makes one that may.
    """
    need_kernel_symbol("__might_sleep", "atomic-sleep")
    with KernelLog() as log, detector_rig() as b:
        b.convert(GPA, PAGE, private=False)
        log.mark()
        with failing_allocations(**{"ignore-gfp-wait": "Y"}):
            for page in range(2, 4096, 64):
                b.convert(GPA + page * PAGE, PAGE, private=False)
        seen = [line for line in log.complaints() if "sleeping function called" in line]
    return seen[0] if seen else None


@_detects("kind-read-twice")
def _read_twice() -> str | None:
    """A guest that has stated nothing accesses each page as what it is: no access is a fault.

    It accesses so many pages that a fault is under way at almost each conversion.
    """
    with detector_rig(cpus=2) as b, HostMemory(MIB) as memory:
        b.bind_at_gpa(MIB, memory=memory)
        other = b.guest.cpus[1]
        other.serve = lambda _cpu, exit_: isinstance(exit_, MemoryFaultExit)  # run it again
        with beside(lambda: other.touch(GPA, PAGE, MIB // PAGE)) as touched:
            for turn in rounds(20000, seconds=8, least=5000, until=lambda: touched[0] > 0):
                b.convert(GPA, MIB, private=bool(turn % 2))
                if other.exits:
                    break
        return f"{other.exits[0]} after {turn + 1} conversions" if other.exits else None


@_detects("far-conversion")
def _far() -> str | None:
    """Passes unless the kernel crashes or complains: the defect has no other effect."""
    for turn in range(4):
        with detector_rig() as b, HostMemory(16 * PAGE) as memory:
            if turn % 2:  # ordinary slots have the arrays, too
                b.vm.map(memory, GPA)
            else:
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


@_detects("large-page-misplaced")
def _misplaced() -> str | None:
    """Guest and host range are alike, 1 MiB into a large page, and the file's range is at 0."""
    with huge_pages(), detector_rig() as b, HostMemory(4 * LARGE) as memory:
        start = -memory.userspace_addr % LARGE + MIB
        before = shmem_huge_pages()
        b.abi.bind(b.vm, GPA + MIB, 2 * LARGE, b.unsized, memory=memory, memory_offset=start)
        b.guest.store(GPA + MIB, 8, 1)
        if shmem_huge_pages() - before < LARGE:
            missing("huge-pages", "the kernel has none for the file")
        b.guest.store(GPA + LARGE, 8, 2)
        seen = b.guest.load(GPA + MIB, 8), b.guest.load(GPA + LARGE, 8)
    return None if seen == (1, 2) else f"two gfns with 1 and 2 have {seen[0]} and {seen[1]}"


@_detects("private-prefetch")
def _prefetch() -> str | None:
    """Fresh private pages have any content, but not what this process has just made up."""
    need_shadow_mmu()
    size = 16 * PAGE
    with detector_rig() as b, HostMemory(size) as memory:
        marks = [os.urandom(16) for _ in range(16)]
        for page, mark in enumerate(marks):
            memory.write(page * PAGE, mark)
        b.bind_at_gpa(size, memory=memory)
        b.guest.load(GPA + 8 * PAGE, 8)
        found = [n for n, mark in enumerate(marks) if b.guest.read(GPA + n * PAGE, 16) == mark]
    return f"{len(found)} of 16 private pages are those at userspace_addr" if found else None


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


@_detects("allocation-clears")
def _clears() -> str | None:
    """Of a large page the guest has used the last page alone, when pages are allocated again."""
    last, mark = GPA + LARGE - PAGE, os.urandom(16)
    with huge_pages(), detector_rig() as b:
        before = shmem_huge_pages()
        b.bind_at_gpa(LARGE)
        b.guest.write(last, mark)
        if shmem_huge_pages() - before < LARGE:
            missing("huge-pages", "the kernel has none for the file")
        assert b.guest.read(last, 16) == mark
        b.unsized.allocate(0, LARGE)
        seen = b.guest.read(last, 16)
    return None if seen == mark else f"the guest wrote {mark.hex()}, and then read {seen.hex()}"


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
    """Nothing shows while the freed memory is intact: only KASAN reports each access to it."""
    need_kernel_symbol("kasan_report", "kasan")
    with KernelLog() as log:
        log.mark()
        for _ in range(4):
            file = RestrictedMem()
            path = os.open(f"/proc/self/fd/{file.fileno()}", os.O_PATH)
            try:
                file.close()
                said = answer(functools.partial(os.truncate, f"/proc/self/fd/{path}", PAGE))
            finally:
                os.close(path)
            if said not in ("ok", "EPERM"):
                return f"truncate by it: {said}"
        seen = log.complaints()
    return seen[0] if seen else None


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


@_detects("slot-unprepared")
def _unprepared() -> str | None:
    """Passes unless the kernel crashes or complains: the defect has no other effect.

    The rmaps of a large slot take a while to be allocated.  The hole does not begin with the first
    page: the walk of the rmaps ends at a pointer that is NULL, and the first page's one would be.
    """
    need_shadow_mmu()
    with detector_rig() as b:
        slots = RestrictedSlots(b.vm, b.unsized, 0)
        where = {"restricted_offset": 0, "memory_size": GIB}
        made, gone = slots.struct(**where), slots.struct(memory_size=0)
        with beside(lambda: b.unsized.punch_hole(PAGE, PAGE)) as holes:
            for _ in rounds(300, until=lambda: holes[0] > 20):
                assert slots.set_at(address_of(made)) == "ok"
                assert slots.set_at(address_of(gone)) == "ok"
    return None


@_detects("invalidation-of-one-slot")
def _one_slot() -> str | None:
    """In a VM without private memory."""
    with Kvm() as kvm, kvm.create_vm() as vm, HostMemory(ordinary.SIZE) as memory:
        cpuid = kvm.get_supported_cpuid()
        with Puppet(vm, cpus=3, cpuid=cpuid) as guest:
            discard = functools.partial(memory.discard, 0, memory.size)
            return ordinary.stale_page(vm, guest, memory, discard) or None


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
