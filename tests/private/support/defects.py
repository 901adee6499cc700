"""The known defects of v9 as it was posted: their names, what they are, how a test reports them.

The numbers are those of the list from which they come; there is no 7.  What is not here is no
defect but how the ABI is: a descriptor that is not close-on-exec, a file size that nobody checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import pytest

__all__ = ["DEFECTS", "Defect", "known_defect"]


@dataclass(frozen=True)
class Defect:
    """`dangerous`: what looking for it does to a kernel that has it; empty where it is safe.

    `needs` is what the look needs that not every kernel has.
    """

    name: str
    text: str
    number: int | None = None
    dangerous: str = ""
    needs: str = ""


_ALL = (
    Defect(
        "notified-in-bytes",
        "fallocate tells of bytes where pages are meant: a hole leaves the guest freed memory, or "
        "takes mappings that it has no part in",
        1,
    ),
    Defect("allocation-notified", "allocating pages takes the guest's mappings away", 2),
    Defect(
        "failed-conversion-erases",
        "a conversion that fails half-way leaves private what had been shared",
        3,
        needs="fault-injection",
    ),
    Defect("conversion-by-page", "a conversion takes memory and time by the page, under a lock", 3),
    Defect(
        "private-fault-without-file",
        "a guest that wants private memory where the slot has no file gets a page of no file",
        4,
        dangerous="panic, NULL pointer dereference",
    ),
    Defect(
        "private-flag-cleared",
        "clearing KVM_MEM_PRIVATE of a slot, or moving it without, is allowed",
        5,
        dangerous="use after free",
    ),
    Defect("no-page-spins", "a private page that can't be had makes the vCPU spin", 6),
    Defect("hole-before-binding", "a hole before what a slot has of the file unmaps the slot", 8),
    Defect(
        "fstat",
        "fstat, and any stat by /proc, has shmem take another file system's inode for its own",
        9,
        dangerous="panic, NULL pointer dereference; or memory corruption, or a hang",
    ),
    Defect("pages-migrate", "compaction moves private pages away from under their guest", 9),
    Defect(
        "notifiers-unlocked",
        "a slot can come or go between the start and the end of a hole",
        10,
        dangerous="BUG at the next MMU notifier, or vCPUs that spin as long as the VM lives",
    ),
    Defect("pages-not-zeroed", "fresh private pages hold what was in them before", 11),
    Defect("read-only-spins", "a write to a private page of a read-only slot spins", 12),
    Defect(
        "mixed-large-page",
        "a large page that is private in part is mapped as a whole: the guest gets private memory "
        "where it is shared",
        13,
    ),
    Defect(
        "far-conversion",
        "a conversion that reaches far beyond a small slot writes behind the slot's arrays",
        14,
        dangerous="panic, page fault in kvm_arch_gfns_converted; or memory corruption",
    ),
    Defect("drop-caches", "writing to drop_caches frees pages that the guest has mapped"),
    Defect("size-0-frees", "ftruncate to 0 of a file without a size frees pages and tells nobody"),
    Defect("split-loses-pages", "a hole in a large page loses what is beyond the file's size"),
    Defect(
        "fault-beside-hole",
        "a fault beside a hole in a large page maps the hole, too (hidden by notified-in-bytes)",
        dangerous="the guest keeps freed memory",
    ),
    Defect(
        "vm-closed-during-hole",
        "a VM that goes while a hole is punched still hears of it",
        dangerous="WARN, use after free",
    ),
    Defect(
        "path-outlives-file",
        "an O_PATH descriptor reaches what went with the last ordinary one",
        dangerous="use after free",
    ),
)

DEFECTS = {defect.name: defect for defect in _ALL}


def known_defect(name: str, seen: str = "") -> NoReturn:
    """Fail the test, naming the defect of DEFECTS; `seen` is what has shown it."""
    defect = DEFECTS[name]
    text = f"known defect: {name}: {defect.text}{f' ({seen})' if seen else ''}"
    pytest.fail(text, pytrace=False)
