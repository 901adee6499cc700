"""CPUID for a Linux guest: the features that KVM supports, and the topology of the vCPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...cdefs import kvm as kvm_h

if TYPE_CHECKING:
    from ...cpuid import CpuidEntry

__all__ = ["for_cpu"]

# With these features KVM writes to the guest's memory, at addresses that may be private: it would
# write to the shared page, which the guest does not read.  (The page of kvmclock is in the kernel's
# image, which is shared.)
_UNASKED_WRITES = (
    1 << kvm_h.KVM_FEATURE_ASYNC_PF
    | 1 << kvm_h.KVM_FEATURE_ASYNC_PF_VMEXIT
    | 1 << kvm_h.KVM_FEATURE_ASYNC_PF_INT
    | 1 << kvm_h.KVM_FEATURE_STEAL_TIME
    | 1 << kvm_h.KVM_FEATURE_PV_EOI
)
_TSC_DEADLINE, _HYPERVISOR, _HTT = 1 << 24, 1 << 31, 1 << 28


def for_cpu(
    supported: Sequence[CpuidEntry], apic_id: int, cpus: int, *, tsc_deadline: bool
) -> list[CpuidEntry]:
    """The leaves for the vCPU `apic_id` of `cpus` cores with one thread each, in one package.

    `supported` is from KVM_GET_SUPPORTED_CPUID, which leaves out the TSC deadline timer, as that
    needs the irqchip in the kernel (api.rst); `tsc_deadline` is KVM_CAP_TSC_DEADLINE_TIMER.
    """
    shift = (cpus - 1).bit_length()
    leaves: list[CpuidEntry] = []
    for leaf in supported:
        if leaf.function == 1:
            several = (leaf.edx | _HTT) if cpus > 1 else (leaf.edx & ~_HTT)
            made = leaf._replace(
                ebx=leaf.ebx & 0xFFFF | min(1 << shift, 255) << 16 | apic_id << 24,
                ecx=leaf.ecx | _HYPERVISOR | (_TSC_DEADLINE if tsc_deadline else 0),
                edx=several,
            )
        elif leaf.function == 4 and leaf.eax & 0x1F:  # Intel's caches: cores a package
            cores = leaf.eax & 0x03FFFFFF | ((1 << shift) - 1) << 26
            made = leaf._replace(eax=cores)
        elif leaf.function in (0xB, 0x1F):
            continue  # extended topology, below
        elif leaf.function == 0x80000008:
            made = leaf._replace(ecx=leaf.ecx & ~0xF0FF | cpus - 1 | shift << 12)
        elif leaf.function == 0x8000001E:
            made = leaf._replace(eax=apic_id, ebx=apic_id, ecx=0)
        elif leaf.function == kvm_h.KVM_CPUID_FEATURES:
            made = leaf._replace(eax=leaf.eax & ~_UNASKED_WRITES)
        else:
            made = leaf
        leaves.append(made)
        if leaf.function == 0 and leaf.eax >= 0xB:
            indexed = kvm_h.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            for index, (bits, count, kind) in enumerate(((0, 1, 1), (shift, cpus, 2), (0, 0, 0))):
                leaves.append(
                    leaf._replace(
                        function=0xB,
                        index=index,
                        flags=indexed,
                        eax=bits,
                        ebx=count,
                        ecx=kind << 8 | index,
                        edx=apic_id,
                    )
                )
    return leaves
