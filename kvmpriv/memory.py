"""Host memory for guests: mappings that live as long as a slot uses them."""

from __future__ import annotations

import mmap
import os
from typing import Any

from .cdefs import kvm as kvm_h

__all__ = ["PAGE_SIZE", "HostMemory"]

PAGE_SIZE = 4096
_MAP_NORESERVE = 0x4000  # <asm-generic/mman-common.h>; the mmap module has it from 3.12 only
_ffi = kvm_h.ffi


class HostMemory:
    """A host mapping that guests can be given: anonymous, or of a file that can be mapped.

    `size` in bytes, a multiple of 4096; `fd` and `offset` (bytes, page aligned) map a file,
    MAP_SHARED.  `reserve=False` adds MAP_NORESERVE: address space alone, for sizes that will
    never be filled.  ValueError for a bad size, OSError from mmap(2) (ENOMEM: larger than the
    host can promise, ENODEV: the file can't be mapped).

    `close` ends the use through this object; the mapping itself goes when no slot has it any more
    and no view of it is left.
    """

    def __init__(self, size: int, *, fd: int = -1, offset: int = 0, reserve: bool = True) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"memory size {size:#x} is not a positive multiple of {PAGE_SIZE}")
        if size >= 1 << 63:
            raise ValueError(f"memory size {size:#x} is beyond any address space")
        self._discard = mmap.MADV_REMOVE if fd >= 0 else mmap.MADV_DONTNEED
        if fd >= 0:
            flags = mmap.MAP_SHARED
        else:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0 if reserve else _MAP_NORESERVE)
        try:
            self._mmap: mmap.mmap | None = mmap.mmap(fd, size, flags=flags, offset=offset)
        except OSError as error:
            raise OSError(
                error.errno, f"mmap({size:#x} bytes): {os.strerror(error.errno or 0)}"
            ) from None
        self.size = size
        self._pointer: Any = _ffi.from_buffer("char[]", self._mmap)
        #: Where the mapping begins in this process.
        self.userspace_addr = int(_ffi.cast("uintptr_t", self._pointer))
        self._open = True
        self._slots = 0

    @property
    def closed(self) -> bool:
        return not self._open

    def view(self) -> memoryview:
        """The bytes, to be read and written in place."""
        return memoryview(self._checked())

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; ValueError beyond the end."""
        return self._checked(offset, size)[offset : offset + size]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`; ValueError beyond the end."""
        self._checked(offset, len(data))[offset : offset + len(data)] = data

    def find(self, data: bytes, start: int = 0) -> int:
        """Where `data` is, from `start` on; -1 where it is not."""
        return self._checked(start).find(data, start)

    def madvise(self, advice: int, offset: int = 0, size: int | None = None) -> None:
        """madvise(2) with one of ``mmap.MADV_*``."""
        self._checked().madvise(advice, offset, self.size - offset if size is None else size)

    def discard(self, offset: int, size: int) -> None:
        """Give pages back to the system; they read as zeros afterwards.  Bytes, page aligned.

        A mapped file loses them too.  OSError: EINVAL where they are locked, EOPNOTSUPP for a file
        that can have no holes.
        """
        self._checked(offset, size)
        self.discard_held(offset, size)

    def discard_held(self, offset: int, size: int) -> None:
        """The same, for a slot that holds the mapping: works when its maker has closed it."""
        self._mapped(offset, size).madvise(self._discard, offset, size)

    def _checked(self, offset: int = 0, size: int = 0) -> mmap.mmap:
        if not self._open:
            raise ValueError("host memory is closed")
        return self._mapped(offset, size)

    def _mapped(self, offset: int, size: int) -> mmap.mmap:
        if self._mmap is None:
            raise ValueError("host memory is closed")
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(
                f"{size:#x} bytes at {offset:#x} are not inside host memory of {self.size:#x} bytes"
            )
        return self._mmap

    def hold(self) -> None:
        """A slot begins to use the mapping."""
        if not self._open:
            self._checked()
        self._slots += 1

    def release(self) -> None:
        """A slot has ended."""
        self._slots -= 1
        if not self._open:
            self._unmap_if_unused()

    def close(self) -> None:
        self._open = False
        self._unmap_if_unused()

    def _unmap_if_unused(self) -> None:
        if not self._open and self._slots == 0 and self._mmap is not None:
            _ffi.release(self._pointer)
            self._mmap = None  # a view that is left keeps the mapping, and ends it with itself

    def __enter__(self) -> HostMemory:
        self._checked()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "CLOSED " if self.closed else ""
        return f"<HostMemory {state}{self.size:#x} bytes at {self.userspace_addr:#x}>"
