"""v9: memfd_restricted(2) and every operation on its file."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvmpriv import libc
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.private.restrictedmem import RestrictedMem

from .support.accounting import BIG, Unevictable, meminfo
from .support.file_operations import OPERATIONS as ALL_OPERATIONS
from .support.file_operations import operations
from .support.processes import child_status, in_child
from .support.requirements import missing
from .support.rules import rule
from .support.syscalls import (
    COLLAPSE,
    HOLE,
    INSERT,
    KEEP_SIZE,
    MIB,
    PAGE,
    PUNCH_HOLE,
    UNSHARE,
    ZERO,
    answer,
    fallocate,
)

pytestmark = pytest.mark.usefixtures("no_leak", "v9")


def memfd_restricted(flags: int = 0) -> int:
    """The system call itself."""
    fd = libc.syscall(rm.__NR_memfd_restricted, flags)
    if fd < 0:
        raise libc.os_error(-fd, "memfd_restricted")
    return fd


def made(flags: int = 0) -> str:
    """The errno of the system call; a file that it made is closed."""
    return answer(lambda: os.close(memfd_restricted(flags)))


@contextmanager
def limit(which: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@pytest.fixture
def sized(file: RestrictedMem) -> RestrictedMem:
    """A file of 16 pages."""
    file.ftruncate(16 * PAGE)
    return file


# -- the system call -----------------------------------------------------------------------------


@rule("v9.syscall.flags")
def test_flags() -> None:
    """memfd_restricted is EINVAL with any flag, and makes a file without flags."""
    bits = [1 << bit for bit in range(32)]
    assert [made(flags) for flags in (*bits, 3, 0xFFFFFFFF)] == ["EINVAL"] * 34
    assert made(0) == "ok"


@rule("v9.syscall.flags.width")
def test_only_32_bits_of_the_flags_count() -> None:
    """The flags are an unsigned int: the kernel ignores the upper 32 bits."""
    assert made(1 << 32) == "ok"
    assert made(1 << 32 | 1) == "EINVAL"


@rule("v9.syscall.order.emfile")
def test_flags_come_before_emfile() -> None:
    """With no free descriptor a bad flag is still EINVAL; flags 0 is EMFILE."""
    with limit(resource.RLIMIT_NOFILE, 3):
        assert (made(1), made(0)) == ("EINVAL", "EMFILE")
    assert made(0) == "ok"


@rule("v9.syscall.order.enfile")
def test_flags_come_before_enfile() -> None:
    """With no free file in the system a bad flag is still EINVAL; flags 0 is ENFILE."""
    file_max = Path("/proc/sys/fs/file-max")
    if os.geteuid():
        missing("root", "fs.file-max can't be lowered")

    def ask() -> tuple[str, str]:
        os.seteuid(65534)  # the limit does not apply to root
        return made(1), made(0)

    before = file_max.read_text()
    file_max.write_text("0")
    try:
        assert in_child(ask) == ("EINVAL", "ENFILE")
    finally:
        file_max.write_text(before)
    assert in_child(ask) == ("EINVAL", "ok")


@rule("v9.syscall.unprivileged")
def test_no_privilege_is_needed() -> None:
    """An unprivileged process can make a file."""
    if os.geteuid():
        assert made() == "ok"
        return

    def ask() -> tuple[int, str]:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        return os.geteuid(), made()

    assert in_child(ask) == (65534, "ok")


@rule("v9.file.identity")
def test_identity() -> None:
    """The file is read-write with O_LARGEFILE, has RESTRICTEDMEM_MAGIC and its name."""
    fd = memfd_restricted()
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == 0x8002
        assert libc.fstatfs_type(fd) == rm.RESTRICTEDMEM_MAGIC
        assert os.readlink(f"/proc/self/fd/{fd}") == "/restrictedmem (deleted)"
    finally:
        os.close(fd)


@rule("v9.file.cloexec")
def test_not_close_on_exec() -> None:
    """The descriptor is not close-on-exec."""
    fd = memfd_restricted()
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == 0
    finally:
        os.close(fd)
    with RestrictedMem() as file:  # the binding adds it
        assert fcntl.fcntl(file.fileno(), fcntl.F_GETFD) == fcntl.FD_CLOEXEC


# -- operations on the file ---------------------------------------------------------------------

OPERATIONS = operations(
    "v9.file",
    {
        "EINVAL": "read read.empty read.bad_pointer write write.empty write.bad_pointer "
        "readv writev pread.negative pwrite.negative preadv2.current pwritev2.current "
        "lseek.bad_whence sendfile.from sendfile.to splice.from splice.to seals.add seals.get "
        "fsync fdatasync",
        "ESPIPE": "pread pwrite preadv pwritev lseek lseek.end lseek.data",
        "ENODEV": "mmap.shared mmap.shared.read mmap.private mmap.private.read mmap.none",
        "EPERM": "mmap.shared.exec mmap.private.exec epoll",
        "EXDEV": "copy_file_range.from copy_file_range.to linkat",
        "EACCES": "fexecve",
        "EOPNOTSUPP": "xattr.set xattr.get",
        "ENXIO": "open open.read",
        "ok": "open.path fchmod fchown futimens flock syncfs fadvise",
    },
)


@OPERATIONS
def test_operation(sized: RestrictedMem, operation: Callable[[int], Any], expected: str) -> None:
    """Each operation has its result, on a file without a size and on one with pages."""
    fallocate(sized, 0, 0, 16 * PAGE)
    with RestrictedMem() as empty:
        assert answer(lambda: operation(empty.fileno())) == expected
        assert answer(lambda: operation(sized.fileno())) == expected


@rule("v9.file.errnos")
def test_the_operations_on_an_ordinary_memfd() -> None:
    """The operations, as tried here, succeed on an ordinary memfd, except for a few."""
    refused = {
        "read.bad_pointer": "EFAULT",
        "write.bad_pointer": "EFAULT",
        "pread.negative": "EINVAL",
        "pwrite.negative": "EINVAL",
        "lseek.bad_whence": "EINVAL",
        "epoll": "EPERM",
        "linkat": "EXDEV",
        "fexecve": "ENOEXEC",
    }
    said = {}
    for name, operation in ALL_OPERATIONS.items():
        if name.startswith("xattr"):  # kernels differ in the attributes of a memfd
            continue
        fd = os.memfd_create("twin", os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, bytes(2 * PAGE))
            os.lseek(fd, 0, os.SEEK_SET)
            said[name] = answer(lambda do=operation, on=fd: do(on))
        finally:
            os.close(fd)
    assert {name: what for name, what in said.items() if what != "ok"} == refused
    assert len(said) > 40


# -- the size ------------------------------------------------------------------------------------


@rule("v9.file.size.once")
def test_the_size_is_set_once() -> None:
    """While the size is not 0, every ftruncate(2) is EPERM, also to the same size and to 0."""
    with RestrictedMem() as file:
        assert answer(lambda: file.ftruncate(0)) == "ok"  # does not set the size
        assert answer(lambda: file.ftruncate(0)) == "ok"
        assert answer(lambda: file.ftruncate(16 * PAGE)) == "ok"
        for size in (16 * PAGE, 0, PAGE, 32 * PAGE, 1, 16 * PAGE + 1):
            assert answer(lambda new=size: file.ftruncate(new)) == "EPERM", size


@rule("v9.file.size.aligned")
@pytest.mark.parametrize("size", [1, 101, PAGE - 1, PAGE + 1, (1 << 62) + 1])
def test_the_size_is_page_aligned(file: RestrictedMem, size: int) -> None:
    """A size that is not page aligned is EINVAL and does not count as set."""
    assert answer(lambda: file.ftruncate(size)) == "EINVAL"
    assert answer(lambda: file.ftruncate(size // PAGE * PAGE + PAGE)) == "ok"


@rule("v9.file.size.negative")
def test_a_negative_size(file: RestrictedMem) -> None:
    """A negative size is EINVAL, before and after the size was set."""
    for size in (-1, -PAGE, -(1 << 63)):
        assert answer(lambda new=size: file.ftruncate(new)) == "EINVAL"
    file.ftruncate(PAGE)
    assert answer(lambda: file.ftruncate(-PAGE)) == "EINVAL"
    assert answer(lambda: file.ftruncate(PAGE)) == "EPERM"


@rule("v9.file.size.path")
def test_truncate_by_path(file: RestrictedMem) -> None:
    """truncate(2) by /proc/self/fd/N follows the rules of ftruncate(2)."""
    path = f"/proc/self/fd/{file.fileno()}"
    assert answer(lambda: os.truncate(path, 1)) == "EINVAL"
    assert answer(lambda: os.truncate(path, PAGE)) == "ok"
    assert answer(lambda: os.truncate(path, PAGE)) == "EPERM"
    assert answer(lambda: file.ftruncate(PAGE)) == "EPERM"


@rule("v9.file.size.limit")
def test_the_size_obeys_rlimit_fsize(file: RestrictedMem) -> None:
    """A size above RLIMIT_FSIZE is EFBIG."""
    with limit(resource.RLIMIT_FSIZE, 8 * PAGE):
        assert answer(lambda: file.ftruncate(9 * PAGE)) == "EFBIG"
        assert answer(lambda: file.ftruncate(8 * PAGE)) == "ok"


# -- fallocate: allocation -----------------------------------------------------------------------


def has_size(file: RestrictedMem) -> bool:
    """Whether the file's size is not 0; sets one if it is."""
    said = answer(lambda: file.ftruncate(PAGE))
    assert said in ("EPERM", "ok")
    return said == "EPERM"


@rule("v9.file.fallocate.grows")
@pytest.mark.parametrize(("offset", "length"), [(0, PAGE), (0, 101), (3, 5), (PAGE, 7 * PAGE)])
def test_allocation_sets_the_size(file: RestrictedMem, offset: int, length: int) -> None:
    """fallocate(2) with mode 0 grows the file to any end, aligned or not, and that sets the
    size.
    """
    fallocate(file, 0, offset, length)
    assert has_size(file)


@rule("v9.file.fallocate.keep_size")
@pytest.mark.parametrize(("offset", "length"), [(0, PAGE), (0, 101), (3, 5), (PAGE, 7 * PAGE)])
def test_allocation_that_keeps_the_size(file: RestrictedMem, offset: int, length: int) -> None:
    """fallocate(2) with KEEP_SIZE allocates pages and does not change the size."""
    fallocate(file, KEEP_SIZE, offset, length)
    assert not has_size(file)


@rule("v9.file.fallocate.beyond_size")
def test_allocation_beyond_a_set_size(sized: RestrictedMem) -> None:
    """A size that is set does not limit allocation, with KEEP_SIZE or without."""
    assert answer(lambda: fallocate(sized, KEEP_SIZE, 64 * PAGE, PAGE)) == "ok"
    assert answer(lambda: fallocate(sized, 0, 64 * PAGE, PAGE)) == "ok"
    assert has_size(sized)


@rule("v9.file.fallocate.range")
@pytest.mark.parametrize("mode", [0, KEEP_SIZE, HOLE, PUNCH_HOLE, ZERO, 1 << 20])
def test_bad_range(file: RestrictedMem, mode: int) -> None:
    """A length of 0 or less and a negative offset are EINVAL in every mode."""
    for offset, length in ((0, 0), (0, -PAGE), (-PAGE, PAGE), (-PAGE, -PAGE), (PAGE, 0)):
        assert answer(lambda a=offset, b=length: fallocate(file, mode, a, b)) == "EINVAL"
    expected = "ok" if mode in (0, KEEP_SIZE, HOLE) else "EOPNOTSUPP"
    assert answer(lambda: fallocate(file, mode, 0, PAGE)) == expected


@rule("v9.file.fallocate.overflow")
@pytest.mark.parametrize("mode", [0, KEEP_SIZE, HOLE])
def test_range_that_overflows(file: RestrictedMem, mode: int) -> None:
    """offset + length above the largest file size is EFBIG."""
    top = (1 << 63) - PAGE
    for offset, length in ((top, PAGE), (top, 2 * PAGE), (PAGE, top)):
        assert answer(lambda a=offset, b=length: fallocate(file, mode, a, b)) == "EFBIG"
    assert answer(lambda: fallocate(file, mode, PAGE, PAGE)) == "ok"


@rule("v9.file.fallocate.limit")
@pytest.mark.parametrize("mode", [0, KEEP_SIZE])
def test_allocation_obeys_rlimit_fsize(file: RestrictedMem, mode: int) -> None:
    """An allocation beyond RLIMIT_FSIZE is EFBIG."""
    with limit(resource.RLIMIT_FSIZE, 8 * PAGE):
        assert answer(lambda: fallocate(file, mode, 0, 9 * PAGE)) == "EFBIG"
        assert not has_size(file) if mode == KEEP_SIZE else True
        assert answer(lambda: fallocate(file, mode, 0, 8 * PAGE)) == "ok"


# -- fallocate: holes and other modes ------------------------------------------------------------


@rule("v9.file.hole.aligned")
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1), (1, 1), (0, PAGE - 1), (0, PAGE + 1), (1, PAGE), (PAGE - 1, PAGE), (1, PAGE - 1),
        (PAGE // 2, PAGE), (PAGE, PAGE // 2), (8 * PAGE + 1, PAGE), (64 * PAGE + 1, PAGE),
        (64 * PAGE, 1),
    ],
)  # fmt: skip
def test_holes_are_page_aligned(sized: RestrictedMem, offset: int, length: int) -> None:
    """A hole whose offset or length is not page aligned is EINVAL, also beyond the end."""
    fallocate(sized, 0, 0, 16 * PAGE)
    assert answer(lambda: fallocate(sized, HOLE, offset, length)) == "EINVAL"
    aligned = offset // PAGE * PAGE, (length // PAGE + 1) * PAGE
    assert answer(lambda: fallocate(sized, HOLE, *aligned)) == "ok"


@rule("v9.file.hole.beyond_size")
def test_holes_beyond_the_end(sized: RestrictedMem) -> None:
    """A hole beyond the end succeeds and does not change the size."""
    for offset, length in ((16 * PAGE, PAGE), (8 * PAGE, 64 * PAGE), (1 << 40, 1 << 40)):
        assert answer(lambda a=offset, b=length: fallocate(sized, HOLE, a, b)) == "ok"
    with RestrictedMem() as empty:
        assert answer(lambda: fallocate(empty, HOLE, 0, PAGE)) == "ok"
        assert not has_size(empty)


@rule("v9.file.hole.keep_size")
@pytest.mark.parametrize("length", [PAGE, 1])
def test_holes_keep_the_size(sized: RestrictedMem, length: int) -> None:
    """PUNCH_HOLE without KEEP_SIZE is EOPNOTSUPP, also for a range that is not aligned."""
    assert answer(lambda: fallocate(sized, PUNCH_HOLE, 0, length)) == "EOPNOTSUPP"
    assert answer(lambda: fallocate(sized, HOLE, 0, PAGE)) == "ok"


@rule("v9.file.fallocate.modes")
def test_other_modes(sized: RestrictedMem) -> None:
    """Every other mode is EOPNOTSUPP; PUNCH_HOLE with COLLAPSE_RANGE and KEEP_SIZE is EINVAL."""
    others = [4, COLLAPSE, ZERO, ZERO | KEEP_SIZE, INSERT, UNSHARE, UNSHARE | KEEP_SIZE]
    others += [1 << bit for bit in range(7, 32)]
    said = [answer(lambda m=mode: fallocate(sized, m, 0, PAGE)) for mode in others]
    assert said == ["EOPNOTSUPP"] * len(others)
    assert answer(lambda: fallocate(sized, HOLE | COLLAPSE, 0, PAGE)) == "EINVAL"
    assert answer(lambda: fallocate(sized, 0, 0, PAGE)) == "ok"


# -- the pages -----------------------------------------------------------------------------------


@rule("v9.pages.allocated", "v9.pages.unevictable", "v9.pages.freed")
@pytest.mark.parametrize("mode", [0, KEEP_SIZE], ids=["grow", "keep_size"])
def test_pages(mode: int) -> None:
    """fallocate(2) allocates unevictable, not locked pages; a hole and the last close free them."""
    memory, locked = Unevictable(), meminfo("Mlocked")
    with RestrictedMem() as file:
        file.ftruncate(BIG)
        assert memory.is_about(0), "a size alone allocates nothing"
        fallocate(file, mode, 0, BIG)
        assert memory.is_about(BIG)
        assert abs(meminfo("Mlocked") - locked) < MIB
        fallocate(file, HOLE, 0, BIG // 2)
        assert memory.is_about(BIG // 2)
        fallocate(file, mode, 0, BIG)
        fallocate(file, mode, 0, BIG)
        assert memory.is_about(BIG), "no page is held twice"
        other = os.dup(file.fileno())
    try:
        assert memory.is_about(BIG), "a duplicate keeps the pages"
    finally:
        os.close(other)
    assert memory.is_about(0)


@rule("v9.pages.two_files")
def test_two_files_differ() -> None:
    """Each call of memfd_restricted(2) makes a file with its own size and pages."""
    memory = Unevictable()
    with RestrictedMem() as one, RestrictedMem() as two:
        fallocate(one, 0, 0, BIG)
        assert not has_size(two)
        fallocate(two, HOLE, 0, BIG)
        assert memory.is_about(BIG)
    assert memory.is_about(0)


@rule("v9.file.stat")
@pytest.mark.known_defect("fstat")
def test_stat(file: RestrictedMem) -> None:
    """fstat reports the size and the blocks of the file."""
    fd = file.fileno()
    assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks) == (0, 0)
    file.ftruncate(16 * PAGE)
    assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks) == (16 * PAGE, 0)
    fallocate(file, KEEP_SIZE, 0, 4 * PAGE)
    seen = Path(f"/proc/self/fd/{fd}").stat()
    assert (seen.st_size, seen.st_blocks) == (16 * PAGE, 4 * PAGE // 512)
    assert os.path.samestat(seen, os.fstat(fd))
    fallocate(file, KEEP_SIZE, 32 * PAGE, PAGE)
    fallocate(file, HOLE, 0, PAGE)
    assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks) == (16 * PAGE, 4 * PAGE // 512)


@rule("v9.pages.charged", "v9.pages.oom_kills")
def test_memory_control_group() -> None:
    """Pages are charged to the allocating cgroup; at the limit the OOM killer acts."""
    root = Path("/sys/fs/cgroup")
    group = root / f"kvmpriv-{os.getpid()}"
    try:
        (root / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as error:
        missing("memory-cgroup", str(error))
    try:
        (group / "memory.max").write_text(str(4 * BIG))
        with RestrictedMem() as file:

            def allocate(size: int) -> int:
                (group / "cgroup.procs").write_text("0")
                before = int((group / "memory.current").read_text())
                fallocate(file, 0, 0, size)
                return int((group / "memory.current").read_text()) - before

            status, charged = child_status(lambda: allocate(BIG))
            assert status == 0
            assert BIG <= charged < BIG + BIG // 4
            status, charged = child_status(lambda: allocate(8 * BIG))
            assert (os.WIFSIGNALED(status), charged) == (True, None)
            assert os.WTERMSIG(status) == 9
    finally:
        group.rmdir()
