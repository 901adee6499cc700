#!/usr/bin/env python3
"""Conversions, explicit and implicit: what the guest asks for, and what the host can read then.

Explicit: the guest asks by the hypercall KVM_HC_MAP_GPA_RANGE.  Implicit: the guest accesses memory
as the other kind, KVM reports that by KVM_EXIT_MEMORY_FAULT, and the host converts it.  The guest
must be able to choose how it accesses a page: it is in this project's v9 kernel, and not in a
software-protected VM.
"""

from __future__ import annotations

import sys

from kvmpriv import HostMemory, Kvm, private, uapi
from kvmpriv.guest import Puppet

PAGE, MIB = 4096, 1 << 20
GPA, SIZE = 4 << 30, 2 * MIB
SKIP = 77  # the exit status by which test harnesses know a skipped test


def expect(what: str, right: bool) -> None:
    print(f"{'ok    ' if right else 'WRONG '} {what}")
    if not right:
        raise SystemExit(1)


def explicit(guest: Puppet, memory: HostMemory, *, in_place: bool) -> None:
    guest.fill(GPA, 0x11, SIZE)
    expect("all private: the host does not find it", memory.find(b"\x11") < 0)
    guest.convert(GPA + MIB, MIB, private=False)
    if in_place:
        expect("the upper half shared: the same page", guest.span(GPA + MIB, 0x11, MIB) == MIB)
    else:
        expect("the upper half shared: a fresh page", guest.span(GPA + MIB, 0, MIB) == MIB)
    guest.fill(GPA + MIB, 0x22, MIB)
    expect("the host reads what the guest writes there", memory.read(MIB, MIB) == b"\x22" * MIB)
    expect("the lower half is as it was", guest.span(GPA, 0x11, MIB) == MIB)
    guest.convert(GPA + MIB, MIB, private=True)
    if in_place:
        expect("private again: still the same page", guest.span(GPA + MIB, 0x22, MIB) == MIB)
        expect("which the host does not find any more", memory.find(b"\x22") < 0)
    else:
        expect("private again: the shared page is gone", guest.span(GPA + MIB, 0, MIB) == MIB)
    for exit_ in guest.exits:
        print("      ", exit_)


def implicit(guest: Puppet, memory: HostMemory) -> None:
    def want(attributes: int) -> None:
        answer = guest.hypercall(uapi.kvm.KVM_HC_MAP_GPA_RANGE, GPA, 1, attributes)
        expect("KVM notes how the guest is going to access the page", answer == 0)

    guest.exits.clear()
    want(uapi.restrictedmem.KVM_MAP_GPA_RANGE_WANT_SHARED)
    guest.write(GPA, b"for the host")
    expect(
        "what the guest writes as shared, the host reads",
        memory.read(0, 12) == b"for the host",
    )
    want(uapi.restrictedmem.KVM_MAP_GPA_RANGE_WANT_PRIVATE)
    guest.write(GPA, b"for me alone")
    expect(
        "what it writes as private, the host does not",
        memory.read(0, 12) == bytes(12),
    )
    for exit_ in guest.exits:
        print("      ", exit_)


def main() -> int:
    try:
        with Kvm() as kvm:
            vm = private.create_vm(kvm)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return SKIP
    with vm, Puppet(vm, implicit=True) as guest:
        memory = vm.add_private_memory(GPA, SIZE).memory
        assert memory is not None
        print("explicit conversion, by", vm.abi.name)
        explicit(guest, memory, in_place=vm.abi.traits.backings == 1)
        if vm.abi.traits.access_follows_state:
            print("no implicit conversion: accesses follow the state of the page in this VM")
        else:
            print("implicit conversion, by", vm.abi.name)
            implicit(guest, memory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
