"""What was found: processes, open files and VMs.  Nothing here asks the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..processes import About, Kind
    from .documents import (
        CreatorDocument,
        HolderDocument,
        LimitsDocument,
        SnapshotDocument,
        TotalsDocument,
    )

__all__ = [
    "SCHEMA_VERSION",
    "STATISTICS",
    "Creator",
    "Holder",
    "Limits",
    "OpenFile",
    "Process",
    "Snapshot",
    "Statistics",
    "VirtualMachine",
    "total",
]

SCHEMA_VERSION = 1

#: Whether KVM's statistics could be read, and if not, why.
STATISTICS = ("read", "not mounted", "not permitted", "another PID namespace")


class Holder(NamedTuple):
    """A reference to an open file by process `pid`: a descriptor, or a mapping if `fd` is None."""

    pid: int
    fd: int | None

    def to_json(self) -> HolderDocument:
        """The reference in the document of ``--json``."""
        return {"pid": self.pid, "fd": self.fd}


class OpenFile(NamedTuple):
    """An open file of KVM or of private memory, with all references to it that were found.

    `number` tells the files of a snapshot apart.  `size` and `allocated` are in bytes, None for
    other files than those of private memory, and where the kernel does not report them.  `mapped`
    is how many bytes of it processes have mapped.
    """

    number: int
    kind: Kind
    vcpu: int | None
    holders: tuple[Holder, ...]
    inode: int | None = None
    size: int | None = None
    allocated: int | None = None
    mapped: int = 0

    @property
    def pids(self) -> set[int]:
        """The processes that have it open or mapped."""
        return {holder.pid for holder in self.holders}


class Creator(NamedTuple):
    """The process that made a VM.  `name` is None, and `ended` is True, if it no longer runs.

    `pid` is a thread's number if a thread that has ended made the VM: then `ended` is None if a
    process that ran already at that time holds the VM, which may be the thread's own.
    """

    pid: int
    name: str | None
    ended: bool | None


class Statistics(NamedTuple):
    """KVM's own record of a VM: ``/sys/kernel/debug/kvm/TASK-FD``.

    `task` made the VM and got descriptor `fd`, at the time `created` (seconds since the epoch).
    `group` is the process of that task, None if there is no such task any more.  `mapped` is how
    many bytes the VM's page tables map, private and shared memory together; None if not reported.
    """

    task: int
    fd: int
    created: float
    vcpus: tuple[int, ...]
    mapped: int | None
    group: int | None


class VirtualMachine(NamedTuple):
    """A VM.

    `files` are those that belong to it, as far as that is known.  `creator` and `mapped` come from
    KVM's statistics and are None without them; with `by_elimination` they were assigned because
    one VM and one record were left.
    """

    number: int
    files: tuple[OpenFile, ...]
    vcpus: tuple[int, ...]
    creator: Creator | None = None
    mapped: int | None = None
    by_elimination: bool = False

    @property
    def opened(self) -> bool:
        """Whether a process has the VM's own descriptor."""
        return any(file.kind.name == "vm" for file in self.files)

    @property
    def pins(self) -> tuple[tuple[OpenFile, Holder], ...]:
        """The references that keep it alive."""
        return tuple(
            (file, holder) for file in self.files if file.kind.pins_vm for holder in file.holders
        )

    @property
    def left_behind(self) -> bool:
        """Whether it is kept alive without its creator.

        The creator has ended, or has no reference any more; or, where the creator is not known, no
        process that could be inspected has the VM's own descriptor or a vCPU mapped.
        """
        pids = {holder.pid for _, holder in self.pins}
        if self.creator:
            return bool(self.creator.ended) or (
                self.creator.ended is False and bool(pids) and self.creator.pid not in pids
            )
        run = any(holder.fd is None for file, holder in self.pins if file.kind.name == "vcpu")
        return bool(pids) and not (self.opened or run)

    @property
    def others(self) -> tuple[tuple[OpenFile, Holder], ...]:
        """The references of other processes than the creator, if it still has one."""
        if self.creator is None or self.left_behind:
            return ()
        return tuple(pin for pin in self.pins if pin[1].pid != self.creator.pid)


class Process(NamedTuple):
    """A process with KVM or private memory open."""

    pid: int
    about: About


class Limits(NamedTuple):
    """What the snapshot can't show.

    `unreadable` is the number of processes whose descriptors this user may not list; `hidden`
    whether /proc may hide processes of other users (hidepid); `namespace` whether this is not the
    host's first PID namespace, so that the processes outside it are not shown; `identified` whether
    kcmp(2) could tell which descriptors lead to the same file; `statistics` is one of STATISTICS;
    `root` whether the user was root.
    """

    unreadable: int
    hidden: bool
    namespace: bool
    identified: bool
    statistics: str
    root: bool


class Snapshot(NamedTuple):
    """All that was found at one time.

    `unassigned` are files that belong to one of several VMs.  `unevictable` is that line of
    /proc/meminfo in bytes, None if it can't be read.  `device` is whether KVM's node exists.
    """

    kernel: str
    device: bool
    processes: tuple[Process, ...]
    files: tuple[OpenFile, ...]
    vms: tuple[VirtualMachine, ...]
    limits: Limits
    unevictable: int | None

    @property
    def private(self) -> tuple[OpenFile, ...]:
        """The files of private memory."""
        return tuple(file for file in self.files if file.kind.private)

    def of(self, pid: int) -> Iterator[OpenFile]:
        """The files that a process has open or mapped."""
        return (file for file in self.files if pid in file.pids)

    def vm_of(self, file: OpenFile) -> VirtualMachine | None:
        """The VM that a file belongs to, None if that is not known."""
        return next((vm for vm in self.vms if file in vm.files), None)

    @property
    def totals(self) -> TotalsDocument:
        """The sums over all files of private memory, beside Unevictable."""
        private = self.private
        return {
            "files": len(private),
            "size": total(file.size for file in private),
            "mapped": sum(file.mapped for file in private),
            "allocated": total(file.allocated for file in private),
            "unevictable": self.unevictable,
        }

    def to_json(self) -> SnapshotDocument:
        """The document of ``--json``; ``schema.json`` describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kernel": self.kernel,
            "device": self.device,
            "processes": [
                {
                    "pid": process.pid,
                    "name": process.about.name,
                    "user": process.about.user,
                    "parent": process.about.parent,
                    "started": process.about.started,
                }
                for process in self.processes
            ],
            "files": [
                {
                    "file": file.number,
                    "kind": file.kind.name,
                    "vcpu": file.vcpu,
                    "vm": vm.number if (vm := self.vm_of(file)) else None,
                    "inode": file.inode,
                    "size": file.size,
                    "allocated": file.allocated,
                    "mapped": file.mapped if file.kind.private else None,
                    "holders": [holder.to_json() for holder in file.holders],
                }
                for file in self.files
            ],
            "vms": [
                {
                    "vm": vm.number,
                    "creator": vm.creator and cast("CreatorDocument", vm.creator._asdict()),
                    "by_elimination": vm.by_elimination,
                    "vcpus": list(vm.vcpus),
                    "mapped_in_guest": vm.mapped,
                    "left_behind": vm.left_behind,
                    "pinned_by": [
                        {"file": file.number, **holder.to_json()} for file, holder in vm.pins
                    ],
                }
                for vm in self.vms
            ],
            "totals": self.totals,
            "limits": cast("LimitsDocument", self.limits._asdict()),
        }


def total(sizes: Iterable[int | None]) -> int | None:
    """The sum of sizes, None if one of them is not known."""
    known = list(sizes)
    return None if None in known else sum(size or 0 for size in known)
