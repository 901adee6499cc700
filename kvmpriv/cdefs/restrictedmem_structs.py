"""The structs of cdefs/restrictedmem.h, for annotations.

A Protocol per struct, with its name and its fields; the objects are cffi pointers.
Generated from cdefs/restrictedmem.h by `make cdefs`: edit the header instead.
"""

from __future__ import annotations

from typing import Protocol

from .cffi_types import Array
from .kvm_structs import kvm_userspace_memory_region

__all__ = [
    "kvm_run_memory_fault",
    "kvm_userspace_memory_region_ext",
]


class kvm_run_memory_fault(Protocol):
    """struct kvm_run_memory_fault: 24 bytes."""

    flags: int  # __u32
    padding: int  # __u32
    gpa: int  # __u64
    size: int  # __u64


class kvm_userspace_memory_region_ext(Protocol):
    """struct kvm_userspace_memory_region_ext: 160 bytes."""

    region: kvm_userspace_memory_region
    restricted_offset: int  # __u64
    restricted_fd: int  # __u32
    pad1: int  # __u32
    pad2: Array[int]  # __u64[14]
