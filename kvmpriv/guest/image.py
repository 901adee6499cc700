"""Guest programs in files: flat binaries and ELF executables."""

from __future__ import annotations

import enum
import errno
import os
import select
import stat
import struct
import time
from typing import NamedTuple

from ..errors import ArgumentError

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


class ImageError(ArgumentError):
    """A guest's image can't be used; the message says what is wrong with it."""


class Mode(enum.Enum):
    """The processor mode that a guest starts in."""

    REAL = "real"  # 16 bit, as after reset
    LONG = "long"  # 64 bit, paging on, memory mapped one to one


#: The default address of a flat binary.  The boot structures of real mode are below it.
LOAD_ADDRESS = {Mode.REAL: 0x1000, Mode.LONG: 0x100000}


class Segment(NamedTuple):
    """Bytes for the guest physical address `address`; zeros follow up to `memory_size` bytes."""

    address: int
    data: bytes
    memory_size: int


class Image(NamedTuple):
    """A guest program."""

    #: The mode that the processor starts in.
    mode: Mode
    #: The guest physical address of the first instruction.
    entry: int
    segments: tuple[Segment, ...]


def load_flat(
    data: bytes, mode: Mode = Mode.LONG, *, load: int | None = None, entry: int | None = None
) -> Image:
    """An image of the flat binary `data`.  ImageError if it can't be used.

    `load` is its guest physical address (default: LOAD_ADDRESS of the mode); execution begins at
    `entry` (default: at `load`).
    """
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
_PIECE = 1 << 20  # bytes to read from a pipe at a time
_EM_X86_64, _ET_EXEC, _ET_DYN, _PT_LOAD, _PT_INTERP = 62, 2, 3, 1, 3
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")


def load_elf(data: bytes, *, entry: int | None = None) -> Image:
    """An image of a static ELF executable for x86-64 (gabi, chapters 4 and 5).

    Each PT_LOAD segment is loaded to its p_paddr.  Execution begins at e_entry, or at the guest
    physical address `entry`.  ImageError if the file can't be used.
    """
    if data[:4] != b"\x7fELF":
        raise ImageError("not an ELF file")
    if len(data) < _EHDR.size:
        raise ImageError(f"truncated: {len(data)} bytes do not hold an ELF header")
    # ident, type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum, …
    ident, kind, machine, _, e_entry, phoff, _, _, _, phentsize, phnum, *_ = _EHDR.unpack_from(data)
    # e_machine is at the same offset in every ELF file, in the file's own byte order.
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
    """True if the ELF-64 executable needs no dynamic linker: no program header is PT_INTERP.

    ImageError if `data` is not an ELF-64 file.
    """
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < _EHDR.size:
        raise ImageError("not a 64-bit ELF file")
    _, _, _, _, _, phoff, _, _, _, phentsize, phnum, *_ = _EHDR.unpack_from(data)
    if phentsize != _PHDR.size or phoff + phnum * phentsize > len(data):
        raise ImageError("damaged or truncated: no program headers")
    headers = _PHDR.iter_unpack(data[phoff : phoff + phnum * phentsize])
    return all(header[0] != _PT_INTERP for header in headers)


def read_file(path: str | os.PathLike[str], limit: int, timeout: float | None = None) -> bytes:
    """Read a regular file or a pipe of at most `limit` bytes.

    ImageError if it has more, is another kind of file, or does not fit into this process's memory;
    TimeoutError if a pipe has not ended after `timeout` seconds; OSError if it can't be read.
    """
    # Without O_NONBLOCK the call would wait until a process opens a pipe for writing.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb", buffering=0) as file:
        information = os.fstat(fd)
        if stat.S_ISFIFO(information.st_mode):
            return _read_pipe(fd, limit, timeout)
        if not stat.S_ISREG(information.st_mode):
            raise ImageError("not a regular file")
        size = information.st_size
        if size > limit:
            raise ImageError(f"{size:#x} bytes do not fit into {limit:#x} bytes of memory")
        try:
            data = bytearray(size)
            done = 0
            while done < size and (count := file.readinto(memoryview(data)[done:])):
                done += count
            return bytes(memoryview(data)[:done])
        except MemoryError:
            raise ImageError(
                f"this process can't get the memory to read it ({size:#x} bytes)"
            ) from None


def _read_pipe(fd: int, limit: int, timeout: float | None) -> bytes:
    deadline = None if timeout is None else time.monotonic() + timeout
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    data = bytearray()
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(wait):
            raise TimeoutError(errno.ETIMEDOUT, f"not read to its end after {timeout:g} s")
        piece = os.read(fd, _PIECE)
        if not piece:
            return bytes(data)
        data += piece
        if len(data) > limit:
            raise ImageError(f"it has more than {limit:#x} bytes, which do not fit into memory")


def load_image(
    path: str | os.PathLike[str],
    mode: Mode | None = None,
    *,
    load: int | None = None,
    entry: int | None = None,
    limit: int,
    timeout: float | None = None,
) -> Image:
    """Read a guest program of at most `limit` bytes: an ELF executable, or else a flat binary.

    `mode` (default: long), `load` and `entry` are for a flat binary; `timeout` in seconds is for a
    pipe.  ImageError for a file that can't be used, OSError for one that can't be read.
    """
    data = read_file(path, limit, timeout)
    if data[:4] == b"\x7fELF":
        if mode is Mode.REAL or load is not None:
            raise ImageError("an ELF file defines where it is loaded, and always runs in long mode")
        return load_elf(data, entry=entry)
    return load_flat(data, mode or Mode.LONG, load=load, entry=entry)
