"""The descriptors of KVM and of private memory that processes have open, read from /proc.

Only links are read, and they are never followed: a stat of a memfd_restricted file can crash a
kernel that has the v9 series as posted (scripts/kernel/README.md, the defect "fstat").
"""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = [
    "DEVICE",
    "GUEST_MEMFD",
    "KINDS",
    "RESTRICTEDMEM",
    "STATISTICS",
    "VCPU",
    "VM",
    "VM_DEVICE",
]
__all__ += ["About", "Descriptor", "Kind", "Mapping", "Scan"]
__all__ += ["about", "classify", "mappings", "scan"]

_PF_KTHREAD = 0x0020_0000  # <linux/sched.h>; field 9 of /proc/PID/stat, see proc_pid_stat(5)


class Kind(NamedTuple):
    """What a descriptor leads to.

    `pins_vm`: while it is open, the VM exists.  `private`: it is a file of private memory.
    """

    name: str
    title: str
    pins_vm: bool = True
    private: bool = False


DEVICE = Kind("device", "KVM's device", pins_vm=False)
VM = Kind("vm", "VM")
VCPU = Kind("vcpu", "vCPU")
#: Of KVM_GET_STATS_FD.  It pins the VM from Linux 6.5 on, and in older stable kernels with commit
#: eed3013faa40 ("KVM: Grab a reference to KVM for VM and vCPU stats file descriptors").
STATISTICS = Kind("statistics", "statistics")
#: Of KVM_CREATE_DEVICE, as kvm-vfio.
VM_DEVICE = Kind("vm_device", "device of a VM")
#: The file pins its VM; a slot does not pin the file (virt/kvm/guest_memfd.c, kvm_gmem_bind).
GUEST_MEMFD = Kind("guest_memfd", "guest_memfd", private=True)
#: The other way round: a slot pins the file, and the file pins no VM.
RESTRICTEDMEM = Kind("restrictedmem", "memfd_restricted", pins_vm=False, private=True)

KINDS = (DEVICE, VM, VCPU, STATISTICS, VM_DEVICE, GUEST_MEMFD, RESTRICTEDMEM)

_LINKS = {
    "anon_inode:kvm-vm": VM,
    "anon_inode:kvm-vm-stats": STATISTICS,
    "anon_inode:[kvm-gmem]": GUEST_MEMFD,  # Linux 6.8 to 6.18
    "/[kvm-gmem] (deleted)": GUEST_MEMFD,  # later kernels: an inode of a file system of its own
    "/restrictedmem (deleted)": RESTRICTEDMEM,
}


class Descriptor(NamedTuple):
    """An open descriptor of process `pid`.

    `vcpu` is the number of the vCPU for a descriptor of a vCPU or of its statistics, else None.
    """

    pid: int
    fd: int
    kind: Kind
    vcpu: int | None = None


class Mapping(NamedTuple):
    """A mapping of such a file by process `pid`: a reference to the file, as a descriptor is.

    `inode` tells files of private memory apart; all other files share one.  `size` is in bytes.
    """

    pid: int
    kind: Kind
    vcpu: int | None
    inode: int
    size: int


class About(NamedTuple):
    """A process: its name with its exact bytes (surrogateescape), user and parent.

    `started` is the time of its start in seconds since the epoch, right to a second.
    """

    name: str
    user: str
    parent: int
    started: float


class Scan(NamedTuple):
    """The descriptors by process; processes without any are absent.

    `unreadable` are the processes whose descriptors this user may not list, without kernel threads,
    which have none.  `pids` are all processes and kernel threads that /proc shows.
    """

    found: dict[int, list[Descriptor]]
    unreadable: list[int]
    pids: list[int]


def classify(link: str) -> tuple[Kind, int | None] | None:
    """What the link of a descriptor leads to, and the number of the vCPU; None for other files.

    A device node is recognised by a path that ends with ``/dev/kvm``: in a container or a chroot
    it may be below other folders.
    """
    if kind := _LINKS.get(link):
        return kind, None
    if link.startswith("anon_inode:kvm-"):
        name, _, number = link[len("anon_inode:kvm-") :].partition(":")
        vcpu = int(number) if number.isdecimal() else None
        if name == "vcpu":
            return VCPU, vcpu
        return (STATISTICS if name == "vcpu-stats" else VM_DEVICE), vcpu
    if link.removesuffix(" (deleted)").endswith("/dev/kvm"):
        return DEVICE, None
    return None


def scan(proc: str = "/proc", device: str = "/dev/kvm") -> Scan:
    """Find the processes that have KVM, VMs or private memory open.

    `device` is one more path of KVM's device node.  Processes and descriptors that vanish while
    they are read are left out.  OSError if `proc` can't be listed.
    """
    node = os.path.realpath(device)
    found: dict[int, list[Descriptor]] = {}
    unreadable: list[int] = []
    pids = [int(entry.name) for entry in os.scandir(proc) if entry.name.isdecimal()]
    for pid in pids:
        try:
            descriptors = _descriptors(pid, f"{proc}/{pid}/fd", node)
        except PermissionError:
            if not _is_kernel_thread(f"{proc}/{pid}/stat"):
                unreadable.append(pid)
        except OSError:  # the process has ended
            continue
        else:
            if descriptors:
                found[pid] = descriptors
    return Scan(found, unreadable, pids)


def _descriptors(pid: int, folder: str, node: str) -> list[Descriptor]:
    """The descriptors in a folder ``/proc/PID/fd``, by number."""
    found = []
    readlink, names = os.readlink, os.listdir(folder)
    for name in names:
        try:
            link = readlink(f"{folder}/{name}")
        except FileNotFoundError:  # it was closed
            continue
        # Nearly all links fail this test, which is faster than to classify them.
        if "kvm" not in link and "restrictedmem" not in link and link != node:
            continue
        kind = classify(link) or ((DEVICE, None) if link == node else None)
        if kind:
            found.append(Descriptor(pid, int(name), *kind))
    return sorted(found, key=lambda descriptor: descriptor.fd)


def _is_kernel_thread(stat: str) -> bool:
    try:
        with open(stat, "rb") as file:  # noqa: PTH123  # Path is slower
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return len(fields) > 6 and bool(int(fields[6]) & _PF_KTHREAD)


def about(pid: int) -> About | None:
    """What /proc reports about a process to everybody; None if it has ended or is hidden."""
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return About(process.name(), process.username(), process.ppid(), process.create_time())
    except psutil.Error:
        return None


def mappings(pid: int, proc: str = "/proc") -> list[Mapping]:
    """The mappings of KVM's files and of private memory; none if this user may not list them."""
    try:
        with open(f"{proc}/{pid}/maps", "rb") as file:  # noqa: PTH123  # Path is slower
            text = file.read()
    except OSError:
        return []
    found = []
    if b"kvm" in text:  # nearly all processes end here
        for line in text.splitlines():
            # Start and end, permissions, offset, device, inode, path: proc_pid_maps(5).
            fields = line.split(None, 5)
            kind = classify(os.fsdecode(fields[5])) if len(fields) > 5 else None
            if kind:
                start, _, end = fields[0].partition(b"-")
                size = int(end, 16) - int(start, 16)
                found.append(Mapping(pid, *kind, int(fields[4]), size))
    return found
