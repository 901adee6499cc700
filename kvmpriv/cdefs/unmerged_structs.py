"""The structs of cdefs/unmerged.h, for annotations.

A Protocol per struct, with its name and its fields; the objects are cffi pointers.
Generated from cdefs/unmerged.h by `make cdefs`: edit the header instead.
"""

from __future__ import annotations

from typing import Protocol

from .cffi_types import Array

__all__ = [
    "kvm_userspace_memory_region2",
]


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
    userfault_bitmap: int  # __u64
    pad2: Array[int]  # __u64[13]
