"""Pages in use: what holds the pages of a mapping of this process, each until its context ends.

An O_DIRECT transfer lasts as long as a test wants: the disk is one of null_blk, and the request is
in a queue that the kernel serves only when it is polled (IORING_SETUP_IOPOLL).  So is the access of
another process: the memory into which it reads does not exist until the test lets it (userfaultfd).
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import select
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from kvmpriv import HostMemory
from kvmpriv.cdefs import kvm as k

from .races import eventually
from .requirements import missing
from .syscalls import MIB, PAGE, address_of, call, vector_of
from .userfaultfd import MISSING, open_userfaultfd, register_range

F_SETPIPE_SZ = 1031


def bytes_at(address: int, size: int) -> bytes:
    """What this process has at an address."""
    return bytes(k.ffi.buffer(k.ffi.cast("char *", address), size))


class Use(Protocol):
    """A use of pages that reads them."""

    def content(self) -> bytes:
        """What it has read; the pages are not in use afterwards."""
        ...


# -- pipes -----------------------------------------------------------------------------------------


class Pipe:
    """A pipe that has pages until they are read."""

    def __init__(self, read_end: int, size: int) -> None:
        self._read_end, self._size = read_end, size

    def read(self, size: int) -> bytes:
        """Read a part; the pages that have been read as a whole are not in use afterwards."""
        return os.read(self._read_end, size)

    def content(self) -> bytes:
        return self.read(self._size)


@contextmanager
def in_a_pipe(address: int, size: int = PAGE) -> Iterator[Pipe]:
    """The pages are in a pipe, by vmsplice(2): their reference counts are raised."""
    read_end, write_end = os.pipe()
    try:
        call("fcntl", write_end, F_SETPIPE_SZ, max(size, PAGE))
        assert call("vmsplice", write_end, address_of(vector_of(address, size)), 1, 0) == size
        yield Pipe(read_end, size)
    finally:
        os.close(read_end)
        os.close(write_end)


# -- io_uring --------------------------------------------------------------------------------------

SETUP_IOPOLL, ENTER_GETEVENTS = 1, 1  # <linux/io_uring.h>
REGISTER_BUFFERS, UNREGISTER_BUFFERS = 0, 1
OP_READ, OP_WRITE = 22, 23
OFF_SQES = 0x1000_0000


@contextmanager
def _io_uring(entries: int, flags: int = 0) -> Iterator[tuple[int, bytes]]:
    """The descriptor of an io_uring, and its parameters as the kernel has completed them."""
    parameters = k.ffi.new("char[120]")  # struct io_uring_params
    struct.pack_into("<I", k.ffi.buffer(parameters), 8, flags)
    try:
        ring = call("io_uring_setup", entries, address_of(parameters))
    except OSError as error:
        missing("io_uring", str(error))
    try:
        yield ring, bytes(k.ffi.buffer(parameters))
    finally:
        os.close(ring)


@contextmanager
def in_io_uring(address: int, size: int = PAGE) -> Iterator[None]:
    """The pages are a registered buffer of io_uring: pinned for long."""
    with _io_uring(1) as (ring, _):
        buffers = address_of(vector_of(address, size))
        call("io_uring_register", ring, REGISTER_BUFFERS, buffers, 1)
        try:
            yield
        finally:
            call("io_uring_register", ring, UNREGISTER_BUFFERS, 0, 0)


class _Polled:
    """Requests of an io_uring that complete when they are polled; it is used for one submission."""

    def __init__(self, stack: ExitStack, requests: list[bytes]) -> None:
        self._count, self.results = len(requests), list[int]()
        self._ring, parameters = stack.enter_context(_io_uring(self._count, SETUP_IOPOLL))
        entries, cq_entries = struct.unpack_from("<2I", parameters)
        _, tail, _, _, _, _, array = struct.unpack_from("<7I", parameters, 40)  # sq_off
        head, self._tail, _, _, _, self._cqes = struct.unpack_from("<6I", parameters, 80)  # cq_off
        self._head = head
        size = max(array + 4 * entries, self._cqes + 16 * cq_entries)
        self._rings = stack.enter_context(mmap.mmap(self._ring, size))
        with mmap.mmap(self._ring, 64 * entries, offset=OFF_SQES) as sqes:
            sqes[: 64 * self._count] = b"".join(requests)
            struct.pack_into(f"<{self._count}I", self._rings, array, *range(self._count))
            struct.pack_into("<I", self._rings, tail, self._count)
            assert call("io_uring_enter", self._ring, self._count, 0, 0, 0, 0) == self._count

    def _reap(self) -> None:
        """Take what the kernel has completed; OSError for a request that failed."""
        (tail,) = struct.unpack_from("<I", self._rings, self._tail)
        for at in range(len(self.results), tail):
            (result,) = struct.unpack_from("<i", self._rings, self._cqes + 16 * at + 8)
            self.results.append(result)
        struct.pack_into("<I", self._rings, self._head, tail)
        for result in self.results:
            if result < 0:
                raise OSError(-result, f"O_DIRECT: {os.strerror(-result)}")

    def finish(self) -> None:
        """Poll until all have completed."""
        while len(self.results) < self._count:
            with suppress(InterruptedError):
                call("io_uring_enter", self._ring, 0, 1, ENTER_GETEVENTS, 0, 0)
            self._reap()


# -- O_DIRECT --------------------------------------------------------------------------------------

NULL_BLK = Path("/sys/kernel/config/nullb")
_NUMBERS = itertools.count()
#: The size of a request: the kernel splits larger ones, and does not poll the parts.
REQUEST = 64 * PAGE


class Disk:
    """A disk of null_blk that keeps what is written; `fd` is open for O_DIRECT."""

    def __init__(self, name: str, fd: int) -> None:
        self._requests = Path("/sys/block") / name / "inflight"
        self.fd = fd

    def requests(self) -> int:
        """How many requests the disk has."""
        return sum(map(int, self._requests.read_text().split()))

    def write(self, data: bytes) -> None:
        """Write from the beginning."""
        with mmap.mmap(-1, len(data)) as buffer:  # O_DIRECT wants aligned memory
            buffer[:] = data
            assert os.pwritev(self.fd, [buffer], 0) == len(data)

    def read(self, size: int) -> bytes:
        """What the disk has at its beginning."""
        with mmap.mmap(-1, size) as buffer:
            assert os.preadv(self.fd, [buffer], 0) == size
            return buffer[:]


@contextmanager
def a_disk(size: int = MIB) -> Iterator[Disk]:
    """A disk that is removed at the end."""
    name = f"kvmpriv{os.getpid()}-{next(_NUMBERS)}"
    folder, queue = NULL_BLK / name, Path("/sys/block") / name / "queue"
    if not NULL_BLK.is_dir():
        missing("null-blk", f"there is no {NULL_BLK}")
    try:
        folder.mkdir()
    except OSError as error:
        missing("null-blk", f"no folder can be made in it: {os.strerror(error.errno or 0)}")
    try:
        for attribute, value in (
            ("size", -(-size // MIB)),
            ("memory_backed", 1),
            ("irqmode", 0),
            ("poll_queues", 1),
            ("max_sectors", 2048),
            ("hw_queue_depth", 128),
            ("power", 1),
        ):
            (folder / attribute).write_text(str(value))
        # In ms: a request that is not polled for so long fails.
        (queue / "io_timeout").write_text("600000")
        (queue / "nomerges").write_text("2")
        fd = os.open(f"/dev/{name}", os.O_RDWR | os.O_DIRECT)
        try:
            yield Disk(name, fd)
        finally:
            os.close(fd)
    finally:
        folder.rmdir()


class Transfer:
    """An O_DIRECT transfer between pages and a disk, which is under way until `end`."""

    def __init__(self, stack: ExitStack, disk: Disk, address: int, size: int, code: int) -> None:
        self._size, self._disk, fd = size, disk, disk.fd
        self._parts = {at: min(REQUEST, size - at) for at in range(0, size, REQUEST)}
        requests = [  # struct io_uring_sqe
            struct.pack("<BBHiQQII32x", code, 0, 0, fd, at, address + at, part, 0)
            for at, part in self._parts.items()
        ]
        self._polled = _Polled(stack, requests)
        assert eventually(lambda: self._disk.requests() == len(requests), 60)

    def end(self) -> None:
        """Have the disk transfer the data; the pages are not in use afterwards."""
        self._polled.finish()
        assert sorted(self._polled.results) == sorted(self._parts.values())
        assert self._disk.requests() == 0

    def content(self) -> bytes:
        """What the disk has after the end."""
        self.end()
        return self._disk.read(self._size)


@contextmanager
def in_a_direct_write(address: int, size: int = PAGE) -> Iterator[Transfer]:
    """The pages are being written to a disk, by O_DIRECT."""
    with ExitStack() as stack:
        disk = stack.enter_context(a_disk(size))
        transfer = Transfer(stack, disk, address, size, OP_WRITE)
        yield transfer
        transfer.end()


@contextmanager
def in_a_direct_read(
    address: int, size: int = PAGE, data: bytes | None = None
) -> Iterator[Transfer]:
    """The pages are being read from a disk, which has `data`, or what the pages have."""
    with ExitStack() as stack:
        disk = stack.enter_context(a_disk(size))
        disk.write(bytes_at(address, size) if data is None else data)
        transfer = Transfer(stack, disk, address, size, OP_READ)
        yield transfer
        transfer.end()


# -- other processes -------------------------------------------------------------------------------


def _fork(work: Callable[[], object]) -> int:
    """Do `work` in a forked process; its exit status is 0 if that succeeded."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def _read(pid: int, address: int, size: int, memory: HostMemory) -> bytes:
    """Read another process's memory, by way of `memory`."""
    here, there = vector_of(memory.userspace_addr, size), vector_of(address, size)
    done = call("process_vm_readv", pid, address_of(here), 1, address_of(there), 1, 0)
    return memory.read(0, done)


class Reader:
    """Another process that reads pages by process_vm_readv(2), and waits in the midst of it."""

    def __init__(self, address: int, size: int) -> None:
        os.close(open_userfaultfd())  # skips the test where there is none
        parent = os.getpid()
        go, self._go = os.pipe()
        self._said, said = os.pipe()

        def work() -> None:
            os.close(self._go)
            uffd = open_userfaultfd()
            with HostMemory(size) as memory:
                register_range(uffd, memory.userspace_addr, size, MISSING)

                def serve() -> None:
                    select.select([uffd], [], [])
                    os.read(uffd, 32)
                    os.write(said, b"x")
                    os.read(go, 1)
                    os.close(uffd)  # from now on the memory is ordinary

                threading.Thread(target=serve, daemon=True).start()
                os.write(said, _read(parent, address, size, memory))

        self._pid = _fork(work)
        os.close(go)
        os.close(said)
        if os.read(self._said, 1) != b"x":
            self.content()
            raise AssertionError("the process has read without a fault")

    def content(self) -> bytes:
        """What it has read; the process has ended afterwards."""
        found = b""
        if self._pid:
            os.close(self._go)
            with os.fdopen(self._said, "rb") as said:
                found = said.read()
            _, status = os.waitpid(self._pid, 0)
            self._pid = 0
            assert status == 0
        return found


@contextmanager
def in_another_process(address: int, size: int = PAGE) -> Iterator[Reader]:
    """Another process is reading the pages: it has them pinned."""
    reader = Reader(address, size)
    try:
        yield reader
    finally:
        reader.content()


class Reads:
    """What a process that reads all the time has counted."""

    def __init__(self, counts: mmap.mmap) -> None:
        self._counts = memoryview(counts).cast("Q")

    def count(self, kind: int) -> None:
        self._counts[kind] += 1

    @property
    def whole(self) -> int:
        """Reads of all bytes."""
        return self._counts[0]

    @property
    def part(self) -> int:
        """Reads of the bytes before a page that can't be read."""
        return self._counts[1]

    @property
    def refused(self) -> int:
        """Reads that were EFAULT."""
        return self._counts[2]

    @property
    def wrong(self) -> int:
        """Reads of a byte that was never there."""
        return self._counts[3]


@contextmanager
def read_all_the_time(address: int, size: int, there: bytes) -> Iterator[Reads]:
    """Another process reads the range again and again; `there`: the bytes that may be in it."""
    parent = os.getpid()
    reads = Reads(mmap.mmap(-1, PAGE))

    def work() -> None:
        with HostMemory(size) as memory:
            while True:
                try:
                    data = _read(parent, address, size, memory)
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                    reads.count(2)
                    continue
                reads.count(0 if len(data) == size else 1)
                if data.translate(None, there):
                    reads.count(3)

    pid = _fork(work)
    try:
        yield reads
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "it has read until it was killed"
    assert reads.wrong == 0


#: Name -> a context in which pages are in use, and whose object can say what was read of them.
READERS: dict[str, Callable[[int, int], AbstractContextManager[Use]]] = {
    "vmsplice": in_a_pipe,
    "direct-write": in_a_direct_write,
    "process_vm_readv": in_another_process,
}
#: Name -> a context in which pages are pinned by this process.
PINS: dict[str, Callable[[int, int], AbstractContextManager[object]]] = {
    "io_uring": in_io_uring,
    "direct-write": in_a_direct_write,
    "direct-read": in_a_direct_read,
}
#: Name -> a context in which pages are in use.
USES: dict[str, Callable[[int, int], AbstractContextManager[object]]] = {**READERS, **PINS}
