"""What conversions cost, run inside a kernel that has private memory; prints JSON for run.py.

Usage: launch.py bench.conversions CALLS.so [--quick]
"""

from __future__ import annotations

import ctypes
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

from kvmpriv import HostMemory, Kvm, private
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.guest.puppet import Puppet

PAGE, LARGE, GIB = 4096, 2 << 20, 1 << 30
GPA = 4 << 30
SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def _v9_request(size: int, *, to_private: bool) -> tuple[int, Any]:
    argument = k.ffi.new("struct kvm_enc_region *", (GPA, size))
    request = k.KVM_MEMORY_ENCRYPT_REG_REGION if to_private else k.KVM_MEMORY_ENCRYPT_UNREG_REGION
    return request, argument


def _guest_memfd_request(size: int, *, to_private: bool) -> tuple[int, Any]:
    attributes = gm.KVM_MEMORY_ATTRIBUTE_PRIVATE if to_private else 0
    fields = (GPA, size, attributes, 0)
    return gm.KVM_SET_MEMORY_ATTRIBUTES, gm.ffi.new("struct kvm_memory_attributes *", fields)


#: ABI -> the ioctl and struct of a conversion, which C gets too.
REQUESTS = {"restrictedmem": _v9_request, "guest_memfd": _guest_memfd_request}


class Setting:
    """A guest with one private-capable slot at GPA."""

    def __init__(self, abi: private.PrivateAbi, kvm: Kvm, size: int, stack: ExitStack) -> None:
        self.abi, self.size = abi, size
        self.vm = stack.enter_context(abi.create_vm(kvm))
        file = stack.enter_context(abi.create_file(self.vm, size))
        # At 2 MiB in the address space as in the guest: large pages on either side.
        self.memory = stack.enter_context(HostMemory(size + LARGE, reserve=False))
        offset = -self.memory.userspace_addr % LARGE
        self.guest = stack.enter_context(Puppet(self.vm))
        abi.bind(self.vm, GPA, size, file, memory=self.memory, memory_offset=offset)

    def convert(self, *, to_private: bool) -> float:
        start = perf_counter_ns()
        self.abi.convert(self.vm, GPA, self.size, private=to_private, keep=True)
        return perf_counter_ns() - start


def convert_1gib(abi: private.PrivateAbi, kvm: Kvm, calls: Any, pairs: int) -> dict[str, Any]:
    """1 GiB from private to shared in one ioctl, a page in 128 KiB of it mapped."""
    stride = 128 << 10
    with ExitStack() as stack:
        it = Setting(abi, kvm, GIB, stack)
        request, argument = REQUESTS[abi.name](GIB, to_private=False)
        address = int(k.ffi.cast("uintptr_t", argument))

        def prepared() -> None:
            it.convert(to_private=True)
            it.guest.touch(GPA, stride, GIB // stride, byte=1)

        def ours() -> float:
            prepared()
            return it.convert(to_private=False)

        def theirs() -> float:
            prepared()
            return float(calls.timed(it.vm.fileno(), request, address))

        ours(), theirs()
        measured = [(ours(), theirs()) for _ in range(pairs)]
    if min(min(pair) for pair in measured) <= 0:
        raise SystemExit("C's ioctl failed")
    return {"pairs": measured}


def per_page(abi: private.PrivateAbi, kvm: Kvm, page: int, rounds: int) -> dict[str, Any] | None:
    """Nanoseconds a page, for ranges whose pages are mapped in the guest, or not."""
    size = 16 << 20 if page == PAGE else 256 << 20
    count = size // page
    if SHMEM_HUGE.exists():
        SHMEM_HUGE.write_text("always" if page == LARGE else "never")
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        it = Setting(abi, kvm, size, stack)
        it.convert(to_private=True)
        if page == LARGE:
            it.guest.touch(GPA, page, count, byte=1)
            if it.vm.stats()["pages_2m"] < count:
                return None
        for _ in range(rounds):
            for mapped in (False, True):
                for to_private in (False, True):
                    if mapped:
                        it.guest.touch(GPA, page, count, byte=1)
                    target = "private" if to_private else "shared"
                    kind = f"{'mapped' if mapped else 'bare'}, to {target}"
                    found.setdefault(kind, []).append(it.convert(to_private=to_private) / count)
    return {"pages": count, **{kind: median(values) for kind, values in found.items()}}


def main(arguments: list[str]) -> None:
    """Measure, and print JSON."""
    calls = ctypes.CDLL(arguments[0])
    calls.timed.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
    calls.timed.restype = ctypes.c_int64
    quick = "--quick" in arguments
    with Kvm() as kvm:
        abi = private.choose(kvm)
        json.dump(
            {
                "abi": abi.name,
                "convert_1gib": convert_1gib(abi, kvm, calls, 4 if quick else 15),
                "4 KiB": per_page(abi, kvm, PAGE, 2 if quick else 5),
                "2 MiB": per_page(abi, kvm, LARGE, 2 if quick else 5),
            },
            sys.stdout,
        )
