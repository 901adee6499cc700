"""What this process has open, and which mappings of KVM it has."""

from __future__ import annotations

import os
from pathlib import Path


def open_fds() -> dict[int, str]:
    """This process's descriptors and what they are, without following any of them."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that lists the folder
            continue
    return found


def kvm_mappings() -> int:
    """How many of this process's mappings are of a file of KVM's."""
    return Path("/proc/self/maps").read_bytes().count(b"anon_inode:kvm")
