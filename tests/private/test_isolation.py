"""Isolation by every means that the host has: it can't read or change private memory.

Each attempt has a twin: the same attempt on shared memory succeeds.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmpriv import HostMemory, Kvm, libc, private
from kvmpriv.cdefs import kvm as k

from .support.arch_hook import hook
from .support.kernels import require_scripts_vm
from .support.processes import child_status, in_child
from .support.requirements import missing
from .support.rig import Marker, Rig, two_backings
from .support.rules import rule
from .support.syscalls import (
    GIB,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_READ,
    PROT_WRITE,
    address_of,
    answer,
    call,
)

if TYPE_CHECKING:
    from kvmpriv.private import PrivateAbi

pytestmark = [pytest.mark.usefixtures("no_leak"), two_backings]

PAGES = 16
SIZE = PAGES * PAGE
#: All different, so that a wrong one is noticed.
GPA, OFFSET, MEMORY_OFFSET = 4 * GIB + 3 * PAGE, 5 * PAGE, 2 * PAGE
#: The offset of the page that is made shared, and of the one with the private marker.
SHARED, PRIVATE = 3 * PAGE, 7 * PAGE
#: The fill byte of the rest of private memory.
FILLED = 0x33
#: The offset of a marker in its page.
AT = 40


class Scene:
    """A slot with one shared page; a marker is in the shared page, another in a private page.

    `host` is what the host has put at the private page's place; it is all that it may find there.
    """

    def __init__(self, rig: Rig, *, fd: int = -1) -> None:
        self.rig = rig
        self.guest = rig.guest
        self.memory = rig.memory(MEMORY_OFFSET + SIZE + PAGE, fd=fd)
        self.file = rig.file(OFFSET + SIZE + PAGE)
        rig.bind(GPA, SIZE, self.file, OFFSET, memory=self.memory, memory_offset=MEMORY_OFFSET)
        self.host = os.urandom(Marker.size)
        self.memory.write(MEMORY_OFFSET + PRIVATE + AT, self.host)
        self.guest.fill(GPA, FILLED, SIZE)
        rig.convert(GPA + SHARED, PAGE, private=False)
        self.shared, self.private = Marker(), Marker()
        self.shared.write(self.guest, GPA + SHARED + AT)
        self.private.write(self.guest, GPA + PRIVATE + AT)

    @property
    def address(self) -> int:
        """The address of the slot's shared side in this process."""
        return self.memory.userspace_addr + MEMORY_OFFSET

    def judge(self, seen: bytes) -> None:
        """Check what a read of the slot's shared side found."""
        assert len(seen) == SIZE
        assert seen.find(self.shared.value()) == SHARED + AT, "the twin, in shared memory"
        assert seen.find(self.host) == PRIVATE + AT, "the host finds its own marker"
        assert seen.find(self.private.value()) == -1
        self.is_untouched()

    def is_untouched(self) -> None:
        """Whether the guest reads its private page as it wrote it."""
        page = self.guest.read(GPA + PRIVATE, PAGE)
        filled = bytes([FILLED]) * PAGE
        assert page == filled[:AT] + self.private.value() + filled[AT + Marker.size :]


@pytest.fixture
def scene(rig: Rig) -> Scene:
    return Scene(rig)


# -- the host's mapping of the slot, by every way to it --------------------------------------------


def _vector(address: int, size: int) -> Any:
    """A struct iovec."""
    return k.ffi.new("__u64[2]", (address, size))


def _process_vm(number: int, pid: int, address: int, buffer: Any) -> int:
    local, remote = _vector(address_of(buffer), len(buffer)), _vector(address, len(buffer))
    done = libc.syscall(number, pid, address_of(local), 1, address_of(remote), 1)
    if done < 0:
        raise libc.os_error(-done, "process_vm_readv/writev")
    return done


def _by_process_vm_readv(pid: int, address: int) -> bytes:
    buffer = k.ffi.new("char[]", SIZE)
    assert _process_vm(310, pid, address, buffer) == SIZE
    return bytes(k.ffi.buffer(buffer))


def _by_process_vm_writev(pid: int, address: int, data: bytes) -> None:
    assert _process_vm(311, pid, address, k.ffi.from_buffer("char[]", data)) == len(data)


def _by_proc_mem(pid: int, address: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as mem:
        return os.pread(mem.fileno(), SIZE, address)


def _into_proc_mem(pid: int, address: int, data: bytes) -> None:
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as mem:
        assert os.pwrite(mem.fileno(), data, address) == len(data)


PTRACE_PEEKDATA, PTRACE_POKEDATA, PTRACE_DETACH = 2, 5, 17
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
WALL = 0x40000000


@contextmanager
def _traced(pid: int) -> Iterator[None]:
    """The first thread of the process, stopped and traced by this process."""

    def ptrace(request: int) -> None:
        if (result := libc.syscall(101, request, pid, 0, 0)) < 0:
            raise libc.os_error(-result, f"ptrace({request:#x})")

    ptrace(PTRACE_SEIZE)
    ptrace(PTRACE_INTERRUPT)
    _, status = os.waitpid(pid, WALL)
    assert os.WIFSTOPPED(status)
    try:
        yield
    finally:
        ptrace(PTRACE_DETACH)


def _by_ptrace(pid: int, address: int) -> bytes:
    words = k.ffi.new("__u64[]", SIZE // 8)
    at = address_of(words)
    with _traced(pid):
        for number in range(0, SIZE, 8):
            done = libc.syscall(101, PTRACE_PEEKDATA, pid, address + number, at + number)
            if done < 0:
                raise libc.os_error(-done, "PTRACE_PEEKDATA")
    return bytes(k.ffi.buffer(words))


def _poke(pid: int, address: int, data: bytes) -> None:
    with _traced(pid):
        for number, (word,) in enumerate(struct.iter_unpack("<q", data)):
            if (done := libc.syscall(101, PTRACE_POKEDATA, pid, address + number * 8, word)) < 0:
                raise libc.os_error(-done, "PTRACE_POKEDATA")


def _by_write(pid: int, address: int) -> bytes:
    """write(2) from the mapping: the kernel reads it."""
    fd = os.memfd_create("copy")
    try:
        assert call("write", fd, address, SIZE) == SIZE
        return os.pread(fd, SIZE, 0)
    finally:
        os.close(fd)


def _by_read(pid: int, address: int, data: bytes) -> None:
    """read(2) into the mapping: the kernel writes it."""
    fd = os.memfd_create("copy")
    try:
        os.pwrite(fd, data, 0)
        assert call("pread64", fd, address, len(data), 0) == len(data)
    finally:
        os.close(fd)


def _by_vmsplice(pid: int, address: int) -> bytes:
    """A pipe gets the pages of the mapping themselves."""
    read_end, write_end = os.pipe()
    try:
        assert call("fcntl", write_end, 1031, SIZE) >= SIZE  # F_SETPIPE_SZ
        vector = _vector(address, SIZE)
        assert libc.syscall(278, write_end, address_of(vector), 1, 0) == SIZE
        return os.read(read_end, SIZE)
    finally:
        os.close(read_end)
        os.close(write_end)


def _as_it_is(pid: int, address: int) -> bytes:
    return bytes(k.ffi.buffer(k.ffi.cast("char *", address), SIZE))


def _store(pid: int, address: int, data: bytes) -> None:
    k.ffi.buffer(k.ffi.cast("char *", address), len(data))[:] = data


def _elsewhere(look: Callable[..., Any]) -> Callable[..., Any]:
    """Reads the mapping from another process."""
    return lambda pid, *more: in_child(lambda: look(pid, *more))


LOOKS: dict[str, Callable[[int, int], bytes]] = {
    "mapping": _as_it_is,
    "fork": _elsewhere(_as_it_is),
    "write": _by_write,
    "vmsplice": _by_vmsplice,
    "proc-mem": _by_proc_mem,
    "proc-mem.other": _elsewhere(_by_proc_mem),
    "process_vm_readv": _by_process_vm_readv,
    "process_vm_readv.other": _elsewhere(_by_process_vm_readv),
    "ptrace": _elsewhere(_by_ptrace),
}

CHANGES: dict[str, Callable[[int, int, bytes], None]] = {
    "mapping": _store,
    "read": _by_read,
    "proc-mem": _into_proc_mem,
    "proc-mem.other": _elsewhere(_into_proc_mem),
    "process_vm_writev": _by_process_vm_writev,
    "process_vm_writev.other": _elsewhere(_by_process_vm_writev),
    "ptrace": _elsewhere(_poke),
}


def ways(prefix: str, table: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by the ways in a table, one rule each."""
    rows = [
        pytest.param(way, id=name, marks=rule(f"{prefix}.{name}")) for name, way in table.items()
    ]
    return pytest.mark.parametrize("way", rows)


def may_trace(pid: int) -> bool:
    """Whether a child process may read this process's memory at all."""

    def attach() -> None:
        with _traced(pid):
            pass

    return answer(lambda: in_child(attach)) == "ok"


@pytest.fixture
def traceable(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    if ("ptrace" in name or "other" in name) and not may_trace(os.getpid()):
        missing("ptrace", "other processes of this user may not trace this one")


@ways("private.isolation.read", LOOKS)
@pytest.mark.known_defect("private-prefetch")
@pytest.mark.usefixtures("traceable")
def test_looks_at_the_mapping(scene: Scene, way: Callable[[int, int], bytes]) -> None:
    """The host finds the shared side at userspace_addr, whichever way it reads."""
    scene.judge(way(os.getpid(), scene.address))


@ways("private.isolation.write", CHANGES)
@pytest.mark.known_defect("private-prefetch")
@pytest.mark.usefixtures("traceable")
def test_changes_of_the_mapping(scene: Scene, way: Callable[[int, int, bytes], None]) -> None:
    """The host's writes reach the guest only in shared pages."""
    new = os.urandom(SIZE)
    way(os.getpid(), scene.address, new)
    assert scene.guest.read(GPA + SHARED, PAGE) == new[SHARED : SHARED + PAGE], "the twin"
    scene.is_untouched()
    for page in range(PAGES):
        if page * PAGE not in (SHARED, PRIVATE):
            assert scene.guest.span(GPA + page * PAGE, FILLED, PAGE) == PAGE, page
    scene.rig.convert(GPA + PRIVATE, PAGE, private=False)
    assert scene.guest.read(GPA + PRIVATE, PAGE) == new[PRIVATE : PRIVATE + PAGE], "it was there"


# -- the file --------------------------------------------------------------------------------------


def _read_into(name: str, fd: int, *, offset: bool) -> bytes:
    buffer = k.ffi.new("char[]", SIZE)
    done = call(name, fd, address_of(buffer), SIZE, *((OFFSET,) if offset else ()))
    return bytes(k.ffi.buffer(buffer))[:done]


def _readv_into(name: str, fd: int, *offset: int) -> bytes:
    buffer = k.ffi.new("char[]", SIZE)
    vector = _vector(address_of(buffer), SIZE)
    done = call(name, fd, address_of(vector), 1, *offset)
    return bytes(k.ffi.buffer(buffer))[:done]


def _mapped(flags: int) -> Callable[[int], bytes]:
    def look(fd: int) -> bytes:
        at = call("mmap", 0, SIZE, PROT_READ, flags, fd, OFFSET)
        try:
            return bytes(k.ffi.buffer(k.ffi.cast("char *", at), SIZE))
        finally:
            call("munmap", at, SIZE)

    return look


@contextmanager
def _large_pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    try:
        assert call("fcntl", write_end, 1031, SIZE) >= SIZE
        yield read_end, write_end
    finally:
        os.close(read_end)
        os.close(write_end)


def _spliced(fd: int) -> bytes:
    offset = k.ffi.new("__u64 *", OFFSET)
    with _large_pipe() as (read_end, write_end):
        done = call("splice", fd, address_of(offset), write_end, 0, SIZE, 0)
        return os.read(read_end, done)


def _sent(fd: int, offset: int = 0) -> bytes:
    target = os.memfd_create("target")
    try:
        done = call("sendfile", target, fd, offset, SIZE)
        return os.pread(target, done, 0)
    finally:
        os.close(target)


def _sent_from_offset(fd: int) -> bytes:
    offset = k.ffi.new("__u64 *", OFFSET)
    return _sent(fd, address_of(offset))


def _copied(fd: int) -> bytes:
    offset = k.ffi.new("__u64 *", OFFSET)
    target = os.memfd_create("target")
    try:
        done = call("copy_file_range", fd, address_of(offset), target, 0, SIZE, 0)
        return os.pread(target, done, 0)
    finally:
        os.close(target)


def _reopened(fd: int) -> bytes:
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        return os.pread(other, SIZE, OFFSET)
    finally:
        os.close(other)


def _mapped_into_slot(fd: int) -> bytes:
    """Maps the file as the shared side of a slot."""
    with HostMemory(SIZE, fd=fd, offset=OFFSET) as memory:
        return memory.read(0, SIZE)


#: Name -> how to read the file from OFFSET on; ways that use the file position come last.
FILE_LOOKS: dict[str, Callable[[int], bytes]] = {
    "pread": lambda fd: _read_into("pread64", fd, offset=True),
    "preadv": lambda fd: _readv_into("preadv", fd, OFFSET),
    "preadv2": lambda fd: _readv_into("preadv2", fd, OFFSET, 0, 0),
    "mmap.shared": _mapped(MAP_SHARED),
    "mmap.private": _mapped(MAP_PRIVATE),
    "mmap.slot": _mapped_into_slot,
    "splice": _spliced,
    "sendfile.offset": _sent_from_offset,
    "copy_file_range": _copied,
    "reopen": _reopened,
    "sendfile": _sent,
    "read": lambda fd: _read_into("read", fd, offset=False),
    "readv": lambda fd: _readv_into("readv", fd),
}


def _write_from(name: str, fd: int, data: bytes, *, offset: bool) -> int:
    buffer = k.ffi.from_buffer("char[]", data)
    return call(name, fd, address_of(buffer), len(data), *((OFFSET,) if offset else ()))


def _writev_from(name: str, fd: int, data: bytes, *offset: int) -> int:
    buffer = k.ffi.from_buffer("char[]", data)
    vector = _vector(address_of(buffer), len(data))
    return call(name, fd, address_of(vector), 1, *offset)


def _map_and_store(fd: int, data: bytes) -> int:
    at = call("mmap", 0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, OFFSET)
    try:
        k.ffi.buffer(k.ffi.cast("char *", at), SIZE)[:] = data
    finally:
        call("munmap", at, SIZE)
    return SIZE


def _splice_to(fd: int, data: bytes) -> int:
    offset = k.ffi.new("__u64 *", OFFSET)
    with _large_pipe() as (read_end, write_end):
        os.write(write_end, data)
        return call("splice", read_end, 0, fd, address_of(offset), SIZE, 0)


def _give_to(fd: int, data: bytes) -> int:
    """vmsplice gives pages to a pipe, splice moves them into the file."""
    offset = k.ffi.new("__u64 *", OFFSET)
    with mmap.mmap(-1, SIZE) as pages, _large_pipe() as (read_end, write_end):
        pages[:] = data
        pointer = k.ffi.from_buffer("char[]", pages)
        vector = _vector(address_of(pointer), SIZE)
        assert libc.syscall(278, write_end, address_of(vector), 1, 8) == SIZE  # SPLICE_F_GIFT
        k.ffi.release(pointer)
        return call("splice", read_end, 0, fd, address_of(offset), SIZE, 1)  # SPLICE_F_MOVE


def _send_to(fd: int, data: bytes) -> int:
    """sendfile(2) writes at the file position: OFFSET, if lseek(2) can set it."""
    source = os.memfd_create("source")
    try:
        os.pwrite(source, data, 0)
        done, offset = 0, k.ffi.new("__u64 *", 0)
        while done < SIZE:
            done += call("sendfile", fd, source, address_of(offset), SIZE - done)
        return done
    finally:
        os.close(source)


def _copy_to(fd: int, data: bytes) -> int:
    offset = k.ffi.new("__u64 *", OFFSET)
    source = os.memfd_create("source")
    try:
        os.pwrite(source, data, 0)
        return call("copy_file_range", source, 0, fd, address_of(offset), SIZE, 0)
    finally:
        os.close(source)


def _vmsplice_to(fd: int, data: bytes) -> int:
    buffer = k.ffi.from_buffer("char[]", data)
    vector = _vector(address_of(buffer), len(data))
    done = libc.syscall(278, fd, address_of(vector), 1, 0)
    if done < 0:
        raise libc.os_error(-done, "vmsplice")
    return done


FILE_CHANGES: dict[str, Callable[[int, bytes], int]] = {
    "pwrite": lambda fd, data: _write_from("pwrite64", fd, data, offset=True),
    "pwritev": lambda fd, data: _writev_from("pwritev", fd, data, OFFSET),
    "pwritev2": lambda fd, data: _writev_from("pwritev2", fd, data, OFFSET, 0, 0),
    "mmap": _map_and_store,
    "splice": _splice_to,
    "vmsplice-gift": _give_to,
    "copy_file_range": _copy_to,
    "sendfile": _send_to,
    "write": lambda fd, data: _write_from("write", fd, data, offset=False),
    "writev": lambda fd, data: _writev_from("writev", fd, data),
}

#: The errno of each way to read or write a private file, by ABI.
REFUSALS = {
    "restrictedmem": {
        "EINVAL": "read readv write writev splice vmsplice-gift sendfile",
        "ESPIPE": "pread preadv preadv2 pwrite pwritev pwritev2 sendfile.offset",
        "ENODEV": "mmap mmap.shared mmap.private mmap.slot",
        "EXDEV": "copy_file_range",
        "ENXIO": "reopen",
    },
    "guest_memfd": {
        "EINVAL": "read readv write writev splice vmsplice-gift sendfile",
        "ESPIPE": "pread preadv preadv2 pwrite pwritev pwritev2 sendfile.offset",
        "ENODEV": "mmap mmap.shared mmap.private mmap.slot",
        "EXDEV": "copy_file_range",
        "ENXIO": "reopen",
    },
}


def refusal(abi: PrivateAbi, name: str) -> str:
    return next(errno for errno, names in REFUSALS[abi.name].items() if name in names.split())


@contextmanager
def twin() -> Iterator[int]:
    """A file for shared memory, which the host can read and write: the twin."""
    fd = os.memfd_create("twin")
    try:
        os.ftruncate(fd, OFFSET + SIZE + PAGE)
        os.lseek(fd, OFFSET, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@rule(*(f"private.isolation.file.{name}" for name in FILE_LOOKS))
@pytest.mark.known_defect("fstat")  # Python's mmap calls fstat
def test_looks_at_the_file(rig: Rig) -> None:
    """No way to read the file returns a private page; the twin: each returns a shared one."""
    scene = Scene(rig)
    found, said = {}, {}
    with twin() as fd, HostMemory(SIZE, fd=fd, offset=OFFSET) as shared:
        slot = rig.vm.map(shared, 8 * GIB)
        scene.private.write(scene.guest, 8 * GIB + PRIVATE + AT)
        for name, look in FILE_LOOKS.items():
            os.lseek(fd, OFFSET, os.SEEK_SET)
            found[name] = look(fd).find(scene.private.value())
            said[name] = answer(lambda: look(scene.file.fileno()))  # noqa: B023
        slot.delete()
    assert found == dict.fromkeys(FILE_LOOKS, PRIVATE + AT), "the twin"
    assert said == {name: refusal(rig.abi, name) for name in FILE_LOOKS}
    scene.is_untouched()


@rule(*(f"private.isolation.file.change.{name}" for name in FILE_CHANGES))
@pytest.mark.known_defect("fstat")  # Python's mmap calls fstat
def test_changes_of_the_file(rig: Rig) -> None:
    """No way to write the file changes a private page; the twin: each changes a shared one."""
    scene = Scene(rig)
    said = {}
    with twin() as fd, HostMemory(SIZE, fd=fd, offset=OFFSET) as shared:
        slot = rig.vm.map(shared, 8 * GIB)
        for name, change in FILE_CHANGES.items():
            new = os.urandom(SIZE)
            os.lseek(fd, OFFSET, os.SEEK_SET)
            assert change(fd, new) == SIZE, name
            assert scene.guest.read(8 * GIB, SIZE) == new, f"the twin, by {name}"
            said[name] = answer(lambda: change(scene.file.fileno(), new))  # noqa: B023
            scene.is_untouched()
        slot.delete()
    assert said == {name: refusal(rig.abi, name) for name in FILE_CHANGES}


@rule("private.isolation.file.vmsplice")
def test_vmsplice_to_the_file(scene: Scene) -> None:
    """The file is not a pipe: vmsplice(2) is EBADF in both directions; the twin, a pipe, works."""
    data = os.urandom(PAGE)
    with _large_pipe() as (read_end, write_end):
        assert _vmsplice_to(write_end, data) == PAGE
        assert os.read(read_end, PAGE) == data
    assert answer(lambda: _vmsplice_to(scene.file.fileno(), data)) == "EBADF"
    scene.is_untouched()


# -- a core dump -----------------------------------------------------------------------------------


class Core:
    """A core dump: an ELF file with the process's memory in its PT_LOAD segments."""

    def __init__(self, data: bytes) -> None:
        assert data[:4] == b"\x7fELF"
        self.data = data
        (table,) = struct.unpack_from("<Q", data, 32)
        (count,) = struct.unpack_from("<H", data, 56)
        self.segments = [
            struct.unpack_from("<IIQQQQQQ", data, table + 56 * number) for number in range(count)
        ]

    def read(self, address: int, size: int) -> bytes:
        for kind, _, offset, start, _, in_file, _, _ in self.segments:
            if kind == 1 and start <= address and address + size <= start + in_file:
                at = offset + address - start
                return self.data[at : at + size]
        raise AssertionError(f"{address:#x} is not in the dump")


CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


@contextmanager
def cores_in(folder: Path) -> Iterator[None]:
    """Sends core dumps to `folder`, which is the current directory meanwhile."""
    here, before = Path.cwd(), CORE_PATTERN.read_text()
    if before.startswith(("|", "/")):
        if "KVMPRIV_VM" not in os.environ or not os.access(CORE_PATTERN, os.W_OK):
            missing("core-dumps", f"{CORE_PATTERN} takes them away: {before.strip()}")
        CORE_PATTERN.write_text("core")
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        if CORE_PATTERN.read_text() != before:
            CORE_PATTERN.write_text(before)


@rule("private.isolation.core-dump")
@pytest.mark.known_defect("private-prefetch")
@pytest.mark.usefixtures("make_rig")
def test_core_dump(request: pytest.FixtureRequest) -> None:
    """A core dump of the process that has the VM contains the shared side and no private page."""
    abi = private.ABIS[request.node.callspec.params["make_rig"]]
    _, limit = resource.getrlimit(resource.RLIMIT_CORE)
    if limit == 0:
        missing("core-dumps", "RLIMIT_CORE allows none")
    read_end, write_end = os.pipe()
    # Made before the fork, so that the child has the halves of the markers, too.
    shared, hidden, host = Marker(), Marker(), os.urandom(16).hex().encode()

    def die() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
        Path("/proc/self/coredump_filter").write_text("0x7f")
        with ExitStack() as stack, Kvm() as kvm:
            with hook(on=True):
                vm = stack.enter_context(abi.create_vm(kvm))
            scene = Scene(Rig(stack, vm, kvm))
            scene.memory.write(MEMORY_OFFSET + PRIVATE + AT, host)
            shared.write(scene.guest, GPA + SHARED + AT)
            hidden.write(scene.guest, GPA + PRIVATE + AT)
            assert hidden.is_at(scene.guest, GPA + PRIVATE + AT)
            os.write(write_end, scene.address.to_bytes(8, "little"))
            os.kill(os.getpid(), signal.SIGABRT)

    with tempfile.TemporaryDirectory() as name, cores_in(Path(name)):
        status, error = child_status(die)
        assert os.WIFSIGNALED(status), error
        assert os.WTERMSIG(status) == signal.SIGABRT
        assert os.WCOREDUMP(status)
        (dumped,) = Path(name).iterdir()
        core = Core(dumped.read_bytes())
    address = int.from_bytes(os.read(read_end, 8), "little")
    os.close(read_end)
    os.close(write_end)
    seen = core.read(address, SIZE)
    assert seen.find(shared.value()) == SHARED + AT, "the twin, in shared memory"
    assert seen.find(host) == PRIVATE + AT, "the host's own marker"
    assert core.data.count(shared.value()) == 1
    assert core.data.find(hidden.value()) == -1


# -- the kernel's memory: the page is hidden, not gone -------------------------------------------


class Kcore:
    """/proc/kcore: the memory of the machine, by physical address."""

    def __init__(self) -> None:
        self.fd = os.open("/proc/kcore", os.O_RDONLY)
        head = os.pread(self.fd, 64, 0)
        (table,) = struct.unpack_from("<Q", head, 32)
        (count,) = struct.unpack_from("<H", head, 56)
        headers = os.pread(self.fd, 56 * count, table)
        #: (physical address, size, offset in the file) of the memory in the direct map
        self.ram = []
        for number in range(count):
            kind, _, offset, virtual, physical, size, _, _ = struct.unpack_from(
                "<IIQQQQQQ", headers, 56 * number
            )
            # The kernel's image is mapped twice; vmalloc addresses have no fixed physical address.
            if kind == 1 and physical != (1 << 64) - 1 and virtual < 0xFFFFFFFF80000000:
                self.ram.append((physical, size, offset))

    def read(self, physical: int, size: int) -> bytes:
        for start, length, offset in self.ram:
            if start <= physical and physical + size <= start + length:
                return os.pread(self.fd, size, offset + physical - start)
        raise AssertionError(f"no memory at {physical:#x}")

    def find(self, what: bytes, likely: Collection[int]) -> Iterator[int]:
        """The physical addresses of `what`, which is within a page; `likely` pages first."""
        step = 1 << 20
        chunks = [
            (start + at, min(step, length - at), offset + at)
            for start, length, offset in self.ram
            for at in range(0, length, step)
        ]
        chunks.sort(key=lambda chunk: min(abs(chunk[0] + step // 2 - one) for one in likely))
        buffer = bytearray(step)
        for physical, size, offset in chunks:
            done = os.preadv(self.fd, [memoryview(buffer)[:size]], offset)
            at = buffer.find(what, 0, done)
            while at >= 0:
                yield physical + at
                at = buffer.find(what, at + 1, done)

    def close(self) -> None:
        os.close(self.fd)


def frames(address: int, size: int) -> list[int]:
    """The page frame numbers of a range of this process; only root can read them."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), size // PAGE * 8, address // PAGE * 8)
    words = (word for (word,) in struct.iter_unpack("<Q", entries))
    return [word & (1 << 55) - 1 for word in words if word >> 63]


def frames_of_this_process() -> set[int]:
    found: set[int] = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if end < 1 << 63:  # not vsyscall, which is the kernel's
            found.update(frames(start, end - start))
    return found


@rule("private.isolation.hidden-not-gone")
@pytest.mark.known_defect("private-prefetch")
def test_found_in_the_kernels_memory(scene: Scene) -> None:
    """/proc/kcore contains the private page: it is hidden from this process, not encrypted."""
    require_scripts_vm("all memory is searched")
    if os.geteuid():
        missing("root", "/proc/kcore can't be read")
    # KVM allocated struct kvm_run from the same pool of pages.
    likely = [frame * PAGE for frame in frames(address_of(scene.guest.vcpu.kvm_run), 2 * PAGE)]
    assert likely
    assert all(likely), "page frame numbers can't be read"
    scene.judge(scene.memory.read(MEMORY_OFFSET, SIZE))
    own = frames_of_this_process()
    kcore = Kcore()
    try:
        for found in kcore.find(scene.private.value(), likely):
            if found // PAGE in own or found % PAGE != AT:
                continue  # this process's own copy of what is searched for
            # Is it the page itself or a copy?  A write of the guest changes only the page.
            scene.guest.store(GPA + PRIVATE, 8, number := int.from_bytes(os.urandom(8), "little"))
            if kcore.read(found - AT, 8) == number.to_bytes(8, "little"):
                break
        else:
            pytest.fail("the marker is nowhere in the machine's memory")
        seen = kcore.read(found - AT, PAGE)
    finally:
        kcore.close()
    assert seen[AT : AT + Marker.size] == scene.private.value()
    assert seen == scene.guest.read(GPA + PRIVATE, PAGE)
    assert found // PAGE not in frames_of_this_process()
