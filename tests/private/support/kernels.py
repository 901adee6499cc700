"""What the running kernel has, by trying, and the skip where it has not."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import kvmpriv
from kvmpriv import Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.private import PrivateVm, restrictedmem
from kvmpriv.private.restrictedmem import RestrictedMem

from .arch_hook import hook
from .requirements import missing
from .slot_requests import RestrictedSlots
from .syscalls import errno_of

MakeVm = Callable[[], PrivateVm]
#: The kernel that runs, by its name in scripts/kernel: known by it to be mended.
MENDED = os.environ.get("KVMPRIV_KERNEL") in ("restrictedmem", "restrictedmem-debug")

VM_TYPES = {"default": gm.KVM_X86_DEFAULT_VM, "sw_protected": gm.KVM_X86_SW_PROTECTED_VM}


def open_kvm() -> kvmpriv.Kvm:
    """The host's KVM; a skip where there is none to be had."""
    try:
        return kvmpriv.Kvm()
    except OSError as error:
        missing("host", f"/dev/kvm can't be used: {error}")


def ask_for_v9() -> str:
    """What system call 451 answers: EINVAL, if it is memfd_restricted(2)."""
    return errno_of(restrictedmem.ask_memfd_restricted())


def require_v9() -> None:
    if ask_for_v9() != "EINVAL":
        missing("restrictedmem", f"system call 451 answers {ask_for_v9()}")


@cache
def says_of_private_slots() -> str:
    """What a VM that should accept KVM_MEM_PRIVATE says."""
    with hook(on=True), Kvm() as kvm, kvm.create_vm() as vm, RestrictedMem() as file:
        return RestrictedSlots(vm, file, 0).set()


def accepts_private_slots() -> bool:
    """Whether there are VMs with v9's private memory here."""
    try:
        return ask_for_v9() == "EINVAL" and says_of_private_slots() == "ok"
    except OSError:  # no KVM
        return False


@cache
def takes_guest_memfd(vm_type: int) -> int:
    """1 if VMs of a type take guest_memfd slots, 0 if not, -1 if there are no such VMs."""
    try:
        with Kvm() as kvm, kvm.create_vm(vm_type) as vm:
            return int(vm.check_extension(gm.KVM_CAP_GUEST_MEMFD) > 0)
    except OSError:
        return -1


def require_guest_memfd() -> None:
    if not any(takes_guest_memfd(number) == 1 for number in VM_TYPES.values()):
        open_kvm().close()  # or it is KVM that is missing
        missing("guest_memfd", "no type of VM has KVM_CAP_GUEST_MEMFD")
