"""A network for a Linux guest: virtio-net over a tap, in a network namespace of its own.

VIRTIO 1.2, 5.1; Documentation/networking/tuntap.rst of the kernel.
"""

from __future__ import annotations

import errno as _errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .virtio import Chain, Queue, RingError, VirtioDevice

__all__ = ["GUEST_ADDRESS", "HOST_ADDRESS", "PREFIX_LENGTH", "Net", "Tap"]

#: The two ends of a network of its own.
HOST_ADDRESS, GUEST_ADDRESS, PREFIX_LENGTH = "10.88.0.1", "10.88.0.2", 24
_NAME = "kvmpriv-{pid}-{started}"
_NAMESPACES = Path("/run/netns")
# <linux/if_tun.h>
_TUNSETIFF, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_HEADER_SIZE = 12  # struct virtio_net_hdr with num_buffers
_F_MAC = 1 << 5
_MAC = bytes((0x02, 0x6B, 0x76, 0x6D, 0x00, 0x01))  # locally administered
_PACKETS_AT_ONCE = 64


def _started(pid: int) -> str:
    """When a process has started: with its number, one of a kind until the host starts anew."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def remove_stale() -> list[str]:
    """Remove the namespaces of processes that were killed; returns their names."""
    from pyroute2 import netns

    removed = []
    for path in _NAMESPACES.glob(_NAME.format(pid="*", started="*")):
        _, pid, started = path.name.split("-", 2)
        alive = False
        with suppress(OSError, ValueError):
            alive = _started(int(pid)) == started.partition("-")[0]
        if not alive:
            with suppress(OSError):
                netns.remove(path.name)
                removed.append(path.name)
    return removed


class Tap:
    """A tap, gone when it is closed, or this process is.

    Without `bridge` it is in a new network namespace, named `namespace`, with HOST_ADDRESS; with
    it, it is a port of that bridge.  PermissionError says what the process may not do; OSError
    otherwise (ENODEV: no such bridge).
    """

    def __init__(self, bridge: str | None = None) -> None:
        self.bridge = bridge
        self.namespace: str | None = None
        self._fd = -1
        failure: list[BaseException] = []

        def make() -> None:
            try:
                self._make()
            except BaseException as error:  # noqa: BLE001  # raised below
                failure.append(error)

        # A thread of its own: the namespace it enters is its own, too.
        thread = threading.Thread(target=make, name="kvmpriv-tap")
        thread.start()
        thread.join()
        if failure:
            self.close()
            raise self._explained(failure[0])

    def _explained(self, error: BaseException) -> BaseException:
        number = getattr(error, "errno", None) or getattr(error, "code", None)
        if number in (_errno.EPERM, _errno.EACCES):
            needed = "CAP_NET_ADMIN" + ("" if self.bridge else " and CAP_SYS_ADMIN")
            return PermissionError(number, f"a network needs {needed} (root has them)")
        if isinstance(error, OSError):
            return error
        if isinstance(number, int) and number > 0:  # netlink's own kind of error
            return OSError(number, f"the network: {os.strerror(number)}")
        return error

    def _make(self) -> None:
        from pyroute2 import IPRoute, netns

        if self.bridge is None:
            remove_stale()
            me = os.getpid()
            base = _NAME.format(pid=me, started=_started(me))
            name = next(
                name
                for name in (f"{base}-{number}" for number in range(1 << 16))
                if not (_NAMESPACES / name).exists()
            )
            netns.create(name)
            self.namespace = name
            netns.setns(name)
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        request = fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", b"kvmpriv%d", flags))
        fcntl.ioctl(self._fd, _TUNSETVNETHDRSZ, struct.pack("i", _HEADER_SIZE))
        #: The interface's name.
        self.name = request[:16].rstrip(b"\0").decode()
        with IPRoute() as route:
            self._set_up(route, route.link_lookup(ifname=self.name)[0])

    def _set_up(self, route: Any, index: int) -> None:
        if self.bridge is None:
            route.addr("add", index=index, address=HOST_ADDRESS, prefixlen=PREFIX_LENGTH)
            route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
        else:
            bridges = route.link_lookup(ifname=self.bridge)
            if not bridges:
                raise OSError(_errno.ENODEV, f"there is no bridge {self.bridge}")
            route.link("set", index=index, master=bridges[0])
        route.link("set", index=index, state="up")

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Remove the tap, and its namespace."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        name, self.namespace = self.namespace, None
        if name is not None:
            from pyroute2 import netns

            with suppress(OSError):
                netns.remove(name)

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Net(VirtioDevice):
    """A network card whose cable ends in `tap`.

    `complain` is told when the tap is gone; the guest then has a card without a cable.
    """

    device_id = 1
    name = "virtio-net"
    features = _F_MAC
    queue_count = 2
    config = _MAC.ljust(64, b"\0")
    _RECEIVE = 0

    def __init__(self, tap: Tap, complain: Callable[[str], object] = lambda text: None) -> None:
        self._tap = tap
        self._complain = complain
        self._gone = False
        self._listening = False
        self._kept: Chain | None = None  # room for a packet that has not come yet

    def host_fd(self) -> int:
        """What to wait for before queue 0 is served; -1 when there is no room for a packet."""
        return self._tap.fileno() if self._listening and not self._gone else -1

    def reset(self) -> None:
        self._listening = False
        self._kept = None

    def serve(self, number: int, queue: Queue) -> bool:
        if self._gone:
            return False
        try:
            return self._receive(queue) if number == self._RECEIVE else self._send(queue)
        except OSError as error:
            self._gone = True
            self._complain(f"{self.name}: the tap is gone: {os.strerror(error.errno or 0)}")
            return False

    def _receive(self, queue: Queue) -> bool:
        done = False
        for _ in range(_PACKETS_AT_ONCE):
            chain = self._room(queue)
            self._listening = chain is not None
            if chain is None:
                return done
            if sum(map(len, chain.writable)) < _HEADER_SIZE or chain.readable:
                raise RingError("a place for a packet that holds none")
            try:
                size = os.readv(self._tap.fileno(), chain.writable)
            except BlockingIOError:
                self._kept = chain
                return done
            _write_at(chain.writable, _HEADER_SIZE - 2, b"\1\0")  # it is in one piece (5.1.6.4)
            queue.push(chain, size)
            done = True
        return done

    def _room(self, queue: Queue) -> Chain | None:
        kept, self._kept = self._kept, None
        return kept if kept is not None else queue.pop()

    def _send(self, queue: Queue) -> bool:
        done = False
        while (chain := queue.pop()) is not None:
            if sum(map(len, chain.readable)) < _HEADER_SIZE:
                raise RingError("a packet that is shorter than its header")
            # What the tap can't take is lost, as on a cable (EINVAL: a header that says nonsense).
            with suppress(BlockingIOError, InterruptedError):
                try:
                    os.writev(self._tap.fileno(), chain.readable)
                except OSError as error:
                    if error.errno not in (_errno.EINVAL, _errno.EIO, _errno.ENOBUFS):
                        raise
            queue.push(chain, 0)
            done = True
        return done

    def close(self) -> None:
        self._tap.close()


def _write_at(parts: list[memoryview], at: int, data: bytes) -> None:
    """Put `data` behind the first `at` bytes of what the parts are together."""
    for part in parts:
        if at >= len(part):
            at -= len(part)
            continue
        piece = data[: len(part) - at]
        part[at : at + len(piece)] = piece
        data, at = data[len(piece) :], 0
        if not data:
            return
