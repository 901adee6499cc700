"""Host memory for guests: mappings that live as long as a slot uses them."""

from __future__ import annotations

import errno as _errno
import mmap
import os
from collections.abc import Callable
from typing import TypeVar

from .cdefs import kvm as kvm_h
from .errors import ArgumentError, ClosedError
from .libc import copy_in, copy_out, madvise, os_error
from .slots import HeldBySlots

__all__ = ["PAGE_SIZE", "HostMemory"]

PAGE_SIZE = 4096
_MAP_NORESERVE = 0x4000  # <asm-generic/mman-common.h>; the mmap module has it from 3.12 only
_ADDRESS_SPACE = 1 << 63  # larger than any
_CHUNK = 1 << 20  # bytes that `find` reads of a file at a time
_ffi = kvm_h.ffi
_Self = TypeVar("_Self", bound="HostMemory")


def _address(buffer: object) -> int:
    return int(_ffi.cast("uintptr_t", buffer))


class HostMemory(HeldBySlots):
    """A host mapping that guests can be given: anonymous, or of a file that can be mapped.

    `size` in bytes, a multiple of 4096; `fd` and `offset` (bytes, page aligned) map a file,
    MAP_SHARED.  `reserve=False` adds MAP_NORESERVE: address space alone, for sizes that are never
    filled.  ArgumentError for a bad size, offset or descriptor, OSError from mmap(2) (ENOMEM:
    larger than the host can promise, ENODEV: the file can't be mapped).

    A mapped file may have pages that this process can't access: private ones of a guest_memfd, or
    those beyond the file's end.  A load from them is the signal SIGBUS, which would end the
    process.  :meth:`read` and :meth:`write` raise an OSError (EFAULT) with the page's offset
    instead, and :meth:`find` skips them.  Only :meth:`view` has no such check.

    A context manager.  `userspace_addr` is where the mapping begins in this process.  :meth:`close`
    ends the use through this object; the mapping itself goes when no slot uses it any more and no
    view of it is left.  Slots call :meth:`hold`, :meth:`release` and :meth:`discard_held`.
    """

    def __init__(self, size: int, *, fd: int = -1, offset: int = 0, reserve: bool = True) -> None:
        if not 0 < size < _ADDRESS_SPACE or size % PAGE_SIZE:
            raise ArgumentError(
                f"the memory size must be a positive multiple of {PAGE_SIZE} below 2^63,"
                f" not {size:#x}"
            )
        if not 0 <= offset < _ADDRESS_SPACE or offset % PAGE_SIZE:
            raise ArgumentError(
                f"the offset must be a multiple of {PAGE_SIZE} below 2^63, not {offset:#x}"
            )
        if not -1 <= fd < 1 << 31:
            raise ArgumentError(f"fd must be a file descriptor, or -1 for none, not {fd}")
        super().__init__()
        self._of_file = fd >= 0
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
        except ValueError as error:  # the module itself looks at a regular file's size
            raise ArgumentError(f"{size:#x} bytes at {offset:#x} of fd {fd}: {error}") from None
        self.size = size
        self._pointer = _ffi.from_buffer("char[]", self._mmap)
        self.userspace_addr: int = int(_ffi.cast("uintptr_t", self._pointer))

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return not self._open

    def view(self) -> memoryview:
        """The bytes, to be read and written in place.  ClosedError after close.

        SIGBUS ends the process if it accesses a page of a mapped file that is private.
        """
        return memoryview(self._checked())

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        ArgumentError beyond the end, ClosedError after close; OSError, EFAULT, for a page of a
        mapped file that is private.
        """
        mapped = self._checked(offset, size)
        if not self._of_file:
            return mapped[offset : offset + size]
        buffer = _ffi.new("char[]", size)
        self._copy(copy_out, offset, size, buffer)
        return bytes(_ffi.buffer(buffer, size))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`; errors as :meth:`read`, with the pages before written."""
        mapped = self._checked(offset, len(data))
        if not self._of_file:
            mapped[offset : offset + len(data)] = data
            return
        source = bytes(data)
        self._checked(offset, len(source))
        self._copy(copy_in, offset, len(source), _ffi.from_buffer("char[]", source))

    def find(self, data: bytes, start: int = 0) -> int:
        """The offset of the first `data` from `start` on, or -1 if there is none.

        Of a mapped file it searches the pages that this process can read.
        """
        mapped = self._checked(start)
        if not self._of_file:
            return mapped.find(data, start)
        before = b""
        buffer = _ffi.new("char[]", _CHUNK)
        step = _CHUNK
        while start < self.size:
            size = min(step, self.size - start)
            done = max(0, copy_out(self.userspace_addr + start, size, _address(buffer)))
            seen = before + bytes(_ffi.buffer(buffer, done))
            if (found := seen.find(data)) >= 0:
                return start + done - len(seen) + found
            start += done
            before = seen[max(0, len(seen) - len(data) + 1) :] if len(data) > 1 else b""
            step = min(2 * step, _CHUNK)
            if done < size:  # what is found must not reach across a page that can't be read
                start, before = start - start % PAGE_SIZE + PAGE_SIZE, b""
                # The kernel pins all of the buffer, also where it can copy nothing to it.
                step = PAGE_SIZE
        return -1

    def _copy(
        self, copy: Callable[[int, int, int], int], offset: int, size: int, buffer: object
    ) -> None:
        done = 0
        while done < size:
            at = self.userspace_addr + offset + done
            copied = copy(at, size - done, _address(buffer) + done)
            if copied <= 0:
                page = (offset + done) // PAGE_SIZE * PAGE_SIZE
                what = "is private, or beyond the file's end: this process can't access it"
                if copied != -_errno.EFAULT:
                    what = f"can't be copied: {os.strerror(-copied)}"
                raise OSError(-copied or _errno.EIO, f"the page at {page:#x} of {self!r} {what}")
            done += copied

    def madvise(self, advice: int, offset: int = 0, size: int | None = None) -> None:
        """madvise(2) with one of ``mmap.MADV_*``; bytes, page aligned; `size` None: to the end."""
        size = self.size - offset if size is None else size
        self._advise(self._checked(offset, size), advice, offset, size)

    def discard(self, offset: int, size: int) -> None:
        """Give pages back to the system; they read as zeros afterwards.  Bytes, page aligned.

        A mapped file loses them too.  Other threads run meanwhile.  OSError: EINVAL where they are
        locked, EOPNOTSUPP for a file that can have no holes.
        """
        self._checked(offset, size)
        self.discard_held(offset, size)

    def discard_held(self, offset: int, size: int) -> None:
        """As :meth:`discard`, for a slot that holds the mapping: works after :meth:`close`."""
        self._advise(self._mapped(offset, size), self._discard, offset, size)

    def _advise(self, _mapping: mmap.mmap, advice: int, offset: int, size: int) -> None:
        # The caller's reference keeps the mapping, should another thread close this object.
        if error := madvise(self.userspace_addr + offset, size, advice):
            raise os_error(-error, f"madvise({size:#x} bytes at {offset:#x} of {self!r})")

    def _checked(self, offset: int = 0, size: int = 0) -> mmap.mmap:
        if not self._open:
            raise self._closed_error()
        return self._mapped(offset, size)

    def _mapped(self, offset: int, size: int) -> mmap.mmap:
        if self._mmap is None:
            raise self._closed_error()
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ArgumentError(
                f"{size:#x} bytes at {offset:#x} are not inside host memory of {self.size:#x} bytes"
            )
        return self._mmap

    def _end(self) -> None:
        if self._mmap is not None:
            _ffi.release(self._pointer)
            self._mmap = None  # a view that is left keeps the mapping, and ends it with itself

    def _closed_error(self) -> ClosedError:
        return ClosedError("host memory is closed")

    def __enter__(self: _Self) -> _Self:
        self._checked()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "CLOSED " if self.closed else ""
        return f"<HostMemory {state}{self.size:#x} bytes at {self.userspace_addr:#x}>"
