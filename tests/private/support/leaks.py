"""The open descriptors of this process, and its mappings of KVM's files."""

from __future__ import annotations

import os
from pathlib import Path


def lowest_free_fd() -> int:
    """The descriptor that the next file gets."""
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


def open_fds() -> dict[int, str]:
    """The descriptors of this process and their links, without a stat of any of them."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that lists the folder
            continue
    return found


def kvm_mappings() -> int:
    """The number of mappings that this process has of KVM's files."""
    return Path("/proc/self/maps").read_bytes().count(b"anon_inode:kvm")
