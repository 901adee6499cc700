"""Writes a file that a user named, whatever kind of file it is: nothing there is destroyed."""

from __future__ import annotations

import errno as _errno
import os
import stat
from contextlib import suppress
from pathlib import Path

__all__ = ["check_file", "is_same_file", "write_file"]

#: What making a file beside another one, or renaming it over that, fails with where the other file
#: may still be written to.
_NO_FILE_BESIDE = frozenset(
    (_errno.EACCES, _errno.EPERM, _errno.EROFS, _errno.EBUSY, _errno.ENAMETOOLONG)
)


def is_same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """True if both paths exist and lead to the same file."""
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


def write_file(path: str | os.PathLike[str], text: str, *, replace_only: bool = False) -> None:
    """Write `text` to `path` as UTF-8.  OSError if that is not possible.

    A regular file is replaced in one step when all of `text` is on the disk: another process reads
    the old file or the new one, and the old one is not lost if something fails.  The new file has
    the mode, and where this user may set it the owner, of the old one.  Symbolic links are
    followed.  A pipe, a character device and a file that only a link of /proc leads to are written
    to in place; a directory, a block device and a socket are refused.  The file that is open as
    standard output or error gets `text` after what it contains.

    A regular file that can't be replaced (its directory can't be written to, or it is a mount
    point) is written to in place; with `replace_only` it is left alone, and OSError is raised.
    """
    found = _look(path)
    target = os.path.realpath(path)
    if (standard := _standard_stream(found)) is not None:
        with open(os.dup(standard), "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
        return
    if found is None or (stat.S_ISREG(found.st_mode) and _leads_to(path, target)):
        try:
            _replace(target, text, found)
        except OSError as error:
            if replace_only or error.errno not in _NO_FILE_BESIDE:
                raise
        else:
            return
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(text)


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise the OSError that ``write_file(path, ..., replace_only=True)`` would end with.

    For a caller that writes only after a long time.  It makes a temporary file in the directory
    and removes it; a pipe and a device are not opened.
    """
    found = _look(path)
    if _standard_stream(found) is not None:
        return
    if found is None or stat.S_ISREG(found.st_mode):
        fd, beside = _open_beside(os.path.realpath(path))
        os.close(fd)
        os.unlink(beside)  # noqa: PTH108


def _look(path: str | os.PathLike[str]) -> os.stat_result | None:
    """The status of the file, None if there is none; OSError for what must not be written to."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(_errno.EISDIR, os.strerror(_errno.EISDIR), os.fspath(path))
    if stat.S_ISBLK(found.st_mode):
        raise OSError(_errno.EPERM, "a block device is not written to", os.fspath(path))
    return found


def _standard_stream(found: os.stat_result | None) -> int | None:
    """The descriptor, if the file is open as standard output or error: /dev/stdout leads to it."""
    for fd in (1, 2):
        with suppress(OSError):  # it may be closed
            if found is not None and os.path.samestat(os.fstat(fd), found):
                return fd
    return None


def _leads_to(path: str | os.PathLike[str], target: str) -> bool:
    """False if `target` is not the file: a link of /proc to a file of another root or without name.

    Another process may replace the file between the two looks, but not each time.
    """
    for _ in range(100):
        with suppress(OSError):
            if os.path.samestat(os.lstat(target), os.stat(path)):  # noqa: PTH116
                return True
    return False


def _open_beside(target: str) -> tuple[int, str]:
    """Make a file in the directory of `target`; returns its descriptor and path.

    Programs that read every file of a directory ignore it: its name begins with a dot.  No other
    process makes the same name, in whatever PID namespace it is.
    """
    beside = os.path.join(os.path.dirname(target), f".kvmpriv-{os.urandom(8).hex()}.new")  # noqa: PTH118, PTH120
    return os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), beside


def _replace(target: str, text: str, old: os.stat_result | None) -> None:
    fd, beside = _open_beside(target)
    try:
        with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123
            if old is not None:
                with suppress(PermissionError):  # only root gives a file away
                    os.fchown(fd, old.st_uid, old.st_gid)
                os.fchmod(fd, stat.S_IMODE(old.st_mode))
            file.write(text)
            file.flush()
            os.fsync(fd)  # a disk may report only now that it is full
        os.replace(beside, target)  # noqa: PTH105
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)  # noqa: PTH108
        raise
