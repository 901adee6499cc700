"""Arguments that can't be used: each is named in an ArgumentError, none is cut or passed on."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from kvmpriv import ArgumentError, CpuidEntry, HostMemory, Kvm, Puppet, Vcpu, Vm, private, uapi
from kvmpriv.fd import describe, new_struct
from kvmpriv.routing import IrqchipRoute, MsiRoute

k = uapi.kvm
U32, U64 = 1 << 32, 1 << 64

pytestmark = pytest.mark.usefixtures("no_leak")

LEAF = CpuidEntry(1, 0, 0, 0, 0, 0, 0)

#: What is called with a number that does not fit; and a number next to it that does.
OF_KVM: dict[str, tuple[Callable[[Kvm, int], Any], tuple[int, ...]]] = {
    "create_vm": (lambda kvm, n: kvm.create_vm(n), (-1, U64, -U64)),
    "check_extension": (
        lambda kvm, n: kvm.check_extension(n),
        (-1, U64, U64 + 3, U64 + 0x7FFF, 3 - U64),
    ),
    "ioctl": (lambda kvm, n: kvm.ioctl(k.KVM_CHECK_EXTENSION, n), (-1, U64, U64 + 3)),
    "ioctl_errno": (lambda kvm, n: kvm.ioctl_errno(k.KVM_CHECK_EXTENSION, n), (-1, U64, U64 + 3)),
}
OF_VM: dict[str, tuple[Callable[[Vm, int], Any], tuple[int, ...]]] = {
    "check_extension": (lambda vm, n: vm.check_extension(n), (-1, U64, U64 + 3, 3 - U64)),
    "create_vcpu": (lambda vm, n: vm.create_vcpu(n), (-1, U32, U64)),
    "enable_cap": (lambda vm, n: vm.enable_cap(n), (-1, U32)),
    "enable_cap flags": (lambda vm, n: vm.enable_cap(1, flags=n), (-1, U32)),
    "enable_cap argument": (lambda vm, n: vm.enable_cap(1, 0, n), (-1, U64)),
    "set_tss_addr": (lambda vm, n: vm.set_tss_addr(n), (-1, U64)),
    "set_identity_map_addr": (lambda vm, n: vm.set_identity_map_addr(n), (-1, U64)),
    "create_pit2": (lambda vm, n: vm.create_pit2(n), (-1, U32)),
    "irq_line irq": (lambda vm, n: vm.irq_line(n, 1), (-1, U32)),
    "irq_line level": (lambda vm, n: vm.irq_line(1, n), (-1, U32)),
    "irqfd fd": (lambda vm, n: vm.irqfd(n, 1), (-1, U32)),
    "irqfd gsi": (lambda vm, n: vm.irqfd(0, n), (-1, U32)),
    "ioeventfd addr": (lambda vm, n: vm.ioeventfd(0, n, 1), (-1, U64)),
    "ioeventfd length": (lambda vm, n: vm.ioeventfd(0, 0, n), (-1, U32)),
    "signal_msi address": (lambda vm, n: vm.signal_msi(n, 0), (-1, U64)),
    "signal_msi data": (lambda vm, n: vm.signal_msi(0, n), (-1, U32)),
    "msi route gsi": (lambda vm, n: vm.set_gsi_routing([MsiRoute(n, 0, 0)]), (-1, U32)),
    "msi route address": (lambda vm, n: vm.set_gsi_routing([MsiRoute(0, n, 0)]), (-1, U64)),
    "irqchip route pin": (lambda vm, n: vm.set_gsi_routing([IrqchipRoute(0, 0, n)]), (-1, U32)),
    "free_slot": (lambda vm, n: vm.free_slot(n), (-1, 1 << 16)),
    "get_dirty_log": (lambda vm, n: vm.get_dirty_log(n), (-1, 0, U32)),
}
OF_VCPU: dict[str, tuple[Callable[[Vcpu, int], Any], tuple[int, ...]]] = {
    "set_tsc_khz": (lambda vcpu, n: vcpu.set_tsc_khz(n), (-1, U32, U64)),
    "set_mp_state": (lambda vcpu, n: vcpu.set_mp_state(n), (-1, U32)),
    "interrupt": (lambda vcpu, n: vcpu.interrupt(n), (-1, U32)),
    "translate": (lambda vcpu, n: vcpu.translate(n), (-1, U64)),
    "set_guest_debug": (lambda vcpu, n: vcpu.set_guest_debug(n), (-1, U32)),
    "enable_cap": (lambda vcpu, n: vcpu.enable_cap(n), (-1, U32)),
    "get_msrs": (lambda vcpu, n: vcpu.get_msrs([0x10, n]), (-1, U32)),
    "set_msrs index": (lambda vcpu, n: vcpu.set_msrs({n: 0}), (-1, U32)),
    "set_msrs value": (lambda vcpu, n: vcpu.set_msrs({0x10: n}), (-1, U64)),
    "set_cpuid2": (lambda vcpu, n: vcpu.set_cpuid2([LEAF, LEAF._replace(eax=n)]), (-1, U32)),
    "start_real_mode rip": (lambda vcpu, n: vcpu.start_real_mode(n), (-1, 1 << 16)),
    "start_real_mode rsp": (lambda vcpu, n: vcpu.start_real_mode(0, rsp=n), (-1, 1 << 16)),
}


def cases(table: dict[str, tuple[Any, tuple[int, ...]]]) -> list[Any]:
    return [
        pytest.param(call, number, id=f"{name} {number:#x}")
        for name, (call, numbers) in table.items()
        for number in numbers
    ]


@pytest.mark.parametrize(("call", "number"), cases(OF_KVM))
def test_of_kvm(kvm: Kvm, call: Callable[[Kvm, int], Any], number: int) -> None:
    with pytest.raises(ArgumentError, match=f"{number:#x}"):
        call(kvm, number)


@pytest.mark.parametrize(("call", "number"), cases(OF_VM))
def test_of_a_vm(vm: Vm, call: Callable[[Vm, int], Any], number: int) -> None:
    with pytest.raises(ArgumentError, match=f"{number:#x}|no slot {number} "):
        call(vm, number)


@pytest.mark.parametrize(("call", "number"), cases(OF_VCPU))
def test_of_a_vcpu(vm: Vm, call: Callable[[Vcpu, int], Any], number: int) -> None:
    with vm.create_vcpu() as vcpu, pytest.raises(ArgumentError, match=f"{number:#x}"):
        call(vcpu, number)


def test_too_many_arguments(vm: Vm) -> None:
    with pytest.raises(ArgumentError, match="takes 4 arguments, not 5"):
        vm.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1, 2, 3, 4, 5)


def test_host_memory() -> None:
    for wrong, match in (
        ({"fd": -2}, "fd must be a file descriptor, or -1 for none, not -2"),
        ({"fd": U32}, "fd must be"),
        ({"offset": 1}, "the offset must be a multiple of 4096 below 2\\^63, not 0x1"),
        ({"offset": -4096}, "the offset must be"),
        ({"offset": U64}, "the offset must be"),
    ):
        with pytest.raises(ArgumentError, match=match):
            HostMemory(4096, **wrong)  # type: ignore[arg-type]
    with HostMemory(4096) as memory, pytest.raises(ArgumentError, match="not inside host memory"):
        memory.madvise(4, 4096, 4096)


def test_the_field_of_a_nested_struct_is_named() -> None:
    for values, match in (
        (
            {"nent": 1, "entries": [{"eax": U32}]},
            "struct kvm_cpuid_entry2: eax can't be 0x100000000",
        ),
        ({"nent": -1}, "struct kvm_cpuid2: nent can't be -0x1"),
    ):
        with pytest.raises(ArgumentError, match=match):
            new_struct("struct kvm_cpuid2 *", values)
    with pytest.raises(ArgumentError, match="struct kvm_enable_cap: args can't be 0x1"):
        new_struct("struct kvm_enable_cap *", {"args": [1, U64]})
    with pytest.raises(ArgumentError, match="struct kvm_enable_cap: args can't be"):
        new_struct("struct kvm_enable_cap *", {"args": [1, 2, 3, 4, 5]})


# -- structs of another type ---------------------------------------------------------------------


def test_a_struct_of_another_type(vm: Vm) -> None:
    """A larger struct is refused as a smaller one is: KVM would take its first bytes."""
    with vm.create_vcpu() as vcpu:
        before = describe(vcpu.get_regs())
        assert "rip=0xfff0, rflags=2" in before
        given: dict[str, Any] = {
            "regs": vcpu.get_regs(),
            "sregs": vcpu.get_sregs(),
            "fpu": vcpu.get_fpu(),
            "vcpu_events": vcpu.get_vcpu_events(),
            "debugregs": vcpu.get_debugregs(),
            "xcrs": vcpu.get_xcrs(),
            "lapic": k.ffi.new("struct kvm_lapic_state *"),
        }
        for name in given:
            setter = getattr(vcpu, f"set_{name}")
            for other, struct in given.items():
                if other == name:
                    continue
                kind = k.ffi.typeof(struct).cname.replace("*", r"\*")
                request = f"KVM_SET_{name.upper()}"
                with pytest.raises(
                    ArgumentError, match=f"^{request} takes a struct .*not a {kind}"
                ):
                    setter(struct)
        assert describe(vcpu.get_regs()) == before
    clock = vm.get_clock()
    with pytest.raises(ArgumentError, match="KVM_SET_CLOCK takes a struct kvm_clock_data"):
        vm.set_clock(k.ffi.new("struct kvm_regs *"))  # type: ignore[arg-type]
    vm.set_clock(clock)


def test_a_struct_of_another_size_by_ioctl(vm: Vm) -> None:
    with vm.create_vcpu() as vcpu:
        for request, struct, match in (
            (k.KVM_SET_REGS, vcpu.get_sregs(), "KVM_SET_REGS takes 144 bytes, struct kvm_sregs"),
            (k.KVM_SET_SREGS, vcpu.get_regs(), "KVM_SET_SREGS takes 312 bytes, struct kvm_regs"),
        ):
            for call in (vcpu.ioctl, vcpu.ioctl_errno):
                with pytest.raises(ArgumentError, match=match):
                    call(request, struct)
        assert vcpu.ioctl(k.KVM_SET_REGS, vcpu.get_regs()) == 0


def test_a_struct_that_extends_the_requests_own(vm: Vm) -> None:
    """v9 passes a longer struct by KVM_SET_USER_MEMORY_REGION; it begins with the ordinary one."""
    longer = uapi.restrictedmem.ffi.new("struct kvm_userspace_memory_region_ext *")
    longer.region.memory_size = 0x1000
    assert vm.ioctl_errno(k.KVM_SET_USER_MEMORY_REGION, longer) == 0


def test_bytes_that_the_caller_has_laid_out(vm: Vm) -> None:
    """An array may be larger than the request says, as flexible structs are; but not smaller."""
    with vm.create_vcpu() as vcpu:
        assert vcpu.ioctl(k.KVM_GET_REGS, k.ffi.new("unsigned char[]", 4096)) == 0
        with pytest.raises(ArgumentError, match="KVM_GET_REGS takes 144 bytes"):
            vcpu.ioctl(k.KVM_GET_REGS, k.ffi.new("unsigned char[]", 143))


def test_describe() -> None:
    sregs = k.ffi.new("struct kvm_sregs *", {"cs": {"base": 0x1000, "type": 11}, "cr4": 5})
    assert describe(sregs) == "cs=(base=0x1000, type=0xb), cr4=5"
    assert describe(k.ffi.new("struct kvm_regs *")) == "all 0"
    assert (describe(9), describe(10), describe(-1)) == ("9", "0xa", "-0x1")


# -- errors that name what failed ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("get_msr_index_list", "KVM_GET_MSR_INDEX_LIST"),
        ("get_msr_feature_index_list", "KVM_GET_MSR_FEATURE_INDEX_LIST"),
    ],
)
def test_a_list_of_msrs_that_fails(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, method: str, request_: str
) -> None:
    monkeypatch.setattr(kvm, "ioctl_errno", lambda *_: errno.EFAULT)
    with pytest.raises(OSError, match=f"^.*{request_}\\(") as caught:
        getattr(kvm, method)()
    assert caught.value.errno == errno.EFAULT


def test_a_c_library_without_the_names_for_large_files() -> None:
    """musl has dropped fallocate64 and its like: the package can be imported without them."""
    program = """
import ctypes
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name.endswith("64"):
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = Library
import kvmpriv
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ctypes.sizeof(ctypes.c_long) == 8, "off_t is as long as off64_t here"


# -- what was cut, or hung, or crashed -----------------------------------------------------------


def test_an_argument_that_the_kernel_can_not_read(vm: Vm) -> None:
    """The error is the kernel's EFAULT: the message does not read the struct either."""
    for address in (0, 16):
        for kind in ("struct kvm_clock_data *", "__u64 *"):
            request = k.KVM_GET_CLOCK if "clock" in kind else k.KVM_SET_IDENTITY_MAP_ADDR
            pointer = k.ffi.cast(kind, address)
            with pytest.raises(OSError, match=f"at {address:#x}") as caught:
                vm.ioctl(request, pointer)
            assert caught.value.errno == errno.EFAULT


def test_cpuid_of_a_vcpu_that_another_thread_runs(vm: Vm) -> None:
    """The ioctl would wait for that thread, perhaps for ever."""
    with vm.create_vcpu() as vcpu:
        vcpu._runner["thread"] = object()
        try:
            with pytest.raises(RuntimeError, match="is being run by another thread"):
                vcpu.get_cpuid2()
        finally:
            vcpu._runner.clear()
        assert vcpu.get_cpuid2() == []


def test_a_number_is_no_reply(vm: Vm) -> None:
    """bytes(1) is one byte of 0: the guest would read 0 instead of 1."""
    with vm.create_vcpu() as vcpu:
        vcpu.kvm_run.exit_reason = k.KVM_EXIT_MMIO
        vcpu.kvm_run.mmio.len = 1
        with pytest.raises(TypeError):
            vcpu.reply(1)  # type: ignore[arg-type]
        vcpu.reply(b"\1")
        assert vcpu.kvm_run.mmio.data[0] == 1


@pytest.mark.parametrize("mode", [-1, U32, U32 + 3])
def test_a_mode_of_fallocate(mode: int) -> None:
    with private.PrivateFile(os.memfd_create("file", os.MFD_CLOEXEC)) as file:
        with pytest.raises(ArgumentError, match=f"mode must be .* not {mode:#x}"):
            file.fallocate(mode, 0, 4096)
        assert os.fstat(file.fileno()).st_blocks == 0


def test_ports_and_registers_of_the_puppet(vm: Vm) -> None:
    with Puppet(vm) as guest:
        calls: dict[str, Callable[[int], Any]] = {
            "port": lambda n: guest.port_out(n, 1, 0),
            "port ": lambda n: guest.port_in(n, 1),
            "index": guest.rdmsr,
            "index ": lambda n: guest.wrmsr(n, 0),
            "leaf": guest.cpuid,
            "index  ": lambda n: guest.cpuid(0, n),
            "times": lambda n: guest.increment(0, n),
        }
        for name, call in calls.items():
            for number in (-1, U64 + 0x10, 0x1_0000 if "port" in name else U64):
                with pytest.raises(ArgumentError, match=f"^{name.strip()} must be .*{number:#x}"):
                    call(number)


@pytest.mark.parametrize("request_", [1 << 32 | k.KVM_GET_API_VERSION, 1 << 64 | 0xAE00, -1])
def test_a_request_that_does_not_fit(kvm: Kvm, vm: Vm, request_: int) -> None:
    """The kernel takes 32 bits of a request: one with more is not cut to another request."""
    assert kvm.ioctl(k.KVM_GET_API_VERSION) == 12
    with pytest.raises(ArgumentError, match=f"request must be .*, not {request_:#x}"):
        kvm.ioctl(request_)
    with pytest.raises(ArgumentError, match="request must be"):
        kvm.ioctl_errno(request_)
    regs = k.ffi.new("struct kvm_regs *")
    wide = request_ & ~0xFFFFFFFF | k.KVM_GET_REGS
    with vm.create_vcpu() as vcpu:
        for argument in (regs, k.ffi.cast("void *", regs)):
            with pytest.raises(ArgumentError, match="request must be"):
                vcpu.ioctl(wide, argument)
        assert regs.rip == 0, "it was not called"
        assert vcpu.ioctl(k.KVM_GET_REGS, regs) == 0
        assert regs.rip == 0xFFF0


BAD_POINTERS = """
import os
from kvmpriv import Kvm, uapi
k = uapi.kvm
with Kvm() as kvm:
    for kind, address in (("struct kvm_regs *", 0x10), ("__u64 *", 0x10), ("__u64 *", 1 << 63)):
        request = k.KVM_GET_REGS if "regs" in kind else k.KVM_GET_REGS & 0xFFFF | 8 << 16
        try:
            kvm.ioctl(request, k.ffi.cast(kind, address))
        except OSError as error:
            print(error)
    good = k.ffi.new("struct kvm_regs *", {"rip": 0x1234})
    for pointer in (good, k.ffi.cast("struct kvm_regs *", good)):
        try:
            kvm.ioctl(k.KVM_GET_REGS, pointer)
        except OSError as error:
            print(error)
"""


@pytest.mark.usefixtures("kvm")
def test_a_pointer_that_leads_nowhere() -> None:
    """A message shows what an argument points to only where that can be read."""
    done = subprocess.run([sys.executable, "-c", BAD_POINTERS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "KVM_GET_REGS(struct kvm_regs * at 0x10): " in lines[0]
    assert "* at 0x10): " in lines[1]
    assert "* at 0x8000000000000000): " in lines[2]
    assert lines[3] == lines[4]
    assert "KVM_GET_REGS(rip=0x1234): " in lines[3]
