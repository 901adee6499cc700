"""The structs of cdefs/vhost.h, for annotations.

A Protocol per struct, with its name and its fields; the objects are cffi pointers.
Generated from cdefs/vhost.h by `make cdefs`: edit the header instead.
"""

from __future__ import annotations

from typing import Protocol

from .cffi_types import Array

__all__ = [
    "vhost_memory",
    "vhost_memory_region",
    "vhost_vring_addr",
    "vhost_vring_file",
    "vhost_vring_state",
]


class vhost_memory(Protocol):
    """struct vhost_memory: 8 bytes."""

    nregions: int  # __u32
    padding: int  # __u32
    regions: Array[vhost_memory_region]  # vhost_memory_region[]


class vhost_memory_region(Protocol):
    """struct vhost_memory_region: 32 bytes."""

    guest_phys_addr: int  # __u64
    memory_size: int  # __u64
    userspace_addr: int  # __u64
    flags_padding: int  # __u64


class vhost_vring_addr(Protocol):
    """struct vhost_vring_addr: 40 bytes."""

    index: int  # __u32
    flags: int  # __u32
    desc_user_addr: int  # __u64
    used_user_addr: int  # __u64
    avail_user_addr: int  # __u64
    log_guest_addr: int  # __u64


class vhost_vring_file(Protocol):
    """struct vhost_vring_file: 8 bytes."""

    index: int  # __u32
    fd: int  # __s32


class vhost_vring_state(Protocol):
    """struct vhost_vring_state: 8 bytes."""

    index: int  # __u32
    num: int  # __u32
