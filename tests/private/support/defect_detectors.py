"""Looking for the known defects of v9, one by one, in ways that tell them apart.

Those that are not marked dangerous do no harm to a kernel that has the defect: no page is freed
that a guest has mapped, nothing is written where it should not be.  They are found where they
show by the way, in counters, in the wrong mapping taken, in a limit met.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from kvmpriv import HostMemory, Kvm, Vm
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.guest.puppet import GuestExit, Puppet
from kvmpriv.private import ABIS, PrivateSlot
from kvmpriv.private.restrictedmem import RestrictedMem

from .accounting import BIG, meminfo
from .arch_hook import hook
from .defects import DEFECTS
from .fault_injection import failing_allocations
from .races import CpuTimeError, beside, rounds, within_cpu_time
from .requirements import missing
from .slot_requests import RestrictedSlots
from .syscalls import GIB, MIB, PAGE, address_of, answer, errno_of

__all__ = ["LOOKS", "huge_pages", "look_for", "mapped"]

_ABI = ABIS["restrictedmem"]

GPA = 4 * GIB
LARGE = 2 * MIB

#: By the defect's name: what was seen of it, or None.
LOOKS: dict[str, Callable[[], str | None]] = {}


def look_for(name: str) -> str | None:
    """What is seen of a defect, or None: looked for once."""
    return LOOKS[name]()


def _look(name: str) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    assert name in DEFECTS

    def note(function: Callable[[], str | None]) -> Callable[[], str | None]:
        LOOKS[name] = cache(function)
        return function

    return note


class Bench:
    """A VM with private memory, a file without a size, a puppet, and no slot for the file."""

    def __init__(self, stack: ExitStack, cpus: int = 1) -> None:
        kvm = stack.enter_context(Kvm())
        with hook(on=True):
            self.vm = stack.enter_context(_ABI.create_vm(kvm))
        self.file = stack.enter_context(RestrictedMem())
        self.guest = stack.enter_context(
            Puppet(self.vm, cpus=cpus, cpuid=kvm.get_supported_cpuid(), serve_conversions=False)
        )

    def bind(
        self, size: int, offset: int = 0, memory: HostMemory | None = None, flags: int = 0
    ) -> PrivateSlot:
        return _ABI.bind(self.vm, GPA, size, self.file, offset, memory=memory, flags=flags)

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        _ABI.convert(self.vm, gpa, size, private=private, keep=True)

    def loses_mappings(self, change: Callable[[], object], first: int = 0) -> bool:
        """Whether `change` unmaps 8 pages, from page `first` of the slot on."""
        self.guest.touch(GPA + first * PAGE, PAGE, 8)
        before = mapped(self.vm)
        assert before >= 8
        change()
        return mapped(self.vm) <= before - 8  # the puppet's home has fewer, which may go anyhow


@contextmanager
def bench(cpus: int = 1) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack, cpus)


def mapped(vm: Vm) -> int:
    """How many pages the guest has mapped: KVM's own count."""
    with vm.get_stats_fd() as stats:
        counts = stats.read()
    small, large = counts["pages_4k"], counts["pages_2m"]
    assert isinstance(small, int)
    assert isinstance(large, int)
    return small + 512 * large


def write_setting(path: str, value: str, name: str) -> None:
    """Write a setting of the system's; `name` is missing where that can't be done."""
    try:
        Path(path).write_text(value)
    except OSError as error:
        missing(name, str(error))


@contextmanager
def huge_pages() -> Iterator[None]:
    """Files get large pages inside, where there are any to be had."""
    setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    try:
        before = Path(setting).read_text().split("[")[1].split("]")[0]
    except OSError as error:
        missing("huge pages", str(error))
    write_setting(setting, "always", "huge pages")
    try:
        yield
    finally:
        Path(setting).write_text(before)


# -- what the notifier is told -------------------------------------------------------------------


@_look("notified-in-bytes")
def _in_bytes() -> str | None:
    """A hole at byte 4096, which has no part in page 4096."""
    with bench() as b:
        b.bind(32 * MIB)
        if b.loses_mappings(lambda: b.file.punch_hole(PAGE, PAGE), first=5000):
            return "a hole in page 1 took mappings of page 5000"
    return None


@_look("allocation-notified")
def _allocation() -> str | None:
    with bench() as b:
        b.bind(MIB)
        if b.loses_mappings(lambda: b.file.allocate(0, 8 * PAGE)):
            return "mappings of allocated pages are gone after they were allocated again"
    return None


@_look("hole-before-binding")
def _before_binding() -> str | None:
    with bench() as b:
        b.bind(MIB, offset=64 * MIB)
        if b.loses_mappings(lambda: b.file.punch_hole(0, PAGE)):
            return "a hole in page 0 of the file unmapped a slot that begins at 64 MiB"
    return None


@_look("size-0-frees")
def _size_0() -> str | None:
    """Shared pages of the slot are looked at: they are unmapped along, and can't be freed."""
    with bench() as b, HostMemory(MIB) as memory:
        b.bind(MIB, memory=memory)
        b.convert(GPA, MIB, private=False)
        if not b.loses_mappings(lambda: b.file.punch_hole(0, MIB)):
            missing("shared pages unmapped", "a hole leaves the slot's shared pages mapped here")
        if not b.loses_mappings(lambda: b.file.ftruncate(0)):
            return "nothing was unmapped"
    return None


# -- conversion ----------------------------------------------------------------------------------


@_look("conversion-by-page")
def _by_page() -> str | None:
    """Seen in what the kernel's own memory grows by: no page of 4 GiB is in a slot."""
    with bench() as b:
        before = meminfo("Slab")
        b.convert(GPA, 4 * GIB, private=False)
        grown = meminfo("Slab") - before
    return f"4 GiB took {grown // 1024} KiB" if grown > 3 * MIB else None


@_look("failed-conversion-erases")
def _erases() -> str | None:
    """64 pages, which have their place in memory from the first one on, and then one more.

    Every other one of the first is shared: a kernel that keeps ranges needs memory to join them.
    """
    with bench() as b, HostMemory(MIB) as memory:
        memory.write(5 * PAGE, b"shared")
        for page in range(5, 45, 2):
            b.convert(GPA + page * PAGE, PAGE, private=False)
        region = k.ffi.new("struct kvm_enc_region *", (GPA, 65 * PAGE))
        with failing_allocations():
            errno = b.vm.ioctl_errno(k.KVM_MEMORY_ENCRYPT_UNREG_REGION, region)
        if not errno:
            missing("fault injection", "a conversion succeeds where no allocation was to")
        assert errno_of(errno) == "ENOMEM"
        b.bind(MIB, memory=memory)
        if b.guest.read(GPA + 5 * PAGE, 6) != b"shared":
            return "after ENOMEM, a page that had been shared was private"
    return None


@_look("far-conversion")
def _far() -> str | None:
    """Nothing can be seen of it but what becomes of the kernel."""
    for _ in range(4):
        with bench() as b:
            b.bind(2 * MIB)
            b.convert(GPA, 6 * GIB, private=False)
    return None


@_look("mixed-large-page")
def _mixed() -> str | None:
    with huge_pages(), bench() as b, HostMemory(2 * LARGE) as memory:
        start = -memory.userspace_addr % LARGE  # slots that lie unlike have no large pages
        _ABI.bind(b.vm, GPA, LARGE, b.file, memory=memory, memory_offset=start)
        b.guest.fill(GPA, 0x5A, LARGE)
        need_large_pages(b.vm)
        memory.write(start, b"shared")
        b.convert(GPA, PAGE, private=False)
        b.guest.load(GPA + PAGE, 8)
        if b.guest.read(GPA, 6) != b"shared":
            return "its first page is shared, and the guest read private memory there"
    return None


def need_large_pages(vm: Vm) -> None:
    """Skip where the guest has none mapped."""
    with vm.get_stats_fd() as stats:
        if not stats.read()["pages_2m"]:
            missing("huge pages", "shmem_enabled=always, and no large page came of it")


# -- pages that can't be had, or written to ------------------------------------------------------


@_look("no-page-spins")
def _no_page() -> str | None:
    """An offset for which no file has a page."""
    with bench() as b:
        b.bind(MIB, offset=1 << 63)
        return _spins(b, lambda: b.guest.read(GPA, 1))


@_look("read-only-spins")
def _read_only() -> str | None:
    with bench() as b:
        b.bind(MIB, flags=k.KVM_MEM_READONLY)
        b.guest.load(GPA, 4)
        return _spins(b, lambda: b.guest.store(GPA, 4, 0x12345678))


def _spins(b: Bench, access: Callable[[], object]) -> str | None:
    try:
        with within_cpu_time(3):
            access()
    except CpuTimeError:
        b.guest.reset()
        return "KVM_RUN had not ended after 3 s of CPU time"
    except (OSError, GuestExit):
        b.guest.reset()
    return None


@_look("private-fault-without-file")
def _without_file() -> str | None:
    with bench() as b, HostMemory(MIB) as memory:
        b.vm.map(memory, GPA)
        memory.write(0, b"plain")
        b.guest.hypercall(k.KVM_HC_MAP_GPA_RANGE, GPA, 1, rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE)
        seen = b.guest.read(GPA, 5)
        return None if seen == b"plain" else f"the guest read {seen!r} in an ordinary slot"


# -- what pages hold, and where they are ---------------------------------------------------------


@_look("pages-not-zeroed")
def _not_zeroed() -> str | None:
    size = 16 * MIB
    with bench() as b:
        b.bind(size)
        with HostMemory(4 * size) as secrets:
            secrets.write(0, b"\xa5" * secrets.size)
        b.file.allocate(size // 2, size // 2)
        found = b.guest.span(GPA, 0, size)
    return None if found == size else f"something else than 0 in page {found // PAGE}"


@_look("pages-migrate")
def _migrate() -> str | None:
    """Pages that nobody has mapped, seen in /proc/kpageflags."""
    pages = 4096
    with RestrictedMem() as file, HostMemory(64 * MIB) as memory:
        file.allocate(0, pages * PAGE)
        # Compaction moves pages to where memory is in use in part.
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
    """For each page frame, 1 if it is unevictable."""
    flags = b""
    try:
        with Path("/proc/kpageflags").open("rb", buffering=0) as file:  # takes whole words only
            while more := file.read(MIB):
                flags += more
    except OSError as error:
        missing("page flags", str(error))
    # KPF_UNEVICTABLE is bit 18 of 64.
    return flags[2::8].translate(bytes(value >> 2 & 1 for value in range(256)))


@_look("drop-caches")
def _drop_caches() -> str | None:
    """Pages that were read by the guest; read-only, so that nobody calls them dirty after it."""
    with bench() as b:
        before = meminfo("Unevictable")
        slot = b.bind(BIG, flags=k.KVM_MEM_READONLY)
        b.guest.touch(GPA, PAGE, BIG // PAGE)
        slot.delete()
        have = meminfo("Unevictable") - before
        assert have > BIG // 2
        write_setting("/proc/sys/vm/drop_caches", "1", "drop_caches")
        left = meminfo("Unevictable") - before
    return f"{left // MIB} MiB of {have // MIB} are left" if left < have // 2 else None


@_look("split-loses-pages")
def _split() -> str | None:
    with huge_pages(), bench() as b:
        before = meminfo("Unevictable")
        slot = b.bind(BIG)
        b.guest.touch(GPA, PAGE, BIG // PAGE, byte=1)
        need_large_pages(b.vm)
        slot.delete()
        have = meminfo("Unevictable") - before
        assert have > BIG // 2
        for start in range(0, BIG, LARGE):
            b.file.punch_hole(start, PAGE)
        left = meminfo("Unevictable") - before
    return f"{left // MIB} MiB of {have // MIB} are left" if left < have // 2 else None


# -- what is handed on, and how long it lives ----------------------------------------------------


@_look("fstat")
def _fstat() -> str | None:
    with RestrictedMem() as file:
        file.ftruncate(16 * PAGE)
        file.allocate(0, 8 * PAGE)
        found = os.fstat(file.fileno())
        seen = found.st_size, found.st_blocks * 512
    return None if seen == (16 * PAGE, 8 * PAGE) else f"(size, allocated) is {seen}"


@_look("private-flag-cleared")
def _flag_cleared() -> str | None:
    with bench() as b:
        slots = RestrictedSlots(b.vm, b.file, 0)
        for change in ({}, {"guest_phys_addr": 5 * GIB}):
            assert slots.set() == "ok"
            said = slots.set(flags=0, **change)
            assert slots.delete(flags=0) == "ok"
            b.file.punch_hole(0, 64 * PAGE)
            if said != "EINVAL":
                return f"flags 0 for a private slot: {said}"
    return None


@_look("path-outlives-file")
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


@_look("notifiers-unlocked")
def _unlocked() -> str | None:
    with bench() as b, HostMemory(MIB) as memory:
        slots = RestrictedSlots(b.vm, b.file, memory.userspace_addr)
        made, gone = slots.struct(restricted_offset=0), slots.struct(memory_size=0)

        def change() -> None:
            b.file.allocate(0, MIB)
            b.file.punch_hole(0, MIB)

        with beside(change) as holes:
            for _ in rounds(1000):
                assert slots.set_at(address_of(made)) == "ok"
                memory.discard(0, PAGE)  # an MMU notifier
                assert slots.set_at(address_of(gone)) == "ok"
        assert holes[0] > 0
        b.bind(MIB)
        return _spins(b, lambda: b.guest.load(GPA, 8))


@_look("vm-closed-during-hole")
def _vm_closed() -> str | None:
    with RestrictedMem() as file:
        file.allocate(0, MIB)
        with beside(lambda: file.punch_hole(0, MIB)) as holes:
            for _ in rounds(100):
                with hook(on=True), Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu():
                    assert RestrictedSlots(vm, file, 0).set(restricted_offset=0) == "ok"
        assert holes[0] > 0
    return None


@_look("fault-beside-hole")
def _beside_hole() -> str | None:
    with huge_pages(), bench(cpus=2) as b:
        b.bind(LARGE)
        b.guest.store(GPA, 8, 1)
        need_large_pages(b.vm)
        other = b.guest.cpus[1]
        with beside(lambda: other.touch(GPA + LARGE // 2, PAGE, 16)) as touched:
            for turn in rounds(200):
                b.guest.store(GPA, 8, turn + 1)
                b.file.punch_hole(0, PAGE)
                seen = b.guest.load(GPA, 8)
                if seen:
                    return f"after hole {turn} the guest read {seen} in it"
                b.file.punch_hole(0, LARGE)
        assert touched[0] > 0
    return None
