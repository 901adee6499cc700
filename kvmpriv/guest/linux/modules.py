"""Drivers for virtio devices that a stock kernel has as modules, from this host's /lib/modules."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..image import ImageError

__all__ = ["CONSOLE", "DRIVERS", "VSOCK", "Module", "find_modules"]

#: The drivers of the agent's port, and of its vsock.
CONSOLE, VSOCK = "virtio_console", "vmw_vsock_virtio_transport"
#: What a guest of kvmpriv can need.
DRIVERS = ("virtio_mmio", CONSOLE, "virtio_blk", "virtio_net", "virtio_rng")
_FOLDER = Path("/lib/modules")


class Module(NamedTuple):
    """A kernel module."""

    name: str
    contents: bytes


def find_modules(
    release: str, folder: Path = _FOLDER, *, drivers: Sequence[str] = DRIVERS
) -> list[Module]:
    """Those of `drivers` that the kernel `release` has as modules, in the order to load them.

    [] if `folder` has no modules for it: the kernel may have the drivers built in, or the initrd
    may bring them along.  ImageError for a module that can't be unpacked.
    """
    here = folder / release
    if not release or "/" in release or release.startswith("."):
        return []  # a name from the kernel's file, which must not lead elsewhere
    try:
        lines = (here / "modules.dep").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    needs: dict[str, list[str]] = {}  # name -> its file, and those of what it needs
    for line in lines:
        path, _, others = line.partition(":")
        needs[_name(path)] = [path, *others.split()]
    found: dict[str, Module] = {}
    for driver in drivers:
        for path in reversed(needs.get(driver, [])):  # depmod lists the first to load last
            if path not in found:
                found[path] = Module(_name(path), _contents(here / path))
    return list(found.values())


def _name(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


def _contents(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            return gzip.decompress(data)
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix == ".zst":
            return _unzstd(path, data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ImageError(f"the kernel module {path} can't be read: {error}") from None
    return data


def _unzstd(path: Path, data: bytes) -> bytes:
    program = shutil.which("zstd")
    if program is None:
        raise ImageError(f"the kernel module {path} is compressed with zstd: install zstd")
    done = subprocess.run(  # noqa: S603  # a program of the caller's PATH
        [program, "-dc"], input=data, capture_output=True, check=False
    )
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip()
        raise ImageError(f"the kernel module {path} can't be read: {why}")
    return done.stdout
