"""guest_memfd: lifetimes.  The file keeps its VM alive; a slot does not keep its file alive."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvmpriv import Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.private.guest_memfd import GuestMemfd

from .support.accounting import BIG, Unevictable, files_open, meminfo, vms_alive
from .support.processes import in_child
from .support.races import eventually
from .support.rules import rule
from .support.slot_requests import FILE_OVERLAP, GuestMemfdSlots
from .support.syscalls import GIB, HOLE, KEEP_SIZE, MIB, PAGE, address_of, answer, fallocate

if TYPE_CHECKING:
    from kvmpriv import Vm

pytestmark = pytest.mark.usefixtures("no_leak", "guest_memfd_kvm")


@rule("gm.life.file_before_slot", "gm.slot.unbound")
def test_file_closed_before_the_slot(gm_vm: Vm) -> None:
    """Closing the file's last descriptor takes the memory from the slot, which can be deleted."""
    memory = Unevictable()
    with GuestMemfd(gm_vm, BIG) as file:
        fallocate(file, KEEP_SIZE, 0, BIG)
        slots = GuestMemfdSlots(gm_vm, file, 0)
        assert slots.set() == "ok"
        assert memory.is_about(BIG)
    assert memory.is_about(0)
    with GuestMemfd(gm_vm, BIG) as file:
        assert slots.set(slot=4, guest_memfd=file.fileno()) == "EEXIST", "the slot is still there"
        assert slots.set(guest_memfd=file.fileno()) == "EINVAL", "and does not change"
        assert slots.delete() == "ok"
        slots.accepts(guest_memfd=file.fileno())


@rule("gm.life.slot_before_file")
def test_slot_deleted_before_the_file(gm_vm: Vm) -> None:
    """Deleting the slot frees nothing while a descriptor is open; the range can be bound again."""
    memory = Unevictable()
    with GuestMemfd(gm_vm, BIG) as file:
        fallocate(file, KEEP_SIZE, 0, BIG)
        slots = GuestMemfdSlots(gm_vm, file, 0)
        slots.accepts()
        slots.accepts(slot=4, guest_phys_addr=5 * GIB)
        assert memory.is_about(BIG)
    assert memory.is_about(0)


@rule("gm.life.file_pins_vm")
def test_vm_closed_before_the_file(guest_memfd_kvm: Kvm, vm_type: int) -> None:
    """The file keeps its VM alive: the VM ends with the file's last fd."""
    memory, before = Unevictable(), vms_alive()
    vm = guest_memfd_kvm.create_vm(vm_type)
    (name,) = vms_alive() - before
    with GuestMemfd(vm, BIG) as file:
        if vm.check_extension(gm.KVM_CAP_GUEST_MEMFD):
            assert GuestMemfdSlots(vm, file, 0).set() == "ok"
        vm.close()
        assert name in vms_alive()
        fallocate(file, KEEP_SIZE, 0, BIG)
        assert memory.is_about(BIG)
        fallocate(file, HOLE, 0, BIG // 2)
        assert memory.is_about(BIG // 2)
        assert name in vms_alive()
    assert memory.is_about(0)
    assert eventually(lambda: name not in vms_alive())


@rule("gm.life.vm_with_slots")
def test_vm_closed_with_slots(guest_memfd_kvm: Kvm, gm_vm: Vm, vm_type: int) -> None:
    """The file is closed, then the VM with slots that have lost their file: all memory is freed."""
    memory, before = Unevictable(), vms_alive()
    vm = guest_memfd_kvm.create_vm(vm_type)
    (name,) = vms_alive() - before
    with GuestMemfd(vm, BIG) as file:
        fallocate(file, KEEP_SIZE, 0, BIG)
        slots = GuestMemfdSlots(vm, file, 0)
        for number in range(1, 9):
            where = {"guest_phys_addr": number * GIB, "guest_memfd_offset": number * 16 * PAGE}
            assert slots.set(slot=number, **where) == "ok"
    vm.close()
    assert memory.is_about(0)
    assert eventually(lambda: name not in vms_alive())


@rule("gm.life.dup")
def test_duplicates(gm_vm: Vm) -> None:
    """A duplicate refers to the same file: the slot has its memory until the last one is closed."""
    memory = Unevictable()
    with GuestMemfd(gm_vm, BIG) as file:
        fallocate(file, KEEP_SIZE, 0, BIG)
        slots = GuestMemfdSlots(gm_vm, file, 0)
        other = os.dup(file.fileno())
        assert slots.set(guest_memfd=other) == "ok"
    assert memory.is_about(BIG)
    os.close(other)
    assert memory.is_about(0)
    assert slots.delete() == "ok"


@rule("gm.life.scm_rights")
def test_sent_to_another_process(gm_vm: Vm, vm_type: int) -> None:
    """A process that receives the file can allocate and punch, but not use it in its own VM."""
    memory = Unevictable()
    ours, theirs = socket.socketpair()

    def receive() -> tuple[str, str]:
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        with Kvm() as other, other.create_vm(vm_type) as vm:
            fallocate(fds[0], KEEP_SIZE, 0, BIG)
            own = GuestMemfd(vm, BIG)
            said = GuestMemfdSlots(vm, fds[0], 0).set(), GuestMemfdSlots(vm, own, 0).set()
            own.close()
            return said

    with ours, theirs, GuestMemfd(gm_vm, BIG) as file:
        socket.send_fds(ours, [b"x"], [file.fileno()])
        assert in_child(receive) == ("EINVAL", "ok")
        assert memory.is_about(BIG), "what the other process has allocated is the file's"
    assert memory.is_about(0)


@rule("gm.life.fork")
def test_fork(gm_slots: GuestMemfdSlots, gm_file: GuestMemfd) -> None:
    """A forked process can use the file, but its parent's VM is EIO."""
    assert gm_slots.set() == "ok"

    def child() -> tuple[str, str, str]:
        allocated = answer(lambda: fallocate(gm_file, KEEP_SIZE, 0, 4 * PAGE))
        return allocated, gm_slots.set(slot=4, guest_phys_addr=5 * GIB), gm_slots.delete()

    assert in_child(child) == ("ok", "EIO", "EIO")
    assert gm_slots.set(slot=4) == "EEXIST", "the child's end has not ended the slot"
    assert gm_slots.delete() == "ok"
    gm_slots.accepts()


@rule("gm.life.exec")
def test_exec(any_vm: Vm) -> None:
    """A descriptor without close-on-exec is inherited; the binding's has the flag."""
    program = "import os; os.fstat({})"

    def run(fd: int) -> bool:
        done = subprocess.run(
            [sys.executable, "-S", "-c", program.format(fd)],
            close_fds=False,
            stderr=subprocess.PIPE,
        )
        assert done.returncode == 0 or b"Bad file descriptor" in done.stderr
        return done.returncode == 0

    argument = gm.ffi.new("struct kvm_create_guest_memfd *", {"size": PAGE})
    bare = any_vm.ioctl(gm.KVM_CREATE_GUEST_MEMFD, argument)
    try:
        assert run(bare)
    finally:
        os.close(bare)
    with GuestMemfd(any_vm, PAGE) as file:
        assert not run(file.fileno())


@rule("gm.slot.failure.leaks_nothing")
@pytest.mark.parametrize(
    ("expected", "wrong"),
    [
        (frozenset({"EINVAL"}), {"guest_phys_addr": 1 << 52}),
        (frozenset({"EEXIST"}), {"guest_phys_addr": 4 * GIB}),
        (frozenset({"EINVAL"}), {"guest_memfd_offset": 2 * BIG}),
        (frozenset({"EBADF"}), {"guest_memfd": 0xFFFFFFFF}),
        (FILE_OVERLAP, {"guest_memfd_offset": 32 * PAGE}),
    ],
    ids=["prepared", "overlap", "beyond the file", "no file", "bound already"],
)
def test_failures_leak_nothing(gm_vm: Vm, expected: frozenset[str], wrong: dict[str, int]) -> None:
    """3,000 slots that can't be made leave no reference to the file, and none of their arrays."""
    memory, files, arrays = Unevictable(), files_open(), meminfo("VmallocUsed")
    with GuestMemfd(gm_vm, BIG) as file:
        fallocate(file, KEEP_SIZE, 0, BIG)
        slots = GuestMemfdSlots(gm_vm, file, 0)
        assert slots.set() == "ok"
        good = {"slot": 4, "guest_phys_addr": 5 * GIB, "guest_memfd_offset": 64 * PAGE}
        struct = slots.struct(**{**good, **wrong})
        said = [slots.set_at(address_of(struct)) for _ in range(3000)]
        assert len(set(said)) == 1
        assert set(said) <= expected
        # Each slot has an array for each size of large pages, in pages of their own.
        assert meminfo("VmallocUsed") - arrays < 12 * MIB
        slots.accepts(**good)
        assert slots.delete() == "ok"
    assert memory.is_about(0)
    assert abs(files_open() - files) < 200
