"""Debian's packages: which are needed, which are missing; installs them, or lists them.

The tables map what is looked for (a command, or an absolute path) to the package that has it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from .errors import Refused, Status, say

QEMU = {"qemu-system-x86_64": "qemu-system-x86"}
TOOLS = {
    "gcc": "gcc",
    "make": "make",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl",
    "patch": "patch",
    "rsync": "rsync",
    "xz": "xz-utils",
    "tar": "tar",
    "/usr/include/libelf.h": "libelf-dev",
    "/usr/include/stdio.h": "libc6-dev",
}
DEB_TOOLS = {
    "dpkg-buildpackage": "dpkg-dev",
    "dh": "debhelper",
    "fakeroot": "fakeroot",
    "kmod": "kmod",
    "cpio": "cpio",
    "/usr/include/openssl/evp.h": "libssl-dev",
}
#: For a disk with Debian.
DISTRIBUTION = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
#: For `make`: the tests' compiler and headers, the guests' assembler and root file system.
DEVELOPING = {
    "cc": "gcc",
    "/usr/include/stdio.h": "libc6-dev",
    "/usr/include/linux/kvm.h": "linux-libc-dev",
    "objcopy": "binutils",
    "man": "man-db",
    "node": "nodejs",  # runs pyright
    "bpftool": "bpftool",
    "busybox": "busybox-static",
}
#: For the test of `kvmpriv trace --page`; each of these commands will do.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = {BROWSERS[0]: "chromium-headless-shell"}


def absent(needs: dict[str, str]) -> dict[str, str]:
    """Those of `needs` (a command or an absolute path: its package) that do not exist."""
    return {what: package for what, package in needs.items() if not _exists(what, package)}


def _exists(what: str, package: str) -> bool:
    if what.startswith("/"):
        return Path(what).exists()
    # Daemons and switch_root are in sbin, which an ordinary user's PATH does not contain.
    found = shutil.which(what, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    return found is not None and (package != "busybox-static" or _is_static(found))


def _is_static(program: str) -> bool:
    """Whether a program needs no dynamic loader: a guest has none, and Debian's `busybox` does."""
    try:
        listed = subprocess.run(["readelf", "-lW", program], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return b"INTERP" not in listed.stdout


def _apt(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Another apt-get may hold dpkg's lock for a while: wait for it.
    command = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=900", *arguments]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    return subprocess.run(
        command,
        check=False,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ensure(needs: dict[str, str]) -> None:
    """Have all of `needs`: as root on Debian by installing what is missing, and only that."""
    if not (lacking := absent(needs)):
        return
    packages = sorted(set(lacking.values()))
    listed = " ".join(packages)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Refused(
            Status.USAGE,
            f"missing: {', '.join(sorted(lacking))}. They come with these packages: {listed}. "
            f"On Debian, as root: apt-get install {listed}",
        )
    say(f"installing {listed}")
    # apt-get update waits for no lock, so that two of us must not run it at once.
    with Path("/run/lock/kvmpriv-apt").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = _apt("install", "--no-install-recommends", *packages)
        if result.returncode:  # no package lists yet, or stale ones
            update = _apt("update")
            result = _apt("install", "--no-install-recommends", *packages)
            if result.returncode and update.stdout:
                result.stdout = update.stdout + result.stdout
    if result.returncode or absent(needs):
        notes = [line for line in result.stdout.splitlines() if line.startswith(("E:", "Err:"))]
        raise Refused(
            Status.NO_SOURCE,
            f"could not install {listed}: {because(result.stdout)}.\n" + "\n".join(notes[:6]),
        )


def because(said: str) -> str:
    """The reason why a program of apt failed, from its output."""
    if any(words in said for words in ("No space left", "not have enough free space")):
        return "there is no space left"
    if any(words in said for words in ("Hash Sum mismatch", "unexpected size", "premature end")):
        return "the download was cut off or is damaged"
    if any(words in said for words in ("NO_PUBKEY", "is not signed", "invalid signature")):
        return "the signature of the mirror cannot be checked with the installed keys"
    if any(words in said for words in ("resolv", "Could not connect", "Connection", "Err:")):
        return "the network or the package mirror could not be reached"
    return "apt-get refused"


def main(arguments: list[str]) -> int:
    """The command scripts/packages: what `make` needs; with the argument "browser", a browser."""
    try:
        if arguments != ["browser"]:
            ensure(DEVELOPING)
        elif not any(map(shutil.which, BROWSERS)):
            ensure(BROWSER)
    except Refused as refused:
        say(f"packages: {refused}")
        return refused.code
    return 0
