"""The port of a virtio console, with a correct driver, and with drivers that break the rules."""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Iterator

import pytest

from kvmpriv.guest.linux.io import IoThread
from kvmpriv.guest.linux.outcome import Ending
from kvmpriv.guest.linux.pause import Gate
from kvmpriv.guest.linux.port import Console, Port
from kvmpriv.guest.linux.supervisor import Supervisor
from kvmpriv.guest.linux.virtio import VERSION_1
from unit.test_linux_virtio import BASE, NEXT, WRITE, Driver

MULTIPORT = 1 << 1
RECEIVE, SEND, CONTROL_RECEIVE, CONTROL_SEND = range(4)
READY, ADD, PORT_READY, OPEN, NAME = 0, 1, 3, 6, 7


class Guest:
    """A driver that has set the port up, and what came out of the port."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.closed = 0
        self.port = Port("a name", self.got.append, self._close)
        self.driver = Driver(self.port)
        assert self.driver.get(0x104) == 1, "one port"
        self.driver.put(0x30, 3)
        assert self.driver.get(0x34) == 64
        assert self.driver.negotiate(VERSION_1 | MULTIPORT)
        self.driver.start()

    def _close(self) -> None:
        self.closed += 1

    def room(self, queue: int, number: int, size: int = 100) -> int:
        """Offer a buffer of `size` bytes to receive into; returns its address."""
        at = BASE + 0x10000 + queue * 0x4000 + number * 0x400
        self.driver.describe(queue, number, at, size, WRITE, 0)
        self.driver.offer(queue, number)
        return at

    def send(self, queue: int, data: bytes) -> None:
        at = BASE + 0x30000
        self.driver.memory.write(at, data)
        self.driver.describe(queue, 0, at, len(data), 0, 0)
        self.driver.offer(queue, 0)

    def control(self, event: int, value: int = 1) -> None:
        self.send(CONTROL_SEND, struct.pack("<IHH", 0, event, value))

    def serve(self) -> None:
        """What the thread of the devices does when the descriptor is readable."""
        for queue in self.port.host_queues:
            self.driver.transport.serve(queue)

    def readable(self) -> bool:
        poll = select.poll()
        poll.register(self.driver.transport.host_fd(), select.POLLIN)
        return bool(poll.poll(0))


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.port.close()


def test_the_driver_learns_of_the_port(guest: Guest) -> None:
    places = [guest.room(CONTROL_RECEIVE, number) for number in range(3)]
    guest.control(READY)
    assert guest.readable()
    guest.serve()
    assert not guest.readable()
    read = guest.driver.memory.read
    assert read(places[0], 8) == struct.pack("<IHH", 0, ADD, 1)
    guest.control(PORT_READY)
    guest.serve()
    assert read(places[1], 14) == struct.pack("<IHH", 0, NAME, 1) + b"a name"
    assert read(places[2], 8) == struct.pack("<IHH", 0, OPEN, 1)
    assert guest.driver.used(CONTROL_RECEIVE) == [(0, 8), (1, 14), (2, 8)]
    guest.control(PORT_READY)
    guest.serve()
    place = guest.room(CONTROL_RECEIVE, 3)  # the answers waited for room
    assert read(place, 14)[8:] == b"a name"
    assert not guest.driver.stopped


def test_bytes_each_way(guest: Guest) -> None:
    guest.send(SEND, b"\0from the guest\xff")
    assert guest.got == [b"\0from the guest\xff"]
    guest.port.send(b"x" * 150)
    guest.port.send(b"y" * 20)
    assert guest.readable()
    guest.serve()  # there is no room yet
    assert not guest.readable(), "the thread must not turn in circles"
    first = guest.room(RECEIVE, 0)
    assert guest.driver.memory.read(first, 100) == b"x" * 100
    second = guest.room(RECEIVE, 1)
    assert guest.driver.memory.read(second, 70) == b"x" * 50 + b"y" * 20
    assert guest.driver.used(RECEIVE) == [(0, 100), (1, 70)]
    third = guest.room(RECEIVE, 2)
    guest.port.send(b"z")
    guest.serve()
    assert guest.driver.memory.read(third, 1) == b"z"


def test_a_buffer_in_two_pieces(guest: Guest) -> None:
    at = BASE + 0x20000
    guest.driver.describe(RECEIVE, 0, at, 3, WRITE | NEXT, 1)
    guest.driver.describe(RECEIVE, 1, at + 0x100, 10, WRITE, 0)
    guest.driver.offer(RECEIVE, 0)
    guest.port.send(b"abcdef")
    guest.serve()
    assert guest.driver.memory.read(at, 3) == b"abc"
    assert guest.driver.memory.read(at + 0x100, 3) == b"def"
    assert guest.driver.used(RECEIVE) == [(0, 6)]


def test_a_program_opens_and_closes_it(guest: Guest) -> None:
    guest.control(OPEN, 0)
    assert guest.closed == 0, "it was not open"
    guest.control(OPEN, 1)
    guest.control(OPEN, 0)
    assert guest.closed == 1
    guest.control(OPEN, 1)
    guest.driver.put(0x70, 0)  # the driver resets the device
    assert guest.closed == 2


@pytest.mark.parametrize("case", ["short", "room", "empty", "flood", "huge"])
def test_a_driver_that_breaks_the_rules(guest: Guest, case: str) -> None:
    """The device stops and wakes nobody any more; the process goes on."""
    if case == "short":
        guest.send(CONTROL_SEND, b"1234567")
    elif case == "room":
        guest.room(CONTROL_RECEIVE, 0, 7)
        guest.control(READY)
        guest.serve()
    elif case == "empty":
        guest.driver.describe(RECEIVE, 0, BASE + 0x20000, 0, WRITE, 0)
        guest.driver.offer(RECEIVE, 0)
        guest.port.send(b"x")
        guest.serve()
    elif case == "flood":
        for _ in range(70):
            guest.control(READY)
    else:
        for number in range(8):
            more = NEXT if number < 7 else 0
            guest.driver.describe(SEND, number, BASE, 0x40000, more, number + 1)
        guest.driver.offer(SEND, 0)
    assert guest.driver.stopped
    assert len(guest.driver.words) == 1
    guest.port.send(b"later")
    assert guest.driver.transport.host_fd() == -1


def test_the_thread_of_the_devices(guest: Guest) -> None:
    """`send` in any thread reaches the driver; after close it has no effect."""
    arrived = threading.Event()
    guest.driver.transport._interrupt = arrived.set
    place = guest.room(RECEIVE, 0)
    notify = os.eventfd(0, os.EFD_NONBLOCK)
    failed: list[BaseException] = []
    gate = Gate()
    thread = IoThread(failed.append, gate)
    thread.add(notify, guest.driver.transport, RECEIVE)
    thread.start()
    guest.port.send(b"hello")
    assert arrived.wait(10)
    assert guest.driver.memory.read(place, 5) == b"hello"
    arrived.clear()
    second = guest.room(RECEIVE, 1)
    gate.shut([thread], thread.kick)
    guest.port.send(b"later")
    assert not arrived.wait(0.2), "the guest is paused"
    gate.open()
    assert arrived.wait(10)
    assert guest.driver.memory.read(second, 5) == b"later"
    gate.shut([thread], thread.kick)
    threading.Timer(0.1, gate.open).start()
    thread.stop()
    assert thread.seconds > 0
    thread.close()
    os.close(notify)
    guest.port.close()
    guest.port.send(b"nobody")
    assert failed == []


# -- the console -----------------------------------------------------------------------------------


def test_the_virtio_console() -> None:
    """Both directions; nothing is taken from the guest while there is no room for it."""
    printed: list[bytes] = []
    room = True
    console = Console(printed.append, lambda: room)
    driver = Driver(console)
    assert driver.negotiate()
    driver.start()

    def print_(text: bytes) -> None:
        driver.memory.write(BASE + 0x30000, text)
        driver.describe(SEND, 0, BASE + 0x30000, len(text), 0, 0)
        driver.offer(SEND, 0)

    print_(b"hello\n")
    room = False
    print_(b"later\n")
    assert printed == [b"hello\n"]
    assert len(driver.used(SEND)) == 1
    poll = select.poll()
    poll.register(driver.transport.host_fd(), select.POLLIN)
    assert not poll.poll(0)
    room = True
    console.alert()
    assert poll.poll(0)
    for queue in console.host_queues:
        driver.transport.serve(queue)
    assert printed == [b"hello\n", b"later\n"]
    assert not poll.poll(0)
    console.receive(b"typed")
    assert console.pending() == 5
    driver.describe(RECEIVE, 0, BASE + 0x10000, 3, WRITE, 0)
    driver.offer(RECEIVE, 0)
    assert driver.memory.read(BASE + 0x10000, 3) == b"typ"
    assert console.pending() == 2
    console.close()
    console.alert()
    assert not driver.stopped


def test_output_of_the_virtio_console_waits_for_its_reader() -> None:
    """A guest that floods it makes this process keep no more than a limit and one request."""
    ending = Ending()
    taken: list[bytes] = []
    alerts: list[bool] = []
    supervisor = Supervisor(ending, taken.append, lambda: "")
    supervisor.drained = lambda: alerts.append(supervisor.has_room())
    assert supervisor.has_room()
    supervisor.put_all(b"x" * (64 << 10))
    assert not supervisor.has_room()
    assert os.eventfd_read(ending.wake.fileno()) == 1
    supervisor.flush()
    assert alerts == [True]
    assert taken == [b"x" * (64 << 10)]
    supervisor.flush()
    assert alerts == [True]
    ending.close()
