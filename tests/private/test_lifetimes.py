"""Lifetimes, by both ABIs: in every order, with running guests, and across processes.

What each ABI has for itself is in the lifetimes of restrictedmem and of guest_memfd.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import permutations

import pytest

from kvmpriv import HostMemory, Kvm, Vcpu, Vm, private
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.guest.puppet import GuestExit, Puppet
from kvmpriv.private import PrivateAbi, PrivateFile, PrivateVm
from kvmpriv.private.guest_memfd import GuestMemfd

from .support.accounting import BIG, Unevictable, vms_alive
from .support.arch_hook import hook
from .support.behaviour import behaviour_of
from .support.kernels import takes_guest_memfd
from .support.processes import in_child, killed_after
from .support.races import eventually, rounds
from .support.requirements import missing
from .support.rig import MakeRig, Rig
from .support.rules import rule
from .support.slot_requests import FILE_OVERLAP, Slots
from .support.syscalls import GIB, HOLE, KEEP_SIZE, MIB, PAGE, answer, fallocate

pytestmark = pytest.mark.usefixtures("no_leak")

GPA = 4 * GIB


class Kind:
    """One kind of file, VM and slot: private by an ABI, or all shared in a default VM."""

    def __init__(self, abi: PrivateAbi, make_vm: Callable[[], Vm], *, shared: bool = False) -> None:
        self.abi, self.make_vm, self.shared = abi, make_vm, shared
        self.behaviour = behaviour_of(abi)

    def file(self, vm: Vm) -> PrivateFile:
        """A file of BIG bytes."""
        if self.shared:
            return GuestMemfd(vm, BIG, gm.GUEST_MEMFD_FLAG_MMAP | gm.GUEST_MEMFD_FLAG_INIT_SHARED)
        assert isinstance(vm, PrivateVm)
        return self.abi.create_file(vm, BIG)

    def slots(self, vm: Vm, fd: int) -> Slots:
        """Slots of BIG bytes at GPA, set by ioctl: only the kernel keeps their file alive."""
        slots = self.behaviour.slots(vm, fd, 0)
        changes = {"guest_phys_addr": GPA, "memory_size": BIG, slots.offset_field: 0}
        slots.good = {**slots.good, **changes}
        return slots


SHARED = "guest_memfd, shared"


@pytest.fixture(params=[*private.ABIS, SHARED])
def kind(request: pytest.FixtureRequest, kvm: Kvm) -> Iterator[Kind]:
    """Each kind that this kernel supports."""
    with ExitStack() as stack:
        if request.param == SHARED:
            if takes_guest_memfd(gm.KVM_X86_DEFAULT_VM) != 1:
                missing("shared-guest-memfd", "default VMs take no guest_memfd slots")
            abi = private.ABIS["guest_memfd"]
            yield Kind(abi, lambda: stack.enter_context(kvm.create_vm()), shared=True)
            return
        abi = private.ABIS[request.param]
        behaviour_of(abi).require(kvm)

        def make_vm() -> Vm:
            with hook(on=True):
                return stack.enter_context(abi.create_vm(kvm))

        yield Kind(abi, make_vm)


# -- every order ---------------------------------------------------------------------------------


@rule("life.every_order")
@pytest.mark.parametrize("order", list(permutations(("file", "slot", "vm", "vcpu"))), ids="-".join)
def test_every_order(kind: Kind, order: tuple[str, ...]) -> None:
    """File, slot, VM and vCPU are closed in any order: memory is freed when nothing refers to it.

    v9: with the file's last descriptor and the last slot of a living VM.  guest_memfd: with the
    file's last descriptor.  A VM ends with its last descriptor, those of vCPUs included, and with
    guest_memfd those of its files.
    """
    memory, before = Unevictable(), vms_alive()
    vm = kind.make_vm()
    vcpu = vm.create_vcpu()
    (name,) = vms_alive() - before
    file = kind.file(vm)
    slots = kind.slots(vm, file.fileno())
    assert slots.set() == "ok"
    fallocate(file, KEEP_SIZE, 0, BIG)
    there = {"file", "slot", "vm", "vcpu"}
    for what in order:
        if what == "slot":
            if "vm" not in there:  # without the VM's descriptor it can't be deleted
                there.discard(what)
                continue
            assert slots.delete() == "ok"
        else:
            {"file": file, "vm": vm, "vcpu": vcpu}[what].close()
        there.discard(what)
        vm_lives = bool({"vm", "vcpu"} & there)
        slot_lives = vm_lives and ("slot" in there or order.index("slot") > order.index("vm"))
        if kind.behaviour.slots_hold_files:
            kept = "file" in there or slot_lives
        else:
            kept = "file" in there
            vm_lives = vm_lives or kept
        assert memory.is_about(BIG if kept else 0), f"after {what}"
        assert eventually(partial(_lives, name, vm_lives)), f"after {what}"
    assert not there


def _lives(name: str, expected: bool) -> bool:
    return (name in vms_alive()) == expected


# -- under a running guest -----------------------------------------------------------------------


class Runner:
    """A guest that touches 16 pages at GPA again and again in a thread; `stopped`: why it ended."""

    def __init__(self, guest: Puppet) -> None:
        self.guest = guest
        self.stopped: BaseException | None = None
        self.turns = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert eventually(lambda: self.turns > 5, 20)

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                assert self.guest.span(GPA, 0x6B, 16 * PAGE) == 16 * PAGE
                self.turns += 1
        except BaseException as error:  # noqa: BLE001  # the test asks for it
            self.stopped = error

    def goes_on(self) -> bool:
        seen = self.turns
        return eventually(lambda: self.turns > seen + 5 or self.stopped is not None, 20) and (
            self.stopped is None
        )

    def end(self) -> None:
        self._over.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "stuck"


@contextmanager
def running(rig: Rig, file: PrivateFile) -> Iterator[tuple[Slots, Runner]]:
    """A guest that runs in private memory whose slot only the kernel keeps alive."""
    kind = Kind(rig.abi, lambda: rig.vm)
    slots = kind.slots(rig.vm, file.fileno())
    assert slots.set() == "ok"
    rig.convert_all(file, GPA, private=True)
    rig.guest.fill(GPA, 0x6B, BIG)
    runner = Runner(rig.guest)
    try:
        yield slots, runner
    finally:
        runner.end()


@rule("life.running.file")
def test_file_closed_under_a_running_guest(rig: Rig) -> None:
    """Closing the file under a running guest changes nothing (v9) or takes its memory at once
    (guest_memfd).
    """
    memory, file = Unevictable(), rig.abi.create_file(rig.vm, BIG)
    with running(rig, file) as (slots, runner):
        assert runner.goes_on()
        file.close()
        if rig.behaviour.slots_hold_files:
            assert runner.goes_on()
            assert memory.is_about(BIG)
            runner.end()
        else:
            assert eventually(lambda: runner.stopped is not None, 20)
            assert isinstance(runner.stopped, GuestExit)
            gpa, size, kind = rig.fault_of(runner.stopped)
            # A state of the file is gone with it: the access is one of shared memory then.
            assert (size, kind) == (PAGE, rig.abi.traits.converts == "vm")
            assert GPA <= gpa < GPA + 16 * PAGE
            rig.guest.reset()
        assert slots.delete() == "ok"
        assert memory.is_about(0)


@rule("life.running.slot")
def test_slot_deleted_under_a_running_guest(rig: Rig) -> None:
    """The guest stops at its next access; when the slot is made again it finds its data."""
    memory, file = Unevictable(), rig.file(BIG)
    with running(rig, file) as (slots, runner):
        assert slots.delete() == "ok"
        assert eventually(lambda: runner.stopped is not None, 20)
        assert isinstance(runner.stopped, GuestExit)
        mmio = rig.behaviour.mmio_without_slot
        wanted = k.KVM_EXIT_MMIO if mmio else rig.abi.fault_layout.reason
        assert runner.stopped.exit.reason == wanted
        assert memory.is_about(BIG)
        rig.guest.reset()
        assert slots.set() == "ok"
        assert rig.guest.span(GPA, 0x6B, BIG) == BIG
        assert slots.delete() == "ok"
    file.close()
    assert memory.is_about(0)


@rule("life.running.vm")
def test_vm_closed_under_a_running_guest(rig: Rig) -> None:
    """The vCPU keeps its VM alive: the guest runs on, and all is freed with the vCPU."""
    memory, before = Unevictable(), vms_alive()
    file = rig.abi.create_file(rig.vm, BIG)
    with running(rig, file) as (_, runner):
        rig.vm.close()
        if rig.behaviour.slots_hold_files:
            file.close()
        assert runner.goes_on()
        assert memory.is_about(BIG)
        runner.end()
        assert runner.stopped is None
    rig.vm.slots.clear()  # without the VM's descriptor they can't be deleted
    rig.guest.vcpu.close()
    file.close()
    assert memory.is_about(0)
    assert eventually(lambda: len(vms_alive()) == len(before) - 1)


# -- one file in two places ----------------------------------------------------------------------


@rule("life.two_slots", "slots.two.one-range")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
def test_a_range_in_two_slots(rig: Rig) -> None:
    """v9: both slots have the same memory, a hole empties both.  guest_memfd: EINVAL or EEXIST."""
    file, other = rig.file(2 * MIB), GPA + GIB
    first = rig.bind(GPA, MIB, file)
    if not rig.behaviour.shares_files:
        offsets = (0, PAGE, MIB - PAGE)
        said = {answer(partial(rig.bind, other, MIB, file, offset)) for offset in offsets}
        assert len(said) == 1
        assert said <= FILE_OVERLAP
        second = rig.bind(other, MIB, file, MIB)
        rig.guest.write(GPA, b"first")
        assert rig.guest.read(other, 5) == bytes(5), "the twin has its own range"
        file.punch_hole(MIB, MIB)
        assert rig.guest.read(GPA, 5) == b"first"
        second.delete()
        rig.bind(other, MIB, file, MIB)
        return
    second = rig.bind(other, MIB, file, 0)
    rig.guest.write(GPA, b"first")
    assert rig.guest.read(other, 5) == b"first"
    rig.guest.write(other + 8 * PAGE, b"second")
    assert rig.guest.read(GPA + 8 * PAGE, 6) == b"second"
    file.punch_hole(0, PAGE)
    assert (rig.guest.read(GPA, 5), rig.guest.read(other, 5)) == (bytes(5), bytes(5))
    first.delete()
    assert rig.guest.read(other + 8 * PAGE, 6) == b"second"
    rig.guest.write(other, b"third")
    file.punch_hole(8 * PAGE, PAGE)
    assert rig.guest.read(other + 8 * PAGE, 6) == bytes(6), "the remaining one is notified"
    rig.bind(GPA, MIB, file, 0)
    assert rig.guest.read(GPA, 5) == b"third"
    second.delete()


@rule("life.two_vms", "slots.two.vms")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
def test_a_file_in_two_vms(make_rig: MakeRig) -> None:
    """v9: both VMs have the same memory, a hole empties both.  guest_memfd: EINVAL."""
    one, two = make_rig(), make_rig()
    file = one.file(MIB)
    one.bind(GPA, MIB, file)
    if not one.behaviour.shares_files:
        with pytest.raises(OSError, match="Invalid argument"):
            two.bind(GPA, MIB, file)
        two.bind(GPA, MIB, two.file(MIB))
        one.guest.write(GPA, b"first")
        assert two.guest.read(GPA, 5) == bytes(5), "the twin has its own file"
        return
    slot = two.bind(GPA, MIB, file)
    one.guest.write(GPA, b"first")
    assert two.guest.read(GPA, 5) == b"first"
    file.punch_hole(0, PAGE)
    assert (one.guest.read(GPA, 5), two.guest.read(GPA, 5)) == (bytes(5), bytes(5))
    two.guest.write(GPA, b"second")
    assert one.guest.read(GPA, 6) == b"second"
    one.guest.close()
    one.vm.close()
    assert two.guest.read(GPA, 6) == b"second"
    file.punch_hole(0, PAGE)
    assert two.guest.read(GPA, 6) == bytes(6), "the remaining one is notified"
    slot.delete()


# -- other processes -----------------------------------------------------------------------------


@rule("life.fork.keeps", "life.exec.keeps")
@pytest.mark.parametrize("how", ["fork", "exec"])
def test_a_child_keeps_what_it_inherits(kind: Kind, how: str) -> None:
    """VM and file live on in a child that inherited their descriptors, and end with it."""
    memory, before = Unevictable(), vms_alive()
    vm = kind.make_vm()
    (name,) = vms_alive() - before
    file = kind.file(vm)
    assert kind.slots(vm, file.fileno()).set() == "ok"
    fallocate(file, KEEP_SIZE, 0, BIG)
    if how == "fork":
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            theirs.recv(1)
            os._exit(0)
        theirs.close()
    else:
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=[vm.fileno(), file.fileno()],
        )
    file.close()
    vm.close()
    try:
        assert memory.is_about(BIG)
        assert name in vms_alive()
    finally:
        if how == "fork":
            ours.close()
            assert os.waitpid(pid, 0)[1] == 0
        else:
            child.communicate()
            assert child.returncode == 0
    assert memory.is_about(0)
    assert eventually(lambda: name not in vms_alive())


@rule("life.scm_rights.last", "life.scm_rights.unread")
def test_sent_and_closed(kind: Kind) -> None:
    """A file in a socket's queue lives until the socket or its receiver closes it."""
    memory = Unevictable()
    vm = kind.make_vm()

    def receive() -> bool:
        ours.close()
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        theirs.close()
        there = memory.is_about(BIG)
        fallocate(fds[0], HOLE, 0, BIG)
        gone = memory.is_about(0)
        fallocate(fds[0], KEEP_SIZE, 0, BIG)
        return there and gone and memory.is_about(BIG)

    for read in (False, True):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            file = kind.file(vm)
            fallocate(file, KEEP_SIZE, 0, BIG)
            socket.send_fds(ours, [b"x"], [file.fileno()])
            file.close()
            assert memory.is_about(BIG), "it is on its way"
            if read:
                assert in_child(receive)
        assert memory.is_about(0)


@rule("life.killed.anywhere")
@pytest.mark.known_defect("notified-in-bytes")
def test_killed_in_the_middle(make_rig: MakeRig) -> None:
    """A process killed while its guest runs and its memory changes leaves nothing allocated."""
    memory, before = Unevictable(), vms_alive()
    abi = make_rig().abi
    with_rig = vms_alive()
    killed = 0
    for turn in rounds(8, 6, least=2):
        assert killed_after(partial(_live, abi), 0.002 * turn, 20) < 20
        killed += 1
        assert eventually(lambda: vms_alive() == with_rig, 20)
    assert killed >= 2
    assert memory.is_about(0)
    assert before <= with_rig


def _live(abi: PrivateAbi, ready: Callable[[], None]) -> None:
    """Runs a guest, and converts, punches and fills its memory, until the process is killed."""
    with Kvm() as kvm:
        with hook(on=True):
            vm = abi.create_vm(kvm)
        host, guest = (
            HostMemory(BIG),
            Puppet(vm, cpus=2, cpuid=kvm.get_supported_cpuid(), serve_conversions=False),
        )
        guest.serve = guest.cpus[1].serve = lambda _cpu, _exit: True
        file = abi.create_file(vm, BIG)
        abi.bind(vm, GPA, BIG, file, memory=host)
        abi.convert(vm, GPA, BIG, private=True)

        def touch(cpu: int) -> None:
            while True:
                guest.cpus[cpu].touch(GPA, PAGE, 1024, byte=1)

        for cpu in (0, 1):
            threading.Thread(target=touch, args=(cpu,), daemon=True).start()
        ready()
        while True:
            abi.convert(vm, GPA, MIB, private=False)
            file.punch_hole(MIB, 2 * MIB)
            abi.convert(vm, GPA, MIB, private=True)
            file.allocate(0, 4 * MIB)


@rule("life.vcpu.of_another_process")
def test_a_forked_vcpu(rig: Rig) -> None:
    """A vCPU belongs to its process: in a child KVM_RUN is EIO, without effect on the guest."""
    rig.bind(GPA, MIB, rig.file(MIB))
    rig.guest.write(GPA, b"parent")
    vcpu: Vcpu = rig.guest.vcpu

    def child() -> int:
        return vcpu.ioctl_errno(k.KVM_RUN, 0)

    import errno

    assert in_child(child) == errno.EIO
    assert rig.guest.read(GPA, 6) == b"parent"
