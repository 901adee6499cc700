"""Asking a kernel for what it should refuse, and seeing what it answered."""

from __future__ import annotations

import errno as _errno
import faulthandler
import itertools
import os
import pickle
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmpriv import HostMemory, Vm, libc
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm

from .base import missing

if TYPE_CHECKING:
    from kvmpriv.fd import Fd

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE = 1, 2
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64
HOLE = PUNCH_HOLE | KEEP_SIZE
AT_FDCWD, AT_EMPTY_PATH, AT_SYMLINK_FOLLOW = -100, 0x1000, 0x400

#: x86-64's system calls that Python does not have, or does with a stat(2) before them.
NUMBERS = {
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "pread64": 17,
    "pwrite64": 18,
    "readv": 19,
    "writev": 20,
    "read": 0,
    "write": 1,
    "sendfile": 40,
    "fcntl": 72,
    "fsetxattr": 190,
    "fgetxattr": 193,
    "readahead": 187,
    "fadvise64": 221,
    "linkat": 265,
    "splice": 275,
    "sync_file_range": 277,
    "preadv": 295,
    "pwritev": 296,
    "syncfs": 306,
    "execveat": 322,
    "userfaultfd": 323,
    "copy_file_range": 326,
    "preadv2": 327,
    "pwritev2": 328,
}
#: An address at which nothing can be.
NOWHERE = 1 << 63


def rule(*ids: str) -> pytest.MarkDecorator:
    """The test holds a kernel to these rules: lower case, dotted."""
    return pytest.mark.rule(*ids)  # not before the conftest has said that there is such a mark


def errno_of(number: int) -> str:
    """An errno's name; "ok" for 0."""
    if number == _errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # Python calls it by its other name
    return _errno.errorcode.get(number, str(number)) if number else "ok"


def answer(call: Callable[[], Any]) -> str:
    """What the kernel says: "ok", or the name of the errno."""
    try:
        call()
    except OSError as error:
        return errno_of(error.errno or 0)
    return "ok"


def call(name: str, *arguments: int) -> int:
    """A system call by its name; OSError when it fails."""
    result = libc.syscall(NUMBERS[name], *arguments)
    if result < 0:
        raise libc.os_error(libc.last_errno(), name)
    return result


def fallocate(file: Fd | int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); OSError when it fails."""
    number = file if isinstance(file, int) else file.fileno()
    if libc.fallocate(number, mode, offset, length) < 0:
        raise libc.os_error(libc.last_errno(), "fallocate")


def address_of(buffer: Any) -> int:
    """Where a cffi object is."""
    return int(k.ffi.cast("uintptr_t", buffer))


# -- what can be tried on any file -----------------------------------------------------------------


def _with_buffer(name: str, *, length: int = 8, offset: int | None = 0) -> Callable[[int], Any]:
    def operation(fd: int) -> Any:
        buffer = k.ffi.new("char[8]")
        more = () if offset is None else (offset,)
        return call(name, fd, address_of(buffer), length, *more)

    return operation


def _vectored(name: str, *more: int) -> Callable[[int], Any]:
    def operation(fd: int) -> Any:
        buffer = k.ffi.new("char[8]")
        vector = k.ffi.new("__u64[2]", (address_of(buffer), 8))
        return call(name, fd, address_of(vector), 1, *more)

    return operation


def mapping(prot: int, flags: int, size: int = PAGE) -> Callable[[int], None]:
    """Maps the file, and unmaps it again if that worked."""

    def operation(fd: int) -> None:
        call("munmap", call("mmap", 0, size, prot, flags, fd, 0), size)

    return operation


def _between(name: str, *, out: bool, kind: str) -> Callable[[int], Any]:
    """Moves 8 bytes between the file and a pipe or another file."""

    def operation(fd: int) -> Any:
        if kind == "pipe":
            read_end, write_end = os.pipe()
            ends = [read_end, write_end]
            os.write(write_end, b"12345678")
            other = write_end if out else read_end
        else:
            other = os.memfd_create("other")
            ends = [other]
            os.pwrite(other, b"12345678", 0)
        try:
            if name == "sendfile":
                return call(name, *((other, fd) if out else (fd, other)), 0, 8)
            source, target = (fd, other) if out else (other, fd)
            return call(name, source, 0, target, 0, 8, 0)
        finally:
            for end in ends:
                os.close(end)

    return operation


def _epoll(fd: int) -> None:
    import select

    with select.epoll() as epoll:
        epoll.register(fd)


def _linkat(fd: int) -> None:
    paths = k.ffi.new("char[]", f"/proc/self/fd/{fd}".encode()), k.ffi.new("char[]", b"/tmp/linked")
    call(
        "linkat", AT_FDCWD, address_of(paths[0]), AT_FDCWD, address_of(paths[1]), AT_SYMLINK_FOLLOW
    )


def _fexecve(fd: int) -> None:
    def execute() -> None:
        empty = k.ffi.new("char[]", b"")
        call("execveat", fd, address_of(empty), 0, 0, AT_EMPTY_PATH)

    in_child(execute)


def _reopen(flags: int) -> Callable[[int], None]:
    return lambda fd: os.close(os.open(f"/proc/self/fd/{fd}", flags))


def _xattr(name: str) -> Callable[[int], Any]:
    def operation(fd: int) -> Any:
        key = k.ffi.new("char[]", b"user.kvmpriv")
        value = k.ffi.new("char[8]")
        return call(name, fd, address_of(key), address_of(value), 8, 0)

    return operation


def _flock(fd: int) -> None:
    import fcntl

    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _seals(request: int) -> Callable[[int], Any]:
    return lambda fd: call("fcntl", fd, request, 1 if request == 1033 else 0)


#: name -> what is done to the descriptor; OSError when the kernel refuses.
OPERATIONS: dict[str, Callable[[int], Any]] = {
    "read": _with_buffer("read", offset=None),
    "read.empty": _with_buffer("read", length=0, offset=None),
    "read.bad_pointer": lambda fd: call("read", fd, NOWHERE, 8),
    "write": _with_buffer("write", offset=None),
    "write.empty": _with_buffer("write", length=0, offset=None),
    "write.bad_pointer": lambda fd: call("write", fd, NOWHERE, 8),
    "readv": _vectored("readv"),
    "writev": _vectored("writev"),
    "pread": _with_buffer("pread64"),
    "pread.negative": _with_buffer("pread64", offset=-1),
    "pwrite": _with_buffer("pwrite64"),
    "pwrite.negative": _with_buffer("pwrite64", offset=-1),
    "preadv": _vectored("preadv", 0, 0),
    "pwritev": _vectored("pwritev", 0, 0),
    "preadv2.current": _vectored("preadv2", -1, -1, 0),
    "pwritev2.current": _vectored("pwritev2", -1, -1, 0),
    "lseek": lambda fd: call("lseek", fd, 0, os.SEEK_SET),
    "lseek.end": lambda fd: call("lseek", fd, 0, os.SEEK_END),
    "lseek.data": lambda fd: call("lseek", fd, 0, os.SEEK_DATA),
    "lseek.bad_whence": lambda fd: call("lseek", fd, 0, 77),
    "mmap.shared": mapping(PROT_READ | PROT_WRITE, MAP_SHARED),
    "mmap.shared.read": mapping(PROT_READ, MAP_SHARED),
    "mmap.private": mapping(PROT_READ | PROT_WRITE, MAP_PRIVATE),
    "mmap.private.read": mapping(PROT_READ, MAP_PRIVATE),
    "mmap.none": mapping(PROT_NONE, MAP_SHARED),
    "mmap.shared.exec": mapping(PROT_READ | PROT_EXEC, MAP_SHARED),
    "mmap.private.exec": mapping(PROT_READ | PROT_EXEC, MAP_PRIVATE),
    "sendfile.from": _between("sendfile", out=True, kind="file"),
    "sendfile.to": _between("sendfile", out=False, kind="file"),
    "splice.from": _between("splice", out=True, kind="pipe"),
    "splice.to": _between("splice", out=False, kind="pipe"),
    "copy_file_range.from": _between("copy_file_range", out=True, kind="file"),
    "copy_file_range.to": _between("copy_file_range", out=False, kind="file"),
    "linkat": _linkat,
    "epoll": _epoll,
    "fexecve": _fexecve,
    "xattr.set": _xattr("fsetxattr"),
    "xattr.get": _xattr("fgetxattr"),
    "seals.add": _seals(1033),
    "seals.get": _seals(1034),
    "fsync": os.fsync,
    "fdatasync": os.fdatasync,
    "open": _reopen(os.O_RDWR),
    "open.read": _reopen(os.O_RDONLY),
    "open.path": _reopen(os.O_PATH),
    "fchmod": lambda fd: os.fchmod(fd, 0o600),
    "fchown": lambda fd: os.fchown(fd, os.geteuid(), os.getegid()),
    "futimens": os.utime,
    "flock": _flock,
    "syncfs": lambda fd: call("syncfs", fd),
    "fadvise": lambda fd: call("fadvise64", fd, 0, PAGE, 4),
}


def operations(prefix: str, table: dict[str, str]) -> pytest.MarkDecorator:
    """Parametrizes a test by the operations in `table` (names separated by blanks -> answer)."""
    rows = [
        pytest.param(OPERATIONS[name], expected, id=name, marks=rule(f"{prefix}.{name}"))
        for expected, names in table.items()
        for name in names.split()
    ]
    return pytest.mark.parametrize(("operation", "expected"), rows)


# -- the arch hook ---------------------------------------------------------------------------------

#: The test vehicle's switch, read when a VM is made.
HOOK = Path("/sys/module/kvm/parameters/private_mem_testing")


@contextmanager
def hook(*, on: bool) -> Iterator[None]:
    """For the VMs made inside, the arch hook says `on`, where it can be told."""
    if not HOOK.exists():
        yield
        return
    before = HOOK.read_text()
    if (before.strip() == "Y") != on:
        if not os.access(HOOK, os.W_OK):
            missing("root", f"{HOOK} can't be written")
        HOOK.write_text("Y" if on else "N")
    try:
        yield
    finally:
        if HOOK.read_text() != before:
            HOOK.write_text(before)


# -- slots -----------------------------------------------------------------------------------------


class Slots:
    """Sets memory slots that differ from a good one in the fields that are named."""

    good: dict[str, int]

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.asked = 0

    def struct(self, **changes: int) -> Any:
        """The struct for the good slot with `changes`."""
        raise NotImplementedError

    request: int = k.KVM_SET_USER_MEMORY_REGION

    def set(self, **changes: int) -> str:
        """The kernel's answer to the good slot with `changes`."""
        self.asked += 1
        return errno_of(self.vm.ioctl_errno(self.request, self.struct(**changes)))

    def set_at(self, address: int) -> str:
        """The kernel's answer to the struct at an address."""
        self.asked += 1
        return errno_of(self.vm.ioctl_errno(self.request, address))

    def delete(self, **changes: int) -> str:
        return self.set(**{"memory_size": 0, **changes})

    def refuses(self, expected: str, *, twin: dict[str, int] | None = None, **changes: int) -> None:
        """The good slot with `changes` is refused; the twin, without them, is made and deleted."""
        assert self.set(**changes) == expected, changes
        self.accepts(**(twin or {}))

    def accepts(self, **changes: int) -> None:
        """The good slot with `changes` is made, and deleted again."""
        with self.held(**changes):
            pass

    @contextmanager
    def held(self, **changes: int) -> Iterator[None]:
        """The good slot with `changes` is there inside."""
        assert self.set(**changes) == "ok", changes
        yield
        same = {name: value for name, value in changes.items() if name in ("slot", "flags")}
        assert self.delete(**same) == "ok", changes


class RestrictedSlots(Slots):
    """v9: KVM_SET_USER_MEMORY_REGION with struct kvm_userspace_memory_region_ext."""

    def __init__(self, vm: Vm, file: Fd | int, userspace_addr: int) -> None:
        super().__init__(vm)
        self.good = {
            "slot": 3,
            "flags": rm.KVM_MEM_PRIVATE,
            "guest_phys_addr": 4 * GIB,
            "memory_size": 16 * PAGE,
            "userspace_addr": userspace_addr,
            "restricted_offset": 32 * PAGE,
            "restricted_fd": file if isinstance(file, int) else file.fileno(),
        }

    def struct(self, **changes: int) -> Any:
        struct = rm.ffi.new("struct kvm_userspace_memory_region_ext *")
        for name, value in {**self.good, **changes}.items():
            if name == "pad2":
                for at in range(14):
                    struct.pad2[at] = value
            elif name.startswith(("restricted_", "pad")):
                setattr(struct, name, value)
            else:
                setattr(struct.region, name, value)
        return struct


class GuestMemfdSlots(Slots):
    """Mainline: KVM_SET_USER_MEMORY_REGION2 with struct kvm_userspace_memory_region2."""

    request = gm.KVM_SET_USER_MEMORY_REGION2

    def __init__(self, vm: Vm, file: Fd | int, userspace_addr: int) -> None:
        super().__init__(vm)
        self.good = {
            "slot": 3,
            "flags": gm.KVM_MEM_GUEST_MEMFD,
            "guest_phys_addr": 4 * GIB,
            "memory_size": 16 * PAGE,
            "userspace_addr": userspace_addr,
            "guest_memfd_offset": 32 * PAGE,
            "guest_memfd": file if isinstance(file, int) else file.fileno(),
        }

    def struct(self, **changes: int) -> Any:
        struct = gm.ffi.new("struct kvm_userspace_memory_region2 *")
        for name, value in {**self.good, **changes}.items():
            if name == "pad2":
                for at in range(14):
                    struct.pad2[at] = value
            else:
                setattr(struct, name, value)
        return struct


#: What a range of a guest_memfd file that another slot has is refused with, one of them by kernel:
#: EINVAL, and EEXIST since commit 7ea987a90585.
FILE_OVERLAP = frozenset({"EINVAL", "EEXIST"})


class Edge:
    """A page, and behind it one that can't be read: structs that end where memory does."""

    def __init__(self) -> None:
        self.memory = HostMemory(2 * PAGE)
        call("mprotect", self.memory.userspace_addr + PAGE, PAGE, PROT_NONE)

    def put(self, struct: Any, readable: int) -> int:
        """Put the first `readable` bytes right before the edge; the struct's address."""
        data = bytes(k.ffi.buffer(struct))[:readable]
        self.memory.write(PAGE - readable, data)
        return self.memory.userspace_addr + PAGE - readable

    def close(self) -> None:
        self.memory.close()


# -- between the kernel's two looks at a struct ----------------------------------------------------


def set_with_late_flags(slots: Slots, late_flags: int, **changes: int) -> str:
    """The answer to a struct whose flags become `late_flags` after the kernel's first look.

    The flags are the first bytes of a page that is there, what precedes them is at the end of one
    that is not: reading the flags alone faults not, copying the struct does.  The thread that
    serves the fault (userfaultfd) changes the flags before the copy goes on.
    """
    try:
        uffd = call("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        missing("userfaultfd", str(error))
    data = bytes(k.ffi.buffer(slots.struct(**changes)))
    memory = HostMemory(2 * PAGE)
    source = HostMemory(PAGE)
    served: list[int] = []
    try:
        low = memory.userspace_addr
        _uffd(uffd, 0x3F, struct.pack("<QQQ", 0xAA, 0, 0))
        _uffd(uffd, 0x00, struct.pack("<QQQQ", low, PAGE, 1, 0))
        source.write(PAGE - 4, data[:4])
        memory.write(PAGE, data[4:])

        def serve() -> None:
            import select

            if not select.select([uffd], [], [], 20)[0]:
                return
            message = os.read(uffd, 32)
            served.append(struct.unpack_from("<Q", message, 16)[0] & -PAGE)
            memory.write(PAGE, struct.pack("<I", late_flags))
            _uffd(uffd, 0x03, struct.pack("<QQQQq", low, source.userspace_addr, PAGE, 0, 0))

        thread = threading.Thread(target=serve)
        thread.start()
        said = slots.set_at(low + PAGE - 4)
        thread.join()
        assert served == [low], "the copy must have waited for us"
        return said
    finally:
        os.close(uffd)
        memory.close()
        source.close()


def _uffd(fd: int, number: int, argument: bytes) -> None:
    buffer = k.ffi.new("char[]", argument)
    request = 3 << 30 | len(argument) << 16 | 0xAA << 8 | number
    if libc.ioctl(fd, request, address_of(buffer)) < 0:
        raise libc.os_error(libc.last_errno(), f"userfaultfd {number:#x}")


# -- other processes -------------------------------------------------------------------------------


def in_child(work: Callable[[], Any]) -> Any:
    """`work`'s result, or its OSError, from a forked process; a signal's death is an assertion."""
    status, result = child_status(work)
    assert os.WIFEXITED(status), f"killed by signal {os.WTERMSIG(status)}"
    if isinstance(result, BaseException):
        raise result
    return result


def child_status(work: Callable[[], Any]) -> tuple[int, Any]:
    """How a forked process ended (as os.wait says), and what `work` gave or raised."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # a death by signal may be what is asked for
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  # it is raised again in the parent
            result = error
        try:
            os.write(write_end, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    return status, pickle.loads(data) if data else None


@contextmanager
def in_cgroup() -> Iterator[Path]:
    """A new memory cgroup, for children to enter; what it still holds at the end is given up."""
    top = Path("/sys/fs/cgroup")
    try:
        if "memory" not in (top / "cgroup.subtree_control").read_text().split():
            missing("memory cgroup", "the memory controller is not enabled below the root")
        group = top / f"kvmpriv-{os.getpid()}-{time.monotonic_ns()}"
        group.mkdir()
    except OSError as error:
        missing("memory cgroup", str(error))
    try:
        yield group
    finally:
        assert eventually(lambda: answer(group.rmdir) != "EBUSY"), f"{group} is in use"


# -- races, and what must not take for ever -------------------------------------------------------


#: How many rounds of a race there are at least, however slow the machine.
ROUNDS = 12


#: How long a race goes on, in seconds, for what has to be seen of it.
PATIENCE = 60


def rounds(
    most: int, seconds: float = 4, least: int = ROUNDS, until: Callable[[], object] = lambda: True
) -> Iterator[int]:
    """0, 1, … below `most`, or until time is up and `least` rounds are over.

    And as many more as it takes for `until` to say that the race has been one: not for ever.
    """
    start = time.monotonic()
    for turn in itertools.count():
        late = time.monotonic() - start
        if turn >= most or (turn >= least and late > seconds):
            if until():
                return
            assert late < PATIENCE, f"not met in {turn} rounds"
        yield turn


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[list[int]]:
    """`work` goes on in another thread, again and again; the list says how often it was done."""
    over = threading.Event()
    done, errors = [0], []

    def repeat() -> None:
        try:
            while not over.is_set():
                work()
                done[0] += 1
                time.sleep(0)  # whoever waits for a lock that `work` takes may have it
        except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
            errors.append(error)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join(60)
    assert not thread.is_alive(), "stuck"
    if errors:
        raise errors[0]


class CpuTimeError(Exception):
    """What was to end soon has not."""


@contextmanager
def within_cpu_time(seconds: float) -> Iterator[None]:
    """CpuTimeError when more CPU time than that is used inside; for the main thread.

    A vCPU that spins in the kernel uses it up; one on a slow machine does not.
    """

    def stop(*_: object) -> None:
        raise CpuTimeError(f"{seconds} s of CPU time are gone")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# -- failures on request ---------------------------------------------------------------------------

FAULT_INJECTION = Path("/sys/kernel/debug/failslab")


def require_fault_injection() -> None:
    if not Path("/proc/self/make-it-fail").exists() or not os.access(FAULT_INJECTION, os.W_OK):
        missing("fault injection", "no CONFIG_FAULT_INJECTION, CONFIG_FAILSLAB, debugfs, or root")


@contextmanager
def fault_injection(**settings: str) -> Iterator[None]:
    """Allocations may be made to fail inside, whatever their size and kind; quietly."""
    require_fault_injection()
    wanted = {"ignore-gfp-wait": "N", "verbose": "0", **settings}
    both = [(FAULT_INJECTION / name, value) for name, value in wanted.items()]
    pages = FAULT_INJECTION.parent / "fail_page_alloc"
    both += [(pages / name, wanted[name]) for name in ("ignore-gfp-wait", "verbose")]
    both += [(pages / "ignore-gfp-highmem", "N"), (pages / "min-order", "0")]
    before = [(path, path.read_text()) for path, _ in both]
    try:
        for path, value in both:
            path.write_text(value)
        yield
    finally:
        for path, text in before:
            path.write_text(text)


@contextmanager
def failing_allocations() -> Iterator[None]:
    """In this thread no small allocation of the kernel's own succeeds inside."""
    more = {"task-filter": "Y", "probability": "100", "interval": "1", "times": "1000000"}
    with fault_injection(**more):
        # Opened before, since to open it would fail.
        marked = os.open(f"/proc/self/task/{threading.get_native_id()}/make-it-fail", os.O_RDWR)
        try:
            os.write(marked, b"1")
            yield
        finally:
            os.write(marked, b"0")
            os.close(marked)


class FailNth:
    """Makes the n-th allocation in this thread fail, from the next call on: fail-nth of /proc."""

    def __init__(self) -> None:
        self._fd = os.open(f"/proc/self/task/{threading.get_native_id()}/fail-nth", os.O_RDWR)

    def start(self, number: int) -> None:
        os.pwrite(self._fd, b"%d" % number, 0)

    def stop(self) -> bool:
        """Whether the failure has been injected; from now on there is none."""
        left = os.pread(self._fd, 16, 0)
        os.pwrite(self._fd, b"0", 0)
        return int(left) == 0

    def close(self) -> None:
        os.close(self._fd)


# -- what the kernel holds -------------------------------------------------------------------------


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"no {name} in /proc/meminfo")


#: What is allocated to be seen in /proc/meminfo, and how far the counters may be off.
BIG, SLACK = 16 * MIB, 4 * MIB


class Unevictable:
    """How much unevictable memory there is more than there was: pages of private files."""

    def __init__(self) -> None:
        self.before = meminfo("Unevictable")

    def is_about(self, size: int) -> bool:
        """Whether it is `size` bytes, waiting for delayed work where it is not."""
        deadline = time.monotonic() + 5
        while abs(meminfo("Unevictable") - self.before - size) > SLACK:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def vms_alive() -> set[str]:
    """The VMs that the kernel has, as debugfs names them."""
    folder = Path("/sys/kernel/debug/kvm")
    if not os.access(folder, os.R_OK):
        missing("debugfs", "/sys/kernel/debug/kvm can't be read")
    return {name for name in os.listdir(folder) if name[0].isdigit()}


def eventually(check: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether `check` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def files_open() -> int:
    """How many files the whole system has open."""
    return int(Path("/proc/sys/fs/file-nr").read_text().split()[0])
