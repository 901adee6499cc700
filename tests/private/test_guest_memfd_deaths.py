"""guest_memfd: every call ends soon after SIGKILL, whatever was asked, and leaves no memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.guest.puppet import Puppet
from kvmpriv.private import guest_memfd
from kvmpriv.private.guest_memfd import GuestMemfd

from .support.accounting import BIG, Unevictable, vms_alive
from .support.defects import mainline_defect
from .support.mappings import INIT_SHARED, MADV, MMAP, Mapping, require_flags
from .support.pins import OP_READ, OP_WRITE, Transfer, a_disk
from .support.processes import killed_after
from .support.races import eventually
from .support.requirements import missing
from .support.rules import rule
from .support.syscalls import GIB, PAGE, call

if TYPE_CHECKING:
    from kvmpriv import Vm

pytestmark = pytest.mark.usefixtures("no_leak", "guest_memfd_kvm")

#: More than any of these calls can do while it is watched, and no more than any processor can
#: address.
HUGE, GPA = 128 * GIB, 4 * GIB
LARGEST = (1 << 63) - PAGE
#: Seconds for which a call is watched before the signal, and the most that it may take afterwards.
WATCHED, BOUND = 0.15, 10.0


class Subject:
    """A VM with a file of HUGE bytes and a slot of it; whatever it makes ends with the process."""

    def __init__(self, vm_type: int) -> None:
        self.stack = ExitStack()
        self.kvm = self.stack.enter_context(Kvm())
        self.vm = self.stack.enter_context(self.kvm.create_vm(vm_type))
        #: All the flags that files can have here, so that they can be mapped if that is possible.
        self.flags = self.vm.check_extension(gm.KVM_CAP_GUEST_MEMFD_FLAGS)
        self.file = self.stack.enter_context(GuestMemfd(self.vm, HUGE, self.flags))

    def bind(self) -> None:
        memory = HostMemory(HUGE, reserve=False)
        self.slot = guest_memfd.set_user_memory_region2(self.vm, 1, GPA, HUGE, memory, self.file)

    def convert(self, size: int, *, private: bool) -> None:
        value = gm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        guest_memfd.set_memory_attributes(self.vm, GPA, size, value)

    def mapping(self) -> Mapping:
        return Mapping(self.file.fileno(), HUGE)


def _create(subject: Subject) -> None:
    GuestMemfd(subject.vm, LARGEST).close()


def _bind(subject: Subject) -> None:
    subject.bind()
    subject.slot.delete()


def _allocate(subject: Subject) -> None:
    subject.file.allocate(0, HUGE)


def _punch(subject: Subject) -> None:
    subject.file.allocate(0, 64 * PAGE)
    subject.file.punch_hole(0, HUGE)


def _log(subject: Subject) -> None:
    with HostMemory(HUGE, reserve=False) as memory:
        slot = subject.vm.map(memory, GPA, flags=k.KVM_MEM_LOG_DIRTY_PAGES)
        subject.vm.get_dirty_log(slot.slot)
        slot.delete()


def _convert(subject: Subject) -> None:
    subject.convert(GIB, private=True)
    subject.convert(GIB, private=False)


def _pre_fault(subject: Subject) -> None:
    subject.bind()
    with subject.vm.create_vcpu() as vcpu:
        guest_memfd.pre_fault_memory(vcpu, GPA, HUGE)


def _run(subject: Subject) -> None:
    subject.bind()
    guest = Puppet(subject.vm, cpuid=subject.kvm.get_supported_cpuid())
    guest.touch(GPA, PAGE, HUGE // PAGE)


def _populate(subject: Subject) -> None:
    mapping = subject.mapping()
    call("madvise", mapping.address, HUGE, MADV["POPULATE_WRITE"])


def _remove(subject: Subject) -> None:
    with subject.mapping() as mapping:
        mapping.write(0, b"x")
        mapping.write(HUGE - PAGE, b"x")
        call("madvise", mapping.address, HUGE, MADV["REMOVE"])


def _lock(subject: Subject) -> None:
    call("mlock", subject.mapping().address, HUGE)


def _map(subject: Subject) -> None:
    with subject.mapping() as mapping:
        mapping.write(HUGE - PAGE, b"x")


#: Name -> what is done again and again until the process is killed.
CALLS: dict[str, Callable[[Subject], None]] = {
    "create": _create,
    "bind": _bind,
    "allocate": _allocate,
    "punch": _punch,
    "dirty log": _log,
    "convert": _convert,
    "pre-fault": _pre_fault,
    "run": _run,
    "populate": _populate,
    "remove": _remove,
    "lock": _lock,
    "map": _map,
}
PARAMETERS = [
    pytest.param(name, marks=[pytest.mark.converts] if name == "convert" else []) for name in CALLS
]
MAPPED = ("populate", "remove", "lock", "map")


@rule("gm.killed")
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_call_ends_when_its_process_is_killed(gm_vm: Vm, vm_type: int, name: str) -> None:
    """The process is gone within seconds, and the VM and its memory with it."""
    if name in MAPPED:
        require_flags(gm_vm, MMAP | INIT_SHARED)
    if name == "convert" and not gm_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES):
        missing("private-attribute", "KVM_CAP_MEMORY_ATTRIBUTES lacks PRIVATE for this VM type")
    if name == "pre-fault" and not gm_vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
        missing("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0")
    memory, vms = Unevictable(), vms_alive()

    def work(ready: Callable[[], None]) -> None:
        subject = Subject(vm_type)
        ready()
        while True:
            CALLS[name](subject)

    seconds = killed_after(work, WATCHED, BOUND)
    assert seconds < BOUND, f"{name} went on for {seconds:.1f} s after SIGKILL"
    assert memory.is_about(0)
    assert eventually(lambda: vms_alive() == vms)


@rule("gm.killed.direct")
@pytest.mark.parametrize("code", [OP_READ, OP_WRITE], ids=["read", "write"])
def test_killed_during_a_direct_transfer(gm_vm: Vm, vm_type: int, code: int) -> None:
    """The pages of a transfer that is under way are freed, and the disk has no request left."""
    require_flags(gm_vm, MMAP | INIT_SHARED)
    memory, vms = Unevictable(), vms_alive()
    with a_disk(BIG) as disk:

        def work(ready: Callable[[], None]) -> None:
            subject = Subject(vm_type)
            with subject.mapping() as mapping, ExitStack() as stack:
                Transfer(stack, disk, mapping.address, BIG, code)
                assert memory.is_about(BIG)
                ready()
                time.sleep(600)

        seconds = killed_after(work, WATCHED, BOUND)
        assert seconds < BOUND, f"the process went on for {seconds:.1f} s after SIGKILL"
        assert eventually(lambda: disk.requests() == 0)
    assert memory.is_about(0)
    assert eventually(lambda: vms_alive() == vms)


@rule("gm.killed.attributes")
@pytest.mark.dangerous("no signal ends a conversion of 64 GiB: half a minute of CPU time, 150 MB")
@pytest.mark.timeout(400)
def test_a_conversion_of_a_huge_range_ends(attributes_vm: Vm, vm_type: int) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES of a range of any size ends soon after SIGKILL."""

    def work(ready: Callable[[], None]) -> None:
        subject = Subject(vm_type)
        ready()
        subject.convert(64 * GIB, private=True)

    seconds = killed_after(work, WATCHED, 300)
    if seconds > 2:
        mainline_defect("attributes-unkillable", f"{seconds:.0f} s after SIGKILL")
