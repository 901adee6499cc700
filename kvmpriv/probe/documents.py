"""The parts of a probe's document, as ``schema.json`` describes them.

For annotations: the probe itself imports this module only to read a document.
"""

from __future__ import annotations

from typing import TypedDict

__all__ = [
    "AskedDocument",
    "CheckDocument",
    "Holder",
    "Holders",
    "HostFacts",
    "HugePagePool",
    "MemoryFacts",
    "NeedDocument",
    "ProfileDocument",
    "ReportDocument",
    "VcpuLimits",
]


class MemoryFacts(TypedDict):
    """The host's memory in bytes, None where the host does not report it."""

    total: int | None
    free: int | None
    available: int | None


class HugePagePool(TypedDict):
    """The huge pages of one size: `size` in bytes, the others are numbers of pages."""

    size: int
    total: int | None
    free: int | None


class VcpuLimits(TypedDict):
    """KVM_CAP_NR_VCPUS, KVM_CAP_MAX_VCPUS and KVM_CAP_MAX_VCPU_ID."""

    recommended: int
    max: int
    max_id: int


class HostFacts(TypedDict):
    """Facts about the host, None where the host or KVM does not report them."""

    kernel: str
    kvm_loaded: bool
    kvm_registered: str | None
    backend: dict[str, str]
    parameters: dict[str, str]
    cpu_flags: list[str]
    dev_sev: bool | None
    seccomp: int | None
    selinux: str | None
    apparmor: str | None
    memory: MemoryFacts
    hugepages: list[HugePagePool]
    transparent_hugepages: str | None
    nesting: list[str] | None
    vcpus: VcpuLimits | None
    memory_slots: int | None


class Holder(TypedDict):
    """A process, and how many descriptors it has of the device, of VMs and of vCPUs."""

    pid: int
    name: str | None
    user: str | None
    devices: int
    vms: int
    vcpus: int


class Holders(TypedDict):
    """The processes that use the device; `unknown` is how many could not be inspected."""

    processes: list[Holder]
    unknown: int


class AskedDocument(TypedDict):
    """A capability and what KVM_CHECK_EXTENSION returned for it.

    `device` is what the device returned for it if a VM was asked, else None.
    """

    capability: str
    value: int
    device: int | None


class CheckDocument(TypedDict):
    """A check; its name has the group, the VM type and the step."""

    name: str
    status: str
    asked: list[AskedDocument]
    tried: str
    result: str
    hint: str
    shortage: str


class NeedDocument(TypedDict):
    """A finding that a profile needs: PASS it is met, FAIL it is not, SKIP it is not known."""

    finding: str
    status: str
    wish: bool
    why: str


class ProfileDocument(TypedDict):
    """A profile of ``--for``; `vm_type` is the type of VM that decided it, or empty."""

    name: str
    summary: str
    sources: list[str]
    verdict: str
    vm_type: str
    needs: list[NeedDocument]


class ReportDocument(TypedDict):
    """The document of ``kvmpriv probe --json``."""

    schema_version: int
    verdict: str
    meaning: str
    notes: list[str]
    exit_status: int
    checks: list[CheckDocument]
    profiles: list[ProfileDocument] | None
    host: HostFacts
    holders: Holders | None
