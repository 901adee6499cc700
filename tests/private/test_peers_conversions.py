"""What other projects' tests of conversion assert, by both ABIs; guest and host are checked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.exits import HypercallExit, MemoryFaultExit, MmioExit
from kvmpriv.guest.puppet import GuestExit, PuppetCpu
from kvmpriv.private import PrivateFile, serve_conversion

from .support.accounting import BIG, SLACK, Unevictable
from .support.races import eventually
from .support.rig import LARGE, Guest, MakeRig, Rig, two_backings
from .support.rules import rule
from .support.syscalls import GIB, MIB, PAGE

pytestmark = pytest.mark.usefixtures("no_leak")

GPA, OFFSET = 4 * GIB, 6 * MIB
#: What each vCPU has to itself, and how far apart that is.
CHUNK, APART = LARGE + PAGE, 2 * LARGE
#: Of a chunk: (offset, size).
RANGES = ((0, PAGE), (0, LARGE), (PAGE, PAGE), (PAGE, LARGE), (LARGE, PAGE))


class Ground:
    """Slots for several vCPUs in one file from OFFSET on, and guests that ask for conversions.

    `allocate`: a range that becomes private is allocated, one that becomes shared is freed.
    """

    def __init__(self, rig: Rig, slots: int = 1, *, allocate: bool = False) -> None:
        self.rig, self.allocate = rig, allocate
        size = APART * len(rig.guest.cpus)
        self.memory, self.at = rig.large_memory(size)
        self.file = rig.file(OFFSET + size)
        each = size // slots
        for number in range(slots):
            rig.bind(
                GPA + number * each, each, self.file, OFFSET + number * each,
                memory=self.memory, memory_offset=self.at + number * each,
            )  # fmt: skip
        rig.convert(GPA, size, private=False)
        rig.vm.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1 << k.KVM_HC_MAP_GPA_RANGE)
        self.asked = [0] * len(rig.guest.cpus)
        for number, cpu in enumerate(rig.guest.cpus):
            cpu.serve = self._server(number)

    def _server(self, number: int) -> Callable[[PuppetCpu, Any], bool]:
        def serve(cpu: PuppetCpu, exit_: Any) -> bool:
            if not isinstance(exit_, HypercallExit):
                return False
            gpa, pages, attributes = exit_.args[:3]
            wanted = bool(attributes & k.KVM_MAP_GPA_RANGE_ENCRYPTED)
            if self.allocate:
                change = self.file.allocate if wanted else self.file.punch_hole
                change(self.in_file(gpa), pages * PAGE)
            self.rig.convert(gpa, pages * PAGE, private=wanted)
            self.asked[number] += 1
            cpu.vcpu.kvm_run.hypercall.ret = 0
            return True

        return serve

    def in_file(self, gpa: int) -> int:
        return OFFSET + gpa - GPA

    def host(self, gpa: int, size: int) -> bytes:
        """What the host reads there."""
        return self.memory.read(self.at + gpa - GPA, size)

    def host_writes(self, gpa: int, data: bytes) -> None:
        self.memory.write(self.at + gpa - GPA, data)

    def on_all(self, work: Callable[[PuppetCpu, int], None]) -> None:
        """Have all vCPUs do this at the same time, each with its own chunk."""
        errors: list[BaseException] = []

        def run(number: int) -> None:
            try:
                work(self.rig.guest.cpus[number], GPA + number * APART)
            except BaseException as error:  # noqa: BLE001  # raised below
                errors.append(error)

        count = len(self.rig.guest.cpus)
        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive(), "stuck"
        if errors:
            raise errors[0]


def ask(cpu: Guest, gpa: int, size: int, *, private: bool) -> None:
    """Have the guest ask for a conversion by hypercall."""
    kind = k.KVM_MAP_GPA_RANGE_ENCRYPTED if private else k.KVM_MAP_GPA_RANGE_DECRYPTED
    assert cpu.hypercall(k.KVM_HC_MAP_GPA_RANGE, gpa, size // PAGE, kind) == 0


def finds(cpu: Guest, gpa: int, byte: int, size: int) -> bool:
    """Whether the guest finds nothing but `byte` there."""
    return cpu.span(gpa, byte, size) == size


#: Tests that go by what is in a page that the guest has not had before.
fresh = pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
MACHINES = [(1, 1), (2, 1), (2, 2)]
machines = pytest.mark.parametrize(
    ("cpus", "slots"), MACHINES, ids=[f"{cpus} vCPUs {slots} slots" for cpus, slots in MACHINES]
)


@rule("convert.explicit", "convert.odd-pages", "convert.vcpus-and-slots")
@pytest.mark.known_defect("private-prefetch")
@machines
@pytest.mark.parametrize("allocate", [False, True], ids=["on demand", "fallocate"])
@fresh
@two_backings
def test_explicit_conversion(make_rig: MakeRig, cpus: int, slots: int, allocate: bool) -> None:
    """Each vCPU converts each range and back, its odd pages first; the memory around it stays."""
    ground = Ground(make_rig(cpus=cpus), slots, allocate=allocate)
    step = 2 if cpus == 1 else 32  # one vCPU has done every odd page

    def work(cpu: PuppetCpu, base: int) -> None:
        cpu.fill(base, 0xAA, CHUNK)
        assert ground.host(base, CHUNK) == b"\xaa" * CHUNK, "shared at first"
        ground.host_writes(base, b"\xcc" * CHUNK)
        assert finds(cpu, base, 0xCC, CHUNK)
        for offset, size in RANGES:
            gpa, behind = base + offset, CHUNK - offset - size
            around = b"\xcc" * offset, b"\xcc" * behind
            cpu.fill(gpa, 0x11, size)
            ask(cpu, gpa, size, private=True)
            assert finds(cpu, gpa, 0, size), "a fresh page is empty"
            cpu.fill(gpa, 0x22, size)
            assert ground.host(base, CHUNK) == (b"\x11" * size).join(around)
            assert finds(cpu, gpa, 0x22, size)
            assert finds(cpu, base, 0xCC, offset)
            assert finds(cpu, gpa + size, 0xCC, behind)
            for page in range(gpa + PAGE, gpa + size, step * PAGE):
                ask(cpu, page, PAGE, private=False)
            pages = [b"\x11" if at % step == 1 else b"\x22" for at in range(size // PAGE)]
            assert cpu.read(gpa, size) == b"".join(page * PAGE for page in pages)
            for page in range(gpa + PAGE, gpa + size, step * PAGE):
                ground.host_writes(page, b"\x33" * PAGE)
            ask(cpu, gpa, size, private=False)
            pages = [b"\x33" if at % step == 1 else b"\x11" for at in range(size // PAGE)]
            assert cpu.read(gpa, size) == b"".join(page * PAGE for page in pages)
            cpu.fill(gpa, 0x44, size)
            assert ground.host(base, CHUNK) == (b"\x44" * size).join(around)
            ground.host_writes(gpa, b"\x55" * size)
            assert finds(cpu, gpa, 0x55, size)
            cpu.fill(gpa, 0xCC, size)
            ground.file.punch_hole(ground.in_file(base), CHUNK)

    ground.on_all(work)
    each = sum(2 + len(range(1, size // PAGE, step)) for _, size in RANGES)
    assert ground.asked == [each] * cpus
    assert each == 10 + 2 * 512 // step
    assert all(isinstance(one, HypercallExit) for cpu in ground.rig.guest.cpus for one in cpu.exits)


@rule("invalidation.ranges", "invalidation.vcpus-and-slots")
@machines
@pytest.mark.parametrize("precise", [True, False], ids=["only the hole faulted in", "all of it"])
@fresh
def test_holes(make_rig: MakeRig, cpus: int, slots: int, precise: bool) -> None:
    """A hole in each range that the guest has just written: it finds zeros only there."""
    ground = Ground(make_rig(cpus=cpus), slots)

    def work(cpu: PuppetCpu, base: int) -> None:
        ask(cpu, base, CHUNK, private=True)
        for offset, size in RANGES:
            gpa, behind = base + offset, CHUNK - offset - size
            ground.file.punch_hole(ground.in_file(base), CHUNK)
            at, length = (gpa, size) if precise else (base, CHUNK)
            cpu.fill(at, 0xCC, length)
            assert finds(cpu, at, 0xCC, length)
            ground.file.punch_hole(ground.in_file(gpa), size)
            assert finds(cpu, gpa, 0, size)
            rest = 0 if precise else 0xCC
            assert finds(cpu, base, rest, offset)
            assert finds(cpu, gpa + size, rest, behind)
            cpu.fill(gpa, 0xDD, size)
            assert finds(cpu, gpa, 0xDD, size), "a hole takes new pages"
        assert ground.host(base, CHUNK) == bytes(CHUNK), "the host has seen nothing of it"

    ground.on_all(work)
    assert ground.asked == [1] * cpus


# -- what brings a conversion about ----------------------------------------------------------------


class Window:
    """2 MiB and a page, private at first; converted as `how` says.

    `host`: the host converts on its own.  `hypercall`: the guest asks for it.  `fault`: the guest
    just accesses, having said which kind it wants (v9's test vehicle), and the host converts what
    is accessed.
    """

    SIZE = LARGE + PAGE

    def __init__(self, rig: Rig, how: str) -> None:
        self.rig, self.how, self.guest = rig, how, rig.guest
        self.memory, self.at = rig.large_memory(self.SIZE)
        self.file: PrivateFile = rig.file(OFFSET + self.SIZE)
        rig.bind(GPA, self.SIZE, self.file, OFFSET, memory=self.memory, memory_offset=self.at)
        rig.vm.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1 << k.KVM_HC_MAP_GPA_RANGE)
        self.guest.serve = self._serve
        self.served: list[Any] = []

    def _serve(self, cpu: PuppetCpu, exit_: Any) -> bool:
        self.served.append(exit_)
        if isinstance(exit_, MemoryFaultExit):
            self.rig.convert(exit_.gpa, exit_.size, private=exit_.private)
            return True
        gpa, pages, attributes = exit_.args[:3]
        wanted = bool(attributes & k.KVM_MAP_GPA_RANGE_ENCRYPTED)
        self.rig.convert(gpa, pages * PAGE, private=wanted)
        cpu.vcpu.kvm_run.hypercall.ret = 0
        return True

    def convert(self, offset: int, size: int, *, private: bool) -> None:
        if self.how == "host":
            self.rig.convert(GPA + offset, size, private=private)
        elif self.how == "hypercall":
            ask(self.guest, GPA + offset, size, private=private)
        else:
            wanted = (
                rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE if private else rm.KVM_MAP_GPA_RANGE_WANT_SHARED
            )
            call = k.KVM_HC_MAP_GPA_RANGE
            assert self.guest.hypercall(call, GPA + offset, size // PAGE, wanted) == 0

    def host(self, offset: int, size: int) -> bytes:
        return self.memory.read(self.at + offset, size)

    def host_writes(self, offset: int, data: bytes) -> None:
        self.memory.write(self.at + offset, data)

    def punch_hole(self, offset: int, size: int) -> None:
        self.file.punch_hole(OFFSET + offset, size)

    def allocate(self, offset: int, size: int) -> None:
        self.file.allocate(OFFSET + offset, size)


WAYS = [
    ("restrictedmem", "host"),
    ("restrictedmem", "hypercall"),
    ("restrictedmem", "fault"),
    ("guest_memfd", "host"),
    ("guest_memfd", "hypercall"),
]


@pytest.fixture
def window(rig: Rig, how: str) -> Window:
    return Window(rig, how)


ways = pytest.mark.parametrize(("make_rig", "how"), WAYS, indirect=["make_rig"])


@rule("convert.hole-then-both-directions")
@ways
@fresh
def test_a_hole_then_both_directions(window: Window) -> None:
    """Memory is written, punched, made shared and private again: no old data comes back."""
    at, gpa, guest = 5 * PAGE, GPA + 5 * PAGE, window.guest
    window.host_writes(at, b"the host's")
    guest.write(gpa, b"private")
    assert window.host(at, 10) == b"the host's"
    window.punch_hole(at, PAGE)
    assert guest.read(gpa, 10) == bytes(10)
    assert window.host(at, 10) == b"the host's"
    window.convert(at, PAGE, private=False)
    assert guest.read(gpa, 10) == b"the host's"
    guest.write(gpa, b"the guest'")
    assert window.host(at, 10) == b"the guest'"
    window.convert(at, PAGE, private=True)
    assert guest.read(gpa, 10) == bytes(10)
    guest.write(gpa, b"private 2")
    assert window.host(at, 10) == b"the guest'"
    assert guest.read(gpa, 9) == b"private 2"
    assert len(window.served) == {"host": 0, "hypercall": 2, "fault": 2}[window.how]


@rule("convert.private-hole-shared-write")
@pytest.mark.known_defect("notified-in-bytes")  # the hole leaves what it frees mapped
@ways
def test_private_then_a_hole_then_a_shared_write(window: Window) -> None:
    """The hole ends the guest's mapping: its next write, now shared, goes to host memory."""
    at, gpa, guest = 512 * PAGE, GPA + 512 * PAGE, window.guest
    guest.write(gpa, b"private")
    window.punch_hole(at, PAGE)
    window.convert(at, PAGE, private=False)
    guest.write(gpa, b"shared")
    assert window.host(at, 7) == b"shared\0"
    window.host_writes(at, b"answer")
    assert guest.read(gpa, 7) == b"answer\0"


@rule("convert.shared-allocate-private-write", "pages.allocation-keeps-what-is-there")
@ways
@fresh
def test_shared_then_allocated_then_a_private_write(window: Window) -> None:
    """Allocating exposes nothing; the host does not see what is then written as private."""
    at, gpa, guest = 3 * PAGE, GPA + 3 * PAGE, window.guest
    window.convert(at, PAGE, private=False)
    guest.write(gpa, b"shared")
    assert window.host(at, 6) == b"shared"
    window.allocate(at, PAGE)
    assert guest.read(gpa, 6) == b"shared", "allocated, but not yet private"
    window.convert(at, PAGE, private=True)
    assert guest.read(gpa, 6) == bytes(6)
    guest.write(gpa, b"secret")
    assert window.host(at, 6) == b"shared"
    window.allocate(at - PAGE, 3 * PAGE)
    assert guest.read(gpa, 6) == b"secret"


#: Stages: (first page, pages, private).
STAGES = (
    (0, 512, False), (0, 512, True), (256, 256, False), (300, 8, True), (511, 2, False),
    (0, 1, False), (1, 511, False), (100, 300, True), (0, 513, False), (0, 513, True),
)  # fmt: skip


def found(state: list[bool], private_side: list[int], shared_side: list[int]) -> bytes:
    """The bytes of pages each filled with one byte a side: True for the private one."""
    sides = zip(state, private_side, shared_side, strict=True)
    return b"".join(bytes([mine if one else other]) * PAGE for one, mine, other in sides)


@rule("convert.window-in-parts")
@pytest.mark.known_defect("private-prefetch")
@ways
@fresh
def test_a_window_in_parts(window: Window) -> None:
    """2 MiB and a page are converted in parts, back and forth; both sides are checked each time."""
    pages = Window.SIZE // PAGE
    guest = window.guest
    state, private_side, shared_side = [True] * pages, [0] * pages, [0] * pages
    faults = 0
    for stage, (first, count, wanted) in enumerate(STAGES, 1):
        window.convert(first * PAGE, count * PAGE, private=wanted)
        for page in range(first, first + count):
            faults += state[page] != wanted
            state[page] = wanted
        assert guest.read(GPA, Window.SIZE) == found(state, private_side, shared_side), stage
        guest.fill(GPA + first * PAGE, stage, count * PAGE)
        side = private_side if wanted else shared_side
        side[first : first + count] = [stage] * count
        assert window.host(0, Window.SIZE) == found([False] * pages, private_side, shared_side)
        window.host_writes(first * PAGE, bytes([100 + stage]) * (count * PAGE))
        shared_side[first : first + count] = [100 + stage] * count
    assert guest.read(GPA, Window.SIZE) == found(state, private_side, shared_side)
    expected = {"host": 0, "hypercall": len(STAGES), "fault": faults}
    assert len(window.served) == expected[window.how]
    assert faults > 1000


# -- no page twice ---------------------------------------------------------------------------------


class Held:
    """How much more memory this process has there, and private files have, than before."""

    def __init__(self) -> None:
        self.private = Unevictable()
        self.before = self._resident()

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    def are(self, private: int, shared: int) -> bool:
        """Whether it is so much of either, waiting where it is not."""
        return self.private.is_about(private) and eventually(
            lambda: abs(self._resident() - self.before - shared) < SLACK
        )


@rule("convert.implicit", "slot.again")
@two_backings
def test_a_slot_that_comes_and_goes_under_a_private_page(rig: Rig) -> None:
    """KVM caches that a gfn has no memory; the guest must run on each time that there is a slot."""
    guest, file = rig.guest, rig.file(BIG)
    guest.serve = lambda cpu, exit_: serve_conversion(rig.vm, cpu.vcpu, exit_)
    for turn in range(12):
        rig.convert(GPA, BIG, private=False)
        if rig.abi.traits.access_follows_state:
            with pytest.raises(GuestExit) as stopped:
                guest.load(GPA, 8)
            assert isinstance(stopped.value.exit, MmioExit)
            guest.vcpu.reply(bytes(8))
            assert guest.resume() == 0
        rig.convert(GPA, BIG, private=True)
        slot = rig.bind(GPA, BIG, file)
        guest.store(GPA, 8, turn + 100)
        assert guest.load(GPA, 8) == turn + 100
        slot.delete()


@rule("convert.no-page-twice")
@pytest.mark.known_defect("private-prefetch")
@two_backings
def test_no_page_is_held_twice(rig: Rig) -> None:
    """A conversion that frees unreachable pages leaves one copy of each; with keep=True, two."""
    memory, file = rig.memory(BIG), rig.file(BIG)
    rig.bind(GPA, BIG, file, memory=memory)
    rig.convert(GPA, BIG, private=False)
    rig.vm.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1 << k.KVM_HC_MAP_GPA_RANGE)
    guest, half = rig.guest, BIG // 2
    guest.serve = lambda cpu, exit_: serve_conversion(rig.vm, cpu.vcpu, exit_)

    def touch(gpa: int, size: int) -> None:
        guest.touch(gpa, PAGE, size // PAGE, 0x77)

    held = Held()
    touch(GPA, BIG)
    assert held.are(0, BIG)
    ask(guest, GPA, BIG, private=True)
    assert held.are(0, 0)
    touch(GPA, BIG)
    assert held.are(BIG, 0)
    ask(guest, GPA, half, private=False)
    assert held.are(half, 0)
    touch(GPA, BIG)
    assert held.are(half, half)
    rig.convert(GPA, half, private=True)
    touch(GPA, half)
    assert held.are(BIG, half), "the twin: the kernel alone frees nothing"
    ask(guest, GPA, half, private=True)
    assert held.are(BIG, 0)
    assert len(guest.exits) == 3
