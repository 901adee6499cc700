#!/usr/bin/env python3
"""A private page: the guest writes to it, and the host looks for what the guest wrote.

Works with the ABI that the kernel has: v9's memfd_restricted, mainline's guest_memfd, or conversion
in place.
"""

from __future__ import annotations

import sys

from kvmpriv import HostMemory, Kvm, private
from kvmpriv.guest import Puppet

GPA, SIZE = 4 << 30, 2 << 20
SKIP = 77  # the exit status by which test harnesses know a skipped test


def seen(memory: HostMemory) -> object:
    try:
        return memory.read(0, 19)
    except OSError as error:  # converted in place: there is nothing else to see
        return error.strerror


def show(vm: private.PrivateVm) -> bool:
    with Puppet(vm) as guest:
        memory = vm.add_private_memory(GPA, SIZE).memory
        assert memory is not None
        if vm.abi.traits.backings == 2:  # the host has memory of its own there
            memory.write(0, b"what the host wrote")
        guest.write(GPA, b"the guest's secret!")
        print("private: the guest reads", guest.read(GPA, 19))
        print("         the host sees  ", seen(memory))
        hidden = memory.find(b"secret") < 0

        guest.convert(GPA, SIZE, private=False)
        guest.write(GPA, b"the guest, shared.!")
        print("shared:  the guest reads", guest.read(GPA, 19))
        print("         the host sees  ", memory.read(0, 19))
        return hidden and memory.read(0, 19) == b"the guest, shared.!"


def main() -> int:
    try:
        with Kvm() as kvm:
            vm = private.create_vm(kvm)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return SKIP
    print("private memory by", vm.abi.name)
    with vm:
        right = show(vm)
    print("hidden while private, found when shared" if right else "UNEXPECTED RESULT")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
