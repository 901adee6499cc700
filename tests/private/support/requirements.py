"""What a test needs of the machine, and the skip that names what is missing."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from kvmpriv import private

#: Identifier -> what is missing when a test is skipped with it; for this suite and for the other
#: tests of the checkout.  KVMPRIV_REQUIRE takes these identifiers.
REQUIREMENTS = {
    "ansible": "ansible-core, which the extra `dev` installs",
    "atomic-sleep": "CONFIG_DEBUG_ATOMIC_SLEEP, with which the kernel reports a wait under a lock",
    "browser": "Chromium, which shows pages to a test",
    "btf": "type information of the running kernel's KVM, for tests of struct layouts",
    "build-tools": "the programs that build a kernel",
    "compaction": "a kernel with memory compaction, and the right to start it",
    "core-dumps": "core dumps written to the current directory",
    "dangerous": "the option --dangerous, for a test that can crash this kernel",
    "debugfs": "/sys/kernel/debug/kvm, readable",
    "disable-quirks2": "KVM_CAP_DISABLE_QUIRKS2",
    "distribution": "Debian on a disk, which takes minutes to make and to boot: `make test-all`",
    "drop-caches": "the right to write /proc/sys/vm/drop_caches",
    "fault-injection": "CONFIG_FAULT_INJECTION and CONFIG_FAILSLAB, debugfs, and root",
    "first-pid-namespace": "the host's first PID namespace, whose numbers KVM's statistics have",
    "guest-memfd-flags": "the flags MMAP and INIT_SHARED of KVM_CREATE_GUEST_MEMFD",
    "guest-memfd-lifetime": "an ABI whose slot loses its memory when the file is closed",
    "guest_memfd": "guest_memfd in a VM of the type that the test uses",
    "guest_memfd_in_place": "guest_memfd files that can be converted in place",
    "host": "/dev/kvm, readable and writable",
    "huge-pages": "shmem with large pages, and free ones",
    "implicit-conversion": "a guest that chooses how it accesses a page",
    "io_uring": "io_uring_setup(2)",
    "kasan": "CONFIG_KASAN, with which the kernel reports a use after free",
    "kcmp": "kcmp(2)",
    "ksm": "CONFIG_KSM, and the right to start it",
    "kvmclock": "the paravirtual clock",
    "mainline": "a kernel whose system call 451 is not memfd_restricted(2)",
    "manual-dirty-log": "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    "memory": "as much memory as the test needs",
    "memory-cgroup": "cgroup v2 with the memory controller, and root",
    "nested-paging": "a processor with SVM or VMX, so that KVM emulates no access to memory",
    "nested-svm": "a KVM for AMD whose guests can have guests of their own",
    "network": "the package index, or the right to make a network interface",
    "no-private-memory": "a way to take private memory away from this kernel",
    "null-blk": "null_blk with configfs, and root: a disk that transfers when it is polled",
    "numa": "two NUMA nodes, as a kernel of scripts/kernel has with numa=fake=2",
    "numa-migration": "a kernel that moves pages between NUMA nodes (CONFIG_NUMA_MIGRATION)",
    "page-flags": "/proc/kpageflags, readable",
    "paravirtual": "a KVM that emulates a kernel's instructions one by one",
    "pre-fault": "KVM_CAP_PRE_FAULT_MEMORY",
    "private-attribute": "KVM_MEMORY_ATTRIBUTE_PRIVATE for this type of VM",
    "private-memory": "an ABI by which this kernel gives private memory to a VM",
    "ptrace": "the right to trace other processes of this user",
    "pv-eoi": "paravirtual end of interrupt",
    "pyright": "the type checker pyright",
    "qemu": "QEMU, which can make a VM with this host's KVM",
    "read-only-private-slots": "an ABI whose private slots can be read-only",
    "refusing-vm": "a VM that refuses KVM_MEM_PRIVATE on a kernel with memfd_restricted(2)",
    "restrictedmem": "memfd_restricted(2), and VMs that accept KVM_MEM_PRIVATE",
    "root": "root's rights",
    "scripts-vm": "a kernel that scripts/vm has started: its memory may be searched and poisoned",
    "second-address-space": "a VM with a second address space (SMM)",
    "setpriv": "the program setpriv, and root to run it",
    "shadow-mmu": "a kernel that was started with kvm.tdp_mmu=0",
    "shared-guest-memfd": "guest_memfd in a VM of the default type",
    "shared-only-host": "a host with guest_memfd and without private memory, as in the README",
    "shared-pages-unmapped": "a kernel whose hole unmaps the slot's shared pages, too",
    "slot-zap-quirk": "KVM_X86_QUIRK_SLOT_ZAP_ALL",
    "software-interrupts": "a KVM whose guests can execute the int instruction",
    "stats": "KVM_CAP_BINARY_STATS_FD",
    "steal-time": "paravirtual steal time",
    "test-vehicle": "the module parameter kvm.private_mem_testing of this project's v9 kernels",
    "two-backings": "an ABI by which a private page and a shared one are two pages",
    "userfaultfd": "userfaultfd(2) for faults of the kernel",
    "vhost": "/dev/vhost-net and /dev/vhost-vsock, readable and writable",
    "wall-clock": "the paravirtual wall clock",
}


def identifiers(text: str) -> set[str]:
    """The identifiers in a comma-separated list."""
    return {name.strip() for name in text.split(",")} - {""}


def known() -> set[str]:
    """Every identifier; the name of an ABI that was registered is one, too."""
    return {*REQUIREMENTS, *private.ABIS}


#: What the user requires: a test that lacks it fails instead of being skipped.
REQUIRED = identifiers(os.environ.get("KVMPRIV_REQUIRE", ""))


def check_required() -> None:
    """Raise a usage error if KVMPRIV_REQUIRE has an unknown identifier."""
    if unknown := sorted(REQUIRED - known()):
        raise pytest.UsageError(
            f"KVMPRIV_REQUIRE: unknown {', '.join(map(repr, unknown))}; "
            f"known are: {', '.join(sorted(known()))}"
        )


def missing(name: str, why: str) -> NoReturn:
    """Skip the test for lack of `name`; fail it if KVMPRIV_REQUIRE has that identifier."""
    assert name in known(), f"{name!r} is not in REQUIREMENTS: add it there"
    if name in REQUIRED:
        pytest.fail(f"KVMPRIV_REQUIRE={name}, but {why}", pytrace=False)
    pytest.skip(f"{name}: {why}")
