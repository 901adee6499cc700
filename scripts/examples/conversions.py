#!/usr/bin/env python3
"""Conversion, explicit and implicit: what the guest asks for, and what its host gets to see.

Explicit: the guest makes the hypercall KVM_HC_MAP_GPA_RANGE.  Implicit: it just accesses memory as
the other kind, and the host, told by KVM_EXIT_MEMORY_FAULT, converts it.  The second needs a guest
with a will of its own: the v9 kernel of scripts/kernel has that, a software-protected VM has not.
"""

from __future__ import annotations

import sys

from kvmpriv import HostMemory, Kvm, private
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.guest.puppet import Puppet

PAGE, MIB = 4096, 1 << 20
GPA, SIZE = 4 << 30, 2 * MIB
SKIP = 77  # the exit status that test harnesses take for "can't be tried here"


def expect(what: str, right: bool) -> None:
    print(f"{'ok    ' if right else 'WRONG '} {what}")
    if not right:
        raise SystemExit(1)


def explicit(guest: Puppet, memory: HostMemory) -> None:
    guest.fill(GPA, 0x11, SIZE)
    expect("all private: the host sees zeros", memory.read(0, SIZE) == bytes(SIZE))
    guest.convert(GPA + MIB, MIB, private=False)
    expect("the upper half shared: a fresh page", guest.span(GPA + MIB, 0, MIB) == MIB)
    guest.fill(GPA + MIB, 0x22, MIB)
    expect("what the guest writes there, the host sees", memory.read(MIB, MIB) == b"\x22" * MIB)
    expect("the lower half is as it was", guest.span(GPA, 0x11, MIB) == MIB)
    guest.convert(GPA + MIB, MIB, private=True)
    expect("private again: the shared page is gone", guest.span(GPA + MIB, 0, MIB) == MIB)
    for exit_ in guest.exits:
        print("      ", exit_)


def implicit(guest: Puppet, memory: HostMemory) -> None:
    def want(attributes: int) -> None:
        answer = guest.hypercall(k.KVM_HC_MAP_GPA_RANGE, GPA, 1, attributes)
        expect("KVM takes down which kind the guest is going to access", answer == 0)

    guest.exits.clear()
    want(rm.KVM_MAP_GPA_RANGE_WANT_SHARED)
    guest.write(GPA, b"for the host")
    expect("a write meant to be shared arrives", memory.read(0, 12) == b"for the host")
    want(rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE)
    guest.write(GPA, b"for me alone")
    expect("one meant to be private does not", memory.read(0, 12) == bytes(12))
    for exit_ in guest.exits:
        print("      ", exit_)


def main() -> int:
    try:
        kvm = Kvm()
        abi = private.choose(kvm)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return SKIP
    with (
        kvm,
        abi.create_vm(kvm) as vm,
        abi.create_file(vm, SIZE) as file,
        HostMemory(SIZE) as memory,
        Puppet(vm, implicit=True) as guest,
    ):
        abi.bind(vm, GPA, SIZE, file, memory=memory)
        abi.convert(vm, GPA, SIZE, private=True)
        print("explicit conversion, by", abi.name)
        explicit(guest, memory)
        if abi.traits.access_follows_state:
            print("no implicit conversion: this VM's accesses follow the state")
        else:
            print("implicit conversion, by", abi.name)
            implicit(guest, memory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
