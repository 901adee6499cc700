"""Writes the page of a recording to a file, whatever kind of file it is."""

from __future__ import annotations

import errno as _errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from .page import page
from .record import Recording

__all__ = ["is_same_file", "write_page"]

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


def write_page(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write the page of `recording` to `path`.  OSError if it can't be written.

    A regular file is replaced only when the page is complete, and keeps its mode; so an earlier
    page is not lost if something fails.  Symbolic links are followed.  A pipe, a device, and a
    file that can't be replaced (its directory can't be written to, it is a mount point, its name is
    too long for a second one) are written to in place.
    """
    found: os.stat_result | None = None
    with suppress(FileNotFoundError):
        found = Path(path).stat()
    target = os.path.realpath(path)
    if found is None or (stat.S_ISREG(found.st_mode) and _leads_to(target, found)):
        mode = None if found is None else stat.S_IMODE(found.st_mode)
        try:
            _replace(recording, target, mode)
        except OSError as error:
            if error.errno not in _NO_FILE_BESIDE:
                raise
        else:
            return
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.writelines(page(recording))


def _leads_to(target: str, found: os.stat_result) -> bool:
    """False for a link of /proc to a file that has no name any more."""
    try:
        return os.path.samestat(os.lstat(target), found)
    except OSError:
        return False


def _replace(recording: Recording, target: str, mode: int | None) -> None:
    beside = f"{target}.{os.getpid()}.new"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123
            if mode is not None:
                os.fchmod(fd, mode)
            file.writelines(page(recording))
        os.replace(beside, target)  # noqa: PTH105
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)  # noqa: PTH108
        raise
