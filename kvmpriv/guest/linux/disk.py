"""A disk for a Linux guest, virtio-blk over a file, and random numbers, virtio-rng.

VIRTIO 1.2, 5.2 and 5.4.
"""

from __future__ import annotations

import errno as _errno
import fcntl
import os
import shlex
import stat
import struct
from collections.abc import Callable

from ... import libc
from ...errors import ArgumentError
from .holder import holder_of
from .virtio import EVENT_INDEX, INDIRECT, Chain, Queue, RingError, VirtioDevice

__all__ = ["Block", "Entropy"]

_SECTOR = 512
_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_IN, _OUT, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES = 0, 1, 4, 8, 11, 13
_OK, _IO_ERROR, _UNSUPPORTED = 0, 1, 2
_F_SEG_MAX, _F_RO, _F_FLUSH, _F_DISCARD, _F_WRITE_ZEROES = 1 << 2, 1 << 5, 1 << 9, 1 << 13, 1 << 14
_SEGMENTS_MAX = 126
# capacity, size_max, seg_max; at 36 the limits of the two requests, and that zeroes may unmap
_CONFIG = struct.Struct("<QII20xIIIIIB3x")
_RANGE = struct.Struct("<QII")  # sector, number of sectors, flags
_UNMAP = 1
_RANGES_MAX, _DISCARD_MAX = 16, 1 << 22  # sectors: 2 GiB
_ZEROES_MAX = 1 << 16  # sectors: 32 MiB, which may have to be written
_PIECE = 1 << 20
_HOLE = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
_ZERO = libc.FALLOC_FL_ZERO_RANGE | libc.FALLOC_FL_KEEP_SIZE
_ID_SIZE = 20
# The first bytes of disk images that are not raw: magic -> the name that qemu-img calls them by.
_FORMATS = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx"}


class Block(VirtioDevice):
    """A disk whose contents are the raw image or block device at `path`.

    It is read-only if the file can't be opened for writing.  `complain` is called with a line of
    text when the host can't read or write the file.

    A flush returns when the data is on the host's disk (fdatasync); a driver that does not use
    flushes gets that for each write.  After a flush that failed all others fail, too: what was
    written before may be lost, and the kernel reports that once.  A discard makes a hole in the
    file.

    OSError if the file can't be opened; EWOULDBLOCK, with who has it, if another guest uses it,
    which may only read it if this one does, too.  ArgumentError if it
    is not a file or a block device, is not a multiple of 512 bytes, or is a disk image in another
    format than raw.
    """

    device_id = 2
    name = "virtio-blk"
    bounced = 4 << 20  # a few of the largest requests, of 1280 KiB

    def __init__(
        self, path: str | os.PathLike[str], complain: Callable[[str], object] = lambda text: None
    ) -> None:
        self._complain = complain
        self.path: str = os.fspath(path)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self.read_only: bool = False
        except OSError as error:
            if error.errno not in (_errno.EACCES, _errno.EROFS, _errno.EPERM):
                raise
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.read_only = True
        try:
            kind = os.fstat(self._fd).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                raise ArgumentError("a disk must be a file or a block device")
            #: In bytes.
            self.size: int = os.lseek(self._fd, 0, os.SEEK_END)
            self._check_format()
            if self.size == 0 or self.size % _SECTOR:
                raise ArgumentError(
                    f"the size of a disk must be a multiple of {_SECTOR} bytes, more than 0, not"
                    f" {self.size}"
                )
            try:
                lock = fcntl.LOCK_SH if self.read_only else fcntl.LOCK_EX
                fcntl.flock(self._fd, lock | fcntl.LOCK_NB)
            except BlockingIOError as error:
                who = holder_of(self._fd)
                raise OSError(error.errno, f"in use by another guest, of {who}") from None
        except BaseException:
            os.close(self._fd)
            raise
        self.features: int = _F_SEG_MAX | _F_FLUSH | INDIRECT | EVENT_INDEX
        self.features |= _F_RO if self.read_only else _F_DISCARD | _F_WRITE_ZEROES
        limits = (_DISCARD_MAX, _RANGES_MAX, 1, _ZEROES_MAX, 1, 1)
        config = _CONFIG.pack(self.size // _SECTOR, 0, _SEGMENTS_MAX, *limits)
        self.config: bytes = config.ljust(64, b"\0")
        self._write_through = False
        self._lost: OSError | None = None

    def _check_format(self) -> None:
        start = os.pread(self._fd, max(map(len, _FORMATS)), 0)
        for magic, kind in _FORMATS.items():
            if start.startswith(magic):
                raise ArgumentError(
                    f"a {kind} image; only raw disks are supported.  Convert it with:"
                    f" qemu-img convert -O raw {shlex.quote(self.path)}"
                    f" {shlex.quote(self.path + '.raw')}"
                )

    def negotiated(self, accepted: int) -> None:
        self._write_through = not accepted & _F_FLUSH

    def serve(self, number: int, queue: Queue) -> bool:
        done = False
        while (chain := queue.pop()) is not None:
            written = self._request(chain)
            queue.push(chain, written)
            done = True
        return done

    def _request(self, chain: Chain) -> int:
        """Serve a request; returns how many bytes were written to the guest."""
        readable, writable = list(chain.readable), list(chain.writable)
        header = _take(readable, _HEADER.size)
        if len(header) < _HEADER.size:
            raise RingError(f"sent a disk request of {len(header)} bytes")
        while writable and not writable[-1]:
            writable.pop()
        if not writable:
            raise RingError("sent a disk request without a byte for its status")
        status_at = writable[-1][-1:]
        writable[-1] = writable[-1][:-1]
        kind, _, sector = _HEADER.unpack(header)
        try:
            status, written = self._do(kind, sector, readable, writable)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            if error.errno in (_errno.ENOSPC, _errno.EDQUOT):
                why += " on the host: the guest's write has failed; make room, then write again"
            self._complain(f"{self.name}: {self.path}: {why}")
            status, written = _IO_ERROR, 0
        status_at[0] = status
        return written + 1

    def _do(
        self, kind: int, sector: int, readable: list[memoryview], writable: list[memoryview]
    ) -> tuple[int, int]:
        if kind == _FLUSH:
            self._flush()
            return _OK, 0
        if kind == _GET_ID:
            name = os.path.basename(os.fsencode(self.path))  # noqa: PTH119  # a name may be any bytes
            return _OK, _put(writable, name[:_ID_SIZE].ljust(_ID_SIZE, b"\0"))
        if kind in (_DISCARD, _WRITE_ZEROES):
            return self._clear(kind, b"".join(readable)), 0
        if kind not in (_IN, _OUT):
            return _UNSUPPORTED, 0
        parts = writable if kind == _IN else readable
        offset, length = sector * _SECTOR, sum(map(len, parts))
        outside = length % _SECTOR or offset + length > self.size
        if outside or len(parts) > _SEGMENTS_MAX or (kind == _OUT and self.read_only):
            return _IO_ERROR, 0
        call = os.preadv if kind == _IN else os.pwritev
        written = self._transfer(call, parts, offset, length, kind)
        if kind == _OUT and self._write_through:
            self._flush()
        return _OK, written

    def _flush(self) -> None:
        if self._lost is not None:
            raise self._lost
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._lost = error
            raise

    def _clear(self, kind: int, data: bytes) -> int:
        """Discard ranges of the disk, or write zeroes to them; returns the status."""
        count, odd = divmod(len(data), _RANGE.size)
        ranges_max, most = (_RANGES_MAX, _DISCARD_MAX) if kind == _DISCARD else (1, _ZEROES_MAX)
        if self.read_only or odd or not 1 <= count <= ranges_max:
            return _IO_ERROR
        ranges = list(_RANGE.iter_unpack(data))
        for sector, sectors, flags in ranges:
            if flags & ~_UNMAP or (flags and kind == _DISCARD):
                return _UNSUPPORTED
            if not 1 <= sectors <= most or (sector + sectors) * _SECTOR > self.size:
                return _IO_ERROR
        for sector, sectors, flags in ranges:
            offset, length = sector * _SECTOR, sectors * _SECTOR
            mode = _HOLE if kind == _DISCARD or flags & _UNMAP else _ZERO
            error = -libc.fallocate(self._fd, mode, offset, length)
            if error in (_errno.EOPNOTSUPP, _errno.EINVAL):  # EINVAL: a block device's alignment
                if kind == _WRITE_ZEROES:
                    self._write_zeroes(offset, length)
            elif error:
                raise libc.os_error(error, "fallocate")
        if self._write_through:
            self._flush()
        return _OK

    def _write_zeroes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, _PIECE)))
        end = offset + length
        while offset < end:
            offset += os.pwrite(self._fd, zeroes[: end - offset], offset)

    def _transfer(
        self,
        call: Callable[[int, list[memoryview], int], int],
        parts: list[memoryview],
        offset: int,
        length: int,
        kind: int,
    ) -> int:
        """Read or write all `parts`; returns how many bytes were written to the guest."""
        total = call(self._fd, parts, offset) if length else 0
        if total == length:
            return total if kind == _IN else 0
        left = _after(parts, total)
        while left:
            size = call(self._fd, left, offset + total)
            if size == 0:
                raise OSError(_errno.EIO, "the file has shrunk")
            total += size
            left = _after(left, size)
        return total if kind == _IN else 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Entropy(VirtioDevice):
    """Random numbers from the host's kernel."""

    device_id = 4
    name = "virtio-rng"
    features = INDIRECT | EVENT_INDEX
    _MOST = 1 << 16  # bytes for a request, however much the guest asks for
    bounced = _MOST

    def serve(self, number: int, queue: Queue) -> bool:
        done = False
        while (chain := queue.pop()) is not None:
            room = sum(map(len, chain.writable))
            queue.push(chain, _put(list(chain.writable), os.urandom(min(room, self._MOST))))
            done = True
        return done


def _after(parts: list[memoryview], size: int) -> list[memoryview]:
    """What is left of `parts` after their first `size` bytes."""
    for number, part in enumerate(parts):
        if size < len(part):
            return [part[size:], *parts[number + 1 :]]
        size -= len(part)
    return []


def _take(parts: list[memoryview], size: int) -> bytes:
    """Remove the first `size` bytes from `parts` and return them."""
    if parts and len(parts[0]) == size:
        return bytes(parts.pop(0))
    data = b""
    while parts and len(data) < size:
        wanted = size - len(data)
        data += bytes(parts[0][:wanted])
        parts[0] = parts[0][wanted:]
        if not parts[0]:
            parts.pop(0)
    return data


def _put(parts: list[memoryview], data: bytes) -> int:
    """Write as much of `data` as fits into `parts`; returns how much."""
    done = 0
    for part in parts:
        piece = data[done : done + len(part)]
        part[: len(piece)] = piece
        done += len(piece)
    return done
