"""/dev/kvm, VMs, vCPUs, memory, slots: results, refusals, and that they leave nothing behind."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvmpriv import ArgumentError, ClosedError, HostMemory, Kvm, Vcpu, VcpuThread, Vm, exits
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.private import guest_memfd, restrictedmem
from kvmpriv.routing import IrqchipRoute, MsiRoute
from kvmpriv.stats import StatsFd
from private.support.leaks import open_fds
from private.support.requirements import missing

from .conftest import SPIN, MakeGuest, start

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("no_leak")


def refused(number: int, call: Callable[[], Any]) -> OSError:
    """`call` fails with just this errno."""
    with pytest.raises(OSError, match=r".") as caught:
        call()
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]
    return caught.value


def port_of(vcpu: Vcpu) -> int:
    """The port of the exit, which must be one for port I/O."""
    exit_ = vcpu.exit()
    assert isinstance(exit_, exits.IoExit)
    return exit_.port


# -- /dev/kvm ------------------------------------------------------------------------------------


def test_system(kvm: Kvm) -> None:
    assert kvm.get_api_version() == 12
    assert kvm.get_vcpu_mmap_size() >= 2 * 4096, "struct kvm_run and a page for port I/O"
    assert kvm.check_extension(k.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension(k.KVM_CAP_NR_MEMSLOTS) > 1, "an int, not a bool"
    assert kvm.check_extension(0x7FFFFFFF) == 0
    assert {entry.function for entry in kvm.get_supported_cpuid()} >= {0, 1, 0x80000000}
    assert 0x10 in kvm.get_msr_index_list(), "the TSC"
    assert len(set(kvm.get_msr_feature_index_list())) == len(kvm.get_msr_feature_index_list())


def test_no_dev_kvm(tmp_path: Path) -> None:
    error = refused(errno.ENOENT, lambda: Kvm(tmp_path / "kvm"))
    assert error.filename == str(tmp_path / "kvm")
    assert "load KVM: modprobe" in str(error)


def test_a_device_that_is_not_kvm(tmp_path: Path) -> None:
    assert "not KVM" in str(refused(errno.ENOTTY, lambda: Kvm("/dev/null")))
    plain = tmp_path / "file"
    plain.touch()
    refused(errno.ENOTTY, lambda: Kvm(plain))


def test_not_permitted(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        missing("root", "another user's rights can only be had by root")
    node = tmp_path / "kvm"
    node.touch(mode=0o600)
    refused(errno.ENOTTY, lambda: Kvm(node))  # root gets as far as asking what it is
    here = os.open(tmp_path, os.O_PATH)  # others may not be let into the folders above
    os.seteuid(65534)
    try:
        error = refused(errno.EACCES, lambda: Kvm(f"/proc/self/fd/{here}/kvm"))
    finally:
        os.seteuid(0)
        os.close(here)
    assert "group kvm" in str(error)


def test_vm_types(kvm: Kvm) -> None:
    error = refused(errno.EINVAL, lambda: kvm.create_vm(0xFFFF))
    assert "KVM_CREATE_VM(0xffff)" in str(error)
    kvm.create_vm(0).close()


def test_a_vm_of_a_class_of_ones_own(kvm: Kvm) -> None:
    """create_vm_as makes it; when that fails the descriptor is closed."""

    class Named(Vm):
        def __init__(self, fd: int, vcpu_mmap_size: int, name: str = "") -> None:
            super().__init__(fd, vcpu_mmap_size)
            self.name = name

    with kvm.create_vm_as(lambda fd, size: Named(fd, size, "one")) as vm, vm.create_vcpu() as vcpu:
        assert (type(vm), vm.name) == (Named, "one")
        assert vcpu.get_regs().rip == 0xFFF0
    with pytest.raises(ArgumentError, match="vm_type must be"):
        kvm.create_vm_as(Named, -1)
    error = refused(errno.EINVAL, lambda: kvm.create_vm_as(Named, 0xFFFF))
    assert "KVM_CREATE_VM(0xffff)" in str(error)


@pytest.mark.parametrize("when", ["before", "after", "closed"])
def test_a_vm_that_cannot_be_made(kvm: Kvm, when: str) -> None:
    """The descriptor is closed once: by create_vm_as until an object has it, then by the object."""
    seen: list[int] = []

    class Broken(Vm):
        def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
            seen.append(fd)
            if when == "before":
                raise RuntimeError("not made")
            super().__init__(fd, vcpu_mmap_size)
            if when == "closed":
                self.close()
                seen.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            raise RuntimeError("not made")

    with pytest.raises(RuntimeError, match="not made"):
        kvm.create_vm_as(Broken)
    gc.collect()  # the object was in the exception's traceback
    if when == "closed":
        assert seen[0] == seen[1], "the number was free, and another file has it"
        os.close(seen[1])
    assert not Path(f"/proc/self/fd/{seen[0]}").exists()


# -- memory and slots ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097, 1 << 63, 1 << 64])
def test_bad_memory_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="memory size"):
        HostMemory(size)


def test_more_memory_than_the_host_has() -> None:
    error = refused(errno.ENOMEM, lambda: HostMemory(1 << 62))
    assert "mmap(0x4000000000000000 bytes)" in str(error)


def test_host_memory() -> None:
    memory = HostMemory(0x3000)
    memory.write(0x0FFE, b"over")
    assert memory.read(0x0FFC, 8) == b"\0\0over\0\0"
    assert memory.userspace_addr % 4096 == 0
    for offset, size in ((0x2FFF, 2), (-1, 1), (0, 0x3001)):
        with pytest.raises(ValueError, match="not inside host memory"):
            memory.read(offset, size)
    with pytest.raises(ValueError, match="not inside host memory"):
        memory.write(0x2FFF, b"xx")
    memory.close()
    memory.close()
    for use in (memory.view, lambda: memory.read(0, 1), memory.__enter__):
        with pytest.raises(ValueError, match="host memory is closed"):
            use()


def mapped(memory: HostMemory) -> bool:
    """Whether the kernel lists the mapping."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(number, 16) for number in line.split()[0].split("-"))
        if low <= memory.userspace_addr < high:
            return True
    return False


def test_pages_are_given_back() -> None:
    """By the owner until it closes the memory, by a slot that holds it afterwards, too."""
    memory = HostMemory(0x3000)
    memory.write(0, b"x" * 0x3000)
    memory.discard(0x1000, 0x1000)
    assert memory.find(b"\0") == 0x1000
    assert memory.find(b"x", 0x1000) == 0x2000
    memory.hold()
    view = memory.view()
    memory.close()
    with pytest.raises(ClosedError, match="host memory is closed"):
        memory.discard(0, 0x1000)
    memory.discard_held(0, 0x1000)
    assert view[0] == 0
    with pytest.raises(ArgumentError, match="not inside host memory"):
        memory.discard_held(0x3000, 0x1000)
    view.release()
    memory.release()
    assert not mapped(memory)
    with pytest.raises(ClosedError, match="host memory is closed"):
        memory.discard_held(0, 0x1000)


@pytest.mark.parametrize("how", ["discard", "madvise"])
def test_other_threads_run_while_pages_are_given_back(how: str) -> None:
    """A vCPU's thread can go on: no thread gets the interpreter here unless it is released."""
    interval, gate, ran = sys.getswitchinterval(), threading.Lock(), threading.Event()

    def other() -> None:
        with gate:
            ran.set()

    gate.acquire()
    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    with HostMemory(0x1000) as memory:
        sys.setswitchinterval(1000)
        try:
            end = time.monotonic() + 30
            gate.release()
            while not ran.is_set() and time.monotonic() < end:
                if how == "discard":
                    memory.discard(0, 0x1000)
                else:
                    memory.madvise(mmap.MADV_DONTNEED)
            assert ran.is_set()
        finally:
            sys.setswitchinterval(interval)
            thread.join(30)


def test_advice_that_the_kernel_refuses() -> None:
    """OSError has the kernel's errno, and the place; the twin is a whole page."""
    with HostMemory(0x2000) as memory:
        with pytest.raises(OSError, match=r"madvise\(0x1000 bytes at 0x800 of .*\): ") as refused:
            memory.madvise(mmap.MADV_DONTNEED, 0x800, 0x1000)
        assert refused.value.errno == errno.EINVAL
        memory.write(0x1000, b"x")
        memory.madvise(mmap.MADV_DONTNEED, 0x1000, 0x1000)
        assert memory.read(0x1000, 1) == b"\0"
        memory.madvise(mmap.MADV_DONTNEED, 0x2000, 0)


def test_a_view_keeps_the_mapping() -> None:
    memory = HostMemory(0x4000)
    view = memory.view()
    memory.close()
    view[0] = 1
    assert mapped(memory)
    view.release()
    assert not mapped(memory)


def test_slots(vm: Vm) -> None:
    with HostMemory(4 * MIB) as memory:
        first = vm.map(memory, 0, size=MIB)
        second = vm.map(memory, 4 * MIB, size=MIB, offset=2 * MIB, flags=k.KVM_MEM_READONLY)
        assert (first.slot, second.slot) == (0, 1)
        assert vm.slots == {0: first, 1: second}
        first.delete()
        first.delete()
        assert vm.slots == {1: second}
        assert vm.map(memory, 0, size=MIB).slot == 0
        with pytest.raises(ValueError, match="are not inside host memory"):
            vm.map(memory, 16 * MIB, size=4 * MIB, offset=4096)


def test_overlapping_slots(vm: Vm) -> None:
    with HostMemory(4 * MIB) as memory:
        vm.map(memory, MIB, size=MIB)
        for address in (MIB - 4096, MIB, 2 * MIB - 4096):
            error = refused(errno.EEXIST, partial(vm.map, memory, address, size=8192))
            assert f"<Slot 1: {address:#x}…{address + 8192:#x}>" in str(error)
            assert "overlaps <Slot 0: 0x100000…0x200000>" in str(error)
        for address in (MIB - 8192, 2 * MIB):
            vm.map(memory, address, size=8192).delete()
        assert list(vm.slots) == [0]


def test_bad_slots(vm: Vm) -> None:
    with HostMemory(MIB) as memory:
        good: dict[str, int] = {
            "slot": 0,
            "guest_phys_addr": MIB,
            "memory_size": MIB,
            "userspace_addr": memory.userspace_addr,
            "flags": 0,
        }
        limit = vm.check_extension(k.KVM_CAP_NR_MEMSLOTS)
        for name, bad, names in (
            ("guest_phys_addr", MIB + 1, "guest_phys_addr 0x100001 is not page aligned"),
            ("memory_size", MIB - 1, "memory_size 0xfffff is not page aligned"),
            ("userspace_addr", memory.userspace_addr + 1, "userspace_addr="),
            ("userspace_addr", 0xFFFF800000000000, "userspace_addr="),
            ("slot", limit, "slot="),
            ("flags", 1 << 31, "flags=0x80000000"),
            ("flags", 1 << 2, "flags=PRIVATE"),
            ("guest_phys_addr", (1 << 64) - 4096, "guest_phys_addr="),
        ):
            error = refused(
                errno.EINVAL,
                partial(vm.set_user_memory_region, **{**good, name: bad}),
            )
            assert names in str(error)
            assert vm.slots == {}
            vm.set_user_memory_region(**good)  # the twin
            vm.set_user_memory_region(**{**good, "memory_size": 0})
        refused(errno.EINVAL, lambda: vm.set_user_memory_region(**{**good, "memory_size": 0}))


def test_every_slot_used_up(vm: Vm) -> None:
    limit = vm.check_extension(k.KVM_CAP_NR_MEMSLOTS)
    with HostMemory(4096) as memory:
        for number in range(limit):
            vm.set_user_memory_region(number, number * 4096, 4096, memory.userspace_addr)
        assert len(vm.slots) == limit
        error = refused(errno.ENOSPC, lambda: vm.map(memory, limit * 4096))
        assert f"all {limit} memory slots are in use" in str(error)
        vm.slots[17].delete()
        assert vm.map(memory, limit * 4096).slot == 17


def test_memory_closed_while_bound(make_guest: MakeGuest) -> None:
    vm, vcpu, memory = make_guest(b"\xe4\x10\xf4")  # in $0x10, %al; hlt
    memory.close()
    assert memory.closed
    assert mapped(memory), "the slot keeps the mapping"
    assert vcpu.run() == k.KVM_EXIT_IO
    assert vcpu.run() == k.KVM_EXIT_HLT, "the guest's memory is still what it was"
    vm.slots[0].delete()
    assert not mapped(memory)


def test_memory_lives_until_the_last_vcpu_is_closed(make_guest: MakeGuest) -> None:
    vm, vcpu, memory = make_guest(b"\xe4\x10\xf4")
    memory.close()
    vm.close()
    assert vcpu.run() == k.KVM_EXIT_IO, "a VM lives as long as its vCPUs' fds"
    assert mapped(memory)
    vcpu.close()
    assert not mapped(memory)


def test_slots_of_all_three_shapes(vm: Vm) -> None:
    """REGION everywhere, REGION2 with guest_memfd, v9's longer struct with memfd_restricted."""
    with HostMemory(4 * MIB) as memory:
        vm.map(memory, 0, size=MIB)
        if vm.check_extension(gm.KVM_CAP_USER_MEMORY2):
            plain = guest_memfd.set_user_memory_region2(vm, 5, MIB, MIB, memory, flags=0)
            assert vm.slots[5] is plain
            plain.delete()
        else:
            with pytest.raises(OSError, match="REGION2") as caught:
                guest_memfd.set_user_memory_region2(vm, 5, MIB, MIB, memory, flags=0)
            assert caught.value.errno == errno.ENOTTY
        if restrictedmem.ask_memfd_restricted() != errno.EINVAL:
            # KVM_MEM_PRIVATE is an unknown flag to this request in mainline.
            call = lambda: restrictedmem.set_user_memory_region_ext(  # noqa: E731
                vm, 6, MIB, MIB, memory, 0
            )
            assert "restricted_fd" not in str(refused(errno.EINVAL, call)), "fd 0 is not shown"
        ext = restrictedmem.set_user_memory_region_ext(vm, 6, MIB, MIB, memory, 0, flags=0)
        assert vm.slots[6] is ext, "without the flag v9's struct is the old one with a tail"


def test_guest_memfd_slot_keeps_its_file(vm: Vm) -> None:
    if not vm.check_extension(gm.KVM_CAP_GUEST_MEMFD):
        missing("guest_memfd", "KVM_CAP_GUEST_MEMFD is 0 on a default VM")
    before = len(open_fds())
    file = guest_memfd.GuestMemfd(vm, MIB)
    assert os.get_inheritable(file.fileno()) is False
    slot = guest_memfd.set_user_memory_region2(vm, 0, 0, MIB - 4096, None, file, 4096)
    file.close()
    assert file.closed
    with pytest.raises(ValueError, match="guest_memfd file is closed"):
        file.fileno()
    assert len(open_fds()) == before + 1, "the slot has it"
    slot.delete()
    assert len(open_fds()) == before
    refused(errno.EINVAL, lambda: guest_memfd.GuestMemfd(vm, 4095))
    refused(errno.EINVAL, lambda: guest_memfd.GuestMemfd(vm, MIB, flags=1 << 63))


def test_a_deleted_slot_changes_no_file(kvm: Kvm) -> None:
    """Another slot may use the same part of the file by then."""
    abi = guest_memfd.GuestMemfdAbi(vm_type=0)
    with abi.create_vm(kvm) as vm:
        if not vm.check_extension(gm.KVM_CAP_GUEST_MEMFD):
            missing("guest_memfd", "KVM_CAP_GUEST_MEMFD is 0 on a default VM")
        with abi.create_file(vm, MIB) as file:
            gone = abi.bind(vm, 0, MIB, file, slot=0)
            assert "DELETED" not in repr(gone)
            gone.allocate(0, 4096)
            gone.punch_hole(0, 4096)
            gone.delete()
            other = abi.bind(vm, 0, MIB, file, slot=0)
            for use in (gone.allocate, gone.punch_hole):
                with pytest.raises(ValueError, match=r"^<Slot 0 DELETED: 0x0….* is deleted"):
                    use(0, 4096)
            other.allocate(0, 4096)
        assert "CLOSED" in repr(file), "though the slot keeps its fd"
        with pytest.raises(ValueError, match="guest_memfd file is closed"):
            file.__enter__()
        other.punch_hole(0, 4096)
        file.fallocate_held(3, 0, 4096)  # a hole, as the slot punches it


@pytest.mark.parametrize("wrong", [-1, 1 << 64, -(1 << 64), (1 << 64) + 4096])
def test_numbers_that_no_field_can_have(vm: Vm, wrong: int) -> None:
    """The error names them, they are not cut to their lowest bits, and the next call works."""
    with HostMemory(4096) as memory:
        for name, call in (
            ("guest_phys_addr", lambda: vm.map(memory, wrong)),
            ("flags", lambda: vm.map(memory, 0, flags=wrong)),
            ("slot", lambda: vm.map(memory, 0, slot=wrong)),
            ("memory_size", lambda: vm.set_user_memory_region(0, 0, wrong, 0)),
            ("address", lambda: guest_memfd.set_memory_attributes(vm, wrong, 4096, 8)),
            ("size", lambda: guest_memfd.set_memory_attributes(vm, 0, wrong, 8)),
            ("addr", lambda: restrictedmem.memory_encrypt_reg_region(vm, wrong, 4096)),
            ("size", lambda: guest_memfd.GuestMemfd(vm, wrong)),
        ):
            with pytest.raises(ValueError, match=f"^struct kvm_[a-z0-9_]*: {name} can't be -?0x"):
                call()
        for name, one in (
            ("guest_phys_addr", {"guest_phys_addr": wrong}),
            ("slot", {"slot": wrong}),
        ):
            given = {"slot": 0, "guest_phys_addr": 0} | one
            with pytest.raises(ValueError, match=f"region: {name} can't be -?0x"):
                restrictedmem.set_user_memory_region_ext(
                    vm, memory_size=4096, memory=memory, restrictedmem_file=0, **given
                )
        assert vm.slots == {}
        assert vm.map(memory, 0).slot == 0
    if vm.check_extension(gm.KVM_CAP_GUEST_MEMFD):
        with guest_memfd.GuestMemfd(vm, MIB) as file:
            file.allocate(0, 4096)
            for change in (file.allocate, file.punch_hole):
                with pytest.raises(ValueError, match="is out of range"):
                    change(1 << 64, 4096)
                with pytest.raises(ValueError, match="is out of range"):
                    change(0, (1 << 64) + 4096)
            for name, given_ in (("guest_phys_addr", (wrong, 4096)), ("memory_size", (0, wrong))):
                with pytest.raises(ValueError, match=f"2: {name} can't be -?0x"):
                    guest_memfd.set_user_memory_region2(vm, 0, *given_, None, file)


def test_memfd_restricted_is_not_called_where_it_is_another_call() -> None:
    answer = restrictedmem.ask_memfd_restricted()
    assert answer in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EPERM, errno.EACCES)
    if answer == errno.EINVAL:
        missing("mainline", "system call 451 is memfd_restricted here")
    error = refused(errno.ENOSYS if answer == errno.EBADF else answer, restrictedmem.RestrictedMem)
    assert "memfd_restricted" in str(error)


def test_dirty_log(make_guest: MakeGuest) -> None:
    vm, vcpu, memory = make_guest(bytes.fromhex("c606002001 f4"))  # movb $1, 0x2000; hlt
    vm.set_user_memory_region(0, 0, 0x10000, memory.userspace_addr, k.KVM_MEM_LOG_DIRTY_PAGES)
    memory.hold()
    memory.close()
    assert mapped(memory), "a slot that is changed goes on holding its memory"
    memory.release()
    assert mapped(memory)
    with pytest.raises(ValueError, match=r"no slot 3 in this VM \(slots: 0\)"):
        vm.get_dirty_log(3)
    assert vm.get_dirty_log(0) == bytes(8)
    assert vcpu.run() == k.KVM_EXIT_HLT
    assert vm.get_dirty_log(0)[0] & 1 << 2
    vm.close()
    assert mapped(memory)
    vcpu.close()
    assert not mapped(memory)


# -- vCPUs ---------------------------------------------------------------------------------------


def test_registers(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(bytes.fromhex("0fa2 f4"))  # cpuid; hlt
    regs = vcpu.get_regs()
    regs.rbx, regs.r15 = 0x1122334455667788, 5
    vcpu.set_regs(regs)
    assert (vcpu.get_regs().rbx, vcpu.get_regs().r15) == (0x1122334455667788, 5)
    sregs = vcpu.get_sregs()
    sregs.cr2 = 0xABC000
    vcpu.set_sregs(sregs)
    assert vcpu.get_sregs().cr2 == 0xABC000
    assert vcpu.translate(0x1234) == 0x1234


def test_each_other_set_of_registers_is_set(kvm: Kvm, make_guest: MakeGuest) -> None:
    """A field that was written is read back; before, it had another value."""
    _, vcpu, _ = make_guest(b"\xf4")
    fpu = vcpu.get_fpu()
    assert (fpu.xmm[3][0], fpu.fcw) != (0x5A, 0x27F)
    fpu.xmm[3][0], fpu.fcw = 0x5A, 0x27F
    vcpu.set_fpu(fpu)
    assert (vcpu.get_fpu().xmm[3][0], vcpu.get_fpu().fcw) == (0x5A, 0x27F)
    events = vcpu.get_vcpu_events()
    assert events.nmi.masked == 0
    events.nmi.masked = 1
    vcpu.set_vcpu_events(events)
    assert vcpu.get_vcpu_events().nmi.masked == 1
    debugregs = vcpu.get_debugregs()
    assert debugregs.db[1] == 0
    debugregs.db[1] = 0x1234
    vcpu.set_debugregs(debugregs)
    assert vcpu.get_debugregs().db[1] == 0x1234
    xcrs = vcpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].value) == (1, 1), "XCR0: x87"
    xcrs.xcrs[0].value = 3
    refused(errno.EINVAL, lambda: vcpu.set_xcrs(xcrs))
    vcpu.set_cpuid2(kvm.get_supported_cpuid())
    vcpu.set_xcrs(xcrs)
    assert vcpu.get_xcrs().xcrs[0].value == 3, "and SSE, which CPUID lists now"


def test_registers_get_modify_set(make_guest: MakeGuest) -> None:
    """The registers are set only if the block does not raise."""
    _, vcpu, _ = make_guest(b"\xf4")
    with vcpu.regs() as regs, vcpu.sregs() as sregs:
        regs.rbx, sregs.cr2 = 0x1234, 0x5000
    assert (vcpu.get_regs().rbx, vcpu.get_sregs().cr2) == (0x1234, 0x5000)

    def fail() -> None:
        with vcpu.regs() as regs, vcpu.sregs() as sregs:
            regs.rbx, sregs.cr2 = 1, 2
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert (vcpu.get_regs().rbx, vcpu.get_sregs().cr2) == (0x1234, 0x5000)


def test_start_real_mode(kvm: Kvm) -> None:
    """A guest at any address of the first 64 KiB, with a stack; the registers of a reset else."""
    with kvm.create_vm() as vm, HostMemory(0x10000) as memory, vm.create_vcpu() as vcpu:
        vm.map(memory, 0)
        memory.write(0xFFF0, bytes.fromhex("68 3412 f4"))  # push $0x1234; hlt
        vcpu.start_real_mode(0xFFF0, rsp=0x2000)
        sregs = vcpu.get_sregs()
        assert {sregs.cs.base, sregs.ds.base, sregs.es.base, sregs.ss.base, sregs.cs.selector} == {
            0
        }
        assert sregs.cr0 & 1 == 0
        assert vcpu.run() == k.KVM_EXIT_HLT
        assert memory.read(0x1FFE, 2) == b"\x34\x12"
        assert (vcpu.get_regs().rsp, vcpu.get_regs().rip) == (0x1FFE, 0xFFF4)


def test_mp_state(kvm: Kvm, make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(b"\xf4")
    assert vcpu.get_mp_state() == k.KVM_MP_STATE_RUNNABLE
    refused(errno.EINVAL, lambda: vcpu.set_mp_state(k.KVM_MP_STATE_HALTED))
    vcpu.set_mp_state(k.KVM_MP_STATE_RUNNABLE)
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu() as other:
            other.set_mp_state(k.KVM_MP_STATE_HALTED)
            assert other.get_mp_state() == k.KVM_MP_STATE_HALTED


def test_tsc_khz(kvm: Kvm, vm: Vm) -> None:
    """The host's frequency always works; half of it only if the hardware can scale it."""
    with vm.create_vcpu() as vcpu:
        khz = vcpu.get_tsc_khz()
        assert khz > 0
        vcpu.set_tsc_khz(khz)
        assert vcpu.get_tsc_khz() == khz
        if kvm.check_extension(k.KVM_CAP_TSC_CONTROL):
            vcpu.set_tsc_khz(khz // 2)
            assert vcpu.get_tsc_khz() == khz // 2
        else:
            error = refused(errno.EINVAL, lambda: vcpu.set_tsc_khz(khz // 2))
            assert f"KVM_SET_TSC_KHZ({khz // 2:#x})" in str(error)


def test_interrupt_and_nmi(make_guest: MakeGuest) -> None:
    """Both are pending afterwards, and the guest takes the interrupt."""
    vm, vcpu, memory = make_guest(b"\x90\xf4")
    memory.write(4 * 0x21, (0x3000).to_bytes(4, "little"))  # the vector, in real mode
    memory.write(0x3000, bytes.fromhex("e621 f4"))  # out %al, $0x21; hlt
    assert vcpu.get_vcpu_events().interrupt.injected == 0
    vcpu.interrupt(0x21)
    events = vcpu.get_vcpu_events()
    assert (events.interrupt.injected, events.interrupt.nr) == (1, 0x21)
    refused(errno.EINVAL, lambda: vcpu.interrupt(0x100))
    assert vcpu.run() == k.KVM_EXIT_IO
    assert port_of(vcpu) == 0x21
    assert vcpu.get_vcpu_events().nmi.pending == 0
    vcpu.nmi()
    assert vcpu.get_vcpu_events().nmi.pending == 1
    with vm.create_vcpu(1) as other:
        assert other.get_vcpu_events().nmi.pending == 0, "another vCPU's"


def test_an_interrupt_with_an_irqchip_in_the_kernel(vm: Vm) -> None:
    vm.create_irqchip()
    with vm.create_vcpu() as vcpu:
        refused(errno.ENXIO, lambda: vcpu.interrupt(0x21))


def test_guest_debug(make_guest: MakeGuest) -> None:
    """Each single step is an exit; without the flags the guest runs to its end."""
    _, vcpu, _ = make_guest(b"\x90\x90\x90\xf4")
    vcpu.set_guest_debug(k.KVM_GUESTDBG_ENABLE | k.KVM_GUESTDBG_SINGLESTEP)
    for pc in (0x1001, 0x1002):
        assert vcpu.run() == k.KVM_EXIT_DEBUG
        debug = vcpu.exit()
        assert isinstance(debug, exits.DebugExit)
        assert (debug.exception, debug.pc) == (1, pc)
    vcpu.set_guest_debug(0)
    assert vcpu.run() == k.KVM_EXIT_HLT


def test_kvmclock_ctrl(make_guest: MakeGuest) -> None:
    """A guest's kvmclock shows that it was stopped; a guest without kvmclock is refused."""
    _, vcpu, memory = make_guest(b"\xf4")
    refused(errno.EINVAL, vcpu.kvmclock_ctrl)
    system_time_new, flags = 0x4B564D01, 0x2000 + 29  # struct pvclock_vcpu_time_info
    vcpu.set_msrs({system_time_new: 0x2001})
    assert vcpu.run() == k.KVM_EXIT_HLT
    assert memory.read(flags, 1)[0] & 2 == 0
    vcpu.kvmclock_ctrl()
    start(vcpu)
    assert vcpu.run() == k.KVM_EXIT_HLT
    assert memory.read(flags, 1)[0] & 2, "PVCLOCK_GUEST_STOPPED"


def test_emulated_cpuid(kvm: Kvm) -> None:
    """KVM lists what it emulates, such as MOVBE, and not what the processor supports."""
    leaves = {(entry.function, entry.index): entry for entry in kvm.get_emulated_cpuid()}
    assert set(leaves) >= {(0, 0), (1, 0)}
    assert leaves[1, 0].ecx & 1 << 22, "MOVBE"
    assert leaves[1, 0].edx == 0, "no FPU: that is no feature to be emulated"


def test_cpuid_is_what_the_guest_sees(kvm: Kvm, make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(bytes.fromhex("0fa2 f4"))
    wanted = [
        entry._replace(eax=0x12345678, ebx=0x9ABCDEF0) if entry.function == 1 else entry
        for entry in kvm.get_supported_cpuid()
    ]
    vcpu.set_cpuid2(wanted)
    assert len(vcpu.get_cpuid2()) == len(wanted)
    regs = vcpu.get_regs()
    regs.rax = 1
    vcpu.set_regs(regs)
    assert vcpu.run() == k.KVM_EXIT_HLT
    assert vcpu.get_regs().rax == 0x12345678


def test_msrs(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(b"\xf4")
    sysenter_eip, star = 0x176, 0xC0000081
    vcpu.set_msrs({sysenter_eip: 0x1000, star: 0x23_0008_0000_0000})
    assert vcpu.get_msrs([star, sysenter_eip]) == {
        star: 0x23_0008_0000_0000,
        sysenter_eip: 0x1000,
    }
    error = refused(errno.EINVAL, lambda: vcpu.get_msrs([star, 0xDEADBEEF, sysenter_eip]))
    assert "0xdeadbeef" in str(error)
    error = refused(errno.EINVAL, lambda: vcpu.set_msrs({star: 0, 0xDEADBEEF: 1}))
    assert "does not write MSR 0xdeadbeef" in str(error)


def test_create_vcpu_refusals(vm: Vm) -> None:
    with vm.create_vcpu(1):
        refused(errno.EEXIST, lambda: vm.create_vcpu(1))
        refused(errno.EINVAL, lambda: vm.create_vcpu(1 << 24))
        vm.create_vcpu(0).close()


def test_irqchip(kvm: Kvm, vm: Vm) -> None:
    refused(errno.ENXIO, lambda: vm.irq_line(4, 1))
    vm.create_irqchip()
    refused(errno.EEXIST, vm.create_irqchip)
    vm.irq_line(4, 1)
    vm.irq_line(4, 0)
    with vm.create_vcpu(), kvm.create_vm() as late, late.create_vcpu():
        refused(errno.EINVAL, late.create_irqchip)


def test_pit2(make_guest: MakeGuest, kvm: Kvm) -> None:
    """The i8254 in the kernel answers its ports without an exit."""
    vm, vcpu, _ = make_guest(bytes.fromhex("e440 e680 f4"))  # in $0x40, %al; out %al, $0x80
    assert vcpu.run() == k.KVM_EXIT_IO
    assert port_of(vcpu) == 0x40, "the twin without it"
    refused(errno.ENOENT, vm.create_pit2)
    with kvm.create_vm() as other, HostMemory(0x10000) as memory:
        other.create_irqchip()
        other.create_pit2(k.KVM_PIT_SPEAKER_DUMMY)
        refused(errno.EEXIST, other.create_pit2)
        other.map(memory, 0)
        memory.write(0x1000, bytes.fromhex("e440 e680 f4"))
        with other.create_vcpu() as timed:
            timed.start_real_mode(0x1000)
            assert timed.run() == k.KVM_EXIT_IO
            assert port_of(timed) == 0x80


def test_addresses_for_real_mode_emulation(vm: Vm) -> None:
    vm.set_tss_addr(0xFFFBD000)
    refused(errno.EINVAL, lambda: vm.set_tss_addr(1 << 32))
    vm.set_tss_addr(0xFFFBD000)
    vm.set_identity_map_addr(0xFFFBC000)
    with vm.create_vcpu():
        error = refused(errno.EINVAL, lambda: vm.set_identity_map_addr(0xFFFBC000))
        assert "KVM_SET_IDENTITY_MAP_ADDR(0xfffbc000)" in str(error)


@pytest.fixture
def lapic_vcpu(vm: Vm) -> Iterator[Vcpu]:
    """The only vCPU of a VM with an irqchip; its local APIC takes interrupts."""
    vm.create_irqchip()
    with vm.create_vcpu() as vcpu:
        lapic = vcpu.get_lapic()
        k.ffi.buffer(lapic)[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")  # spurious vector: enabled
        vcpu.set_lapic(lapic)
        yield vcpu


def requested(vcpu: Vcpu, vector: int) -> bool:
    """Whether the local APIC has been asked for this interrupt (its IRR)."""
    offset = 0x200 + vector // 32 * 16
    word = k.ffi.buffer(vcpu.get_lapic())[offset : offset + 4]
    return bool(int.from_bytes(word, "little") >> vector % 32 & 1)


def test_lapic(kvm: Kvm, lapic_vcpu: Vcpu) -> None:
    lapic = lapic_vcpu.get_lapic()
    k.ffi.buffer(lapic)[0x80:0x81] = b"\x20"  # the task priority
    lapic_vcpu.set_lapic(lapic)
    assert k.ffi.buffer(lapic_vcpu.get_lapic())[0x80:0x81] == b"\x20"
    with kvm.create_vm() as other, other.create_vcpu() as without:
        refused(errno.EINVAL, without.get_lapic)
        refused(errno.EINVAL, lambda: without.set_lapic(lapic))


def test_signal_msi(kvm: Kvm, vm: Vm, lapic_vcpu: Vcpu) -> None:
    """The vector reaches the vCPU that the address names, and no other."""
    assert not requested(lapic_vcpu, 0x41)
    assert vm.signal_msi(0xFEE00000, 0x41) > 0
    assert requested(lapic_vcpu, 0x41)
    assert vm.signal_msi(0xFEE0F000, 0x42) <= 0, "there is no local APIC 15"
    assert not requested(lapic_vcpu, 0x42)
    with kvm.create_vm() as other:
        refused(errno.EINVAL, lambda: other.signal_msi(0xFEE00000, 0x41))


def test_gsi_routing(vm: Vm, lapic_vcpu: Vcpu) -> None:
    """An interrupt number reaches what its route says; the next table replaces the last."""
    vm.set_gsi_routing([MsiRoute(5, 0xFEE00000, 0x51), MsiRoute(6, 0xFEE00000, 0x52)])
    vm.irq_line(5, 1)
    assert (requested(lapic_vcpu, 0x51), requested(lapic_vcpu, 0x52)) == (True, False)
    event = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        vm.irqfd(event, 6)
        refused(errno.EBUSY, lambda: vm.irqfd(event, 6))
        os.eventfd_write(event, 1)
        deadline = time.monotonic() + 10
        while not requested(lapic_vcpu, 0x52) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert requested(lapic_vcpu, 0x52), "by the eventfd"
        vm.irqfd(event, 6, flags=k.KVM_IRQFD_FLAG_DEASSIGN)
    finally:
        os.close(event)
    vm.set_gsi_routing([MsiRoute(5, 0xFEE00000, 0x61), IrqchipRoute(7, 2, 7)])
    vm.irq_line(5, 1)
    assert requested(lapic_vcpu, 0x61)
    refused(errno.EINVAL, lambda: vm.set_gsi_routing([IrqchipRoute(7, 2, 99)]))


def test_clock(vm: Vm) -> None:
    """kvmclock goes on from the value that it is set to, in nanoseconds."""
    clock = vm.get_clock()
    assert 0 < clock.clock < 5 * 10**12
    clock.clock, clock.flags = 5 * 10**12, 0
    vm.set_clock(clock)
    assert 5 * 10**12 <= vm.get_clock().clock < 5 * 10**12 + 100 * 10**9
    clock.flags = 1 << 31
    refused(errno.EINVAL, lambda: vm.set_clock(clock))


def test_reply(make_guest: MakeGuest) -> None:
    """A guest reads the bytes of `reply`, from a port and from memory without a slot."""
    _, vcpu, memory = make_guest(
        bytes.fromhex(
            "e5 43  a3 0020"  # in $0x43, %ax; mov %ax, 0x2000
            "b8 00f0  8e d8  a1 2000"  # mov 0xf0020, %ax
            "31 db  8e db  a3 0220"  # mov %ax, 0x2002
            "bf 0030  b9 0300  ba 4400  fc  f3 6c"  # rep insb, 3 bytes from port 0x44 to 0x3000
            "e6 45 f4"
        )
    )
    with pytest.raises(ArgumentError, match="the last exit does not read"):
        vcpu.reply(b"x")
    assert vcpu.run() == k.KVM_EXIT_IO
    for wrong in (b"", b"1", b"123"):
        with pytest.raises(ArgumentError, match=f"the guest reads 2 bytes, not {len(wrong)}"):
            vcpu.reply(wrong)
    vcpu.reply(bytearray(b"\x34\x12"))
    assert vcpu.run() == k.KVM_EXIT_MMIO
    with pytest.raises(ArgumentError, match="the guest reads 2 bytes, not 8"):
        vcpu.reply(bytes(8))
    vcpu.reply(memoryview(b"\xcd\xab"))
    read = b""
    while vcpu.run() == k.KVM_EXIT_IO:
        io = vcpu.exit()
        assert isinstance(io, exits.IoExit)
        if io.is_write:
            break
        answer = b"abc"[len(read) : len(read) + io.size * io.count]
        read += answer
        vcpu.reply(answer)
    assert read == b"abc"
    with pytest.raises(ArgumentError, match="the last exit does not read: KVM_EXIT_IO: out"):
        vcpu.reply(b"x")
    assert vcpu.run() == k.KVM_EXIT_HLT
    assert memory.read(0x2000, 4) == b"\x34\x12\xcd\xab"
    assert memory.read(0x3000, 3) == b"abc"
    with pytest.raises(ArgumentError, match="the last exit does not read: KVM_EXIT_HLT"):
        vcpu.reply(b"x")


def test_ioeventfd_spares_the_exit(make_guest: MakeGuest) -> None:
    vm, vcpu, _ = make_guest(bytes.fromhex("b001 e680 e681 f4"))  # out 1 to 0x80, to 0x81; hlt
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    vm.ioeventfd(event, 0x80, 1, flags=k.KVM_IOEVENTFD_FLAG_PIO)
    assert vcpu.run() == k.KVM_EXIT_IO
    assert port_of(vcpu) == 0x81
    assert os.eventfd_read(event) == 1
    flags = k.KVM_IOEVENTFD_FLAG_PIO | k.KVM_IOEVENTFD_FLAG_DEASSIGN
    vm.ioeventfd(event, 0x80, 1, flags=flags)
    start(vcpu)
    assert vcpu.run() == k.KVM_EXIT_IO
    assert port_of(vcpu) == 0x80, "the twin without it"
    os.close(event)


def test_enable_cap(vm: Vm) -> None:
    offered = vm.check_extension(k.KVM_CAP_EXIT_HYPERCALL)
    if offered & 1 << k.KVM_HC_MAP_GPA_RANGE:
        vm.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1 << k.KVM_HC_MAP_GPA_RANGE)
    error = refused(errno.EINVAL, lambda: vm.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1 << 63))
    assert "KVM_ENABLE_CAP(cap=KVM_CAP_EXIT_HYPERCALL" in str(error)


def test_stats(make_guest: MakeGuest) -> None:
    """The counters are ints and count what happens; histograms are lists, and separate."""
    vm, vcpu, _ = make_guest(b"\xe4\x10\xe4\x10\xf4")
    if not vm.check_extension(k.KVM_CAP_BINARY_STATS_FD):
        missing("stats", "KVM_CAP_BINARY_STATS_FD is 0")
    with vm.get_stats_fd() as of_vm, vcpu.get_stats_fd() as of_vcpu:
        assert of_vm.descriptors["pages_4k"].unit == ""
        assert of_vm.id.startswith("kvm-")
        assert of_vm.read().keys() == vm.stats().keys()
        before = vcpu.stats()["exits"]
        while vcpu.run() != k.KVM_EXIT_HLT:
            pass
        assert of_vcpu.read()["exits"] - before >= 2
        assert vcpu.stats()["exits"] == of_vcpu.read()["exits"]
        histogram = of_vcpu.descriptors["halt_poll_success_hist"]
        assert histogram.type == "logarithmic histogram"
        counts = vcpu.histograms()
        assert counts == of_vcpu.read_histograms()
        assert len(counts["halt_poll_success_hist"]) == histogram.size
        assert not counts.keys() & vcpu.stats().keys()
        assert counts.keys() | vcpu.stats().keys() == of_vcpu.descriptors.keys()
        assert vm.histograms() == of_vm.read_histograms()
    with pytest.raises(ClosedError, match="statistics fd is closed"):
        of_vm.read()


def test_an_exit_of_each_kind_a_guest_can_make(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(
        bytes.fromhex(
            "b8 3412  e7 42"  # out %ax, $0x42
            "e4 43"  # in $0x43, %al
            "b8 00f0  8e d8  c6 06 1000 77"  # movb $0x77, 0xf0010
            "a1 2000"  # mov 0xf0020, %ax
            "f4"
        )
    )
    assert vcpu.run() == k.KVM_EXIT_IO
    assert vcpu.exit() == exits.IoExit(exits.ExitReason.IO, True, 0x42, 2, 1, b"\x34\x12")
    assert vcpu.run() == k.KVM_EXIT_IO
    assert vcpu.exit() == exits.IoExit(exits.ExitReason.IO, False, 0x43, 1, 1, b"")
    assert vcpu.run() == k.KVM_EXIT_MMIO
    assert vcpu.exit() == exits.MmioExit(exits.ExitReason.MMIO, True, 0xF0010, 1, b"\x77")
    assert vcpu.run() == k.KVM_EXIT_MMIO
    assert vcpu.exit() == exits.MmioExit(exits.ExitReason.MMIO, False, 0xF0020, 2, b"")
    vcpu.reply(b"\xcd\xab")
    assert vcpu.run() == k.KVM_EXIT_HLT
    assert vcpu.get_regs().rax & 0xFFFF == 0xABCD
    assert str(vcpu.exit()) == "KVM_EXIT_HLT"


# -- closing -------------------------------------------------------------------------------------


def test_use_after_close_of_every_object(kvm: Kvm) -> None:
    system = Kvm()
    vm = system.create_vm()
    vcpu = vm.create_vcpu()
    stats = vcpu.get_stats_fd()
    objects: list[tuple[Any, str, list[Callable[[], Any]]]] = [
        (stats, "statistics fd", [stats.read]),
        (
            vcpu,
            "vCPU",
            [
                vcpu.run,
                vcpu.exit,
                vcpu.kick,
                vcpu.get_regs,
                lambda: vcpu.ioctl_errno(k.KVM_RUN),
                lambda: vcpu.kvm_run.exit_reason,
                lambda: setattr(vcpu.kvm_run, "immediate_exit", 1),
            ],
        ),
        (
            vm,
            "VM",
            [
                vm.create_vcpu,
                lambda: vm.check_extension(0),
                lambda: vm.set_user_memory_region(0, 0, 4096, 4096),
                lambda: vm.ioctl(k.KVM_CREATE_IRQCHIP),
            ],
        ),
        (
            system,
            "/dev/kvm",
            [system.create_vm, lambda: system.check_extension(0), system.get_supported_cpuid],
        ),
    ]
    if vm.check_extension(gm.KVM_CAP_GUEST_MEMFD):
        file = guest_memfd.GuestMemfd(vm, 4096)
        objects.insert(0, (file, "guest_memfd file", []))
    for thing, name, uses in objects:
        assert f"fd={thing.fileno()}" in repr(thing)
        assert not thing.closed
        thing.close()
        thing.close()
        assert thing.closed
        assert "CLOSED" in repr(thing)
        for use in (thing.fileno, thing.__enter__, *uses):
            with pytest.raises(ValueError, match=f"^{name} is closed$"):
                use()
    assert kvm.get_api_version() == 12, "another open /dev/kvm must not be affected"


def test_no_fd_is_inherited(vm: Vm) -> None:
    with vm.create_vcpu() as vcpu, vcpu.get_stats_fd() as stats:
        for thing in (vm, vcpu, stats):
            assert os.get_inheritable(thing.fileno()) is False


def test_a_constructor_failing_half_way(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of a constructor after it has an fd fails once; no fd is left open."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    def attempt(call: Callable[[], Any], expected: type[BaseException] = MemoryError) -> None:
        before = open_fds()
        with pytest.raises(expected):
            call()
        assert open_fds() == before

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", fail)
        attempt(vm.create_vcpu)
    with monkeypatch.context() as patch:
        patch.setattr(StatsFd, "_read_descriptors", fail)
        attempt(vm.get_stats_fd)
    with monkeypatch.context() as patch:
        patch.setattr("kvmpriv.kvm._ioctl", fail)
        attempt(Kvm)
    if vm.check_extension(gm.KVM_CAP_GUEST_MEMFD):
        with monkeypatch.context() as patch:
            patch.setattr(os, "set_inheritable", fail)
            attempt(lambda: guest_memfd.GuestMemfd(vm, MIB))
    attempt(lambda: Kvm("/dev/null"), OSError)
    vm.create_vcpu(1).close()  # number 0 stays taken: a VM keeps a vCPU whose fd is closed


def test_descriptors_used_up(kvm: Kvm) -> None:
    """Each descriptor that a VM with a vCPU needs fails once with EMFILE; nothing is left open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_fds()
    failures = 0
    for room in range(8):
        spare: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 1 + room, hard))
        try:
            while len(spare) < 1000:
                spare.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            pass
        for fd in spare[:room]:
            os.close(fd)
        try:
            with kvm.create_vm() as vm, vm.create_vcpu():
                pass
        except OSError as error:
            assert error.errno == errno.EMFILE  # noqa: PT017
            failures += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in spare[room:]:
                os.close(fd)
        assert open_fds() == before
    assert 2 <= failures < 8


def test_forgotten_objects_are_no_leak(kvm: Kvm) -> None:
    before = open_fds()
    for _ in range(50):
        kvm.create_vm().create_vcpu()
    gc.collect()
    assert open_fds() == before


def test_ioctl_of_a_struct_that_is_too_small(vm: Vm) -> None:
    small = k.ffi.new("struct kvm_enc_region *")
    with pytest.raises(ValueError, match="KVM_SET_USER_MEMORY_REGION takes 32 bytes"):
        vm.ioctl(k.KVM_SET_USER_MEMORY_REGION, small)
    with pytest.raises(ValueError, match="takes 32 bytes"):
        vm.ioctl_errno(k.KVM_SET_USER_MEMORY_REGION, small)


def test_the_raw_layer(vm: Vm) -> None:
    region = k.ffi.new("struct kvm_userspace_memory_region *", (0, 0, 0, 4096, 0))
    assert vm.ioctl_errno(k.KVM_SET_USER_MEMORY_REGION, region) == 0
    region.flags = 1 << 30
    assert vm.ioctl_errno(k.KVM_SET_USER_MEMORY_REGION, region) == errno.EINVAL
    error = refused(errno.EINVAL, lambda: vm.ioctl(k.KVM_SET_USER_MEMORY_REGION, region))
    assert "KVM_SET_USER_MEMORY_REGION(flags=0x40000000, memory_size=0x1000)" in str(error)
    assert vm.ioctl_errno(k.KVM_SET_USER_MEMORY_REGION, 8) == errno.EFAULT
    assert vm.ioctl_errno(0xAEFF) == errno.ENOTTY


def test_fork_while_a_thread_runs_a_vcpu(make_guest: MakeGuest) -> None:
    """The child can close its copies, without effect on the parent's guest."""
    _, vcpu, _ = make_guest(SPIN)
    interrupted = []
    with VcpuThread(vcpu, lambda *_: True) as thread:
        while not vcpu._runner:
            time.sleep(0.001)
        child = os.fork()
        if child == 0:
            try:
                vcpu.kick()
            except RuntimeError:
                vcpu.close()
                os._exit(7)
            os._exit(1)
        interrupted.append(vcpu.kvm_run.immediate_exit)
        assert os.waitpid(child, 0)[1] == 7 << 8
        assert thread.is_alive()
        assert vcpu.kvm_run.immediate_exit == 0
    assert interrupted == [0]


# Python can only report what a handler raises inside a __del__.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_anywhere_leaves_no_fd_and_no_slot(kvm: Kvm) -> None:
    """A signal handler raises at any moment while VMs, vCPUs and slots are made."""

    class Interrupt(Exception):  # noqa: N818
        pass

    def raise_it(*_: object) -> None:
        raise Interrupt

    before, fds = signal.signal(signal.SIGALRM, raise_it), open_fds()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    interrupted = 0
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 8e-4))
                with kvm.create_vm() as vm, HostMemory(4096) as memory:
                    slot = vm.map(memory, 0)
                    vm.create_vcpu().close()
                    slot.delete()
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                interrupted += 1
                assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20
    gc.collect()
    assert open_fds() == fds


def test_slots_set_amid_the_setting_of_another(kvm: Kvm) -> None:
    """A signal handler, or a thread with its own VM, sets slots meanwhile; each is right."""
    turns = [0, 0, 0]

    def turn(vm: Vm, number: int) -> None:
        at = number * MIB
        vm.map(memory, at, slot=number)
        refused(errno.EEXIST, lambda: vm.set_user_memory_region(number + 9, at, 4096, address))
        vm.set_user_memory_region(number, at, 0, address)
        vm.set_user_memory_region(number + 9, at, 4096, address)
        vm.set_user_memory_region(number + 9, at, 0, address)
        turns[number] += 1

    def run(vm: Vm, number: int) -> None:
        while time.monotonic() < deadline or min(turns) <= 100:
            turn(vm, number)

    def interrupt(*_: object) -> None:
        turn(vm, 2)
        signal.setitimer(signal.ITIMER_REAL, 1.1e-3)  # not before: handlers nest

    with kvm.create_vm() as vm, kvm.create_vm() as other, HostMemory(4096) as memory:
        address = memory.userspace_addr
        before = signal.signal(signal.SIGALRM, interrupt)
        deadline = time.monotonic() + 2
        try:
            with ThreadPoolExecutor(1) as pool:
                signal.setitimer(signal.ITIMER_REAL, 1e-4)
                thread = pool.submit(run, other, 1)
                run(vm, 0)
                thread.result()
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert (vm.slots, other.slots) == ({}, {})


def test_fork_while_a_vm_is_open(make_guest: MakeGuest) -> None:
    """The child gets an error for the parent's VM; the parent can use it on."""
    vm, vcpu, _ = make_guest(b"\xe4\x10\xf4")
    assert vcpu.run() == k.KVM_EXIT_IO
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for use in (vcpu.run, vcpu.get_regs, vm.create_vcpu):
            try:
                use()
            except OSError as error:
                said.append(f"{errno.errorcode[error.errno or 0]} {error.strerror}")
        with Kvm() as own, own.create_vm() as fresh, fresh.create_vcpu() as cpu:
            said.append(str(cpu.get_mp_state()))
        vcpu.close()
        vm.close()
        os.write(write, "\n".join(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0
    assert len(said) == 4
    assert all(
        f"EIO KVM_{name}" in line for name, line in zip(("RUN", "GET_REGS"), said, strict=False)
    )
    assert all(f"the VM belongs to process {os.getpid()}" in line for line in said[:3])
    assert said[3] == "0", "a VM of the child's own works"
    assert vcpu.run() == k.KVM_EXIT_HLT


def test_private_modules_can_be_imported_first() -> None:
    """Each module can be imported first."""
    for name in (
        "exits",
        "vm",
        "slots",
        "threads",
        "routing",
        "private.guest_memfd",
        "guest.bare",
        "wakeup",
        "cdecl",
    ):
        command = [sys.executable, "-c", f"import kvmpriv.{name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), name
