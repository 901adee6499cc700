"""A network card for a Linux guest: virtio-net over a tap (VIRTIO 1.2, 5.1)."""

from __future__ import annotations

import errno as _errno
import fcntl
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ...errors import ArgumentError
from .tap import HEADER_SIZE
from .vhost import NET_DEVICE, VhostNetPath
from .virtio import EVENT_INDEX, INDIRECT, Chain, DataPath, Queue, RingError, VirtioDevice

__all__ = ["Cable", "Net", "parse_mac"]

_F_CSUM, _F_MAC, _F_HOST_TSO4, _F_HOST_TSO6 = 1 << 0, 1 << 5, 1 << 11, 1 << 12
_F_GUEST_CSUM, _F_GUEST_TSO4, _F_GUEST_TSO6, _F_MRG_RXBUF = 1 << 1, 1 << 7, 1 << 8, 1 << 15
#: Feature -> what the host's kernel then leaves to the guest (TUN_F_*, <linux/if_tun.h>).
_OFFLOADS = {_F_GUEST_CSUM: 1, _F_GUEST_TSO4: 2, _F_GUEST_TSO6: 4}
_TUNSETOFFLOAD = 0x400454D0
# The largest packets, with their header: of a large MTU, and one that is to be divided.
_SMALL_MAX, _LARGE_MAX = HEADER_SIZE + 9216, HEADER_SIZE + 18 + 65535
_PARTS_MAX = os.sysconf("SC_IOV_MAX")
_PACKETS_AT_ONCE = 64
_MAC_SIZE, _MULTICAST, _LOCAL = 6, 0x01, 0x02


class Cable(Protocol):
    """What a card sends packets to and receives them from: a `Tap`, or another open file.

    A read returns one packet, a write sends one.  Each begins with struct virtio_net_hdr with
    num_buffers: 12 bytes, as TUNSETVNETHDRSZ sets it.  The descriptor does not block.
    """

    def fileno(self) -> int:
        """The descriptor."""
        ...

    def close(self) -> object:
        """Close it; the card calls this when its machine is closed."""
        ...


class _Borrowed:
    """A descriptor that stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        pass


def parse_mac(text: str) -> bytes:
    """``52:54:00:12:34:56`` as 6 bytes.  ArgumentError for anything else."""
    parts = text.split(":")
    with suppress(ValueError):
        if len(parts) == _MAC_SIZE and all(len(part) == 2 for part in parts):
            return _checked(bytes(int(part, 16) for part in parts))
    raise ArgumentError(
        f"{text!r} is not the MAC address of a card: write six bytes such as 52:54:00:12:34:56,"
        " the first of them even, not all of them 0"
    )


def _checked(mac: bytes) -> bytes:
    if len(mac) != _MAC_SIZE or mac[0] & _MULTICAST or not any(mac):
        raise ArgumentError(
            f"{mac.hex(':') or 'nothing'} is not the MAC address of a card: it has 6 bytes, the"
            " first of them even, not all of them 0"
        )
    return mac


def _random_mac() -> bytes:
    """A locally administered address.  Two guests have the same one by a chance of 1 in 2^46."""
    first, *rest = os.urandom(_MAC_SIZE)
    return bytes((first & ~_MULTICAST | _LOCAL, *rest))


class Net(VirtioDevice):
    """A network card.

    `cable` is a descriptor, which stays the caller's, or an object such as a `Tap`, which the card
    closes.  `mac` is the card's MAC address, 6 bytes; a random one if it is None.  `complain` is
    called with a line of text when the other end is gone; the guest then has a card without a
    cable.

    Over a tap the host's kernel leaves checksums and the division into packets to the guest's, and
    the other way round.

    `vhost`: whether the host's kernel moves the packets (/dev/vhost-net), instead of this process.
    None: if it can; otherwise `complain` is called with the reason.  True: it must, or the
    constructor or `LinuxMachine.run` raises an OSError.  False: never.  ArgumentError for True over
    what is not a tap.
    """

    device_id = 1
    name: str = "virtio-net"
    # The guest may leave checksums and the division into packets to the host's kernel: everything
    # that the guest sends costs an exit and a system call, and so there are fewer of them.
    _ALWAYS = _F_CSUM | _F_MAC | _F_HOST_TSO4 | _F_HOST_TSO6 | _F_MRG_RXBUF | INDIRECT | EVENT_INDEX
    queue_count = 2
    bounced = 3 << 20  # a page for each entry of both rings, and a few pieces of 64 KiB
    _RECEIVE = 0

    def __init__(
        self,
        cable: Cable | int,
        complain: Callable[[str], object] = lambda text: None,
        *,
        mac: bytes | None = None,
        vhost: bool | None = None,
    ) -> None:
        #: The card's MAC address.
        self.mac: bytes = _random_mac() if mac is None else _checked(mac)
        self.config: bytes = self.mac.ljust(64, b"\0")
        self._cable = _Borrowed(cable) if isinstance(cable, int) else cable
        self._complain = complain
        self._is_tap = self._offload(0)
        self.features: int = self._ALWAYS | (sum(_OFFLOADS) if self._is_tap else 0)
        self._gone = False
        self._vhost: VhostNetPath | None = self._open_vhost(vhost)
        self.data_path: DataPath | None = self._vhost
        if self._vhost is not None:
            self.name = f"{self.name} (vhost)"
        self._forget()

    def _open_vhost(self, wanted: bool | None) -> VhostNetPath | None:
        if wanted and not self._is_tap:
            raise ArgumentError("vhost needs a tap, and the card's cable is another file")
        if wanted is False or not self._is_tap:
            return None
        try:
            return VhostNetPath(self._cable.fileno(), _F_MRG_RXBUF, required=bool(wanted))
        except OSError as error:
            why = f"{NET_DEVICE} can't be used: {error.strerror or error}"
            if wanted:
                raise OSError(error.errno, why) from error
            self._complain(f"{self.name}: {why}; this process serves the card's queues")
            return None

    def _forget(self) -> None:
        self._listening = False
        self._merges = False
        self._size_max = _SMALL_MAX  # of the packets that may come
        self._buffers: deque[Chain] = deque()  # for the next packets
        self._room = 0  # in them
        self._packet: bytes | None = None  # one for which there was no room

    def _offload(self, flags: int) -> bool:
        """Choose what the host's kernel leaves to the guest; False if this is no tap."""
        try:
            fcntl.ioctl(self._cable.fileno(), _TUNSETOFFLOAD, flags)
        except (OSError, ValueError):
            return False
        return True

    def host_fd(self) -> int:
        """The descriptor, if the guest has a buffer for a packet; else -1."""
        return self._cable.fileno() if self._listening and not self._gone else -1

    def reset(self) -> None:
        self._forget()
        if self._is_tap:
            self._offload(0)

    def negotiated(self, accepted: int) -> None:
        self._merges = bool(accepted & _F_MRG_RXBUF)
        offloads = sum(flag for feature, flag in _OFFLOADS.items() if accepted & feature)
        if self._is_tap and offloads:
            self._offload(offloads)
            self._size_max = _LARGE_MAX

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
        """Give the driver packets: without merging each is in one chain, else in as many as needed.

        The size of a packet is known once it was read.  If there is no room for the largest, it is
        read into memory of ours first.
        """
        done = False
        for _ in range(_PACKETS_AT_ONCE):
            self._take_buffers(queue)
            self._listening = bool(self._buffers) and self._packet is None
            if not self._buffers:
                return done
            try:
                if self._packet is None and (not self._merges or self._room >= self._size_max):
                    size = os.readv(self._cable.fileno(), self._parts())
                else:
                    size = self._copy()
            except BlockingIOError:
                return done
            if not size:
                self._listening = False  # until the driver has offered more
                return done
            self._return(queue, size)
            done = True
        return done

    def _take_buffers(self, queue: Queue) -> None:
        """Take chains for the largest packet that may come, or all that there are."""
        while not self._buffers or (self._merges and self._room < self._size_max):
            chain = queue.pop()
            if chain is None:
                return
            room = sum(map(len, chain.writable))
            if room < HEADER_SIZE or chain.readable:
                raise RingError("offered a receive buffer smaller than the packet header")
            self._buffers.append(chain)
            self._room += room

    def _parts(self) -> list[memoryview]:
        """Where a packet goes."""
        if not self._merges:
            return self._buffers[0].writable
        parts = [part for chain in self._buffers for part in chain.writable]
        return parts[:_PARTS_MAX]

    def _copy(self) -> int:
        """Read a packet, or take that for which there was no room; 0 if there is still none."""
        packet = self._packet
        if packet is None:
            packet = os.read(self._cable.fileno(), self._size_max)
        if len(packet) > self._room:
            self._packet = packet
            return 0
        self._packet = None
        _write_at(self._parts(), 0, packet)
        return len(packet)

    def _return(self, queue: Queue, size: int) -> None:
        """Return the chains that a packet of `size` bytes is in."""
        used: list[tuple[Chain, int]] = []
        left = size
        while left or not used:
            chain = self._buffers.popleft()
            room = sum(map(len, chain.writable))
            self._room -= room
            used.append((chain, min(left, room)))
            left -= used[-1][1]
        count = len(used).to_bytes(2, "little")  # num_buffers (5.1.6.4)
        _write_at(used[0][0].writable, HEADER_SIZE - 2, count)
        queue.push_all(used)

    def _send(self, queue: Queue) -> bool:
        done = False
        while (chain := queue.pop()) is not None:
            if sum(map(len, chain.readable)) < HEADER_SIZE:
                raise RingError("sent a packet shorter than its header")
            # A packet that the tap does not take is lost, as on a cable (EINVAL: a bad header).
            with suppress(BlockingIOError, InterruptedError):
                try:
                    os.writev(self._cable.fileno(), chain.readable)
                except OSError as error:
                    if error.errno not in (_errno.EINVAL, _errno.EIO, _errno.ENOBUFS):
                        raise
            queue.push(chain, 0)
            done = True
        return done

    def close(self) -> None:
        self._forget()
        if self._vhost is not None:
            self._vhost.close()
        self._cable.close()


def _write_at(parts: list[memoryview], at: int, data: bytes) -> None:
    """Write `data` at the offset `at` of the parts, as if they were one piece."""
    for part in parts:
        if at >= len(part):
            at -= len(part)
            continue
        piece = data[: len(part) - at]
        part[at : at + len(piece)] = piece
        data, at = data[len(piece) :], 0
        if not data:
            return
