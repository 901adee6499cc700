"""Data paths of virtio devices in the host's kernel: /dev/vhost-net and /dev/vhost-vsock.

A thread of the kernel moves packets between the rings of a device in this process's memory and a
tap, or sockets of AF_VSOCK.  drivers/vhost/ and <linux/vhost.h> of the kernel.
"""

from __future__ import annotations

import errno as _errno
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress

from ...cdefs import vhost as vhost_h
from ...fd import Fd, check_range, new_struct, register_requests
from .layout import GuestMemory
from .virtio import EVENT_INDEX, INDIRECT, VERSION_1, Queue, Wires

__all__ = [
    "NET_DEVICE",
    "VSOCK_DEVICE",
    "Vhost",
    "VhostNet",
    "VhostNetPath",
    "VhostPath",
    "VhostVsock",
    "VhostVsockPath",
]

#: The device nodes.
NET_DEVICE, VSOCK_DEVICE = "/dev/vhost-net", "/dev/vhost-vsock"

_ffi = vhost_h.ffi
_FEATURES = _ffi.typeof("unsigned long long *")
_STATE = _ffi.typeof("struct vhost_vring_state *")
_FILE = _ffi.typeof("struct vhost_vring_file *")
_ADDRESSES = _ffi.typeof("struct vhost_vring_addr *")
_MEMORY = _ffi.typeof("struct vhost_memory *")
_INT = _ffi.typeof("int *")
_NO_FILE = -1
# CIDs that a guest may have, and how many of them to try.
_CID_MIN, _CID_END, _CID_TRIES = 3, 0xFFFFFFFF, 64

register_requests(vhost_h.REQUESTS)


class Vhost(Fd):
    """An open device node of vhost, of the kind of a subclass.

    The methods are the ioctls of <linux/vhost.h>; `index` is the number of a ring.  OSError with
    the errno that the ioctl fails with: EBUSY if the ring is in use, EPERM before `set_owner`,
    EFAULT for memory that this process does not have.
    """

    _what = "vhost device"

    def __init__(self, device: str) -> None:
        super().__init__(os.open(device, os.O_RDWR | os.O_CLOEXEC))

    def get_features(self) -> int:
        """VHOST_GET_FEATURES: the features of rings and packets that the kernel supports."""
        features = _ffi.new(_FEATURES)
        self.ioctl(vhost_h.VHOST_GET_FEATURES, features)
        return int(features[0])

    def set_features(self, features: int) -> None:
        """VHOST_SET_FEATURES: those that the driver has accepted."""
        self.ioctl(vhost_h.VHOST_SET_FEATURES, _ffi.new(_FEATURES, features))

    def set_owner(self) -> None:
        """VHOST_SET_OWNER: start the kernel's thread, which uses this process's memory."""
        self.ioctl(vhost_h.VHOST_SET_OWNER)

    def set_mem_table(self, regions: Sequence[tuple[int, int, int]]) -> None:
        """VHOST_SET_MEM_TABLE: the memory that rings and buffers may be in.

        For each region its guest physical address, its size in bytes and its address in this
        process.
        """
        table = _ffi.new(_MEMORY, (len(regions), 0, [(*region, 0) for region in regions]))
        self.ioctl(vhost_h.VHOST_SET_MEM_TABLE, table)

    def set_vring_num(self, index: int, size: int) -> None:
        """VHOST_SET_VRING_NUM: the number of entries."""
        self.ioctl(vhost_h.VHOST_SET_VRING_NUM, new_struct(_STATE, (index, size)))

    def set_vring_base(self, index: int, base: int) -> None:
        """VHOST_SET_VRING_BASE: the index of the available ring to begin at."""
        self.ioctl(vhost_h.VHOST_SET_VRING_BASE, new_struct(_STATE, (index, base)))

    def get_vring_base(self, index: int) -> int:
        """VHOST_GET_VRING_BASE: the index of the available ring that is next."""
        state = _ffi.new(_STATE, (index, 0))
        self.ioctl(vhost_h.VHOST_GET_VRING_BASE, state)
        return int(state.num)

    def set_vring_addr(self, index: int, descriptors: int, available: int, used: int) -> None:
        """VHOST_SET_VRING_ADDR: where this process has the parts of the ring."""
        fields = (index, 0, descriptors, used, available, 0)
        self.ioctl(vhost_h.VHOST_SET_VRING_ADDR, new_struct(_ADDRESSES, fields))

    def set_vring_kick(self, index: int, eventfd: int) -> None:
        """VHOST_SET_VRING_KICK: the eventfd by which the driver notifies; -1: none."""
        self.ioctl(vhost_h.VHOST_SET_VRING_KICK, new_struct(_FILE, (index, eventfd)))

    def set_vring_call(self, index: int, eventfd: int) -> None:
        """VHOST_SET_VRING_CALL: the eventfd by which the driver is interrupted; -1: none."""
        self.ioctl(vhost_h.VHOST_SET_VRING_CALL, new_struct(_FILE, (index, eventfd)))

    def set_vring_err(self, index: int, eventfd: int) -> None:
        """VHOST_SET_VRING_ERR: the eventfd for errors of the ring; -1: none."""
        self.ioctl(vhost_h.VHOST_SET_VRING_ERR, new_struct(_FILE, (index, eventfd)))


class VhostNet(Vhost):
    """An open /dev/vhost-net."""

    _what = "vhost-net device"

    def __init__(self, device: str = NET_DEVICE) -> None:
        super().__init__(device)

    def set_backend(self, index: int, tap: int) -> None:
        """VHOST_NET_SET_BACKEND: serve the ring with packets of `tap`; -1: serve it no more."""
        self.ioctl(vhost_h.VHOST_NET_SET_BACKEND, new_struct(_FILE, (index, tap)))


class VhostVsock(Vhost):
    """An open /dev/vhost-vsock."""

    _what = "vhost-vsock device"

    def __init__(self, device: str = VSOCK_DEVICE) -> None:
        super().__init__(device)

    def set_guest_cid(self, cid: int) -> None:
        """VHOST_VSOCK_SET_GUEST_CID: the guest's address, 3 to 0xfffffffe.

        EADDRINUSE if another guest of the host has it, or the host itself; EINVAL for another
        number.
        """
        check_range("cid", cid, 1 << 64)
        self.ioctl(vhost_h.VHOST_VSOCK_SET_GUEST_CID, _ffi.new(_FEATURES, cid))

    def set_running(self, running: bool) -> None:
        """VHOST_VSOCK_SET_RUNNING: serve both rings, or serve them no more."""
        self.ioctl(vhost_h.VHOST_VSOCK_SET_RUNNING, _ffi.new(_INT, int(running)))


class VhostPath(ABC):
    """The `DataPath` of the kernel's `device`, which it closes: also if it can't be made.

    `features` are those of the virtio device that the kernel must support, too.  Of the guest's
    memory the kernel uses the ranges that are shared for the whole life of the guest.  Of a guest
    with private memory that is the lower part, where its kernel puts rings and bounce buffers: an
    address anywhere else is an error of the ring.

    OSError, with what was tried, if the kernel can't be used.
    """

    #: What the kernel must support of the rings, whatever the device offers.
    NEEDED = VERSION_1 | INDIRECT | EVENT_INDEX
    queue_count: int = 2

    def __init__(self, device: Vhost, features: int, *, required: bool) -> None:
        self.required: bool = required
        self._started = False  # whether it may have served the rings
        self._prepared: list[int] = []  # the rings that know eventfds
        self._kernel = device
        try:
            device.set_owner()
            supported = device.get_features()
            if lacking := (self.NEEDED | features) & ~supported:
                raise OSError(f"it does not support the features {lacking:#x}")
            self._passed = self.NEEDED | features
            self._error = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except BaseException:
            device.close()
            raise

    @abstractmethod
    def _begin(self) -> None:
        """Let the kernel serve the rings, which it knows."""

    @abstractmethod
    def _end(self) -> None:
        """Let it serve none of them, also if it does not."""

    def start(
        self, accepted: int, queues: Sequence[Queue], memory: GuestMemory, wires: Wires
    ) -> None:
        """Let the kernel serve `queues`.  OSError if it can't; call `stop` then, too."""
        device = self._kernel
        # Without ACCESS_PLATFORM: with it, the kernel would ask for a translation of each address.
        device.set_features(accepted & self._passed)
        device.set_mem_table(memory.regions())
        for index, queue in enumerate(queues[: self.queue_count]):
            self._prepared.append(index)
            device.set_vring_num(index, queue.size)
            device.set_vring_base(index, queue.base)
            device.set_vring_addr(index, *queue.userspace_addrs())
            device.set_vring_call(index, wires.interrupt)
            device.set_vring_err(index, self._error.fileno())
            device.set_vring_kick(index, wires.notify[index])
        self._started = True
        self._begin()
        for eventfd in wires.notify[: self.queue_count]:  # for requests that are there already
            os.eventfd_write(eventfd, 1)

    def stop(self) -> list[int | None]:
        """Take the queues back; for each the index to go on at, None if the kernel has none."""
        device = self._kernel
        bases: list[int | None] = []
        if self._started:
            self._end()
            for index in self._prepared:
                try:
                    bases.append(device.get_vring_base(index))
                except OSError:
                    bases.append(None)
        for index in self._prepared:
            for forget in (device.set_vring_kick, device.set_vring_call, device.set_vring_err):
                with suppress(OSError):
                    forget(index, _NO_FILE)
        self._started, self._prepared = False, []
        with suppress(BlockingIOError):
            os.eventfd_read(self._error.fileno())
        return bases

    def fileno(self) -> int:
        """The eventfd for errors of the rings."""
        return self._error.fileno()

    def close(self) -> None:
        """End the kernel's thread."""
        self._kernel.close()
        self._error.close()


class VhostNetPath(VhostPath):
    """The `DataPath` of a network card over the tap with the descriptor `tap`.

    `features` are those that the card offers to drivers.
    """

    def __init__(
        self, tap: int, features: int, *, required: bool, device: str = NET_DEVICE
    ) -> None:
        self._tap = tap
        self._net = VhostNet(device)
        super().__init__(self._net, features, required=required)

    def _begin(self) -> None:
        for index in range(self.queue_count):
            self._net.set_backend(index, self._tap)

    def _end(self) -> None:
        for index in range(self.queue_count):
            with suppress(OSError):
                self._net.set_backend(index, _NO_FILE)


class VhostVsockPath(VhostPath):
    """The `DataPath` of a vsock device, for the queues that receive and send.

    The guest gets a CID that no other guest of the host has.
    """

    #: The guest's address.
    cid: int

    def __init__(self, *, required: bool, device: str = VSOCK_DEVICE) -> None:
        self._vsock = VhostVsock(device)
        super().__init__(self._vsock, 0, required=required)
        try:
            self.cid = self._take_cid()
        except BaseException:
            self.close()
            raise

    def _take_cid(self) -> int:
        """By chance, as other programs count from 3 on: a guest does not get in their way."""
        tries = _CID_TRIES
        while True:
            number = int.from_bytes(os.urandom(8), "little")
            cid = _CID_MIN + number % (_CID_END - _CID_MIN)
            tries -= 1
            try:
                self._vsock.set_guest_cid(cid)
            except OSError as error:
                if error.errno != _errno.EADDRINUSE or not tries:
                    raise
            else:
                return cid

    def _begin(self) -> None:
        self._vsock.set_running(True)

    def _end(self) -> None:
        with suppress(OSError):
            self._vsock.set_running(False)
