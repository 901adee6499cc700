"""The structs of cdefs/guest_memfd.h, for annotations.

A Protocol per struct, with its name and its fields; the objects are cffi pointers.
Generated from cdefs/guest_memfd.h by `make cdefs`: edit the header instead.
"""

from __future__ import annotations

from typing import Protocol

from .cffi_types import Array

__all__ = [
    "kvm_create_guest_memfd",
    "kvm_memory_attributes",
    "kvm_memory_attributes2",
    "kvm_pre_fault_memory",
    "kvm_run_memory_fault",
    "kvm_userspace_memory_region2",
]


class kvm_create_guest_memfd(Protocol):
    """struct kvm_create_guest_memfd: 64 bytes."""

    size: int  # __u64
    flags: int  # __u64
    reserved: Array[int]  # __u64[6]


class kvm_memory_attributes(Protocol):
    """struct kvm_memory_attributes: 32 bytes."""

    address: int  # __u64
    size: int  # __u64
    attributes: int  # __u64
    flags: int  # __u64


class kvm_memory_attributes2(Protocol):
    """struct kvm_memory_attributes2: 128 bytes."""

    address: int  # __u64
    offset: int  # __u64
    size: int  # __u64
    attributes: int  # __u64
    flags: int  # __u64
    error_offset: int  # __u64
    reserved: Array[int]  # __u64[11]


class kvm_pre_fault_memory(Protocol):
    """struct kvm_pre_fault_memory: 64 bytes."""

    gpa: int  # __u64
    size: int  # __u64
    flags: int  # __u64
    padding: Array[int]  # __u64[5]


class kvm_run_memory_fault(Protocol):
    """struct kvm_run_memory_fault: 24 bytes."""

    flags: int  # __u64
    gpa: int  # __u64
    size: int  # __u64


class kvm_userspace_memory_region2(Protocol):
    """struct kvm_userspace_memory_region2: 160 bytes."""

    slot: int  # __u32
    flags: int  # __u32
    guest_phys_addr: int  # __u64
    memory_size: int  # __u64
    userspace_addr: int  # __u64
    guest_memfd_offset: int  # __u64
    guest_memfd: int  # __u32
    pad1: int  # __u32
    pad2: Array[int]  # __u64[14]
