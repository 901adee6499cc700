#!/usr/bin/env python3
"""A private page: a guest writes to it, and its host looks for what was written.

Works with v9's memfd_restricted and with mainline's guest_memfd, whichever the kernel has.
"""

from __future__ import annotations

import sys

from kvmpriv import HostMemory, Kvm, private
from kvmpriv.guest.puppet import Puppet

GPA, SIZE = 4 << 30, 2 << 20
SKIP = 77  # the exit status that test harnesses take for "can't be tried here"


def show(abi: private.PrivateAbi, kvm: Kvm) -> bool:
    with (
        abi.create_vm(kvm) as vm,
        abi.create_file(vm, SIZE) as file,
        HostMemory(SIZE) as memory,
        Puppet(vm) as guest,
    ):
        abi.bind(vm, GPA, SIZE, file, memory=memory)
        guest.convert(GPA, SIZE, private=True)
        memory.write(0, b"what the host wrote")
        guest.write(GPA, b"the guest's secret!")
        print("private: the guest reads", guest.read(GPA, 19))
        print("         the host sees  ", memory.read(0, 19))
        hidden = memory.read(0, SIZE).find(b"secret") < 0

        guest.convert(GPA, SIZE, private=False)
        guest.write(GPA, b"the guest, shared.!")
        print("shared:  the guest reads", guest.read(GPA, 19))
        print("         the host sees  ", memory.read(0, 19))
        return hidden and memory.read(0, 19) == b"the guest, shared.!"


def main() -> int:
    try:
        kvm = Kvm()
        abi = private.choose(kvm)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return SKIP
    print("private memory by", abi.name)
    with kvm:
        right = show(abi, kvm)
    print("hidden while private, found when shared" if right else "NOT AS IT SHOULD BE")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
