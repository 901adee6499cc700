"""The structs of cdefs/restrictedmem_v10.h, for annotations.

A Protocol per struct, with its name and its fields; the objects are cffi pointers.
Generated from cdefs/restrictedmem_v10.h by `make cdefs`: edit the header instead.
"""

from __future__ import annotations

from typing import Protocol

__all__ = [
    "kvm_memory_attributes",
]


class kvm_memory_attributes(Protocol):
    """struct kvm_memory_attributes: 32 bytes."""

    address: int  # __u64
    size: int  # __u64
    attributes: int  # __u64
    flags: int  # __u64
