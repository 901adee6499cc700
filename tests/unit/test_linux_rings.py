"""A driver that runs beside the devices' thread, and notifies and waits as Linux's driver does."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpriv import HostMemory
from kvmpriv.guest.linux.disk import Block
from kvmpriv.guest.linux.io import IoThread
from kvmpriv.guest.linux.layout import GuestMemory, Range
from kvmpriv.guest.linux.net import Net
from kvmpriv.guest.linux.pause import Gate
from kvmpriv.guest.linux.virtio import EVENT_INDEX, INDIRECT, VERSION_1, Transport, VirtioDevice

from .test_linux_virtio import NEXT, TABLE, WRITE, Cable

SIZE = 16 << 20
ENTRIES = 16
F_MRG_RXBUF = 1 << 15
UNREAD = 50  # packets that the cable holds
PATIENCE = 20  # seconds until a test finds that the device does not wake the driver


class Ring:
    """The driver's side of a queue."""

    def __init__(self, memory: HostMemory, at: int, notify: int, *, events: bool) -> None:
        self._events = events
        self.at = at
        self.descriptors, self.available, self.used = at, at + 0x1000, at + 0x2000
        self._bytes = memory.view()
        self._half = memory.view().cast("H")
        self._word = memory.view().cast("I")
        self._notify = notify
        self._added = self._known = self._seen = 0
        self.notified = 0
        self._barrier = threading.Lock()

    def add(self, head: int, *descriptor: int) -> None:
        """Offer the request of one descriptor."""
        struct.pack_into("<QIHH", self._bytes, self.descriptors + 16 * head, *descriptor)
        self._half[self.available // 2 + 2 + self._added % ENTRIES] = head
        self._added = (self._added + 1) & 0xFFFF
        self._half[self.available // 2 + 1] = self._added

    def kick(self) -> None:
        """Notify the device, if it asks for what was added since the last call."""
        with self._barrier:
            event = self._half[(self.used + 4 + 8 * ENTRIES) // 2]
        known, self._known = self._known, self._added
        wanted = (self._added - event - 1) & 0xFFFF < (self._added - known) & 0xFFFF
        if wanted or not self._events:
            self.notified += 1
            os.eventfd_write(self._notify, 1)

    def returned(self) -> Iterator[tuple[int, int]]:
        """The requests that came back: the head, and how many bytes were written."""
        while self._half[self.used // 2 + 1] != self._seen:
            at = (self.used + 4) // 4 + 2 * (self._seen % ENTRIES)
            self._seen = (self._seen + 1) & 0xFFFF
            yield self._word[at], self._word[at + 1]

    def ask(self) -> bool:
        """Ask for an interrupt; False if requests came back already."""
        self._half[self.available // 2 + 2 + ENTRIES] = self._seen
        with self._barrier:
            return self._half[self.used // 2 + 1] == self._seen


class Guest:
    """A device, its thread, and a driver with its rings at the beginning of memory."""

    def __init__(self, device: VirtioDevice, features: int) -> None:
        self.memory = HostMemory(SIZE)
        shared = GuestMemory([(Range(0, SIZE, "shared", ""), self.memory)])
        self.interrupted = [threading.Event() for _ in range(device.queue_count)]
        self.words: list[str] = []
        self.transport = Transport(device, shared, self._interrupt, self.words.append)
        self.thread = IoThread(lambda error: self.words.append(repr(error)), Gate())
        self.rings: list[Ring] = []
        put = self.transport.write
        put(0x70, 4, 3)
        for half in range(2):
            put(0x24, 4, half)
            put(0x20, 4, features >> 32 * half & 0xFFFFFFFF)
        put(0x70, 4, 0xB)
        assert self.transport.read(0x70, 4) == 0xB
        for number in range(device.queue_count):
            notify = os.eventfd(0, os.EFD_NONBLOCK)
            events = bool(features & EVENT_INDEX)
            ring = Ring(self.memory, 0x4000 * number, notify, events=events)
            self.rings.append(ring)
            self.thread.add(notify, self.transport, number)
            put(0x30, 4, number)
            put(0x38, 4, ENTRIES)
            places = (ring.descriptors, ring.available, ring.used)
            for register, address in zip((0x80, 0x90, 0xA0), places, strict=True):
                put(register, 4, address)
            put(0x44, 4, 1)
        put(0x70, 4, 0xF)
        self.thread.start()

    def _interrupt(self) -> None:
        for event in self.interrupted:  # one line: the driver looks at all of its queues
            event.set()

    def wait(self, number: int) -> None:
        """Wait until the device interrupts, as it was asked to."""
        if self.rings[number].ask():
            assert self.interrupted[number].wait(PATIENCE), f"queue {number}: no interrupt"
        self.interrupted[number].clear()

    def close(self) -> None:
        self.thread.stop()
        self.thread.close()
        self.transport.close()


def packets(count: int, most: int) -> list[bytes]:
    generator = random.Random(count)
    return [generator.randbytes(generator.randrange(1, most)) for _ in range(count)]


@pytest.mark.parametrize("features", [0, EVENT_INDEX | INDIRECT])
def test_no_packet_waits_for_ever(features: int) -> None:
    """Packets in both directions at once; the driver sleeps whenever it has nothing to do."""
    cable = Cable()
    card = Net(cable)
    guest = Guest(card, VERSION_1 | F_MRG_RXBUF | features)
    receive, send = guest.rings
    down, up = packets(1500, 4000), packets(1500, 1400)
    came: list[bytes] = []

    def feed() -> None:
        for packet in down:
            cable.theirs.send(bytes(12) + packet)

    def take() -> None:
        while len(came) < len(up):
            came.append(cable.theirs.recv(1 << 16)[12:])

    threads = [threading.Thread(target=each, daemon=True) for each in (feed, take)]
    failed: list[BaseException] = []

    def transmit() -> None:
        try:
            free = [*range(ENTRIES)]
            for number, packet in enumerate(up):
                while len(came) < number - UNREAD:  # the cable would drop it
                    time.sleep(0.001)
                while not free:
                    guest.wait(1)
                    free += [head for head, _ in send.returned()]
                head = free.pop()
                at = 0x100000 + 0x1000 * head
                guest.memory.write(at, bytes(12) + packet)
                send.add(head, at, 12 + len(packet), 0, 0)
                send.kick()
        except BaseException as error:  # noqa: BLE001  # it is raised below
            failed.append(error)

    threads.append(threading.Thread(target=transmit, daemon=True))

    def room(head: int) -> int:
        return 0x200000 + 0x1000 * head

    for head in range(ENTRIES):
        receive.add(head, room(head), 1500, WRITE, 0)
    receive.kick()
    for thread in threads:
        thread.start()
    got: list[bytes] = []
    pieces: list[bytes] = []
    left = 0
    while len(got) < len(down):
        for head, size in receive.returned():
            data = guest.memory.read(room(head), size)
            if not left:
                left = int.from_bytes(data[10:12], "little")
                data = data[12:]
            pieces.append(data)
            left -= 1
            if not left:
                got.append(b"".join(pieces))
                pieces = []
            receive.add(head, room(head), 1500, WRITE, 0)
        receive.kick()
        if len(got) < len(down):
            guest.wait(0)
    for thread in threads:
        thread.join(PATIENCE)
    assert failed == []
    assert got == down
    assert came == up
    assert guest.words == []
    if features:
        assert receive.notified < len(down) / 2, "the device takes buffers without being told"
    guest.close()
    card.close()


def test_no_disk_request_waits_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    content = random.Random(3).randbytes(1 << 20)
    path.write_bytes(content)
    disk = Block(path)
    guest = Guest(disk, VERSION_1 | EVENT_INDEX | INDIRECT)
    (ring,) = guest.rings
    free = [*range(ENTRIES)]
    under_way: dict[int, int] = {}
    read: dict[int, bytes] = {}
    sectors = [*range(0, 2048, 4)]
    while sectors or under_way:
        while free and sectors:
            head, sector = free.pop(), sectors.pop()
            at = 0x100000 + 0x2000 * head
            parts = ((at + 0x100, 16, NEXT, 1), (at + 0x1000, 2048, NEXT | WRITE, 2))
            table = (*parts, (at + 0x200, 1, WRITE, 0))
            guest.memory.write(at, b"".join(struct.pack("<QIHH", *each) for each in table))
            guest.memory.write(at + 0x100, struct.pack("<IIQ", 0, 0, sector))
            guest.memory.write(at + 0x200, b"\xff")
            under_way[head] = sector
            ring.add(head, at, 48, TABLE, 0)
        ring.kick()
        guest.wait(0)
        for head, size in ring.returned():
            assert size == 2049
            at = 0x100000 + 0x2000 * head
            assert guest.memory.read(at + 0x200, 1) == b"\0"
            read[under_way.pop(head)] = guest.memory.read(at + 0x1000, 2048)
            free.append(head)
    assert b"".join(data for _, data in sorted(read.items())) == content
    assert guest.words == []
    guest.close()
    disk.close()
