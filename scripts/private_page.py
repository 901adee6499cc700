#!/usr/bin/env python3
"""A private page: a guest writes to it, and its host looks for what was written.

Works with v9's memfd_restricted and with mainline's guest_memfd, whichever the kernel has.
"""

from __future__ import annotations

import errno
import sys

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.guest.puppet import Puppet
from kvmpriv.private import guest_memfd, restrictedmem

GPA, SIZE = 4 << 30, 2 << 20
SKIP = 77  # the exit status that test harnesses take for "can't be tried here"


def main() -> int:
    v9 = restrictedmem.ask_memfd_restricted() == errno.EINVAL
    print("private memory by", "memfd_restricted (v9)" if v9 else "guest_memfd")
    vm_type = 0 if v9 else gm.KVM_X86_SW_PROTECTED_VM
    with Kvm() as kvm:
        if not v9 and not kvm.check_extension(gm.KVM_CAP_VM_TYPES) >> vm_type & 1:
            print("neither is there for a guest without SNP or TDX", file=sys.stderr)
            return SKIP
    with (
        Kvm() as kvm,
        kvm.create_vm(vm_type) as vm,
        HostMemory(SIZE) as memory,
        Puppet(vm) as guest,
    ):
        memory.write(0, b"what the host wrote")
        if v9:
            with restrictedmem.RestrictedMem() as file:
                restrictedmem.set_user_memory_region_ext(vm, 1, GPA, SIZE, memory, file)
        else:
            with guest_memfd.GuestMemfd(vm, SIZE) as memfd:
                guest_memfd.set_user_memory_region2(vm, 1, GPA, SIZE, memory, memfd)
            attribute = gm.KVM_MEMORY_ATTRIBUTE_PRIVATE
            guest_memfd.set_memory_attributes(vm, GPA, SIZE, attribute)

        guest.write(GPA, b"the guest's secret!")
        print("private: the guest reads", guest.read(GPA, 19))
        print("         the host sees  ", memory.read(0, 19))
        hidden = memory.read(0, SIZE).find(b"secret") < 0

        if v9:
            restrictedmem.memory_encrypt_unreg_region(vm, GPA, SIZE)
        else:
            guest_memfd.set_memory_attributes(vm, GPA, SIZE, 0)
        guest.write(GPA, b"the guest, shared.!")
        print("shared:  the guest reads", guest.read(GPA, 19))
        print("         the host sees  ", memory.read(0, 19))
        found = memory.read(0, 19) == b"the guest, shared.!"
    print("hidden while private, found when shared" if hidden and found else "NOT AS IT SHOULD BE")
    return 0 if hidden and found else 1


if __name__ == "__main__":
    sys.exit(main())
