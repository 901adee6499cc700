"""Facts from recorded hosts, and the hints that follow from them."""

from __future__ import annotations

import errno
import resource
from pathlib import Path
from typing import Any, cast

import pytest

from kvmpriv import libc, procfs
from kvmpriv.probe import host
from kvmpriv.probe.documents import HostFacts

EPYC: dict[str, str] = {
    "proc/meminfo": "MemTotal:       2048 kB\nMemFree:        1024 kB\nMemAvailable:   1536 kB\n",
    "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu svm sme sev sev_es sev_snp\n\nprocessor\t: 1\n",
    "proc/self/status": "Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n",
    "proc/self/attr/apparmor/current": "docker-default (enforce)\n",
    "sys/module/kvm/initstate": "live\n",
    "sys/module/kvm_amd/initstate": "live\n",
    "sys/module/kvm_amd/parameters/sev": "Y\n",
    "sys/module/kvm_amd/parameters/sev_snp": "N\n",
    "sys/module/kvm_amd/parameters/npt": "Y\n",
    "sys/class/misc/kvm/dev": "10:232\n",
    "sys/fs/selinux/enforce": "1",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "8\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "5\n",
    "dev/sev": "",
}


def recorded(root: Path, files: dict[str, str]) -> HostFacts:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return host.facts(str(root))


def test_facts(tmp_path: Path) -> None:
    found = recorded(tmp_path, EPYC)
    assert found["backend"] == {"kvm_amd": "module"}
    assert found["kvm_loaded"] is True
    assert found["kvm_registered"] == "10:232"
    assert found["parameters"] == {
        "kvm_amd.npt": "Y",
        "kvm_amd.sev": "Y",
        "kvm_amd.sev_snp": "N",
    }
    assert found["cpu_flags"] == ["svm", "sme", "sev", "sev_es", "sev_snp"]
    assert found["memory"] == {"total": 2 << 20, "free": 1 << 20, "available": 3 << 19}
    assert found["hugepages"] == [{"size": 2 << 20, "total": 8, "free": 5}]
    assert found["transparent_hugepages"] == "madvise"
    assert (found["seccomp"], found["selinux"]) == (2, "enforcing")
    assert found["apparmor"] == "docker-default (enforce)"
    assert found["dev_sev"] is True


def test_facts_of_a_built_in_backend(tmp_path: Path) -> None:
    found = recorded(tmp_path, {"sys/module/kvm_intel/parameters/ept": "Y"})
    assert found["backend"] == {"kvm_intel": "built in"}


def test_facts_of_nothing(tmp_path: Path) -> None:
    """No /proc, no /sys: unknown, and no error."""
    found = host.facts(str(tmp_path))
    assert found["backend"] == {}
    assert found["kvm_loaded"] is False
    assert found["memory"] == {"total": None, "free": None, "available": None}
    assert found["seccomp"] is None
    assert found["hugepages"] == []


NOTHING = host.facts("/nonexistent")


def but(changes: dict[str, Any]) -> HostFacts:
    """The facts of a host that reports nothing but `changes`."""
    return cast("HostFacts", NOTHING | changes)


@pytest.mark.parametrize(
    ("number", "facts", "words"),
    [
        (errno.ENOENT, {}, "firmware"),  # no svm, no vmx: switched off, or hidden
        (errno.ENOENT, {"cpu_flags": ["svm"]}, "modprobe kvm_amd"),
        (errno.ENODEV, {"cpu_flags": ["vmx"]}, "modprobe kvm_intel"),
        (errno.ENOENT, {"backend": {"kvm_amd": "module"}}, "see the kernel log"),
        (errno.ENOENT, {"kvm_registered": "10:232"}, "mknod /x/kvm c 10 232"),
        (errno.EPERM, {"seccomp": 2}, "seccomp filter"),
        (errno.EPERM, {}, "device cgroup"),
        (errno.EACCES, {"selinux": "enforcing"}, "ausearch"),
        (errno.EACCES, {"apparmor": "docker-default (enforce)"}, "AppArmor"),
        (errno.ENOTTY, {}, "not KVM"),
        (errno.EISDIR, {}, "not KVM"),
        (errno.EMFILE, {}, "ulimit -n"),
    ],
)
def test_device_hint(number: int, facts: dict[str, Any], words: str) -> None:
    assert words in host.device_hint("/x/kvm", number, but(facts))
    without = host.device_hint("/x/kvm", number, NOTHING)
    assert not facts or words not in without


def test_permission_hint_names_the_group(tmp_path: Path) -> None:
    node = tmp_path / "kvm"
    node.touch(mode=0o600)
    assert "usermod -aG kvm USER" in host.device_hint(str(node), errno.EACCES, NOTHING)
    assert "has mode 0600" in host.device_hint(str(node), errno.EACCES, NOTHING)
    inside = f"{node}/kvm"
    assert "can't be searched" in host.device_hint(inside, errno.EACCES, NOTHING)


def test_refusal_hint_names_only_what_is_active() -> None:
    assert host.refusal_hint(errno.EPERM, NOTHING, "it") == ""
    assert host.refusal_hint(errno.EPERM, but({"apparmor": "unconfined"}), "it") == ""
    assert "SELinux" not in host.refusal_hint(errno.EPERM, but({"seccomp": 2}), "it")
    assert host.refusal_hint(errno.EINVAL, but({"seccomp": 2}), "it") == ""
    assert "hypervisor" in host.refusal_hint(errno.EBUSY, NOTHING, "it")


AMD = {"backend": {"kvm_amd": "module"}}


@pytest.mark.parametrize(
    ("vm_type", "facts", "reason", "hint"),
    [
        ("snp", {"backend": {"kvm_pvm": "built in"}}, "needs kvm_amd; the backend is kvm_pvm", ""),
        ("tdx", {}, "needs kvm_intel; the backend is none", ""),
        ("tdx", {"cpu_flags": ["svm"]}, "needs an Intel CPU; this one has svm", ""),
        ("snp", AMD | {"cpu_flags": ["vmx"]}, "needs an AMD CPU; this one has vmx", ""),
        ("snp", AMD, "kvm_amd has no parameter sev_snp", "CONFIG_KVM_AMD_SEV"),
        (
            "snp",
            AMD | {"parameters": {"kvm_amd.sev_snp": "N"}, "cpu_flags": ["sev_snp"]},
            "kvm_amd.sev_snp is N, no /dev/sev",
            "modprobe kvm_amd sev_snp=1",
        ),
        (
            "sev",
            AMD | {"parameters": {"kvm_amd.sev": "N"}, "dev_sev": True},
            "kvm_amd.sev is N, the CPU flag sev is absent",
            "firmware: enable SMEE",
        ),
        (
            "sev_es",
            AMD
            | {"parameters": {"kvm_amd.sev_es": "Y"}, "cpu_flags": ["sev_es"], "dev_sev": False},
            "kvm_amd.sev_es is Y",
            "use a kernel that supports it as a VM type",
        ),
        (
            "tdx",
            {"backend": {"kvm_intel": "module"}, "parameters": {"kvm_intel.tdx": "N"}},
            "kvm_intel.tdx is N, the CPU flag tdx_host_platform is absent",
            "firmware: enable TDX; modprobe kvm_intel tdx=1",
        ),
        ("sw_protected", {"parameters": {"kvm_amd.npt": "N"}}, "kvm_amd.npt is N", "kvm_amd.npt=1"),
        ("sw_protected", {}, "not built in", "CONFIG_KVM_SW_PROTECTED_VM=y"),
    ],
)
def test_why_not_offered(vm_type: str, facts: dict[str, Any], reason: str, hint: str) -> None:
    why, advice = host.why_not_offered(vm_type, but(facts))
    assert why.startswith(reason)
    assert hint in advice
    assert bool(hint) == bool(advice)


def test_shortage_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran out, its limit, and the command that raises it."""
    limits: dict[int, int] = {}
    files: dict[str, str] = {}
    monkeypatch.setattr(libc, "soft_limit", limits.get)
    monkeypatch.setattr(procfs, "read", lambda path, size=0: files.get(path))
    facts = but({"memory": {"total": None, "free": None, "available": 3 << 20}})

    def hint(shortage: str) -> str:
        return host.shortage_hint(shortage, facts)

    assert hint("ENOMEM") == "3 MiB of this host's memory is available: free some"
    files["/proc/self/cgroup"] = "1:cpu:/no\n0::/a/b\n"
    files["/sys/fs/cgroup/a/b/memory.max"] = "max"
    assert "this host's memory" in hint("ENOMEM")
    files["/sys/fs/cgroup/a/b/memory.max"] = "4096"
    assert hint("ENOMEM") == "the memory cgroup /a/b may have 4 KiB: raise its memory.max"
    limits[libc.RLIMIT_DATA] = 1 << 20
    assert "1 MiB of memory (RLIMIT_DATA): raise it by ulimit -d" in hint("ENOMEM")
    limits[libc.RLIMIT_AS] = 2 << 20
    assert "2 MiB of memory (RLIMIT_AS): raise it by ulimit -v" in hint("ENOMEM")
    limits[libc.RLIMIT_NOFILE] = 5
    assert "5 files open (RLIMIT_NOFILE): raise it by ulimit -n" in hint("EMFILE")
    assert "fs.file-max" in hint("ENFILE")
    files["/proc/sys/fs/file-max"] = "1000"
    assert "this host has 1000 files open" in hint("ENFILE")
    assert "is limited" in hint("EAGAIN")
    limits[libc.RLIMIT_NPROC] = 7
    assert "is 7 (RLIMIT_NPROC): raise it by ulimit -u" in hint("EAGAIN")
    limits[libc.RLIMIT_CPU] = 1
    assert "1 s of CPU time (RLIMIT_CPU): raise it by ulimit -t" in hint("RLIMIT_CPU")
    assert hint("EINVAL") == hint("") == ""


def test_soft_limit() -> None:
    """The same as the standard library's."""
    for name in ("AS", "CPU", "DATA", "NOFILE", "NPROC"):
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        expected = None if soft == resource.RLIM_INFINITY else soft
        assert libc.soft_limit(getattr(libc, f"RLIMIT_{name}")) == expected
