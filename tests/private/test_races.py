"""Races of a bounded number of rounds: no stale data is read, and nothing hangs."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress

import pytest

from kvmpriv import HostMemory, private
from kvmpriv.exits import ExitReason, MmioExit

from .support.accounting import BIG, Unevictable
from .support.races import ROUNDS, beside, rounds
from .support.rig import MakeRig, Rig, only, run_again, two_backings
from .support.rules import rule
from .support.syscalls import GIB, MIB, PAGE

pytestmark = [
    pytest.mark.usefixtures("no_leak"),
    pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed"),
]

GPA, SIZE = 4 * GIB, 2 * MIB


def settles(rig: Rig, gpa: int = GPA) -> None:
    """Private memory still works: it can be written, punched and written again."""
    slot = next(one for one in rig.vm.slots.values() if one.guest_phys_addr <= gpa < one.end)
    assert isinstance(slot, private.PrivateSlot)
    rig.convert(gpa, PAGE, private=True)
    for cpu in rig.guest.cpus:
        cpu.write(gpa, b"works")
        assert cpu.read(gpa, 5) == b"works"
        slot.punch_hole(gpa, PAGE)
        assert cpu.read(gpa, 5) == bytes(5), "nothing stale"


@rule("race.hole-against-fault.each", "race.allocation-against-fault")
def test_no_hole_is_refilled_with_what_was(make_rig: MakeRig) -> None:
    """Each hole reads as zeros while another vCPU faults and pages are allocated around it."""
    rig = make_rig(cpus=2)
    file = rig.file(SIZE)
    rig.bind(GPA, SIZE, file)
    other = rig.guest.cpus[1]

    def fill() -> None:
        file.allocate(0, SIZE)

    def touch() -> None:
        other.touch(GPA + PAGE // 2, PAGE, 64, byte=0x77)

    turns = 0
    with beside(touch) as touched, beside(fill) as filled:
        for turn in rounds(200):
            rig.guest.store(GPA + 8 * PAGE, 8, turn + 1)
            rig.guest.store(GPA + 40 * PAGE, 8, turn + 1)
            file.punch_hole(8 * PAGE, (1 + turn % 33) * PAGE)
            assert rig.guest.load(GPA + 8 * PAGE, 8) == 0, f"stale after hole {turn}"
            expected = 0 if turn % 33 == 32 else turn + 1
            assert rig.guest.load(GPA + 40 * PAGE, 8) == expected, f"beside hole {turn}"
            turns += 1
    assert turns >= ROUNDS
    assert min(touched[0], filled[0]) > 0
    settles(rig)


@rule("race.hole-against-slot", "race.allocation-against-slot")
@pytest.mark.known_defect("notifiers-unlocked", "slot-unprepared")
def test_holes_against_slots_in_use(make_rig: MakeRig) -> None:
    """A slot is made and deleted under a running guest while its file is punched and filled."""
    rig = make_rig(cpus=2)
    file, other = rig.file(SIZE), rig.guest.cpus[1]
    other.serve = lambda _cpu, _exit: True  # no slot: try again
    rig.convert_all(file, GPA, private=True)

    def change() -> None:
        file.punch_hole(0, SIZE // 2)
        file.allocate(0, SIZE // 2)

    def leave_a_slot() -> None:
        with suppress(OSError):  # there is one
            rig.abi.bind(rig.vm, GPA, SIZE, file)

    turns = 0
    with (
        beside(change) as changed,
        beside(lambda: other.touch(GPA, PAGE, 8, byte=1)) as touched,
        ExitStack() as stack,
    ):
        stack.callback(leave_a_slot)  # without one the other vCPU would try for ever
        for turn in rounds(150, until=lambda: min(changed[0], touched[0], len(other.exits)) > 0):
            slot = rig.abi.bind(rig.vm, GPA, SIZE, file)
            rig.guest.store(GPA + SIZE // 2, 8, turn + 1)
            slot.delete()
            slot = rig.abi.bind(rig.vm, GPA, SIZE, file)
            assert rig.guest.load(GPA + SIZE // 2, 8) == turn + 1, "what no hole took is there"
            slot.delete()
            turns += 1
    assert turns >= ROUNDS
    settles(rig)


@rule("race.conversion-against-fault.two")
@pytest.mark.known_defect("kind-read-twice")
@two_backings
def test_conversions_against_two_vcpus(make_rig: MakeRig) -> None:
    """Two vCPUs count in a page that is converted meanwhile: no increment is lost."""
    rig = make_rig(cpus=2)
    with HostMemory(SIZE) as memory:
        slot = rig.bind(GPA, SIZE, rig.file(SIZE), memory=memory)
        for cpu in rig.guest.cpus:
            cpu.serve = run_again(rig.abi)

        def count(number: int) -> None:
            rig.guest.cpus[number].increment(GPA + 8 * number, 50)

        with beside(lambda: count(0)) as first, beside(lambda: count(1)) as second:
            for turn in rounds(200):
                rig.convert(GPA, PAGE if turn % 3 else SIZE, private=bool(turn % 2))
        assert turn + 1 >= ROUNDS
        totals = [0, 0]
        for private_side in (True, False):
            rig.convert(GPA, PAGE, private=private_side)
            for number in (0, 1):
                totals[number] += rig.guest.load(GPA + 8 * number, 8)
        assert totals == [50 * first[0], 50 * second[0]]
        assert min(totals) > 0
        settles(rig)
        slot.delete()


@rule("race.conversion-against-fault.kind")
@only("guest_memfd")
def test_faults_that_conversions_overtake(make_rig: MakeRig) -> None:
    """After a conversion the guest writes to the memory that is left, whatever faults there were.

    The host sees what the guest has written to shared memory, and nothing else.
    """
    rig = make_rig(cpus=2)
    other = rig.guest.cpus[1]
    with HostMemory(SIZE) as memory:
        slot = rig.bind(GPA, SIZE, rig.file(SIZE), memory=memory)
        for cpu in rig.guest.cpus:
            cpu.serve = run_again(rig.abi)
        with beside(lambda: other.increment(GPA + 8, 50)) as counted:
            for turn in rounds(100, until=lambda: counted[0] > 0):
                rig.convert(GPA, PAGE, private=bool(turn % 2))
                time.sleep(0.003)  # for faults that began before
                rig.guest.store(GPA, 8, turn + 1)
                seen = int.from_bytes(memory.read(0, 8), "little") == turn + 1
                assert seen == (turn % 2 == 0), turn
        assert turn + 1 >= ROUNDS
        settles(rig)
        slot.delete()


@rule("race.conversion-against-slot")
@two_backings
def test_conversions_against_slots(rig: Rig) -> None:
    """Ranges are converted while their slot is made and deleted: the last conversion holds."""
    file = rig.file(SIZE)
    with HostMemory(SIZE) as memory:
        memory.write(0, b"host")
        rig.bind(GPA, SIZE, file, memory=memory).delete()
        kinds = [True]

        def convert() -> None:
            kinds.append(not kinds[-1])
            rig.convert(GPA, SIZE, private=kinds[-1])

        turns = 0
        with beside(convert):
            for turn in rounds(150):
                slot = rig.abi.bind(rig.vm, GPA, SIZE, file, memory=memory)
                slot.delete()
                turns = turn + 1
        assert turns >= ROUNDS
        assert len(kinds) > 1
        slot = rig.abi.bind(rig.vm, GPA, SIZE, file, memory=memory)
        assert rig.guest.read(GPA, 4) == (bytes(4) if kinds[-1] else b"host")
        settles(rig)
        slot.delete()


@rule("race.conversion-against-conversion", "race.conversion-against-hole")
@pytest.mark.known_defect("kind-read-twice", "private-prefetch")
@two_backings
def test_conversions_against_each_other(rig: Rig) -> None:
    """Two threads convert overlapping ranges and punch holes: each page ends in one state."""
    with HostMemory(SIZE) as memory:
        memory.write(0, b"\x11" * SIZE)
        file = rig.file(SIZE)
        slot = rig.bind(GPA, SIZE, file, memory=memory)
        rig.guest.fill(GPA, 0x22, SIZE)
        rig.guest.cpus[0].serve = run_again(rig.abi)
        with (
            beside(lambda: rig.convert(GPA, SIZE // 2 + 7 * PAGE, private=False)) as to_shared,
            beside(lambda: file.punch_hole(SIZE - PAGE, PAGE)) as holes,
        ):
            for turn in rounds(150):
                rig.convert(GPA + SIZE // 4, SIZE // 2, private=True)
                seen = rig.guest.load(GPA + SIZE // 2, 1)
                assert seen in (0x11, 0x22), f"round {turn}: neither side's byte"
        assert turn + 1 >= ROUNDS
        assert min(to_shared[0], holes[0]) > 0
        rig.convert(GPA, SIZE // 2, private=False)
        rig.convert(GPA + SIZE // 2, SIZE // 2, private=True)
        assert rig.guest.span(GPA, 0x11, SIZE // 2) == SIZE // 2
        rest = SIZE // 2 - PAGE
        assert rig.guest.span(GPA + SIZE // 2, 0x22, rest) == rest
        settles(rig)
        slot.delete()


@rule("race.slot-against-access")
def test_slots_against_two_vcpus(make_rig: MakeRig) -> None:
    """A slot is made and deleted under two vCPUs: each write is in the file, or is reported once.

    v9 reports the write as MMIO.  guest_memfd faults before the write, which is then repeated.
    """
    rig = make_rig(cpus=2)
    file = rig.file(SIZE)
    rig.bind(GPA, SIZE, file)
    made, kept = [0, 0], [[0] * 16, [0] * 16]

    def write(number: int) -> None:
        cpu = rig.guest.cpus[number]
        made[number] += 1
        page, value, told = made[number] % 16, made[number], cpu.exit_count
        gpa = GPA + page * PAGE + 8 * number
        cpu.store(gpa, 8, value)
        exits = set(cpu.exits[-(cpu.exit_count - told) :]) if cpu.exit_count > told else set()
        if exits and rig.behaviour.mmio_without_slot:
            assert exits == {MmioExit(ExitReason.MMIO, True, gpa, 8, value.to_bytes(8, "little"))}
            assert cpu.exit_count == told + 1
            return
        assert exits <= {rig.fault_at(gpa, private=True)}
        kept[number][page] = value

    for cpu in rig.guest.cpus:
        cpu.serve = lambda _cpu, _exit: True

    def met() -> bool:
        return all(any(kept[number]) and cpu.exits for number, cpu in enumerate(rig.guest.cpus))

    turns = 0
    with beside(lambda: write(0)), beside(lambda: write(1)):
        for turn in rounds(150, until=met):
            next(one for one in rig.vm.slots.values() if one.guest_phys_addr == GPA).delete()
            rig.abi.bind(rig.vm, GPA, SIZE, file)
            turns = turn + 1
    assert turns >= ROUNDS
    for number, cpu in enumerate(rig.guest.cpus):
        cpu.serve = None
        found = [cpu.load(GPA + page * PAGE + 8 * number, 8) for page in range(16)]
        assert found == kept[number], number
    settles(rig)


@rule("race.vm-against-hole", "race.file-against-hole")
@pytest.mark.known_defect("vm-closed-during-hole", "slot-unprepared", "notifiers-unlocked")
def test_vms_closed_during_holes(make_rig: MakeRig) -> None:
    """VMs are made and closed while the file is punched; guest_memfd: while the VM's file is."""
    memory = Unevictable()
    turns = 0
    with ExitStack() as stack:
        rig = make_rig()
        if rig.behaviour.shares_files:
            file = stack.enter_context(rig.abi.create_file(rig.vm, BIG))
        for turn in rounds(6, 4, least=2):
            one = make_rig()
            if not rig.behaviour.shares_files:
                file = stack.enter_context(one.abi.create_file(one.vm, BIG))
            one.bind(GPA, MIB, file)
            one.guest.fill(GPA, turn, MIB)

            def change(punched: object = file) -> None:
                with suppress(ValueError):  # closed
                    punched.punch_hole(0, BIG)  # type: ignore[attr-defined]
                    punched.allocate(0, MIB)  # type: ignore[attr-defined]

            with beside(change) as holes:
                one.guest.touch(GPA, PAGE, 64, byte=1)
                one.guest.close()
                one.vm.close()
            assert holes[0] > 0
            turns += 1
    assert turns >= 2
    assert memory.is_about(0)
