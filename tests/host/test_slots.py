"""Memory slots when several threads or signal handlers use one VM: numbers, deletion, lifetimes."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmpriv import ArgumentError, HostMemory, Kvm, Slot, Vm, uapi

PAGE = 4096
MIB = 1 << 20
THREADS = 6

pytestmark = pytest.mark.usefixtures("no_leak")


def mapped(memory: HostMemory) -> bool:
    """Whether the mapping exists, as the kernel lists it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(number, 16) for number in line.split()[0].split("-"))
        if low <= memory.userspace_addr < high:
            return True
    return False


class Interrupted(HostMemory):
    """Calls `handler` once when a slot begins or ends to use it, as a signal handler might come."""

    at_hold: Callable[[], object] | None = None
    at_release: Callable[[], object] | None = None

    def hold(self) -> None:
        handler, self.at_hold = self.at_hold, None
        if handler is not None:
            handler()
        super().hold()

    def release(self) -> None:
        handler, self.at_release = self.at_release, None
        if handler is not None:
            handler()
        super().release()


def test_threads_map_into_one_vm(vm: Vm) -> None:
    """Each call gets a number of its own, and each slot is where its thread asked for it."""
    rounds = 50
    ready = threading.Barrier(THREADS)

    def work(number: int, memory: HostMemory) -> list[Slot]:
        ready.wait()
        base = number * rounds * PAGE
        return [vm.map(memory, base + turn * PAGE) for turn in range(rounds)]

    with HostMemory(PAGE) as memory, ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(work, number, memory) for number in range(THREADS)]
        results = [future.result() for future in futures]
        for number, slots in enumerate(results):
            wanted = [(number * rounds + turn) * PAGE for turn in range(rounds)]
            assert [slot.guest_phys_addr for slot in slots] == wanted
            assert all(vm.slots[slot.slot] is slot for slot in slots)
        assert sorted(vm.slots) == list(range(THREADS * rounds))


def test_a_signal_handler_maps_while_a_slot_is_mapped(vm: Vm) -> None:
    """The handler's slot and the interrupted one have different numbers, and both exist."""
    with Interrupted(PAGE) as memory, HostMemory(PAGE) as other:
        inner: list[Slot] = []
        memory.at_hold = lambda: inner.append(vm.map(other, MIB))
        outer = vm.map(memory, 0)
        assert vm.slots == {outer.slot: outer, inner[0].slot: inner[0]}
        assert (outer.guest_phys_addr, inner[0].guest_phys_addr) == (0, MIB)
        for slot in (outer, inner[0]):
            slot.delete()
        assert vm.slots == {}
    assert not mapped(memory)
    assert not mapped(other)


def test_delete_of_a_slot_whose_number_is_used_again(vm: Vm) -> None:
    """Two threads delete one slot; a slot that gets its number between them stays."""
    with HostMemory(PAGE) as memory, HostMemory(PAGE) as other:
        first = vm.map(memory, 0)
        with vm.slots_lock:
            late = threading.Thread(target=first.delete)
            late.start()
            time.sleep(0.2)  # it waits for the lock now, whatever it has looked at before
            first.delete()
            second = vm.map(other, MIB)
            assert second.slot == first.slot
        late.join()
        assert first.deleted
        assert not second.deleted
        second.delete()
    assert not mapped(memory)
    assert not mapped(other)


def test_threads_delete_each_others_slots(kvm: Kvm) -> None:
    """No slot leaks: when all are deleted and closed, no mapping is left."""
    shared: list[Slot] = []
    memories: list[HostMemory] = []
    errors: list[int] = []
    deadline = time.monotonic() + 1.5

    def work(number: int) -> int:
        dice, turns = random.Random(number), 0
        memory = HostMemory(PAGE)
        memories.append(memory)
        while time.monotonic() < deadline:
            shared.append(vm.map(memory, (number * 1000 + turns % 1000) * PAGE))
            for _ in range(dice.randrange(3)):
                try:
                    slot = dice.choice(shared)
                except IndexError:  # another thread has taken the last one
                    continue
                slot.delete()
            try:
                slot = shared.pop(dice.randrange(len(shared) or 1))
            except IndexError:
                continue
            try:
                slot.delete()
            except OSError as error:
                errors.append(error.errno or 0)
            turns += 1
        return turns

    with kvm.create_vm() as vm:
        with ThreadPoolExecutor(THREADS) as pool:
            turns = list(pool.map(work, range(THREADS)))
        for memory in memories:
            memory.close()
        for slot in list(vm.slots.values()):
            slot.delete()
        assert vm.slots == {}
        assert errors == []
        assert min(turns) > 20
        assert not any(mapped(memory) for memory in memories)


def test_a_signal_handler_maps_while_a_slot_is_deleted(vm: Vm) -> None:
    """The handler's new slot stays, whatever its number is."""
    with Interrupted(PAGE) as memory, HostMemory(PAGE) as other:
        slot = vm.map(memory, 0)
        inner: list[Slot] = []

        def handler() -> None:
            slot.delete()
            inner.append(vm.map(other, 0))

        memory.at_release = handler
        slot.delete()
        assert slot.deleted
        assert list(vm.slots.values()) == inner
        inner[0].delete()
    assert not mapped(memory)
    assert not mapped(other)


def test_a_change_that_is_refused_leaves_all_as_it_was(vm: Vm) -> None:
    """The VM keeps the old slot and its memory; it does not hold the new memory."""
    memory, other = HostMemory(2 * PAGE), HostMemory(2 * PAGE)
    slot = vm.map(memory, 0)
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION") as caught:
        vm.map(other, 0, size=PAGE, slot=slot.slot)  # a slot can't change its size
    assert caught.value.errno == errno.EINVAL
    assert vm.slots == {slot.slot: slot}
    memory.close()
    other.close()
    assert mapped(memory)
    assert not mapped(other)
    slot.delete()
    assert not mapped(memory)


def test_a_slot_of_another_vm_is_not_deleted(kvm: Kvm, vm: Vm) -> None:
    """Nor one that only looks like it."""
    with kvm.create_vm() as other, HostMemory(PAGE) as memory:
        slot, theirs = vm.map(memory, 0), other.map(memory, 0)
        assert slot.slot == theirs.slot
        vm.delete_slot(theirs)
        vm.delete_slot(Slot(vm, slot.slot, 0, PAGE))
        assert not slot.deleted
        assert not theirs.deleted
        vm.delete_slot(slot)
        assert slot.deleted
        assert not theirs.deleted


def test_a_moved_slot_holds_what_it_uses(vm: Vm) -> None:
    """KVM_SET_USER_MEMORY_REGION with the same number moves a slot; the old object is deleted."""
    memory = HostMemory(PAGE)
    before = vm.map(memory, 0)
    after = vm.map(memory, MIB, slot=before.slot)
    assert (before.deleted, after.deleted) == (True, False)
    before.delete()
    assert vm.slots == {after.slot: after}
    memory.close()
    assert mapped(memory)
    after.delete()
    assert not mapped(memory)


def test_memory_that_is_closed_meanwhile(vm: Vm) -> None:
    """map() of memory that its owner closes at that moment is refused, and holds nothing."""
    with Interrupted(PAGE) as memory:
        memory.at_hold = memory.close
        with pytest.raises(ValueError, match="host memory is closed"):
            vm.map(memory, 0)
        assert vm.slots == {}
    assert not mapped(memory)


def test_one_memory_in_the_slots_of_many_vms(kvm: Kvm) -> None:
    """Its slots may begin and end in several threads: the mapping ends with the last of them."""
    memory = HostMemory(PAGE)
    deadline = time.monotonic() + 1

    def work(_: int) -> Vm:
        vm = kvm.create_vm()
        while time.monotonic() < deadline:
            vm.map(memory, 0).delete()
        vm.map(memory, 0)
        return vm

    with ThreadPoolExecutor(THREADS) as pool:
        vms = list(pool.map(work, range(THREADS)))
    memory.close()
    for vm in vms:
        assert mapped(memory)
        vm.close()
    assert not mapped(memory)


def test_no_free_number(vm: Vm) -> None:
    """The message has the limit of one address space, however many slots the others have."""
    limit = vm.check_extension(uapi.kvm.KVM_CAP_NR_MEMSLOTS)
    assert vm.free_slot() == 0
    with HostMemory(PAGE) as memory:
        vm.map(memory, 0)
        assert vm.free_slot() == 1
        assert vm.free_slot(1) == 1 << 16
        for number in range(1, limit):
            vm.slots[number] = vm.slots[0]
        try:
            for refused in (vm.free_slot, lambda: vm.map(memory, MIB)):
                with pytest.raises(OSError, match=f"all {limit} memory slots are in use") as caught:
                    refused()
                assert caught.value.errno == errno.ENOSPC
            assert vm.free_slot(1) == 1 << 16
        finally:
            for number in range(1, limit):
                del vm.slots[number]
        with pytest.raises(ArgumentError, match="address_space must be"):
            vm.free_slot(-1)
