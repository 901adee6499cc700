"""Private memory by the ABI that the kernel supports: the common interface, and a guest's view.

What the kernel itself promises is tested in tests/private.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

import pytest

from kvmpriv import HostMemory, Kvm, private, uapi
from kvmpriv.exits import ExitReason, HypercallExit, MemoryFaultExit, MmioExit
from kvmpriv.guest.puppet import GuestExit, Puppet
from kvmpriv.private import PrivateAbi, PrivateFile, PrivateSlot, PrivateVm
from private.support.requirements import missing

PAGE, MIB = 4096, 1 << 20
GPA, OFFSET, SIZE = 4 << 30, 3 * MIB, 4 * MIB
README = Path(private.__file__).with_name("README.md")
HOOK = Path("/sys/module/kvm/parameters/private_mem_testing")

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture
def any_abi(kvm: Kvm) -> PrivateAbi:
    try:
        return private.choose(kvm)
    except OSError as error:
        missing("private-memory", str(error.strerror))


@pytest.fixture
def abi(any_abi: PrivateAbi) -> PrivateAbi:
    """An ABI by which the shared memory of a slot is another than the file's."""
    if any_abi.traits.backings == 1:  # tests/private/test_in_place_guests.py has that one's tests
        missing("two-backings", f"{any_abi.name} has one page for both states")
    return any_abi


@pytest.fixture
def vm(kvm: Kvm, abi: PrivateAbi) -> Iterator[PrivateVm]:
    with abi.create_vm(kvm) as made:
        yield made


@pytest.fixture
def file(abi: PrivateAbi, vm: PrivateVm) -> Iterator[PrivateFile]:
    with abi.create_file(vm, OFFSET + SIZE) as made:
        yield made


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    with HostMemory(MIB + SIZE) as made:
        yield made


@pytest.fixture
def slot(abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, memory: HostMemory) -> PrivateSlot:
    """A slot whose pages are all private."""
    made = abi.bind(vm, GPA, SIZE, file, OFFSET, memory=memory, memory_offset=MIB)
    abi.convert(vm, GPA, SIZE, private=True)
    return made


@pytest.fixture
def guest(abi: PrivateAbi, vm: PrivateVm, slot: PrivateSlot) -> Iterator[Puppet]:
    with Puppet(vm, cpus=2) as made:
        yield made


def resident(memory: HostMemory) -> int:
    """How many bytes of the mapping are populated: bit 63 of each entry of /proc/self/pagemap."""
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(memory.userspace_addr // PAGE * 8)
        entries = pagemap.read(memory.size // PAGE * 8)
    return sum(high >> 7 for high in entries[7::8]) * PAGE


def bound_again(vm: PrivateVm, gpa: int, file: PrivateFile, offset: int) -> bool:
    """Bind a page of the file a second time, here or in another VM; False if the ABI refuses."""
    try:
        vm.abi.bind(vm, gpa, PAGE, file, offset)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EEXIST):
            raise
        return False
    return True


def has_fd(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


# -- choosing --------------------------------------------------------------------------------------


def test_choose(kvm: Kvm, abi: PrivateAbi) -> None:
    assert private.choose(kvm, abi.name) is abi
    assert private.ABIS[abi.name] is abi
    before = list(private.ABIS)[: list(private.ABIS).index(abi.name)]
    for refused in before:
        with pytest.raises(OSError, match=f"^.Errno 95. no private memory here: {refused}: "):
            private.choose(kvm, refused)
    with private.create_vm(kvm) as vm, private.create_vm(kvm, abi.name) as other:
        assert vm.abi is other.abi is abi


def test_the_order_of_trial(kvm: Kvm, abi: PrivateAbi, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(private.GuestMemfdAbi):
        def create_vm(self, kvm: Kvm) -> PrivateVm:
            raise OSError(errno.ENXIO, f"{self.name} does not work anywhere")

    never, again = Never("never"), copy(abi)
    again.name = "again"
    monkeypatch.setattr(private, "ABIS", {"never": never, "again": again, abi.name: abi})
    assert private.choose(kvm) is again
    with pytest.raises(OSError, match=r"here: never: never does not work anywhere$") as refused:
        private.choose(kvm, "never")
    assert refused.value.errno == errno.EOPNOTSUPP


def test_choose_an_unknown_abi(kvm: Kvm) -> None:
    with pytest.raises(ValueError, match="'sev': known are restrictedmem, guest_memfd"):
        private.choose(kvm, "sev")


def test_choose_where_there_is_none(kvm: Kvm) -> None:
    """The message has the reason of each ABI."""
    try:
        abi = private.choose(kvm)
    except OSError as error:
        refused = error
    else:
        if not os.access(HOOK, os.W_OK):
            missing("no-private-memory", f"no way to take {abi.name} away from this kernel")
        HOOK.write_text("N")
        try:
            with pytest.raises(OSError, match=r"KVM_SET_USER_MEMORY_REGION.*Invalid") as caught:
                private.choose(kvm)
        finally:
            HOOK.write_text("Y")
        refused = caught.value
    assert refused.errno == errno.EOPNOTSUPP
    for name in private.ABIS:
        assert f"{name}: " in str(refused.strerror)


@pytest.mark.usefixtures("any_abi")
def test_the_readmes_example() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, str(README), "exec"), {})


# -- binding ---------------------------------------------------------------------------------------


def test_a_slot_keeps_what_it_uses(
    abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, memory: HostMemory, slot: PrivateSlot
) -> None:
    fd = file.fileno()
    view = memory.view()
    with Puppet(vm) as guest:
        guest.write(GPA, b"before")
        file.close()
        memory.close()
        assert has_fd(fd)
        assert guest.read(GPA, 6) == b"before"
        slot.punch_hole(GPA, PAGE)
        slot.allocate(GPA + PAGE, PAGE)
        assert guest.span(GPA, 0, 2 * PAGE) == 2 * PAGE
        guest.convert(GPA, PAGE, private=False)
        guest.write(GPA, b"after")
        assert bytes(view[MIB : MIB + 5]) == b"after"
        guest.convert(GPA, PAGE, private=True)
        assert bytes(view[MIB : MIB + 5]) == bytes(5), "the slot frees its shared pages, too"
        abi.convert(vm, GPA, PAGE, private=False)
        assert guest.read(GPA, 5) == bytes(5)
    view.release()
    with pytest.raises(ValueError, match="closed"):
        file.punch_hole(0, PAGE)
    slot.delete()
    assert not has_fd(fd)
    with pytest.raises(ValueError, match="closed"):
        abi.bind(vm, GPA, SIZE, file, OFFSET)


def test_what_a_refused_slot_would_have_used_is_not_kept(
    abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, slot: PrivateSlot
) -> None:
    with abi.create_file(vm, SIZE) as another, HostMemory(SIZE) as memory:
        fd = another.fileno()
        with pytest.raises(OSError, match="overlaps") as refused:
            abi.bind(vm, GPA + SIZE - PAGE, SIZE, another, memory=memory)
        assert refused.value.errno == errno.EEXIST
        beside = abi.bind(vm, GPA + SIZE, SIZE, another, memory=memory)
        beside.delete()
    assert not has_fd(fd)
    assert list(vm.slots.values()) == [slot]


def test_slot_numbers(abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, slot: PrivateSlot) -> None:
    assert slot.slot == 0
    second = abi.bind(vm, 0, PAGE, file)
    assert abi.bind(vm, PAGE, PAGE, file, PAGE, slot=7).slot == 7
    assert second.slot == 1


@pytest.mark.parametrize(("offset", "fits"), [(MIB, True), (MIB + PAGE, False), (-PAGE, False)])
def test_shared_memory_that_is_too_small(
    abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, memory: HostMemory, offset: int, fits: bool
) -> None:
    if fits:
        abi.bind(vm, GPA, SIZE, file, OFFSET, memory=memory, memory_offset=offset)
        return
    with pytest.raises(ValueError, match="not inside <HostMemory"):
        abi.bind(vm, GPA, SIZE, file, OFFSET, memory=memory, memory_offset=offset)
    assert not vm.slots


@pytest.mark.parametrize(
    ("gpa", "size"), [(GPA - PAGE, PAGE), (GPA + SIZE, PAGE), (GPA, SIZE + PAGE), (GPA, 0)]
)
def test_ranges_outside_a_slot(slot: PrivateSlot, gpa: int, size: int) -> None:
    for act in (slot.allocate, slot.punch_hole):
        with pytest.raises(ValueError, match="not inside <Slot 0"):
            act(gpa, size)
    slot.allocate(GPA + SIZE - PAGE, PAGE)


# -- converting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_guest", [True, False], ids=["guest asks", "host does"])
def test_a_conversion_frees_the_other_backing(
    abi: PrivateAbi, vm: PrivateVm, guest: Puppet, memory: HostMemory, by_guest: bool
) -> None:
    def convert(gpa: int, size: int, *, private: bool) -> None:
        if by_guest:
            guest.convert(gpa, size, private=private)
        else:
            abi.convert(vm, gpa, size, private=private)

    middle = GPA + MIB
    guest.fill(GPA, 0x11, SIZE)
    assert resident(memory) == 0
    convert(middle, MIB, private=False)
    guest.fill(middle, 0x22, MIB)
    assert memory.read(2 * MIB, MIB) == b"\x22" * MIB
    assert resident(memory) == MIB
    convert(middle + PAGE, PAGE, private=True)
    assert resident(memory) == MIB - PAGE
    assert guest.span(middle + PAGE, 0, PAGE) == PAGE, "what was private there is gone"
    convert(middle, MIB, private=True)
    assert resident(memory) == 0
    assert guest.span(middle, 0, MIB) == MIB
    assert guest.span(GPA, 0x11, MIB) == MIB, "what is beside has been left alone"
    assert guest.span(middle + MIB, 0x11, 2 * MIB) == 2 * MIB
    convert(middle, MIB, private=False)
    assert memory.read(2 * MIB, MIB) == guest.read(middle, MIB) == bytes(MIB)
    kinds = [type(exit_) for exit_ in guest.exits]
    assert kinds == ([HypercallExit] * 4 if by_guest else [])


def test_keep(abi: PrivateAbi, vm: PrivateVm, guest: Puppet, memory: HostMemory) -> None:
    guest.write(GPA, b"private")
    abi.convert(vm, GPA, PAGE, private=False, keep=True)
    guest.write(GPA, b"shared!")
    abi.convert(vm, GPA, PAGE, private=True, keep=True)
    assert guest.read(GPA, 7) == b"private"
    assert memory.read(MIB, 7) == b"shared!"


def test_a_refused_conversion_frees_nothing(abi: PrivateAbi, vm: PrivateVm, guest: Puppet) -> None:
    guest.fill(GPA, 0x11, 2 * PAGE)
    for gpa, size in ((GPA + 1, PAGE), (GPA, PAGE + 1), (GPA, 0)):
        with pytest.raises(OSError, match="Invalid argument") as refused:
            abi.convert(vm, gpa, size, private=False)
        assert refused.value.errno == errno.EINVAL
    assert guest.span(GPA, 0x11, 2 * PAGE) == 2 * PAGE
    abi.convert(vm, GPA, PAGE, private=False)
    assert guest.span(GPA, 0, PAGE) == PAGE


def test_conversion_across_slots_and_gaps(
    abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, guest: Puppet
) -> None:
    with HostMemory(2 * PAGE) as memory:
        far = GPA + SIZE + PAGE
        abi.bind(vm, far, 2 * PAGE, file, PAGE, memory=memory)
        abi.convert(vm, far, 2 * PAGE, private=True)
        guest.fill(GPA + SIZE - PAGE, 0x11, PAGE)
        guest.fill(far, 0x22, 2 * PAGE)
        abi.convert(vm, GPA + SIZE - PAGE, 3 * PAGE, private=False)
        abi.convert(vm, GPA + SIZE - PAGE, 3 * PAGE, private=True)
        assert guest.span(GPA + SIZE - PAGE, 0, PAGE) == PAGE
        assert guest.span(far, 0, PAGE) == PAGE
        assert guest.span(far + PAGE, 0x22, PAGE) == PAGE


def test_what_another_slot_uses_is_not_freed(
    abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, memory: HostMemory, guest: Puppet
) -> None:
    """Two slots use the same memory, one without a file; if allowed, also the same pages."""
    vm.map(memory, 0, slot=8)
    memory.write(MIB, b"\x33" * 2 * PAGE)
    abi.convert(vm, GPA, PAGE, private=True)
    assert guest.read(MIB, 2 * PAGE) == b"\x33" * 2 * PAGE, "the plain slot has it still"
    if bound_again(vm, 8 << 30, file, OFFSET + PAGE):
        guest.fill(GPA, 0x44, 3 * PAGE)
        abi.convert(vm, GPA, 3 * PAGE, private=False)
        assert guest.span(8 << 30, 0x44, PAGE) == PAGE, "the other private slot has it still"
        abi.convert(vm, GPA, 3 * PAGE, private=True)
        assert guest.span(GPA, 0, PAGE) == PAGE
        assert guest.span(GPA + PAGE, 0x44, PAGE) == PAGE
        assert guest.span(GPA + 2 * PAGE, 0, PAGE) == PAGE


def test_what_no_other_slot_uses_is_freed(
    abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, memory: HostMemory, guest: Puppet
) -> None:
    """Other slots use other parts of the memory; if allowed, one the same pages, converted too."""
    vm.map(memory, 0, size=MIB, slot=8)
    vm.map(memory, MIB, offset=MIB + 2 * PAGE, slot=9)
    memory.write(0, b"\x33" * memory.size)
    abi.convert(vm, GPA, 3 * PAGE, private=True)
    assert memory.read(MIB, 3 * PAGE) == bytes(2 * PAGE) + b"\x33" * PAGE
    assert memory.find(b"\0") == MIB
    if bound_again(vm, GPA + SIZE, file, OFFSET):
        guest.fill(GPA, 0x44, 2 * PAGE)
        abi.convert(vm, GPA, SIZE + PAGE, private=False)
        abi.convert(vm, GPA, SIZE + PAGE, private=True)
        assert guest.span(GPA, 0, 2 * PAGE) == 2 * PAGE
        assert guest.span(GPA + SIZE, 0, PAGE) == PAGE


def test_what_another_vm_uses_is_not_freed(
    kvm: Kvm, abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, memory: HostMemory, guest: Puppet
) -> None:
    """Two VMs use one memory, and if allowed one file, until the other VM's vCPUs are closed."""
    guest.fill(GPA, 0x44, PAGE)
    memory.write(MIB + PAGE, b"\x33" * PAGE)
    other = abi.create_vm(kvm)
    with Puppet(other) as beside:
        other.map(memory, MIB, offset=MIB, size=2 * PAGE)
        file_too = bound_again(other, 4 * GPA, file, OFFSET)
        other.close()
        abi.convert(vm, GPA + PAGE, PAGE, private=True)
        assert beside.span(MIB + PAGE, 0x33, PAGE) == PAGE
        if file_too:
            abi.convert(vm, GPA, PAGE, private=False)
            assert beside.span(4 * GPA, 0x44, PAGE) == PAGE
            abi.convert(vm, GPA, PAGE, private=True)
            assert guest.span(GPA, 0x44, PAGE) == PAGE
    assert memory.read(MIB + PAGE, PAGE) == b"\x33" * PAGE
    abi.convert(vm, GPA + PAGE, PAGE, private=True)
    assert memory.read(MIB + PAGE, PAGE) == bytes(PAGE)
    abi.convert(vm, GPA, PAGE, private=False)
    abi.convert(vm, GPA, PAGE, private=True)
    assert guest.span(GPA, 0, PAGE) == PAGE


def test_what_can_not_be_freed(
    abi: PrivateAbi, vm: PrivateVm, file: PrivateFile, memory: HostMemory, guest: Puppet
) -> None:
    """The error names the range, the rest is freed, and the guest's hypercall returns 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    at, page = ctypes.c_void_p(memory.userspace_addr + MIB), ctypes.c_size_t(PAGE)

    def refill() -> None:
        abi.convert(vm, GPA, SIZE + PAGE, private=False, keep=True)
        guest.write(GPA, b"shared")
        guest.write(GPA + SIZE, b"other")

    with HostMemory(PAGE) as unlocked:
        abi.bind(vm, GPA + SIZE, PAGE, file, memory=unlocked)
        refill()
        assert libc.mlock(at, page) == 0
        said = f"{GPA:#x}…{GPA + SIZE + PAGE:#x} is private now, but not all of its old pages"
        with pytest.raises(private.NotFreedError, match=f"^.Errno 22. {said}") as kept:
            abi.convert(vm, GPA, SIZE + PAGE, private=True)
        assert kept.value.errno == errno.EINVAL
        assert guest.span(GPA, 0, 6) == guest.span(GPA + SIZE, 0, 5) + 1 == 6, "private"
        assert memory.read(MIB, 6) == b"shared"
        assert unlocked.read(0, 5) == bytes(5)

        refill()
        with pytest.warns(RuntimeWarning, match=f"^{said}"):
            guest.convert(GPA, SIZE + PAGE, private=True)
        assert memory.read(MIB, 6) == b"shared"
        assert unlocked.read(0, 5) == bytes(5)

        refill()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning, match=f"^{said}"):
                guest.convert(GPA, SIZE + PAGE, private=True)
            assert guest.resume() is None, "the guest has its answer"

        assert libc.munlock(at, page) == 0
        abi.convert(vm, GPA, SIZE + PAGE, private=True)
        assert memory.read(MIB, 6) == bytes(6), "said once more, it is done"


def test_a_guest_can_not_convert_what_is_not_private_capable(guest: Puppet, vm: PrivateVm) -> None:
    with HostMemory(PAGE) as memory:
        vm.map(memory, GPA + SIZE)
        for gpa, size in (
            (GPA - PAGE, 2 * PAGE),
            (GPA + SIZE - PAGE, 2 * PAGE),
            (GPA + SIZE, PAGE),
            (GPA + 1, PAGE),
            (GPA, 0),
            (GPA, 1 << 50),
        ):
            with pytest.raises(OSError, match=r"KVM_HC_MAP_GPA_RANGE.*Invalid") as refused:
                guest.convert(gpa, size, private=False)
            assert refused.value.errno == errno.EINVAL
        guest.convert(GPA + SIZE - PAGE, PAGE, private=False)
    with pytest.raises(ValueError, match="size must be a multiple of 4096"):
        guest.convert(GPA, PAGE + 1, private=False)


def test_hypercalls_that_are_not_served(guest: Puppet, vm: PrivateVm) -> None:
    vm.enable_cap(uapi.kvm.KVM_CAP_EXIT_HYPERCALL, 0)
    with pytest.raises(OSError, match="KVM_HC_MAP_GPA_RANGE") as refused:
        guest.convert(GPA, PAGE, private=False)
    assert refused.value.errno == errno.ENOSYS
    vm.enable_cap(uapi.kvm.KVM_CAP_EXIT_HYPERCALL, 1 << uapi.kvm.KVM_HC_MAP_GPA_RANGE)
    guest.convert(GPA, PAGE, private=False)
    guest.serve = None
    with pytest.raises(GuestExit) as stopped:
        guest.convert(GPA, PAGE, private=False)
    assert isinstance(stopped.value.exit, HypercallExit)
    assert stopped.value.exit.nr == uapi.kvm.KVM_HC_MAP_GPA_RANGE


def test_a_puppet_that_serves_no_conversions(
    abi: PrivateAbi, vm: PrivateVm, slot: PrivateSlot
) -> None:
    with Puppet(vm, serve_conversions=False) as guest:
        guest.write(GPA, b"usable all the same")
        with pytest.raises(ValueError, match="does not serve conversions"):
            guest.convert(GPA, PAGE, private=False)


@pytest.mark.parametrize("implicit", [True, False])
def test_implicit_conversion(
    abi: PrivateAbi, vm: PrivateVm, slot: PrivateSlot, implicit: bool
) -> None:
    """With v9's test vehicle a guest can choose to access a page as the other kind."""
    if abi.traits.access_follows_state:
        missing("implicit-conversion", f"accesses of guests follow the state ({abi.name})")
    want_shared = uapi.restrictedmem.KVM_MAP_GPA_RANGE_WANT_SHARED
    with Puppet(vm, implicit=implicit) as guest:
        assert guest.hypercall(uapi.kvm.KVM_HC_MAP_GPA_RANGE, GPA, 1, want_shared) == 0
        if implicit:
            guest.write(GPA, b"shared")
            assert slot.memory is not None
            assert slot.memory.read(MIB, 6) == b"shared"
            (fault,) = guest.exits
        else:
            with pytest.raises(GuestExit) as stopped:
                guest.write(GPA, b"shared")
            fault = stopped.value.exit
        assert isinstance(fault, MemoryFaultExit)
        assert (fault.gpa, fault.size, fault.private) == (GPA, PAGE, False)


def test_a_fault_that_no_conversion_helps(
    abi: PrivateAbi, vm: PrivateVm, file: PrivateFile
) -> None:
    """A write to private memory of a read-only slot ends as an exit; it is not served for ever."""
    try:
        abi.bind(vm, GPA, SIZE, file, OFFSET, flags=uapi.kvm.KVM_MEM_READONLY)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        missing("read-only-private-slots", str(error.strerror))
    with Puppet(vm, implicit=True) as guest:
        assert guest.load(GPA, 8) == 0
        with pytest.raises(GuestExit) as stopped:
            guest.store(GPA, 8, 1)
        fault = stopped.value.exit
        assert isinstance(fault, MemoryFaultExit)
        assert (fault.gpa, fault.private) == (GPA, True)
        assert 1 < len(guest.exits) < 20


def test_faults_outside_the_slots_are_not_served(abi: PrivateAbi, vm: PrivateVm) -> None:
    with vm.create_vcpu(9) as vcpu:
        fault = MemoryFaultExit(ExitReason(39), 0, PAGE, True, flags=8, errno=14, abi=abi.name)
        assert private.serve_conversion(vm, vcpu, fault) is False
        abi.bind(vm, 0, PAGE, made := abi.create_file(vm, PAGE))
        made.close()
        assert private.serve_conversion(vm, vcpu, fault) is True


def test_a_fault_that_comes_back(
    abi: PrivateAbi, vm: PrivateVm, guest: Puppet, slot: PrivateSlot
) -> None:
    """The file's descriptor is closed by its number: its pages can't be mapped any more."""
    guest.write(GPA, b"here")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, slot.file.fileno(), inheritable=False)
    os.close(null)
    try:
        assert guest.read(GPA, 4) == b"here"
    except GuestExit as stopped:
        fault = stopped.exit
    else:
        missing("guest-memfd-lifetime", f"a slot keeps its file ({abi.name})")
    assert isinstance(fault, MemoryFaultExit)
    assert (fault.gpa, fault.private, fault.errno) == (GPA, True, errno.EFAULT)
    assert 1 < len(guest.exits) < 20
    abi.convert(vm, GPA, PAGE, private=False, keep=True)
    assert guest.resume() == bytes(4)


def test_memory_where_there_was_none(abi: PrivateAbi, vm: PrivateVm, file: PrivateFile) -> None:
    """KVM caches that a gfn has no slot; a guest must be able to use a slot that is made later."""
    with Puppet(vm) as guest:
        with pytest.raises(GuestExit) as stopped:
            guest.load(GPA, 1)
        assert isinstance(stopped.value.exit, MmioExit)
        guest.vcpu.kvm_run.mmio.data[0] = 0x77
        assert guest.resume() == 0x77
        abi.convert(vm, GPA, SIZE, private=True)
        slot = abi.bind(vm, GPA, SIZE, file, OFFSET)
        guest.store(GPA, 1, 0x11)
        assert guest.span(GPA, 0x11, 1) == 1
        slot.delete()


def test_populate(abi: PrivateAbi, guest: Puppet) -> None:
    vcpu = guest.vcpu
    guest.write(GPA + PAGE, b"here already")
    try:
        abi.populate(vcpu, GPA, SIZE)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP or f"{abi.name} can't map pages" not in str(error):
            raise
        return
    assert guest.read(GPA + PAGE, 12) == b"here already"
    with pytest.raises(OSError, match="KVM_PRE_FAULT_MEMORY") as refused:
        abi.populate(vcpu, GPA + SIZE, PAGE)
    assert refused.value.errno == errno.ENOENT


def test_two_vcpus_convert_the_same_range(
    abi: PrivateAbi, guest: Puppet, memory: HostMemory
) -> None:
    """In turn: afterwards each page is in one backing only, and usable."""
    rounds = 30

    def drive(number: int) -> None:
        for turn in range(rounds):
            guest.cpus[number].convert(GPA, 16 * PAGE, private=bool((turn + number) % 2))
            guest.cpus[number].touch(GPA, PAGE, 16, byte=number)

    with ThreadPoolExecutor(2) as pool:
        for driven in [pool.submit(drive, number) for number in range(2)]:
            driven.result(60)
    for cpu in guest.cpus:
        assert sum(isinstance(one, HypercallExit) for one in cpu.exits) == rounds
    guest.convert(GPA, 16 * PAGE, private=False)
    guest.fill(GPA, 0x55, 16 * PAGE)
    assert memory.read(MIB, 16 * PAGE) == b"\x55" * 16 * PAGE
    guest.convert(GPA, 16 * PAGE, private=True)
    assert guest.span(GPA, 0, 16 * PAGE) == 16 * PAGE
    assert resident(memory) == 0
