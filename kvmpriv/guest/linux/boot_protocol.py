"""Linux's 64-bit boot protocol: what memory and registers contain when a kernel starts.

Documentation/arch/x86/boot.rst ("64-bit Boot Protocol") and zero-page.rst of the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...memory import PAGE_SIZE
from .. import x86
from ..image import ImageError
from .layout import CONVENTIONAL_END

if TYPE_CHECKING:
    from ...vcpu import Vcpu
    from .kernel import LinuxImage
    from .layout import GuestMemory, Range

__all__ = ["TABLES", "TABLES_END", "enter", "load", "write_cmdline"]

# Addresses in the first megabyte.  The kernel's trampoline uses any other RAM there.
_GDT, _ZERO_PAGE, _PAGE_TABLES = 0x6000, 0x7000, 0x9000
_CMDLINE, _CMDLINE_END = 0x20000, 0x30000
#: The firmware's tables: a kernel searches this range for ACPI's root pointer.
TABLES, TABLES_END = 0xE0000, 0x100000
_RAM, _RESERVED = 1, 2  # e820 types
_HEADER = 0x1F1
_BOOT_CS, _BOOT_DS = 0x10, 0x18
_CODE, _DATA = 0x00AF9B000000FFFF, 0x00CF93000000FFFF
_MAPPED_GIB = 4


def load(
    image: LinuxImage,
    memory: GuestMemory,
    ranges: Sequence[Range],
    cmdline: bytes,
    initrd: bytes = b"",
    *,
    rsdp: int = 0,
) -> None:
    """Write the kernel, the initrd, the command line and the zero page into `memory`.

    `ranges` are the guest's RAM; the first begins at address 0.  `rsdp` is the address of ACPI's
    root pointer, 0 for none.  ImageError names what does not fit.
    """
    low = ranges[0]
    write_cmdline(image, memory, cmdline)
    if image.end > low.end:
        raise ImageError(
            f"too little memory: the kernel needs {image.start:#x}…{image.end:#x}, and the memory"
            f" that it can start in ends at {low.end:#x}"
        )
    initrd_at = _place_initrd(image, low.end, len(initrd)) if initrd else 0
    for segment in image.segments:
        memory.write(segment.address, segment.data)
    memory.write(initrd_at, initrd)
    memory.write(_ZERO_PAGE, _zero_page(image, ranges, initrd_at, len(initrd), rsdp))
    memory.write(_GDT, struct.pack("<4Q", 0, 0, _CODE, _DATA))
    x86.write_identity_map(memory, _PAGE_TABLES, _MAPPED_GIB)


def write_cmdline(image: LinuxImage, memory: GuestMemory, cmdline: bytes) -> None:
    """Write the command line alone.  ImageError if the kernel does not accept it."""
    if len(cmdline) > min(image.cmdline_max, _CMDLINE_END - _CMDLINE - 1):
        raise ImageError(
            f"the command line has {len(cmdline)} bytes; this kernel accepts {image.cmdline_max}"
        )
    if 0 in cmdline:
        raise ImageError("the command line contains a zero byte")
    memory.write(_CMDLINE, cmdline + b"\0")


def _place_initrd(image: LinuxImage, low_end: int, size: int) -> int:
    """The highest address for the initrd, so that the memory below stays in one piece."""
    end = min(low_end, image.initrd_max + 1)
    at = (end - size) & ~(PAGE_SIZE - 1)
    if at < image.end:
        raise ImageError(
            f"the initrd does not fit: it has {size:#x} bytes, and there are"
            f" {max(0, end - image.end):#x} between the kernel's end ({image.end:#x}) and {end:#x}"
        )
    return at


def _zero_page(
    image: LinuxImage, ranges: Sequence[Range], initrd: int, initrd_size: int, rsdp: int
) -> bytes:
    page = bytearray(PAGE_SIZE)
    page[_HEADER : _HEADER + len(image.header)] = image.header
    page[0x210] = 0xFF  # type_of_loader: not registered
    struct.pack_into("<II", page, 0x218, initrd, initrd_size)
    struct.pack_into("<I", page, 0x228, _CMDLINE)
    struct.pack_into("<Q", page, 0x250, 0)  # setup_data: none
    struct.pack_into("<Q", page, 0x070, rsdp)
    entries = e820(ranges)
    page[0x1E8] = len(entries)
    for number, entry in enumerate(entries):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * number, *entry)
    return bytes(page)


def e820(ranges: Sequence[Range]) -> list[tuple[int, int, int]]:
    """The memory map for the kernel: (address, size, type) of each entry."""
    first = ranges[0]
    return [
        (0, CONVENTIONAL_END, _RAM),
        (CONVENTIONAL_END, 0x100000 - CONVENTIONAL_END, _RESERVED),
        (0x100000, first.end - 0x100000, _RAM),
        *((part.gpa, part.size, _RAM) for part in ranges[1:]),
    ]


def enter(image: LinuxImage, vcpu: Vcpu) -> None:
    """Set the registers of the first vCPU for the kernel's 64-bit entry point."""
    with vcpu.sregs() as sregs:
        x86.enable_long_mode(
            sregs, cr3=_PAGE_TABLES, code_selector=_BOOT_CS, data_selector=_BOOT_DS
        )
        sregs.gdt.base, sregs.gdt.limit = _GDT, 0x1F
        sregs.idt.base, sregs.idt.limit = 0, 0
    with vcpu.regs() as regs:
        regs.rip, regs.rsi, regs.rflags = image.entry, _ZERO_PAGE, x86.RFLAGS_FIXED
        regs.rsp = _ZERO_PAGE + 2 * PAGE_SIZE
