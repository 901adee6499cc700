"""A disk with Debian, its kernel and its initrd, made from Debian's own packages, in the cache.

    scripts/distribution

It prints the folder with root.img (a raw ext4 file system), vmlinuz and initrd.img.  mmdebstrap
installs the packages into a folder of its own, which needs root; the mirror and the proxy are those
of the system.  What was made is used again as long as the recipe and the release are the same;
remove the folder to have newer packages.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from .command import Parser
from .errors import Refused, Status, say
from .locks import locked
from .packages import DISTRIBUTION, because, ensure
from .paths import cache_root
from .sources import KEYS, codename_of_system, mirror

SUITE = "bookworm"  # on a system that is not Debian
FILES = ("root.img", "vmlinuz", "initrd.img")
#: With what they depend on: a kernel, the initrd's maker, and an init.
PACKAGES = ("systemd-sysv", "linux-image-amd64", "initramfs-tools", "zstd")
SIZE = "1G"  # of the disk, which is sparse
NEED_GIB = 2.5
#: In the root file system; root logs in without a password.
SETUP = """\
set -e
chroot "$1" passwd --quiet --delete root
echo guest >"$1/etc/hostname"
echo '/dev/vda / ext4 errors=remount-ro 0 1' >"$1/etc/fstab"
rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*
"""
#: A bind mount does not show /proc, /sys and /dev, which are mounted below "$1" now.
COPY = """\
cp "$1/vmlinuz" "$1/initrd.img" {out}
PATH=$PATH:/usr/sbin:/sbin
root=$(mktemp -d) && mount --bind "$1" "$root" || exit
mkfs.ext4 -q -L root -d "$root" {out}/root.img {size}
status=$?
umount "$root" && rmdir "$root"
exit $status
"""
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


def suite() -> str:
    """Debian's release: that of this system."""
    return codename_of_system() or SUITE


def key() -> str:
    """What identifies a disk: all that goes into it but the versions of the packages."""
    parts = (suite(), *PACKAGES, SIZE, SETUP, COPY, *EXCLUDED)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _command(out: Path) -> list[str]:
    command = ["mmdebstrap", "--quiet", "--variant=essential", "--format=null"]
    command += [f"--include={','.join(PACKAGES)}", "--aptopt=APT::Install-Recommends false"]
    command += [f"--aptopt={line}" for line in _apt_settings()]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    copy = COPY.format(out=shlex.quote(str(out)), size=SIZE)
    command += [f"--customize-hook={SETUP}", f"--customize-hook={copy}"]
    return [*command, suite(), "/dev/null", f"deb [signed-by={KEYS}] {mirror()} {suite()} main"]


def _apt_settings() -> list[str]:
    """How the system's apt reaches its mirror; mmdebstrap has a configuration of its own."""
    dumped = subprocess.run(["apt-config", "dump"], check=False, capture_output=True, text=True)
    wanted = re.compile(r"Acquire::(https?::Proxy|Check-Valid-Until|Check-Date)\b")
    return [line for line in dumped.stdout.splitlines() if wanted.match(line)]


def find_or_make() -> Path:
    """The folder with FILES, which are made if there are none."""
    cache = cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    entry = cache / f"distribution.{key()}"
    if (entry / FILES[0]).exists():
        return entry
    if os.geteuid() != 0:
        raise Refused(Status.USAGE, "making a disk with Debian needs root: run it with sudo")
    ensure(DISTRIBUTION)
    with locked(cache / f"{entry.name}.lock", "is making this disk"):
        if (entry / FILES[0]).exists():  # made while we waited
            return entry
        free = shutil.disk_usage(cache).free / 2**30
        if free < NEED_GIB:
            raise Refused(
                Status.SPACE,
                f"no space: the disk needs {NEED_GIB} GiB in {cache}, which has {free:.1f}. Free"
                " some, or set KVMPRIV_CACHE to another folder.",
            )
        out = entry.with_name(f"{entry.name}.part")
        shutil.rmtree(out, ignore_errors=True)  # of one that was interrupted: we have the lock
        out.mkdir()
        try:
            _make(out)
            for old in cache.glob("distribution.*/"):
                if old.suffix != ".part":
                    shutil.rmtree(old, ignore_errors=True)
            out.rename(entry)
        finally:
            shutil.rmtree(out, ignore_errors=True)
    return entry


def _make(out: Path) -> None:
    say(f"making a disk with Debian {suite()}: some minutes")
    with tempfile.TemporaryDirectory(prefix="kvmpriv-debian-") as scratch:
        done = subprocess.run(
            _command(out),
            check=False,
            env=os.environ | {"LC_ALL": "C", "TMPDIR": scratch},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    missing = [name for name in FILES if not (out / name).is_file()]
    if done.returncode or missing:
        lines = "\n".join(f"  {line}" for line in done.stdout.splitlines()[-12:])
        cause = because(done.stdout) if done.returncode else f"no {', '.join(missing)} was made"
        raise Refused(
            Status.SPACE if "no space" in cause else Status.NO_SOURCE,
            f"could not make a disk with Debian {suite()}: {cause}.\n{lines}",
        )


def main(arguments: list[str]) -> int:
    Parser("distribution", __doc__).parse_args(arguments)
    try:
        print(find_or_make())
    except Refused as refused:
        say(f"distribution: {refused}")
        return refused.code
    return 0
