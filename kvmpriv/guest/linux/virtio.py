"""Virtio over MMIO: the registers, and rings whose contents are not trusted.

Virtual I/O Device (VIRTIO) Version 1.2: 2.7 (split virtqueues), 4.2 (MMIO).  Indirect descriptors
and event indices are not offered.  A guest that breaks the rules stops the device, until it resets
it.
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .layout import GuestAddressError, GuestMemory

__all__ = [
    "ACCESS_PLATFORM",
    "QUEUE_NOTIFY",
    "SIZE",
    "Chain",
    "Queue",
    "RingError",
    "Transport",
    "VirtioDevice",
]

#: The size of a device's registers, in bytes.
SIZE = 0x200
#: The feature bit that makes a driver use the DMA API, and so its kernel's bounce buffers.
ACCESS_PLATFORM = 1 << 33

_VERSION_1 = 1 << 32
_MAGIC, _VERSION, _VENDOR = 0x74726976, 2, 0x4B564D50  # "virt", modern, "PMVK"
_QUEUE_SIZE_MAX = 256
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1
_DESCRIPTOR = struct.Struct("<QIHH")
# Status bits.
_FEATURES_OK, _DRIVER_OK, _NEEDS_RESET = 8, 4, 64
#: The register to which a driver writes the number of a queue with new requests.
QUEUE_NOTIFY = 0x50
_INTERRUPT_STATUS, _INTERRUPT_ACKNOWLEDGE = 0x60, 0x64
_CONFIG = 0x100
_USED_BUFFER, _CONFIG_CHANGED = 1, 2


class RingError(Exception):
    """The guest broke the rules of a ring; the message completes "the guest ..."."""


class Chain(NamedTuple):
    """A request: what the device may read, and where it may write, in the guest's memory."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


class Queue:
    """A split virtqueue in the guest's memory.

    Every index and every address is checked when it is used, as the guest may change them at any
    time: none of them leads outside its memory, and no chain is endless.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.size = 0
        self.ready: bool = False
        #: Guest physical addresses of the descriptors, the available ring and the used ring.
        self.addresses: list[int] = [0, 0, 0]
        self._taken = 0
        self._used_index = 0

    def activate(self) -> None:
        """Start to use the rings: the driver has set size and addresses."""
        size = self.size
        if not 0 < size <= _QUEUE_SIZE_MAX or size & (size - 1):
            raise RingError(f"set up a queue of {size} entries")
        sizes = (16 * size, 6 + 2 * size, 6 + 8 * size)
        for address, alignment in zip(self.addresses, (16, 2, 4), strict=True):
            if address % alignment:
                raise RingError(f"put a ring at {address:#x}, not a multiple of {alignment}")
        try:
            self._descriptors, available, used = (
                self._memory.view(address, length)
                for address, length in zip(self.addresses, sizes, strict=True)
            )
        except GuestAddressError as error:
            raise RingError(f"put a ring outside shared memory: {error}") from None
        # Cast to units that are written at once: struct.pack_into writes zeros first, and a driver
        # that reads at that moment would see a wrong index.
        self._available = available.cast("H")
        self._used_head = used[:4].cast("H")
        self._used_ring = used[4:-2].cast("I")
        self._taken = self._used_index = 0
        self.ready = True

    def pop(self) -> Chain | None:
        """The next request, or None."""
        if not self.ready:
            return None
        index = self._available[1]
        waiting = (index - self._taken) & 0xFFFF
        if not waiting:
            return None
        if waiting > self.size:
            raise RingError(f"offered {waiting} requests in a ring of {self.size}")
        head = self._available[2 + self._taken % self.size]
        self._taken = (self._taken + 1) & 0xFFFF
        return self._walk(head)

    def _walk(self, head: int) -> Chain:
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        number = head
        for _ in range(self.size):
            if number >= self.size:
                raise RingError(f"used descriptor {number} of {self.size}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(
                self._descriptors, 16 * number
            )
            if flags & _INDIRECT:
                raise RingError(f"used an indirect descriptor ({number}), which was not offered")
            if not flags & _WRITE and writable:
                raise RingError(f"put descriptor {number}, to be read, after one to be written")
            try:
                part = self._memory.view(address, length)
            except GuestAddressError as error:
                raise RingError(f"used descriptor {number}: {error}") from None
            (writable if flags & _WRITE else readable).append(part)
            if not flags & _NEXT:
                return Chain(head, readable, writable)
            number = following
        raise RingError(f"linked the descriptors from {head} on in a circle")

    def push(self, chain: Chain, written: int) -> None:
        """Return a request to the driver, with `written` bytes written to it."""
        self.push_all([(chain, written)])

    def push_all(self, done: Sequence[tuple[Chain, int]]) -> None:
        """Return several requests at once: the driver sees none of them before the others."""
        for chain, written in done:
            at = 2 * (self._used_index % self.size)
            self._used_ring[at], self._used_ring[at + 1] = chain.head, min(written, 0xFFFFFFFF)
            self._used_index = (self._used_index + 1) & 0xFFFF
        self._used_head[1] = self._used_index  # after the entry: x86 keeps the order of stores

    def wants_interrupt(self) -> bool:
        """Whether the driver asks for an interrupt when requests are returned."""
        return not self._available[0] & _NO_INTERRUPT


class VirtioDevice(ABC):
    """A device behind the registers; a subclass for each kind."""

    #: The kind, by its number (VIRTIO 1.2, chapter 5).
    device_id = 0
    #: The kind, for messages.
    name = "virtio"
    #: The feature bits of this kind.
    features = 0
    queue_count = 1
    #: The most entries of a queue, a power of two up to 256.
    queue_size = _QUEUE_SIZE_MAX
    #: The queues to serve when `host_fd` becomes readable.
    host_queues: tuple[int, ...] = (0,)
    #: How many bytes the driver may have in bounce buffers at a time.
    bounced = 0
    #: The configuration space.
    config = b""

    def negotiated(self, accepted: int) -> None:  # noqa: B027  # most devices don't care
        """The driver has accepted these of the offered features; `reset` undoes it."""

    @abstractmethod
    def serve(self, number: int, queue: Queue) -> bool:
        """Serve the requests in queue `number`; True if one was returned.

        RingError stops the device.  Called with one queue at a time.
        """

    def host_fd(self) -> int:
        """A descriptor of the host: `host_queues` are served when it is readable.  -1: none."""
        return -1

    def reset(self) -> None:  # noqa: B027  # most devices have no state
        """Forget the requests under way: the driver starts again."""

    def close(self) -> None:  # noqa: B027  # and nothing to close
        """Close what the device has opened: its machine is closed."""


class Transport:
    """The registers of one device.

    `interrupt` raises its interrupt line; `complain` is called with a line of text when the device
    stops.  `access_platform` makes the driver use bounce buffers.  Any thread may call.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        interrupt: Callable[[], object],
        complain: Callable[[str], object],
        *,
        access_platform: bool = False,
    ) -> None:
        self.device = device
        self._memory = memory
        self._interrupt = interrupt
        self._complain = complain
        self._offered = device.features | _VERSION_1 | (ACCESS_PLATFORM if access_platform else 0)
        self._required = self._offered & (_VERSION_1 | ACCESS_PLATFORM)
        self._lock = threading.Lock()
        # A lock of its own: an interrupt handler must not wait for a disk.
        self._status_lock = threading.Lock()
        self._interrupt_status = 0
        self._reset()

    def _reset(self) -> None:
        self._status = self._accepted = 0
        self._feature_select = self._driver_select = self._queue_select = 0
        self._interrupt_status = 0
        self.queues: list[Queue] = [Queue(self._memory) for _ in range(self.device.queue_count)]
        self.device.reset()

    def _works(self) -> bool:
        return self._status & (_DRIVER_OK | _NEEDS_RESET) == _DRIVER_OK

    def host_fd(self) -> int:
        """The device's `host_fd`; -1 while the device serves nothing: no thread would read it."""
        return self.device.host_fd() if self._works() else -1

    def serve(self, number: int) -> None:
        """Serve the requests in queue `number` and interrupt the driver."""
        with self._lock:
            if not self._works():
                return
            queue = self.queues[number]
            try:
                if queue.ready and self.device.serve(number, queue):
                    self._interrupt_for(queue)
            except RingError as error:
                self._stop(str(error))

    def _stop(self, why: str) -> None:
        """Serve nothing more until the driver resets the device."""
        self._status |= _NEEDS_RESET
        self._complain(f"{self.device.name} stopped: the guest {why}")
        self._raise(_CONFIG_CHANGED)

    def _interrupt_for(self, queue: Queue) -> None:
        """Interrupt the driver because requests were returned, if it asks for that."""
        # Taking the lock is a full barrier: the index must be visible before the driver's flag is
        # read, as the driver checks for more after it has set the flag (VIRTIO 2.7.13.4.1).
        with self._status_lock:
            if not queue.wants_interrupt():
                return
            self._interrupt_status |= _USED_BUFFER
        self._interrupt()

    def _raise(self, why: int) -> None:
        with self._status_lock:
            self._interrupt_status |= why
        self._interrupt()

    def read(self, offset: int, size: int) -> int:
        """Read a register (32 bits) or the configuration space (8 to 64 bits)."""
        if offset == _INTERRUPT_STATUS:
            return self._interrupt_status
        with self._lock:
            if offset >= _CONFIG:
                start = offset - _CONFIG
                return int.from_bytes(self.device.config[start : start + size], "little")
            if size != 4 or offset % 4:
                return 0
            queue = self._queue()
            if offset == 0x010:
                return self._offered >> 32 * self._feature_select & 0xFFFFFFFF
            return {
                0x000: _MAGIC,
                0x004: _VERSION,
                0x008: self.device.device_id,
                0x00C: _VENDOR,
                0x034: self.device.queue_size if queue else 0,
                0x044: int(queue.ready) if queue else 0,
                0x070: self._status,
            }.get(offset, 0)

    def _queue(self) -> Queue | None:
        selected = self._queue_select
        return self.queues[selected] if selected < len(self.queues) else None

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register (32 bits)."""
        if offset == QUEUE_NOTIFY:  # if no ioeventfd took it
            if value < len(self.queues):
                self.serve(value)
            return
        if size != 4:
            return
        if offset == _INTERRUPT_ACKNOWLEDGE:
            with self._status_lock:
                self._interrupt_status &= ~value
            return
        with self._lock:
            try:
                self._write(offset, value)
            except RingError as error:
                self._stop(str(error))

    def _write(self, offset: int, value: int) -> None:
        queue = self._queue()
        if offset == 0x014:
            self._feature_select = value & 1
        elif offset == 0x020:
            shift = 32 * self._driver_select
            self._accepted = self._accepted & ~(0xFFFFFFFF << shift) | value << shift
        elif offset == 0x024:
            self._driver_select = value & 1
        elif offset == 0x030:
            self._queue_select = value
        elif offset == 0x070:
            self._set_status(value)
        elif queue is not None and not queue.ready:
            if offset == 0x038:
                queue.size = value
            elif offset == 0x044 and value == 1:
                queue.activate()
            elif 0x080 <= offset < 0x0A8 and offset & 0x8 == 0:
                which, shift = (offset - 0x080) // 0x10, 32 * (offset >> 2 & 1)
                kept = queue.addresses[which] & ~(0xFFFFFFFF << shift)
                queue.addresses[which] = kept | value << shift
        elif queue is not None and offset == 0x044 and value == 0:
            queue.ready = False

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        refused = self._accepted & ~self._offered or self._required & ~self._accepted
        if value & _FEATURES_OK and refused:
            value &= ~_FEATURES_OK  # the driver reads it back and gives up
        elif value & _FEATURES_OK and not self._status & _FEATURES_OK:
            self.device.negotiated(self._accepted)
        self._status = value & 0xFF | self._status & _NEEDS_RESET
