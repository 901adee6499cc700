"""The known defects of v9 as it was posted, those of mainline, and how a test reports one.

Properties of the ABI are not defects and not listed: a descriptor that is not close-on-exec, a file
size that slots are not checked against.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NoReturn

import pytest

__all__ = ["DEFECTS", "MAINLINE_DEFECTS", "Defect", "known_defect", "mainline_defect"]


@dataclass(frozen=True)
class Defect:
    """One defect.

    `number` is that of the review in which it was first described.  `dangerous` says what its
    detector does to a kernel that has it; it is empty if the detector is safe.  `needs` is the
    identifier of what the detector needs and some kernels lack.
    """

    name: str
    text: str
    number: int | None = None
    dangerous: str = ""
    needs: str = ""


#: `needs` of the detectors that run on the shadow MMU, and of those for a debug kernel.
SHADOW_MMU = "shadow-mmu"
DEBUG = ("atomic-sleep", "fault-injection", "kasan")

_ALL = (
    Defect(
        "notified-in-bytes",
        "fallocate notifies KVM in bytes instead of pages: a hole leaves freed memory mapped, or "
        "unmaps pages outside the hole",
        1,
    ),
    Defect("allocation-notified", "allocating pages unmaps them from the guest", 2),
    Defect(
        "failed-conversion-erases",
        "a conversion that fails half-way makes shared pages private",
        3,
        needs="fault-injection",
    ),
    Defect(
        "conversion-by-page", "a conversion needs memory and time for each page, under a lock", 3
    ),
    Defect(
        "private-fault-without-file",
        "a private access to a slot without a file dereferences a NULL file",
        4,
        dangerous="panic, NULL pointer dereference",
    ),
    Defect(
        "private-flag-cleared",
        "KVM_MEM_PRIVATE of a slot can be cleared, also by moving the slot without it",
        5,
        dangerous="use after free",
    ),
    Defect("no-page-spins", "a private page that can't be allocated makes the vCPU spin", 6),
    Defect("hole-before-binding", "a hole before the slot's part of the file unmaps the slot", 8),
    Defect(
        "fstat",
        "fstat, and every stat by /proc, passes shmem the inode of another file system",
        9,
        dangerous="panic, NULL pointer dereference; or memory corruption, or a hang",
    ),
    Defect("pages-migrate", "compaction moves private pages while the guest has them mapped", 9),
    Defect(
        "notifiers-unlocked",
        "a slot can be made or deleted between the start and the end of a hole",
        10,
        dangerous="BUG at the next MMU notifier, or vCPUs that spin as long as the VM lives",
    ),
    Defect("pages-not-zeroed", "fresh private pages have their previous content", 11),
    Defect("read-only-spins", "a write to a private page of a read-only slot spins", 12),
    Defect(
        "mixed-large-page",
        "a large page that is private in part is mapped as a whole: the guest reads private memory "
        "in its shared part",
        13,
    ),
    Defect(
        "far-conversion",
        "a conversion that reaches far beyond a small slot writes beyond the slot's arrays",
        14,
        dangerous="panic, page fault in kvm_arch_gfns_converted; or memory corruption",
    ),
    Defect("drop-caches", "writing to drop_caches frees pages that the guest has mapped"),
    Defect(
        "size-0-frees",
        "ftruncate to 0 of a file without a size frees pages and does not notify KVM",
    ),
    Defect("split-loses-pages", "a hole in a large page loses the pages beyond the file's size"),
    Defect(
        "fault-beside-hole",
        "a fault beside a hole in a large page also maps the hole (masked by notified-in-bytes)",
        dangerous="the guest keeps freed memory",
    ),
    Defect(
        "vm-closed-during-hole",
        "a VM that is closed while a hole is punched is still notified",
        dangerous="WARN, use after free",
    ),
    Defect(
        "invalidation-of-one-slot",
        "an invalidation of a host range behind two slots covers one of them: a vCPU that faults "
        "in the other one keeps a page that the host has freed (ordinary VMs, too)",
        15,
        dangerous="the guest keeps freed memory of the host",
    ),
    Defect(
        "private-prefetch",
        "the shadow MMU maps the neighbours of a private page from userspace_addr",
        16,
        needs=SHADOW_MMU,
    ),
    Defect(
        "large-page-misplaced",
        "a large page is mapped at the wrong place: the alignments of userspace_addr and "
        "restricted_offset are checked joined by OR",
        17,
    ),
    Defect(
        "allocation-clears",
        "allocating pages again clears a large page of which the guest has used another page than "
        "the first",
        18,
    ),
    Defect(
        "slot-unprepared",
        "the notifier is registered before the slot is prepared: a hole dereferences the NULL "
        "pointer to its rmaps",
        19,
        dangerous="panic, NULL pointer dereference",
        needs=SHADOW_MMU,
    ),
    Defect(
        "conversion-sleeps",
        "a conversion allocates memory under mmu_lock, and may have to wait for it there",
        19,
        needs="atomic-sleep",
    ),
    Defect(
        "failed-conversion-keeps-first",
        "a conversion that fails half-way leaves the first page of the range shared",
        19,
        needs="fault-injection",
    ),
    Defect(
        "kind-read-twice",
        "a fault reads the state of its page twice: with a conversion in between, KVM_RUN ends for "
        "an access that is right in both states",
        19,
    ),
    Defect(
        "path-outlives-file",
        "an O_PATH descriptor reaches what was freed with the last ordinary one",
        20,
        dangerous="use after free",
        needs="kasan",
    ),
)

DEFECTS = {defect.name: defect for defect in _ALL}


def known_defect(name: str, seen: str = "") -> NoReturn:
    """Fail the test with the name of a defect; `seen` describes what was observed."""
    defect = DEFECTS[name]
    text = f"known defect: {name}: {defect.text}{f' ({seen})' if seen else ''}"
    pytest.fail(text, pytrace=False)


@dataclass(frozen=True)
class MainlineDefect:
    """A defect of guest_memfd, which the test of its rule finds itself.

    `commit` ends it; "" if no release that is known here has it.  `kernels` are those of
    scripts/kernel that have it: in them the test is expected to fail.
    """

    name: str
    text: str
    commit: str
    kernels: tuple[str, ...]


#: The kernels of scripts/kernel that have guest_memfd.
OLD = ("guest_memfd-6.12", "guest_memfd-6.12-debug")
NEW = ("guest_memfd", "guest_memfd-debug")
IN_PLACE = ("guest_memfd-in-place", "guest_memfd-in-place-debug")

_MAINLINE = (
    MainlineDefect(
        "file-overlap-einval",
        "a range of the file in a second slot is EINVAL instead of EEXIST",
        "7ea987a90585",
        OLD,
    ),
    MainlineDefect(
        "signed-offset",
        "a slot may begin at the last page below 2^63 of its file, beyond any end of the file",
        "eba85fee7fc6",
        OLD,
    ),
    MainlineDefect(
        "attributes-unkillable",
        "a conversion of a huge range goes on after SIGKILL, page by page",
        "",
        (*OLD, *NEW, *IN_PLACE),
    ),
    MainlineDefect(
        "stale-mmio",
        "a private access where MMIO was before is reported as a fault of a shared one, each time",
        "",
        (*OLD, *NEW),
    ),
    MainlineDefect(
        "pre-fault-obsolete-root",
        "KVM_PRE_FAULT_MEMORY by a vCPU that never ran does not end after a slot was deleted",
        "20a6cff3b283",
        OLD,
    ),
    MainlineDefect(
        "pre-fault-of-deleted-slot",
        "KVM_PRE_FAULT_MEMORY and the deletion of its slot wait for each other until a signal "
        "comes, in VMs where a deletion leaves the other slots mapped (software-protected ones)",
        "3ccbf6f47098",
        OLD,
    ),
    MainlineDefect(
        "pre-fault-against-deletion",
        "KVM_PRE_FAULT_MEMORY and the deletion of any slot wait for each other until a signal "
        "comes, in VMs where a deletion unmaps all slots (default ones)",
        "",
        (*NEW, *IN_PLACE),
    ),
)

MAINLINE_DEFECTS = {defect.name: defect for defect in _MAINLINE}


def mainline_defect(name: str, seen: str) -> NoReturn:
    """End the test by the name of a defect.

    It is an expected failure, which `kvmpriv selftest` reports as a known defect, except on a
    kernel of scripts/kernel that is not known to have it: there it is a failure.
    """
    defect = MAINLINE_DEFECTS[name]
    ends = f"ended by commit {defect.commit}" if defect.commit else "not ended yet"
    text = f"known defect: {name}: {defect.text}, {ends} ({seen})"
    kernel = os.environ.get("KVMPRIV_KERNEL", "")
    if kernel and kernel not in defect.kernels:
        pytest.fail(text, pytrace=False)
    pytest.xfail(text)
