"""An ABI registered from outside, on a real /dev/kvm, with all that the package has for ABIs."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from guest.toy_abi import FLAGS, PAGE, ToyAbi, ToyFile
from kvmpriv import ClosedError, Kvm, private, uapi
from kvmpriv.exits import ExitReason, HypercallExit, MemoryFaultExit
from kvmpriv.guest import Puppet
from kvmpriv.private import PrivateSlot, PrivateVm
from private.support.leaks import open_fds
from private.support.requirements import missing

GPA, SIZE = 4 << 30, 16 * PAGE

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture
def toy(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> ToyAbi:
    monkeypatch.setattr(private, "ABIS", dict(private.ABIS))
    abi = ToyAbi()
    private.register(abi)
    with kvm.create_vm() as vm:
        offered = vm.check_extension(uapi.guest_memfd.KVM_CAP_GUEST_MEMFD_FLAGS)
    if offered & FLAGS != FLAGS:
        missing("guest-memfd-flags", "KVM_CAP_GUEST_MEMFD_FLAGS lacks MMAP or INIT_SHARED")
    return abi


@pytest.fixture
def vm(kvm: Kvm, toy: ToyAbi) -> Iterator[PrivateVm]:
    with private.create_vm(kvm, "toy") as made:
        yield made


@pytest.fixture
def slot(vm: PrivateVm) -> PrivateSlot:
    return vm.add_private_memory(GPA, SIZE)


def file_of(slot: PrivateSlot) -> ToyFile:
    assert isinstance(slot.file, ToyFile)
    return slot.file


def test_it_is_found_by_name(kvm: Kvm, toy: ToyAbi) -> None:
    assert private.choose(kvm, "toy") is toy
    assert list(private.ABIS)[-1] == "toy"
    with pytest.raises(ValueError, match="already called 'toy': <ToyAbi toy>"):
        private.register(ToyAbi())


def test_guest_and_host_share_the_one_backing(vm: PrivateVm, slot: PrivateSlot) -> None:
    assert slot.memory is not None
    with Puppet(vm) as guest:
        guest.write(GPA, b"from the guest")
        assert slot.memory.read(0, 14) == b"from the guest"
        slot.convert(private=False)
        slot.convert(private=True)
        assert guest.read(GPA, 14) == b"from the guest", "nothing was freed: there is no other side"
        slot.punch_hole()
        assert guest.span(GPA, 0, SIZE) == SIZE
        slot.allocate(GPA, PAGE)


def test_conversions_reach_the_file(vm: PrivateVm, slot: PrivateSlot) -> None:
    file = file_of(slot)
    assert file.private == set(range(0, SIZE, PAGE)), "add_private_memory converts it"
    slot.convert(GPA + PAGE, 2 * PAGE, private=False)
    assert file.private == {0, *range(3 * PAGE, SIZE, PAGE)}
    vm.abi.convert(vm, GPA + 2 * PAGE, PAGE, private=True)
    assert file.private == {0, *range(2 * PAGE, SIZE, PAGE)}


def test_a_conversion_that_stops_part_way(vm: PrivateVm, slot: PrivateSlot) -> None:
    """A range of two slots, of which the second begins at another offset of its file."""
    with vm.abi.create_file(vm, 4 * SIZE) as file:
        second = vm.add_private_memory(GPA + SIZE, SIZE, file=file, offset=2 * SIZE)
    other = file_of(second)
    other.pinned.add(2 * SIZE + 3 * PAGE)
    with pytest.raises(private.ConversionError, match="is in use") as stopped:
        vm.abi.convert(vm, GPA + PAGE, 2 * SIZE - PAGE, private=False)
    error = stopped.value
    assert (error.errno, error.offset) == (errno.EAGAIN, 2 * SIZE + 3 * PAGE)
    assert error.gpa == GPA + SIZE + 3 * PAGE
    assert error.converted == SIZE - PAGE, "the first slot's part"
    assert file_of(slot).private == {0}
    assert len(other.private) == SIZE // PAGE, "the second is as it was"
    other.pinned.clear()
    vm.abi.convert(vm, GPA + PAGE, 2 * SIZE - PAGE, private=False)
    assert not other.private


def test_a_range_without_slots(vm: PrivateVm, slot: PrivateSlot) -> None:
    for gpa, size, wrong in (
        (GPA - PAGE, 2 * PAGE, errno.ENOENT),
        (GPA, SIZE + PAGE, errno.ENOENT),
        (0, PAGE, errno.ENOENT),
        (GPA, 0, errno.EINVAL),
    ):
        with pytest.raises(OSError, match="not covered by private slots") as refused:
            vm.abi.convert(vm, gpa, size, private=False)
        assert refused.value.errno == wrong
    assert len(file_of(slot).private) == SIZE // PAGE


def test_the_guest_asks(vm: PrivateVm, slot: PrivateSlot) -> None:
    """By hypercall and by fault; the exits are simulated: default VMs have no private memory."""
    file = file_of(slot)
    with vm.create_vcpu() as vcpu:

        def hypercall(attributes: int) -> int:
            args = (GPA + PAGE, 2, attributes, 0, 0, 0)
            number = uapi.kvm.KVM_HC_MAP_GPA_RANGE
            exit_ = HypercallExit(ExitReason.HYPERCALL, number, args, longmode=True)
            assert private.serve_conversion(vm, vcpu, exit_)
            return int(vcpu.kvm_run.hypercall.ret)

        assert hypercall(uapi.kvm.KVM_MAP_GPA_RANGE_DECRYPTED) == 0
        assert {PAGE, 2 * PAGE}.isdisjoint(file.private)
        file.pinned.add(2 * PAGE)
        assert hypercall(uapi.kvm.KVM_MAP_GPA_RANGE_ENCRYPTED) == (1 << 64) - errno.EAGAIN
        fault = MemoryFaultExit(ExitReason(39), GPA + 2 * PAGE, PAGE, True, 8, errno.EFAULT, "toy")
        served = 0
        while private.serve_conversion(vm, vcpu, fault):
            served += 1
        assert 1 < served < 20, "tried again while the page was in use, but not for ever"
        file.pinned.clear()
        vm.abi.convert(vm, GPA, PAGE, private=False)
        assert private.serve_conversion(vm, vcpu, fault)
        assert 2 * PAGE in file.private


def test_exits_are_decoded_by_the_vms_own_abi(kvm: Kvm, vm: PrivateVm) -> None:
    """VMs of two ABIs and one without any share an exit reason."""
    other = private.GuestMemfdAbi("other", vm_type=0)
    with other.create_vm(kvm) as beside, kvm.create_vm() as plain:
        for one, name in ((vm, "toy"), (beside, "other"), (plain, "guest_memfd")):
            with one.create_vcpu() as vcpu:
                vcpu.kvm_run.exit_reason = uapi.guest_memfd.KVM_EXIT_MEMORY_FAULT
                exit_ = vcpu.exit()
                assert isinstance(exit_, MemoryFaultExit)
                assert exit_.abi == name


def test_a_slot_owns_what_was_made_for_it(vm: PrivateVm) -> None:
    before = len(open_fds())
    slot = vm.add_private_memory(GPA, SIZE)
    assert len(open_fds()) == before + 2, "the file, and a duplicate that Python's mmap makes"
    assert slot.memory is not None
    slot.memory.write(0, b"usable")
    slot.delete()
    assert len(open_fds()) == before
    assert slot.file.closed
    assert slot.memory.closed
    with pytest.raises(ClosedError, match="is deleted"):
        slot.allocate()
    with pytest.raises(ClosedError, match="is deleted"):
        slot.punch_hole()
    with pytest.raises(ClosedError, match="is deleted"):
        slot.convert(private=True)


def test_nothing_is_left_of_what_is_refused(vm: PrivateVm, slot: PrivateSlot) -> None:
    before = len(open_fds())
    with pytest.raises(OSError, match="overlaps") as refused:
        vm.add_private_memory(GPA, SIZE)
    assert refused.value.errno == errno.EEXIST
    with vm.abi.create_file(vm, SIZE) as file:
        assert isinstance(file, ToyFile)
        file.pinned.add(0)
        with pytest.raises(private.ConversionError):
            vm.add_private_memory(2 * GPA, SIZE, file=file)
        assert not file.closed, "it is the caller's"
    assert len(open_fds()) == before
    assert list(vm.slots.values()) == [slot]


def test_a_vm_of_another_abi(kvm: Kvm, toy: ToyAbi, vm: PrivateVm) -> None:
    another = ToyAbi("another")
    with vm.abi.create_file(vm, SIZE) as file, pytest.raises(ValueError, match="was made for"):
        another.bind(vm, GPA, SIZE, file)
