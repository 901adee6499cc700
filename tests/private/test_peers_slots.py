"""What other projects' tests of slots assert, by both ABIs: no slot, all slots, slots in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kvmpriv
from kvmpriv import HostMemory, Kvm, Vm, private
from kvmpriv.cdefs import kvm as k
from kvmpriv.exits import ExitReason, InternalErrorExit, MemoryFaultExit, MmioExit
from kvmpriv.guest.crash import GuestCrash
from kvmpriv.guest.puppet import Puppet, PuppetCpu
from kvmpriv.private.restrictedmem import RestrictedMem

from .support.races import eventually
from .support.requirements import missing
from .support.rig import Guest, Rig
from .support.rules import rule
from .support.slot_requests import RestrictedSlots, Slots
from .support.syscalls import GIB, PAGE, address_of, answer, errno_of

pytestmark = pytest.mark.usefixtures("no_leak")

GPA = 4 * GIB
#: What a slot that is not there is read as.
NOBODY = 0xBEEF
abi = kvmpriv.declare("""
    #define KVM_SET_NR_MMU_PAGES       _IO(KVMIO, 0x44)
    #define KVM_CAP_DISABLE_QUIRKS2    213
    #define KVM_X86_QUIRK_SLOT_ZAP_ALL (1 << 7)
""")


def slots_of(rig: Rig, file: private.PrivateFile, userspace_addr: int) -> Slots:
    return rig.behaviour.slots(rig.vm, file, userspace_addr)


@rule("slots.none")
def test_no_slot_at_all(rig: Rig, kvm: Kvm) -> None:
    """KVM_RUN of a VM without slots is an internal error, with few MMU pages too."""
    rig.guest.slot.delete()
    rans = 0
    with kvm.create_vm() as other:
        for vm, number in ((rig.vm, 1), (other, 0)):
            vm.ioctl(abi.KVM_SET_NR_MMU_PAGES, 64)
            with vm.create_vcpu(number) as vcpu:
                assert vcpu.run() == k.KVM_EXIT_INTERNAL_ERROR
                exit_ = vcpu.exit()
                assert isinstance(exit_, InternalErrorExit)
                assert exit_.suberror == k.KVM_INTERNAL_ERROR_EMULATION
            rans += 1
    assert rans == 2


@rule("slots.as-many-as-there-can-be")
@pytest.mark.usefixtures("one_cpu")
@pytest.mark.timeout(300)
def test_as_many_slots_as_there_can_be(rig: Rig) -> None:
    """Every number below KVM_CAP_NR_MEMSLOTS can be a slot, private or not; the next one is
    EINVAL.
    """
    limit = rig.vm.check_extension(k.KVM_CAP_NR_MEMSLOTS)
    assert limit > 500
    memory, file = rig.memory(limit * PAGE), rig.file(limit * PAGE)
    slots = slots_of(rig, file, memory.userspace_addr)
    flag = slots.good["flags"]
    struct = slots.struct(memory_size=PAGE)
    address = address_of(struct)
    # Both structs begin alike: slot and flags, gpa, size, userspace_addr, offset in the file.
    words = k.ffi.cast("__u64 *", struct)

    def put(number: int) -> int:
        words[0] = number | (flag << 32 if number % 2 else 0)
        words[1], words[3] = GPA + number * PAGE, memory.userspace_addr + number * PAGE
        words[4] = number * PAGE
        return rig.vm.ioctl_errno(slots.request, address)

    some = (1, 2, limit // 2 | 1, limit // 2 & -2, limit - 2, limit - 1)
    numbers = set(range(limit))
    if Path("/sys/kernel/debug/kmemleak").exists():  # where all of them take ten minutes
        numbers = {*range(200), *some, *range(limit - 200, limit)}
    numbers.remove(rig.guest.slot.slot)
    said = [put(number) for number in sorted(numbers)]
    assert (len(said), set(said)) == (len(numbers), {0})
    assert len(said) > 400
    assert [errno_of(put(number)) for number in (limit, limit + 1)] == ["EINVAL", "EINVAL"]
    words[0], words[1] = limit - 1, GPA + (limit + 7) * PAGE
    words[2] = 0
    assert errno_of(rig.vm.ioctl_errno(slots.request, address)) == "ok", "delete the last one"
    words[2] = PAGE
    assert errno_of(put(limit)) == "EINVAL", "it is the number, not how many there are"
    assert errno_of(put(limit - 1)) == "ok"
    if rig.abi.traits.converts == "file":
        rig.convert_all(file, GPA, private=True)
    for number in some:
        if number % 2 and rig.abi.traits.converts == "vm":
            rig.convert(GPA + number * PAGE, PAGE, private=True)
        rig.guest.store(GPA + number * PAGE, 8, number)
    for number in some:
        assert rig.guest.load(GPA + number * PAGE, 8) == number
        seen = int.from_bytes(memory.read(number * PAGE, 8), "little")
        assert seen == (0 if number % 2 else number)


# -- in use ----------------------------------------------------------------------------------------


class Watch:
    """A guest that reads one word again and again; records each change of what it finds."""

    def __init__(self, cpu: Guest, gpa: int) -> None:
        self.cpu, self.gpa = cpu, gpa
        self.seen: list[int] = []
        self.error: BaseException | None = None
        self._over = threading.Event()
        cpu.serve = self._serve
        self._thread = threading.Thread(target=self._run)

    def _serve(self, cpu: PuppetCpu, exit_: Any) -> bool:
        if isinstance(exit_, MmioExit):
            k.ffi.memmove(cpu.vcpu.kvm_run.mmio.data, NOBODY.to_bytes(8, "little"), 8)
        elif not isinstance(exit_, MemoryFaultExit):
            return False
        return not self._over.is_set()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                value = self.cpu.load(self.gpa, 8)
                if not self.seen or self.seen[-1] != value:
                    self.seen.append(value)
        except BaseException as error:  # noqa: BLE001  # shown by the test
            # Its frames would keep the vCPU's page mapped.
            self.error = error.with_traceback(None)

    def sees(self, value: int) -> bool:
        """Whether the guest finds `value` within the time limit."""
        return eventually(lambda: bool(self.seen) and self.seen[-1] == value, 30)

    def ends(self) -> BaseException | None:
        self._over.set()
        self._thread.join(20)
        assert not self._thread.is_alive(), "stuck"
        return self.error


@contextmanager
def watching(cpu: Guest, gpa: int) -> Iterator[Watch]:
    watch = Watch(cpu, gpa)
    watch._thread.start()
    try:
        yield watch
    finally:
        watch.ends()


def plain_slot(vm: Vm, memory: HostMemory, gpa: int) -> None:
    """Make or move slot 10."""
    region = k.ffi.new(
        "struct kvm_userspace_memory_region *",
        (10, 0, gpa, 512 * PAGE, memory.userspace_addr),
    )
    vm.ioctl(k.KVM_SET_USER_MEMORY_REGION, region)


@pytest.fixture(params=["private-capable", "default", "default, no zap of all"])
def inhabited(request: pytest.FixtureRequest, rig: Rig, kvm: Kvm) -> Iterator[tuple[Vm, Guest]]:
    """A VM of each kind that treats slots differently, with a guest."""
    if request.param == "private-capable":
        yield rig.vm, rig.guest
        return
    with ExitStack() as stack:
        vm = stack.enter_context(kvm.create_vm())
        if request.param != "default":
            quirk = abi.KVM_X86_QUIRK_SLOT_ZAP_ALL
            if not vm.check_extension(abi.KVM_CAP_DISABLE_QUIRKS2) & quirk:
                missing("slot-zap-quirk", "KVM_CAP_DISABLE_QUIRKS2 lacks it")
            vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, quirk)
        cpuid = kvm.get_supported_cpuid()
        yield vm, stack.enter_context(Puppet(vm, cpuid=cpuid))


@rule("slots.moved-in-use")
def test_a_slot_moved_in_use(inhabited: tuple[Vm, Guest]) -> None:
    """A guest that reads while its slot is moved finds the new memory or none; nothing else."""
    vm, guest = inhabited
    rounds = 10
    with HostMemory(513 * PAGE) as memory:
        memory.write(0, (1).to_bytes(8, "little"))
        memory.write(PAGE, (1000).to_bytes(8, "little"))
        plain_slot(vm, memory, GPA)
        with watching(guest, GPA) as watch:
            for number in range(1, rounds + 1):
                assert watch.sees(number)
                plain_slot(vm, memory, GPA - PAGE)
                assert watch.sees(1000)
                memory.write(0, (5000).to_bytes(8, "little"))  # which the guest does not read
                memory.write(0, (number + 1).to_bytes(8, "little"))
                plain_slot(vm, memory, GPA)
            assert watch.sees(rounds + 1)
        assert watch.error is None
        found = [value for value in watch.seen if value != NOBODY]
        # A guest that reads a page, then MMIO, then the same page has seen no change.
        found = [value for at, value in enumerate(found) if at == 0 or found[at - 1] != value]
        assert found == [value for number in range(1, rounds + 1) for value in (number, 1000)] + [
            rounds + 1
        ]
        region = k.ffi.new("struct kvm_userspace_memory_region *", {"slot": 10})
        vm.ioctl(k.KVM_SET_USER_MEMORY_REGION, region)


@rule("slots.deleted-in-use", "slots.code-deleted-in-use")
def test_a_slot_deleted_in_use(inhabited: tuple[Vm, Guest]) -> None:
    """The guest finds no memory until the slot is back; without the slot of its code it ends."""
    vm, guest = inhabited
    gone = k.ffi.new("struct kvm_userspace_memory_region *", {"slot": 10})
    with HostMemory(512 * PAGE) as memory:
        memory.write(0, (1).to_bytes(8, "little"))
        plain_slot(vm, memory, GPA)
        # A page fault that finds no page tables is to end the guest, not to be tried again.
        sregs = guest.vcpu.get_sregs()
        sregs.idt.limit = 0
        guest.vcpu.set_sregs(sregs)
        with watching(guest, GPA) as watch:
            for _ in range(5):
                assert watch.sees(1)
                vm.ioctl(k.KVM_SET_USER_MEMORY_REGION, gone)
                assert watch.sees(NOBODY)
                plain_slot(vm, memory, GPA)
            assert watch.sees(1)
            assert watch.error is None
            assert watch.seen == [1, NOBODY] * 5 + [1]
            exits = list(guest.exits)
            assert isinstance(guest, Puppet)
            guest.slot.delete()
            assert eventually(lambda: watch.error is not None, 30)
        assert isinstance(watch.error, GuestCrash)
        assert {type(exit_) for exit_ in exits} == {MmioExit}
        assert {(one.phys_addr, one.size, one.is_write) for one in exits} == {(GPA, 8, False)}
        assert guest.exits[-1].reason in (k.KVM_EXIT_SHUTDOWN, k.KVM_EXIT_INTERNAL_ERROR)
        vm.ioctl(k.KVM_SET_USER_MEMORY_REGION, gone)


def more_exits(guest: Guest) -> bool:
    """Whether the guest exits again."""
    before = guest.exit_count
    return eventually(lambda: guest.exit_count > before + 1, 30)


@rule("slots.private-deleted-in-use", "slots.private-not-moved-in-use", "faults.deleted-slot")
def test_a_private_slot_deleted_in_use(rig: Rig) -> None:
    """Without its slot a private access is a fault exit (guest_memfd) or MMIO (v9)."""
    mmio = rig.behaviour.mmio_without_slot
    memory, file = rig.memory(512 * PAGE), rig.file(1024 * PAGE)
    memory.write(0, (2).to_bytes(8, "little"))
    bound = rig.bind(GPA, 512 * PAGE, file, 512 * PAGE, memory=memory, slot=10)
    rig.guest.store(GPA, 8, 1)
    slots = slots_of(rig, file, memory.userspace_addr)
    with watching(rig.guest, GPA) as watch:
        for number in range(1, 6):
            assert watch.sees(1)
            # A private slot can't be moved.
            assert (
                slots.set(slot=10, guest_phys_addr=GPA - PAGE, memory_size=512 * PAGE) == "EINVAL"
            )
            bound.delete()
            assert more_exits(rig.guest)
            assert watch.sees(NOBODY if mmio else 1)
            if number == 5:
                # What is there now is not private: v9 ignores that, guest_memfd says so again.
                plain_slot(rig.vm, memory, GPA)
                assert watch.sees(2) if mmio else more_exits(rig.guest)
                gone = k.ffi.new("struct kvm_userspace_memory_region *", {"slot": 10})
                rig.vm.ioctl(k.KVM_SET_USER_MEMORY_REGION, gone)
            bound = rig.bind(GPA, 512 * PAGE, file, 512 * PAGE, memory=memory, slot=10)
        assert watch.sees(1)
        assert watch.error is None
    if mmio:
        assert set(rig.guest.exits) == {MmioExit(ExitReason.MMIO, False, GPA, 8, b"")}
    else:
        assert set(rig.guest.exits) == {rig.fault_at(GPA, private=True)}
        assert watch.seen == [1], "never the shared page"
    bound.delete()


# -- each one --------------------------------------------------------------------------------------


@rule("v9.slot.align.offset.each")
def test_every_offset_within_a_page(slots: RestrictedSlots) -> None:
    """Each restricted_offset from 1 to 4095 is EINVAL."""
    struct, said = slots.struct(), []
    for offset in range(1, PAGE):
        struct.restricted_offset = offset
        said.append(slots.vm.ioctl_errno(slots.request, struct))
    assert {errno_of(number) for number in said} == {"EINVAL"}
    assert len(said) == 4095
    slots.accepts(restricted_offset=0)


@rule("v9.file.size.aligned.each", "v9.file.hole.aligned.each")
def test_every_size_within_a_page(file: RestrictedMem) -> None:
    """Each size, and each offset and length of a hole, from 1 to 4095 is EINVAL."""
    tried = []
    for odd in range(1, PAGE):
        tried.append(answer(partial(file.ftruncate, odd)))
        tried.append(answer(partial(file.punch_hole, odd, PAGE)))
        tried.append(answer(partial(file.punch_hole, 0, odd)))
    assert (len(tried), set(tried)) == (3 * 4095, {"EINVAL"})
    assert answer(lambda: file.ftruncate(PAGE)) == "ok"
    assert answer(lambda: file.punch_hole(0, PAGE)) == "ok"
