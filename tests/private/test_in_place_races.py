"""Conversion in place against all that happens beside it, without memory, and when killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from kvmpriv import HostMemory, Kvm
from kvmpriv.guest.puppet import Puppet
from kvmpriv.private import PrivateAbi
from kvmpriv.private.guest_memfd import pre_fault_memory

from .support.accounting import BIG, Unevictable, vms_alive
from .support.fault_injection import failing_allocations
from .support.in_place import (
    GPA,
    OFFSET,
    PRIVATE,
    SIZE,
    FileRig,
    convert,
    host_can,
    must_convert,
    persist,
    states,
)
from .support.kernels import RETRIES
from .support.leaks import open_fds
from .support.pins import in_a_pipe, read_all_the_time
from .support.processes import killed_after
from .support.races import ROUNDS, beside, eventually, rounds
from .support.rig import MakeRig, only, run_again
from .support.rules import rule
from .support.syscalls import GIB, PAGE, answer

pytestmark = pytest.mark.usefixtures("no_leak")

PAGES = SIZE // PAGE
in_place = only("guest_memfd_in_place")


@pytest.fixture
def one(make_rig: MakeRig) -> FileRig:
    """A guest of two vCPUs with one slot of one file, all of it shared."""
    made = make_rig(FileRig, cpus=2)
    for cpu in made.guest.cpus:
        cpu.serve = run_again(made.abi)
    return made


def settles(one: FileRig) -> None:
    """Everything works as before: each page is converted to and fro, and keeps its content."""
    one.guest.fill(GPA, 0x5C, SIZE)
    for private in (True, False):
        assert one.answer(0, SIZE, private=private) == ("ok", None)
        assert states(one.shared) == [private] * PAGES
        for cpu in one.guest.cpus:
            assert cpu.span(GPA, 0x5C, SIZE) == SIZE
    assert one.shared.read(0, SIZE) == b"\x5c" * SIZE


# -- against each other ----------------------------------------------------------------------------


@rule("gip.race.guest")
@in_place
def test_against_two_vcpus(one: FileRig) -> None:
    """Two vCPUs count in one page that is converted meanwhile: no increment is lost, ever."""

    def count(number: int) -> None:
        one.guest.cpus[number].increment(GPA + 8 * number, 50)

    with beside(lambda: count(0)) as first, beside(lambda: count(1)) as second:
        for turn in rounds(300, until=lambda: min(first[0], second[0]) > 0):
            one.persist(0, PAGE if turn % 3 else SIZE, private=bool(turn % 2))
    assert turn + 1 >= ROUNDS
    one.to(0, SIZE, private=False)
    totals = [int.from_bytes(one.shared.read(8 * number, 8), "little") for number in (0, 1)]
    assert totals == [50 * first[0], 50 * second[0]]
    settles(one)


@rule("gip.fault.retry")
@in_place
def test_no_exit_for_a_conversion(one: FileRig) -> None:
    """A page gets the other kind while KVM handles a fault on it: KVM handles the fault again.

    The ABI leaves this open: a kernel without this project's series may report the fault instead.
    """
    cpu = one.guest.cpus[0]
    with beside(lambda: cpu.increment(GPA, 50)) as counted:
        for turn in rounds(300, until=lambda: counted[0] > 5):
            one.persist(0, PAGE, private=bool(turn % 2))
    assert turn + 1 >= ROUNDS
    if RETRIES:
        assert not cpu.exits
    assert {str(exit_) for exit_ in cpu.exits} <= {
        str(one.fault_at(GPA, private=private)) for private in (False, True)
    }
    settles(one)


@rule("gip.race.host")
@in_place
def test_against_the_host(one: FileRig) -> None:
    """The host reads and writes the page by its mapping: each access succeeds whole or not at all.

    What the host has written is there, whatever became of the page meanwhile.
    """
    done = [0, 0]

    def access() -> None:
        word = (done[0] + 1).to_bytes(8, "little")
        try:
            one.shared.write(PAGE, word)
        except OSError:
            done[1] += 1
        else:
            done[0] += 1

    with beside(access):
        for turn in rounds(400, until=lambda: min(done) > 0):
            one.persist(0, 3 * PAGE, private=bool(turn % 2))
    assert turn + 1 >= ROUNDS
    one.to(0, SIZE, private=False)
    assert int.from_bytes(one.shared.read(PAGE, 8), "little") == done[0]
    settles(one)


@rule("gip.race.pins")
@in_place
def test_against_pins(one: FileRig) -> None:
    """A page is taken into use and let go of meanwhile: EAGAIN with its offset, or success."""
    seen = {"ok": 0, "EAGAIN": 0}
    pinned = [0, 0]

    def pin() -> None:
        try:
            with in_a_pipe(one.address(5 * PAGE)):
                pinned[0] += 1
                time.sleep(0.001)
        except OSError:  # it is private
            pinned[1] += 1
            time.sleep(0.001)

    turns = 0
    with beside(pin):
        for turn in rounds(500, until=lambda: min(*seen.values(), pinned[0]) > 0):
            turns = turn + 1
            said, offset = one.answer(0, SIZE, private=True)
            seen[said] += 1
            if said == "EAGAIN":
                assert offset == 5 * PAGE
                assert host_can(one.shared, 0), "nothing has changed"
            else:
                assert not host_can(one.shared, 0)
            assert one.answer(0, SIZE, private=False) == ("ok", None)
    assert turns >= ROUNDS
    settles(one)


@rule("gip.race.process_vm")
@in_place
def test_against_another_process_that_reads(one: FileRig) -> None:
    """Another process reads the pages all the time, and has them pinned for moments.

    A conversion succeeds or is EAGAIN without effect; a read is whole or ends at a private page.
    """
    one.guest.fill(GPA, 0x67, SIZE)
    seen, turns = {"ok": 0, "EAGAIN": 0}, 0
    with read_all_the_time(one.address(), SIZE, b"\x67") as reads:
        for turn in rounds(500, until=lambda: min(seen["ok"], reads.whole, reads.refused) > 0):
            said, offset = one.answer(0, SIZE, private=True)
            seen[said] += 1
            if said == "ok":
                assert states(one.shared) == [True] * PAGES
            else:
                assert offset in range(0, SIZE, PAGE)
                assert states(one.shared) == [False] * PAGES, "nothing has changed"
            assert one.answer(0, SIZE, private=False) == ("ok", None)
            turns = turn + 1
    assert sum(seen.values()) == turns >= ROUNDS
    assert one.guest.span(GPA, 0x67, SIZE) == SIZE
    settles(one)


@rule("gip.race.conversions")
@in_place
def test_against_each_other(one: FileRig) -> None:
    """Two threads convert overlapping ranges: each page ends in the state of the last of its own.

    Their common pages are in one of the two, and all of them in the same.
    """
    third, turns = PAGES // 4, 0
    with beside(lambda: one.persist(0, 3 * third * PAGE, private=True)) as others:
        for turn in rounds(300, until=lambda: others[0] > 0):
            one.to(third * PAGE, 3 * third * PAGE, private=False)
            assert not any(states(one.shared)[3 * third :])
            turns = turn + 1
    assert turns >= ROUNDS
    found = states(one.shared)
    assert found[:third] == [True] * third
    assert found[3 * third :] == [False] * (PAGES - 3 * third)
    assert len(set(found[third : 3 * third])) == 1, "one conversion is not divided by another"
    settles(one)


@rule("gip.race.holes", "gip.race.allocation")
@in_place
def test_against_holes(one: FileRig) -> None:
    """The range is punched and allocated meanwhile: zeros or the guest's bytes, nothing else."""

    def change() -> None:
        one.one.punch_hole(OFFSET, SIZE // 2)
        one.one.allocate(OFFSET, SIZE // 2)

    with beside(change) as holes:
        for turn in rounds(300, until=lambda: holes[0] > 0):
            one.guest.store(GPA + PAGE, 1, 0x5B)
            one.persist(0, SIZE, private=bool(turn % 2))
            assert one.guest.load(GPA + PAGE, 1) in (0, 0x5B)
            one.guest.store(GPA + SIZE - PAGE, 1, turn % 256)
            assert one.guest.load(GPA + SIZE - PAGE, 1) == turn % 256, "beside the hole"
            assert states(one.shared) == [bool(turn % 2)] * PAGES
    assert turn + 1 >= ROUNDS
    settles(one)


@rule("gip.race.slots")
@in_place
def test_against_slots(one: FileRig) -> None:
    """A slot of the range is made and deleted meanwhile, with a guest that maps its pages."""
    file, gpa = one.file(SIZE), 64 * GIB

    def convert_all() -> None:
        for private in (True, False):
            persist(file, 0, SIZE, private=private)

    with beside(convert_all) as conversions:
        for turn in rounds(200, until=lambda: conversions[0] > 0):
            with_slot = one.bind_shared(gpa, SIZE, file)
            one.guest.store(gpa + PAGE, 8, turn + 1)
            assert one.guest.load(gpa + PAGE, 8) == turn + 1
            with_slot.delete()
    assert turn + 1 >= ROUNDS
    must_convert(file, 0, SIZE, private=True)
    one.bind_shared(gpa, SIZE, file)
    assert one.guest.load(gpa + PAGE, 8) == turn + 1
    settles(one)


@rule("gip.race.prefault")
@in_place
def test_against_pre_faulting(one: FileRig) -> None:
    """The range is pre-faulted meanwhile: no page stays mapped as the other kind."""
    vcpu = one.guest.cpus[1].vcpu
    one.guest.cpus[1].load(GPA, 8)

    def fill() -> None:
        with suppress(OSError):  # it is being converted
            pre_fault_memory(vcpu, GPA, SIZE)

    one.warm()
    whole = one.mapped_pages()
    with beside(fill) as filled:
        for turn in rounds(300, until=lambda: filled[0] > 0):
            one.persist(0, SIZE, private=bool(turn % 2))
    assert turn + 1 >= ROUNDS
    for private in (True, False):
        one.to(0, SIZE, private=private)
    one.warm()
    assert one.mapped_pages() == whole
    one.to(0, SIZE, private=True)
    assert one.mapped_pages() == whole - PAGES
    settles(one)


@rule("gip.race.prefault")
@in_place
def test_pre_faulting_ends(one: FileRig) -> None:
    """A page is converted during its pre-fault, and then no more: the call ends."""
    vcpu = one.guest.cpus[1].vcpu
    one.guest.cpus[1].load(GPA, 8)

    def fill() -> None:
        with suppress(OSError):  # it is being converted
            pre_fault_memory(vcpu, GPA, PAGE)

    def reached(count: int) -> bool:
        return filled[0] >= count

    with beside(fill) as filled:
        for turn in rounds(300):
            enough = filled[0] + 2
            one.persist(0, PAGE, private=bool(turn % 2))
            ended = eventually(partial(reached, enough))
            if not ended:  # let the thread go
                one.persist(0, PAGE, private=not turn % 2)
            assert ended, "the pre-fault goes on and on"
    assert turn + 1 >= ROUNDS
    settles(one)


@rule("gip.race.mappings")
@in_place
def test_against_mappings(one: FileRig) -> None:
    """The file is mapped, read and unmapped meanwhile: no page stays mapped that is private."""
    one.shared.write(0, b"\x19" * SIZE)
    seen = [0, 0]

    def look() -> None:
        with one.abi.create_memory(one.one, OFFSET, SIZE) as memory:
            for page in range(0, PAGES, 7):
                said = answer(lambda at=page * PAGE: memory.read(at, 1))
                seen[said == "ok"] += 1

    with beside(look):
        for turn in rounds(300, until=lambda: min(seen) > 0):
            one.persist(0, SIZE, private=bool(turn % 2))
            if turn % 2:
                assert not host_can(one.shared, 0)
                assert not host_can(one.shared, SIZE - PAGE)
    assert turn + 1 >= ROUNDS
    settles(one)


@rule("gip.race.close")
@in_place
def test_against_the_end_of_the_file(one: FileRig) -> None:
    """The last descriptor is closed by another thread: the call ends, and the memory is freed."""
    memory = Unevictable()
    for turn in rounds(60, least=12):
        file = one.abi.create_file(one.vm, BIG // 8)
        slots = one.behaviour.slots(one.vm, file, 0)
        where = {"guest_phys_addr": 64 * GIB, "memory_size": BIG // 8, "guest_memfd_offset": 0}
        with slots.held(**where):
            one.guest.touch(64 * GIB, PAGE, BIG // 8 // PAGE, byte=turn)
            ready = threading.Barrier(2)

            def close(one_file: object = file, ready: threading.Barrier = ready) -> None:
                ready.wait()
                one_file.close()  # type: ignore[attr-defined]

            thread = threading.Thread(target=close)
            thread.start()
            ready.wait()
            with suppress(ValueError, OSError):  # closed
                convert(file, 0, BIG // 8)
            thread.join(60)
            assert not thread.is_alive()
    assert memory.is_about(0)
    settles(one)


# -- killed, and what is left ----------------------------------------------------------------------


def _live(abi: PrivateAbi, ready: Callable[[], None]) -> None:
    """Convert a running guest's memory, with pages pinned and mapped, until the process ends."""
    with Kvm() as kvm:
        vm = abi.create_vm(kvm)
        guest = Puppet(vm, cpus=2, cpuid=kvm.get_supported_cpuid(), serve_conversions=False)
        guest.serve = guest.cpus[1].serve = lambda _cpu, _exit: True
        slot = vm.add_private_memory(GPA, BIG, private=False)
        assert slot.memory is not None
        address = slot.memory.userspace_addr

        def touch(cpu: int) -> None:
            while True:
                guest.cpus[cpu].touch(GPA, PAGE, BIG // PAGE, byte=1)

        def pin() -> None:
            while True:
                with suppress(OSError), in_a_pipe(address + 8 * PAGE, 4 * PAGE):
                    pass

        for work in (lambda: touch(0), lambda: touch(1), pin):
            threading.Thread(target=work, daemon=True).start()
        ready()
        while True:
            for attributes in (PRIVATE, 0):
                convert(slot.file, 0, BIG, attributes)


@rule("gip.killed")
@in_place
def test_killed_in_the_middle(one: FileRig) -> None:
    """A VMM killed while it converts, its guest runs and pages are pinned leaves nothing."""
    memory, with_rig, killed = Unevictable(), vms_alive(), 0
    for turn in rounds(8, 6, least=2):
        assert killed_after(partial(_live, one.abi), 0.002 * turn, 20) < 20
        killed += 1
        assert eventually(lambda: vms_alive() == with_rig, 20)
    assert killed >= 2
    assert memory.is_about(0)
    settles(one)


#: The largest file that there can be, and a slot that takes no memory worth mentioning.
LARGEST, LARGE = (1 << 63) - PAGE, 128 * GIB


@rule("gip.killed.largest")
@in_place
@pytest.mark.parametrize("size", [LARGE, LARGEST], ids=["128 GiB in a slot", "largest file"])
def test_a_conversion_of_the_largest_range_ends(one: FileRig, size: int) -> None:
    """Conversions of all of a file, with pages at both ends: killed, the process is gone soon.

    The VM's own attributes are another matter: see the known defect attributes-unkillable.
    """
    memory, with_rig = Unevictable(), vms_alive()

    def work(ready: Callable[[], None]) -> None:
        with Kvm() as kvm, one.abi.create_vm(kvm) as vm, one.abi.create_file(vm, size) as file:
            if size == LARGE:
                one.abi.bind(vm, GPA, size, file, memory=one.abi.create_memory(file, 0, size))
            ready()
            while True:
                for at in (0, size - PAGE):
                    file.allocate(at, PAGE)
                for private in (True, False):
                    must_convert(file, size // 2 // PAGE * PAGE, PAGE, private=private)
                    must_convert(file, 0, size, private=private)

    seconds = killed_after(work, 0.15, 10)
    assert seconds < 10, f"it went on for {seconds:.1f} s after SIGKILL"
    assert eventually(lambda: vms_alive() == with_rig, 20)
    assert memory.is_about(0)
    settles(one)


@rule("gip.leaks.fds", "gip.leaks.mappings", "gip.leaks.memory")
@in_place
def test_a_thousand_conversions_leave_nothing(one: FileRig) -> None:
    """Descriptors, mappings of this process and the file's memory are as before."""
    one.guest.fill(GPA, 1, SIZE)
    memory = Unevictable()

    def mappings() -> int:
        return Path("/proc/self/maps").read_bytes().count(b"kvm-gmem")

    fds, maps = open_fds(), mappings()
    assert maps == 1
    for turn in range(1000):
        page = turn % PAGES
        one.to(page * PAGE, private=turn % 3 > 0)
        if turn % 51 == 0:  # it is shared now
            with in_a_pipe(one.address(page * PAGE)):
                assert one.answer(0, SIZE, private=True) == ("EAGAIN", page * PAGE)
    assert (open_fds(), mappings()) == (fds, maps)
    assert memory.is_about(0)
    settles(one)


# -- without memory --------------------------------------------------------------------------------


@rule("gip.fail.fault")
@in_place
def test_the_hosts_first_touch_without_memory(one: FileRig) -> None:
    """A shared page that can't be had: the access fails, and succeeds once there is memory."""
    with HostMemory(PAGE) as buffer:
        buffer.write(0, b"x")
        with failing_allocations():
            said = answer(lambda: one.one.allocate(OFFSET, PAGE))
        assert said == "ENOMEM"
    assert one.shared.read(0, 8) == bytes(8)
    settles(one)
