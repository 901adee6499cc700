"""The base class of the ABIs, tested without a kernel: an ABI that records its calls."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from kvmpriv import ArgumentError, HostMemory, Kvm, private, uapi
from kvmpriv.faults import FAULT_LAYOUTS, layout_of, register_fault_layout
from kvmpriv.private import PrivateFile, PrivateSlot, PrivateVm, Traits

PAGE = 4096
BASE = 1 << 30


class NotedFile(PrivateFile):
    _what = "noted file"


class NotedAbi(private.PrivateAbi):
    """Records what it would ask of a kernel; its slots exist in Python only."""

    slot_flag = 4

    def __init__(self, name: str, traits: Traits) -> None:
        self.name, self.traits = name, traits
        self.fault_layout = private.ABIS["guest_memfd"].fault_layout._replace(abi=name)
        self.converted: list[tuple[object, int, int, bool]] = []
        self.stops_at: int | None = None
        self.refuses: list[int] = []

    def make_vm(self) -> PrivateVm:
        return PrivateVm(self, os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), PAGE)

    def create_file(self, vm: PrivateVm, size: int) -> NotedFile:
        return NotedFile(os.memfd_create(self.name, os.MFD_CLOEXEC))

    def set_slot(self, slot: PrivateSlot) -> None:
        for thing in slot.held:
            thing.hold()
        slot.vm.slots[slot.slot] = slot

    def convert_vm(self, vm: PrivateVm, gpa: int, size: int, *, private: bool) -> None:
        self.converted.append((vm, gpa, size, private))

    def convert_file(self, file: PrivateFile, offset: int, size: int, *, private: bool) -> None:
        if self.refuses:
            raise OSError(self.refuses.pop(), "refused")
        if self.stops_at is not None and offset <= self.stops_at < offset + size:
            raise ConversionError(errno.EAGAIN, "in use", offset=self.stops_at, converted=PAGE)
        self.converted.append((file, offset, size, private))


ConversionError = private.ConversionError
VM_TRAITS = Traits(default_private=True, access_follows_state=False, backings=2, converts="vm")
FILE_TRAITS = VM_TRAITS._replace(backings=1, converts="file")


@pytest.fixture
def by_vm() -> Iterator[PrivateVm]:
    with NotedAbi("by-vm", VM_TRAITS).make_vm() as vm:
        yield vm


@pytest.fixture
def by_file() -> Iterator[PrivateVm]:
    with NotedAbi("by-file", FILE_TRAITS).make_vm() as vm:
        yield vm


def noted(vm: PrivateVm) -> list[tuple[object, int, int, bool]]:
    assert isinstance(vm.abi, NotedAbi)
    return vm.abi.converted


def bind(vm: PrivateVm, gpa: int, pages: int, slot: int, offset: int = 0) -> PrivateSlot:
    with vm.abi.create_file(vm, 0) as file:
        return vm.abi.bind(vm, gpa, pages * PAGE, file, offset, slot=slot)


def test_a_slot_of_size_0_is_refused(by_vm: PrivateVm) -> None:
    """For the kernel it would be an order to delete the slot of that number."""
    slot = bind(by_vm, BASE, 1, 7)
    for pages in (0, -1):
        with pytest.raises(ArgumentError, match=r"memory_size must be above 0, not -?0x"):
            bind(by_vm, BASE, pages, 7)
    assert by_vm.slots == {7: slot}


def test_the_vm_is_converted_with_or_without_slots(by_vm: PrivateVm) -> None:
    by_vm.abi.convert(by_vm, BASE, PAGE, private=True)
    slot = bind(by_vm, BASE, 4, 0)
    slot.convert(private=False, keep=True)
    slot.convert(BASE + PAGE, private=True, keep=True)
    slot.convert(BASE + PAGE, PAGE, private=False, keep=True)
    assert noted(by_vm) == [
        (by_vm, BASE, PAGE, True),
        (by_vm, BASE, 4 * PAGE, False),
        (by_vm, BASE + PAGE, 3 * PAGE, True),
        (by_vm, BASE + PAGE, PAGE, False),
    ]
    assert by_vm.conversions == 4


def test_memory_for_the_shared_pages(by_vm: PrivateVm, by_file: PrivateVm) -> None:
    """Anonymous where a page has two backings, else the file's own pages."""
    for vm, byte in ((by_vm, b"\0"), (by_file, b"x")):
        with vm.abi.create_file(vm, 2 * PAGE) as file:
            os.pwrite(file.fileno(), b"x" * 2 * PAGE, 0)
            with vm.abi.create_memory(file, PAGE, PAGE) as memory:
                assert (memory.size, memory.read(0, 1)) == (PAGE, byte)


def test_files_are_converted_slot_by_slot(by_file: PrivateVm) -> None:
    first, second = bind(by_file, BASE, 2, 0), bind(by_file, BASE + 2 * PAGE, 2, 1, 8 * PAGE)
    by_file.abi.convert(by_file, BASE + PAGE, 2 * PAGE, private=True)
    assert noted(by_file) == [
        (first.file, PAGE, PAGE, True),
        (second.file, 8 * PAGE, PAGE, True),
    ]


def test_how_far_a_conversion_came(by_file: PrivateVm) -> None:
    """The slots before, and the part that the ABI reports for the file in which it stopped."""
    bind(by_file, BASE, 2, 0), bind(by_file, BASE + 2 * PAGE, 4, 1, 8 * PAGE)
    assert isinstance(by_file.abi, NotedAbi)
    by_file.abi.stops_at = 9 * PAGE
    with pytest.raises(ConversionError) as stopped:
        by_file.abi.convert(by_file, BASE, 6 * PAGE, private=True)
    assert stopped.value.gpa == BASE + 3 * PAGE
    assert (stopped.value.offset, stopped.value.converted) == (9 * PAGE, 3 * PAGE)


def test_a_refusal_after_a_part_is_reported_as_a_part(by_file: PrivateVm) -> None:
    """In the first slot it is the kernel's own error: nothing is converted."""
    bind(by_file, BASE, 2, 0), bind(by_file, BASE + 2 * PAGE, 4, 1, 8 * PAGE)
    abi = by_file.abi
    assert isinstance(abi, NotedAbi)
    abi.refuses = [errno.EPERM]
    with pytest.raises(PermissionError) as refused:
        abi.convert(by_file, BASE, 6 * PAGE, private=True)
    assert not isinstance(refused.value, ConversionError)
    assert by_file.conversions == 0
    convert_file = abi.convert_file

    def refuse_the_second(file: PrivateFile, offset: int, size: int, *, private: bool) -> None:
        if offset >= 8 * PAGE:
            abi.refuses = [errno.EPERM]
        convert_file(file, offset, size, private=private)

    abi.convert_file = refuse_the_second  # type: ignore[method-assign]
    with pytest.raises(ConversionError, match="refused") as stopped:
        abi.convert(by_file, BASE, 6 * PAGE, private=True)
    error = stopped.value
    assert (error.errno, error.offset, error.gpa) == (errno.EPERM, 8 * PAGE, BASE + 2 * PAGE)
    assert (error.converted, by_file.conversions) == (2 * PAGE, 2)


@pytest.mark.parametrize("backings", [1, 2])
def test_the_other_backing_is_freed_where_there_is_one(backings: int) -> None:
    traits = VM_TRAITS._replace(backings=backings)  # type: ignore[arg-type]
    abi = NotedAbi("freeing", traits)
    with abi.make_vm() as vm, HostMemory(2 * PAGE) as memory, abi.create_file(vm, 0) as file:
        abi.bind(vm, BASE, 2 * PAGE, file, memory=memory, slot=0)
        memory.write(0, b"a" * 2 * PAGE)
        abi.convert(vm, BASE, PAGE, private=True)
        kept = b"a" * PAGE
        assert memory.read(0, 2 * PAGE) == (bytes(PAGE) if backings == 2 else kept) + kept


def test_an_abi_that_says_one_thing_and_has_the_other() -> None:
    class Empty(NotedAbi):
        convert_vm = private.PrivateAbi.convert_vm
        convert_file = private.PrivateAbi.convert_file

    for traits, what in ((VM_TRAITS, "vm"), (FILE_TRAITS, "file")):
        abi = Empty("empty", traits)
        with abi.make_vm() as vm:
            bind(vm, BASE, 1, 0)
            lacking = (
                rf"<Empty empty> does not define convert_{what}\(\); .* converts='{what}' must"
            )
            with pytest.raises(TypeError, match=lacking):
                abi.convert(vm, BASE, PAGE, private=True)


def test_registered_in_order_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "ABIS", dict(private.ABIS))
    earlier, before = list(private.ABIS), dict(FAULT_LAYOUTS)
    assert earlier[:2] == ["restrictedmem", "guest_memfd"]
    abi = NotedAbi("noted", VM_TRAITS)
    private.register(abi)
    assert list(private.ABIS) == [*earlier, "noted"]
    assert before == FAULT_LAYOUTS, "its exit reason had a layout already"
    with pytest.raises(ValueError, match="already called 'noted'"):
        private.register(NotedAbi("noted", VM_TRAITS))


@pytest.mark.parametrize("shortage", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch, shortage: int) -> None:
    """choose() reports it as it is: whether there is private memory is not known then."""

    class Refused(NotedAbi):
        failure = errno.ENOTTY

        def create_vm(self, kvm: Kvm) -> PrivateVm:
            raise OSError(self.failure, "refused")

    one, other = Refused("one", VM_TRAITS), Refused("other", VM_TRAITS)
    monkeypatch.setattr(private, "ABIS", {"one": one, "other": other})
    kvm = cast("Kvm", None)
    with pytest.raises(OSError, match="no private memory here: one: refused; other: refused"):
        private.choose(kvm)
    other.failure = shortage
    with pytest.raises(OSError, match="refused") as failed:
        private.choose(kvm)
    assert failed.value.errno == shortage


def test_a_layout_of_ones_own_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    guest_memfd = private.ABIS["guest_memfd"].fault_layout
    own = guest_memfd._replace(abi="own")
    assert layout_of(39, own) is own
    assert layout_of(39, None) is guest_memfd
    assert layout_of(38, own) is private.ABIS["restrictedmem"].fault_layout
    assert layout_of(2, own) is None
    for layout in (own, own._replace(reason=77)):
        monkeypatch.setitem(FAULT_LAYOUTS, 39, guest_memfd)
        monkeypatch.delitem(FAULT_LAYOUTS, 77, raising=False)
        register_fault_layout(layout)
    assert FAULT_LAYOUTS[39] is guest_memfd
    assert FAULT_LAYOUTS.pop(77).abi == "own"


@pytest.mark.parametrize("fd", [1 << 32, (1 << 32) + 3, -(1 << 32), -(1 << 33)])
def test_a_descriptor_that_does_not_fit_is_not_cut(by_vm: PrivateVm, fd: int) -> None:
    region2 = private.guest_memfd.set_user_memory_region2
    region_ext = private.restrictedmem.set_user_memory_region_ext
    for call in (region2, region_ext):
        with pytest.raises(ArgumentError, match="a descriptor has 32 bits"):
            call(by_vm, 0, 0, PAGE, None, fd)
        with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION") as refused:
            call(by_vm, 0, 0, PAGE, None, -1)
        assert refused.value.errno == errno.ENOTTY, "passed on: /dev/null is no VM"


def test_the_readmes_paths_exist() -> None:
    root = Path(__file__).parents[2]
    text = (root / "kvmpriv" / "private" / "README.md").read_text()
    paths = re.findall(r"`((?:cdefs|kvmpriv|scripts|tests)/[\w./]+)`", text)
    assert len(paths) >= 8
    missing = [path for path in paths if "NAME" not in path and not (root / path).exists()]
    assert not missing


def test_traits_of_guest_memfd_with_options() -> None:
    gm = uapi.guest_memfd
    snp = private.GuestMemfdAbi("snp", vm_type=gm.KVM_X86_SNP_VM)
    assert not snp.traits.access_follows_state
    mapped = private.GuestMemfdAbi("mapped", vm_type=0, file_flags=gm.GUEST_MEMFD_FLAG_MMAP)
    assert (mapped.traits.backings, mapped.traits.access_follows_state) == (1, True)
    assert snp.fault_layout.abi == "snp"


def test_what_an_abi_needs_is_exported() -> None:
    """The names that README.md's "Adding an ABI" uses are in kvmpriv.private."""
    text = (Path(private.__file__).parent / "README.md").read_text()
    used = set(re.findall(r"`private\.(\w+)`", text))
    assert {"FaultLayout", "Structs"} <= used <= {*private.__all__}
    layout = private.GuestMemfdAbi("mine").fault_layout
    assert isinstance(layout, private.FaultLayout)
    pool = private.Structs(uapi.kvm.ffi.typeof("struct kvm_regs *"))
    assert pool.take((1, 2)).fields.rbx == 2
