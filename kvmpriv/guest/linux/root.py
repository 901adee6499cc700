"""Whether a disk can have the root file system that a kernel's command line names."""

from __future__ import annotations

import os
import re
import struct

from ...errors import ArgumentError

__all__ = ["check_root"]

_HEAD = 1 << 17  # every file system that Linux boots from has its superblock before
_SUPERBLOCK = 1024  # of ext2, ext3 and ext4: Documentation/filesystems/ext4/super.rst
_EXT_MAGIC, _HAS_64_BIT = 0xEF53, 0x80


def check_root(cmdline: str, path: str | os.PathLike[str] | None) -> None:
    """ArgumentError if `cmdline` names a root file system that the disk at `path` can't have.

    Only ``root=/dev/vda`` and its partitions are checked, for what would keep every kernel from
    finding it: no disk (`path` is None), an empty one, one with and one without partitions, and an
    ext file system that is larger than the disk.  OSError if the disk can't be read.
    """
    words = [word.partition("=")[2] for word in cmdline.split() if word.startswith("root=")]
    found = re.fullmatch(r"/dev/vda(\d*)", words[-1]) if words else None
    if found is None:
        return
    if path is None:
        raise ArgumentError(f"root={words[-1]} needs a disk, and the guest has none: add --disk")
    with open(path, "rb", buffering=0) as disk:  # noqa: PTH123
        head = disk.read(_HEAD)
        size = disk.seek(0, os.SEEK_END)
    if not head.strip(b"\0"):
        raise ArgumentError(
            "an empty disk, without a file system: write the guest's root file system to it first"
        )
    has_table = head[512:520] == b"EFI PART" or (
        head[510:512] == b"\x55\xaa" and any(head[at + 4] for at in range(446, 510, 16))
    )
    magic, extent = _ext(head)
    if found[1] and not has_table:
        raise ArgumentError(
            f"a disk without partitions, so that there is no {words[-1]}: write root=/dev/vda"
        )
    if not found[1] and has_table and not magic:
        raise ArgumentError(
            "a disk with partitions: write root=/dev/vda1, or the number of the partition that has"
            " the root file system (`fdisk -l` lists them)"
        )
    if not found[1] and extent > size:
        raise ArgumentError(
            f"too small: its file system has {extent} bytes, the image {size}. Copy the whole image"
            f" again; `truncate -s {extent}` helps if only zeros were cut off"
        )


def _ext(head: bytes) -> tuple[bool, int]:
    """Whether an ext file system begins here, and its size in bytes."""
    block = head[_SUPERBLOCK : _SUPERBLOCK + 1024]
    if len(block) < 1024 or struct.unpack_from("<H", block, 56)[0] != _EXT_MAGIC:
        return False, 0
    (blocks,) = struct.unpack_from("<I", block, 4)
    (log_size,) = struct.unpack_from("<I", block, 24)
    (features,) = struct.unpack_from("<I", block, 96)
    if features & _HAS_64_BIT:
        blocks |= struct.unpack_from("<I", block, 0x150)[0] << 32
    return True, blocks << 10 + min(log_size, 6)
