"""Linux kernel images: parsing, and what is loaded into a guest's memory for them."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpriv import HostMemory
from kvmpriv.guest import ImageError
from kvmpriv.guest.linux import (
    boot_protocol,
    initrd,
    load_bzimage,
    load_linux,
    load_vmlinux,
    plan,
    private_cmdline,
)
from kvmpriv.guest.linux.layout import GuestAddressError, GuestMemory, Range

MIB = 1 << 20


def bzimage(
    code: bytes = b"\x90" * 0x400,
    *,
    version: int = 0x20F,
    xload: int = 1,
    loadflags: int = 1,
    relocatable: int = 1,
    preferred: int = 16 * MIB,
    init_size: int = 2 * MIB,
    name: bytes = b"6.1.0-test (someone@somewhere) #1",
) -> bytes:
    """A bzImage with one sector of setup code after the first."""
    image = bytearray(1024)
    code += bytes(-len(code) % 16)
    image[0x1F1] = 1
    struct.pack_into("<I", image, 0x1F4, len(code) // 16)
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x200:0x202] = b"\xeb\x6a"  # the header ends at 0x26c
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<H", image, 0x20E, 0x100)
    image[0x211] = loadflags
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)
    image[0x234] = relocatable
    struct.pack_into("<H", image, 0x236, xload)
    struct.pack_into("<I", image, 0x238, 2047)
    struct.pack_into("<QI", image, 0x258, preferred, init_size)
    image[0x300 : 0x300 + len(name) + 1] = name + b"\0"
    return bytes(image) + code


def vmlinux(
    text: bytes = b"\0Linux version 6.1.0-test (someone@somewhere) ",
    *,
    entry: int = 16 * MIB,
    address: int = 16 * MIB,
    machine: int = 62,
    bits: int = 2,
) -> bytes:
    """A vmlinux of one segment: linked high, loaded at `address`."""
    ident = b"\x7fELF" + bytes((bits, 1, 1)) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, machine, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    program = struct.pack("<IIQQQQQQ", 1, 7, 120, 0xFFFFFFFF81000000, address, len(text), MIB, 4096)
    return header + program + text


def test_a_bzimage() -> None:
    image = load_linux(bzimage(b"\xcc" * 0x400))
    assert (image.kind, image.version) == ("bzImage", "6.1.0-test")
    assert image.segments == ((16 * MIB, b"\xcc" * 0x400, 0x400),)
    assert image.entry == 16 * MIB + 0x200
    assert (image.start, image.end) == (16 * MIB, 18 * MIB)
    assert (image.initrd_max, image.cmdline_max) == (0x7FFFFFFF, 2047)
    assert image.header == bzimage()[0x1F1:0x26C]


def test_one_that_cannot_be_moved_goes_to_1_mib() -> None:
    image = load_linux(bzimage(relocatable=0))
    assert (image.segments[0].address, image.entry) == (MIB, MIB + 0x200)
    assert (image.start, image.end) == (MIB, 18 * MIB)


def test_a_vmlinux() -> None:
    image = load_linux(vmlinux())
    assert (image.kind, image.version) == ("vmlinux", "6.1.0-test")
    assert (image.entry, image.start, image.end) == (16 * MIB, 16 * MIB, 17 * MIB)
    assert image.header[0x202 - 0x1F1 :][:4] == b"HdrS"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"MZ", "an EFI program without a Linux boot header"),
        (b"hello", "truncated: 5 bytes do not hold a bzImage's header"),
        (b"#!/bin/sh\n" * 100, "neither a bzImage nor a vmlinux: no HdrS at 0x202"),
        (b"MZ".ljust(56, b"\0") + b"ARM\x64" + bytes(4096), "a Linux kernel for 64-bit Arm"),
        (b"MZ".ljust(56, b"\0") + b"RSC\x05" + bytes(4096), "a Linux kernel for RISC-V"),
        (b"\x1f\x8b" + bytes(4096), "compressed with gzip"),
        (b"070701" + bytes(4096), "a cpio archive: an initrd, not a kernel"),
        (bzimage()[:0x210], "truncated: 528 bytes do not hold a bzImage's header"),
        (bzimage()[:-1], "truncated: by its header it has 2048 bytes, the file has 2047"),
        (bzimage(version=0x20B), "its boot protocol is 2.11; a 64-bit entry point needs 2.12"),
        (bzimage(xload=0), "a 32-bit kernel"),
        (bzimage(loadflags=0), "a zImage"),
        (
            bzimage(b"\x90" * 0x200),
            "512 bytes of protected-mode code are too few",
        ),
        (bzimage(preferred=0x1001), "damaged: it is made to run at 0x1001"),
        (bzimage(preferred=0xFFFFF000), "damaged: it is made to run at 0xfffff000"),
        (bzimage().replace(b"\xeb\x6a", b"\xeb\x10"), "damaged: the setup header ends at 0x212"),
        (bzimage().replace(b"\x55\xaa", b"\0\0"), "damaged: the boot flag is 0x0000"),
        (vmlinux(b"hello"), "an ELF file, but not a Linux kernel"),
        (vmlinux(entry=0), "damaged: its entry, 0x0, is in no segment"),
        (vmlinux(address=0, entry=0), "damaged: it is made to be loaded to 0x0"),
        (vmlinux(machine=183), "an ELF file for 64-bit Arm; a guest here is x86-64"),
        (vmlinux(machine=3), "an ELF file for 32-bit x86"),
        (vmlinux()[:-1], "truncated: segment 0 lies beyond the end of the file"),
    ],
)
def test_what_is_no_kernel_is_named(data: bytes, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_linux(data)
    assert words in str(caught.value)


@given(st.binary(max_size=600), st.booleans())
def test_any_bytes(data: bytes, as_elf: bool) -> None:
    prefix = b"\x7fELF" if as_elf else b""
    with pytest.raises(ImageError):
        load_linux(prefix + data)


@given(st.data())
def test_a_damaged_kernel_is_refused_or_stays_where_it_may(data: st.DataObject) -> None:
    makers: tuple[Callable[[], bytes], ...] = (bzimage, vmlinux)
    make = data.draw(st.sampled_from(makers))
    good = bytearray(make())
    header = st.integers(0x1F1, 0x267) if make is bzimage else st.integers(0, 119)
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(header)] = data.draw(st.integers(0, 255))
    try:
        image = load_linux(bytes(good))
    except ImageError:
        return
    assert MIB <= image.start < image.end <= 4 << 30
    with HostMemory(32 * MIB, reserve=False) as memory:
        ranges = plan(32 * MIB)
        guest = GuestMemory([(ranges[0], memory)])
        try:
            boot_protocol.load(image, guest, ranges, b"quiet", b"initrd")
        except ImageError:
            return
        assert image.end <= 32 * MIB
        for segment in image.segments:
            assert memory.read(segment.address, len(segment.data)) == segment.data


@pytest.fixture
def loaded() -> bytes:
    """A zero page, as a guest of 4 GiB and an initrd of 5000 bytes finds it."""
    with HostMemory(3 << 30, reserve=False) as low, HostMemory(1 << 30, reserve=False) as high:
        ranges = plan(4 << 30)
        memory = GuestMemory([(ranges[0], low), (ranges[1], high)])
        boot_protocol.load(
            load_linux(bzimage()), memory, ranges, b"console=ttyS0", b"i" * 5000, rsdp=0xE0000
        )
        page = memory.read(0x7000, 4096)
        at, size = struct.unpack_from("<II", page, 0x218)
        assert memory.read(at, size) == b"i" * 5000
        assert at % 4096 == 0
        assert at + size <= 0x80000000  # the header's initrd_addr_max
        (cmdline,) = struct.unpack_from("<I", page, 0x228)
        assert memory.read(cmdline, 14) == b"console=ttyS0\0"
        # Each large page of the first 4 GiB is where it says it is.
        (pdpt,) = struct.unpack("<Q", memory.read(0x9000, 8))
        directories = struct.unpack("<4Q", memory.read(pdpt & ~0xFFF, 32))
        for gib, directory in enumerate(directories):
            entries = struct.unpack("<512Q", memory.read(directory & ~0xFFF, 4096))
            assert entries == tuple(gib << 30 | n << 21 | 0x83 for n in range(512))
        return page


def test_the_zero_page(loaded: bytes) -> None:
    assert loaded[0x1F1:0x1F2] == b"\x01"
    assert loaded[0x202:0x206] == b"HdrS"
    assert loaded[0x210] == 0xFF
    assert loaded[0x1EF] == 0  # the sentinel: the page was zeroed
    assert struct.unpack_from("<Q", loaded, 0x70) == (0xE0000,)
    entries = [struct.unpack_from("<QQI", loaded, 0x2D0 + 20 * n) for n in range(loaded[0x1E8])]
    assert entries == [
        (0, 0x9F000, 1),
        (0x9F000, 0x61000, 2),
        (0x100000, 0xBFF00000, 1),
        (0x100000000, 0x40000000, 1),
    ]


@pytest.mark.parametrize(
    ("size", "cmdline", "initrd", "words"),
    [
        (16 * MIB, b"", 0, "too little memory: the kernel needs 0x1000000…0x1200000"),
        (18 * MIB, b"", 1, "the initrd does not fit: it has 0x1 bytes"),
        (20 * MIB, b"", 2 * MIB + 1, "the initrd does not fit: it has 0x200001 bytes"),
        (20 * MIB, b"x" * 2048, 0, "the command line has 2048 bytes; this kernel accepts 2047"),
        (20 * MIB, b"a\0b", 0, "the command line contains a zero byte"),
        (20 * MIB, b"x" * 2047, 2 * MIB, None),
    ],
)
def test_what_does_not_fit_is_named(
    size: int, cmdline: bytes, initrd: int, words: str | None
) -> None:
    with HostMemory(size, reserve=False) as memory:
        ranges = plan(size)
        guest = GuestMemory([(ranges[0], memory)])
        if words is None:
            boot_protocol.load(load_linux(bzimage()), guest, ranges, cmdline, bytes(initrd))
            return
        with pytest.raises(ImageError) as caught:
            boot_protocol.load(load_linux(bzimage()), guest, ranges, cmdline, bytes(initrd))
    assert words in str(caught.value)


def test_ranges() -> None:
    assert plan(512 * MIB) == [Range(0, 512 * MIB, "shared", "RAM")]
    assert [(part.gpa, part.end) for part in plan(5 << 30)] == [
        (0, 3 << 30),
        (4 << 30, 6 << 30),
    ]
    for size in (0, -4096, 4097):
        with pytest.raises(ValueError, match="is not a positive multiple of 4096"):
            plan(size)


def test_ranges_with_a_private_part() -> None:
    low, high = plan(512 * MIB, private=True)
    assert (low.gpa, low.size, low.kind) == (0, 128 * MIB, "shared")
    assert (high.gpa, high.size, high.kind) == (4 << 30, 384 * MIB, "private")
    told = "nokaslr kernelcore=64M swiotlb="
    for bounced, pool in ((0, "noforce"), (1, "512,force"), (MIB, "512,force")):
        assert private_cmdline([low, high], bounced) == told + pool
    assert private_cmdline([low, high], MIB + 1) == told + "1024,force"
    assert private_cmdline([low, high], 6 * MIB) == told + "4096,force"
    assert private_cmdline(plan(512 * MIB)) == ""
    low, high = plan((4 << 30) + 4096, private=True)
    assert (low.size, high.size) == (1 << 30, (3 << 30) + 4096)
    assert plan(64 << 30, private=True)[0].size == 3 << 30
    assert plan(160 * MIB, private=True)[1].size == 32 * MIB
    with pytest.raises(ValueError, match="at least 160M: the first 128M"):
        plan(159 * MIB, private=True)


def test_guest_memory_is_checked_at_every_edge() -> None:
    parts = [
        Range(0, 8192, "shared", "RAM"),
        Range(8192, 8192, "shared", "RAM"),
        Range(0x10000, 8192, "private", "RAM"),
    ]
    with HostMemory(8192) as one, HostMemory(8192) as two, HostMemory(8192) as three:
        memory = GuestMemory(list(zip(parts, (one, two, three), strict=True)))
        memory.write(8190, b"ab")
        memory.write(8192, b"cd")
        assert one.read(8190, 2) + two.read(0, 2) == b"abcd"
        assert memory.read(16382, 2) == b"\0\0"
        memory.view(0, 4)[:2] = b"hi"
        assert one.read(0, 2) == b"hi"
        for gpa, size in (
            *((-1, 1), (8191, 2), (16383, 2), (16384, 1), (0x10000, 1), (1 << 63, 8)),
            *((0, -1), (4, -2)),
        ):
            with pytest.raises(GuestAddressError):
                memory.read(gpa, size)
            with pytest.raises(GuestAddressError):
                memory.view(gpa, size)


def test_an_initrd_is_what_cpio_reads(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "init": b"#!/bin/sh\n",
        "a/b/c": b"x" * 4097,
        "a/link": "b/c",
        "empty": b"",
    }
    done = subprocess.run(
        ["busybox", "cpio", "-idm"], input=initrd.pack(files), cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a/b/c").read_bytes() == b"x" * 4097
    assert os.readlink(tmp_path / "a/link") == "b/c"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").read_bytes() == b""
    assert sorted(os.listdir(tmp_path)) == ["a", "empty", "init"]
    for path in ("", "/", "../x", "a/../b", "a//b", "."):
        with pytest.raises(ValueError, match="has an empty part"):
            initrd.pack({path: b""})


def test_a_busybox_is_static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dynamic busybox is refused at once: a guest's file system has no libraries."""
    held = initrd.busybox("echo hi", {"etc/more": b"more"})
    assert b"echo hi\n" in held
    assert b"etc/more" in held
    program = tmp_path / "busybox"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(initrd, "_ELSEWHERE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="busybox is not installed"):
        initrd.busybox("")
    elf = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, *(0, 64, 0), 0, *(64, 56, 1), *[0] * 3
    )
    load, interpreter = (struct.pack("<IIQQQQQQ", kind, *[0] * 7) for kind in (1, 3))
    for content, why in (
        (elf + interpreter, "busybox must be linked statically"),
        (elf + load[:-1], "no program headers"),
        (elf[:-1], "not a 64-bit ELF file"),
        (b"#!/bin/sh\n", "not a 64-bit ELF file"),
    ):
        program.write_bytes(content)
        program.chmod(0o755)
        with pytest.raises(ImageError, match=why):
            initrd.busybox("")
        with pytest.raises(ImageError, match=why):
            initrd.busybox("", program=content)
    program.write_bytes(elf + load)
    assert initrd.busybox("") == initrd.busybox("", program=elf + load)


def test_each_form_by_its_own_function() -> None:
    """load_linux chooses by the content; each function refuses the other's form."""
    assert load_bzimage(bzimage()) == load_linux(bzimage())
    assert load_vmlinux(vmlinux()) == load_linux(vmlinux())
    with pytest.raises(ImageError, match=r"."):
        load_bzimage(vmlinux())
    with pytest.raises(ImageError, match=r"."):
        load_vmlinux(bzimage())
