"""Data paths in the kernel, of a network card, with a vhost that is simulated."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpriv import ArgumentError, uapi
from kvmpriv.fd import Fd
from kvmpriv.guest.linux import vhost
from kvmpriv.guest.linux.net import Net
from kvmpriv.guest.linux.vhost import Vhost, VhostNet, VhostNetPath
from kvmpriv.guest.linux.virtio import (
    ACCESS_PLATFORM,
    EVENT_INDEX,
    INDIRECT,
    VERSION_1,
    Wires,
)

from .test_linux_virtio import BASE, SIZE, Cable, Driver

F_MRG_RXBUF = 1 << 15
FEATURES = VERSION_1 | INDIRECT | EVENT_INDEX | F_MRG_RXBUF
FILES = ("kick", "call", "err", "backend")
#: The ioctls until the card exists, and those that start its data path.
OPENING = ("VHOST_SET_OWNER", "VHOST_GET_FEATURES")
STARTING = (
    "VHOST_SET_FEATURES",
    "VHOST_SET_MEM_TABLE",
    "VHOST_SET_VRING_NUM",
    "VHOST_SET_VRING_BASE",
    "VHOST_SET_VRING_ADDR",
    "VHOST_SET_VRING_CALL",
    "VHOST_SET_VRING_ERR",
    "VHOST_SET_VRING_KICK",
    "VHOST_NET_SET_BACKEND",
)


class Kernel:
    """What a simulated vhost knows; it refuses an ioctl for the ring `fails_at` and above."""

    def __init__(self) -> None:
        self.fails = ""
        self.fails_at = 0
        self.features = FEATURES | ACCESS_PLATFORM
        self.accepted = -1
        self.regions: list[tuple[int, int, int]] = []
        self.rings: list[dict[str, int]] = [{}, {}]
        self.calls: list[str] = []
        self.opened: list[Vhost] = []
        self.cids: list[int] = []  # that were asked for
        self.cids_taken = 0  # how many of them another guest has

    def open(self, device: Vhost, path: str) -> None:
        Fd.__init__(device, os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        self.opened.append(device)

    def ioctl(self, device: Vhost, request: int, argument: Any = 0) -> int:
        assert not device.closed
        Fd._address(request, argument)  # the size is that of the request
        name = uapi.vhost.REQUESTS[request]
        self.calls.append(name)
        stops = name == "VHOST_VSOCK_SET_RUNNING" and not argument[0]
        taken_back = stops or getattr(argument, "fd", 0) == -1
        if name == self.fails and getattr(argument, "index", 1) >= self.fails_at and not taken_back:
            raise OSError(errno.EPERM, f"{name}: Operation not permitted")
        if name == "VHOST_GET_FEATURES":
            argument[0] = self.features
        elif name == "VHOST_SET_FEATURES":
            self.accepted = argument[0]
        elif name == "VHOST_SET_MEM_TABLE":
            entries = [argument.regions[n] for n in range(argument.nregions)]
            self.regions = [
                (each.guest_phys_addr, each.memory_size, each.userspace_addr) for each in entries
            ]
        elif name == "VHOST_VSOCK_SET_GUEST_CID":
            self.cids.append(argument[0])
            if len(self.cids) <= self.cids_taken:
                raise OSError(errno.EADDRINUSE, f"{name}: Address already in use")
        elif name == "VHOST_VSOCK_SET_RUNNING":
            for ring in self.rings:
                ring["backend"] = argument[0] - 1
        elif name == "VHOST_GET_VRING_BASE":
            assert self.rings[argument.index]["backend"] == -1, "it is to be stopped first"
            argument.num = self.rings[argument.index]["base"]
        elif name.startswith("VHOST_SET_VRING_ADDR"):
            ring = self.rings[argument.index]
            for field in ("desc_user_addr", "avail_user_addr", "used_user_addr"):
                ring[field] = getattr(argument, field)
        elif name != "VHOST_SET_OWNER":
            value = argument.fd if hasattr(argument, "fd") else argument.num
            self.rings[argument.index][name.rpartition("_")[2].lower()] = value
        return 0

    @property
    def serving(self) -> list[bool]:
        return [ring.get("backend", -1) >= 0 for ring in self.rings]

    def checks_rings(self, driver: Driver, wires: Wires) -> None:
        """The kernel knows the guest's memory and the driver's rings, and was notified of each."""
        start = driver.host.userspace_addr
        assert self.regions == [(BASE, SIZE, start)], "what is private is not in the table"
        assert len(self.rings) == 2
        for number, ring in enumerate(self.rings):
            places = [address - BASE + start for address in driver.rings(number)]
            fields = ("desc_user_addr", "avail_user_addr", "used_user_addr")
            assert [ring[field] for field in fields] == places
            assert (ring["num"], ring["base"]) == (8, 0)
            assert (ring["kick"], ring["call"]) == (wires.notify[number], wires.interrupt)
            assert ring["err"] == driver.transport.host_fd()
            assert os.eventfd_read(ring["kick"]) == 1, "for requests that are there already"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """vhost is simulated, and every descriptor is a tap's."""
    made = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)

    def open_(device: Vhost, path: str) -> None:
        made.open(device, path)

    def ioctl(device: Vhost, request: int, argument: Any = 0) -> int:
        return made.ioctl(device, request, argument)

    monkeypatch.setattr(Vhost, "__init__", open_)
    monkeypatch.setattr(Vhost, "ioctl", ioctl)
    return made


class Card:
    """A card over a cable, with its driver and the eventfds of its machine."""

    def __init__(self, vhost: bool | None = None, features: int = FEATURES, **more: Any) -> None:
        self.cable = Cable()
        self.words: list[str] = []
        self.changes = 0
        self.wires = Wires(os.eventfd(0, os.EFD_NONBLOCK), [os.eventfd(0) for _ in range(2)])
        self.net = Net(self.cable, self.words.append, vhost=vhost)
        self.driver = Driver(self.net, wires=self.wires, changed=self._changed, **more)
        self.transport = self.driver.transport
        self.accepts = features
        assert self.driver.negotiate(features)

    def _changed(self) -> None:
        self.changes += 1

    def start(self) -> None:
        self.driver.start()

    def sends(self, text: bytes) -> bytes:
        """Offer a packet; what came out of the cable."""
        at = BASE + 0x8000
        self.driver.memory.write(at, b"h" * 12 + text)
        self.driver.describe(1, 3, at, 12 + len(text), 0, 0)
        self.driver.offer(1, 3)
        self.cable.theirs.setblocking(False)
        try:
            return self.cable.theirs.recv(100)[12:]
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.transport.close()
        self.net.close()
        for fd in (self.wires.interrupt, *self.wires.notify):
            os.close(fd)


@pytest.fixture
def card(kernel: Kernel) -> Iterator[Callable[..., Card]]:
    made: list[Card] = []

    def make(*arguments: Any, **options: Any) -> Card:
        made.append(Card(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


MakeCard = Callable[..., Card]


def test_the_kernel_serves_the_rings(kernel: Kernel, card: MakeCard) -> None:
    one = card(features=FEATURES | ACCESS_PLATFORM, access_platform=True)
    driver = one.driver
    assert one.net.name == "virtio-net (vhost)"
    assert kernel.serving == [False, False]
    assert driver.get(0x60) == 0
    one.start()
    assert kernel.serving == [True, True]
    assert kernel.accepted == FEATURES, "the kernel is not to translate addresses"
    kernel.checks_rings(driver, one.wires)
    assert [ring["backend"] for ring in kernel.rings] == [one.cable.fileno()] * 2
    assert one.transport.engaged
    assert one.words == driver.words == []
    # The kernel interrupts, and this process does not know when.
    assert driver.get(0x60) == 1
    driver.put(0x64, 1)
    assert driver.get(0x60) == 1
    assert one.sends(b"packet") == b"", "the card itself leaves the rings alone"
    assert driver.used(1) == []


def test_a_driver_that_starts_again(kernel: Kernel, card: MakeCard) -> None:
    one = card()
    one.start()
    kernel.rings[0]["base"] = kernel.rings[1]["base"] = 5
    one.driver.put(0x70, 0)
    assert kernel.serving == [False, False]
    assert kernel.calls.count("VHOST_GET_VRING_BASE") == 2
    for ring in kernel.rings:
        assert [ring[name] for name in FILES] == [-1] * 4
    assert one.changes == 1
    assert not one.transport.engaged
    assert one.driver.get(0x60) == 0
    assert one.transport.host_fd() == -1
    assert one.driver.negotiate(FEATURES)
    one.driver.start()
    assert kernel.serving == [True, True]
    assert [ring["base"] for ring in kernel.rings] == [0, 0], "new rings"
    assert kernel.calls.count("VHOST_SET_OWNER") == 1


def test_a_pause(kernel: Kernel, card: MakeCard) -> None:
    one = card()
    one.transport.pause()
    one.transport.resume()  # before the driver has started
    assert kernel.serving == [False, False]
    one.start()
    kernel.rings[0]["base"], kernel.rings[1]["base"] = 3, 0xFFFF
    one.transport.pause()
    assert kernel.serving == [False, False]
    one.transport.pause()
    assert one.driver.interrupts == 0
    one.transport.resume()
    assert kernel.serving == [True, True]
    assert [ring["base"] for ring in kernel.rings] == [3, 0xFFFF]
    assert one.transport.engaged
    one.transport.resume()
    assert kernel.calls.count("VHOST_NET_SET_BACKEND") == 6


@pytest.mark.parametrize("fails", OPENING)
def test_a_kernel_that_refuses_from_the_start(kernel: Kernel, card: MakeCard, fails: str) -> None:
    kernel.fails = fails
    one = card()
    (words,) = one.words
    assert words == (
        f"virtio-net: /dev/vhost-net can't be used: {fails}: Operation not permitted; this process"
        " serves the card's queues"
    )
    assert all(device.closed for device in kernel.opened)
    one.start()
    assert one.net.name == "virtio-net"
    assert one.sends(b"packet") == b"packet"
    with pytest.raises(OSError, match=f"/dev/vhost-net can't be used: {fails}") as error:
        Net(one.cable, vhost=True)
    assert error.value.errno == errno.EPERM
    assert all(device.closed for device in kernel.opened)


def test_a_kernel_without_a_feature(kernel: Kernel, card: MakeCard) -> None:
    kernel.features &= ~F_MRG_RXBUF
    one = card()
    assert "".join(one.words) == (
        "virtio-net: /dev/vhost-net can't be used: it does not support the features 0x8000; this"
        " process serves the card's queues"
    )
    assert all(device.closed for device in kernel.opened)


def test_a_host_without_vhost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    absent = str(tmp_path / "vhost-net")
    monkeypatch.setattr(vhost.VhostNetPath.__init__, "__kwdefaults__", {"device": absent})
    cable = Cable()
    words: list[str] = []
    before = os.listdir("/proc/self/fd")
    assert Net(cable, words.append).data_path is None
    assert "".join(words) == (
        "virtio-net: /dev/vhost-net can't be used: No such file or directory; this process serves"
        " the card's queues"
    )
    assert Net(cable, words.append, vhost=False).data_path is None
    assert len(words) == 1, "nothing was tried"
    with pytest.raises(FileNotFoundError, match="/dev/vhost-net can't be used"):
        Net(cable, vhost=True)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    cable.close()


def test_a_cable_that_is_no_tap() -> None:
    cable = Cable()
    words: list[str] = []
    assert Net(cable, words.append).data_path is None
    assert words == []
    with pytest.raises(ArgumentError, match="vhost needs a tap"):
        Net(cable, vhost=True)
    cable.close()


@pytest.mark.parametrize("ring", [0, 1])
@pytest.mark.parametrize("fails", STARTING)
def test_a_kernel_that_refuses_in_the_middle(
    kernel: Kernel, card: MakeCard, fails: str, ring: int
) -> None:
    """Whatever it has been told until then is taken back, and the card serves its rings."""
    one = card()
    kernel.fails, kernel.fails_at = fails, ring
    before = len(os.listdir("/proc/self/fd"))
    one.start()
    assert "".join(one.driver.words) == (
        f"virtio-net (vhost): vhost can't be used: {fails}: Operation not permitted; this process"
        " serves its queues"
    )
    assert kernel.serving == [False, False]
    for each in kernel.rings:
        assert {each.get(name, -1) for name in FILES} == {-1}
    assert not one.transport.engaged
    assert one.driver.get(0x60) == 0
    assert one.sends(b"packet") == b"packet"
    assert one.driver.used(1) == [(3, 0)]
    assert len(os.listdir("/proc/self/fd")) == before
    # The driver starts again when the kernel is willing.
    kernel.fails = ""
    one.driver.put(0x70, 0)
    assert one.driver.negotiate(FEATURES)
    one.driver.start()
    assert one.transport.engaged


@pytest.mark.parametrize("fails", STARTING)
def test_a_card_that_must_not_serve_its_rings(kernel: Kernel, card: MakeCard, fails: str) -> None:
    one = card(vhost=True)
    kernel.fails = fails
    with pytest.raises(OSError, match=f"{fails}: Operation not permitted"):
        one.start()
    assert kernel.serving == [False, False]


def test_a_kernel_that_refuses_after_a_pause(kernel: Kernel, card: MakeCard) -> None:
    """The card goes on where the kernel has stopped, with what the driver has offered since."""
    one = card()
    one.start()
    for head in (0, 1):  # the kernel serves two requests
        one.driver.describe(1, head, BASE, 12, 0, 0)
        one.driver.offer(1, head)
    used = one.driver.rings(1)[2]
    one.driver.memory.write(used + 2, b"\2\0")
    kernel.rings[1]["base"] = 2
    assert one.sends(b"waits") == b""
    one.transport.pause()
    kernel.fails = "VHOST_NET_SET_BACKEND"
    one.transport.resume()
    assert not one.transport.engaged
    assert "vhost can't be used" in one.driver.words[0]
    assert one.cable.theirs.recv(100) == b"h" * 12 + b"waits"
    assert one.driver.used(1)[2:] == [(3, 0)]
    assert one.sends(b"more") == b"more"


def test_a_kernel_that_does_not_give_the_base_back(kernel: Kernel, card: MakeCard) -> None:
    """It has returned what it has taken: the used ring's index is the base then."""
    one = card()
    one.start()
    one.driver.memory.write(one.driver.rings(1)[2] + 2, b"\7\0")
    kernel.fails = "VHOST_GET_VRING_BASE"
    one.transport.pause()
    kernel.fails = ""
    one.transport.resume()
    assert [ring["base"] for ring in kernel.rings] == [0, 7]


def test_a_driver_that_breaks_the_rules(kernel: Kernel, card: MakeCard) -> None:
    one = card()
    one.start()
    os.eventfd_write(one.transport.host_fd(), 1)
    one.transport.host_ready()
    assert one.driver.stopped
    assert "".join(one.driver.words) == (
        "virtio-net (vhost) stopped: the guest broke the rules of a ring, as vhost found"
    )
    assert kernel.serving == [False, False]
    assert one.driver.get(0x60) == 2, "the configuration has changed"
    assert one.transport.host_fd() == -1
    one.driver.put(0x70, 0)
    assert one.driver.negotiate(FEATURES)
    one.driver.start()
    assert one.transport.engaged
    assert not one.driver.stopped


def test_a_driver_that_takes_a_queue_away(kernel: Kernel, card: MakeCard) -> None:
    one = card()
    one.start()
    one.driver.put(0x30, 0)
    one.driver.put(0x44, 0)
    assert kernel.serving == [False, False]
    assert one.sends(b"packet") == b"packet", "of the other queue"


def test_a_driver_with_one_queue(kernel: Kernel, card: MakeCard) -> None:
    one = card()
    one.driver.indices = [0]
    one.start()
    assert kernel.serving == [False, False]
    assert "".join(one.driver.words) == (
        "virtio-net (vhost): vhost can't be used: the driver has not set up all queues; this"
        " process serves its queues"
    )


def is_mapped(address: int) -> bool:
    """Whether this process has memory there: a mapping may be one with its neighbours in maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(number, 16) for number in line.split()[0].split("-"))
        if low <= address < high:
            return True
    return False


def test_close_lets_go_of_the_memory(kernel: Kernel) -> None:
    """The kernel is stopped before the memory goes, and nothing else holds it."""
    one = Card()
    one.start()
    address = one.driver.host.userspace_addr
    assert is_mapped(address)
    one.transport.close()
    assert kernel.serving == [False, False]
    assert kernel.calls[-1] != "VHOST_NET_SET_BACKEND"
    one.driver.host.close()
    assert not is_mapped(address)
    one.transport.serve(1)
    one.close()
    assert all(device.closed for device in kernel.opened)


def test_the_binding(kernel: Kernel) -> None:
    with VhostNet("/dev/vhost-net") as device:
        device.set_owner()
        assert device.get_features() == FEATURES | ACCESS_PLATFORM
        device.set_features(FEATURES)
        device.set_mem_table([(0, 4096, 1 << 20), (1 << 32, 8192, 1 << 40)])
        assert kernel.regions == [(0, 4096, 1 << 20), (1 << 32, 8192, 1 << 40)]
        device.set_vring_num(1, 256)
        device.set_vring_base(1, 7)
        device.set_vring_addr(1, 16, 32, 48)
        device.set_vring_kick(1, 3)
        device.set_vring_call(1, 4)
        device.set_vring_err(1, 5)
        device.set_backend(1, -1)
        assert device.get_vring_base(1) == 7
        assert kernel.rings[1] == {
            "num": 256,
            "base": 7,
            "desc_user_addr": 16,
            "avail_user_addr": 32,
            "used_user_addr": 48,
            "kick": 3,
            "call": 4,
            "err": 5,
            "backend": -1,
        }
        with pytest.raises(ArgumentError, match="num"):
            device.set_vring_num(0, 1 << 32)
    path = VhostNetPath(1, F_MRG_RXBUF, required=False)
    assert path.stop() == []
    path.close()
