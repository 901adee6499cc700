"""What conversions cost in place or by the VM's attributes; prints JSON for run.py.

Run inside one kernel, with its parameter gmem_in_place_conversion on and off:
launch.py bench.in_place KERNEL [--quick]
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter_ns

from kvmpriv import Kvm, private
from kvmpriv.guest.puppet import Puppet

from .linux import Bench

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
GPA = 4 << 30
#: Name -> the size of the range, and which of its pages exist: one in so many bytes (0: none).
RANGES = {
    "1 page": (PAGE, PAGE),
    "1 page, empty": (PAGE, 0),
    "2 MiB": (2 * MIB, PAGE),
    "2 MiB, empty": (2 * MIB, 0),
    "1 GiB": (GIB, 128 << 10),
    "1 GiB, empty": (GIB, 0),
}
#: The memory of the guest that converts everything.
WHOLE = 512 * MIB


def costs(abi: private.PrivateAbi, kvm: Kvm, rounds: int) -> dict[str, list[float]]:
    """Nanoseconds of a conversion, by range, direction, and whether its pages are mapped."""
    found: dict[str, list[float]] = {}
    for name, (size, stride) in RANGES.items():
        with ExitStack() as stack:
            vm = stack.enter_context(abi.create_vm(kvm))
            guest = stack.enter_context(Puppet(vm))
            vm.add_private_memory(GPA, size, private=False)
            for to_private in (True, False) if stride else ():  # the pages of both states
                guest.touch(GPA, stride, size // stride, byte=1)
                abi.convert(vm, GPA, size, private=to_private, keep=True)
            for mapped in (False, True) if stride else (False,):
                for _ in range(rounds):
                    for to_private in (True, False):
                        if mapped:
                            guest.touch(GPA, stride, size // stride, byte=1)
                        target = "private" if to_private else "shared"
                        kind = f"{name}, {'mapped, ' if mapped else ''}to {target}"
                        start = perf_counter_ns()
                        abi.convert(vm, GPA, size, private=to_private, keep=True)
                        found.setdefault(kind, []).append(perf_counter_ns() - start)
    return found


def held() -> int:
    """Bytes that this process and private files have in memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    unevictable = next(int(line.split()[1]) for line in lines if line.startswith("Unevictable:"))
    status = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))
    return (unevictable + own) << 10


def memory(abi: private.PrivateAbi, kvm: Kvm, *, keep: bool) -> float:
    """How much a guest holds that converts all its memory to and fro, by its size."""
    with abi.create_vm(kvm) as vm, Puppet(vm) as guest:
        before = held()
        slot = vm.add_private_memory(GPA, WHOLE)
        for to_private in (True, False):
            slot.convert(private=to_private, keep=keep)
            guest.touch(GPA, PAGE, WHOLE // PAGE, byte=1)
        slot.convert(private=True, keep=keep)
        guest.touch(GPA, PAGE, WHOLE // PAGE, byte=1)
        return (held() - before) / WHOLE


def boots(kernel: Path, count: int) -> list[float]:
    """Seconds until Linux in private memory has started its init."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(kernel, Path(folder))
        return [bench.boot_to_init("private") for _ in range(count)]


def main(arguments: list[str]) -> None:
    """Measure, and print JSON."""
    kernel, *options = arguments
    quick = "--quick" in options
    with Kvm() as kvm:
        abi = private.choose(kvm)
        found = {
            "abi": abi.name,
            "costs": costs(abi, kvm, 3 if quick else 11),
            "held": memory(abi, kvm, keep=False),
            "held, without holes": memory(abi, kvm, keep=True),
            "boots": boots(Path(kernel), 2 if quick else 5),
        }
        json.dump(found, sys.stdout)
