"""What Linux kernels look like: bzImage and vmlinux, taken apart and checked.

The header of a bzImage is described in Documentation/arch/x86/boot.rst of the kernel ("The
Real-Mode Kernel Header"); offsets here are that document's.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from ..image import ImageError, Segment, load_elf

__all__ = ["LinuxImage", "load_bzimage", "load_linux", "load_vmlinux"]

_HEADER = 0x1F1  # where the setup header begins, in the file and in the zero page
_MAGIC, _BOOT_FLAG = b"HdrS", 0xAA55
_VERSION_64BIT = 0x20C  # the first protocol that says whether there is a 64-bit entry
_XLF_KERNEL_64 = 1 << 0
_ENTRY_64 = 0x200  # behind where the protected-mode code is loaded
_LOAD_HIGH = 0x100000  # where it goes when it can't be moved
_SECTOR = 512
_GIB = 1 << 30


class LinuxImage(NamedTuple):
    """A kernel, and what it says of how it wants to be loaded.

    Addresses are guest physical, sizes in bytes.
    """

    kind: str  # "bzImage" or "vmlinux"
    version: str  # as the kernel calls itself, "" when it does not
    header: bytes  # the setup header, from offset 0x1f1
    segments: tuple[Segment, ...]
    entry: int  # 64-bit code
    start: int  # from here …
    end: int  # … to here is memory that it takes before it looks at any map
    initrd_max: int  # the last address that an initrd may have
    cmdline_max: int  # without the final zero


def load_linux(data: bytes) -> LinuxImage:
    """Take a kernel apart.  ImageError says what is wrong with what is none."""
    if data[:4] == b"\x7fELF":
        return load_vmlinux(data)
    if data[0x202:0x206] == _MAGIC:
        return load_bzimage(data)
    raise ImageError(_what_else(data))


def _what_else(data: bytes) -> str:
    """Name what was given instead of a kernel for x86-64."""
    if not data:
        return "the file is empty"
    for offset, magic, name in (
        (56, b"ARM\x64", "a Linux kernel for 64-bit Arm; a guest here is x86-64"),
        (56, b"RSC\x05", "a Linux kernel for RISC-V; a guest here is x86-64"),
        (0, b"\x1f\x8b", "compressed with gzip: a kernel for another machine, or not one at all"),
        (0, b"\xfd7zXZ\0", "compressed with xz; unpack it first"),
        (0, b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
        (0, b"070701", "a cpio archive: an initrd, not a kernel"),
    ):
        if data[offset : offset + len(magic)] == magic:
            return name
    if data[:2] == b"MZ":
        return "an EFI program without a Linux boot header (a unified image? take its kernel out)"
    if len(data) < 0x206:
        return f"truncated: {len(data)} bytes do not hold a bzImage's header"
    return "neither a bzImage nor a vmlinux: no HdrS at 0x202, and not an ELF file"


def load_bzimage(data: bytes) -> LinuxImage:
    """A bzImage, the form in which kernels are installed (as vmlinuz)."""
    if len(data) < 0x268:
        raise ImageError(f"truncated: {len(data)} bytes do not hold a bzImage's header")

    def u16(offset: int) -> int:
        return int.from_bytes(data[offset : offset + 2], "little")

    def u32(offset: int) -> int:
        return int.from_bytes(data[offset : offset + 4], "little")

    if u16(0x1FE) != _BOOT_FLAG:
        raise ImageError(f"damaged: the boot flag is {u16(0x1FE):#06x}, not {_BOOT_FLAG:#x}")
    version = u16(0x206)
    if version < _VERSION_64BIT:
        raise ImageError(
            f"its boot protocol is {version >> 8}.{version & 0xFF:02}; a 64-bit entry takes 2.12"
            " (Linux 3.8)"
        )
    if not u16(0x236) & _XLF_KERNEL_64:
        raise ImageError("a 32-bit kernel: it has no 64-bit entry (XLF_KERNEL_64)")
    if not data[0x211] & 1:
        raise ImageError("a zImage (not LOADED_HIGH), which has no 64-bit entry")
    header_end = 0x202 + data[0x201]
    if header_end < 0x268 or header_end > len(data):
        raise ImageError(f"damaged: the setup header ends at {header_end:#x}")

    setup_size = ((data[0x1F1] or 4) + 1) * _SECTOR
    code_size = u32(0x1F4) * 16
    if code_size <= _ENTRY_64:
        raise ImageError(f"damaged: {code_size} bytes of protected-mode code hold no 64-bit entry")
    if len(data) < setup_size + code_size:
        raise ImageError(
            f"truncated: the header promises {setup_size + code_size} bytes, the file has"
            f" {len(data)}"
        )
    preferred = int.from_bytes(data[0x258:0x260], "little")
    load = preferred if data[0x234] else _LOAD_HIGH
    end = max(preferred + u32(0x260), load + code_size)  # it is unpacked to where it prefers to be
    if preferred < _LOAD_HIGH or preferred % 0x1000 or end > 4 * _GIB:
        raise ImageError(f"damaged: it wants to run at {preferred:#x}…{end:#x}")

    code = data[setup_size : setup_size + code_size]
    return LinuxImage(
        kind="bzImage",
        version=_bzimage_version(data, u16(0x20E), setup_size),
        header=data[_HEADER:header_end],
        segments=(Segment(load, code, code_size),),
        entry=load + _ENTRY_64,
        start=load,
        end=end,
        initrd_max=u32(0x22C),
        cmdline_max=u32(0x238),
    )


def _bzimage_version(data: bytes, pointer: int, setup_size: int) -> str:
    start = pointer + 0x200
    if not pointer or start >= setup_size:
        return ""
    text = data[start:setup_size].split(b"\0", 1)[0]
    return text.split(b" ", 1)[0][:100].decode("ascii", "replace")


def load_vmlinux(data: bytes) -> LinuxImage:
    """A vmlinux, the ELF file that a bzImage is made from: nothing to unpack in the guest."""
    entry = int.from_bytes(data[24:32], "little")
    image = load_elf(data, entry=entry)
    found = re.search(rb"Linux version ([!-~]{1,100}) ", data)
    if found is None:
        raise ImageError("an ELF file, but not a Linux kernel (`kvmpriv run` takes other programs)")
    if not any(s.address <= entry < s.address + s.memory_size for s in image.segments):
        raise ImageError(f"damaged: its entry, {entry:#x}, is in no segment")
    start = min(segment.address for segment in image.segments)
    end = max(segment.address + segment.memory_size for segment in image.segments)
    if start < _LOAD_HIGH or end > 4 * _GIB:
        raise ImageError(f"damaged: it wants to be loaded to {start:#x}…{end:#x}")
    # What a boot loader tells a kernel that brings no header of its own.
    header = bytearray(0x268 - _HEADER)
    struct.pack_into("<H", header, 0x1FE - _HEADER, _BOOT_FLAG)
    struct.pack_into("<4sH", header, 0x202 - _HEADER, _MAGIC, _VERSION_64BIT)
    header[0x211 - _HEADER] = 1  # LOADED_HIGH
    return LinuxImage(
        kind="vmlinux",
        version=found[1].decode("ascii"),
        header=bytes(header),
        segments=image.segments,
        entry=entry,
        start=start,
        end=end,
        initrd_max=0x7FFFFFFF,
        cmdline_max=2047,  # COMMAND_LINE_SIZE - 1 on x86
    )
