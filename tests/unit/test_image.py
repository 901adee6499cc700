"""Loaders: flat and ELF images, valid, damaged, and random ones."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpriv.guest import ImageError, Mode, load_elf, load_flat, load_image
from kvmpriv.guest.image import Segment, read_file


def elf(
    code: bytes = b"\xf4",
    *,
    machine: int = 62,
    kind: int = 2,
    ident: bytes = b"\x7fELF\x02\x01\x01",
    entry: int = 0x400000,
    vaddr: int = 0x400000,
    paddr: int = 0x400000,
    memsz: int | None = None,
    p_type: int = 1,
    phnum: int = 1,
    phentsize: int = 56,
    offset: int = 0x78,
) -> bytes:
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, kind, machine, 1, entry, 64, 0, 0, 64, phentsize, phnum, 0, 0, 0
    )
    size = len(code) if memsz is None else memsz
    program = struct.pack("<IIQQQQQQ", p_type, 5, offset, vaddr, paddr, len(code), size, 4096)
    return header + program + code


def test_elf() -> None:
    image = load_elf(elf(b"\x90\xf4", paddr=0x200000, entry=0x400001, memsz=100))
    assert image.mode is Mode.LONG
    assert image.entry == 0x200001, "the entry moves with its segment"
    assert image.segments == (Segment(0x200000, b"\x90\xf4", 100),)
    assert load_elf(elf(), entry=0x123).entry == 0x123


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"MZ", "not an ELF file"),
        (elf()[:40], "truncated: 40 bytes do not hold an ELF header"),
        (elf()[:100], "truncated: the program headers lie beyond the end"),
        (elf(b"\x90" * 50)[:-1], "truncated: segment 0 lies beyond the end"),
        (elf(machine=183), "an ELF file for 64-bit Arm; a guest here is x86-64"),
        (elf(machine=3, ident=b"\x7fELF\x01\x01\x01"), "an ELF file for 32-bit x86"),
        (elf(machine=0x1600, ident=b"\x7fELF\x02\x02\x01"), "an ELF file for s390"),
        (elf(machine=9999), "an ELF file for machine 9999"),
        (elf(ident=b"\x7fELF\x01\x01\x01"), "not 64-bit little-endian"),
        (elf(kind=3), "position independent ELF file: link it with -static -no-pie"),
        (elf(kind=1), "an ELF file of type 1, not an executable"),
        (elf(p_type=3), "a dynamically linked ELF file"),
        (elf(p_type=4), "nothing to load"),
        (elf(phnum=0), "nothing to load"),
        (elf(phentsize=32), "damaged: program headers of 32 bytes"),
        (elf(b"\x90\x90", memsz=1), "damaged: segment 0 is larger in the file"),
        (elf(entry=0x500000), "entry 0x500000 is in no segment"),
        (elf(offset=1 << 63), "truncated: segment 0"),
    ],
)
def test_bad_elf(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_elf(data)


def test_flat() -> None:
    image = load_flat(b"\x90\xf4")
    assert image == (Mode.LONG, 0x100000, (Segment(0x100000, b"\x90\xf4", 2),))
    assert load_flat(b"\xf4", Mode.REAL).entry == 0x1000
    assert load_flat(b"\x90\xf4", load=0x5000, entry=0x5001).entry == 0x5001
    for load, entry in ((0x5000, 0x5002), (0x5000, 0x4FFF), (-1, None)):
        with pytest.raises(ImageError, match=r"outside the image|negative"):
            load_flat(b"\x90\xf4", load=load, entry=entry)
    with pytest.raises(ImageError, match="the image is empty"):
        load_flat(b"")


def test_files(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.write_bytes(b"\xf4")
    assert load_image(flat, limit=1).segments[0].data == b"\xf4"
    assert load_image(flat, Mode.REAL, limit=1).mode is Mode.REAL
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        os.truncate(file.fileno(), 1 << 42)
    with pytest.raises(ImageError, match="0x40000000000 bytes do not fit into 0x1000 bytes"):
        load_image(sparse, limit=4096)
    program = tmp_path / "elf"
    program.write_bytes(elf())
    assert load_image(program, limit=4096).entry == 0x400000
    with pytest.raises(ImageError, match="an ELF file defines where it is loaded"):
        load_image(program, load=4096, limit=4096)
    with pytest.raises(ImageError, match="not a regular file"):
        load_image("/dev/zero", limit=4096)
    with pytest.raises(IsADirectoryError):
        load_image(tmp_path, limit=4096)
    with pytest.raises(FileNotFoundError):
        load_image("", limit=4096)


def test_a_small_file_takes_little_memory_to_read(tmp_path: Path) -> None:
    """The limit bounds the size of the file; it is not the size of the buffer."""
    path = tmp_path / "small"
    path.write_bytes(b"x" * 5000)
    code = (
        "import resource, sys; from kvmpriv.guest.image import read_file\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "print(len(read_file(sys.argv[1], 1 << 30)))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("5000\n", "")


def test_a_file_that_memory_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    code = (
        "import resource, sys; from kvmpriv.guest.image import ImageError, read_file\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "try:\n    read_file(sys.argv[1], 1 << 30)\n"
        "except ImageError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (
        "this process can't get the memory to read it (0x40000000 bytes)\n",
        "",
    )


def test_a_pipe(tmp_path: Path) -> None:
    """A pipe is read to its end, in pieces of any size, and not beyond the limit."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write(data: bytes) -> None:
        with path.open("wb", buffering=0) as file:
            for at in range(0, len(data), 70_000):
                file.write(data[at : at + 70_000])
                time.sleep(0.01)

    data = bytes(range(256)) * 1000
    for limit in (len(data), len(data) - 1):
        thread = threading.Thread(target=lambda: suppressed(write, data))
        thread.start()
        if limit == len(data):
            assert read_file(path, limit) == data
        else:
            with pytest.raises(ImageError, match="more than 0x3e7ff bytes"):
                read_file(path, limit)
        thread.join()


def suppressed(call: Callable[[bytes], None], data: bytes) -> None:
    with suppress(BrokenPipeError):
        call(data)


def test_a_pipe_that_nobody_writes_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        read_file(path, 4096, timeout=0.2)
    assert 0.2 <= time.monotonic() - started < 5
    writer = os.open(path, os.O_RDWR)  # open, and silent
    with pytest.raises(TimeoutError):
        read_file(path, 4096, timeout=0.2)
    os.close(writer)


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    try:
        image = load_elf(b"\x7fELF" + data)
    except ImageError:
        return
    assert image.segments


@given(st.data())
def test_a_damaged_elf_is_refused_or_stays_inside_its_file(data: st.DataObject) -> None:
    good = bytearray(elf(b"\x90" * 30, memsz=4096))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = load_elf(bytes(good))
    except ImageError:
        return
    for segment in image.segments:
        assert len(segment.data) <= min(segment.memory_size, len(good))
