"""Without memory or descriptors, calls fail and change nothing: no spin, no leak, no complaint."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from kvmpriv import HostMemory, Kvm, Vm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.guest.puppet import GuestExit
from kvmpriv.private import PrivateAbi, PrivateSlot, guest_memfd

from .support.accounting import BIG, Unevictable, vms_alive
from .support.arch_hook import hook
from .support.fault_injection import FailNth, failing_allocations, fault_injection
from .support.large_pages import huge_pages, need_large_pages
from .support.leaks import lowest_free_fd, open_fds
from .support.mappings import MADV, MappedGuest
from .support.processes import child_status, in_cgroup, in_child
from .support.races import beside, eventually, within_cpu_time
from .support.requirements import missing
from .support.rig import LARGE, Rig, only, two_backings
from .support.rules import rule
from .support.syscalls import GIB, MIB, PAGE, answer, call, errno_of

pytestmark = pytest.mark.usefixtures("no_leak")

GPA = 4 * GIB


# -- descriptors ---------------------------------------------------------------------------------


@rule("fail.emfile")
def test_no_descriptor_left(rig: Rig, kvm: Kvm) -> None:
    """Without a free descriptor, creating a VM, a vCPU or a file is EMFILE, and leaves nothing."""
    memory, vms, fds = Unevictable(), vms_alive(), open_fds()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    asks: dict[str, Callable[[], object]] = {
        "vm": lambda: rig.abi.create_vm(kvm).close(),
        "vcpu": lambda: rig.vm.create_vcpu(7).close(),
        "file": lambda: rig.abi.create_file(rig.vm, MIB).close(),
    }
    for name, ask in asks.items():
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            said = [answer(ask) for _ in range(20)]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert said == ["EMFILE"] * 20, name
        assert answer(ask) == "ok", name
    assert open_fds() == fds
    assert eventually(lambda: vms_alive() == vms)
    assert memory.is_about(0)


@rule("fail.enfile")
def test_no_file_left_in_the_system(rig: Rig) -> None:
    """Without a free file in the system, creating a file is ENFILE for unprivileged processes."""
    file_max = Path("/proc/sys/fs/file-max")

    def ask() -> str:
        with Kvm() as kvm, rig.abi.create_vm(kvm) as vm:
            os.seteuid(65534)  # the privileged are above the limit
            return answer(lambda: rig.abi.create_file(vm, MIB).close())

    before = file_max.read_text()
    file_max.write_text("0")
    try:
        assert in_child(ask) == "ENFILE"
    finally:
        file_max.write_text(before)
    assert in_child(ask) == "ok"


# -- memory --------------------------------------------------------------------------------------


@contextmanager
def own_rig(abi: PrivateAbi) -> Iterator[Rig]:
    """A rig that shares nothing with the parent, for a child process."""
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        with hook(on=True):
            vm = stack.enter_context(abi.create_vm(kvm))
        yield Rig(stack, vm, kvm)


@rule("fail.memcg.killed")
@pytest.mark.parametrize("how", ["touch", "allocate"])
def test_over_the_limit_the_process_is_killed(rig: Rig, how: str) -> None:
    """Private pages beyond memory.max: the OOM killer ends the process, and all memory is freed."""
    memory, vms, abi = Unevictable(), vms_alive(), rig.abi

    def child() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        with own_rig(abi) as own:
            file = own.file(8 * BIG)
            own.bind(GPA, 8 * BIG, file)
            if how == "allocate":
                file.allocate(0, 8 * BIG)
            else:
                own.guest.touch(GPA, PAGE, 8 * BIG // PAGE, byte=1)

    with in_cgroup() as group:
        (group / "memory.max").write_text(str(2 * BIG))
        status, result = child_status(child)
        assert os.WIFSIGNALED(status), result
        assert os.WTERMSIG(status) == signal.SIGKILL
        events = dict(one.split() for one in (group / "memory.events").read_text().splitlines())
        assert int(events["oom_kill"]) == 1
        assert memory.is_about(0)
        assert eventually(lambda: vms_alive() == vms)
        assert eventually(lambda: int((group / "memory.current").read_text()) < 2 * MIB)
    works(rig)


def works(rig: Rig) -> None:
    """A guest can use BIG bytes of private memory."""
    slot = rig.bind(GPA, BIG, rig.file(BIG))
    rig.guest.touch(GPA, PAGE, BIG // PAGE, byte=0x3C)
    assert rig.guest.load(GPA + BIG - PAGE, 1) == 0x3C
    slot.delete()


@rule("fail.memcg.errors", "fail.memcg.resume")
@pytest.mark.known_defect("no-page-spins", "pages-not-zeroed")
@pytest.mark.parametrize("how", ["touch", "allocate"])
def test_over_the_limit_where_nobody_can_be_killed(rig: Rig, how: str) -> None:
    """KVM_RUN and fallocate fail with ENOMEM, and work once there is memory."""
    memory, abi = Unevictable(), rig.abi

    def is_lifted() -> bool:
        # The kernel's memory for an open file counts, too.
        try:
            return most.read_text() == "max\n"
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            return False

    def child() -> tuple[str, bool, bool]:
        Path("/proc/self/oom_score_adj").write_text("-1000")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        with own_rig(abi) as own:
            file = own.file(2 * BIG)
            own.bind(GPA, 2 * BIG, file)
            own.guest.store(GPA, 8, 1)
            now = int((group / "memory.current").read_text())
            most.write_text(str(now + BIG))
            with within_cpu_time(60):
                if how == "touch":
                    said = answer(lambda: own.guest.touch(GPA, PAGE, 2 * BIG // PAGE, byte=1))
                    assert eventually(is_lifted)
                    own.guest.resume()
                else:
                    said = answer(lambda: file.allocate(0, 2 * BIG))
                    assert eventually(is_lifted)
                    file.allocate(0, 2 * BIG)
            kept = own.guest.load(GPA, 1) == 1
            there = [own.guest.load(GPA + n * MIB, 1) for n in range(1, 2 * BIG // MIB)]
            return said, kept, set(there) == {int(how == "touch")}

    def lift() -> None:
        # Without this the process could not have a page of its own, either.
        events = dict(one.split() for one in (group / "memory.events").read_text().splitlines())
        if int(events["oom"]):
            time.sleep(0.3)
            most.write_text("max")
        time.sleep(0.02)

    with in_cgroup() as group:
        most = group / "memory.max"
        with beside(lift):
            assert in_child(child) == ("ENOMEM", True, True)
        assert memory.is_about(0)
    works(rig)


# -- each allocation in turn ---------------------------------------------------------------------

#: No call here makes more allocations than this.
MOST = 400


def each_failing(call: Callable[[], object], undo: Callable[[str], None]) -> list[str]:
    """The results of `call` with its first, second, … allocation failing, until none fails.

    `undo` gets each answer, and restores the state before.
    """
    answers: list[str] = []
    with fault_injection(), closing(FailNth()) as fail:
        for number in range(1, MOST):
            fail.start(number)
            try:
                call()
                said = "ok"
            except OSError as error:
                said = errno_of(error.errno or 0)
            except GuestExit as stopped:
                said = f"exit {stopped.exit.reason}"
            injected = fail.stop()
            undo(said)
            if not injected:
                assert said == "ok"
                return answers
            answers.append(said)
    raise AssertionError(f"after {MOST} rounds there still was an allocation to fail")


def check(answers: list[str], *also: str) -> None:
    """Failures were injected and noticed; each is ENOMEM if the kernel needs the memory."""
    assert answers, "no allocation was made to fail"
    assert set(answers) <= {"ok", "ENOMEM", *also}
    assert "ENOMEM" in answers


@rule("fail.injected.create")
def test_creating_a_file_with_failing_allocations(rig: Rig) -> None:
    """Each failure is ENOMEM and leaves no descriptor and no memory; the last call succeeds."""
    fds, memory, free = open_fds(), Unevictable(), lowest_free_fd()
    # shmem says ENOSPC when it can't have an inode.
    also = ("ENOSPC",) if rig.behaviour.shmem else ()
    create = each_failing(lambda: rig.abi.create_file(rig.vm, MIB).close(), lambda _said: None)
    check(create, *also)
    assert open_fds() == fds
    assert lowest_free_fd() == free, "a descriptor is taken, and has no file"
    assert memory.is_about(0)


@rule("fail.injected.bind")
def test_binding_with_failing_allocations(rig: Rig) -> None:
    """Each call is ENOMEM without a slot, or makes the slot."""
    file, slots = rig.file(MIB), []

    def bind() -> None:
        slots.append(rig.abi.bind(rig.vm, GPA, MIB, file))

    def undo(said: str) -> None:
        assert len(slots) == (said == "ok")
        if not slots:  # nothing is in the way of the twin
            bind()
        slots.pop().delete()

    check(each_failing(bind, undo))
    works(rig)


@rule("fail.injected.convert")
@pytest.mark.known_defect("failed-conversion-erases")
@two_backings
def test_converting_with_failing_allocations(rig: Rig) -> None:
    """Each call is ENOMEM and converts nothing, or converts the whole range."""
    first, last = 4, 200
    odd = range(first + 1, 45, 2)  # converted before; that they change takes more than one node
    wanted = not rig.abi.traits.default_private  # what a kernel has to remember
    side = {False: 0x11, True: 0x22}
    with HostMemory(MIB) as memory:
        memory.write(0, b"\x11" * MIB)
        slot = rig.bind(GPA, MIB, rig.file(MIB), memory=memory)
        rig.convert(GPA, MIB, private=True)
        rig.guest.fill(GPA, 0x22, MIB)

        def prepare() -> None:
            rig.convert(GPA, MIB, private=not wanted)
            for page in odd:
                rig.convert(GPA + page * PAGE, PAGE, private=wanted)

        def convert() -> None:
            rig.convert(GPA + first * PAGE, (last - first) * PAGE, private=wanted)

        def undo(said: str) -> None:
            converted = range(first, last) if said == "ok" else odd
            for page in (first - 1, first, first + 1, 20, 21, 44, 100, last - 1, last):
                expected = side[wanted if page in converted else not wanted]
                assert rig.guest.load(GPA + page * PAGE, 1) == expected, (said, page)
            prepare()

        prepare()
        answers = each_failing(convert, undo)
        assert answers, "no allocation was made to fail"
        assert set(answers) <= {"ok", "ENOMEM"}
        with failing_allocations():
            said = answer(convert)
        assert said == "ENOMEM"  # a single failure the kernel may have got over
        undo(said)
        convert()
        undo("ok")
        slot.delete()
    works(rig)


@rule("fail.injected.punch")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed", "split-loses-pages")
@only("restrictedmem")
def test_punching_with_failing_allocations(rig: Rig) -> None:
    """A hole in a large page is made or is ENOMEM; the pages around it stay."""
    with huge_pages():
        memory, at = rig.large_memory(LARGE)
        slot = rig.bind(GPA, LARGE, rig.file(LARGE), memory=memory, memory_offset=at)

        def fill() -> None:
            rig.guest.fill(GPA, 0x22, LARGE)
            need_large_pages(rig)

        def undo(said: str) -> None:
            if said == "ok":
                assert rig.guest.span(GPA + 8 * PAGE, 0, LARGE - 8 * PAGE) == 8 * PAGE
            assert rig.guest.span(GPA, 0x22, 8 * PAGE) == 8 * PAGE
            rest = LARGE - 16 * PAGE
            assert rig.guest.span(GPA + 16 * PAGE, 0x22, rest) == rest
            slot.punch_hole(GPA, LARGE)  # what is split stays so
            fill()

        fill()
        # To split it takes memory: this is a hole that does.
        answers = each_failing(lambda: slot.punch_hole(GPA + 8 * PAGE, 8 * PAGE), undo)
    assert answers, "no allocation was made to fail"
    assert set(answers) <= {"ok", "ENOMEM"}
    works_beside(rig, slot)


@rule("fail.punch.without-memory")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
def test_punching_without_memory(rig: Rig) -> None:
    """A hole in small pages needs no allocation: memory can be freed when none is left."""
    slot = _filled(rig)
    said: list[str] = []

    def punch() -> None:
        slot.punch_hole(GPA + 8 * PAGE, 8 * PAGE)

    assert each_failing(punch, said.append) == []
    assert said == ["ok"]
    rig.guest.fill(GPA + 8 * PAGE, 0x22, 8 * PAGE)
    with failing_allocations():
        said = [answer(punch), answer(lambda: slot.allocate(GPA + MIB, 8 * PAGE))]
    assert said == ["ok", "ENOMEM"]
    assert rig.guest.span(GPA, 0x22, MIB) == 8 * PAGE
    assert rig.guest.span(GPA + 8 * PAGE, 0, MIB) == 8 * PAGE
    rest = MIB - 16 * PAGE
    assert rig.guest.span(GPA + 16 * PAGE, 0x22, rest) == rest
    works_beside(rig, slot)


@rule("fail.injected.allocate")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
def test_allocating_with_failing_allocations(rig: Rig) -> None:
    """Each call is ENOMEM and leaves no new page, or allocates all; earlier pages stay."""
    memory, slot = Unevictable(), _filled(rig)

    def undo(said: str) -> None:
        assert said in ("ok", "ENOMEM")
        assert rig.guest.load(GPA, 1) == 0x22
        slot.punch_hole(GPA + MIB, MIB)
        assert rig.guest.load(GPA + MIB, 1) == 0
        slot.punch_hole(GPA + MIB, PAGE)

    answers = each_failing(lambda: slot.allocate(GPA + MIB, 8 * PAGE), undo)
    check(answers)
    assert memory.is_about(MIB)
    works_beside(rig, slot)


@rule("fail.injected.fault")
@pytest.mark.known_defect("no-page-spins", "notified-in-bytes", "pages-not-zeroed")
def test_first_touches_with_failing_allocations(rig: Rig) -> None:
    """KVM_RUN fails with ENOMEM and continues at the next call; fresh pages are zero."""
    slot, at = _filled(rig), GPA + MIB

    def touch() -> None:
        assert rig.guest.load(at, 1) == 0

    def undo(said: str) -> None:
        if said != "ok":
            assert rig.guest.resume() == 0
        rig.guest.store(at, 1, 0x33)
        assert rig.guest.load(at, 1) == 0x33
        slot.punch_hole(at, PAGE)
        assert rig.guest.load(at, 1) == 0
        slot.punch_hole(at, PAGE)

    check(each_failing(touch, undo))
    works_beside(rig, slot)


@rule("fail.injected.delete")
def test_deleting_with_failing_allocations(rig: Rig) -> None:
    """Each call is ENOMEM and leaves the slot as it is, or deletes it."""
    file = rig.file(MIB)
    slots = [rig.bind(GPA, MIB, file)]
    rig.guest.fill(GPA, 0x22, MIB)

    def undo(said: str) -> None:
        if said == "ok":
            slots.append(rig.bind(GPA, MIB, file))
        assert not slots[-1].deleted
        assert rig.guest.span(GPA, 0x22, MIB) == MIB
        assert len(rig.vm.slots) == before

    def delete() -> None:
        slots[-1].delete()

    before = len(rig.vm.slots)
    check(each_failing(delete, undo))
    works_beside(rig, slots[-1])


@rule("fail.injected.pre-fault")
@only("guest_memfd")
def test_filling_ahead_with_failing_allocations(rig: Rig) -> None:
    """KVM_PRE_FAULT_MEMORY is ENOMEM, or maps the page; pages that are there stay."""
    slot, at = _filled(rig), GPA + MIB
    if not rig.vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
        missing("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0")

    def undo(said: str) -> None:
        assert said in ("ok", "ENOMEM")
        assert rig.guest.load(GPA, 1) == 0x22
        assert rig.guest.load(at, 1) == 0
        slot.punch_hole(at, PAGE)

    check(each_failing(lambda: guest_memfd.pre_fault_memory(rig.guest.vcpu, at, PAGE), undo))
    works_beside(rig, slot)


@rule("fail.injected.mapping")
@pytest.mark.usefixtures("guest_memfd_kvm")
def test_populating_a_mapping_with_failing_allocations(gm_vm: Vm, kvm: Kvm) -> None:
    """MADV_POPULATE_WRITE is ENOMEM, or allocates the page, which the guest then has."""
    memory = Unevictable()
    with ExitStack() as stack:
        mapped = MappedGuest(stack, gm_vm, kvm)

        def populate() -> None:
            call("madvise", mapped.memory.address, PAGE, MADV["POPULATE_WRITE"])

        def undo(said: str) -> None:
            assert said in ("ok", "ENOMEM")
            assert mapped.both_see(0, 0)
            mapped.guest.fill(GPA, 0x22, PAGE)
            assert mapped.both_see(0, 0x22)
            mapped.punch_hole(0)

        check(each_failing(populate, undo))
    assert memory.is_about(0)


def _filled(rig: Rig) -> PrivateSlot:
    """A slot of 2 MiB whose first half the guest has written to."""
    slot = rig.bind(GPA, 2 * MIB, rig.file(2 * MIB))
    rig.guest.fill(GPA, 0x22, MIB)
    return slot


def works_beside(rig: Rig, slot: PrivateSlot) -> None:
    assert rig.guest.load(GPA, 1) == 0x22
    slot.delete()
    works(rig)
