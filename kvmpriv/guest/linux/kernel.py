"""Linux kernels in files: bzImage and vmlinux, parsed and checked.

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
_VERSION_64BIT = 0x20C  # the first version of the protocol with a flag for the 64-bit entry
_XLF_KERNEL_64 = 1 << 0
_ENTRY_64 = 0x200  # offset in the protected-mode code
_LOAD_HIGH = 0x100000  # where a kernel that can't be relocated is loaded
_SECTOR = 512
_GIB = 1 << 30


class LinuxImage(NamedTuple):
    """A kernel, and how it has to be loaded.

    Addresses are guest physical, sizes in bytes.
    """

    #: "bzImage" or "vmlinux".
    kind: str
    #: The kernel's release, such as "6.1.0-56-amd64"; "" if the file does not contain it.
    version: str
    #: The setup header, from offset 0x1f1 on.
    header: bytes
    segments: tuple[Segment, ...]
    #: The address of the 64-bit entry point.
    entry: int
    #: The first address of the memory that it uses before it reads the memory map.
    start: int
    #: The first address after that memory.
    end: int
    #: The last address that an initrd may occupy.
    initrd_max: int
    #: How long the command line may be, without the final zero.
    cmdline_max: int


def load_linux(data: bytes) -> LinuxImage:
    """Parse a kernel.  ImageError says what `data` is instead, or what is wrong with it."""
    if data[:4] == b"\x7fELF":
        return load_vmlinux(data)
    if data[0x202:0x206] == _MAGIC:
        return load_bzimage(data)
    raise ImageError(_what_else(data))


def _what_else(data: bytes) -> str:
    """Describe a file that is not a kernel for x86-64."""
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
        return "an EFI program without a Linux boot header (unified image? extract its kernel)"
    if len(data) < 0x206:
        return f"truncated: {len(data)} bytes do not hold a bzImage's header"
    return "neither a bzImage nor a vmlinux: no HdrS at 0x202, and not an ELF file"


def load_bzimage(data: bytes) -> LinuxImage:
    """Parse a bzImage, the format in which kernels are installed (as vmlinuz).

    ImageError says what is wrong with it.
    """
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
            f"its boot protocol is {version >> 8}.{version & 0xFF:02}; a 64-bit entry point needs"
            " 2.12 (Linux 3.8)"
        )
    if not u16(0x236) & _XLF_KERNEL_64:
        raise ImageError("a 32-bit kernel: it has no 64-bit entry point (XLF_KERNEL_64)")
    if not data[0x211] & 1:
        raise ImageError("a zImage (not LOADED_HIGH), which has no 64-bit entry point")
    header_end = 0x202 + data[0x201]
    if header_end < 0x268 or header_end > len(data):
        raise ImageError(f"damaged: the setup header ends at {header_end:#x}")

    setup_size = ((data[0x1F1] or 4) + 1) * _SECTOR
    code_size = u32(0x1F4) * 16
    if code_size <= _ENTRY_64:
        raise ImageError(
            f"damaged: {code_size} bytes of protected-mode code are too few for an entry point"
        )
    if len(data) < setup_size + code_size:
        raise ImageError(
            f"truncated: by its header it has {setup_size + code_size} bytes, the file has"
            f" {len(data)}"
        )
    preferred = int.from_bytes(data[0x258:0x260], "little")
    load = preferred if data[0x234] else _LOAD_HIGH
    end = max(preferred + u32(0x260), load + code_size)  # it unpacks itself to `preferred`
    if preferred < _LOAD_HIGH or preferred % 0x1000 or end > 4 * _GIB:
        raise ImageError(f"damaged: it is made to run at {preferred:#x}…{end:#x}")

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
    """Parse a vmlinux, the ELF file that a bzImage is made from and that needs no unpacking.

    ImageError says what is wrong with it.
    """
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
        raise ImageError(f"damaged: it is made to be loaded to {start:#x}…{end:#x}")
    # A setup header with what the kernel needs, as the file has none.
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
