"""Facts about the host, read from /proc, /sys and KVM; no verdict follows from them.

They explain a refusal: each function that says why something is missing takes facts as data.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

from .. import libc, procfs
from ..terminal import format_size

if TYPE_CHECKING:
    from ..kvm import Kvm
    from .documents import Holder, Holders, HostFacts, VcpuLimits

__all__ = [
    "add_kvm_facts",
    "device_hint",
    "facts",
    "holders",
    "in_place_hint",
    "refusal_hint",
    "shortage_hint",
    "why_not_offered",
]

# CPUID: AMD APM volume 3, Fn8000_0001_ECX; Intel SDM volume 2, leaf 1.
_SVM = (0x80000001, 1 << 2)
_VMX = (1, 1 << 5)

#: What KVM itself or confidential computing shows in /proc/cpuinfo's flags.
_CPU_FLAGS = ("svm", "vmx", "sme", "sev", "sev_es", "sev_snp", "tdx_host_platform")
_PARAMETERS = {
    "kvm": ("gmem_in_place_conversion", "tdp_mmu"),
    "kvm_amd": ("nested", "npt", "sev", "sev_es", "sev_snp"),
    "kvm_intel": ("ept", "nested", "tdx"),
}


def facts(root: str = "") -> HostFacts:
    """What can be said without KVM; None where the host doesn't tell.

    `root` is put before /proc, /sys and /dev: for a host that was recorded.
    """
    sys_module, proc = f"{root}/sys/module", f"{root}/proc"
    uname = os.uname()
    memory = procfs.fields(procfs.read(f"{proc}/meminfo"))
    pages = f"{root}/sys/kernel/mm"
    transparent = procfs.read(f"{pages}/transparent_hugepage/enabled") or ""
    enforce = procfs.read(f"{root}/sys/fs/selinux/enforce")
    parameters = {
        f"{module}.{name}": procfs.read(f"{sys_module}/{module}/parameters/{name}")
        for module, names in _PARAMETERS.items()
        for name in names
    }
    # One read of some kilobytes has the first CPU; a big host takes long to print the whole file.
    first_cpu = (procfs.read(f"{proc}/cpuinfo", 8192) or "").split("\n\n")[0]
    flags = set(procfs.fields(first_cpu).get("flags", "").split())
    sev = f"{root}/dev/sev"
    return {
        "kernel": f"{uname.release} {uname.machine}",
        "kvm_loaded": os.access(f"{sys_module}/kvm", os.F_OK),
        "kvm_registered": procfs.read(f"{root}/sys/class/misc/kvm/dev"),
        "backend": {
            name: "module" if os.access(f"{sys_module}/{name}/initstate", os.F_OK) else "built in"
            for name in procfs.names(sys_module)
            if name.startswith("kvm_")
        },
        "parameters": {name: value for name, value in parameters.items() if value is not None},
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "dev_sev": os.access(sev, os.R_OK | os.W_OK) if os.access(sev, os.F_OK) else None,
        "seccomp": procfs.number(procfs.fields(procfs.read(f"{proc}/self/status")).get("Seccomp")),
        "selinux": {"1": "enforcing", "0": "permissive"}.get(enforce or ""),
        "apparmor": procfs.read(f"{proc}/self/attr/apparmor/current"),
        "memory": {
            "total": procfs.kib(memory.get("MemTotal")),
            "free": procfs.kib(memory.get("MemFree")),
            "available": procfs.kib(memory.get("MemAvailable")),
        },
        "hugepages": [
            {
                "size": size * 1024,
                "total": procfs.number(procfs.read(f"{pages}/hugepages/{name}/nr_hugepages")),
                "free": procfs.number(procfs.read(f"{pages}/hugepages/{name}/free_hugepages")),
            }
            for name in procfs.names(f"{pages}/hugepages")
            if (size := procfs.number(name[len("hugepages-") :].replace("kB", ""))) is not None
        ],
        "transparent_hugepages": transparent.partition("[")[2].partition("]")[0] or None,
        "nesting": None,
        "vcpus": None,
        "memory_slots": None,
    }


def add_kvm_facts(host: HostFacts, system: Kvm) -> None:
    """Fill in what KVM reports about itself: nesting, and its limits."""
    from ..cdefs import kvm as kvm_h

    try:
        ecx = {leaf.function: leaf.ecx for leaf in system.get_supported_cpuid() if leaf.index == 0}
        nesting = [
            name for name, (leaf, bit) in (("svm", _SVM), ("vmx", _VMX)) if ecx.get(leaf, 0) & bit
        ]
    except OSError:
        nesting = None
    vcpus: VcpuLimits = {
        "recommended": system.check_extension(kvm_h.KVM_CAP_NR_VCPUS),
        "max": system.check_extension(kvm_h.KVM_CAP_MAX_VCPUS),
        "max_id": system.check_extension(kvm_h.KVM_CAP_MAX_VCPU_ID),
    }
    memory_slots = system.check_extension(kvm_h.KVM_CAP_NR_MEMSLOTS)
    host["nesting"], host["vcpus"], host["memory_slots"] = nesting, vcpus, memory_slots


def _confinement(host: HostFacts, what: str) -> list[str]:
    """Security modules that are active here and may have refused the call, each with a hint."""
    hints = []
    if host["seccomp"]:
        hints.append(f"a seccomp filter is active (Seccomp in /proc/self/status): let {what} pass")
    if host["selinux"] == "enforcing":
        hints.append("SELinux is enforcing: ausearch -m avc -ts recent")
    if (host["apparmor"] or "unconfined") != "unconfined":
        hints.append(f"AppArmor confines this process ({host['apparmor']}): see the kernel log")
    return hints


def refusal_hint(errno: int | None, host: HostFacts, what: str) -> str:
    """The hint for a call that failed for lack of permission or of a resource."""
    if errno in (_errno.EPERM, _errno.EACCES):
        return "; ".join(_confinement(host, what))
    if errno == _errno.EBUSY:
        return "another hypervisor uses the CPU's virtualization: unload its module"
    return shortage_hint(_errno.errorcode.get(errno or 0, ""), host)


def shortage_hint(shortage: str, host: HostFacts) -> str:
    """What ran out, its limit, and what to do; empty if `shortage` is none.

    It opens at most one file, which may fail here.  The module `resource` is not imported for the
    same reason: that takes a descriptor.
    """
    if shortage == "EMFILE":
        limit = libc.soft_limit(libc.RLIMIT_NOFILE)
        return f"this process may have {limit} files open (RLIMIT_NOFILE): raise it by ulimit -n 64"
    if shortage == "ENFILE":
        most = procfs.read("/proc/sys/fs/file-max") or "as many as fs.file-max allows"
        return f"this host has {most} files open, its limit: raise fs.file-max by sysctl -w"
    if shortage == "ENOMEM":
        return _memory_hint(host)
    if shortage == "EAGAIN":
        limit = libc.soft_limit(libc.RLIMIT_NPROC)
        many = "limited" if limit is None else f"{limit} (RLIMIT_NPROC)"
        return f"the number of this user's processes is {many}: raise it by ulimit -u, or pids.max"
    if shortage == "RLIMIT_CPU":
        limit = libc.soft_limit(libc.RLIMIT_CPU)
        return f"this process may use {limit} s of CPU time (RLIMIT_CPU): raise it by ulimit -t"
    return ""


def _memory_hint(host: HostFacts) -> str:
    for number, name, option in (
        (libc.RLIMIT_AS, "RLIMIT_AS", "v"),
        (libc.RLIMIT_DATA, "RLIMIT_DATA", "d"),
    ):
        if (limit := libc.soft_limit(number)) is not None:
            may = f"this process may have {format_size(limit)} of memory ({name})"
            return f"{may}: raise it by ulimit -{option}"
    group = (procfs.read("/proc/self/cgroup") or "").partition("0::")[2].partition("\n")[0]
    limit = procfs.number(procfs.read(f"/sys/fs/cgroup{group}/memory.max"))
    if limit is not None:
        return f"the memory cgroup {group} may have {format_size(limit)}: raise its memory.max"
    available = format_size(host["memory"]["available"])
    return f"{available} of this host's memory is available: free some"


def device_hint(path: str, errno: int | None, host: HostFacts) -> str:
    """The hint for a device that can't be opened or isn't KVM."""
    if errno in (_errno.ENOENT, _errno.ENXIO, _errno.ENODEV, _errno.ENOTDIR):
        if host["kvm_registered"]:
            major, _, minor = host["kvm_registered"].partition(":")
            return (
                f"KVM is loaded, but has no device node: mknod {path} c {major} {minor}; "
                f"in a container: --device {path}"
            )
        if host["backend"]:
            loaded = ", ".join(host["backend"])
            return f"{loaded} is loaded, but there is no device: see the kernel log"
        if not {"svm", "vmx"} & set(host["cpu_flags"]):
            return (
                "this CPU has no virtualization flag (svm, vmx): enable it in the firmware "
                "(SVM mode, VT-x); in a VM: enable nested virtualization in its hypervisor"
            )
        module = "kvm_amd" if "svm" in host["cpu_flags"] else "kvm_intel"
        return (
            f"KVM is not loaded: modprobe {module}; 'Operation not supported' from it means "
            "that virtualization is off in the firmware"
        )
    if errno in (_errno.EACCES, _errno.EPERM):
        hints = _confinement(host, "open")
        if errno == _errno.EACCES:
            hints.insert(0, _node_hint(path))
        else:
            hints.append(f"a device cgroup may hide it; in a container: --device {path}")
        return "; ".join(hints)
    if errno in (_errno.ENOTTY, _errno.EINVAL, _errno.EISDIR, _errno.EPROTO):
        return "this is not KVM's device: use /dev/kvm"
    return refusal_hint(errno, host, "open")


def _node_hint(path: str) -> str:
    import grp
    from pathlib import Path

    try:
        status = Path(path).stat()
    except OSError:
        return "a directory of its path can't be searched"
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    who = f"{path} has mode {status.st_mode & 0o777:04o} and group {group}"
    if status.st_mode & 0o060 == 0o060 and status.st_gid:
        return f"{who}: usermod -aG {group} USER, then log in again"
    return f"{who}: chgrp kvm {path} && chmod 0660 {path}, usermod -aG kvm USER, then log in again"


def in_place_hint(host: HostFacts) -> str:
    """The hint where a guest_memfd can't be converted in place."""
    parameter = host["parameters"].get("kvm.gmem_in_place_conversion")
    if parameter is None:
        return "needs conversion in place, which no release up to Linux 7.3 has"
    return f"kvm.gmem_in_place_conversion is {parameter}: boot with kvm.gmem_in_place_conversion=1"


def why_not_offered(vm_type: str, host: HostFacts) -> tuple[str, str]:
    """Why KVM does not offer a VM type, and the hint."""
    parameters, backend = host["parameters"], host["backend"]
    there = ", ".join(backend) or "none"
    if vm_type == "sw_protected":
        for paging in ("kvm_amd.npt", "kvm_intel.ept"):
            if parameters.get(paging) == "N":
                return f"{paging} is N", f"two-dimensional paging: {paging}=1"
        return (
            "not built in, or no two-dimensional paging",
            "CONFIG_KVM_SW_PROTECTED_VM=y (needs EXPERT), with kvm_amd.npt or kvm_intel.ept",
        )
    module, name, flag = {
        "sev": ("kvm_amd", "sev", "sev"),
        "sev_es": ("kvm_amd", "sev_es", "sev_es"),
        "snp": ("kvm_amd", "sev_snp", "sev_snp"),
        "tdx": ("kvm_intel", "tdx", "tdx_host_platform"),
    }[vm_type]
    maker, other = ("an AMD", "vmx") if module == "kvm_amd" else ("an Intel", "svm")
    if other in host["cpu_flags"]:  # a kernel may have both backends built in
        return f"needs {maker} CPU; this one has {other}", ""
    if module not in backend:
        return f"needs {module}; the backend is {there}", ""
    setting = parameters.get(f"{module}.{name}")
    if setting is None:
        option = "CONFIG_KVM_AMD_SEV" if module == "kvm_amd" else "CONFIG_KVM_INTEL_TDX"
        return f"{module} has no parameter {name}", f"use a kernel with {option}=y"
    reasons = [f"{module}.{name} is {setting}"]
    if flag not in host["cpu_flags"]:
        reasons.append(f"the CPU flag {flag} is absent")
    if module == "kvm_amd" and host["dev_sev"] is None:
        reasons.append("no /dev/sev")
    if setting in ("Y", "1"):
        return ", ".join(reasons), "use a kernel that supports it as a VM type"
    firmware = "TDX" if vm_type == "tdx" else "SMEE, SEV and for SNP the RMP table"
    driver = "" if module == "kvm_intel" else "modprobe ccp; "
    return (
        ", ".join(reasons),
        f"firmware: enable {firmware}; {driver}modprobe {module} {name}=1; then see the kernel log",
    )


def holders(device: str) -> Holders:
    """The processes that have descriptors of the device, of VMs and of vCPUs, and how many.

    One thing may have several: Python's mmap keeps one of each vCPU's.  `unknown` counts the
    processes whose descriptors this user may not list.
    """
    from .. import processes

    scan = processes.scan(device=device)
    found: list[Holder] = []
    for pid, descriptors in scan.found.items():
        kinds = [descriptor.kind for descriptor in descriptors]
        devices, vms, vcpus = map(kinds.count, (processes.DEVICE, processes.VM, processes.VCPU))
        if pid == os.getpid() or not (devices or vms or vcpus):
            continue
        if process := processes.about(pid):
            found.append(
                {
                    "pid": pid,
                    "name": process.name,
                    "user": process.user,
                    "devices": devices,
                    "vms": vms,
                    "vcpus": vcpus,
                }
            )
    return {"processes": found, "unknown": len(scan.unreadable)}
