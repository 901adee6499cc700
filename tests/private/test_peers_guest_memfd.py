"""What the kernel's selftests assert of guest_memfd only: fstat's numbers, pre-faulting."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack

import pytest

from kvmpriv import HostMemory, Kvm, Vm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.guest.puppet import Puppet
from kvmpriv.private import guest_memfd
from kvmpriv.private.guest_memfd import GuestMemfd

from .support.mappings import INIT_SHARED, MMAP, require_flags
from .support.requirements import missing
from .support.rig import LARGE, MakeRig, only
from .support.rules import rule
from .support.syscalls import GIB, PAGE, fallocate

pytestmark = pytest.mark.usefixtures("no_leak")

GPA = 4 * GIB


@rule("gm.file.stat")
@pytest.mark.usefixtures("guest_memfd_kvm")
def test_stat(gm_file: GuestMemfd) -> None:
    """fstat reports the size and the blocks; allocating and freeing pages changes neither."""
    for mode in (None, 1, 3):
        if mode is not None:
            fallocate(gm_file, mode, 0, 16 * PAGE)
        seen = os.fstat(gm_file.fileno())
        assert (seen.st_size, seen.st_blksize) == (256 * PAGE, PAGE)


@rule("gm.prefault.then-read")
@only("guest_memfd")
@pytest.mark.parametrize("kind", ["default", "shared", "private"])
def test_what_was_filled_ahead_is_read(make_rig: MakeRig, kvm: Kvm, kind: str) -> None:
    """The guest reads 2 MiB and a page that were pre-faulted, without a fault."""
    rig = make_rig()
    size = LARGE + PAGE
    with ExitStack() as stack:
        vm: Vm = rig.vm
        guest: Puppet = rig.guest
        if kind == "default":
            vm = stack.enter_context(kvm.create_vm())
            guest = stack.enter_context(Puppet(vm, cpuid=kvm.get_supported_cpuid()))
        if not vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
            missing("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0")
        memory = rig.memory(size)
        memory.write(0, b"\x5a" * size)
        if kind == "private":
            rig.bind(GPA, size, rig.file(size), memory=memory)
        else:
            vm.map(memory, GPA)
        guest.load(guest.base, 8)  # what it needs itself is there then

        def faults() -> int:
            return guest.vcpu.stats()["pf_taken"]

        fill = guest_memfd.pre_fault_memory
        done = 0
        while done < LARGE:  # it may be interrupted
            left = fill(guest.vcpu, GPA + done, LARGE - done)
            assert left < LARGE - done
            done = LARGE - left
        assert fill(guest.vcpu, GPA + LARGE, 2 * PAGE) == PAGE, "as far as the slot reaches"
        with pytest.raises(OSError, match="KVM_PRE_FAULT_MEMORY") as failure:
            fill(guest.vcpu, GPA + size, PAGE)
        assert failure.value.errno == errno.ENOENT
        before = faults()
        assert guest.span(GPA, 0 if kind == "private" else 0x5A, size) == size
        assert faults() == before
        assert guest.exits == []
        if kind != "private":
            # The twin that was not filled ahead.
            other = rig.memory(size)
            vm.map(other, 2 * GPA)
            assert guest.span(2 * GPA, 0, size) == size
            assert faults() > before


@pytest.fixture
def mappable_vm(gm_vm: Vm) -> Vm:
    """A VM whose guest_memfd files can be mapped, and be shared."""
    require_flags(gm_vm, MMAP | INIT_SHARED)
    return gm_vm


@rule("gm.mmap.guest")
@pytest.mark.usefixtures("guest_memfd_kvm")
def test_a_guest_in_a_mapped_file(mappable_vm: Vm, kvm: Kvm) -> None:
    """Guest and host see the same bytes through slot and mapping, and the same zeros after a
    hole.
    """
    vm, size = mappable_vm, 8 * PAGE
    with (
        GuestMemfd(vm, size, MMAP | INIT_SHARED) as file,
        HostMemory(size, fd=file.fileno()) as memory,
        Puppet(vm, cpuid=kvm.get_supported_cpuid()) as guest,
    ):
        slot = guest_memfd.set_user_memory_region2(vm, 1, GPA, size, memory, file)
        memory.write(0, b"\xaa" * size)
        assert guest.span(GPA, 0xAA, size) == size
        guest.fill(GPA + PAGE, 0xBB, 6 * PAGE)
        assert memory.read(0, size) == b"\xaa" * PAGE + b"\xbb" * 6 * PAGE + b"\xaa" * PAGE
        file.punch_hole(2 * PAGE, PAGE)
        assert guest.span(GPA + 2 * PAGE, 0, PAGE) == PAGE
        assert memory.read(2 * PAGE, PAGE) == bytes(PAGE)
        guest.write(GPA + 2 * PAGE, b"again")
        assert memory.read(2 * PAGE, 6) == b"again\0"
        assert memory.read(3 * PAGE, PAGE) == b"\xbb" * PAGE
        slot.delete()


@rule("gm.mmap.hole.gpa-0")
@pytest.mark.usefixtures("guest_memfd_kvm")
def test_a_hole_before_gpa_0(mappable_vm: Vm, kvm: Kvm) -> None:
    """A hole that begins before the slot's part of the file takes the part's first page."""
    with (
        GuestMemfd(mappable_vm, 8 * PAGE, MMAP | INIT_SHARED) as file,
        HostMemory(4 * PAGE, fd=file.fileno(), offset=4 * PAGE) as memory,
        Puppet(mappable_vm, cpuid=kvm.get_supported_cpuid()) as guest,
    ):
        slot = guest_memfd.set_user_memory_region2(
            mappable_vm, 1, 0, 4 * PAGE, memory, file, 4 * PAGE
        )
        guest.fill(0, 0xBB, 4 * PAGE)
        file.punch_hole(0, 5 * PAGE)
        assert guest.span(0, 0, 4 * PAGE) == PAGE
        assert guest.span(PAGE, 0xBB, 3 * PAGE) == 3 * PAGE
        assert memory.read(0, 4 * PAGE) == bytes(PAGE) + b"\xbb" * 3 * PAGE
        slot.delete()
