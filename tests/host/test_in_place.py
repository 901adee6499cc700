"""Conversion in place on this host's kernel, which may not have it: refusals, and mapped files."""

from __future__ import annotations

import errno

import pytest

from kvmpriv import Kvm, Vm, private, uapi
from kvmpriv.private.guest_memfd import GuestMemfd
from kvmpriv.private.guest_memfd_in_place import (
    ask_set_memory_attributes2,
    set_memory_attributes2,
)
from private.support.requirements import missing

PAGE = 4096
gm = uapi.guest_memfd
MMAP = gm.GUEST_MEMFD_FLAG_MMAP
PRIVATE = gm.KVM_MEMORY_ATTRIBUTE_PRIVATE

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture
def mappable(vm: Vm) -> Vm:
    """A VM whose files can be mapped."""
    if not vm.check_extension(gm.KVM_CAP_GUEST_MEMFD_FLAGS) & MMAP:
        missing("guest-memfd-flags", "KVM_CAP_GUEST_MEMFD_FLAGS lacks MMAP")
    return vm


def test_a_kernel_without_it(kvm: Kvm, mappable: Vm) -> None:
    """The ioctl is there or it is not; where it is not, the ABI is refused with what it needs."""
    with GuestMemfd(mappable, PAGE) as file:
        answer = ask_set_memory_attributes2(file)
        assert answer in (errno.EINVAL, errno.ENOTTY)
        if answer == errno.EINVAL:  # a default VM has no private memory
            with pytest.raises(OSError, match=r"KVM_SET_MEMORY_ATTRIBUTES2.*Invalid argument"):
                set_memory_attributes2(file, 0, PAGE, PRIVATE)
            return
        with pytest.raises(OSError, match="KVM_SET_MEMORY_ATTRIBUTES2") as refused:
            set_memory_attributes2(file, 0, PAGE, PRIVATE)
        assert refused.value.errno == errno.ENOTTY
    abi = private.GuestMemfdInPlaceAbi("of a default VM", vm_type=gm.KVM_X86_DEFAULT_VM)
    with pytest.raises(OSError, match=r"needs kvm\.gmem_in_place_conversion=1") as refused:
        abi.try_out(kvm)
    assert refused.value.errno == errno.ENOTTY
    with pytest.raises(OSError, match="guest_memfd_in_place: ") as refused:
        private.choose(kvm, "guest_memfd_in_place")
    assert refused.value.errno == errno.EOPNOTSUPP


def test_private_pages_of_a_mapping_do_not_end_this_process(kvm: Kvm, mappable: Vm) -> None:
    """Without INIT_SHARED a file's pages are private; with the flag they are read and written."""
    if not mappable.check_extension(gm.KVM_CAP_GUEST_MEMFD_FLAGS) & gm.GUEST_MEMFD_FLAG_INIT_SHARED:
        missing("guest-memfd-flags", "KVM_CAP_GUEST_MEMFD_FLAGS lacks INIT_SHARED")
    for flags in (MMAP, MMAP | gm.GUEST_MEMFD_FLAG_INIT_SHARED):
        abi = private.GuestMemfdInPlaceAbi(
            "mapped", vm_type=gm.KVM_X86_DEFAULT_VM, file_flags=flags
        )
        with (
            abi.create_vm(kvm) as vm,
            abi.create_file(vm, 4 * PAGE) as file,
            abi.create_memory(file, PAGE, 2 * PAGE) as memory,
        ):
            if flags == MMAP:
                with pytest.raises(OSError, match=r"page at 0x1000 of .* is private"):
                    memory.read(PAGE, 1)
                with pytest.raises(OSError, match=r"page at 0x1000 of .* is private"):
                    memory.write(PAGE, b"x")
                assert memory.find(b"\0") == -1
                continue
            memory.write(PAGE - 2, b"across")
            assert memory.read(PAGE - 2, 6) == b"across"
            assert memory.find(b"cross") == PAGE - 1
            with abi.create_memory(file, 0, 4 * PAGE) as whole:
                assert whole.find(b"across") == 2 * PAGE - 2, "it is the file's memory"
