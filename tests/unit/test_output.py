"""Files that a user named: written whole or not at all, and nothing that is there is destroyed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmpriv.output import check_file, is_same_file, write_file
from private.support.requirements import missing


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("replace_only", [False, True])
def test_a_file_is_replaced(tmp_path: Path, replace_only: bool) -> None:
    """The new file has the mode and the owner of the old one; nothing else is left."""
    path = tmp_path / "out"
    write_file(path, "one", replace_only=replace_only)
    before = path.stat()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(before.st_mode) == 0o666 & ~umask
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1, 2)
    owner = path.stat()
    write_file(path, "two ü", replace_only=replace_only)
    after = path.stat()
    assert path.read_bytes() == "two ü".encode()
    assert after.st_ino != before.st_ino, "it is another file, which was renamed"
    assert stat.S_IMODE(after.st_mode) == 0o640
    assert (after.st_uid, after.st_gid) == (owner.st_uid, owner.st_gid)
    assert names(tmp_path) == ["out"]


def test_a_link_stays(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder / "out")
    for text in ("new", "replaced"):
        check_file(link)
        write_file(link, text, replace_only=True)
        assert link.is_symlink()
        assert (folder / "out").read_text() == text
        assert is_same_file(link, folder / "out")
    assert names(folder) == ["out"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    check_file(pipe)  # waits for no reader
    reader.start()
    write_file(pipe, "text", replace_only=True)
    reader.join(10)
    assert got == ["text"]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_a_character_device_is_written_to(tmp_path: Path) -> None:
    """The test makes a node of its own, as root could replace /dev/null."""
    node = make_node(tmp_path / "null", stat.S_IFCHR, os.makedev(1, 3))
    check_file(node)
    write_file(node, "text", replace_only=True)
    assert stat.S_ISCHR(node.lstat().st_mode)


def test_a_block_device_is_refused(tmp_path: Path) -> None:
    """A device that does not exist: to open it would fail with ENXIO, not with EPERM."""
    node = make_node(tmp_path / "disk", stat.S_IFBLK, os.makedev(4094, 77))
    refused(node, errno.EPERM, "a block device is not written to")
    assert stat.S_ISBLK(node.lstat().st_mode)


def make_node(path: Path, kind: int, device: int) -> Path:
    try:
        os.mknod(path, 0o666 | kind, device)
    except PermissionError as error:
        missing("root", f"a device node can't be made: {error}")
    return path


def refused(path: Path, number: int, words: str) -> None:
    calls: tuple[Callable[[], None], ...] = (
        lambda: check_file(path),
        lambda: write_file(path, "text", replace_only=True),
    )
    for call in calls:
        with pytest.raises(OSError, match=words) as caught:
            call()
        assert caught.value.errno == number


def test_what_is_refused(tmp_path: Path) -> None:
    """Nothing is left behind; the twin, a file in a folder that exists, is written."""
    folder, loop, file = tmp_path / "folder", tmp_path / "loop", tmp_path / "file"
    folder.mkdir()
    loop.symlink_to(loop)
    file.write_text("the old one")
    refused(folder, errno.EISDIR, "Is a directory")
    refused(tmp_path / "no" / "out", errno.ENOENT, "No such file or directory")
    refused(file / "out", errno.ENOTDIR, "Not a directory")
    refused(loop, errno.ELOOP, "Too many levels of symbolic links")
    assert names(tmp_path) == ["file", "folder", "loop"]
    assert names(folder) == []
    assert file.read_text() == "the old one"
    write_file(folder / "out", "text", replace_only=True)
    assert names(folder) == ["out"]


def test_standard_output_gets_the_text_at_its_end(tmp_path: Path) -> None:
    """/dev/stdout leads to a regular file if the shell made one: what is in it stays."""
    out = tmp_path / "out"
    out.write_text("before\n")
    code = (
        "from kvmpriv.output import check_file, write_file; import sys; print('first', flush=True);"
        "check_file(sys.argv[1]); write_file(sys.argv[1], 'text', replace_only=True)"
    )
    link = tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")
    for path in (link, out):
        with out.open("a") as file:
            subprocess.run([sys.executable, "-c", code, path], stdout=file, check=True)
    assert out.read_text() == "before\nfirst\ntextfirst\ntext"
    assert names(tmp_path) == ["out", "stdout"]


def test_a_link_of_proc_to_a_file_without_a_name(tmp_path: Path) -> None:
    """The file is written to, and none is made whose name ends with " (deleted)"."""
    path = tmp_path / "out"
    with path.open("w+") as file:
        path.unlink()
        link = Path(f"/proc/self/fd/{file.fileno()}")
        assert os.readlink(link).endswith(" (deleted)")
        write_file(link, "text", replace_only=True)
        assert file.read() == "text"
    assert names(tmp_path) == []


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A file that grows beyond `size` bytes fails, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("replace_only", [False, True])
def test_a_full_disk_loses_nothing(tmp_path: Path, replace_only: bool) -> None:
    path = tmp_path / "out"
    path.write_text("the old one")
    with file_size_limit(100), pytest.raises(OSError, match="File too large"):
        write_file(path, "x" * 101, replace_only=replace_only)
    assert path.read_text() == "the old one"
    assert names(tmp_path) == ["out"]
    with file_size_limit(100):
        write_file(path, "x" * 100, replace_only=replace_only)
    assert path.read_text() == "x" * 100


def test_what_a_disk_reports_last_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may accept the bytes, and report only then that it is full."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "out"
    path.write_text("the old one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "text", replace_only=True)
    assert path.read_text() == "the old one"
    assert names(tmp_path) == ["out"]


UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def test_a_folder_that_can_not_be_written_to(tmp_path: Path) -> None:
    """A file that must be replaced stays as it is; without `replace_only` it is written to."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        missing("setpriv", "root may write everywhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "out"
    path.write_text("the old one")
    path.chmod(0o666)
    folder.chmod(0o555)
    prefix = UNPRIVILEGED if os.geteuid() == 0 else ()
    code = "import sys; from kvmpriv.output import *; {}"
    for call, status, text in (
        ("check_file(sys.argv[1])", 1, "the old one"),
        ("write_file(sys.argv[1], 'text', replace_only=True)", 1, "the old one"),
        ("write_file(sys.argv[1], 'text')", 0, "text"),
    ):
        command = [*prefix, sys.executable, "-c", code.format(call), path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, "Permission denied" in done.stderr) == (status, bool(status))
        assert path.read_text() == text
        assert names(folder) == ["out"]


def test_the_longest_name(tmp_path: Path) -> None:
    """255 bytes; the temporary file has a short name of its own."""
    path = tmp_path / ("p" * 255)
    for text in ("new", "replaced"):
        write_file(path, text, replace_only=True)
        assert path.read_text() == text
    assert names(tmp_path) == [path.name]


def test_many_writers(tmp_path: Path) -> None:
    """Every reader gets one of the texts, whole; in the end no temporary file is left."""
    path = tmp_path / "out"
    texts = [f"{letter}" * 100_000 for letter in "abcd"]
    write_file(path, texts[0])
    stop = threading.Event()
    errors: list[BaseException] = []

    def write(text: str) -> None:
        try:
            while not stop.is_set():
                write_file(path, text, replace_only=True)
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            errors.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    try:
        seen = {path.read_text() for _ in range(300)}
        deadline = time.monotonic() + 60
        while len(seen) < 2 and time.monotonic() < deadline:  # the writers got no processor yet
            seen.add(path.read_text())
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert errors == []
    assert seen <= set(texts)
    assert len(seen) > 1, "the writers did replace the file"
    assert names(tmp_path) == ["out"]
