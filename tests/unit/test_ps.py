"""``kvmpriv ps``: which VM a file belongs to, who made it, and the command's output.

Hosts are made of records, so that all of this runs without KVM.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fcntl import ioctl
from pathlib import Path
from struct import pack
from termios import TIOCSWINSZ
from typing import Any

import jsonschema
import pytest

from conftest import ROOT
from kvmpriv import cli, libc, processes, procfs
from kvmpriv.processes import (
    DEVICE,
    GUEST_MEMFD,
    RESTRICTEDMEM,
    STATISTICS,
    VCPU,
    VM,
    VM_DEVICE,
    About,
    Descriptor,
    Kind,
    mappings,
)
from kvmpriv.ps import Snapshot, collect, owners, records, report, snapshot
from kvmpriv.ps.records import Creator, Holder, Limits, OpenFile, Process, Statistics
from private.support.requirements import missing

SCHEMA = json.loads((ROOT / "kvmpriv/ps/schema.json").read_text())
KVMPRIV_PS = [sys.executable, "-m", "kvmpriv", "ps"]
NOBODY = 65534
MIB = 1 << 20
#: VMM, its child and a process that is older than both.
VMM, CHILD, OLD = 100, 200, 50
ABOUT = {
    VMM: About("vmm", "root", 1, 1000.0),
    CHILD: About("helper", "root", VMM, 1010.0),
    OLD: About("old", "root", 1, 10.0),
}
CREATED = 1005.0  # the VMM's VM


def held(kind: Kind, *holders: tuple[int, int | None], vcpu: int | None = None) -> OpenFile:
    """A file with these references; 2 MiB, if it is private memory."""
    size = 2 * MIB if kind.private else None
    return OpenFile(0, kind, vcpu, tuple(Holder(*holder) for holder in holders), size=size)


def statistics_of(task: int, fd: int, group: int | None, **fields: Any) -> Statistics:
    return Statistics(task, fd, CREATED, (), 4096, group)._replace(**fields)


def host(
    files: list[OpenFile],
    statistics: list[Statistics] | None = None,
    about: dict[int, About] = ABOUT,
) -> Snapshot:
    """A snapshot of these files; without `statistics` these were not readable."""
    numbered = [file._replace(number=number) for number, file in enumerate(files, 1)]
    users = {pid for file in numbered for pid in file.pids}
    found = Snapshot(
        "6.18 x86_64",
        True,
        tuple(Process(pid, about[pid]) for pid in sorted(users)),
        tuple(numbered),
        tuple(owners.assign(numbered, statistics or [], about)),
        Limits(0, False, False, True, "not mounted" if statistics is None else "read", True),
        8 * MIB,
    )
    jsonschema.validate(found.to_json(), SCHEMA, cls=jsonschema.Draft202012Validator)
    return found


def sentences(found: Snapshot) -> str:
    """What the report says about VMs that stay alive, and notes."""
    return "\n".join(
        line for line in report.text(found).splitlines() if re.match(r"VM \d|note: ", line)
    )


# -- which descriptors lead to one file ------------------------------------------------------------


class Kernel:
    """kcmp(2) of a table: (pid, fd) to the file's address.  What is not in it is closed."""

    def __init__(self, files: dict[tuple[int, int], int]) -> None:
        self.files = files
        self.calls = 0

    def kcmp(self, pid: int, fd: int, other_pid: int, other_fd: int) -> int:
        self.calls += 1
        one, other = self.files.get((pid, fd)), self.files.get((other_pid, other_fd))
        if one is None or other is None:
            return -errno.EBADF
        return 0 if one == other else 1 if one < other else 2


def test_descriptors_are_grouped_by_file() -> None:
    kernel = Kernel({(1, 3): 70, (1, 4): 30, (2, 3): 30, (2, 5): 50, (1, 9): 30, (3, 3): 30})
    found = collect.identify(
        [
            Descriptor(1, 3, VM),
            Descriptor(1, 4, VM),
            Descriptor(1, 9, VCPU, 0),
            Descriptor(2, 3, VM),
            Descriptor(2, 5, VM),
            Descriptor(3, 3, VCPU, 1),  # is never compared with a vCPU of another number
        ],
        kernel.kcmp,
    )
    groups = sorted([(one.pid, one.fd) for one in group] for group in found)
    assert groups == [[(1, 3)], [(1, 4), (2, 3)], [(1, 9)], [(2, 5)], [(3, 3)]]


def test_ten_thousand_descriptors_take_few_comparisons() -> None:
    kernel = Kernel({(1, fd): fd * 7919 % 10007 for fd in range(10000)})
    found = collect.identify([Descriptor(1, fd, VM) for fd in range(10000)], kernel.kcmp)
    assert len(found) == 10000
    assert kernel.calls < 10000 * 16


@pytest.mark.parametrize("gone", [[(1, 3)], [(1, 4)], [(2, 3)], [(1, 4), (2, 3)]])
def test_descriptors_that_vanish_while_they_are_compared(gone: list[tuple[int, int]]) -> None:
    """The last one can only be compared once those before it are found to be closed."""
    kernel = Kernel({(1, 3): 70, (1, 4): 30, (2, 3): 30, (1, 5): 60})
    descriptors = [Descriptor(*key, VM) for key in kernel.files]
    late = descriptors.pop()

    def descriptors_then_close() -> Iterator[Descriptor]:
        yield from descriptors
        for key in gone:
            del kernel.files[key]
        yield late
        yield Descriptor(2, 9, VM)  # was closed before it was compared at all
        yield Descriptor(2, 9, VCPU, 0)  # the same, and there is nothing to compare it with

    found = collect.identify(descriptors_then_close(), kernel.kcmp)
    left = {(one.pid, one.fd) for group in found for one in group}
    assert (1, 5) in left
    assert (2, 9) not in left
    assert set(kernel.files) <= left
    assert all(found), "no group is empty"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_kcmp_that_can_not_tell(number: int) -> None:
    def kcmp(*_: int) -> int:
        return -number

    with pytest.raises(collect.NotIdentifiedError):
        collect.identify([Descriptor(1, 3, VM), Descriptor(1, 4, VM)], kcmp)
    assert collect.identify([], kcmp) == []


def test_kcmp_of_this_process() -> None:
    """The twin: a duplicate is the same file, a second open of it is another one."""
    null = os.open("/dev/null", os.O_RDONLY)
    other, copy = os.open("/dev/null", os.O_RDONLY), os.dup(null)
    me = os.getpid()
    try:
        if libc.kcmp_file(me, null, me, copy) == -errno.ENOSYS:
            missing("kcmp", "this kernel has no kcmp(2)")
        assert libc.kcmp_file(me, null, me, copy) == 0
        assert {libc.kcmp_file(me, null, me, other), libc.kcmp_file(me, other, me, null)} == {1, 2}
        assert libc.kcmp_file(me, null, me, 99999) == -errno.EBADF
    finally:
        for fd in (null, other, copy):
            os.close(fd)


# -- whose VM, and who made it ---------------------------------------------------------------------


def test_one_process_with_one_vm() -> None:
    files = [
        held(DEVICE, (VMM, 3)),
        held(VM, (VMM, 4)),
        held(VCPU, (VMM, 5), (VMM, 6), (VMM, None), vcpu=0),
        held(STATISTICS, (VMM, 7)),
        held(VM_DEVICE, (VMM, 8)),
        held(GUEST_MEMFD, (VMM, 9)),
        held(RESTRICTEDMEM, (VMM, 10)),
    ]
    found = host(files, [statistics_of(VMM, 4, VMM)])
    (vm,) = found.vms
    assert vm.creator == Creator(VMM, "vmm", ended=False)
    assert (vm.vcpus, vm.mapped) == ((0,), 4096)
    assert [file.kind for file in vm.files] == [file.kind for file in files[1:]]
    assert RESTRICTEDMEM not in {file.kind for file, _ in vm.pins}, "such a file pins no VM"
    assert not vm.left_behind
    assert sentences(found) == ""
    assert "100:4-9,map" in report.text(found)


def test_a_file_of_memfd_restricted_is_no_sign_of_a_vm() -> None:
    found = host([held(RESTRICTEDMEM, (VMM, 10))])
    assert found.vms == ()
    assert found.totals["size"] == 2 * MIB
    assert "memfd_restricted  ?   2 MiB  0 B" in report.text(found)


def test_a_child_that_inherited() -> None:
    found = host(
        [held(VM, (VMM, 4), (CHILD, 4)), held(GUEST_MEMFD, (VMM, 7), (CHILD, 7))],
        [statistics_of(VMM, 4, VMM)],
    )
    (vm,) = found.vms
    assert not vm.left_behind
    assert {holder.pid for _, holder in vm.others} == {CHILD}
    assert sentences(found) == (
        "VM 1 of pid 100 (vmm) stays alive after that process ends, as long as another one has "
        "fd 4 (VM), fd 7 (guest_memfd, 2 MiB) of pid 200 (helper)"
    )


@pytest.mark.parametrize("kind", [VM, VCPU, GUEST_MEMFD, STATISTICS, VM_DEVICE])
@pytest.mark.parametrize("fd", [4, 7, None])
def test_a_child_that_outlives_the_creator(kind: Kind, fd: int | None) -> None:
    """By the number of the descriptor, or because one record and one VM are left."""
    found = host([held(kind, (CHILD, fd))], [statistics_of(VMM, 4, None)])
    (vm,) = found.vms
    assert vm.left_behind
    assert vm.creator == Creator(VMM, None, ended=True)
    assert vm.by_elimination == (kind is not VM or fd != 4)
    probably = " probably" if vm.by_elimination else ""
    by = "a mapping" if fd is None else f"fd {fd}"
    start = f"VM 1 of pid 100, which has ended, is{probably} kept alive by {by} ({kind.title}"
    assert sentences(found).startswith(start)
    assert sentences(found).endswith("of pid 200 (helper)")
    assert "100 (ended)" in report.text(found)


def test_a_creator_that_has_closed_it() -> None:
    found = host([held(DEVICE, (VMM, 3)), held(VM, (CHILD, 4))], [statistics_of(VMM, 4, VMM)])
    assert found.vms[0].left_behind
    assert "VM 1 of pid 100, which has closed it, is kept alive by fd 4" in sentences(found)


def test_a_creator_that_has_closed_the_vm_but_not_its_vcpu() -> None:
    files = [held(VCPU, (VMM, 5), vcpu=0), held(VCPU, (CHILD, 5), vcpu=0)]
    found = host(files, [statistics_of(VMM, 4, VMM)])
    assert {vm.creator for vm in found.vms} == {Creator(VMM, "vmm", ended=False), None}


def test_a_creator_whose_number_was_given_away() -> None:
    """The process with that number is younger than the VM, so it is not the creator."""
    about = {**ABOUT, VMM: About("cron", "root", 1, CREATED + 100)}
    found = host([held(VM, (CHILD, 4))], [statistics_of(VMM, 4, VMM)], about)
    assert found.vms[0].creator == Creator(VMM, None, ended=True)
    assert host([held(VM, (CHILD, 4))], [statistics_of(VMM, 4, VMM)]).vms[0].creator == Creator(
        VMM, "vmm", ended=False
    )


@pytest.mark.parametrize(
    ("pid", "started", "ended"),
    [
        (50, CREATED - 100, None),  # a thread of it may have made the VM
        (50, CREATED - 0.5, None),
        (200, CREATED - 100, None),  # the numbers began again at 1
        (200, CREATED - 0.5, True),  # a child of the creator
        (200, CREATED + 0.5, True),
        (50, CREATED + 100, True),
    ],
)
def test_a_thread_that_made_a_vm_and_ended(pid: int, started: float, ended: bool | None) -> None:
    about = {pid: About("p", "root", 1, started)}
    found = host([held(VM, (pid, 4))], [statistics_of(VMM, 4, None)], about)
    assert found.vms[0].creator == Creator(VMM, None, ended)
    assert found.vms[0].left_behind == bool(ended)
    assert ("of task 100, which has ended" in sentences(found)) == (ended is None)
    assert ("of pid 100, which has ended, is kept" in sentences(found)) == bool(ended)


def test_a_child_that_has_only_the_file_and_no_statistics() -> None:
    """As a program that was executed with a guest_memfd, which is not closed on exec."""
    found = host([held(GUEST_MEMFD, (CHILD, 7))])
    assert found.vms[0].left_behind
    assert sentences(found).splitlines()[0] == (
        "VM 1, which no process in sight has open, is kept alive by fd 7 (guest_memfd, 2 MiB) of "
        "pid 200 (helper)"
    )
    assert not host([held(VM, (CHILD, 4)), held(GUEST_MEMFD, (CHILD, 7))]).vms[0].left_behind
    assert not host([held(VCPU, (CHILD, 4), (CHILD, None), vcpu=0)]).vms[0].left_behind


def test_two_processes_and_no_statistics() -> None:
    found = host([held(VM, (VMM, 4), (CHILD, 4))])
    assert sentences(found).splitlines()[0] == (
        "VM 1 stays alive as long as one of 2 processes has it: fd 4 (VM) of pid 100 (vmm); "
        "fd 4 (VM) of pid 200 (helper)"
    )


def test_two_vms_of_one_process() -> None:
    """Nothing tells whose the vCPU is, unless another process has only one of the VMs."""
    files = [
        held(VM, (VMM, 4)),
        held(VM, (VMM, 5), (CHILD, 5)),
        held(VCPU, (VMM, 6), vcpu=0),
        held(VCPU, (VMM, 7), (CHILD, 7), vcpu=0),
    ]
    found = host(files, [statistics_of(VMM, 4, VMM), statistics_of(VMM, 5, VMM, mapped=8192)])
    assert [vm.mapped for vm in found.vms] == [4096, 8192]
    assert [found.vm_of(file) for file in found.files] == [
        found.vms[0],
        found.vms[1],
        None,
        found.vms[1],
    ]


def test_vms_with_the_same_number_in_two_processes() -> None:
    """Each has sent its VM to the other: the number counts together with the process."""
    files = [held(VM, (VMM, 4), (OLD, 7)), held(VM, (OLD, 4), (VMM, 7))]
    found = host(files, [statistics_of(OLD, 4, OLD, mapped=1), statistics_of(VMM, 4, VMM)])
    assert [vm.mapped for vm in found.vms] == [4096, 1]
    assert [vm.creator and vm.creator.pid for vm in found.vms] == [VMM, OLD]


def test_a_record_that_fits_two_vms() -> None:
    files = [held(VM, (CHILD, 4)), held(VM, (OLD, 4))]
    found = host(files, [statistics_of(VMM, 4, None)])
    assert [vm.creator and vm.creator.pid for vm in found.vms] == [None, None, VMM]
    files[1] = held(VM, (OLD, 5))
    assert [
        vm.creator and vm.creator.pid for vm in host(files, [statistics_of(VMM, 4, None)]).vms
    ] == [VMM, None]


def test_records_that_fit_no_vm() -> None:
    """A holder that can't be inspected: the VM is shown, and nobody is named."""
    found = host([], [statistics_of(VMM, 4, None), statistics_of(OLD, 4, OLD)])
    assert [vm.pins for vm in found.vms] == [(), ()]
    assert sentences(found).splitlines() == [
        "VM 1 of pid 100, which has ended, is kept alive by nothing in sight",
        "VM 2 of pid 50 is kept alive by nothing in sight",
    ]


def test_two_records_and_two_vms_are_not_guessed() -> None:
    files = [held(GUEST_MEMFD, (CHILD, 7)), held(GUEST_MEMFD, (OLD, 7))]
    found = host(files, [statistics_of(VMM, 4, None), statistics_of(VMM, 5, None)])
    assert [vm.creator is None for vm in found.vms] == [True, True, False, False]


# -- KVM's statistics ------------------------------------------------------------------------------


def debugfs(folder: Path, name: str, **counters: int) -> None:
    place = folder / "kvm" / name
    (place / "vcpu0").mkdir(parents=True)
    (place / "vcpu11").mkdir()
    for counter, count in counters.items():
        (place / counter).write_text(f"{count}\n")


def test_statistics(tmp_path: Path) -> None:
    debugfs(tmp_path, f"{os.getpid()}-4", pages_4k=3, pages_2m=2, pages_1g=1)
    debugfs(tmp_path, "4194304-7", pages_4k=3)  # beyond the largest PID
    os.utime(tmp_path / f"kvm/{os.getpid()}-4/pages_4k", (5, 77.5))
    (tmp_path / "kvm" / "exits").write_text("1\n")
    found, readable = collect.statistics(str(tmp_path))
    if readable == "another PID namespace":
        missing("first-pid-namespace", "these tests run in a PID namespace")
    assert readable == "read"
    mine = next(record for record in found if record.task == os.getpid())
    mapped = 3 * 4096 + 2 * 2 * MIB + (1 << 30)
    assert mine == Statistics(os.getpid(), 4, 77.5, (0, 11), mapped, os.getpid())
    other = next(record for record in found if record.task != os.getpid())
    assert (other.group, other.mapped) == (None, None)


def test_statistics_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = "pid:[4026531836]"
    monkeypatch.setattr(procfs, "link", lambda path: first if "ns/pid" in path else None)
    assert collect.statistics(str(tmp_path)) == ([], "not mounted")
    (tmp_path / "bdi").mkdir()
    assert collect.statistics(str(tmp_path)) == ([], "read"), "debugfs without KVM"

    def refuse(path: str) -> list[str]:
        raise PermissionError(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert collect.statistics(str(tmp_path)) == ([], "not permitted")
    monkeypatch.setattr(procfs, "link", lambda path: "pid:[4026532000]")
    assert collect.statistics(str(tmp_path)) == ([], "another PID namespace")


# -- mappings --------------------------------------------------------------------------------------

MAPS = b"""\
55d7a0a5d000-55d7a0a5f000 r--p 00000000 fe:00 1311 /usr/bin/kvm-tool
7f0000000000-7f0000200000 rw-s 00100000 00:10 2937 anon_inode:[kvm-gmem]
7f0000200000-7f0000201000 rw-s 00000000 00:0f 88 /[kvm-gmem] (deleted)
7f0000300000-7f0000303000 rw-s 00000000 00:10 1039                       anon_inode:kvm-vcpu:12
7f0000400000-7f0000403000 rw-p 00000000 00:00 0
"""


def test_mappings(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/maps").write_bytes(MAPS)
    found = mappings(7, str(tmp_path))
    assert [(one.kind, one.vcpu, one.inode, one.size) for one in found] == [
        (GUEST_MEMFD, None, 2937, 2 * MIB),
        (GUEST_MEMFD, None, 88, 4096),
        (VCPU, 12, 1039, 3 * 4096),
    ]
    assert mappings(8, str(tmp_path)) == []


# -- the report ------------------------------------------------------------------------------------

HOSTILE = os.fsdecode(b"a\n\xff\x1b[2J\tz")


def test_names_are_escaped_in_the_text_and_exact_in_the_document() -> None:
    about = {VMM: ABOUT[VMM]._replace(name=HOSTILE, user="\x1b]0;x\x07")}
    found = host([held(VM, (VMM, 4))], [statistics_of(VMM, 4, VMM)], about)
    text = report.text(found)
    assert text.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert r"a\n\udcff\x1b[2J\tz" in text
    document = json.loads(json.dumps(found.to_json()))
    assert os.fsencode(document["processes"][0]["name"]) == b"a\n\xff\x1b[2J\tz"
    assert document["processes"][0]["user"] == "\x1b]0;x\x07"


def test_rows_are_cut_and_sentences_are_not() -> None:
    found = host([held(VM, (VMM, 4), (CHILD, 4)), held(GUEST_MEMFD, (VMM, 7))])
    whole, cut = report.text(found).splitlines(), report.text(found, width=30).splitlines()
    assert len(whole) == len(cut)
    for one, other in zip(whole, cut, strict=True):
        if one.startswith(("VM 1 ", "1 file", "note")) or len(one) <= 30:
            assert other == one
        else:
            assert other == f"{one[:28]}.."
    assert any(line.endswith("..") for line in cut)
    assert report.text(found, width=1).count("..") > 3


def test_colour() -> None:
    found = host([held(GUEST_MEMFD, (CHILD, 7))])
    assert "\x1b[33mVM 1, which no process" in report.text(found, colour=True)
    assert "\x1b" not in report.text(found)


def test_the_sums() -> None:
    known = held(RESTRICTEDMEM, (VMM, 5))._replace(allocated=MIB)
    mapped = held(GUEST_MEMFD, (VMM, 6))._replace(mapped=MIB, allocated=MIB // 2)
    found = host([known, mapped])
    assert found.totals == {
        "files": 2,
        "size": 4 * MIB,
        "mapped": MIB,
        "allocated": MIB * 3 // 2,
        "unevictable": 8 * MIB,
    }
    assert (
        "2 files of private memory: size 4 MiB, mapped 1 MiB, allocated 1.5 MiB; "
        "Unevictable of this host: 8 MiB\n"
    ) in report.text(found)
    unknown = host([known, mapped._replace(allocated=None, size=None)]).totals
    assert (unknown["size"], unknown["allocated"]) == (None, None)
    assert records.total([]) == 0


def test_nothing_is_open() -> None:
    text = report.text(host([], []))
    assert text.startswith("no process has KVM or private memory open, as far as this user")
    assert "0 files of private memory: size 0 B" in text


def _limited(**limits: Any) -> Snapshot:
    found = host([], [])
    return found._replace(limits=found.limits._replace(**limits))


@pytest.mark.parametrize(
    ("limits", "note"),
    [
        ({"unreadable": 1}, "1 process may have more, but can't be inspected by this user"),
        ({"unreadable": 2, "root": False}, "2 processes may have more, "),
        ({"unreadable": 2, "root": False}, " inspected by this user: run it as root"),
        ({"hidden": True, "root": False}, "of other users (hidepid): run it as root"),
        ({"namespace": True}, "this is a PID namespace: processes outside it are not shown"),
        ({"identified": False}, "kcmp(2) is not supported or not permitted"),
        ({"statistics": "not mounted"}, "debugfs is not mounted (mount -t debugfs"),
        ({"statistics": "not permitted"}, "can be read by root only"),
        ({"statistics": "another PID namespace"}, "they name processes of the first"),
    ],
)
def test_notes(limits: dict[str, Any], note: str) -> None:
    assert note in sentences(_limited(**limits))
    assert sentences(host([], [])) == ""  # the twin of all
    assert "kvm does not exist here" in sentences(host([], [])._replace(device=False))
    unknown = held(RESTRICTEDMEM, (VMM, 5))._replace(size=None)
    assert "--stat-restricted" in sentences(host([unknown], []))
    assert set(SCHEMA["$defs"]["limits"]["properties"]["statistics"]["enum"]) == set(
        records.STATISTICS
    )


# -- the command -----------------------------------------------------------------------------------


def run(*arguments: str, prefix: tuple[str, ...] = (), **options: Any) -> Any:
    options = {"capture_output": True, "text": True, "cwd": ROOT, **options}
    return subprocess.run([*prefix, *KVMPRIV_PS, *arguments], **options)


def document(*arguments: str, **options: Any) -> dict[str, Any]:
    done = run("--json", *arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    return found


def test_text_and_document() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "files of private memory" in done.stdout or "1 file of private" in done.stdout
    assert document()["kernel"] == f"{os.uname().release} {os.uname().machine}"


@pytest.mark.parametrize(
    "arguments", [("--json", "--watch"), ("--watch", "0"), ("--watch", "x"), ("--pid", "1")]
)
def test_usage(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def as_nobody(*arguments: str) -> list[str]:
    """The command without root's rights.

    All is imported before, as root's Python may not be readable to others.
    """
    code = (
        "import grp, json, os, pwd, shutil, sys, psutil, kvmpriv.ps.report, kvmpriv.commands.ps;"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY});"
        f"from kvmpriv.cli import main; sys.exit(main({['ps', *arguments]!r}))"
    )
    return [sys.executable, "-c", code]


def test_as_nobody() -> None:
    """Nothing raises, and what this user may not see is counted."""
    if os.geteuid() != 0:
        missing("root", "only root can be another user")
    done = subprocess.run(as_nobody("--json"), capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert found["limits"]["unreadable"] >= 1
    assert found["limits"]["root"] is False
    done = subprocess.run(as_nobody(), capture_output=True, text=True, cwd=ROOT)
    assert re.search(r"note: \d+ process(es)? may have more, .*: run it as root\n", done.stdout)


def namespaces(script: str) -> tuple[str, ...]:
    """A prefix that runs a command in new mount and PID namespaces, after `script`."""
    if os.geteuid() != 0:
        missing("root", "only root can make namespaces everywhere")
    inner = f'set -e; mount --make-rprivate /; {script}; exec "$@"'
    return ("unshare", "--pid", "--fork", "--mount", "sh", "-c", inner, "sh")


def test_pid_namespace() -> None:
    found = document(prefix=namespaces("mount -t proc proc /proc"))
    assert found["limits"]["namespace"] is True
    assert found["limits"]["statistics"] == "another PID namespace"
    assert found["limits"]["identified"] is True
    assert [process["pid"] for process in found["processes"]] == []


def test_pid_namespace_with_the_proc_of_another_one() -> None:
    """The numbers of /proc are not those that kcmp(2) takes here: it must not be asked."""
    found = document(prefix=namespaces("true"))
    assert found["limits"]["identified"] is False


def test_hidepid() -> None:
    mount = namespaces("mount -t proc -o hidepid=2 proc /proc")
    done = subprocess.run([*mount, *as_nobody("--json")], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["limits"]["hidden"] is True
    assert document(prefix=mount)["limits"]["hidden"] is False, "root sees all"
    seen = [*namespaces("mount -t proc proc /proc"), *as_nobody("--json")]
    done = subprocess.run(seen, capture_output=True, text=True, cwd=ROOT)
    assert json.loads(done.stdout)["limits"]["hidden"] is False, "without hidepid"


def test_no_proc() -> None:
    done = run(prefix=namespaces("mount -t tmpfs none /proc"))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "kvmpriv ps: /proc does not show this process: mount it (mount -t proc proc /proc)\n"
    )


def test_proc_that_can_not_be_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert cli.main(["ps"]) == 3
    assert capsys.readouterr() == ("", "kvmpriv ps: /proc: Permission denied\n")


def test_no_device() -> None:
    """A kernel without KVM: the rest is printed all the same."""
    done = run(prefix=namespaces("mount -t proc proc /proc; mount -t tmpfs none /dev"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "note: /dev/kvm does not exist here: KVM is not loaded" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("--json",), ("--watch",)])
def test_output_that_can_not_be_written(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert done.stderr == "kvmpriv: standard output: No space left on device\n"
    done = run(*arguments, capture_output=False, stderr=subprocess.PIPE,
               preexec_fn=lambda: os.close(1))  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "kvmpriv: standard output is closed\n")


def test_watch_ends_with_ctrl_c() -> None:
    with subprocess.Popen(
        [*KVMPRIV_PS, "--watch", "0.05"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        sums = 0
        while sums < 3:  # printed again and again
            sums += "of private memory: size" in child.stdout.readline()
        child.send_signal(signal.SIGINT)
        rest, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (130, "")
    assert "\x1b" not in rest


def test_watch_on_a_terminal(tmp_path: Path) -> None:
    """The screen is cleared each time, and rows fit the terminal."""
    (tmp_path / "dev").mkdir()
    device = (tmp_path / "dev/kvm").open("w")  # so there is a row: a node is known by its path
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, pack("HHHH", 24, 20, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    with subprocess.Popen(
        [*KVMPRIV_PS, "--watch", "0.05"], stdout=slave, stderr=slave, env=environment, cwd=ROOT
    ) as child:
        os.close(slave)
        shown = b""
        while shown.count(b"\x1b[H\x1b[2J") < 3:
            shown += os.read(master, 4096)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == 130
    os.close(master)
    device.close()
    rows = [re.sub(rb"\x1b\[[0-9]*[A-Za-z]", b"", line) for line in shown.split(b"\r\n")]
    headers = [row for row in rows if row.startswith(b"PID")]
    assert headers
    for row in headers:
        assert len(row) == 20
        assert row.endswith(b"..")


def test_reader_that_is_gone() -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" --watch 0.01 | head -c1 >/dev/null; exit ${PIPESTATUS[0]}', "bash",
         *KVMPRIV_PS],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# -- busy hosts ------------------------------------------------------------------------------------


@contextmanager
def children(script: str, count: int = 1) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Programs that run until the block ends, and that print a line when they are ready."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-S", "-E", "-c", f"{script}\nprint(flush=True)\ninput()"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            for _ in range(count)
        ]
        for child in started:
            assert child.stdout is not None
            assert child.stdout.readline() == b"\n"
        yield started
        for child in started:
            child.kill()


def test_ten_thousand_descriptors() -> None:
    script = (
        "import os, resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 10100), hard))\n"
        "assert len([os.dup(0) for _ in range(10000)]) == 10000"
    )
    with children(script) as (child,):
        assert len(os.listdir(f"/proc/{child.pid}/fd")) > 10000
        assert child.pid not in {process.pid for process in snapshot().processes}


def test_processes_that_end_while_they_are_read() -> None:
    """Snapshots beside processes that come and go: nothing raises."""
    script = "while :; do (:) & (:) & wait; done"
    with subprocess.Popen(["sh", "-c", script]) as child:
        try:
            before = time.monotonic()
            while time.monotonic() < before + 2:
                assert snapshot().limits.identified
        finally:
            child.kill()


def test_processes_that_end_before_they_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out, with their descriptors."""
    found = {10**8: [Descriptor(10**8, 3, VM)]}
    scan = processes.Scan(found, [], [10**8])
    monkeypatch.setattr(processes, "scan", lambda **_: scan)
    assert (snapshot().processes, snapshot().files) == ((), ())


# -- files of private memory -----------------------------------------------------------------------


def test_a_file_of_memfd_restricted_is_followed_only_if_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stat of it crashes a kernel with the series as posted; the inode is in fdinfo."""
    followed = []
    stat = os.stat

    def record_stat(path: str) -> os.stat_result:
        followed.append(path)
        return stat(path)

    with Path(__file__).open("rb") as file:
        fd = file.fileno()
        group = [[Descriptor(os.getpid(), fd, RESTRICTEDMEM)]]
        monkeypatch.setattr(os, "stat", record_stat)
        (unknown,) = collect._open_files(group, [], stat_restricted=False)
        assert followed == []
        (known,) = collect._open_files(group, [], stat_restricted=True)
        assert followed == [f"/proc/{os.getpid()}/fd/{fd}"]
        inode = os.fstat(fd).st_ino
    assert (unknown.inode, unknown.size, unknown.allocated) == (inode, None, None)
    assert (known.inode, known.size) == (inode, stat(__file__).st_size)
    assert known.allocated == stat(__file__).st_blocks * 512


def test_blocks_of_guest_memfd_that_are_not_counted(tmp_path: Path) -> None:
    """0 blocks of a file that the kernel does not count are no size."""
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "full").write_bytes(bytes(8192))
    for name, size in (("empty", 0), ("full", 8192)):
        with (tmp_path / name).open("rb") as file:
            group = [[Descriptor(os.getpid(), file.fileno(), GUEST_MEMFD)]]
            (found,) = collect._open_files(group, [], stat_restricted=False)
        blocks = (tmp_path / name).stat().st_blocks
        assert (found.size, found.allocated) == (size, blocks * 512 or None)


def test_mappings_belong_to_the_file_with_their_inode() -> None:
    """A mapping without a descriptor is a file of its own; of a vCPU it goes by the process."""
    with Path(__file__).open("rb") as file:
        me, fd, inode = os.getpid(), file.fileno(), os.fstat(file.fileno()).st_ino
        groups = [[Descriptor(me, fd, GUEST_MEMFD)], [Descriptor(me, 70, VCPU, 1)]]
        maps = [
            processes.Mapping(CHILD, GUEST_MEMFD, None, inode, 4096),
            processes.Mapping(CHILD, GUEST_MEMFD, None, inode, 8192),
            processes.Mapping(CHILD, GUEST_MEMFD, None, inode + 1, MIB),
            processes.Mapping(me, VCPU, 1, 9, 3 * 4096),
            processes.Mapping(CHILD, VCPU, 1, 9, 3 * 4096),
        ]
        found = collect._open_files(groups, maps, stat_restricted=False)
    shown = {(file.kind, file.holders, file.mapped) for file in found}
    assert shown == {
        (GUEST_MEMFD, (Holder(me, fd), Holder(CHILD, None)), 12288),
        (GUEST_MEMFD, (Holder(CHILD, None),), MIB),
        (VCPU, (Holder(me, 70), Holder(me, None)), 0),
        (VCPU, (Holder(CHILD, None),), 0),
    }
    assert [file.number for file in found] == [1, 2, 3, 4]
