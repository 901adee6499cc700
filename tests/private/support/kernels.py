"""What the running kernel supports, found out by trying; skips where it does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import kvmpriv
from kvmpriv import Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.private import ABIS, PrivateVm, restrictedmem
from kvmpriv.private.restrictedmem import RestrictedMem

from .arch_hook import hook
from .requirements import missing
from .slot_requests import RestrictedSlots
from .syscalls import errno_of

MakeVm = Callable[[], PrivateVm]
#: The name of the running kernel in scripts/kernel, if it is one of them.
KERNEL = os.environ.get("KVMPRIV_KERNEL", "")
#: The running kernel is named as one that has this project's fixes of v9.
FIXED = KERNEL in ("restrictedmem", "restrictedmem-debug")
#: The running kernel handles a fault again if its page gets the other kind meanwhile.
RETRIES = KERNEL in ("guest_memfd-in-place", "guest_memfd-in-place-debug")

VM_TYPES = {"default": gm.KVM_X86_DEFAULT_VM, "sw_protected": gm.KVM_X86_SW_PROTECTED_VM}


def open_kvm() -> kvmpriv.Kvm:
    """The host's KVM; skips the test if it can't be opened."""
    try:
        return kvmpriv.Kvm()
    except OSError as error:
        missing("host", f"/dev/kvm can't be used: {error}")


def ask_for_v9() -> str:
    """The answer of system call 451: EINVAL if it is memfd_restricted(2)."""
    return errno_of(restrictedmem.ask_memfd_restricted())


def require_v9() -> None:
    """Skip the test if the kernel has no memfd_restricted(2)."""
    if ask_for_v9() != "EINVAL":
        missing("restrictedmem", f"system call 451 answers {ask_for_v9()}")


@cache
def answer_to_private_slots() -> str:
    """The kernel's answer to a private slot, in a VM that should accept it."""
    with hook(on=True), Kvm() as kvm, kvm.create_vm() as vm, RestrictedMem() as file:
        return RestrictedSlots(vm, file, 0).set()


def accepts_private_slots() -> bool:
    """Whether VMs of this kernel can have v9's private memory."""
    try:
        return ask_for_v9() == "EINVAL" and answer_to_private_slots() == "ok"
    except OSError:  # no KVM
        return False


def require_private_slots(_kvm: Kvm) -> None:
    """Skip the test if no VM of this kernel accepts KVM_MEM_PRIVATE."""
    require_v9()
    if (said := answer_to_private_slots()) != "ok":
        missing("restrictedmem", f"this kernel's VMs refuse KVM_MEM_PRIVATE: {said}")


def require_sw_protected_vm(kvm: Kvm) -> None:
    """Skip the test if this kernel can't make VMs of type KVM_X86_SW_PROTECTED_VM."""
    if not kvm.check_extension(gm.KVM_CAP_VM_TYPES) >> gm.KVM_X86_SW_PROTECTED_VM & 1:
        missing("guest_memfd", "no VM type here has private memory")
    if not answer_to_in_place():
        missing("guest_memfd", "kvm.gmem_in_place_conversion is on: VMs are not converted")


@cache
def answer_to_in_place() -> str:
    """The kernel's answer to the ABI whose files are converted: "" if it has it."""
    try:
        with Kvm() as kvm:
            ABIS["guest_memfd_in_place"].try_out(kvm)
    except OSError as error:
        return str(error)
    return ""


def require_in_place(_kvm: Kvm) -> None:
    """Skip the test if this kernel does not convert guest_memfd files in place."""
    if said := answer_to_in_place():
        missing("guest_memfd_in_place", said)


@cache
def takes_guest_memfd(vm_type: int) -> int:
    """1 if VMs of this type take guest_memfd slots, 0 if not, -1 if they can't be made."""
    try:
        with Kvm() as kvm, kvm.create_vm(vm_type) as vm:
            return int(vm.check_extension(gm.KVM_CAP_GUEST_MEMFD) > 0)
    except OSError:
        return -1


@cache
def can_convert(vm_type: int) -> bool:
    """Whether VMs of this type have an attribute that makes memory private."""
    try:
        with Kvm() as kvm, kvm.create_vm(vm_type) as vm:
            attributes = vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES)
    except OSError:
        return False
    return bool(attributes & gm.KVM_MEMORY_ATTRIBUTE_PRIVATE)


def require_guest_memfd() -> None:
    """Skip the test if no type of VM takes guest_memfd slots."""
    if not any(takes_guest_memfd(number) == 1 for number in VM_TYPES.values()):
        open_kvm().close()  # skips with "host" if KVM itself is missing
        missing("guest_memfd", "no type of VM has KVM_CAP_GUEST_MEMFD")


def require_shared_files(kvm: Kvm) -> None:
    """Skip the test if a default VM can't have memory in files that guest and host share."""
    require_nested_paging()
    flags = gm.GUEST_MEMFD_FLAG_MMAP | gm.GUEST_MEMFD_FLAG_INIT_SHARED
    with kvm.create_vm() as vm:
        if flags & ~vm.check_extension(gm.KVM_CAP_GUEST_MEMFD_FLAGS):
            missing("guest-memfd-flags", "a default VM lacks MMAP or INIT_SHARED")


def cpu_flags() -> set[str]:
    """The flags of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()


def require_nested_paging() -> None:
    """Skip the test if KVM runs guests without the processor's help, and so emulates accesses.

    The emulator reads a slot's memory at userspace_addr, whatever the slot's file is.
    """
    if not cpu_flags() & {"svm", "vmx"}:
        missing("nested-paging", "the processor has neither SVM nor VMX")


def require_scripts_vm(what: str) -> None:
    """Skip the test, which does `what`, on any machine but a VM of scripts/vm."""
    if "KVMPRIV_VM" not in os.environ:
        missing("scripts-vm", f"only there {what}")


def need_shadow_mmu() -> None:
    """Skip the test unless KVM uses its shadow MMU for two-dimensional paging."""
    try:
        has_tdp_mmu = Path("/sys/module/kvm/parameters/tdp_mmu").read_text().strip()
    except OSError as error:
        missing("shadow-mmu", str(error))
    if has_tdp_mmu != "N":
        missing("shadow-mmu", f"kvm.tdp_mmu is {has_tdp_mmu}")


def need_kernel_symbol(symbol: str, name: str) -> None:
    """Skip the test for lack of `name` unless the kernel has this function."""
    try:
        with Path("/proc/kallsyms").open() as lines:
            found = any(line.split()[2] == symbol for line in lines)
    except OSError as error:
        missing(name, str(error))
    if not found:
        missing(name, f"the kernel has no {symbol}()")
