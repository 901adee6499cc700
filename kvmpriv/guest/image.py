"""What is to be put into a guest's memory: flat binaries and ELF files."""

from __future__ import annotations

import enum
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Image",
    "ImageError",
    "Mode",
    "Segment",
    "is_static",
    "load_elf",
    "load_flat",
    "load_image",
    "read_file",
]


class ImageError(ValueError):
    """The image can't be used; the message says what is wrong with it."""


class Mode(enum.Enum):
    """The processor mode that a guest starts in."""

    REAL = "real"  # 16 bit, as after reset
    LONG = "long"  # 64 bit, paging on, memory mapped one to one


#: Where a flat binary goes unless it is told.  Below lie the boot structures of real mode.
LOAD_ADDRESS = {Mode.REAL: 0x1000, Mode.LONG: 0x100000}


class Segment(NamedTuple):
    """Bytes for the guest physical address `address`; zeros follow up to `memory_size` bytes."""

    address: int
    data: bytes
    memory_size: int


class Image(NamedTuple):
    """A guest program: where its parts go, where it begins (a guest physical address)."""

    mode: Mode
    entry: int
    segments: tuple[Segment, ...]


def load_flat(
    data: bytes, mode: Mode = Mode.LONG, *, load: int | None = None, entry: int | None = None
) -> Image:
    """A flat binary: `data` goes to `load`, execution begins at `entry` (default: at `load`)."""
    if not data:
        raise ImageError("the image is empty")
    address = LOAD_ADDRESS[mode] if load is None else load
    if address < 0:
        raise ImageError(f"load address {address:#x} is negative")
    start = address if entry is None else entry
    if not address <= start < address + len(data):
        raise ImageError(
            f"entry {start:#x} is outside the image ({address:#x}…{address + len(data):#x})"
        )
    return Image(mode, start, (Segment(address, data, len(data)),))


_MACHINES = {
    3: "32-bit x86",
    8: "MIPS",
    20: "PowerPC",
    21: "64-bit PowerPC",
    22: "s390",
    40: "32-bit Arm",
    183: "64-bit Arm",
    243: "RISC-V",
    258: "LoongArch",
}
_EM_X86_64, _ET_EXEC, _ET_DYN, _PT_LOAD, _PT_INTERP = 62, 2, 3, 1, 3
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")


def load_elf(data: bytes, *, entry: int | None = None) -> Image:
    """A static ELF executable for x86-64 (ELF-64 object file format, gabi chapters 4 and 5).

    Each PT_LOAD segment goes to its p_paddr; the entry is e_entry, or `entry`.
    """
    if data[:4] != b"\x7fELF":
        raise ImageError("not an ELF file")
    if len(data) < _EHDR.size:
        raise ImageError(f"truncated: {len(data)} bytes do not hold an ELF header")
    # ident, type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum, …
    ident, kind, machine, _, e_entry, phoff, _, _, _, phentsize, phnum, *_ = _EHDR.unpack_from(data)
    # e_machine stands at the same place in every ELF file, in the file's own byte order.
    machine = int.from_bytes(data[18:20], "big" if ident[5] == 2 else "little")
    if machine != _EM_X86_64:
        name = _MACHINES.get(machine, f"machine {machine}")
        raise ImageError(f"an ELF file for {name}; a guest here is x86-64")
    if ident[4] != 2 or ident[5] != 1:
        raise ImageError("an ELF file for x86-64 that is not 64-bit little-endian (x32?)")
    if kind == _ET_DYN:
        raise ImageError("a position independent ELF file: link it with -static -no-pie")
    if kind != _ET_EXEC:
        raise ImageError(f"an ELF file of type {kind}, not an executable: link it first")
    if phentsize != _PHDR.size:
        raise ImageError(f"damaged: program headers of {phentsize} bytes")
    if phoff + phnum * phentsize > len(data):
        raise ImageError("truncated: the program headers lie beyond the end of the file")

    segments = []
    start = entry
    for number in range(phnum):
        p_type, _, offset, vaddr, paddr, filesz, memsz, _ = _PHDR.unpack_from(
            data, phoff + number * phentsize
        )
        if p_type == _PT_INTERP:
            raise ImageError("a dynamically linked ELF file: link it with -static")
        if p_type != _PT_LOAD or memsz == 0:
            continue
        if filesz > memsz:
            raise ImageError(f"damaged: segment {number} is larger in the file than in memory")
        if offset + filesz > len(data):
            raise ImageError(f"truncated: segment {number} lies beyond the end of the file")
        segments.append(Segment(paddr, data[offset : offset + filesz], memsz))
        if start is None and vaddr <= e_entry < vaddr + memsz:
            start = e_entry - vaddr + paddr
    if not segments:
        raise ImageError("nothing to load: the ELF file has no PT_LOAD segment")
    if start is None:
        raise ImageError(f"entry {e_entry:#x} is in no segment")
    return Image(Mode.LONG, start, tuple(segments))


def is_static(data: bytes) -> bool:
    """Whether an ELF-64 executable needs nothing else to run: no program header is PT_INTERP."""
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < _EHDR.size:
        raise ImageError("not a 64-bit ELF file")
    _, _, _, _, _, phoff, _, _, _, phentsize, phnum, *_ = _EHDR.unpack_from(data)
    if phentsize != _PHDR.size or phoff + phnum * phentsize > len(data):
        raise ImageError("damaged or truncated: no program headers")
    headers = _PHDR.iter_unpack(data[phoff : phoff + phnum * phentsize])
    return all(header[0] != _PT_INTERP for header in headers)


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """A file of at most `limit` bytes, what the guest's memory holds; a pipe will do."""
    with Path(path).open("rb") as file:
        information = os.fstat(file.fileno())
        if not (stat.S_ISREG(information.st_mode) or stat.S_ISFIFO(information.st_mode)):
            raise ImageError("not a regular file")
        if information.st_size > limit:
            raise ImageError(
                f"{information.st_size:#x} bytes do not fit into {limit:#x} bytes of memory"
            )
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ImageError(f"it does not fit into {limit:#x} bytes of memory")
    return data


def load_image(
    path: str | os.PathLike[str],
    mode: Mode | None = None,
    *,
    load: int | None = None,
    entry: int | None = None,
    limit: int,
) -> Image:
    """Read a file of at most `limit` bytes: ELF if it says so, else flat, in `mode` (long).

    ImageError for one that can't be used, OSError for one that can't be read.
    """
    data = read_file(path, limit)
    if data[:4] == b"\x7fELF":
        if mode is Mode.REAL or load is not None:
            raise ImageError("an ELF file says itself where it goes, and runs in long mode")
        return load_elf(data, entry=entry)
    return load_flat(data, mode or Mode.LONG, load=load, entry=entry)
