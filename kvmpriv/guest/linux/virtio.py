"""Virtio over MMIO: the registers, and rings whose contents are not trusted.

Virtual I/O Device (VIRTIO) Version 1.2: 2.7 (split virtqueues), 4.2 (MMIO).  A guest that breaks
the rules stops the device, until it resets it.
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ...memory import HostMemory
from .layout import GuestAddressError, GuestMemory

__all__ = [
    "ACCESS_PLATFORM",
    "EVENT_INDEX",
    "INDIRECT",
    "INTERRUPT_ACKNOWLEDGE",
    "QUEUE_NOTIFY",
    "SIZE",
    "USED_BUFFER",
    "VERSION_1",
    "Chain",
    "DataPath",
    "Queue",
    "RingError",
    "Transport",
    "VirtioDevice",
    "Wires",
]

#: The size of a device's registers, in bytes.
SIZE = 0x200
#: The feature bit that makes a driver use the DMA API, and so its kernel's bounce buffers.
ACCESS_PLATFORM = 1 << 33
#: A request may be a table of descriptors, which takes one entry of the ring.
INDIRECT = 1 << 28
#: Each side writes into the rings from which index on it wants a notification.  A device that
#: offers this must serve a queue until `Queue.pop` returns None, or serve it again without a
#: notification: a driver sends none for what was there before.
EVENT_INDEX = 1 << 29
VERSION_1 = 1 << 32

_MAGIC, _VERSION, _VENDOR = 0x74726976, 2, 0x4B564D50  # "virt", modern, "PMVK"
_QUEUE_SIZE_MAX = 256
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_DESCRIPTOR_SIZE = 16
_NO_INTERRUPT = 1
_DESCRIPTOR = struct.Struct("<QIHH")
# Status bits.
_FEATURES_OK, _DRIVER_OK, _NEEDS_RESET = 8, 4, 64
#: The register to which a driver writes the number of a queue with new requests.
QUEUE_NOTIFY = 0x50
#: The register to which a driver writes the interrupts' reasons that it has seen, and the reason of
#: nearly all of them: requests were returned.
INTERRUPT_ACKNOWLEDGE, USED_BUFFER = 0x64, 1
_INTERRUPT_STATUS = 0x60
_CONFIG, _CONFIG_SIZE = 0x100, 64
_CONFIG_CHANGED = 2
# The registers that can be read, all of 32 bits.
_READABLE = (0x000, 0x004, 0x008, 0x00C, 0x010, 0x034, 0x044, 0x070)


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
        self._signalled = 0  # the used index when the driver was last considered for an interrupt
        self._barrier = threading.Lock()

    def activate(self, accepted: int = 0) -> None:
        """Start to use the rings: the driver has set size and addresses, and accepted features."""
        size = self.size
        if not 0 < size <= _QUEUE_SIZE_MAX or size & (size - 1):
            raise RingError(f"set up a queue of {size} entries")
        sizes = self._sizes()
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
        self._parts = self._memory.views()
        self._events, self._indirect = bool(accepted & EVENT_INDEX), bool(accepted & INDIRECT)
        # Cast to units that are written at once: struct.pack_into writes zeros first, and a driver
        # that reads at that moment would see a wrong index.
        self._available = available.cast("H")
        self._used_head = used[:4].cast("H")
        self._used_ring = used[4:-2].cast("I")
        self._used_tail = used[-2:].cast("H")
        self._taken = self._used_index = self._signalled = 0
        self.ready = True

    def _sizes(self) -> tuple[int, int, int]:
        return (_DESCRIPTOR_SIZE * self.size, 6 + 2 * self.size, 6 + 8 * self.size)

    def userspace_addrs(self) -> tuple[int, int, int]:
        """Where this process has the descriptors, the available ring and the used ring."""
        first, second, third = (
            self._memory.userspace_addr(address, size)
            for address, size in zip(self.addresses, self._sizes(), strict=True)
        )
        return first, second, third

    @property
    def base(self) -> int:
        """How many requests were taken, modulo 2^16: an index of the available ring."""
        return self._taken

    def resume_at(self, base: int | None) -> None:
        """Go on where a `DataPath` has stopped: it has taken the requests before the index `base`.

        None: it has taken as many as it has returned.
        """
        self._used_index = self._signalled = self._used_head[1]
        self._taken = self._used_index if base is None else base & 0xFFFF

    def pop(self) -> Chain | None:
        """The next request, or None."""
        if not self.ready:
            return None
        waiting = (self._available[1] - self._taken) & 0xFFFF
        if not waiting:
            if not self._events:
                return None
            self._used_tail[0] = self._taken  # the driver notifies of what it adds from now on
            with self._barrier:  # the store must be visible before the index is read again
                waiting = (self._available[1] - self._taken) & 0xFFFF
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
        table: list[tuple[int, int, int, int]] | None = None
        count, number = self.size, head
        start, end, view = self._parts[0]  # most parts are there
        for _ in range(self.size):
            if number >= count:
                raise RingError(f"used descriptor {number} of {count}")
            if table is not None:
                address, length, flags, following = table[number]
            else:
                at = _DESCRIPTOR_SIZE * number
                address, length, flags, following = _DESCRIPTOR.unpack_from(self._descriptors, at)
            if flags & _INDIRECT:
                if table is not None or flags & _NEXT or not self._indirect:
                    why = "which was not offered" if not self._indirect else "which may not be here"
                    raise RingError(f"used an indirect descriptor ({number}), {why}")
                count = min(length // _DESCRIPTOR_SIZE, self.size)  # no chain is longer
                if not count or length % _DESCRIPTOR_SIZE:
                    raise RingError(f"used a table of descriptors of {length} bytes")
                whole = self._part(number, address, length)
                table = [*_DESCRIPTOR.iter_unpack(bytes(whole[: count * _DESCRIPTOR_SIZE]))]
                number = 0
                continue
            offset = address - start
            if offset >= 0 and address + length <= end:
                part = view[offset : offset + length]
            else:
                part = self._part(number, address, length)
            if flags & _WRITE:
                writable.append(part)
            elif writable:
                raise RingError(f"put descriptor {number}, to be read, after one to be written")
            else:
                readable.append(part)
            if not flags & _NEXT:
                return Chain(head, readable, writable)
            number = following
        raise RingError(f"linked the descriptors from {head} on in a circle")

    def _part(self, number: int, address: int, length: int) -> memoryview:
        """What descriptor `number` describes."""
        for start, end, view in self._parts:
            if start <= address and address + length <= end:
                return view[address - start : address - start + length]
        raise RingError(
            f"used descriptor {number}: {length:#x} bytes at {address:#x} are not inside shared"
            " memory"
        )

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
        """Whether the driver asks for an interrupt for what was returned since the last call."""
        if not self._events:
            return not self._available[0] & _NO_INTERRUPT
        before, self._signalled = self._signalled, self._used_index
        event = self._available[2 + self.size]  # which the driver waits for (VIRTIO 2.7.10)
        return (self._used_index - event - 1) & 0xFFFF < (self._used_index - before) & 0xFFFF


class Wires(NamedTuple):
    """The eventfds between a device and KVM."""

    #: KVM raises the device's interrupt when it is written to.
    interrupt: int
    #: KVM writes to `notify[n]` when the driver notifies the device of requests in queue n.
    notify: list[int]


class DataPath(Protocol):
    """Serves the queues of a device instead of the device, for example in the host's kernel."""

    #: Whether the device must not serve its queues itself.
    required: bool
    #: How many of the device's queues it serves: the first ones.
    queue_count: int

    def start(
        self, accepted: int, queues: Sequence[Queue], memory: GuestMemory, wires: Wires
    ) -> None:
        """Serve its part of `queues`, the device's, from their `base` on.

        OSError if it can't; `stop` must be called then.
        """
        ...

    def stop(self) -> list[int | None]:
        """Serve them no more; for each of them the argument for `Queue.resume_at`."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when the guest broke the rules of its rings."""
        ...


class VirtioDevice(ABC):
    """A device behind the registers; a subclass for each kind."""

    #: The kind, by its number (VIRTIO 1.2, chapter 5).
    device_id = 0
    #: The kind, for messages.
    name: str = "virtio"
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
    #: What serves the queues instead of the device, when it can.
    data_path: DataPath | None = None
    #: What becomes of the queues when it can't, for messages.
    without_path: str = "this process serves its queues"
    #: A descriptor for which the thread of the devices calls `own_ready` when it is readable,
    #: what serves the queues; -1: none.
    own_fd: int = -1

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

    def own_ready(self) -> None:  # noqa: B027  # most devices have no such descriptor
        """Do what is to be done when `own_fd` is readable."""

    def reset(self) -> None:  # noqa: B027  # most devices have no state
        """Forget the requests under way: the driver starts again."""

    def close(self) -> None:  # noqa: B027  # and nothing to close
        """Close what the device has opened: its machine is closed."""


class Transport:
    """The registers of one device.

    `interrupt` raises its interrupt line; `complain` is called with a line of text when the device
    stops.  `access_platform` makes the driver use bounce buffers.  With `wires` the device's
    `data_path` is used; `changed` is called when `engaged` becomes false.  Any thread may call.

    `page` is for a guest that reads the registers there, without an exit, and exits only to write
    them.  While the driver runs, InterruptStatus in `page` is always USED_BUFFER, as a read of it
    does not exit.  A driver that was not interrupted finds no returned request in its queues.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        interrupt: Callable[[], object],
        complain: Callable[[str], object],
        *,
        access_platform: bool = False,
        wires: Wires | None = None,
        page: HostMemory | None = None,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        self.device = device
        self._wires = wires
        self._changed = changed
        self._path: DataPath | None = None  # while it serves the queues
        self._goes_on = False  # whether it does so again after a pause
        self._memory = memory
        self._interrupt = interrupt
        self._complain = complain
        self._offered = device.features | VERSION_1 | (ACCESS_PLATFORM if access_platform else 0)
        self._required = self._offered & (VERSION_1 | ACCESS_PLATFORM)
        self._lock = threading.Lock()
        # A lock of its own: an interrupt handler must not wait for a disk.
        self._status_lock = threading.Lock()
        self._interrupt_status = 0
        self._page = page.view().cast("I") if page is not None else None
        self._reset()
        self._publish()

    def _reset(self) -> None:
        self._disengage()
        self._status = self._accepted = 0
        self._feature_select = self._driver_select = self._queue_select = 0
        self._interrupt_status = 0
        self.queues: list[Queue] = [Queue(self._memory) for _ in range(self.device.queue_count)]
        self.device.reset()

    def _works(self) -> bool:
        return self._status & (_DRIVER_OK | _NEEDS_RESET) == _DRIVER_OK

    def host_fd(self) -> int:
        """The descriptor to wait for: the device's `host_fd`, or that of its data path.

        -1 while the device serves nothing: no thread would read it.
        """
        if (path := self._path) is not None:
            return path.fileno()
        return self.device.host_fd() if self._works() else -1

    def host_ready(self) -> None:
        """Do what is to be done when `host_fd` is readable."""
        with self._lock:
            if self._path is not None:
                self._stop("broke the rules of a ring, as vhost found")
                return
        for number in self.device.host_queues:
            self.serve(number)

    @property
    def engaged(self) -> bool:
        """Whether the device's data path serves the queues, and not the device."""
        return self._path is not None

    def path_serves(self, number: int) -> bool:
        """Whether the device's data path serves queue `number`, and not the device."""
        path = self._path
        return path is not None and number < path.queue_count

    def _engage(self) -> None:
        """Let the data path serve the queues, or the device where that can't be.

        OSError if the device must not.
        """
        path = self.device.data_path
        if path is None or self._wires is None:
            return
        try:
            if not all(queue.ready for queue in self.queues):
                raise OSError("the driver has not set up all queues")
            path.start(self._accepted, self.queues, self._memory, self._wires)
        except OSError as error:
            self._resume_queues(path.stop())
            if path.required:
                raise
            self._complain(
                f"{self.device.name}: vhost can't be used: {error.strerror or error};"
                f" {self.device.without_path}"
            )
        else:
            self._path = path

    def _disengage(self) -> None:
        """Let the device serve the queues from where its data path has stopped."""
        path, self._path = self._path, None
        if path is not None:
            self._resume_queues(path.stop())
            self._changed()

    def _resume_queues(self, bases: Sequence[int | None]) -> None:
        for queue, base in zip(self.queues, bases, strict=False):
            if queue.ready:
                queue.resume_at(base)

    def pause(self) -> None:
        """Stop the data path until `resume`; the device must be stopped already."""
        with self._lock:
            self._goes_on = self._goes_on or self._path is not None
            self._disengage()

    def resume(self) -> None:
        """Let the data path go on after `pause`, or the device where that can't be."""
        with self._lock:
            if goes_on := self._goes_on:
                self._engage()
            self._goes_on = False
        if goes_on and not self.engaged:  # what the driver has notified the data path of
            for number in range(len(self.queues)):
                self.serve(number)

    def close(self) -> None:
        """Serve nothing more, and let go of the guest's memory."""
        with self._lock:
            self._page = None
            self._disengage()
            self._status = 0
            self.queues = [Queue(self._memory) for _ in self.queues]

    def serve(self, number: int) -> None:
        """Serve the requests in queue `number` and interrupt the driver.

        Without effect while its data path does that.
        """
        with self._lock:
            if not self._works() or self.path_serves(number):
                return
            queue = self.queues[number]
            try:
                if queue.ready and self.device.serve(number, queue):
                    self._interrupt_for(queue)
            except RingError as error:
                self._stop(str(error))

    def _stop(self, why: str) -> None:
        """Serve nothing more until the driver resets the device."""
        self._disengage()
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
            self._interrupt_status |= USED_BUFFER
        self._interrupt()

    def _raise(self, why: int) -> None:
        with self._status_lock:
            self._interrupt_status |= why
        self._publish()
        self._interrupt()

    def _publish(self) -> None:
        """Let the guest read the registers as they are now."""
        if (page := self._page) is None:
            return
        for offset in _READABLE:
            page[offset // 4] = self._register(offset)
        status = self._interrupt_status & _CONFIG_CHANGED | (USED_BUFFER if self._works() else 0)
        page[_INTERRUPT_STATUS // 4] = status
        config = self.device.config.ljust(_CONFIG_SIZE, b"\0")
        for at in range(0, _CONFIG_SIZE, 4):
            page[(_CONFIG + at) // 4] = int.from_bytes(config[at : at + 4], "little")

    def read(self, offset: int, size: int) -> int:
        """Read a register (32 bits) or the configuration space (8 to 64 bits)."""
        if offset == _INTERRUPT_STATUS:
            # A data path raises its interrupts by the eventfd alone: this process sees none.
            return self._interrupt_status | (USED_BUFFER if self._path is not None else 0)
        with self._lock:
            if offset >= _CONFIG:
                start = offset - _CONFIG
                return int.from_bytes(self.device.config[start : start + size], "little")
            if size != 4 or offset % 4:
                return 0
            return self._register(offset)

    def _register(self, offset: int) -> int:
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
        if offset == INTERRUPT_ACKNOWLEDGE:
            with self._status_lock:
                self._interrupt_status &= ~value
            if value & _CONFIG_CHANGED:
                with self._lock:
                    self._publish()
            return
        with self._lock:
            try:
                self._write(offset, value)
            except RingError as error:
                self._stop(str(error))
            self._publish()

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
                queue.activate(self._accepted)
            elif 0x080 <= offset < 0x0A8 and offset & 0x8 == 0:
                which, shift = (offset - 0x080) // 0x10, 32 * (offset >> 2 & 1)
                kept = queue.addresses[which] & ~(0xFFFFFFFF << shift)
                queue.addresses[which] = kept | value << shift
        elif queue is not None and offset == 0x044 and value == 0:
            self._disengage()
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
        worked = self._works()
        self._status = value & 0xFF | self._status & _NEEDS_RESET
        if self._works() and not worked:
            self._engage()
        elif worked and not self._works():
            self._disengage()
