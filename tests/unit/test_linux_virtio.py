"""Virtio devices with a correct driver, and with drivers that break the rules."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.linux_device import ComputedDisk
from kvmpriv import ArgumentError, HostMemory, libc
from kvmpriv.guest.linux import holder, net
from kvmpriv.guest.linux.disk import Block, Entropy
from kvmpriv.guest.linux.layout import GuestMemory, Range
from kvmpriv.guest.linux.net import Net
from kvmpriv.guest.linux.virtio import (
    ACCESS_PLATFORM,
    EVENT_INDEX,
    INDIRECT,
    VERSION_1,
    Chain,
    Queue,
    Transport,
    VirtioDevice,
)

SIZE = 1 << 20
BASE = 0x10000  # of the memory that the guest shares; there is no memory below it
NEXT, WRITE, TABLE = 1, 2, 4


class Driver:
    """A driver with queues of 8 entries, and the memory that it shares with the device."""

    def __init__(self, device: VirtioDevice, **options: Any) -> None:
        self.host = HostMemory(SIZE)
        self.memory = GuestMemory(
            [
                (Range(BASE, SIZE, "shared", ""), self.host),
                (Range(1 << 32, SIZE, "private", ""), self.host),
            ]
        )
        self.interrupts = 0
        self.words: list[str] = []
        self.transport = Transport(
            device,
            self.memory,
            self._interrupt,
            self.words.append,
            **options,
        )
        self.indices = [0] * device.queue_count

    def _interrupt(self) -> None:
        self.interrupts += 1

    def get(self, offset: int, size: int = 4) -> int:
        return self.transport.read(offset, size)

    def put(self, offset: int, value: int) -> None:
        self.transport.write(offset, 4, value)

    def negotiate(self, features: int = VERSION_1) -> bool:
        self.put(0x70, 0)
        self.put(0x70, 3)
        for half in range(2):
            self.put(0x24, half)
            self.put(0x20, features >> 32 * half & 0xFFFFFFFF)
        self.put(0x70, 0xB)
        return bool(self.get(0x70) & 8)

    def rings(self, number: int) -> tuple[int, int, int]:
        base = BASE + 0x1000 + number * 0x1000
        return base, base + 0x400, base + 0x800

    def start(self, size: int = 8) -> None:
        for number in range(len(self.indices)):
            self.put(0x30, number)
            self.put(0x38, size)
            for register, address in zip((0x80, 0x90, 0xA0), self.rings(number), strict=True):
                self.put(register, address & 0xFFFFFFFF)
                self.put(register + 4, address >> 32)
            self.put(0x44, 1)
        self.put(0x70, 0xF)

    def describe(self, number: int, at: int, *descriptor: int) -> None:
        self.memory.write(self.rings(number)[0] + 16 * at, struct.pack("<QIHH", *descriptor))

    def offer(self, number: int, head: int, *, ahead: int = 1) -> None:
        available = self.rings(number)[1]
        index = self.indices[number]
        self.memory.write(available + 4 + 2 * (index % 8), struct.pack("<H", head))
        self.indices[number] = index + ahead & 0xFFFF
        self.memory.write(available + 2, struct.pack("<H", self.indices[number]))
        self.put(0x50, number)

    def used(self, number: int) -> list[tuple[int, int]]:
        at = self.rings(number)[2]
        (count,) = struct.unpack("<H", self.memory.read(at + 2, 2))
        return [
            struct.unpack("<II", self.memory.read(at + 4 + 8 * n, 8)) for n in range(min(count, 8))
        ]

    def request(self, *parts: tuple[bytes | int, int]) -> list[bytes]:
        """Offer a chain on queue 0 (bytes to read, sizes to write); returns what was written."""
        at, places = BASE + 0x10000, []
        for n, (what, flags) in enumerate(parts):
            size = what if isinstance(what, int) else len(what)
            if isinstance(what, bytes):
                self.memory.write(at, what)
            more = NEXT if n + 1 < len(parts) else 0
            self.describe(0, n, at, size, flags | more, n + 1)
            places.append((at, size, flags))
            at += size + 3  # nothing is aligned
        self.offer(0, 0)
        return [self.memory.read(place, size) for place, size, flags in places if flags & WRITE]

    @property
    def stopped(self) -> bool:
        return bool(self.get(0x70) & 64)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) * 64)
    return path


@pytest.fixture
def driver() -> Iterator[Callable[..., Driver]]:
    made: list[VirtioDevice] = []

    def make(device: VirtioDevice, features: int = VERSION_1, **options: Any) -> Driver:
        made.append(device)
        new = Driver(device, **options)
        assert new.negotiate(features)
        new.start()
        return new

    yield make
    for device in made:
        device.close()


MakeDriver = Callable[..., Driver]


def test_registers() -> None:
    one = Driver(Entropy(), access_platform=True)
    assert [one.get(at) for at in (0, 4, 8, 0xC, 0x34)] == [
        *(0x74726976, 2, 4, 0x4B564D50, 256),
    ]
    one.put(0x30, 1)  # a queue that it has not
    assert one.get(0x34) == 0
    one.put(0x44, 1)
    assert one.get(0x44) == 0
    one.put(0x14, 1)
    assert one.get(0x10) == 3  # VERSION_1, ACCESS_PLATFORM
    one.put(0x14, 0)
    assert one.get(0x10) == INDIRECT | EVENT_INDEX
    assert not one.negotiate(VERSION_1)
    assert not one.negotiate(VERSION_1 | ACCESS_PLATFORM | 1)
    assert one.negotiate(VERSION_1 | ACCESS_PLATFORM)
    assert not Driver(Entropy()).negotiate(0)
    assert one.get(0x0, 1) == one.get(0x2, 4) == 0


def test_registers_in_a_page() -> None:
    """The guest reads them without asking, and reads what it would be told."""
    card = Net(Cable(), mac=bytes.fromhex("525400123456"))
    with HostMemory(4096) as page:
        one = Driver(card, page=page)

        def check(status: int) -> None:
            for offset in (0x0, 0x4, 0x8, 0xC, 0x10, 0x34, 0x44, 0x70, 0xFC, 0x100, 0x104, 0x13C):
                there = int.from_bytes(page.read(offset, 4), "little")
                assert there == one.get(offset), hex(offset)
            assert page.read(0x60, 4) == bytes((status, 0, 0, 0))

        check(0)
        assert page.read(0x100, 6) == card.mac
        one.put(0x14, 1)
        check(0)
        assert page.read(0x10, 4) == b"\1\0\0\0"
        one.put(0x30, 7)
        check(0)
        assert page.read(0x34, 4) == bytes(4)
        assert one.negotiate()
        check(0)
        one.start()
        check(1)
        one.describe(1, 0, BASE - 1, 1, 0, 0)
        one.offer(1, 0)
        assert one.stopped
        check(2)
        one.put(0x64, 1)
        check(2)
        one.put(0x64, 2)
        check(0)
        one.put(0x70, 0)
        check(0)
        one.transport.close()
    card.close()


class Recorder(Entropy):
    """Records what the driver accepted, and returns two requests at once."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def negotiated(self, accepted: int) -> None:
        self.accepted.append(accepted)

    def serve(self, number: int, queue: Queue) -> bool:
        first, second = queue.pop(), queue.pop()
        if first is None or second is None:
            return False
        queue.push_all([(second, 2), (first, 1)])
        return True


def test_a_device_learns_what_was_accepted_and_returns_several_requests() -> None:
    device = Recorder()
    one = Driver(device)
    assert not one.negotiate(VERSION_1 | 1)
    assert device.accepted == []
    assert one.negotiate()
    assert device.accepted == [VERSION_1]
    one.put(0x70, 0xF)
    assert device.accepted == [VERSION_1], "once"
    one.start()
    one.describe(0, 0, BASE + 0x20000, 8, WRITE, 0)
    one.describe(0, 1, BASE + 0x20000, 8, WRITE, 0)
    one.memory.write(one.rings(0)[1] + 4, struct.pack("<HH", 0, 1))
    one.memory.write(one.rings(0)[1] + 2, b"\2\0")
    one.put(0x50, 0)
    assert one.used(0) == [(1, 2), (0, 1)]
    assert one.interrupts == 1


def test_random_numbers(driver: MakeDriver) -> None:
    one = driver(Entropy())
    first, second = one.request((100, WRITE), (28, WRITE))
    assert len({*first, *second}) > 20
    assert one.used(0) == [(0, 128)]
    assert one.interrupts == 1
    assert one.get(0x60) == 1
    one.put(0x64, 1)
    assert one.get(0x60) == 0
    assert one.transport.queues[0].wants_interrupt()
    one.memory.write(one.rings(0)[1], b"\1\0")  # the driver polls
    assert not one.transport.queues[0].wants_interrupt()
    one.request((10, WRITE))
    assert one.used(0) == [(0, 128), (0, 10)]
    assert one.interrupts == 1


def test_the_ring_wraps(driver: MakeDriver) -> None:
    one = driver(Entropy())
    at = one.rings(0)[2]
    for _ in range(70_000):
        one.describe(0, 3, BASE + 0x20000, 1, WRITE, 0)
        one.offer(0, 3)
    assert struct.unpack("<H", one.memory.read(at + 2, 2)) == (70_000 % 65536,)
    assert one.interrupts == 70_000
    assert not one.stopped


def block(kind: int, sector: int = 0) -> tuple[bytes, int]:
    return struct.pack("<IIQ", kind, 0, sector), 0


def test_disk_reads_and_writes(driver: MakeDriver, disk: Path) -> None:
    one = driver(Block(disk))
    assert one.get(0x100, 8) == 32
    data, status = one.request(block(0, 1), (1024, WRITE), (1, WRITE))
    assert (data, status) == (disk.read_bytes()[512:1536], b"\0")
    assert one.used(0)[-1] == (0, 1025)
    # Split where no driver would, status and data in one piece.
    both = one.request((block(0, 1)[0][:5], 0), (block(0, 1)[0][5:], 0), (300, WRITE), (213, WRITE))
    assert b"".join(both) == disk.read_bytes()[512:1024] + b"\0"
    (status,) = one.request(block(1, 31), (b"x" * 512, 0), (1, WRITE))
    assert status == b"\0"
    assert disk.read_bytes()[-512:] == b"x" * 512
    assert one.request(block(4), (1, WRITE)) == [b"\0"]
    assert one.request(block(8), (20, WRITE), (1, WRITE)) == [b"disk".ljust(20, b"\0"), b"\0"]
    assert one.words == []


@pytest.mark.parametrize(
    ("kind", "sector", "size", "status"),
    [
        (0, 31, 512, 0),
        (0, 32, 512, 1),
        (0, 31, 1024, 1),
        (0, 0, 513, 1),
        (0, (1 << 64) - 1, 512, 1),
        (0, 1 << 55, 512, 1),
        (77, 0, 512, 2),
    ],
)
def test_disk_refuses(
    driver: MakeDriver, disk: Path, kind: int, sector: int, size: int, status: int
) -> None:
    one = driver(Block(disk))
    _, got = one.request(block(kind, sector), (size, WRITE), (1, WRITE))
    assert got == bytes((status,))
    assert not one.stopped
    before = disk.read_bytes()
    (got,) = one.request(block(1, sector), (b"y" * size, 0), (1, WRITE))
    assert (got, disk.read_bytes() == before) == (
        (b"\0", False) if status == 0 else (b"\1", True)
    ) or kind == 77


def test_disk_of_another_guest_or_none(disk: Path, tmp_path: Path) -> None:
    first = Block(disk)
    with pytest.raises(OSError, match="in use by another guest, of this process"):
        Block(disk)
    first.close()
    first.close()
    Block(disk).close()
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match="a multiple of 512 bytes, more than 0, not 0"):
        Block(empty)
    empty.write_bytes(b"x" * 513)
    with pytest.raises(ValueError, match="a multiple of 512 bytes, more than 0, not 513"):
        Block(empty)
    with pytest.raises(ValueError, match="a disk must be a file or a block device"):
        Block("/dev/null")
    with pytest.raises(FileNotFoundError):
        Block(tmp_path / "none")


F_FLUSH, F_DISCARD, F_WRITE_ZEROES = 1 << 9, 1 << 13, 1 << 14


def ranges(kind: int, *parts: tuple[int, int, int]) -> list[tuple[bytes, int]]:
    return [block(kind), (b"".join(struct.pack("<QII", *part) for part in parts), 0), (b"?", WRITE)]


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize(
    ("kind", "unmap"), [(11, 0), (13, 0), (13, 1)], ids=["discard", "zeroes", "unmap"]
)
def test_disk_discards_and_clears(
    driver: MakeDriver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: int,
    unmap: int,
    supported: bool,
) -> None:
    """A discard makes a hole; zeroes are written where the file system can't make them."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (4 << 20))
    if not supported:
        monkeypatch.setattr(libc, "fallocate", lambda *_: -errno.EOPNOTSUPP)
    one = driver(Block(path), VERSION_1 | F_FLUSH | F_DISCARD | F_WRITE_ZEROES)
    blocks = path.stat().st_blocks
    (status,) = one.request(*ranges(kind, (2048, 4096, unmap))[:2], (1, WRITE))
    assert status == b"\0"
    data = path.read_bytes()
    assert data[: 1 << 20] == data[3 << 20 :] == b"x" * (1 << 20)
    kept = kind == 11 and not supported
    assert data[1 << 20 : 3 << 20] == (b"x" if kept else b"\0") * (2 << 20)
    hole = path.stat().st_blocks <= blocks - 4096
    assert hole == (supported and (kind == 11 or bool(unmap)))
    assert path.stat().st_size == 4 << 20


@pytest.mark.parametrize(
    ("kind", "parts", "status"),
    [
        (11, [(31, 1, 0)], 0),
        (11, [(n, 1, 0) for n in range(16)], 0),
        (11, [(n, 1, 0) for n in range(17)], 1),
        (11, [], 1),
        (11, [(31, 2, 0)], 1),
        (11, [(0, 1, 0), (32, 1, 0)], 1),
        (11, [(1 << 63, 1, 0)], 1),
        (11, [(0, 0, 0)], 1),
        (11, [(0, 1, 1)], 2),
        (13, [(0, 32, 1)], 0),
        (13, [(0, 32, 2)], 2),
        (13, [(0, 33, 0)], 1),
        (13, [(0, 1, 0), (1, 1, 0)], 1),
    ],
)
def test_disk_refuses_ranges(
    driver: MakeDriver, disk: Path, kind: int, parts: list[tuple[int, int, int]], status: int
) -> None:
    one = driver(Block(disk))
    before = disk.read_bytes()
    (got,) = one.request(*ranges(kind, *parts)[:2], (1, WRITE))
    assert got == bytes((status,))
    assert (disk.read_bytes() == before) == (status != 0)
    (got,) = one.request(block(kind), (bytes(15), 0), (1, WRITE))
    assert got == b"\1"
    assert not one.stopped


def test_disk_that_is_read_only(driver: MakeDriver, disk: Path) -> None:
    device = Block(disk)
    assert device.features & (F_DISCARD | F_WRITE_ZEROES)
    device.close()
    disk.chmod(0o444)
    real = os.open

    def refuse(path: Path, flags: int) -> int:  # root may write anything
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refuse)
        device = Block(disk)
        second = Block(disk)  # both only read it
    assert device.read_only
    assert not device.features & (F_DISCARD | F_WRITE_ZEROES)
    one = driver(device)
    before = disk.read_bytes()
    assert one.request(*ranges(11, (0, 1, 0))[:2], (1, WRITE)) == [b"\1"]
    assert one.request(block(1), (bytes(512), 0), (1, WRITE)) == [b"\1"]
    assert disk.read_bytes() == before
    second.close()


def test_disk_flushes(driver: MakeDriver, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is one of the host, and its failure is the driver's; it is not forgotten."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    words: list[str] = []
    one = driver(Block(disk, words.append), VERSION_1 | F_FLUSH)
    assert one.request(block(1), (bytes(512), 0), (1, WRITE)) == [b"\0"]
    assert calls == []
    assert one.request(block(4), (1, WRITE)) == [b"\0"]
    assert len(calls) == 1

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    assert one.request(block(4), (1, WRITE)) == [b"\1"]
    monkeypatch.setattr(os, "fdatasync", calls.append)
    assert one.request(block(4), (1, WRITE)) == [b"\1"]
    assert words == [f"virtio-blk: {disk}: Input/output error"] * 2


def test_disk_on_a_full_file_system(
    driver: MakeDriver, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver gets an error, and the caller a message that says what to do."""
    words: list[str] = []
    one = driver(Block(disk, words.append))
    write = os.pwritev

    def fail(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", fail)
    assert one.request(block(1), (bytes(512), 0), (1, WRITE)) == [b"\1"]
    (message,) = words
    assert message == (
        f"virtio-blk: {disk}: No space left on device on the host: the guest's write has failed;"
        " make room, then write again"
    )
    monkeypatch.setattr(os, "pwritev", write)
    assert one.request(block(1), (bytes(512), 0), (1, WRITE)) == [b"\0"]


def test_disk_of_a_driver_without_flushes(
    driver: MakeDriver, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    one = driver(Block(disk))
    assert one.request(block(0), (512, WRITE), (1, WRITE))[1] == b"\0"
    assert calls == []
    assert one.request(block(1), (bytes(512), 0), (1, WRITE)) == [b"\0"]
    assert one.request(*ranges(11, (0, 1, 0))[:2], (1, WRITE)) == [b"\0"]
    assert len(calls) == 2


def test_a_second_script_is_told_who_has_the_disk(disk: Path) -> None:
    code = (
        "import sys; from kvmpriv.guest.linux.disk import Block\n"
        "disk = Block(sys.argv[1]); print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        who = re.escape(f"process {other.pid} ({sys.executable} -c import sys;")
        with pytest.raises(BlockingIOError, match=f"in use by another guest, of {who}"):
            Block(disk)
    Block(disk).close()


TWO_LOCKS = """\
1: FLOCK  ADVISORY  WRITE 99999998 00:99:{inode} 0 EOF
2: FLOCK  ADVISORY  WRITE 99999999 {at} 0 EOF
"""


@pytest.mark.parametrize(
    ("locks", "who"),
    [
        ("", "another process"),
        ("1: FLOCK  ADVISORY  WRITE -1 {at} 0 EOF", "another process"),
        ("1: POSIX  ADVISORY  WRITE 1 {at} 0 EOF", "another process"),
        ("1: FLOCK  ADVISORY  WRITE 1 {at}1 0 EOF", "another process"),
        ("1: nonsense", "another process"),
        ("1: FLOCK  ADVISORY  READ  99999999 00:99:{inode} 0 EOF", "process 99999999"),
        (TWO_LOCKS, "process 99999999"),
    ],
)
def test_who_has_a_lock(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str, who: str
) -> None:
    status = disk.stat()
    at = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    path = tmp_path / "locks"
    path.write_text(locks.format(at=at, inode=status.st_ino))
    monkeypatch.setattr(holder, "_LOCKS", path)
    with disk.open() as file:
        assert holder.holder_of(file.fileno()) == who


def test_disk_that_the_host_can_not_write(driver: MakeDriver, disk: Path) -> None:
    device = Block(disk)
    one = driver(device)
    os.truncate(disk, 512)
    _, status = one.request(block(0, 4), (512, WRITE), (1, WRITE))
    assert status == b"\1"
    assert one.words == []
    words: list[str] = []
    device._complain = words.append
    _, status = one.request(block(0, 4), (512, WRITE), (1, WRITE))
    assert words == [f"virtio-blk: {disk}: Input/output error"]


def test_disk_whose_name_is_no_text(driver: MakeDriver, tmp_path: Path) -> None:
    """The disk's serial number is its file's name, which may be any bytes."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.img"))
    path.write_bytes(bytes(4096))
    one = driver(Block(path))
    assert one.request(block(8), (20, WRITE), (1, WRITE)) == [b"a\xff.img".ljust(20, b"\0"), b"\0"]


@pytest.mark.parametrize(
    ("magic", "kind"), [(b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx")]
)
def test_disk_in_another_format(tmp_path: Path, magic: bytes, kind: str) -> None:
    """It is refused: as a raw disk the guest would find no partitions, and might write some."""
    path = tmp_path / "the disk.img"
    path.write_bytes(magic.ljust(4096, b"\0"))
    command = f"qemu-img convert -O raw '{path}' '{path}.raw'"
    with pytest.raises(ArgumentError, match=f"{kind}.*{command}"):
        Block(path)
    path.write_bytes(magic[:-1].ljust(4096, b"\0"))
    Block(path).close()


def test_the_disk_of_an_example(driver: MakeDriver) -> None:
    device = ComputedDisk()
    one = driver(device)
    data, status = one.request(block(0, 12345), (1024, WRITE), (1, WRITE))
    assert (data, status) == (
        b"this is sector 12345\n".ljust(512) + b"this is sector 12346\n".ljust(512),
        b"\0",
    )
    assert one.request(block(1, 7), (b"x" * 512, 0), (1, WRITE)) == [b"\0"]
    assert device.written == {7: b"x" * 512}
    assert one.request(block(1, 8), (b"y" * 512 + b"z" * 512, 0), (1, WRITE)) == [b"\0"]
    assert device.written[9] == b"z" * 512
    assert one.request(block(0, 9), (512, WRITE), (1, WRITE))[0] == b"z" * 512
    assert one.request(block(1, (1 << 20) - 1), (bytes(1024), 0), (1, WRITE)) == [b"\1"]
    assert one.request(block(0, (1 << 20) - 1), (1024, WRITE), (1, WRITE))[1] == b"\1"
    assert one.request(block(8), (20, WRITE), (1, WRITE))[1] == b"\2"
    one.request((b"short", 0), (1, WRITE))
    assert one.stopped


class Cable:
    """A socket that keeps packet boundaries, in place of a tap."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)

    def fileno(self) -> int:
        return self.ours.fileno()

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


def test_net_sends_and_receives(driver: MakeDriver) -> None:
    cable = Cable()
    device = Net(cable)
    one = driver(device)
    assert device.host_fd() == -1  # no room for a packet yet
    one.describe(1, 0, BASE + 0x8000, 5, NEXT, 1)
    one.describe(1, 1, BASE + 0x8100, 20, 0, 0)
    one.memory.write(BASE + 0x8000, b"h" * 5)
    one.memory.write(BASE + 0x8100, b"h" * 7 + b"packet, sent.")
    one.offer(1, 0)
    assert cable.theirs.recv(100) == b"h" * 12 + b"packet, sent."
    assert one.used(1) == [(0, 0)]

    one.describe(0, 2, BASE + 0x9000, 11, WRITE | NEXT, 3)
    one.describe(0, 3, BASE + 0x9100, 100, WRITE, 0)
    one.offer(0, 2)
    assert device.host_fd() == cable.fileno()
    assert one.used(0) == []
    cable.theirs.send(b"h" * 12 + b"packet, received")
    one.transport.serve(0)
    assert one.memory.read(BASE + 0x9000, 11) == b"h" * 10 + b"\1"
    assert one.memory.read(BASE + 0x9100, 17) == b"\0packet, received"
    assert one.used(0) == [(2, 28)]
    assert device.host_fd() == -1
    cable.theirs.close()


F_MRG_RXBUF = 1 << 15


def test_net_merges_buffers(driver: MakeDriver) -> None:
    """A packet is in as many buffers as it needs, which the driver gets all at once."""
    cable = Cable()
    device = Net(cable)
    one = driver(device, VERSION_1 | F_MRG_RXBUF)
    for number in range(8):
        one.describe(0, number, BASE + 0x9000 + 0x100 * number, 20, WRITE, 0)

    def merged(first: int, sizes: list[int]) -> bytes:
        pieces = [
            one.memory.read(BASE + 0x9000 + 0x100 * (first + n), size)
            for n, size in enumerate(sizes)
        ]
        return b"".join(pieces)

    for number in range(3):
        one.offer(0, number)
    cable.theirs.send(b"h" * 12 + b"0123456789abcdefghijklmnopqrstuvwxyz")
    one.transport.serve(0)
    assert one.used(0) == [(0, 20), (1, 20), (2, 8)]
    assert merged(0, [20, 20, 8]) == b"h" * 10 + b"\3\0" + b"0123456789abcdefghijklmnopqrstuvwxyz"
    # There is no room for the next one, then for a part of it, then for all.
    cable.theirs.send(b"h" * 12 + b"0123456789abcdefghijklmnop")
    one.transport.serve(0)
    assert device.host_fd() == -1
    one.offer(0, 3)
    assert device.host_fd() == -1, "it was read, and waits for more room"
    assert len(one.used(0)) == 3
    one.offer(0, 4)
    assert one.used(0)[3:] == [(3, 20), (4, 18)]
    assert merged(3, [20, 18]) == b"h" * 10 + b"\2\0" + b"0123456789abcdefghijklmnop"
    one.offer(0, 5)
    assert device.host_fd() == cable.fileno()
    cable.theirs.send(b"h" * 12 + b"x")
    one.transport.serve(0)
    assert one.used(0)[5:] == [(5, 13)]
    one.put(0x70, 0)
    assert device.host_fd() == -1
    assert not one.stopped


def test_net_with_room_for_the_largest_packet(
    driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read into the driver's buffers at once, and no byte is copied."""
    monkeypatch.setattr(net, "_SMALL_MAX", 60)
    cable = Cable()
    one = driver(Net(cable), VERSION_1 | F_MRG_RXBUF)
    for number in range(4):
        one.describe(0, number, BASE + 0x9000 + 0x100 * number, 20, WRITE, 0)
        one.offer(0, number)
    monkeypatch.delattr(os, "read")
    for length in (1, 30):
        cable.theirs.send(b"h" * 12 + b"x" * length)
        one.transport.serve(0)
        if length == 1:
            assert one.used(0) == [(0, 13)]
            assert one.memory.read(BASE + 0x9000, 13) == b"h" * 10 + b"\1\0x"
    assert one.used(0) == [(0, 13), (1, 20), (2, 20), (3, 2)]
    assert one.memory.read(BASE + 0x9100 + 10, 2) == b"\3\0"


def test_net_lets_the_guest_divide_packets(
    driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's kernel is told what the driver has accepted, and nothing after a reset."""
    flags: list[int] = []

    def ioctl(fd: int, request: int, argument: int) -> int:
        assert request == 0x400454D0
        flags.append(argument)
        return 0

    cable = Cable()
    guest_tso = 1 << 1 | 1 << 7 | 1 << 8
    assert not Net(cable).features & guest_tso, "a socket divides no packets"
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    device = Net(cable)
    assert device.features & guest_tso == guest_tso
    one = driver(device, VERSION_1 | F_MRG_RXBUF | guest_tso)
    assert flags[-1] == 7
    one.put(0x70, 0)
    assert flags[-1] == 0
    assert one.negotiate(VERSION_1 | 1 << 1)
    assert flags[-1] == 1
    assert one.negotiate(VERSION_1)
    assert flags[-1] == 0


def test_each_card_has_a_mac_address_of_its_own() -> None:
    """Two guests on one bridge must not have the same address."""
    cable = Cable()
    made = [Net(cable) for _ in range(20)]
    macs = {net.mac for net in made}
    assert len(macs) == 20
    assert all(mac[0] & 3 == 2 for mac in macs), "for one station, and locally administered"
    assert [net.config[:6] for net in made] == [net.mac for net in made]
    mine = bytes.fromhex("525400123456")
    assert Net(cable, mac=mine).config[:6] == mine
    for wrong in (mine[:5], mine + b"1", bytes(6), b"\x01" + mine[1:]):
        with pytest.raises(ArgumentError, match="MAC address"):
            Net(cable, mac=wrong)
    cable.close()


def test_net_over_a_descriptor_of_the_caller(driver: MakeDriver) -> None:
    """The caller keeps a descriptor that it gives as a number; the card closes an object."""
    cable = Cable()
    device = Net(cable.fileno())
    one = driver(device)
    one.memory.write(BASE + 0x8000, b"h" * 12 + b"packet")
    one.describe(1, 0, BASE + 0x8000, 18, 0, 0)
    one.offer(1, 0)
    assert cable.theirs.recv(100) == b"h" * 12 + b"packet"
    device.close()
    assert os.fstat(cable.fileno())
    Net(cable).close()
    assert cable.fileno() == -1


def test_net_whose_tap_is_gone(driver: MakeDriver) -> None:
    cable = Cable()
    words: list[str] = []
    device = Net(cable, words.append)
    one = driver(device)
    cable.theirs.close()
    one.describe(1, 0, BASE + 0x8000, 20, 0, 0)
    one.offer(1, 0)
    assert words == ["virtio-net: the tap is gone: Broken pipe"]
    one.offer(1, 0)
    assert len(words) == 1
    assert device.host_fd() == -1
    assert not one.stopped


def out_of_order(one: Driver) -> None:
    one.describe(0, 0, BASE, 1, WRITE | NEXT, 1)
    one.describe(0, 1, BASE, 1, 0, 0)


HOSTILE: dict[str, tuple[Callable[[Driver], None], str]] = {
    "circle": (lambda one: one.describe(0, 0, BASE, 1, WRITE | NEXT, 0), "in a circle"),
    "far": (lambda one: one.describe(0, 0, BASE, 1, WRITE | NEXT, 8), "descriptor 8 of 8"),
    "wild": (lambda one: one.describe(0, 0, 1 << 63, 1, WRITE, 0), "not inside shared memory"),
    "before": (
        lambda one: one.describe(0, 0, BASE - 1, 1, WRITE, 0),
        "not inside shared memory",
    ),
    "over": (
        lambda one: one.describe(0, 0, BASE, 0xFFFFFFFF, WRITE, 0),
        "not inside shared memory",
    ),
    "wraps": (
        lambda one: one.describe(0, 0, (1 << 64) - 1, 0x10, WRITE, 0),
        "not inside shared memory",
    ),
    "private": (
        lambda one: one.describe(0, 0, 1 << 32, 1, WRITE, 0),
        "not inside shared memory",
    ),
    "indirect": (
        lambda one: one.describe(0, 0, BASE, 16, TABLE, 0),
        "indirect descriptor (0), which was not offered",
    ),
    "order": (
        out_of_order,
        "put descriptor 1, to be read, after one to be written",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_device_stops_with_a_word(driver: MakeDriver, name: str) -> None:
    prepare, words = HOSTILE[name]
    one = driver(Entropy())
    prepare(one)
    one.offer(0, 0)
    assert one.stopped
    assert len(one.words) == 1
    assert one.words[0].startswith("virtio-rng stopped: the guest ")
    assert words in one.words[0]
    assert one.used(0) == []
    assert one.get(0x60) & 2
    one.offer(0, 0)  # it does not listen any more …
    assert len(one.words) == 1
    assert one.negotiate()  # … until it is reset
    one.indices = [0]
    one.memory.write(one.rings(0)[1], bytes(4))
    one.memory.write(one.rings(0)[2], bytes(4))
    one.start()
    one.request((4, WRITE))
    assert one.used(0) == [(0, 4)]


def put_table(one: Driver, *descriptors: tuple[int, int, int, int]) -> None:
    one.memory.write(BASE + 0x8000, b"".join(struct.pack("<QIHH", *each) for each in descriptors))


def test_a_table_of_descriptors(driver: MakeDriver, disk: Path) -> None:
    """A request whose parts are not in the ring, so that the ring holds more requests."""
    one = driver(Block(disk), VERSION_1 | INDIRECT)
    one.memory.write(BASE + 0x9000, struct.pack("<IIQ", 0, 0, 1))
    parts = ((BASE + 0x9000, 16, NEXT, 2), (0, 0, 0, 0), (BASE + 0xA000, 512, NEXT | WRITE, 3))
    put_table(one, *parts, (BASE + 0xB000, 1, WRITE, 0))
    one.describe(0, 5, BASE + 0x8000, 16 * 4, TABLE, 0)
    one.offer(0, 5)
    assert one.used(0) == [(5, 513)]
    assert one.memory.read(BASE + 0xA000, 512) == disk.read_bytes()[512:1024]


HOSTILE_TABLES: dict[str, tuple[list[tuple[int, int, int, int]], int, int, str]] = {
    "in a table": ([(BASE, 16, TABLE, 0)], 16, 0, "indirect descriptor (0), which may not be here"),
    "goes on": ([(BASE, 1, WRITE, 0)], 16, NEXT, "which may not be here"),
    "empty": ([], 0, 0, "a table of descriptors of 0 bytes"),
    "odd": ([(BASE, 1, WRITE, 0)], 17, 0, "a table of descriptors of 17 bytes"),
    "behind its end": ([(BASE, 1, WRITE | NEXT, 1)], 16, 0, "descriptor 1 of 1"),
    "circle": ([(BASE, 1, WRITE | NEXT, 0)], 16, 0, "in a circle"),
    "outside": ([], 16 << 20, 0, "not inside shared memory"),
}


@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_a_table_that_breaks_the_rules(driver: MakeDriver, name: str) -> None:
    parts, size, flags, words = HOSTILE_TABLES[name]
    one = driver(Entropy(), VERSION_1 | INDIRECT)
    put_table(one, *parts)
    one.describe(0, 0, BASE + 0x8000, size, TABLE | flags, 0)
    one.offer(0, 0)
    assert one.stopped
    assert words in one.words[0]


def test_event_indices(driver: MakeDriver) -> None:
    """Each side is notified from the index on that it has asked for, and not before."""
    one = driver(Entropy(), VERSION_1 | EVENT_INDEX)
    _, available, used = one.rings(0)

    def device_waits_for() -> int:
        return int.from_bytes(one.memory.read(used + 4 + 8 * 8, 2), "little")

    def request(driver_waits_for: int) -> int:
        one.memory.write(available + 4 + 2 * 8, struct.pack("<H", driver_waits_for))
        one.request((4, WRITE))
        return one.interrupts

    assert request(0) == 1
    assert device_waits_for() == 1, "it has seen one request"
    assert request(3) == 1
    assert request(3) == 1
    assert request(3) == 2, "the fourth, with the index 3"
    assert request(3) == 2
    assert device_waits_for() == 5
    one.memory.write(available, struct.pack("<H", 1))  # no interrupts: not for event indices
    assert request(5) == 3
    for _ in range((1 << 16) - 7):
        one.request((4, WRITE))
    assert device_waits_for() == (1 << 16) - 1
    before = request((1 << 16) - 1)
    assert request(0) == before + 1, "the index wraps"
    assert device_waits_for() == 1


def test_a_queue_that_something_else_has_served(driver: MakeDriver) -> None:
    one = driver(Entropy())
    for _ in range(2):
        one.request((4, WRITE))
    (queue,) = one.transport.queues
    assert queue.base == 2
    places = (address - BASE + one.host.userspace_addr for address in one.rings(0))
    assert queue.userspace_addrs() == tuple(places)
    one.memory.write(one.rings(0)[2] + 2, b"\5\0")
    queue.resume_at(0x10007)
    assert queue.base == 7
    queue.resume_at(None)
    assert queue.base == 5, "what was taken was returned"


def test_more_requests_than_the_ring_holds(driver: MakeDriver) -> None:
    one = driver(Entropy())
    one.describe(0, 0, BASE, 1, WRITE, 0)
    one.offer(0, 0, ahead=9)
    assert one.words == ["virtio-rng stopped: the guest offered 9 requests in a ring of 8"]


@pytest.mark.parametrize("size", [0, 3, 512, 0x8000, 0xFFFFFFFF])
def test_a_queue_of_a_size_that_is_none(size: int) -> None:
    one = Driver(Entropy())
    assert one.negotiate()
    one.start(size)
    assert one.stopped
    assert f"a queue of {size} entries" in one.words[0]


@pytest.mark.parametrize("address", [BASE - 16, BASE + SIZE - 16, (1 << 64) - 16, 8, 1 << 32])
def test_rings_outside_memory(address: int) -> None:
    one = Driver(Entropy())
    assert one.negotiate()
    one.rings = lambda number: (address, BASE, BASE)  # type: ignore[method-assign]
    one.start()
    assert one.stopped
    assert "ring" in one.words[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_whatever_a_guest_does(tmp_path: Path, data: st.DataObject) -> None:
    """Random registers and rings: nothing is raised, and the size of the disk does not change."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    kind = data.draw(st.sampled_from(("disk", "net", "rng")))
    cable = Cable()
    device: VirtioDevice
    if kind == "disk":
        device = Block(path)
    elif kind == "net":
        device = Net(cable)
    else:
        device = Entropy()
    try:
        misbehave(Driver(device), cable, data)
    finally:
        device.close()
        cable.close()
    assert path.stat().st_size == 4096


ADDRESSES = st.one_of(
    st.integers(BASE, BASE + 0x4000),
    st.integers(BASE + SIZE - 64, BASE + SIZE + 64),
    st.integers(0, (1 << 64) - 1),
)
LENGTHS = st.one_of(st.integers(0, 2000), st.integers(0, 0xFFFFFFFF))
REGISTERS = st.one_of(st.integers(0, 0x1FF), st.sampled_from(range(0, 0xB0, 4)))
STEPS = st.one_of(
    st.tuples(st.just("write"), REGISTERS, st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("read"), REGISTERS, st.sampled_from((1, 2, 4, 8))),
    st.tuples(
        st.just("describe"),
        st.integers(0, 7),
        ADDRESSES,
        LENGTHS,
        st.integers(0, 3),
        st.integers(0, 9),
    ),
    st.tuples(st.just("offer"), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("ring"), st.integers(0, 2), st.binary(max_size=150)),
    st.tuples(st.just("packet"), st.binary(min_size=1, max_size=200)),
)


def misbehave(one: Driver, cable: Cable, data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        one.negotiate()
        one.start()
    queues = st.integers(0, len(one.indices) - 1)
    for queue, (what, *values) in data.draw(st.lists(st.tuples(queues, STEPS), max_size=25)):
        if what == "write":
            one.put(*values)
        elif what == "read":
            assert one.get(*values) >= 0
        elif what == "describe":
            one.describe(queue, *values)
        elif what == "offer":
            one.offer(queue, values[0], ahead=values[1])
        elif what == "ring":
            one.memory.write(one.rings(queue)[values[0]], values[1])
        else:
            cable.theirs.send(values[0])
            one.transport.serve(0)


def test_only_one_holds_the_lock(disk: Path) -> None:
    """A reader's lock excludes a writer; two readers can share the disk."""
    with disk.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(OSError, match="in use"):
            Block(disk)


def test_nobody_sees_an_index_that_is_none(tmp_path: Path) -> None:
    """A driver that reads the index at any moment finds the old or the new value."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        host = HostMemory(SIZE, fd=file.fileno())
    queue = Queue(GuestMemory([(Range(BASE, SIZE, "shared", ""), host)]))
    queue.size, queue.addresses = 8, [BASE, BASE + 0x400, BASE + 0x800]
    queue.activate()
    queue._used_index = 0x4FE
    queue.push(Chain(7, [], []), 1)

    index = host.view()[0x802:0x804].cast("H")
    stop, looks = host.view()[0x1000:0x1002].cast("H"), host.view()[0x1008:0x1010].cast("Q")
    driver = os.fork()
    if driver == 0:
        status = 1
        with suppress(BaseException):
            while (seen := index[0]) in (0x4FF, 0x500) and not stop[0]:
                looks[0] += 1
            status = 0 if seen in (0x4FF, 0x500) else 3
        os._exit(status)
    pushes, until = 0, time.monotonic() + 1
    while time.monotonic() < until or looks[0] < 1000:  # the two must have run at the same time
        for _ in range(100):
            queue.push(Chain(7, [], []), 1)
            queue._used_index = 0x4FE
            queue.push(Chain(7, [], []), 1)
            pushes += 2
        if os.waitid(os.P_PID, driver, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    stop[0] = 1
    _, ended = os.waitpid(driver, 0)
    assert os.waitstatus_to_exitcode(ended) == 0, f"seen after {looks[0]} looks, {pushes} pushes"
    assert pushes > 1000
