"""Reads /proc and KVM's statistics.  Nothing is changed, and no descriptor is taken over.

A descriptor that was copied from another process (pidfd_getfd) would keep its VM alive, and no
ioctl would answer: KVM refuses those of any process but the VM's creator (kvm_vm_ioctl, EIO).
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable, Iterable

from .. import libc, processes, procfs
from ..processes import GUEST_MEMFD, RESTRICTEDMEM, About, Descriptor, Kind, Mapping
from .owners import assign
from .records import Holder, Limits, OpenFile, Process, Snapshot, Statistics

__all__ = ["NotIdentifiedError", "ProcError", "identify", "snapshot", "statistics"]

#: The inode of the first PID namespace (<linux/proc_ns.h>, PROC_PID_INIT_INO).
_FIRST_NAMESPACE = "pid:[4026531836]"
#: Bytes that a counter of KVM's statistics stands for.
_PAGES = {"pages_4k": 1 << 12, "pages_2m": 1 << 21, "pages_1g": 1 << 30}

Compare = Callable[[int, int, int, int], int]


class ProcError(Exception):
    """/proc can't be read."""


class NotIdentifiedError(Exception):
    """kcmp(2) is not there, or not permitted."""


def _compare(one: Descriptor, other: Descriptor, kcmp: Compare) -> int:
    """0 if both lead to one open file, 1 and 2 for an order, less than 0 if one of them is gone."""
    answer = kcmp(one.pid, one.fd, other.pid, other.fd)
    if answer < 0 and -answer not in (_errno.ESRCH, _errno.EBADF):
        raise NotIdentifiedError(os.strerror(-answer))
    return answer


def identify(
    descriptors: Iterable[Descriptor], kcmp: Compare = libc.kcmp_file
) -> list[list[Descriptor]]:
    """Group the descriptors by the open file that they lead to.

    Descriptors that are closed meanwhile are left out.  NotIdentifiedError if kcmp(2) can't tell.
    """
    groups: list[list[Descriptor]] = []
    by_kind: dict[tuple[Kind, int | None], list[list[Descriptor]]] = {}
    for descriptor in descriptors:
        ordered = by_kind.setdefault((descriptor.kind, descriptor.vcpu), [])
        low, high = 0, len(ordered)
        while low < high:
            middle = (low + high) // 2
            answer = _compare(ordered[middle][0], descriptor, kcmp)
            if answer == 0:
                ordered[middle].append(descriptor)
                break
            if answer == 1:
                low = middle + 1
            elif answer == 2:
                high = middle
            elif _compare(descriptor, descriptor, kcmp):
                break  # it is gone
            else:
                ordered[middle].pop(0)  # the other one is gone
                if not ordered[middle]:
                    groups.remove(ordered.pop(middle))
                    high -= 1
        else:
            if _compare(descriptor, descriptor, kcmp) == 0:
                ordered.insert(low, [descriptor])
                groups.append(ordered[low])
    return groups


def statistics(debugfs: str = "/sys/kernel/debug") -> tuple[list[Statistics], str]:
    """KVM's records of all VMs, and whether they could be read (one of `records.STATISTICS`)."""
    if procfs.link("/proc/self/ns/pid") != _FIRST_NAMESPACE:
        return [], "another PID namespace"  # the names have numbers of the first one
    try:
        names = os.listdir(f"{debugfs}/kvm")
    except PermissionError:
        return [], "not permitted"
    except OSError:
        # Without KVM there is nothing to read in a debugfs that is mounted.
        return [], "read" if procfs.names(debugfs) else "not mounted"
    found = []
    for name in names:
        task, _, fd = name.partition("-")
        if task.isdecimal() and fd.isdecimal():
            record = _statistics(f"{debugfs}/kvm/{name}", int(task), int(fd))
            found += [record] if record else []
    return sorted(found), "read"


def _statistics(folder: str, task: int, fd: int) -> Statistics | None:
    """The record of a VM, None if the VM has ended meanwhile."""
    counters = [procfs.number(procfs.read(f"{folder}/{name}")) for name in _PAGES]
    try:
        # The folder gets a new time with each vCPU, a file in it does not.
        created = os.stat(f"{folder}/pages_4k").st_mtime  # noqa: PTH116
    except OSError:
        try:
            created = os.stat(folder).st_mtime  # noqa: PTH116
        except OSError:
            return None
    mapped = None
    if None not in counters:
        sizes = zip(counters, _PAGES.values(), strict=True)
        mapped = sum((count or 0) * size for count, size in sizes)
    numbers = (
        name.removeprefix("vcpu") for name in procfs.names(folder) if name.startswith("vcpu")
    )
    status = procfs.fields(procfs.read(f"/proc/{task}/status"))
    ended = status.get("State", "Z")[0] in "ZX"
    group = None if ended else procfs.number(status.get("Tgid"))
    vcpus = tuple(sorted(int(number) for number in numbers if number.isdecimal()))
    return Statistics(task, fd, created, vcpus, mapped, group)


def _hides_processes() -> bool:
    """Whether /proc may leave out processes of other users (hidepid, proc(5))."""
    lines = (line.split() for line in (procfs.read("/proc/self/mountinfo") or "").splitlines())
    options = [fields[-1].split(",") for fields in lines if fields[4] == "/proc"]
    hiding = {f"hidepid={value}" for value in ("2", "4", "invisible", "ptraceable")}
    return bool(os.geteuid() and options and hiding.intersection(options[-1]))


def _open_files(
    groups: list[list[Descriptor]], maps: list[Mapping], *, stat_restricted: bool
) -> list[OpenFile]:
    """The files, with their sizes and with the mappings of them."""
    files = []
    for group in groups:
        kind, vcpu, pid, fd = group[0].kind, group[0].vcpu, group[0].pid, group[0].fd
        holders = [Holder(descriptor.pid, descriptor.fd) for descriptor in group]
        inode = size = allocated = None
        if kind.private:
            inode = procfs.number(procfs.fields(procfs.read(f"/proc/{pid}/fdinfo/{fd}")).get("ino"))
        if kind is GUEST_MEMFD or (kind is RESTRICTEDMEM and stat_restricted):
            try:
                found = os.stat(f"/proc/{pid}/fd/{fd}")  # noqa: PTH116
            except OSError:
                pass
            else:
                inode, size = found.st_ino, found.st_size
                # guest_memfd counts no blocks in the kernels that are known; shmem does.
                counts = kind is RESTRICTEDMEM or found.st_blocks
                allocated = found.st_blocks * 512 if counts else None
        files.append(OpenFile(0, kind, vcpu, tuple(holders), inode, size, allocated))
    for mapping in maps:
        _add_mapping(files, mapping)
    files.sort(key=lambda file: min((pid, -1 if fd is None else fd) for pid, fd in file.holders))
    return [file._replace(number=number) for number, file in enumerate(files, 1)]


def _add_mapping(files: list[OpenFile], mapping: Mapping) -> None:
    """Add a mapping to the file that it maps, or to a file that no descriptor leads to."""
    size = mapping.size if mapping.kind.private else 0
    inode = mapping.inode if mapping.kind.private else None
    holder = Holder(mapping.pid, None)
    alike = [
        at
        for at, file in enumerate(files)
        if (file.kind, file.vcpu) == (mapping.kind, mapping.vcpu)
        and (file.inode == inode if inode else mapping.pid in file.pids)
    ]
    if len(alike) == 1:
        file = files[alike[0]]
        files[alike[0]] = file._replace(
            holders=tuple(dict.fromkeys((*file.holders, holder))), mapped=file.mapped + size
        )
    elif not alike:
        files.append(OpenFile(0, mapping.kind, mapping.vcpu, (holder,), inode, mapped=size))


def snapshot(device: str = "/dev/kvm", *, stat_restricted: bool = False) -> Snapshot:
    """Find who has KVM, VMs and private memory open.  ProcError if /proc can't be read.

    `stat_restricted` also reads the sizes of memfd_restricted files: a stat of such a file crashes
    a kernel that has the v9 series as posted.
    """
    try:
        scan = processes.scan(device=device)
    except OSError as error:
        raise ProcError(f"/proc: {error.strerror}") from None
    shown = procfs.link("/proc/self")
    if shown is None:
        raise ProcError("/proc does not show this process: mount it (mount -t proc proc /proc)")
    about: dict[int, About | None] = {}

    def running(pid: int) -> bool:
        if pid not in about:
            about[pid] = processes.about(pid)
        return about[pid] is not None

    descriptors = [
        descriptor for pid, found in scan.found.items() if running(pid) for descriptor in found
    ]
    maps = [mapping for pid in scan.pids for mapping in processes.mappings(pid) if running(pid)]
    try:
        if shown != str(os.getpid()):
            raise NotIdentifiedError("the numbers of /proc are those of another PID namespace")
        groups, identified = identify(descriptors), True
    except NotIdentifiedError:
        groups, identified = [[descriptor] for descriptor in descriptors], False
    files = _open_files(groups, maps, stat_restricted=stat_restricted)
    records, readable = statistics()
    for record in records:
        if record.group is not None:
            running(record.group)
    there = {pid: found for pid, found in about.items() if found}
    users = {holder.pid for file in files for holder in file.holders}
    return Snapshot(
        f"{os.uname().release} {os.uname().machine}",
        os.path.lexists(device),
        tuple(Process(pid, there[pid]) for pid in sorted(users)),
        tuple(files),
        tuple(assign(files, records, there)),
        Limits(
            len(scan.unreadable),
            _hides_processes(),
            procfs.link("/proc/self/ns/pid") != _FIRST_NAMESPACE,
            identified,
            readable,
            os.geteuid() == 0,
        ),
        procfs.kib(procfs.fields(procfs.read("/proc/meminfo")).get("Unevictable")),
    )
