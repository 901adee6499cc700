"""What a guest boots from: the disk of root=, the initrd, the modules of a stock kernel."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmpriv.errors import ArgumentError
from kvmpriv.guest.image import ImageError
from kvmpriv.guest.linux import initrd
from kvmpriv.guest.linux.modules import CONSOLE, VSOCK, find_modules
from kvmpriv.guest.linux.outcome import Ending, Outcome
from kvmpriv.guest.linux.root import check_root
from kvmpriv.guest.linux.supervisor import Supervisor

MIB = 1 << 20
TABLE = bytes(446) + b"\x80\0\0\0\x83".ljust(64, b"\0") + b"\x55\xaa"
GPT = bytes(512) + b"EFI PART"


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A disk of 4 MiB with an ext4 file system."""
    path = tmp_path_factory.mktemp("ext4") / "disk"
    program = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin")
    assert program, "e2fsprogs is on each Debian system"
    subprocess.run([program, "-q", "-O", "64bit", path, "4M"], check=True)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        ("root=/dev/vda", None, "root=/dev/vda needs a disk, and the guest has none: add --disk"),
        ("root=/dev/vda1", None, "root=/dev/vda1 needs a disk"),
        ("root=/dev/vda", bytes(MIB), "an empty disk, without a file system"),
        ("root=/dev/vda2", bytes(MIB), "an empty disk, without a file system"),
        ("root=/dev/vda", TABLE.ljust(MIB, b"\0"), "a disk with partitions: write root=/dev/vda1"),
        ("quiet root=/dev/vda rw", GPT.ljust(MIB, b"\0"), "a disk with partitions"),
        ("root=/dev/vda1", GPT.ljust(MIB, b"\0"), ""),
        ("root=/dev/vda1", TABLE.ljust(MIB, b"\0"), ""),
        ("root=/dev/vda", b"hsqs".ljust(MIB, b"\0"), ""),
        ("root=/dev/vda1", b"hsqs".ljust(MIB, b"\0"), "without partitions, so that there is no"),
        ("root=LABEL=x", bytes(MIB), ""),
        ("root=/dev/sda", None, ""),
        ("quiet", None, ""),
        ("root=/dev/vda root=/dev/sda", bytes(MIB), ""),
    ],
)
def test_a_disk_for_root(tmp_path: Path, words: str, content: bytes | None, message: str) -> None:
    disk = tmp_path / "disk"
    if content is not None:
        disk.write_bytes(content)
    if not message:
        return check_root(words, disk if content is not None else None)
    with pytest.raises(ArgumentError, match=message):
        check_root(words, disk if content is not None else None)
    return None


def test_a_file_system_that_was_cut_off(tmp_path: Path, ext4: bytes) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(ext4)
    check_root("root=/dev/vda", disk)
    disk.write_bytes(ext4[:-512])
    with pytest.raises(ArgumentError, match="too small: its file system has 4194304 bytes") as bad:
        check_root("root=/dev/vda", disk)
    assert f"the image {4 * MIB - 512}" in str(bad.value)
    check_root("root=UUID=1", disk)
    # A boot sector with a table in front of the file system, as a boot loader leaves it.
    disk.write_bytes(TABLE + ext4[512:])
    check_root("root=/dev/vda", disk)
    with pytest.raises(FileNotFoundError):
        check_root("root=/dev/vda", tmp_path / "none")


def test_an_initrd_is_recognised() -> None:
    archive = initrd.pack({"init": b""})
    for good in (
        archive,
        bytes(512) + archive,
        gzip.compress(archive),
        lzma.compress(archive),
        lzma.compress(archive, lzma.FORMAT_ALONE),
        b"\x28\xb5\x2f\xfd",
        b"\x02!L\x18",
    ):
        assert initrd.check(good) is good
    for bad, words in (
        (b"#!/bin/sh\n", "^not an initrd, which is a cpio archive"),
        (b"QFI\xfb", "^not an initrd"),
        (bytes(0x202) + b"HdrS", "^a kernel, not an initrd"),
        (b"\x7fELF", "^a program, not an initrd"),
        (b"", "^not an initrd"),
        (b"070707", "^not an initrd"),  # an older format of cpio
    ):
        with pytest.raises(ImageError, match=words):
            initrd.check(bad)


DEPENDENCIES = """\
kernel/virtio.ko:
kernel/virtio_ring.ko: kernel/virtio.ko
kernel/virtio_mmio.ko: kernel/virtio_ring.ko kernel/virtio.ko
kernel/drivers/char/virtio_console.ko.xz: kernel/virtio_ring.ko kernel/virtio.ko
kernel/drivers/net/other.ko:
kernel/net/vmw_vsock/vsock.ko:
kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko: kernel/virtio.ko kernel/net/vmw_vsock/vsock.ko
"""


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder as /lib/modules, with those of the release 6.1."""
    here = tmp_path / "6.1"
    for line in DEPENDENCIES.splitlines():
        path = here / line.partition(":")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.name.encode()
        path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    (here / "modules.dep").write_text(DEPENDENCIES)
    return tmp_path


def test_modules_of_a_stock_kernel(modules: Path) -> None:
    """What a driver needs is before it, and comes once; what is built in does not come."""
    found = find_modules("6.1", modules)
    assert [module.name for module in found] == ["virtio", "virtio_ring", "virtio_mmio", CONSOLE]
    assert found[-1].contents == b"virtio_console.ko.xz"
    drivers = ["virtio_mmio", VSOCK]
    others = [module.name for module in find_modules("6.1", modules, drivers=drivers)]
    assert others == ["virtio", "virtio_ring", "virtio_mmio", "vsock", VSOCK]
    assert find_modules("6.2", modules) == []
    for release in ("", "../6.1", ".", "..", str(modules / "6.1")):
        assert find_modules(release, modules) == [], release


def test_modules_that_can_not_be_read(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = modules / "6.1"
    packed = here / "kernel/drivers/char/virtio_console.ko.xz"
    packed.write_bytes(b"damaged")
    with pytest.raises(ImageError, match=r"virtio_console\.ko\.xz can't be read"):
        find_modules("6.1", modules)
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstd)):
        packed = packed.rename(packed.with_suffix(suffix))
        (here / "modules.dep").write_text(DEPENDENCIES.replace(".ko.xz", f".ko{suffix}"))
        packed.write_bytes(pack(b"a driver"))
        assert find_modules("6.1", modules)[-1].contents == b"a driver"
        packed.write_bytes(b"damaged")
        with pytest.raises(ImageError, match="can't be read"):
            find_modules("6.1", modules)
    monkeypatch.setenv("PATH", str(modules))
    with pytest.raises(ImageError, match="compressed with zstd: install zstd"):
        find_modules("6.1", modules)
    packed.unlink()
    with pytest.raises(ImageError, match="No such file"):
        find_modules("6.1", modules)


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("VFS: Unable to mount root fs on unknown-block(0,0)", "virtio_blk and the file system's"),
        ("No working init found.  Try passing init=", "the initrd /init"),
        ("Attempted to kill init!", ""),
    ],
)
def test_advice_after_a_panic(line: str, advice: str) -> None:
    ending = Ending()
    supervisor = Supervisor(ending, lambda data: None, lambda: "")
    supervisor.put_all(f"Kernel panic - not syncing: {line}\n".encode())
    supervisor.flush()
    outcome = supervisor.judge(Outcome("reset", 0, "reset itself"))
    assert outcome.how == "panic"
    assert line in outcome.why
    assert advice in outcome.why
    assert (outcome.why.count(";") > 0) == bool(advice)
    ending.close()
