"""Small initial root file systems, made from files in memory.

The format is "newc" cpio, described in the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import errno
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import ArgumentError
from ..image import ImageError, is_static

__all__ = ["busybox", "check", "has_root", "pack", "with_agent"]

#: Where busybox may be that a user's PATH does not include.
_ELSEWHERE = "/bin:/sbin:/usr/sbin"
_AGENT, _AGENT_INIT = ".kvmpriv/agent", ".kvmpriv/init"
_MODULE, _MODULES_MAX = ".kvmpriv/modules/{}", 32
_AGENT_SCRIPT = f"exec /{_AGENT}"
#: newc without and with checksums; gzip, bzip2, lzma, xz, lzo, lz4 and zstd.
_ARCHIVES = (
    *(b"070701", b"070702", b"\x1f\x8b", b"\x1f\x9e", b"BZh", b"\x5d\0\0", b"\xfd7zXZ\0"),
    *(b"\x89LZO", b"\x02!L\x18", b"\x28\xb5\x2f\xfd"),
)
_BUSYBOX_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
{script}
"""


def pack(files: Mapping[str, bytes | str], *, executable: int = 0o111) -> bytes:
    """An archive of `files`: path -> content as bytes, or a symbolic link's target as a str.

    Directories are added as needed.  Each file has the mode 0644 and the bits of `executable`.
    ArgumentError for a path with an empty part, ``.`` or ``..``.
    """
    entries: dict[str, tuple[int, bytes]] = {}
    for path, content in files.items():
        parts = path.strip("/").split("/")
        if "" in parts or ".." in parts or "." in parts:
            raise ArgumentError(f"{path!r} has an empty part, . or .., which no archive can have")
        for depth in range(1, len(parts)):
            entries.setdefault("/".join(parts[:depth]), (stat.S_IFDIR | 0o755, b""))
        if isinstance(content, str):
            entry = stat.S_IFLNK | 0o777, content.encode()
        else:
            entry = stat.S_IFREG | 0o644 | executable, content
        entries["/".join(parts)] = entry
    archive = bytearray()
    for number, (path, (mode, content)) in enumerate([*entries.items(), ("TRAILER!!!", (0, b""))]):
        name = path.encode() + b"\0"
        fields = (number + 1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def busybox(
    script: str, files: Mapping[str, bytes | str] | None = None, *, program: bytes | None = None
) -> bytes:
    """A root file system with busybox and `files`, whose init runs the shell `script`.

    `program` is a statically linked busybox; by default that of this host.  FileNotFoundError if
    this host has none; ImageError if it is linked dynamically.
    """
    program = _busybox() if program is None else program
    if not is_static(program):
        raise ImageError(
            "busybox must be linked statically; on Debian it is in the package busybox-static"
        )
    folders = {f"{name}/.keep": b"" for name in ("proc", "sys", "dev", "tmp", "root")}
    init = _BUSYBOX_INIT.format(script=script).encode()
    return pack({**folders, "bin/busybox": program, "init": init, **(files or {})})


def with_agent(
    initrd: bytes | None,
    cmdline: str,
    modules: Sequence[bytes] = (),
    *,
    vsock_port: int | None = None,
) -> tuple[bytes, str]:
    """An initrd with the agent of `LinuxGuest`, and a kernel's command line that starts it.

    Without `initrd` it is one with busybox, in which the agent starts when everything is mounted.
    Else the agent is added to it, and starts before its init: the kernel unpacks several archives
    one after the other, also if the first of them is compressed.  With ``root=`` in the command
    line the agent answers once init has changed to that root file system.

    `modules` are kernel modules, which the agent loads first, in this order.  `vsock_port` is the
    port of the host that it connects to if the guest's kernel has vsock.
    """
    from .agent_ready import AGENT

    if len(modules) > _MODULES_MAX:
        raise ArgumentError(f"the agent loads up to {_MODULES_MAX} modules, not {len(modules)}")
    files = {_MODULE.format(chr(ord("0") + at)): data for at, data in enumerate(modules)}
    told = [f"kvmpriv_vsock={vsock_port}"] if vsock_port is not None else []
    if initrd is None:
        return busybox(_AGENT_SCRIPT, {_AGENT: AGENT, **files}), " ".join([*told, cmdline])
    words = cmdline.split()
    own = [word.partition("=")[2] for word in words if word.startswith("rdinit=")]
    kept = [word for word in words if not word.startswith("rdinit=")]
    if own:
        told.append(f"kvmpriv_init={own[-1]}")
    if has_root(cmdline):
        told.append("kvmpriv_wait_for_root=1")
    aligned = initrd + bytes(-len(initrd) % 4)
    archive = pack({_AGENT_INIT: AGENT, **files})
    return aligned + archive, " ".join([f"rdinit=/{_AGENT_INIT}", *told, *kept])


def check(initrd: bytes) -> bytes:
    """Return `initrd`; ImageError if no kernel can unpack it as an initial root file system.

    It must begin with a cpio archive, or with a compressed file: Linux, lib/decompress.c.
    """
    start = initrd[:4096].lstrip(b"\0")  # zeros between archives are skipped
    if not any(start.startswith(magic) for magic in _ARCHIVES):
        kinds = (
            (0x202, b"HdrS", "a kernel"),
            (0, b"\x7fELF", "a program"),
            (0, b"!<arch", "a package"),
        )
        found = [name for at, magic, name in kinds if initrd[at : at + len(magic)] == magic]
        is_not = f"{found[0]}, not" if found else "not"
        raise ImageError(
            f"{is_not} an initrd, which is a cpio archive, compressed or not: give the file that"
            " the distribution has installed beside its kernel (initrd.img-VERSION), or what"
            " `cpio -o -H newc` makes"
        )
    return initrd


def has_root(cmdline: str) -> bool:
    """Whether the words of a command line name a root file system, to which the initrd changes."""
    return any(word.startswith("root=") for word in cmdline.split())


def _busybox() -> bytes:
    path = shutil.which("busybox") or shutil.which("busybox", path=_ELSEWHERE)
    if path is None:
        what = "busybox is not installed; on Debian it is in the package busybox-static"
        raise FileNotFoundError(errno.ENOENT, what)
    return Path(path).read_bytes()
