"""What private memory costs, and to whom the kernel accounts it: before, during and after."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import psutil
import pytest

from kvmpriv import HostMemory

from .support.accounting import BIG, SLACK, Unevictable, meminfo
from .support.processes import in_cgroup, in_child
from .support.races import eventually
from .support.rig import Rig, only, two_backings
from .support.rules import rule
from .support.syscalls import GIB, HOLE, KEEP_SIZE, MIB, PAGE, fallocate

pytestmark = pytest.mark.usefixtures("no_leak")

GPA = 4 * GIB


class Costs:
    """How much the counters of the system and of this process have grown."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.before = self._now()

    def _now(self) -> dict[str, int]:
        info = self.process.memory_full_info()
        return {
            "Shmem": meminfo("Shmem"),
            "Unevictable": meminfo("Unevictable"),
            "Mlocked": meminfo("Mlocked"),
            "rss": info.rss,
            "uss": info.uss,
            "shared": info.shared,
        }

    def are(self, **expected: int) -> bool:
        """Whether each counter has grown by the given amount; 0 for those that are not given."""
        wanted = {name: expected.get(name, 0) for name in self.before}
        self.seen: dict[str, int] = {}

        def near() -> bool:
            now = self._now()
            self.seen = {name: now[name] - self.before[name] for name in now}
            return all(abs(self.seen[name] - wanted[name]) <= SLACK for name in wanted)

        return eventually(near)


@rule("account.allocated", "account.touched", "account.fds")
@pytest.mark.known_defect("notified-in-bytes")
def test_before_during_and_after(rig: Rig) -> None:
    """Private pages are unevictable memory of the system, not of a process; v9's also shmem."""
    costs, fds = Costs(), costs_of_fds()

    def holds(size: int) -> bool:
        shmem = size if rig.behaviour.shmem else 0
        return costs.are(Shmem=shmem, Unevictable=size)

    file = rig.file(BIG)
    slot = rig.bind(GPA, BIG, file)
    assert costs_of_fds() == fds + 1
    assert holds(0), costs.seen
    file.allocate(0, BIG // 2)
    assert holds(BIG // 2), costs.seen
    rig.guest.touch(GPA, PAGE, BIG // PAGE)
    assert holds(BIG), costs.seen
    file.punch_hole(0, BIG // 2)
    assert holds(BIG // 2), costs.seen
    slot.delete()
    assert holds(BIG // 2), costs.seen
    file.close()
    assert holds(0), costs.seen
    assert costs_of_fds() == fds


def costs_of_fds() -> int:
    return psutil.Process().num_fds()


@rule("account.blocks")
@pytest.mark.known_defect("fstat")
@only("restrictedmem")
def test_blocks(rig: Rig) -> None:
    """st_blocks counts the pages that the file has; st_size does not."""
    file = rig.file(MIB)
    rig.bind(GPA, MIB, file)

    def allocated() -> int:
        return os.fstat(file.fileno()).st_blocks * 512

    assert (os.fstat(file.fileno()).st_size, allocated()) == (MIB, 0)
    file.allocate(0, 16 * PAGE)
    assert allocated() == 16 * PAGE
    rig.guest.touch(GPA + 16 * PAGE, PAGE, 16)
    assert allocated() == 32 * PAGE
    file.punch_hole(8 * PAGE, 16 * PAGE)
    assert allocated() == 16 * PAGE
    assert os.fstat(file.fileno()).st_size == MIB


@rule("account.memcg")
def test_charged_to_who_touches(rig: Rig) -> None:
    """Pages are charged to the cgroup of the process that allocates them, until they are freed."""
    file = rig.file(BIG)

    def allocate() -> tuple[int, int]:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        before = charged(group)
        fallocate(file, KEEP_SIZE, 0, BIG)
        during = charged(group)
        fallocate(file, HOLE, 0, BIG // 2)
        return during - before, charged(group) - before

    memory = Unevictable()
    with in_cgroup() as group:
        during, after = in_child(allocate)
        assert abs(during - BIG) < SLACK
        assert abs(after - BIG // 2) < SLACK
        assert memory.is_about(BIG // 2), "the file outlives who filled it"
        assert charged(group) > BIG // 2 - SLACK, "and so does the charge"
        file.punch_hole(0, BIG)
        assert eventually(lambda: charged(group) < SLACK)


def charged(group: Path) -> int:
    """Pages of files charged to a cgroup, in bytes."""
    lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(lines["file"])


def resident(memory: HostMemory) -> int:
    """How many bytes of the mapping are resident, by /proc/self/smaps."""
    start = f"{memory.userspace_addr:x}-"
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(start))
    rss = next(line for line in lines[at:] if line.startswith("Rss:"))
    return int(rss.split()[1]) * 1024


@rule("account.convert.tidy", "account.convert.keep")
@pytest.mark.known_defect("notified-in-bytes", "pages-not-zeroed")
@pytest.mark.parametrize("keep", [False, True], ids=["tidy", "keep"])
@two_backings
def test_conversion_and_what_it_frees(rig: Rig, keep: bool) -> None:
    """A conversion frees the pages that become unreachable; with keep=True both pages remain."""
    private_side = Unevictable()
    with HostMemory(BIG) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        file = rig.file(BIG)
        slot = rig.bind(GPA, BIG, file, memory=memory)
        start = resident(memory)  # guards beside it may be a part of the same mapping
        rig.guest.touch(GPA, PAGE, BIG // PAGE, byte=0x5A)
        assert private_side.is_about(BIG)
        assert resident(memory) == start

        def convert(gpa: int, size: int, *, to_private: bool) -> None:
            rig.abi.convert(rig.vm, gpa, size, private=to_private, keep=keep)

        convert(GPA, BIG, to_private=False)
        assert private_side.is_about(BIG if keep else 0)
        rig.guest.touch(GPA, PAGE, BIG // PAGE, byte=0x6B)
        assert resident(memory) - start == BIG
        assert private_side.is_about(BIG if keep else 0), "no page is held twice"

        convert(GPA + BIG // 2, BIG // 2, to_private=True)
        assert resident(memory) - start == (BIG if keep else BIG // 2)
        seen = rig.guest.load(GPA + BIG // 2, 1)
        assert seen == (0x5A if keep else 0), "what was freed is zeros"
        assert rig.guest.load(GPA + BIG // 2 - PAGE, 1) == 0x6B, "the rest is as it was"
        rig.guest.touch(GPA + BIG // 2, PAGE, BIG // 2 // PAGE, byte=0x7C)
        assert private_side.is_about(BIG if keep else BIG // 2)
        assert resident(memory) - start == (BIG if keep else BIG // 2)
        slot.delete()
        file.close()
        assert private_side.is_about(0)
