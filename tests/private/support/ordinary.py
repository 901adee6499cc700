"""Two slots of an ordinary VM on one range of host memory, while the host frees its pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

from kvmpriv import HostMemory, Vm
from kvmpriv.guest.puppet import Puppet

from .races import beside, rounds
from .syscalls import GIB, PAGE

#: Where the two slots are.
GPAS = 4 * GIB, 5 * GIB
PAGES = 64
SIZE = PAGES * PAGE


def words_in(guest: Puppet, gpa: int, pages: Iterable[int]) -> list[int]:
    """The first word of each of these pages, as the guest reads it: one access to each."""
    return [guest.load(gpa + page * PAGE, 8) for page in pages]


def words_of(memory: HostMemory, pages: Iterable[int], start: int = 0) -> list[int]:
    """The same words of host memory from `start` on."""
    read = (memory.read(start + page * PAGE, 8) for page in pages)
    return [int.from_bytes(word, "little") for word in read]


def stale_page(vm: Vm, guest: Puppet, memory: HostMemory, change: Callable[[], object]) -> str:
    """Free the pages by `change` while a vCPU of each slot reads them, the second and the third.

    Returns what the guest saw of a freed page, or "".  The guest never writes, since a freed page
    may be in use by another process: it reads what the host has written to the fresh ones.
    `change` must let other threads run, or nothing is read meanwhile.
    """
    for gpa in GPAS:
        vm.map(memory, gpa, size=SIZE)
    turns = 0
    with ExitStack() as stack:
        reads = [
            stack.enter_context(beside(partial(cpu.touch, gpa, PAGE, PAGES)))
            for cpu, gpa in zip(guest.cpus[1:], GPAS, strict=True)
        ]
        for turn in rounds(100, seconds=3, until=lambda: min(read[0] for read in reads) > 1):
            memory.write(0, bytes([1 + turn % 100]) * SIZE)
            change()
            fresh = 101 + turn % 100
            memory.write(0, bytes([fresh]) * SIZE)
            expected = words_of(memory, range(PAGES))
            for number, gpa in enumerate(GPAS):
                if words_in(guest, gpa, range(PAGES)) != expected:
                    return f"turn {turn}: slot {number} of two has a page that the host has freed"
            turns += 1
    assert turns >= 12
    return ""
