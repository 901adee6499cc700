"""The parts of the document of ``kvmpriv ps --json``, as ``schema.json`` describes them.

For annotations: nothing imports this module when it runs.
"""

from __future__ import annotations

from typing import TypedDict

__all__ = [
    "CreatorDocument",
    "FileDocument",
    "HolderDocument",
    "LimitsDocument",
    "PinDocument",
    "ProcessDocument",
    "SnapshotDocument",
    "TotalsDocument",
    "VmDocument",
]


class ProcessDocument(TypedDict):
    """A process.  `started` is in seconds since the epoch."""

    pid: int
    name: str
    user: str
    parent: int
    started: float


class HolderDocument(TypedDict):
    """A reference to a file: a descriptor, or a mapping if `fd` is None."""

    pid: int
    fd: int | None


class PinDocument(HolderDocument):
    """A reference to a file that keeps a VM alive."""

    file: int


class FileDocument(TypedDict):
    """An open file; sizes in bytes, None where they do not apply or are not reported."""

    file: int
    kind: str
    vcpu: int | None
    vm: int | None
    inode: int | None
    size: int | None
    allocated: int | None
    mapped: int | None
    holders: list[HolderDocument]


class CreatorDocument(TypedDict):
    """The process that made a VM; `ended` is None if that is not known."""

    pid: int
    name: str | None
    ended: bool | None


class VmDocument(TypedDict):
    """A VM; `mapped_in_guest` in bytes."""

    vm: int
    creator: CreatorDocument | None
    by_elimination: bool
    vcpus: list[int]
    mapped_in_guest: int | None
    left_behind: bool
    pinned_by: list[PinDocument]


class TotalsDocument(TypedDict):
    """The sums over all files of private memory, and Unevictable of /proc/meminfo, in bytes."""

    files: int
    size: int | None
    mapped: int
    allocated: int | None
    unevictable: int | None


class LimitsDocument(TypedDict):
    """What could not be seen."""

    unreadable: int
    hidden: bool
    namespace: bool
    identified: bool
    statistics: str
    root: bool


class SnapshotDocument(TypedDict):
    """The document of ``kvmpriv ps --json``."""

    schema_version: int
    kernel: str
    device: bool
    processes: list[ProcessDocument]
    files: list[FileDocument]
    vms: list[VmDocument]
    totals: TotalsDocument
    limits: LimitsDocument
