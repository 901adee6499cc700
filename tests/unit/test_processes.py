"""The processes that have KVM open: a recorded /proc, and the processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpriv import processes
from kvmpriv.processes import (
    DEVICE,
    GUEST_MEMFD,
    RESTRICTEDMEM,
    STATISTICS,
    VCPU,
    VM,
    VM_DEVICE,
    Descriptor,
    classify,
    scan,
)


def record(proc: Path, pid: int, *links: str, flags: int = 0) -> None:
    """A process of a recorded /proc: its links, as descriptors from 3 on."""
    folder = proc / str(pid) / "fd"
    folder.mkdir(parents=True)
    for fd, link in enumerate(links, 3):
        (folder / str(fd)).symlink_to(link)
    (proc / str(pid) / "stat").write_text(f"{pid} (a ) b) S 1 1 1 0 -1 {flags} 0 0\n")


@pytest.mark.parametrize(
    ("link", "kind"),
    [
        ("/dev/kvm", (DEVICE, None)),
        ("/srv/jail/root/dev/kvm", (DEVICE, None)),
        ("/dev/kvm (deleted)", (DEVICE, None)),
        ("anon_inode:kvm-vm", (VM, None)),
        ("anon_inode:kvm-vcpu:17", (VCPU, 17)),
        ("anon_inode:kvm-vcpu", (VCPU, None)),
        ("anon_inode:kvm-vm-stats", (STATISTICS, None)),
        ("anon_inode:kvm-vcpu-stats:2", (STATISTICS, 2)),
        ("anon_inode:kvm-vfio", (VM_DEVICE, None)),
        ("anon_inode:[kvm-gmem]", (GUEST_MEMFD, None)),
        ("/[kvm-gmem] (deleted)", (GUEST_MEMFD, None)),
        ("/restrictedmem (deleted)", (RESTRICTEDMEM, None)),
        ("/tmp/[kvm-gmem] (deleted)", None),
        ("/restrictedmem", None),
        ("/home/kvm", None),
        ("/dev/kvm-old", None),
        ("anon_inode:[eventfd]", None),
        ("/memfd:anon_inode:kvm-vm (deleted)", None),
        ("", None),
    ],
)
def test_links(link: str, kind: tuple[processes.Kind, int | None] | None) -> None:
    assert classify(link) == kind


def test_a_recorded_proc(tmp_path: Path) -> None:
    record(tmp_path, 10, "/dev/null", "/dev/kvm", "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:1")
    record(tmp_path, 11, "/dev/null", "socket:[1]")
    record(tmp_path, 12, "/restrictedmem (deleted)", str(tmp_path / "node"))
    (tmp_path / "node").touch()
    (tmp_path / "13").mkdir()  # it ended before its descriptors were listed
    (tmp_path / "self").symlink_to("10")
    found = scan(str(tmp_path), device=str(tmp_path / "node"))
    assert found.found == {
        10: [Descriptor(10, 4, DEVICE), Descriptor(10, 5, VM), Descriptor(10, 6, VCPU, 1)],
        12: [Descriptor(12, 3, RESTRICTEDMEM), Descriptor(12, 4, DEVICE)],
    }
    assert (found.unreadable, sorted(found.pids)) == ([], [10, 11, 12, 13])


def test_descriptors_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    record(tmp_path, 10, *["anon_inode:kvm-vm"] * 200)
    assert [one.fd for one in scan(str(tmp_path)).found[10]] == list(range(3, 203))


def test_a_descriptor_that_is_closed_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, 10, "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0", "/dev/kvm")
    read = os.readlink

    def readlink(path: str) -> str:
        if path.endswith("/4"):
            raise FileNotFoundError(path)
        return read(path)

    monkeypatch.setattr(os, "readlink", readlink)
    assert [one.fd for one in scan(str(tmp_path)).found[10]] == [3, 5]


def test_processes_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted, but not kernel threads: those have no descriptors."""
    record(tmp_path, 10)
    record(tmp_path, 11, flags=0x0020_8040)
    record(tmp_path, 12, "anon_inode:kvm-vm")
    (tmp_path / "10/stat").unlink()  # what has no status is not a kernel thread
    listdir: Callable[[str], list[str]] = os.listdir

    def refuse(path: str) -> list[str]:
        if "/12/" not in path:
            raise PermissionError(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    found = scan(str(tmp_path))
    assert (list(found.found), found.unreadable, len(found.pids)) == ([12], [10], 3)


def test_no_proc(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan(str(tmp_path / "proc"))


def test_about_a_process() -> None:
    """The name is exact, also if it is no text; the parent and the start are right."""
    script = (
        "import os,sys; open('/proc/self/comm', 'wb').write(b'a\\n\\xff\\x1b[2J');"
        "print(); sys.stdout.flush(); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as child:  # type: ignore[call-overload]
        child.stdout.readline()
        found = processes.about(child.pid)
        own = processes.about(os.getpid())
        child.stdin.close()
    assert found is not None
    assert own is not None
    assert os.fsencode(found.name) == b"a\n\xff\x1b[2J"
    assert found.parent == os.getpid()
    assert 0 <= found.started - own.started < 3600
    assert found.user == own.user
    assert processes.about(child.pid) is None
