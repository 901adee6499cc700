"""A guest's vsock device and its connection, with a /dev/vhost-vsock that is simulated."""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmpriv import ArgumentError
from kvmpriv.guest.linux import vsock
from kvmpriv.guest.linux.io import IoThread
from kvmpriv.guest.linux.pause import Gate
from kvmpriv.guest.linux.vhost import VhostVsock, VhostVsockPath
from kvmpriv.guest.linux.virtio import ACCESS_PLATFORM, EVENT_INDEX, INDIRECT, VERSION_1, Wires
from kvmpriv.guest.linux.vsock import GUEST_PORT, Listener, Vsock

from .test_linux_vhost import FILES, Kernel, kernel
from .test_linux_virtio import BASE, WRITE, Driver

__all__ = ["kernel"]

FEATURES = VERSION_1 | INDIRECT | EVENT_INDEX
RECEIVE, SEND, EVENTS = range(3)
OPENING = ("VHOST_SET_OWNER", "VHOST_GET_FEATURES", "VHOST_VSOCK_SET_GUEST_CID")
STARTING = (
    "VHOST_SET_FEATURES",
    "VHOST_SET_MEM_TABLE",
    "VHOST_SET_VRING_NUM",
    "VHOST_SET_VRING_BASE",
    "VHOST_SET_VRING_ADDR",
    "VHOST_SET_VRING_CALL",
    "VHOST_SET_VRING_ERR",
    "VHOST_SET_VRING_KICK",
    "VHOST_VSOCK_SET_RUNNING",
)
MIB = 1 << 20


class Server(socket.socket):
    """A listener of this host that has the addresses of vsock: `peers` are the next ones."""

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX)
        self.bind("")  # the kernel chooses an abstract name
        self.name = super().getsockname()
        self.peers: list[tuple[int, int]] = []
        self.listen()

    def accept(self) -> tuple[socket.socket, Any]:
        made, _ = super().accept()
        return made, self.peers.pop(0)

    def getsockname(self) -> tuple[int, int]:
        return 2, 12345

    def connect_from(self, cid: int, port: int = GUEST_PORT) -> socket.socket:
        self.peers.append((cid, port))
        made = socket.socket(socket.AF_UNIX)
        made.connect(self.name)
        made.settimeout(10)
        return made


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class Guest:
    """A vsock device, its driver, and what has come out of its connection."""

    def __init__(self, server: Server, *, required: bool = False, **options: Any) -> None:
        self.server = server
        self.got = bytearray()
        self.ended = 0
        self.wires = Wires(
            os.eventfd(0, os.EFD_NONBLOCK), [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        )
        self.vsock = Vsock(self.got.extend, self._end, required=required)
        self.driver = Driver(self.vsock, wires=self.wires, **options)
        self.transport = self.driver.transport
        assert self.driver.negotiate(FEATURES | self.transport._offered & ACCESS_PLATFORM)

    def _end(self) -> None:
        self.ended += 1

    def ready(self) -> bool:
        """Do what the thread of the devices does; whether there was something to do."""
        poll = select.poll()
        poll.register(self.vsock.own_fd, select.POLLIN)
        found = bool(poll.poll(0))
        if found:
            self.vsock.own_ready()
        return found

    def serve(self) -> None:
        while self.ready():
            pass

    def connect(self, port: int = GUEST_PORT) -> socket.socket:
        made = self.server.connect_from(self.vsock.cid, port)
        self.serve()
        return made

    def close(self) -> None:
        self.transport.close()
        self.vsock.close()
        for fd in (self.wires.interrupt, *self.wires.notify):
            os.close(fd)


MakeGuest = Callable[..., Guest]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    monkeypatch.setattr(vsock, "_listen", lambda: made)
    yield made
    made.close()


@pytest.fixture
def guest(kernel: Kernel, server: Server) -> Iterator[MakeGuest]:
    made: list[Guest] = []

    def make(**options: Any) -> Guest:
        made.append(Guest(server, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


# -- the device ------------------------------------------------------------------------------------


def test_the_kernel_serves_two_rings(kernel: Kernel, guest: MakeGuest) -> None:
    one = guest(access_platform=True)
    driver = one.driver
    assert driver.get(8) == 19
    assert driver.get(0x100, 8) == one.vsock.cid == kernel.cids[-1]
    assert (one.vsock.port, one.vsock.name) == (12345, "virtio-vsock (vhost)")
    for number in range(3):
        driver.put(0x30, number)
        assert driver.get(0x34) == 128
    driver.put(0x30, 3)
    assert driver.get(0x34) == 0, "no fourth queue"
    assert kernel.serving == [False, False]
    driver.start()
    assert kernel.serving == [True, True]
    assert kernel.accepted == FEATURES, "the kernel is not to translate addresses"
    kernel.checks_rings(driver, one.wires)
    assert one.transport.engaged
    served = [one.transport.path_serves(number) for number in range(3)]
    assert served == [True, True, False]
    with pytest.raises(BlockingIOError):
        os.eventfd_read(one.wires.notify[EVENTS])
    driver.describe(EVENTS, 0, BASE + 0x8000, 8, WRITE, 0)
    driver.offer(EVENTS, 0)
    assert driver.used(EVENTS) == [], "there are no events"
    assert driver.words == []
    assert one.driver.interrupts == 0
    one.transport.pause()
    assert kernel.serving == [False, False]
    kernel.rings[0]["base"], kernel.rings[1]["base"] = 7, 9
    one.transport.pause()
    one.transport.resume()
    assert kernel.serving == [True, True]


def test_a_pause(kernel: Kernel, guest: MakeGuest) -> None:
    one = guest()
    one.driver.start()
    connection = one.connect()
    kernel.rings[0]["base"], kernel.rings[1]["base"] = 3, 0xFFFF
    one.transport.pause()
    assert kernel.serving == [False, False]
    for ring in kernel.rings:
        assert {ring[name] for name in FILES} == {-1}
    one.transport.resume()
    assert kernel.serving == [True, True]
    assert [ring["base"] for ring in kernel.rings] == [3, 0xFFFF]
    connection.sendall(b"after")
    one.serve()
    assert (bytes(one.got), one.ended) == (b"after", 0)
    connection.close()


def test_cids_that_other_guests_have(kernel: Kernel, server: Server) -> None:
    kernel.cids_taken = 63
    made = Vsock(lambda data: None)
    assert made.cid == kernel.cids[63]
    assert len(set(kernel.cids)) > 60, "another one each time"
    assert all(3 <= cid < 0xFFFFFFFF for cid in kernel.cids)
    made.close()


def test_no_cid_is_free(kernel: Kernel, server: Server) -> None:
    kernel.cids_taken = 64
    before = fds()
    with pytest.raises(OSError, match="SET_GUEST_CID: Address already in use") as error:
        Vsock(lambda data: None)
    assert error.value.errno == errno.EADDRINUSE
    assert len(kernel.cids) == 64
    assert fds() == before


@pytest.mark.parametrize("fails", OPENING)
def test_a_kernel_that_refuses_from_the_start(kernel: Kernel, server: Server, fails: str) -> None:
    kernel.fails = fails
    before = fds()
    with pytest.raises(OSError, match=f"/dev/vhost-vsock can't be used: {fails}: Op") as error:
        Vsock(lambda data: None)
    assert error.value.errno == errno.EPERM
    assert all(device.closed for device in kernel.opened)
    kernel.fails = ""
    Vsock(lambda data: None).close()
    assert fds() == before - 1, "the server is closed with the device"


def test_a_host_without_sockets(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's seccomp filter may refuse AF_VSOCK; another host has no guests' vsock."""

    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    before = fds()
    words = "a socket of AF_VSOCK can't be used: "
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", refuse)
        with pytest.raises(PermissionError, match=words + "Operation not permitted"):
            Vsock(lambda data: None)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "VMADDR_CID_HOST", 77)
        with pytest.raises(OSError, match=words):  # there is no such address, or no AF_VSOCK
            Vsock(lambda data: None)
    with monkeypatch.context() as patch:
        patch.delattr(socket, "AF_VSOCK")
        with pytest.raises(OSError, match=words + "this Python was built without it"):
            Vsock(lambda data: None)
    assert len(kernel.opened) == 3
    assert all(device.closed for device in kernel.opened)
    assert fds() == before


def test_a_host_without_vhost(tmp_path: Any) -> None:
    absent = str(tmp_path / "vhost-vsock")
    before = fds()
    with pytest.raises(FileNotFoundError, match=f"{absent} can't be used: No such file") as error:
        Vsock(lambda data: None, device=absent)
    assert error.value.errno == errno.ENOENT
    assert fds() == before


@pytest.mark.parametrize("ring", [0, 1])
@pytest.mark.parametrize("fails", STARTING)
def test_a_kernel_that_refuses_in_the_middle(
    kernel: Kernel, guest: MakeGuest, fails: str, ring: int
) -> None:
    """The kernel's settings are taken back, and no connection can be made."""
    one = guest()
    kernel.fails, kernel.fails_at = fails, ring
    one.driver.start()
    assert "".join(one.driver.words) == (
        f"virtio-vsock (vhost): vhost can't be used: {fails}: Operation not permitted; the guest"
        " has no vsock"
    )
    assert kernel.serving == [False, False]
    for each in kernel.rings:
        assert {each.get(name, -1) for name in FILES} == {-1}
    assert not one.transport.engaged
    one.driver.offer(EVENTS, 0)
    assert not one.ready()
    one.driver.offer(SEND, 0)
    one.serve()
    with pytest.raises(ConnectionRefusedError):
        one.connect()
    assert one.ended == 0, "there was no connection"


@pytest.mark.parametrize("fails", STARTING)
def test_a_vsock_that_must_be_there(kernel: Kernel, guest: MakeGuest, fails: str) -> None:
    one = guest(required=True)
    kernel.fails = fails
    with pytest.raises(OSError, match=f"{fails}: Operation not permitted"):
        one.driver.start()
    assert kernel.serving == [False, False]


def test_a_kernel_that_refuses_after_a_pause(kernel: Kernel, guest: MakeGuest) -> None:
    one = guest()
    one.driver.start()
    connection = one.connect()
    one.transport.pause()
    kernel.fails = "VHOST_VSOCK_SET_RUNNING"
    one.transport.resume()
    one.serve()
    assert one.ended == 1
    assert connection.recv(1) == b""
    connection.close()


def test_a_driver_that_breaks_the_rules(kernel: Kernel, guest: MakeGuest) -> None:
    one = guest()
    one.driver.start()
    os.eventfd_write(one.transport.host_fd(), 1)
    one.transport.host_ready()
    assert one.driver.stopped
    assert kernel.serving == [False, False]
    assert "".join(one.driver.words) == (
        "virtio-vsock (vhost) stopped: the guest broke the rules of a ring, as vhost found"
    )


def test_a_driver_that_starts_again(kernel: Kernel, guest: MakeGuest) -> None:
    """The connection has ended for the guest; before there is one, nothing has."""
    one = guest()
    one.driver.start()
    one.driver.put(0x70, 0)
    assert not one.ready()
    assert one.driver.negotiate(FEATURES)
    one.driver.start()
    connection = one.connect()
    one.driver.put(0x70, 0)
    assert kernel.serving == [False, False]
    one.serve()
    assert (one.ended, connection.recv(1)) == (1, b"")
    connection.close()


def test_the_thread_of_the_devices(kernel: Kernel, guest: MakeGuest) -> None:
    """It leaves two queues to the kernel, serves the third, and calls for the connection."""
    one = guest()
    served: list[int] = []

    def serve(number: int, queue: object) -> bool:
        served.append(number)
        return False

    one.vsock.serve = serve  # type: ignore[method-assign]
    errors: list[BaseException] = []
    io = IoThread(errors.append, Gate())
    for number, fd in enumerate(one.wires.notify):
        io.add(fd, one.transport, number)
    io.watch(one.vsock.own_fd, one.vsock.own_ready)
    one.driver.start()
    io.start()
    connection = one.server.connect_from(one.vsock.cid)
    connection.sendall(b"ping")
    while one.got != b"ping":
        assert not errors
    one.vsock.send(b"pong")
    assert connection.recv(10) == b"pong"
    for fd in one.wires.notify:  # of the first two, nothing reads what is written now
        os.eventfd_write(fd, 1)
    while not served:
        assert not errors
    io.stop()
    io.close()
    assert served == [EVENTS]
    values = []
    for fd in one.wires.notify[:2]:
        values.append(os.eventfd_read(fd))
    assert all(values)
    connection.close()


def test_the_binding(kernel: Kernel) -> None:
    with VhostVsock("/dev/vhost-vsock") as device:
        device.set_owner()
        device.set_guest_cid(1 << 40)
        assert kernel.cids == [1 << 40]
        device.set_running(True)
        assert kernel.serving == [True, True]
        device.set_running(False)
        assert kernel.serving == [False, False]
        for cid in (-1, 1 << 64):
            with pytest.raises(ArgumentError, match="cid"):
                device.set_guest_cid(cid)
    path = VhostVsockPath(required=False)
    assert path.cid == kernel.cids[-1]
    assert path.stop() == []
    path.close()


# -- the connection --------------------------------------------------------------------------------


def test_who_may_connect(guest: MakeGuest) -> None:
    one = guest()
    cid = one.vsock.cid
    for address in ((cid, GUEST_PORT - 1), (cid, 5000), (cid ^ 1, GUEST_PORT), (1, GUEST_PORT)):
        stranger = one.server.connect_from(*address)
        stranger.sendall(b"not the agent")
        one.serve()
        with pytest.raises(ConnectionResetError):  # with bytes that were not read
            stranger.recv(1)
        stranger.close()
    connection = one.connect()
    assert one.server.fileno() == -1, "no other connection can be made"
    with pytest.raises(ConnectionRefusedError):
        one.connect()
    connection.sendall(b"the agent")
    one.serve()
    assert (bytes(one.got), one.ended) == (b"the agent", 0)
    connection.close()
    one.serve()
    assert one.ended == 1
    assert not one.ready()


def test_both_ways(guest: MakeGuest) -> None:
    """Byte for byte, in both directions at a time, more than the sockets hold."""
    data = random.Random(8).randbytes(8 * MIB)
    one = guest()
    sizes = []
    for at in range(0, len(data), 77_777):  # before there is a connection, too
        one.vsock.send(data[at : at + 77_777])
        sizes.append(at)
    assert len(sizes) > 100
    connection = one.server.connect_from(one.vsock.cid)
    back = bytearray()

    def peer() -> None:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        while len(back) < len(data):
            back.extend(connection.recv(MIB))
        sender.join()

    thread = threading.Thread(target=peer)
    thread.start()
    poll = select.poll()
    poll.register(one.vsock.own_fd, select.POLLIN)
    while len(one.got) < len(data) or thread.is_alive():
        if poll.poll(20):
            one.vsock.own_ready()
    assert one.got == data
    assert back == data
    assert not one.ready(), "it does not wait for room any more"
    connection.close()


def test_a_peer_that_does_not_read(guest: MakeGuest) -> None:
    """What is to be sent waits; the thread of the devices does not."""
    one = guest()
    connection = one.connect()
    for _ in range(64):
        one.vsock.send(bytes(MIB))
    one.serve()
    assert not one.ready()
    connection.sendall(b"still alive")
    one.serve()
    assert one.got == b"still alive"
    taken = 0
    while taken < 32 * MIB:  # it goes on as soon as there is room
        taken += len(connection.recv(MIB))
        one.serve()
    connection.close()
    one.serve()
    assert one.ended == 1
    assert not one.vsock._listener._outgoing, "no data is kept without a connection"
    one.vsock.send(b"late")
    assert not one.ready()


def test_a_connection_that_is_stopped(guest: MakeGuest) -> None:
    one = guest()
    connection = one.connect()
    one.vsock.stop()
    assert connection.fileno() >= 0
    one.serve()
    assert (one.ended, connection.recv(1)) == (1, b"")
    connection.close()


def test_a_listener_that_is_stopped(guest: MakeGuest) -> None:
    one = guest()
    waits = one.server.connect_from(one.vsock.cid)
    one.vsock.stop()
    one.serve()
    assert one.server.fileno() == -1
    assert one.ended == 0, "it was not accepted"
    with pytest.raises(ConnectionResetError):
        waits.recv(1)
    waits.close()


def test_a_forked_process_keeps_nothing_open(guest: MakeGuest) -> None:
    """A process that was forked has the sockets, too; for this one they end all the same."""
    one = guest()
    connection = one.connect()
    kept = os.dup(one.vsock._listener._connection.fileno())  # type: ignore[union-attr]
    connection.shutdown(socket.SHUT_WR)
    one.serve()
    assert one.ended == 1
    assert not one.ready(), "the descriptor that is open elsewhere is not looked at any more"
    os.close(kept)
    connection.close()


def test_close(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fds()
    for connects in (False, True):
        server = Server()
        monkeypatch.setattr(vsock, "_listen", lambda server=server: server)
        one = Guest(server)
        one.driver.start()
        if connects:
            with one.connect():
                one.close()
        else:
            one.close()
        one.vsock.close()
        one.vsock.send(b"late")
        one.vsock.stop()
        assert kernel.serving == [False, False]
        assert one.ended == 0, "the end of the machine is not reported as the connection's"
        del one
        assert fds() == before


def test_a_listener_that_can_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fds()

    def full() -> select.epoll:
        raise OSError(errno.EMFILE, "Too many open files")

    server = Server()
    monkeypatch.setattr(select, "epoll", full)
    with pytest.raises(OSError, match="Too many open files"):
        Listener(server, (3, GUEST_PORT), lambda data: None)
    assert fds() == before
