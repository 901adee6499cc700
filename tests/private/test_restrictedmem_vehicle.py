"""v9 on plain x86: the test vehicle's switch, the guest's choices, the fields of its exits."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.exits import ExitReason, HypercallExit, MemoryFaultExit, MmioExit
from kvmpriv.guest.puppet import GuestExit
from kvmpriv.private.restrictedmem import RestrictedMem

from .support.arch_hook import HOOK, hook
from .support.requirements import missing
from .support.rig import Rig, only
from .support.rules import rule
from .support.slot_requests import RestrictedSlots
from .support.syscalls import GIB, MIB, PAGE

if TYPE_CHECKING:
    from kvmpriv import Kvm, Vm

pytestmark = pytest.mark.usefixtures("no_leak")

GPA, TOP = 4 * GIB, 1 << 64
v9 = only("restrictedmem")
CALL = k.KVM_HC_MAP_GPA_RANGE
WANT_PRIVATE, WANT_SHARED = rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE, rm.KVM_MAP_GPA_RANGE_WANT_SHARED


@rule("v9.vehicle.parameter", "v9.vehicle.when")
def test_the_parameter(kvm: Kvm, file: RestrictedMem) -> None:
    """The switch applies to VMs that are made later, not to existing ones."""
    if not HOOK.exists():
        missing("test-vehicle", f"this kernel has no {HOOK.name}")

    def said(vm: Vm) -> str:
        slots = RestrictedSlots(vm, file, 0)
        answer = slots.set()
        return answer if answer != "ok" else slots.delete()

    with hook(on=True), kvm.create_vm() as capable:
        assert said(capable) == "ok"
        with hook(on=False), kvm.create_vm() as plain:
            assert (said(capable), said(plain)) == ("ok", "EINVAL")
        # plain is closed; another one outlives the switch
        with hook(on=False):
            other = kvm.create_vm()
        with other:
            assert (said(capable), said(other)) == ("ok", "EINVAL")


@rule("v9.wish.plain_slot", "v9.wish.no_slot")
@pytest.mark.known_defect("private-fault-without-file")
@v9
def test_wishes_where_there_is_no_choice(rig: Rig) -> None:
    """In an ordinary slot the guest's choice has no effect; without a slot the access is MMIO."""
    memory = rig.memory(MIB)
    rig.vm.map(memory, GPA)
    memory.write(0, b"plain")
    for wanted in (WANT_PRIVATE, WANT_SHARED, WANT_PRIVATE | WANT_SHARED):
        assert rig.guest.hypercall(CALL, GPA, 512, wanted) == 0
        assert rig.guest.read(GPA, 5) == b"plain"
        rig.guest.write(GPA + PAGE, b"data")
        assert memory.read(PAGE, 4) == b"data"
        with pytest.raises(GuestExit) as stopped:
            rig.guest.load(GPA + MIB, 4)
        assert stopped.value.exit == MmioExit(ExitReason.MMIO, False, GPA + MIB, 4, b"")
        rig.guest.reset()


@rule("v9.fault.padding")
@v9
def test_the_exits_padding(rig: Rig) -> None:
    """Each exit writes every field, and 0 to the padding, whatever they held before."""
    rig.bind(GPA, MIB, rig.file(MIB), memory=rig.memory(MIB))
    assert rig.guest.hypercall(CALL, GPA, 1, WANT_SHARED) == 0
    expected = MemoryFaultExit(ExitReason.MEMORY_FAULT_V9, GPA, PAGE, False, 0, 0, "restrictedmem")
    with pytest.raises(GuestExit) as stopped:
        rig.guest.load(GPA + 8, 8)
    assert stopped.value.exit == expected
    run = k.ffi.buffer(rig.guest.vcpu.kvm_run)
    for _ in range(3):
        run[32:56] = b"\xff" * 24
        with pytest.raises(GuestExit) as stopped:
            rig.guest.resume()
        assert stopped.value.exit == expected
        assert run[32:40] == bytes(8), "flags and padding"
    rig.convert(GPA, PAGE, private=False)
    assert rig.guest.resume() == 0


@rule("v9.fault.read-only.secret")
@pytest.mark.known_defect("read-only-spins", "pages-not-zeroed")
@v9
def test_a_read_only_slot_keeps_the_secret(rig: Rig) -> None:
    """A private write to a read-only slot exits without the data; a shared one is MMIO."""
    memory, file = rig.memory(MIB), rig.file(MIB)
    rig.bind(GPA, MIB, file, memory=memory, flags=k.KVM_MEM_READONLY)
    secret = 0x5EC2E75EC2E75EC2
    at = GPA + 0x1238
    for touched in (False, True):
        with pytest.raises(GuestExit) as stopped:
            rig.guest.store(at, 8, secret)
        assert stopped.value.exit == rig.fault_at(at, private=True)
        assert secret.to_bytes(8, "little") not in bytes(k.ffi.buffer(rig.guest.vcpu.kvm_run)), (
            touched
        )
        rig.guest.reset()
        assert rig.guest.load(at, 8) == 0
    rig.convert(GPA, MIB, private=False)
    with pytest.raises(GuestExit) as stopped:
        rig.guest.store(at, 8, secret)
    assert stopped.value.exit == MmioExit(
        ExitReason.MMIO, True, at, 8, secret.to_bytes(8, "little")
    )
    rig.guest.reset()


@rule("v9.hypercall.enabled_errors")
@v9
def test_the_errors_of_an_enabled_hypercall(rig: Rig) -> None:
    """With the exit enabled KVM itself answers -EINVAL: gpa not aligned, 0 pages, a page number
    that wraps.
    """
    rig.vm.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1 << CALL)
    encrypted = k.KVM_MAP_GPA_RANGE_ENCRYPTED
    refused = ((GPA + 1, 1), (GPA + 2048, 1), (GPA, 0), (GPA, TOP - 1), (PAGE, TOP - 1))
    for gpa, pages in refused:
        assert rig.guest.hypercall(CALL, gpa, pages, encrypted) == -errno.EINVAL, (gpa, pages)
    assert rig.guest.exits == []
    for gpa, pages in ((GPA, 1), (TOP - PAGE, 2), (0, TOP - 1)):
        with pytest.raises(GuestExit) as stopped:
            rig.guest.hypercall(CALL, gpa, pages, encrypted)
        asked = stopped.value.exit
        assert isinstance(asked, HypercallExit)
        assert asked.args[:3] == (gpa, pages, encrypted)
        rig.guest.vcpu.kvm_run.hypercall.ret = 0
        assert rig.guest.resume() == 0
