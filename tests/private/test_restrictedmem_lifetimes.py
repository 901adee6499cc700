"""v9: lifetimes.  A slot keeps its file alive, a VM its slots; nothing keeps the VM alive."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvmpriv import Kvm, libc
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.private.restrictedmem import RestrictedMem

from .support.accounting import BIG, Unevictable, vms_alive
from .support.arch_hook import hook
from .support.processes import in_child
from .support.races import beside, eventually, rounds
from .support.rules import rule
from .support.slot_requests import RestrictedSlots
from .support.syscalls import GIB, HOLE, KEEP_SIZE, MIB, PAGE, answer, fallocate

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpriv import HostMemory, Vm

pytestmark = pytest.mark.usefixtures("no_leak", "v9")

PAGES = {"memory_size": 2048 * PAGE, "userspace_addr": 0, "restricted_offset": 0}


@rule("v9.life.file_before_slot", "v9.slot.pins_file")
def test_file_closed_before_the_slot(slots: RestrictedSlots) -> None:
    """A slot keeps the file alive: closing its last fd frees nothing, deleting the slot does."""
    memory = Unevictable()
    with RestrictedMem() as file:
        fallocate(file, 0, 0, BIG)
        assert slots.set(restricted_fd=file.fileno()) == "ok"
    assert memory.is_about(BIG)
    assert slots.delete() == "ok"
    assert memory.is_about(0)


@rule("v9.life.slot_before_file")
def test_slot_deleted_before_the_file(slots: RestrictedSlots) -> None:
    """Deleting the slot frees nothing while a descriptor is open."""
    memory = Unevictable()
    with RestrictedMem() as file:
        fallocate(file, 0, 0, BIG)
        assert slots.set(restricted_fd=file.fileno()) == "ok"
        assert slots.delete() == "ok"
        assert memory.is_about(BIG)
    assert memory.is_about(0)


@rule("v9.life.vm_with_slots", "v9.slot.vm_uncounted")
def test_vm_closed_with_slots(make_private_vm: Callable[[], Vm]) -> None:
    """Closing the VM's last descriptor frees the VM and the files in its slots."""
    memory, before = Unevictable(), vms_alive()
    vm = make_private_vm()
    (name,) = vms_alive() - before
    with RestrictedMem() as file:
        fallocate(file, 0, 0, BIG)
        slots = RestrictedSlots(vm, file, 0)
        for number in range(1, 9):
            where = {"slot": number, "guest_phys_addr": number * GIB}
            assert slots.set(**PAGES, **where) == "ok"
    assert memory.is_about(BIG)
    vm.close()
    assert memory.is_about(0)
    assert eventually(lambda: name not in vms_alive()), "the slot must not keep its VM"


@rule("v9.life.vm_before_file")
@pytest.mark.usefixtures("one_cpu")
def test_vm_closed_before_the_file(make_private_vm: Callable[[], Vm]) -> None:
    """A file outlives the VMs that used it and can still be allocated and punched."""
    memory, before = Unevictable(), vms_alive()
    vm = make_private_vm()
    (name,) = vms_alive() - before
    with RestrictedMem() as file:
        assert RestrictedSlots(vm, file, 0).set() == "ok"
        vm.close()
        assert eventually(lambda: name not in vms_alive()), "the file must not keep the VM"
        # The processor can reach the memory of the VM that is gone until it runs another process.
        assert in_child(lambda: 7) == 7
        fallocate(file, 0, 0, BIG)
        assert memory.is_about(BIG)
        fallocate(file, HOLE, 0, BIG)
        assert memory.is_about(0)
        assert RestrictedSlots(make_private_vm(), file, 0).set() == "ok"


@rule("v9.life.vcpu_keeps_vm")
def test_vcpu_outlives_the_vm_fd(make_private_vm: Callable[[], Vm]) -> None:
    """A vCPU's descriptor keeps the VM, its slots and their files."""
    memory = Unevictable()
    vm = make_private_vm()
    with vm.create_vcpu() as vcpu:
        with RestrictedMem() as file:
            fallocate(file, 0, 0, BIG)
            assert RestrictedSlots(vm, file, 0).set() == "ok"
        vm.close()
        assert memory.is_about(BIG)
        assert vcpu.fileno() >= 0
    assert memory.is_about(0)


@rule("v9.life.two_slots")
def test_two_slots_on_one_file(slots: RestrictedSlots) -> None:
    """Each slot holds its own reference to the file."""
    memory = Unevictable()
    with RestrictedMem() as file:
        fd = file.fileno()
        fallocate(file, 0, 0, BIG)
        assert slots.set(restricted_fd=fd) == "ok"
        assert slots.set(restricted_fd=fd, slot=4, guest_phys_addr=5 * GIB) == "ok"
    assert slots.delete() == "ok"
    assert memory.is_about(BIG)
    assert slots.delete(slot=4) == "ok"
    assert memory.is_about(0)


@rule("v9.life.two_vms")
def test_two_vms_on_one_file(make_private_vm: Callable[[], Vm]) -> None:
    """The slots of each VM hold their own references to the file."""
    memory = Unevictable()
    one, two = make_private_vm(), make_private_vm()
    with RestrictedMem() as file:
        fallocate(file, 0, 0, BIG)
        for vm in (one, two):
            assert RestrictedSlots(vm, file, 0).set() == "ok"
    one.close()
    assert memory.is_about(BIG)
    two.close()
    assert memory.is_about(0)


@rule("v9.life.dup")
def test_duplicates(slots: RestrictedSlots) -> None:
    """A slot made by a duplicate descriptor needs neither descriptor afterwards."""
    memory = Unevictable()
    with RestrictedMem() as file:
        fallocate(file, 0, 0, BIG)
        other = os.dup(file.fileno())
        assert slots.set(restricted_fd=other) == "ok"
        os.close(other)
        assert slots.set(slot=4) == "EEXIST"
    assert memory.is_about(BIG)
    assert slots.delete() == "ok"
    assert memory.is_about(0)


@rule("v9.life.scm_rights")
def test_sent_to_another_process(kvm: Kvm, make_private_vm: Callable[[], Vm]) -> None:
    """A file received over a socket is the same file, and the receiver's VM can use it."""
    memory = Unevictable()
    ours, theirs = socket.socketpair()

    def receive() -> tuple[str, str, str]:
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        with Kvm() as other, other.create_vm() as vm:
            slots = RestrictedSlots(vm, fds[0], 0)
            said = slots.set()
            return said, answer(lambda: os.ftruncate(fds[0], PAGE)), slots.delete()

    with ours, theirs:
        file = RestrictedMem()
        fallocate(file, 0, 0, BIG)
        socket.send_fds(ours, [b"x"], [file.fileno()])
        file.close()
        assert memory.is_about(BIG), "it is on its way"
        assert in_child(receive) == ("ok", "EPERM", "ok")
    assert memory.is_about(0)


@rule("v9.life.fork")
def test_fork(slots: RestrictedSlots, file: RestrictedMem) -> None:
    """A forked process can use the file, but its parent's VM is EIO."""
    assert slots.set() == "ok"

    def child() -> tuple[str, str, str, str]:
        size = answer(lambda: file.ftruncate(4 * PAGE))
        allocated = answer(lambda: fallocate(file, 0, 0, 4 * PAGE))
        return size, allocated, slots.set(slot=4, guest_phys_addr=5 * GIB), slots.delete()

    assert in_child(child) == ("ok", "ok", "EIO", "EIO")
    assert answer(lambda: file.ftruncate(4 * PAGE)) == "EPERM", "the child has set the size"
    assert slots.set(slot=4) == "EEXIST", "the child's end has not ended the slot"
    slots.accepts(slot=4, guest_phys_addr=5 * GIB)
    assert slots.delete() == "ok"


@rule("v9.life.killed")
@pytest.mark.usefixtures("make_private_vm")
def test_killed() -> None:
    """A process killed with VM, slots and files open leaves no VM and no pages."""
    memory, before = Unevictable(), vms_alive()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with Kvm() as kvm:
                with hook(on=True):
                    vm = kvm.create_vm()
                file = RestrictedMem()
                fallocate(file, 0, 0, BIG)
                said = RestrictedSlots(vm, file, 0).set()
                os.write(write_end, said.encode())
                os.close(write_end)
                while True:
                    os.sched_yield()
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        assert os.read(read_end, 16) == b"ok"
        assert memory.is_about(BIG)
        assert len(vms_alive() - before) == 1
    finally:
        os.close(read_end)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert memory.is_about(0)
    assert eventually(lambda: not vms_alive() - before)


@rule("v9.life.exec")
def test_exec(v9: None) -> None:
    """A descriptor without close-on-exec is inherited; the binding's has the flag."""
    program = "import os; os.ftruncate({}, 4096)"

    def run(fd: int) -> bool:
        done = subprocess.run(
            [sys.executable, "-S", "-c", program.format(fd)],
            close_fds=False,
            stderr=subprocess.PIPE,
        )
        assert done.returncode == 0 or b"Bad file descriptor" in done.stderr
        return done.returncode == 0

    bare = libc.syscall(rm.__NR_memfd_restricted, 0)
    assert bare >= 0
    try:
        assert run(bare)
        assert answer(lambda: os.ftruncate(bare, PAGE)) == "EPERM", "the program has set the size"
    finally:
        os.close(bare)
    with RestrictedMem() as file:
        assert not run(file.fileno())


@rule("v9.life.slot_cycle")
def test_made_and_deleted(slots: RestrictedSlots, file: RestrictedMem) -> None:
    """300 slots made and deleted with holes between them leave nothing allocated."""
    memory = Unevictable()
    fallocate(file, 0, 0, BIG)
    made, gone = slots.struct(), slots.struct(memory_size=0)
    for turn in range(300):
        assert slots.vm.ioctl_errno(k.KVM_SET_USER_MEMORY_REGION, made) == 0
        if turn % 10 == 0:
            fallocate(file, HOLE, 32 * PAGE, PAGE)
        assert slots.vm.ioctl_errno(k.KVM_SET_USER_MEMORY_REGION, gone) == 0
    assert turn == 299
    assert memory.is_about(BIG)
    file.close()
    assert memory.is_about(0)


@rule("v9.life.host_memory")
def test_host_memory_goes_first(slots: RestrictedSlots, memory: HostMemory) -> None:
    """The memory at userspace_addr may be unmapped; the slot can be deleted all the same."""
    assert slots.set() == "ok"
    memory.close()
    assert slots.set(slot=4) == "EEXIST"
    assert slots.delete() == "ok"
    slots.accepts()


@rule("v9.race.slot_against_hole")
@pytest.mark.known_defect("notifiers-unlocked", "slot-unprepared")
def test_slots_against_holes(slots: RestrictedSlots, file: RestrictedMem) -> None:
    """Slots made and deleted while another thread changes the file succeed, and the kernel
    reports nothing.
    """

    def change() -> None:
        fallocate(file, KEEP_SIZE, 0, MIB)
        fallocate(file, HOLE, 40 * PAGE, MIB - 40 * PAGE)  # from the middle of the slot on

    made, gone = slots.struct(), slots.struct(memory_size=0)
    with beside(change) as holes:
        for turn in rounds(1000, least=200, seconds=15):
            assert slots.vm.ioctl_errno(k.KVM_SET_USER_MEMORY_REGION, made) == 0, turn
            assert slots.vm.ioctl_errno(k.KVM_SET_USER_MEMORY_REGION, gone) == 0, turn
    assert turn >= 199
    assert holes[0] > 20
    slots.accepts()
