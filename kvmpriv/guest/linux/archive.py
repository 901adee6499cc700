"""The stream in which files travel between this process and the agent, and the files at this end.

A record is a header of 16 bytes (kind, 0, size of the name, mode, size of the data), the name and
the data.  Kinds: ``d`` a folder, ``f`` a file, whose contents follow in records ``c`` until ``e``,
``l`` a symbolic link (the data is its target), ``!`` an error (errno and mode; the name is a path
in the guest), ``z`` the end.  The first record is what was asked for, and has no name; others are
below it, folders before what they contain, with a path relative to it.

What comes from the guest is not trusted: `Unpacker` refuses each name that could lead out of the
folder that it fills, and never follows a symbolic link.
"""

from __future__ import annotations

import errno as _errno
import os
import shutil
import stat
import struct
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

from ...errors import ArgumentError
from .protocol import PAYLOAD_MAX, ProtocolError

__all__ = ["Contents", "Tree", "Unpacker", "pack_bytes", "pack_path"]

_RECORD = struct.Struct("<BBHIQ")
_FOLDER, _FILE, _CONTENT, _END, _LINK, _ERROR, _LAST = b"dfcel!z"
_PIECE = 32 << 10
_PATH_MAX, _NAME_MAX = 4094, 255
_DEPTH_MAX = 200
_NOT_A_FILE = 0x10000
_IN_GUEST = " (in the guest)"
_KINDS = {
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def _record(kind: int, name: bytes = b"", mode: int = 0, data: bytes = b"") -> bytes:
    return _RECORD.pack(kind, 0, len(name), mode, len(data)) + name + data


def _what_it_is(mode: int) -> str:
    kind = _KINDS.get(stat.S_IFMT(mode), "not a file")
    return f"{kind}: only files, folders and symbolic links can be copied"


# -- to the guest ------------------------------------------------------------------------------


def pack_bytes(data: bytes, mode: int) -> Iterator[bytes]:
    """A file with the contents `data`."""
    yield _record(_FILE, mode=mode)
    for at in range(0, len(data), _PIECE):
        yield _record(_CONTENT, data=data[at : at + _PIECE])
    yield _record(_END) + _record(_LAST)


def pack_path(path: str | bytes | os.PathLike[str], mode: int | None = None) -> Iterator[bytes]:
    """The file or folder at `path`; its symbolic links stay links.

    `mode` replaces the mode of `path` itself.  ArgumentError for a device, a pipe or a socket.
    """
    yield from _pack(os.fsencode(path), b"", mode, follow=True)
    yield _record(_LAST)


def _pack(path: bytes, name: bytes, mode: int | None, *, follow: bool) -> Iterator[bytes]:
    if len(name) > _PATH_MAX:
        raise OSError(_errno.ENAMETOOLONG, os.strerror(_errno.ENAMETOOLONG), os.fsdecode(path))
    found = os.stat(path, follow_symlinks=follow)  # noqa: PTH116  # a name may be any bytes
    bits = found.st_mode & 0o7777 if mode is None else mode
    if stat.S_ISLNK(found.st_mode):
        yield _record(_LINK, name, 0o777, os.readlink(path))
    elif stat.S_ISDIR(found.st_mode):
        yield _record(_FOLDER, name, bits)
        for entry in sorted(os.listdir(path)):
            below = name + b"/" + entry if name else entry
            yield from _pack(path + b"/" + entry, below, None, follow=False)
    elif stat.S_ISREG(found.st_mode):
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            yield _record(_FILE, name, bits)
            while piece := file.read(_PIECE):
                yield _record(_CONTENT, data=piece)
            yield _record(_END)
    else:
        raise ArgumentError(f"{os.fsdecode(path)} is {_what_it_is(found.st_mode)}")


# -- from the guest ----------------------------------------------------------------------------


class _Sink(ABC):
    """Takes what an `Unpacker` has found and checked; `parts` is the path, () for the first."""

    @abstractmethod
    def folder(self, parts: tuple[bytes, ...], mode: int) -> None: ...
    @abstractmethod
    def file(self, parts: tuple[bytes, ...], mode: int) -> None: ...
    @abstractmethod
    def content(self, data: bytes) -> None: ...
    @abstractmethod
    def end_file(self) -> None: ...
    @abstractmethod
    def link(self, parts: tuple[bytes, ...], target: bytes) -> None: ...


class Unpacker:
    """Decodes the stream from the agent and gives `sink` what is in it.

    `limit` is how many bytes the whole stream may have.  ProtocolError for what the agent must not
    send, OSError for what it reports and for EFBIG.
    """

    def __init__(self, sink: _Sink, limit: int) -> None:
        self._sink = sink
        self._limit = limit
        self._size = 0
        self._data = bytearray()
        self._first = True
        self._in_file = False
        self._answer_only = False
        #: Whether the stream is complete.
        self.done: bool = False

    @classmethod
    def answer(cls) -> Unpacker:
        """For the agent's answer to files that it was sent: an error, or the end."""
        made = cls(Contents(), PAYLOAD_MAX)
        made._answer_only, made._first = True, False
        return made

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._size += len(data)
        if self._size > self._limit:
            raise OSError(_errno.EFBIG, f"more than the limit of {self._limit} bytes came")
        self._data += data
        at = 0
        try:
            while len(self._data) - at >= _RECORD.size:
                kind, zero, name_size, mode, size = _RECORD.unpack_from(self._data, at)
                if self.done or zero or name_size > _PATH_MAX or size > PAYLOAD_MAX:
                    raise ProtocolError("sent a damaged record of a file")
                start = at + _RECORD.size
                end = start + name_size + size
                if len(self._data) < end:
                    return
                name = bytes(self._data[start : start + name_size])
                content = bytes(self._data[start + name_size : end])
                at = end
                self._take(kind, name, mode, content)
        finally:
            del self._data[:at]

    def _take(self, kind: int, name: bytes, mode: int, data: bytes) -> None:
        if kind == _ERROR:
            raise _reported(name, data)
        if kind in (_CONTENT, _END):
            if not self._in_file:
                raise ProtocolError("sent contents outside a file")
            if kind == _CONTENT:
                self._sink.content(data)
            else:
                self._in_file = False
                self._sink.end_file()
            return
        kinds = (_LAST,) if self._answer_only else (_FOLDER, _FILE, _LINK, _LAST)
        if self._in_file or kind not in kinds:
            raise ProtocolError(f"sent a record of kind {kind} at the wrong place")
        if kind == _LAST:
            if self._first:
                raise ProtocolError("sent no file")
            self.done = True
            return
        parts = _checked_parts(name, first=self._first)
        self._first = False
        if kind == _FOLDER:
            self._sink.folder(parts, mode & 0o777)
        elif kind == _FILE:
            self._in_file = True
            self._sink.file(parts, mode & 0o777)
        else:
            _check_link(parts, data)
            self._sink.link(parts, data)


def _reported(name: bytes, data: bytes) -> Exception:
    """The error that the agent reports about the file `name` in the guest."""
    if len(data) != 8:
        return ProtocolError("sent a damaged error")
    error, mode = struct.unpack("<II", data)
    path = os.fsdecode(name)
    if error == _NOT_A_FILE:
        return OSError(_errno.EINVAL, _what_it_is(mode) + _IN_GUEST, path)
    if not 0 < error < 4096:
        return ProtocolError(f"sent the errno {error}")
    return OSError(error, os.strerror(error) + _IN_GUEST, path)


def _checked_parts(name: bytes, *, first: bool) -> tuple[bytes, ...]:
    if first:
        if name:
            raise ProtocolError("sent a name for what was asked for")
        return ()
    parts = tuple(name.split(b"/"))
    for part in parts:
        if part in (b"", b".", b"..") or b"\0" in part or len(part) > _NAME_MAX:
            raise ProtocolError(f"sent a file with the name {name!r}")
    if len(parts) > _DEPTH_MAX:
        raise ProtocolError(f"sent a file in more than {_DEPTH_MAX} folders")
    return parts


def _check_link(parts: tuple[bytes, ...], target: bytes) -> None:
    """Refuse a link that leads, or could lead through another link, out of the folder.

    ``..`` may only be at the beginning of its target: after the name of a link it would be relative
    to where that leads.
    """
    steps = target.split(b"/")
    up = 0
    while up < len(steps) and steps[up] == b"..":
        up += 1
    if (
        not target
        or target.startswith(b"/")
        or b"\0" in target
        or b".." in steps[up:]
        or up > max(0, len(parts) - 1)
        or not parts
    ):
        raise ProtocolError(f"sent a symbolic link {b'/'.join(parts)!r} that leads to {target!r}")


class Contents(_Sink):
    """Keeps the contents of one file in memory."""

    def __init__(self) -> None:
        #: What has come until now.
        self.data: bytearray = bytearray()

    def folder(self, parts: tuple[bytes, ...], mode: int) -> None:
        raise IsADirectoryError(
            _errno.EISDIR, "a folder in the guest: give `target`, where to copy it"
        )

    def file(self, parts: tuple[bytes, ...], mode: int) -> None:
        if parts:
            raise ProtocolError("sent a second file")

    def content(self, data: bytes) -> None:
        self.data += data

    def end_file(self) -> None:
        pass

    def link(self, parts: tuple[bytes, ...], target: bytes) -> None:
        raise ProtocolError("sent a symbolic link")


class Tree(_Sink):
    """Writes a file or a folder beside `target`, and moves it there when it is complete.

    A file replaces one that is there; a folder must not exist yet (FileExistsError).  `commit`
    moves it; leaving the block without it removes what was written.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self._target = os.path.abspath(target)  # noqa: PTH100
        self._place, name = os.path.split(self._target)
        self._prefix = f".{name[:100]}."
        self._temporary: str | None = None
        self._file: IO[bytes] | None = None
        self._mode = 0
        # The folders from the top to where the last entry was: name, descriptor, mode.
        self._stack: list[tuple[bytes, int, int]] = []

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        while self._stack:
            os.close(self._stack.pop()[1])
        if self._temporary is not None:
            _remove(self._temporary)

    def _enter(self, parts: tuple[bytes, ...]) -> int:
        """The descriptor of the folder of the entry `parts`; folders left are complete."""
        parents = parts[:-1]
        if not self._stack:
            raise ProtocolError("sent more than one file")
        while len(self._stack) > 1 + len(parents) or tuple(
            name for name, _, _ in self._stack[1:]
        ) != tuple(parents[: len(self._stack) - 1]):
            self._leave()
        if len(self._stack) != 1 + len(parents):
            raise ProtocolError(f"sent {b'/'.join(parts)!r} before its folder")
        return self._stack[-1][1]

    def _leave(self) -> None:
        _, fd, mode = self._stack.pop()
        try:
            os.fchmod(fd, mode)
        finally:
            os.close(fd)

    def folder(self, parts: tuple[bytes, ...], mode: int) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        if not parts:
            if os.path.lexists(self._target):
                raise FileExistsError(
                    _errno.EEXIST, os.strerror(_errno.EEXIST), os.fspath(self._target)
                )
            self._temporary = tempfile.mkdtemp(prefix=self._prefix, dir=self._place)
            self._stack.append((b"", os.open(self._temporary, flags), mode))
            return
        above = self._enter(parts)
        os.mkdir(parts[-1], 0o700, dir_fd=above)
        self._stack.append((parts[-1], os.open(parts[-1], flags, dir_fd=above), mode))

    def file(self, parts: tuple[bytes, ...], mode: int) -> None:
        self._mode = mode
        if not parts:
            if os.path.isdir(self._target):  # noqa: PTH112
                raise IsADirectoryError(_errno.EISDIR, os.strerror(_errno.EISDIR), self._target)
            fd, self._temporary = tempfile.mkstemp(prefix=self._prefix, dir=self._place)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(parts[-1], flags, 0o600, dir_fd=self._enter(parts))
        self._file = os.fdopen(fd, "wb", buffering=0)

    def content(self, data: bytes) -> None:
        assert self._file is not None
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def end_file(self) -> None:
        assert self._file is not None
        os.fchmod(self._file.fileno(), self._mode)
        self._file.close()
        self._file = None

    def link(self, parts: tuple[bytes, ...], target: bytes) -> None:
        os.symlink(target, parts[-1], dir_fd=self._enter(parts))

    def commit(self) -> None:
        """Move what was written to its place."""
        while self._stack:
            self._leave()
        assert self._temporary is not None
        os.rename(self._temporary, self._target)  # noqa: PTH104
        self._temporary = None


def _remove(path: str) -> None:
    """Remove a file or a folder, also one whose folders were copied without permission to write."""
    if not os.path.isdir(path):  # noqa: PTH112
        with suppress(OSError):
            os.unlink(path)  # noqa: PTH108
        return
    with suppress(OSError):
        os.chmod(path, 0o700)  # noqa: PTH101
        for folder, names, _ in os.walk(path):
            for name in names:
                inner = os.path.join(folder, name)  # noqa: PTH118
                if not os.path.islink(inner):  # noqa: PTH114
                    os.chmod(inner, 0o700)  # noqa: PTH101
    shutil.rmtree(path, ignore_errors=True)
