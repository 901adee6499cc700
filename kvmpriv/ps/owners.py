"""Which VM a file belongs to, and which process made the VM.  Nothing here asks the host.

/proc shows no such relation: all files of KVM have the same inode, and a link names no VM.  What
follows is from which processes have a file, and from KVM's statistics, which name the task that
made a VM and the descriptor that the task got for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..processes import VCPU, VM
from .records import Creator, OpenFile, Statistics, VirtualMachine

if TYPE_CHECKING:
    from ..processes import About

__all__ = ["assign"]

#: A process's start is known to a second (btime of /proc/stat), the VM's creation exactly.
_TOLERANCE = 1.0

Files = list[OpenFile]


def assign(
    files: Sequence[OpenFile], statistics: Sequence[Statistics], about: Mapping[int, About]
) -> list[VirtualMachine]:
    """The VMs, each with its files; files that may belong to several VMs are in none.

    `about` has the processes of the files and the groups of the statistics.
    """
    vms = _by_descriptor(files)
    records: list[tuple[Statistics | None, bool]] = [(None, False)] * len(vms)
    left = list(statistics)

    def take(record: Statistics, at: int, *, by_elimination: bool = False) -> None:
        records[at] = record, by_elimination
        left.remove(record)

    free = [at for at, _ in enumerate(vms)]
    for by_number_alone in (False, True):  # a child and a receiver may have the creator's number
        for record in tuple(left):
            fits = [
                at
                for at in free
                if records[at][0] is None and _fits(vms[at], record, by_number_alone)
            ]
            if len(fits) == 1:
                take(record, fits[0])
    for record in tuple(left):  # the creator has closed the VM itself, but has one of its files
        fits = [
            at
            for at in free
            if records[at][0] is None and any(record.group in file.pids for file in vms[at])
        ]
        if record.group is not None and len(fits) == 1:
            take(record, fits[0])
    free = [at for at in free if records[at][0] is None]
    if len(left) == len(free) == 1:
        take(left[0], free[0], by_elimination=True)
    vms += [[] for _ in left]
    records += [(record, False) for record in left]
    return [
        _machine(number, group, *record, about)
        for number, (group, record) in enumerate(zip(vms, records, strict=True), 1)
    ]


def _by_descriptor(files: Sequence[OpenFile]) -> list[Files]:
    """The files of each VM: by the VM's own descriptor, else by the processes that have them."""
    vms: list[Files] = [[file] for file in files if file.kind is VM]
    by_pid: dict[int, set[int]] = {}
    for at, (file,) in enumerate(vms):
        for pid in file.pids:
            by_pid.setdefault(pid, set()).add(at)
    unopened: dict[frozenset[int], Files] = {}
    for file in files:
        if file.kind is VM or not (file.kind.pins_vm or file.kind.private):
            continue
        sets = [by_pid[pid] for pid in file.pids if pid in by_pid]
        candidates = set.intersection(*sets) if sets else set()
        if len(candidates) == 1:
            vms[candidates.pop()].append(file)
        elif not sets:
            unopened.setdefault(frozenset(file.pids), []).append(file)
    # A file that does not pin a VM does not show that there is one.
    return vms + [group for group in unopened.values() if any(file.kind.pins_vm for file in group)]


def _fits(vm: Files, record: Statistics, by_number_alone: bool) -> bool:
    """Whether the VM's descriptor has the number that its creator got."""
    return any(
        holder.fd == record.fd and (by_number_alone or holder.pid == record.group)
        for file in vm
        if file.kind is VM
        for holder in file.holders
    )


def _machine(
    number: int,
    files: Files,
    record: Statistics | None,
    by_elimination: bool,
    about: Mapping[int, About],
) -> VirtualMachine:
    vcpus = {file.vcpu for file in files if file.kind is VCPU and file.vcpu is not None}
    return VirtualMachine(
        number,
        tuple(files),
        tuple(sorted(vcpus.union(record.vcpus if record else ()))),
        _creator(record, files, about) if record else None,
        record.mapped if record else None,
        by_elimination,
    )


def _creator(record: Statistics, files: Files, about: Mapping[int, About]) -> Creator:
    """The creator.  Its number may have been given to another process since."""

    def age(pid: int) -> float:
        """How many seconds before the VM the process began; negative if it began later."""
        return record.created - about[pid].started if pid in about else -_TOLERANCE

    if record.group is not None and record.group in about and age(record.group) >= -_TOLERANCE:
        return Creator(record.group, about[record.group].name, ended=False)
    # The task may have been a thread of a process that still runs.  A thread's number is given out
    # after that of its process; a child's is given out after that of the thread that forks.
    pids = {pid for file in files for pid in file.pids}
    unclear = any(
        age(pid) > _TOLERANCE or (age(pid) >= -_TOLERANCE and pid < record.task) for pid in pids
    )
    return Creator(record.task, None, ended=None if unclear else True)
