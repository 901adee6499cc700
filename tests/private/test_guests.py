"""Guests in private memory, by both ABIs: what guest and host see, and which exits there are."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import kvm as k
from kvmpriv.exits import Exit, ExitReason, HypercallExit, MemoryFaultExit, MmioExit
from kvmpriv.guest.puppet import GuestExit
from kvmpriv.private import restrictedmem

from .support.defects import mainline_defect
from .support.kernels import MakeVm
from .support.races import ROUNDS, beside, rounds
from .support.rig import GPA, OFFSET, SIZE, MakeRig, OneSlotRig, Rig, only, run_again, two_backings
from .support.rules import rule
from .support.syscalls import MIB, PAGE

MakeGuest = Callable[..., OneSlotRig]

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture
def make_v9(make_private_vm: MakeVm, kvm: Kvm) -> Iterator[MakeGuest]:
    """Make v9 guests with a private slot."""
    with ExitStack() as stack:
        yield lambda **how: OneSlotRig(stack, make_private_vm(), kvm, **how)


@pytest.fixture
def v9_guest(make_v9: MakeGuest) -> OneSlotRig:
    """A v9 guest with a private slot."""
    return make_v9()


@pytest.fixture
def make(make_rig: MakeRig) -> MakeGuest:
    """Make guests with a private slot, by each ABI that the kernel has."""
    return lambda **how: make_rig(OneSlotRig, **how)


@pytest.fixture
def private(make: MakeGuest) -> OneSlotRig:
    """A guest with a private slot."""
    return make()


PATTERN = bytes(range(256)) * 16


@rule("faults.private-from-file", "faults.shared-from-userspace-addr")
@two_backings
def test_private_and_shared_are_two_memories(private: OneSlotRig) -> None:
    """What the guest writes to private memory is in the file, not where the host can read."""
    gpa = GPA + 3 * PAGE
    private.shared.write(3 * PAGE, PATTERN)
    private.guest.write(gpa, b"private marker")
    assert private.guest.read(gpa, 14) == b"private marker"
    assert private.shared.read(3 * PAGE, PAGE) == PATTERN, "the host's page is as it was"
    private.convert(gpa, PAGE, private=False)
    assert private.guest.read(gpa, PAGE) == PATTERN, "shared, the guest sees the host's page"
    private.guest.write(gpa + 8, b"shared marker")
    assert private.shared.read(3 * PAGE + 8, 13) == b"shared marker"
    private.convert(gpa, PAGE, private=True)
    assert private.guest.read(gpa, 14) == b"private marker", "and the private page kept its own"
    assert private.guest.exits == []


@rule("faults.fresh-pages-are-zero")
@pytest.mark.known_defect("pages-not-zeroed", "notified-in-bytes")
def test_fresh_private_pages_are_zero(private: OneSlotRig) -> None:
    """A private page is zero at first touch, after fallocate(2) and after a hole."""
    # Fill the host's free memory with something to be found, and let go of it.
    with HostMemory(64 * MIB) as secrets:
        secrets.write(0, b"\xa5" * (64 * MIB))
    private.allocate(GPA + 2 * MIB, 2 * MIB)
    assert private.guest.span(GPA, 0, SIZE) == SIZE
    private.guest.fill(GPA, 0x77, SIZE)
    private.punch_hole(GPA + MIB, MIB)
    assert private.guest.span(GPA + MIB, 0, MIB) == MIB
    assert private.guest.span(GPA, 0x77, MIB) == MIB
    assert private.guest.span(GPA + 2 * MIB, 0x77, SIZE - 2 * MIB) == SIZE - 2 * MIB


@rule("invalidation.precise")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
@pytest.mark.parametrize(
    ("first", "count"), [(0, 1), (5, 1), (1, 3), (511, 2), (512, 512), (1535, 1)]
)
def test_a_hole_takes_just_its_pages(private: OneSlotRig, first: int, count: int) -> None:
    """After a hole the guest reads zeros in it and the old content on both sides of it."""
    private.guest.fill(GPA, 0x5A, SIZE)
    private.punch_hole(GPA + first * PAGE, count * PAGE)
    start, end = first * PAGE, (first + count) * PAGE
    assert private.guest.span(GPA, 0x5A, SIZE) == start
    assert private.guest.span(GPA + start, 0, SIZE - start) == end - start
    assert private.guest.span(GPA + end, 0x5A, SIZE - end) == SIZE - end
    private.guest.write(GPA + start, b"again")
    assert private.guest.read(GPA + start, 5) == b"again"


@rule("invalidation.outside-the-slot")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
def test_holes_beside_the_binding(private: OneSlotRig) -> None:
    """A hole in the file before or after the slot's part frees nothing of the slot."""
    private.guest.fill(GPA, 0x5A, SIZE)
    for offset in (0, OFFSET - 2 * MIB, OFFSET - PAGE, OFFSET + SIZE, OFFSET + SIZE + MIB):
        private.private_file.punch_hole(offset, PAGE)
        assert private.guest.span(GPA, 0x5A, SIZE) == SIZE
    private.private_file.punch_hole(OFFSET - MIB, MIB + PAGE)
    assert private.guest.span(GPA, 0, SIZE) == PAGE
    assert private.guest.span(GPA + PAGE, 0x5A, SIZE - PAGE) == SIZE - PAGE


@rule("convert.state-survives-the-slot")
@two_backings
def test_the_state_survives_the_slot(private: OneSlotRig) -> None:
    """The state belongs to the VM and the gfn: deleting the slot does not change it."""
    private.shared.write(0, b"host 0 ")
    private.shared.write(PAGE, b"host 1 ")
    private.guest.write(GPA, b"guest 0")
    private.convert(GPA + PAGE, PAGE, private=False)
    private.slot.delete()
    with pytest.raises(GuestExit) as stopped:
        private.guest.load(GPA, 4)
    if private.behaviour.mmio_without_slot:
        assert stopped.value.exit == MmioExit(ExitReason.MMIO, False, GPA, 4, b"")
    else:
        assert private.fault_of(stopped.value) == (GPA, PAGE, True), "no slot: nothing private"
    private.guest.reset()
    private.bind_again(1, GPA, SIZE, OFFSET, private.shared)
    assert private.guest.read(GPA, 7) == b"guest 0", "the file kept it"
    assert private.guest.read(GPA + PAGE, 7) == b"host 1 "


@rule("convert.large-ranges")
@pytest.mark.known_defect("private-prefetch")
@two_backings
def test_conversion_of_parts_of_a_large_range(private: OneSlotRig) -> None:
    """2 MiB and its parts are converted back and forth; both sides are checked each time."""
    private.shared.write(0, b"\x11" * SIZE)
    private.guest.fill(GPA, 0x22, SIZE)
    slot, state = private.slot, [True] * (SIZE // PAGE)
    steps = ((512, 512, False), (600, 8, True), (0, 1, False), (1023, 2, False), (512, 512, True))
    for first, count, wanted in steps:
        private.convert(GPA + first * PAGE, count * PAGE, private=wanted)
        state[first : first + count] = [wanted] * count
        expected = b"".join((b"\x22" if one else b"\x11") * PAGE for one in state)
        assert private.guest.read(GPA, SIZE) == expected, (first, count, wanted)
        # What is mapped still hides a state that has changed beside the range.
        slot.delete()
        slot = private.bind_again(1, GPA, SIZE, OFFSET, private.shared)
        assert private.guest.read(GPA, SIZE) == expected, ("mapped anew", first, count, wanted)
    assert private.shared.read(0, SIZE) == b"\x11" * SIZE
    assert private.guest.exits == []


@rule("slots.same-offset-mapping")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
def test_two_slots_of_one_file(private: OneSlotRig) -> None:
    """A second slot at another guest address uses its own part of the file."""
    second = 64 << 30
    with HostMemory(MIB) as memory:
        slot = private.bind_again(2, second, MIB, OFFSET + SIZE + MIB, memory)
        private.convert(second, MIB, private=True)
        private.guest.write(GPA, b"first")
        private.guest.write(second, b"second")
        assert private.guest.read(GPA, 5) == b"first"
        assert private.guest.read(second, 6) == b"second"
        private.private_file.punch_hole(OFFSET + SIZE + MIB, PAGE)
        assert private.guest.read(GPA, 5) == b"first"
        assert private.guest.read(second, 6) == bytes(6)
        slot.delete()


@rule("convert.range-across-slots")
@two_backings
def test_ranges_across_pages(private: OneSlotRig) -> None:
    """One access across a shared and a private page reaches both memories."""
    private.convert(GPA, PAGE, private=False)
    private.guest.write(GPA + PAGE - 3, b"abcdef")
    assert private.shared.read(PAGE - 3, 6) == b"abc\0\0\0"
    assert private.guest.read(GPA + PAGE - 3, 6) == b"abcdef"


@rule("isolation.host-mapping")
@two_backings
def test_the_marker_is_nowhere_in_the_process(private: OneSlotRig) -> None:
    """A marker in private memory is in no page of this process; one in shared memory is found."""
    # This process never has it whole: the guest itself assembles its copy.
    half = os.urandom(8).hex().encode()
    for number, byte in enumerate(half + half[::-1]):
        private.guest.store(GPA + 16 * PAGE + number, 1, byte)
    private.convert(GPA, PAGE, private=False)
    for number, byte in enumerate(half + half[::-1]):
        private.guest.store(GPA + number, 1, byte)
    at = private.shared.userspace_addr
    with Path("/proc/self/mem").open("rb", buffering=0) as mem:
        mem.seek(at)
        view = mem.read(SIZE)
    marker = half + half[::-1]
    assert view.find(marker) == 0, "the control, in shared memory"
    assert view.find(marker, 1) == -1
    assert private.guest.read(GPA + 16 * PAGE, 32) == marker, "it is there, for the guest"


@rule("dirty-log.private-writes")
def test_dirty_logging(v9_guest: OneSlotRig) -> None:
    """KVM logs the guest's writes to private pages of a slot with LOG_DIRTY_PAGES."""
    v9_guest.slot.delete()
    v9_guest.bind_again(1, GPA, SIZE, OFFSET, v9_guest.shared, k.KVM_MEM_LOG_DIRTY_PAGES)
    v9_guest.guest.write(GPA + 9 * PAGE, b"dirty")
    log = v9_guest.vm.get_dirty_log(1)
    assert log[1] == 1 << 1
    assert sum(byte.bit_count() for byte in log) == 1


# -- faults --------------------------------------------------------------------------------------


@rule("v9.fault.exit", "v9.fault.again", "v9.hypercall.wants")
@pytest.mark.known_defect("pages-not-zeroed")
@pytest.mark.parametrize("wants", [False, True], ids=["wants shared", "wants private"])
def test_a_guest_that_wants_the_other_kind_exits(v9_guest: OneSlotRig, wants: bool) -> None:
    """Exit 38 has the gpa, 4096 bytes and the wanted kind; it repeats until a conversion."""
    gpa = GPA + 7 * PAGE
    v9_guest.shared.write(7 * PAGE, b"hosts")
    v9_guest.guest.write(gpa, b"guest")
    v9_guest.convert(gpa, PAGE, private=not wants)
    assert v9_guest.want(gpa, PAGE, private=wants) == 0
    with pytest.raises(GuestExit) as stopped:
        v9_guest.guest.read(gpa + 3, 2)
    fault = stopped.value.exit
    assert fault == MemoryFaultExit(
        ExitReason.MEMORY_FAULT_V9, gpa, PAGE, wants, int(wants), 0, "restrictedmem"
    )
    assert v9_guest.guest.vcpu.kvm_run.exit_reason == 38
    for _ in range(3):
        with pytest.raises(GuestExit) as again:
            v9_guest.guest.resume()
        assert again.value.exit == fault, "run again unconverted it exits again"
    v9_guest.convert(fault.gpa, fault.size, private=fault.private)
    assert v9_guest.guest.resume() == (b"st" if wants else b"ts")
    # Its neighbours follow the VM's state, and so does the page once the guest has cleared it.
    assert v9_guest.guest.read(gpa + PAGE, 1) == b"\0"
    assert v9_guest.want(gpa, PAGE, private=None) == 0
    v9_guest.convert(gpa, PAGE, private=not wants)
    assert v9_guest.guest.read(gpa, 5) == (b"hosts" if wants else b"guest")
    assert len(v9_guest.guest.exits) == 4


@rule("v9.fault.implicit-conversion")
@pytest.mark.known_defect("private-prefetch")
def test_implicit_conversion_by_a_server(v9_guest: OneSlotRig) -> None:
    """A guest accesses memory of the other kind, and the host converts it at each exit."""

    def serve(_: object, exit_: Exit) -> bool:
        assert isinstance(exit_, MemoryFaultExit)
        v9_guest.convert(exit_.gpa, exit_.size, private=exit_.private)
        return True

    v9_guest.guest.serve = serve
    v9_guest.guest.fill(GPA, 0x33, 2 * MIB)
    v9_guest.shared.write(0, b"\x44" * (2 * MIB))
    assert v9_guest.want(GPA, 2 * MIB, private=False) == 0
    assert v9_guest.guest.span(GPA, 0x44, 2 * MIB) == 2 * MIB
    assert len(v9_guest.guest.exits) == 512
    touched = {exit_.gpa for exit_ in v9_guest.guest.exits if isinstance(exit_, MemoryFaultExit)}
    assert touched == set(range(GPA, GPA + 2 * MIB, PAGE))
    assert v9_guest.want(GPA, MIB, private=True) == 0
    assert v9_guest.guest.span(GPA, 0x33, 2 * MIB) == MIB
    assert len(v9_guest.guest.exits) == 512 + 256


@rule("v9.hypercall.errors")
def test_the_hypercalls_errors(v9_guest: OneSlotRig) -> None:
    """KVM answers -EINVAL for a bad range, also with v9's own bits, and -1000 if the exit is not
    enabled.
    """
    call, want_private, want_shared = v9_guest.guest.hypercall, 1 << 8, 1 << 9
    for attributes in (want_private, want_shared, want_private | want_shared):
        assert call(k.KVM_HC_MAP_GPA_RANGE, GPA, 1, attributes) == 0
        for gpa, pages in ((GPA + 1, 1), (GPA, 0), (GPA, (1 << 64) - 1)):
            assert call(k.KVM_HC_MAP_GPA_RANGE, gpa, pages, attributes) == -errno.EINVAL
        # What may not wrap is the page number, not the address.
        assert call(k.KVM_HC_MAP_GPA_RANGE, (1 << 64) - PAGE, 2, attributes) == 0
    assert call(k.KVM_HC_MAP_GPA_RANGE, GPA, 1, k.KVM_MAP_GPA_RANGE_ENCRYPTED) == -1000
    v9_guest.vm.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1 << k.KVM_HC_MAP_GPA_RANGE)
    with pytest.raises(GuestExit) as stopped:
        call(k.KVM_HC_MAP_GPA_RANGE, GPA, 2, k.KVM_MAP_GPA_RANGE_ENCRYPTED)
    exit_ = stopped.value.exit
    assert isinstance(exit_, HypercallExit)
    assert (exit_.nr, exit_.args[:3], exit_.longmode) == (12, (GPA, 2, 16), True)
    v9_guest.guest.vcpu.kvm_run.hypercall.ret = 5
    assert v9_guest.guest.resume() == 5
    with pytest.raises(GuestExit):
        call(k.KVM_HC_MAP_GPA_RANGE, GPA, 1, k.KVM_MAP_GPA_RANGE_DECRYPTED)


@rule("v9.fault.unmapped-userspace-addr")
def test_shared_memory_that_is_not_mapped(v9_guest: OneSlotRig) -> None:
    """With userspace_addr 0 private accesses succeed, and for a shared one KVM_RUN is EFAULT."""
    gpa = GPA + SIZE
    v9_guest.bind_again(2, gpa, MIB, 0, None)
    v9_guest.guest.write(gpa, b"works")
    assert v9_guest.guest.read(gpa, 5) == b"works"
    v9_guest.convert(gpa, PAGE, private=False)
    with pytest.raises(OSError, match="KVM_RUN") as failure:
        v9_guest.guest.read(gpa, 5)
    assert failure.value.errno == errno.EFAULT
    v9_guest.convert(gpa, PAGE, private=True)
    assert v9_guest.guest.resume() == b"works", "nothing is lost by the failure"


@rule("v9.fault.plain-slot")
def test_a_plain_slot_ignores_the_state(v9_guest: OneSlotRig) -> None:
    """All gfns start private, and an ordinary slot works all the same."""
    with HostMemory(MIB) as memory:
        v9_guest.vm.map(memory, 0, slot=5)
        for private in (True, False):
            v9_guest.convert(0, MIB, private=private)
            v9_guest.guest.write(PAGE, b"plain")
            assert memory.read(PAGE, 5) == b"plain"
        v9_guest.vm.slots[5].delete()


@rule("v9.fault.no-page")
@pytest.mark.known_defect("no-page-spins", "pages-not-zeroed")
def test_a_page_that_can_not_be_had(v9_guest: OneSlotRig) -> None:
    """If the file can have no page for a gfn, KVM_RUN fails and does not spin."""
    gpa = GPA + SIZE
    v9_guest.bind_again(2, gpa, MIB, 1 << 63, None)
    with pytest.raises(OSError, match="KVM_RUN") as failure:
        v9_guest.guest.read(gpa, 1)
    assert failure.value.errno == errno.EFBIG
    v9_guest.guest.reset()
    v9_guest.vm.slots[2].delete()
    v9_guest.bind_again(2, gpa, MIB, (1 << 63) - 2 * MIB, None)
    assert v9_guest.guest.read(gpa, 1) == b"\0", "the twin below it"


@rule("v9.fault.read-only")
@pytest.mark.known_defect("read-only-spins")
def test_a_write_to_read_only_private_memory(v9_guest: OneSlotRig) -> None:
    """The write exits, the page does not change, and reads work."""
    v9_guest.guest.write(GPA, b"before")
    v9_guest.slot.delete()
    v9_guest.bind_again(1, GPA, SIZE, OFFSET, v9_guest.shared, k.KVM_MEM_READONLY)
    assert v9_guest.guest.read(GPA, 6) == b"before"
    with pytest.raises(GuestExit) as stopped:
        v9_guest.guest.store(GPA, 4, 0x12345678)
    assert stopped.value.exit.reason in (k.KVM_EXIT_MMIO, 38)
    v9_guest.guest.reset()
    assert v9_guest.guest.read(GPA, 6) == b"before"


@rule("gm.fault.exit")
@only("guest_memfd")
def test_private_memory_without_a_slot_for_it(make: MakeGuest) -> None:
    """An access to a private gfn in an ordinary slot is exit 39, and KVM_RUN fails with EFAULT."""
    private = make()
    with HostMemory(MIB) as memory:
        private.vm.map(memory, 0, slot=5)
        memory.write(PAGE, b"plain")
        private.convert(PAGE, PAGE, private=True)
        with pytest.raises(GuestExit) as stopped:
            private.guest.read(PAGE, 5)
        assert private.fault_of(stopped.value) == (PAGE, PAGE, True)
        assert stopped.value.exit.reason == 39
        private.convert(PAGE, PAGE, private=False)
        assert private.guest.resume() == b"plain"
        private.vm.slots[5].delete()


# -- races ---------------------------------------------------------------------------------------


def _in_thread(errors: list[BaseException], body: Callable[[], None]) -> threading.Thread:
    def run() -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001  # shown by the test
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@rule("race.hole-against-fault")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
def test_holes_against_faults(make: MakeGuest) -> None:
    """Two vCPUs fault while holes are punched; after a hole no stale data is read."""
    private = make(cpus=2)
    errors: list[BaseException] = []
    stop = threading.Event()
    faults = [0, 0]

    def churn(number: int) -> Callable[[], None]:
        cpu = private.guest.cpus[number]

        def body() -> None:
            while not stop.is_set():
                cpu.touch(GPA + number * 8, PAGE, 64, byte=0x99)
                faults[number] += 1

        return body

    threads = [_in_thread(errors, churn(number)) for number in (0, 1)]
    for round_ in range(150):
        private.punch_hole(GPA + round_ % 3 * PAGE, 40 * PAGE)
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "stuck"
    assert not errors
    assert min(faults) > 0
    private.punch_hole(GPA, MIB)
    for cpu in private.guest.cpus:
        assert cpu.span(GPA, 0, MIB) == MIB, "nothing stale after the last hole"


@rule("race.conversion-against-fault")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed", "kind-read-twice")
@two_backings
def test_conversions_against_faults(make: MakeGuest) -> None:
    """A write during a conversion reaches one of the two memories."""
    private = make(cpus=2)
    errors: list[BaseException] = []
    stop = threading.Event()
    done = [0]

    def count() -> None:
        while not stop.is_set():
            done[0] += 100
            private.guest.increment(GPA, 100)

    private.guest.serve = run_again(private.abi)
    thread = _in_thread(errors, count)
    for round_ in range(100):
        private.convert(GPA, PAGE, private=bool(round_ % 2))
    stop.set()
    thread.join(60)
    assert not thread.is_alive(), "stuck"
    assert not errors
    assert done[0] > 0
    stale = private.guest.exits
    assert len(stale) <= (100 if private.abi.traits.access_follows_state else 0)
    assert {private.fault_of(GuestExit(private.guest.cpus[0], exit_))[:2] for exit_ in stale} <= {
        (GPA, PAGE)
    }
    private.guest.serve = None
    private.convert(GPA, PAGE, private=True)
    in_private = private.guest.load(GPA, 8)
    private.convert(GPA, PAGE, private=False)
    in_shared = private.guest.cpus[1].load(GPA, 8)
    assert int.from_bytes(private.shared.read(0, 8), "little") == in_shared
    assert in_private + in_shared == done[0], "no increment was lost, none counted twice"


@rule("race.slot-against-fault")
def test_slot_deletion_under_access(make: MakeGuest) -> None:
    """A slot is made and deleted under a running guest: each access works or exits."""
    private = make()
    private.guest.serve = lambda _cpu, _exit: True
    turns = 0
    with beside(lambda: private.guest.touch(GPA, PAGE, 16)) as touched:
        for turn in rounds(100, until=lambda: min(touched[0], len(private.guest.exits)) > 0):
            private.slot.delete()
            private.slot = private.bind_again(1, GPA, SIZE, OFFSET, private.shared)
            turns = turn + 1
    assert turns >= ROUNDS
    reason = (
        k.KVM_EXIT_MMIO if private.behaviour.mmio_without_slot else private.abi.fault_layout.reason
    )
    assert {exit_.reason for exit_ in private.guest.exits} == {reason}
    private.guest.serve = None
    private.guest.write(GPA, b"works")
    assert private.guest.read(GPA, 5) == b"works"


@rule("race.slot-against-fault.gone")
@pytest.mark.parametrize("is_private", [True, False], ids=["private", "shared"])
def test_nothing_stays_mapped_of_a_deleted_slot(make: MakeGuest, is_private: bool) -> None:
    """One vCPU accesses a slot while it is deleted; then an access of the other one is an exit.

    A shared access without a slot is MMIO, and never a fault exit or an error of KVM_RUN.
    """
    private = make(cpus=2)
    if not is_private:
        private.convert(GPA, SIZE, private=False)
    mmio = not is_private or private.behaviour.mmio_without_slot
    expected = k.KVM_EXIT_MMIO if mmio else private.abi.fault_layout.reason
    other = private.guest.cpus[1]
    reasons: list[int] = []

    def serve(_cpu: object, exit_: Exit) -> bool:
        reasons.append(exit_.reason)
        return True

    other.serve = serve
    with beside(lambda: other.touch(GPA, PAGE, 16)):
        for turn in rounds(50, until=lambda: reasons):
            private.slot.delete()
            with pytest.raises(GuestExit) as stopped:
                private.guest.load(GPA + turn % 16 * PAGE, 8)
            assert stopped.value.exit.reason == expected
            private.slot = private.bind_again(1, GPA, SIZE, OFFSET, private.shared)
            private.guest.resume()
    assert turn + 1 >= ROUNDS
    assert set(reasons) == {expected}


@rule("gm.fault.after-mmio", "gip.fault.after-mmio")
@pytest.mark.parametrize("make_rig", ["guest_memfd", "guest_memfd_in_place"], indirect=True)
@pytest.mark.parametrize("before", [False, True], ids=["untouched", "mmio"])
def test_private_memory_where_mmio_was(rig: Rig, before: bool) -> None:
    """A gfn that the guest has accessed without a slot is served from the file once it is private.

    KVM remembers MMIO in the page tables.  The next access is reported as one of a reserved bit,
    which KVM takes for a shared one; it has outlived what made it MMIO.
    """
    if before:
        with pytest.raises(GuestExit) as stopped:
            rig.guest.load(GPA, 4)
        assert stopped.value.exit.reason == k.KVM_EXIT_MMIO
        rig.guest.resume()
    rig.bind(GPA, PAGE, rig.file(PAGE))
    fault = None
    try:
        assert rig.guest.load(GPA, 4) == 0
    except GuestExit as again:
        fault = again.exit
    if before and fault == rig.fault_at(GPA, private=False):
        mainline_defect("stale-mmio", str(fault))
    assert fault is None
    rig.guest.write(GPA, b"works")
    assert rig.guest.read(GPA, 5) == b"works"


@rule("v9.hook.off")
def test_no_private_memory_where_the_hook_says_no(kvm: Kvm, refusing_vm: object) -> None:
    """With the hook off the test vehicle's bits have no effect: the hypercall is as before."""
    from kvmpriv.guest.puppet import Puppet

    with Puppet(refusing_vm, cpuid=kvm.get_supported_cpuid()) as guest:  # type: ignore[arg-type]
        assert guest.hypercall(k.KVM_HC_MAP_GPA_RANGE, GPA, 1, 1 << 8) == -1000
    with pytest.raises(OSError, match="REG_REGION") as failure:
        restrictedmem.memory_encrypt_reg_region(refusing_vm, 0, PAGE)  # type: ignore[arg-type]
    assert failure.value.errno == errno.ENOTTY
