"""The data path of a network card in the host's kernel: /dev/vhost-net.

A thread of the kernel moves packets between a tap and the rings of a virtio-net device in this
process's memory.  drivers/vhost/net.c and <linux/vhost.h> of the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from ...cdefs import vhost as vhost_h
from ...fd import Fd, new_struct, register_requests
from .layout import GuestMemory
from .virtio import EVENT_INDEX, INDIRECT, VERSION_1, Queue, Wires

__all__ = ["DEVICE", "VhostNet", "VhostPath"]

#: The device node.
DEVICE = "/dev/vhost-net"

_ffi = vhost_h.ffi
_FEATURES = _ffi.typeof("unsigned long long *")
_STATE = _ffi.typeof("struct vhost_vring_state *")
_FILE = _ffi.typeof("struct vhost_vring_file *")
_ADDRESSES = _ffi.typeof("struct vhost_vring_addr *")
_MEMORY = _ffi.typeof("struct vhost_memory *")
_NO_FILE = -1

register_requests(vhost_h.REQUESTS)


class VhostNet(Fd):
    """An open /dev/vhost-net.

    The methods are the ioctls of <linux/vhost.h>; `index` is the number of a ring.  OSError with
    the errno that the ioctl fails with: EBUSY if the ring is in use, EPERM before `set_owner`,
    EFAULT for memory that this process does not have.
    """

    _what = "vhost-net device"

    def __init__(self, device: str = DEVICE) -> None:
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

    def set_backend(self, index: int, tap: int) -> None:
        """VHOST_NET_SET_BACKEND: serve the ring with packets of `tap`; -1: serve it no more."""
        self.ioctl(vhost_h.VHOST_NET_SET_BACKEND, new_struct(_FILE, (index, tap)))


class VhostPath:
    """The `DataPath` of a network card over the tap with the descriptor `tap`.

    `features` are those that the card offers to drivers.  Of the guest's memory the kernel uses the
    ranges that are shared for the whole life of the guest.  Of a guest with private memory that is
    the lower part, where its kernel puts rings and bounce buffers: an address anywhere else is an
    error of the ring.

    OSError, with what was tried, if the kernel can't be used.
    """

    #: What the kernel must support of the rings, whatever the card offers.
    NEEDED = VERSION_1 | INDIRECT | EVENT_INDEX

    def __init__(self, tap: int, features: int, *, required: bool, device: str = DEVICE) -> None:
        self._tap = tap
        self.required: bool = required
        self._started: list[int] = []  # the rings that may have served packets
        self._prepared: list[int] = []  # those that know eventfds
        self._device = VhostNet(device)
        try:
            self._device.set_owner()
            supported = self._device.get_features()
            if lacking := (self.NEEDED | features) & ~supported:
                raise OSError(f"it does not support the features {lacking:#x}")
            self._passed = self.NEEDED | features
            self._error = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except BaseException:
            self._device.close()
            raise

    def start(
        self, accepted: int, queues: Sequence[Queue], memory: GuestMemory, wires: Wires
    ) -> None:
        """Let the kernel serve `queues`.  OSError if it can't; call `stop` then, too."""
        device = self._device
        # Without ACCESS_PLATFORM: with it, the kernel would ask for a translation of each address.
        device.set_features(accepted & self._passed)
        device.set_mem_table(memory.regions())
        for index, queue in enumerate(queues):
            self._prepared.append(index)
            device.set_vring_num(index, queue.size)
            device.set_vring_base(index, queue.base)
            device.set_vring_addr(index, *queue.userspace_addrs())
            device.set_vring_call(index, wires.interrupt)
            device.set_vring_err(index, self._error.fileno())
            device.set_vring_kick(index, wires.notify[index])
        for index in range(len(queues)):
            self._started.append(index)
            device.set_backend(index, self._tap)
        for eventfd in wires.notify:  # for requests that are there already
            os.eventfd_write(eventfd, 1)

    def stop(self) -> list[int | None]:
        """Take the queues back; for each the index to go on at, None if the kernel has none."""
        bases: list[int | None] = []
        for index in self._started:
            with suppress(OSError):
                self._device.set_backend(index, _NO_FILE)
            try:
                bases.append(self._device.get_vring_base(index))
            except OSError:
                bases.append(None)
        for index in self._prepared:
            for forget in (
                self._device.set_vring_kick,
                self._device.set_vring_call,
                self._device.set_vring_err,
            ):
                with suppress(OSError):
                    forget(index, _NO_FILE)
        self._started, self._prepared = [], []
        with suppress(BlockingIOError):
            os.eventfd_read(self._error.fileno())
        return bases

    def fileno(self) -> int:
        """The eventfd for errors of the rings."""
        return self._error.fileno()

    def close(self) -> None:
        """End the kernel's thread."""
        self._device.close()
        self._error.close()
