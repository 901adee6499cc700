"""``kvmpriv ps`` beside VMs of kvmpriv's own and of QEMU, and beside VMs that are left behind."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import kvmpriv
from conftest import ROOT
from kvmpriv.guest import Puppet
from kvmpriv.private.guest_memfd import GuestMemfd
from kvmpriv.private.restrictedmem import RestrictedMem
from private.support.kernels import FIXED
from private.support.leaks import open_fds
from private.support.requirements import missing
from private.support.syscalls import KEEP_SIZE, fallocate

SCHEMA = json.loads((ROOT / "kvmpriv/ps/schema.json").read_text())
MIB = 1 << 20
SIZE = 2 * MIB


def run(*arguments: str, prefix: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "kvmpriv", "ps", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def ps(*arguments: str, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("--json", *arguments, prefix=prefix))
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    return found


def with_statistics() -> tuple[str, ...]:
    """A prefix for a command that reads KVM's statistics, if debugfs is not mounted."""
    if os.geteuid() != 0:
        missing("debugfs", "only root can read it")
    if Path("/sys/kernel/debug/kvm").exists():
        return ()
    script = 'mount -t debugfs debugfs /sys/kernel/debug && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
    if subprocess.run([*prefix, "test", "-d", "/sys/kernel/debug/kvm"]).returncode:
        missing("debugfs", "it can't be mounted here")
    return prefix


def files_of(found: dict[str, Any], pid: int, kind: str) -> list[dict[str, Any]]:
    return [
        file
        for file in found["files"]
        if file["kind"] == kind and any(holder["pid"] == pid for holder in file["holders"])
    ]


def vm_of(found: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    (vm,) = [vm for vm in found["vms"] if vm["vm"] == file["vm"]]
    return dict(vm)


def pids(file_or_vm: dict[str, Any]) -> set[int]:
    key = "holders" if "holders" in file_or_vm else "pinned_by"
    return {one["pid"] for one in file_or_vm[key]}


def private_file(vm: kvmpriv.Vm) -> GuestMemfd | RestrictedMem:
    """A file of this kernel's ABI, with 2 MiB, of which 1 MiB is allocated."""
    try:
        file = RestrictedMem()
    except OSError:
        pass  # the other ABI
    else:
        file.ftruncate(SIZE)
        fallocate(file, 0, 0, MIB)
        return file
    try:
        memory = GuestMemfd(vm, SIZE)
    except OSError:
        missing("private-memory", "this VM has no file of private memory")
    fallocate(memory, KEEP_SIZE, 0, MIB)
    return memory


@pytest.fixture
def private_vm(kvm: kvmpriv.Kvm) -> Iterator[kvmpriv.Vm]:
    """A VM with private memory, else one of the default type."""
    try:
        vm: kvmpriv.Vm = kvmpriv.private.create_vm(kvm)
    except OSError:
        vm = kvm.create_vm()
    with vm:
        yield vm


# -- this process ----------------------------------------------------------------------------------


def test_own_vm(private_vm: kvmpriv.Vm) -> None:
    """Each open file is one, though Python's mmap keeps a second descriptor of each vCPU."""
    with private_vm.create_vcpu(0), private_vm.create_vcpu(3), private_file(private_vm) as file:
        links = open_fds()
        found = ps()
        me = os.getpid()
        vm = next(
            one
            for one in files_of(found, me, "vm")
            if {"pid": me, "fd": private_vm.fileno()} in one["holders"]
        )
        for kind, start in (("vcpu", "anon_inode:kvm-vcpu:"), ("vm", "anon_inode:kvm-vm")):
            fds = {
                holder["fd"]
                for one in files_of(found, me, kind)
                for holder in one["holders"]
                if holder["pid"] == me
            }
            assert fds - {None} == {fd for fd, link in links.items() if link.startswith(start)}
        (memory,) = [
            one
            for kind in ("guest_memfd", "restrictedmem")
            for one in files_of(found, me, kind)
            if {"pid": me, "fd": file.fileno()} in one["holders"]
        ]
        assert memory["inode"] > 0
        if memory["kind"] == "guest_memfd":
            assert memory["size"] == SIZE
            assert found["totals"]["size"] is None or found["totals"]["size"] >= SIZE
        else:
            assert memory["size"] is None, "a stat can crash a kernel without the fixes"
        if len(files_of(found, me, "vm")) == 1:  # no other test has left a VM open
            assert memory["vm"] == vm["vm"]
            vcpus = {one["vcpu"]: len(one["holders"]) for one in files_of(found, me, "vcpu")}
            assert vcpus == {0: 3, 3: 3}, "two descriptors and a mapping"
            assert vm_of(found, vm)["vcpus"] == [0, 3]
        text = run()
        assert f"{me} " in text
        assert memory["kind"].replace("restrictedmem", "memfd_restricted") in text
    gone = ps()
    inodes = {one["inode"] for one in gone["files"] if one["kind"] == memory["kind"]}
    assert memory["inode"] not in inodes


def test_size_of_a_file_of_memfd_restricted(private_vm: kvmpriv.Vm) -> None:
    """With the option it is read, and what is allocated, too."""
    if not FIXED:
        missing("dangerous", "a stat crashes a kernel that may have v9 without the fixes")
    with private_file(private_vm) as file:
        found = ps("--stat-restricted")
        (memory,) = [
            one
            for one in files_of(found, os.getpid(), "restrictedmem")
            if {"pid": os.getpid(), "fd": file.fileno()} in one["holders"]
        ]
        assert (memory["size"], memory["allocated"]) == (SIZE, MIB)
        assert "2 MiB  0 B     1 MiB" in run("--stat-restricted")


def test_a_mapped_file(kvm: kvmpriv.Kvm) -> None:
    """guest_memfd that the host may map: the mapping is a reference, also without a descriptor."""
    with kvm.create_vm() as vm:
        try:
            file = GuestMemfd(vm, SIZE, kvmpriv.uapi.guest_memfd.GUEST_MEMFD_FLAG_MMAP)
        except OSError:
            missing("shared-guest-memfd", "guest_memfd of the default VM can't be mapped")
        with file:
            mapping = mmap.mmap(file.fileno(), SIZE)
            fds = {fd for fd, link in open_fds().items() if "kvm-gmem" in link}
            (memory,) = files_of(ps(), os.getpid(), "guest_memfd")
            assert {one["fd"] for one in memory["holders"]} == fds | {None}
            assert (memory["size"], memory["mapped"]) == (SIZE, SIZE)
        mapping.close()
    assert files_of(ps(), os.getpid(), "guest_memfd") == []


def test_statistics(kvm: kvmpriv.Kvm) -> None:
    """Who made the VM, and how much its page tables map: as KVM reports to the VMM itself."""
    prefix = with_statistics()
    with kvm.create_vm() as vm, Puppet(vm) as guest, kvmpriv.HostMemory(0x1000) as memory:
        vm.map(memory, 4 << 30)
        guest.write(4 << 30, b"x")
        found = ps(prefix=prefix)
        assert found["limits"]["statistics"] == "read"
        file = next(
            one
            for one in files_of(found, os.getpid(), "vm")
            if {"pid": os.getpid(), "fd": vm.fileno()} in one["holders"]
        )
        record = vm_of(found, file)
        assert record["creator"]["pid"] == os.getpid()
        assert record["creator"]["ended"] is False
        assert record["left_behind"] is False
        counters = vm.stats()  # a KVM that does not use page tables of its own maps nothing
        pages = {"pages_4k": 1 << 12, "pages_2m": 1 << 21, "pages_1g": 1 << 30}
        mapped = sum(counters[name] * size for name, size in pages.items())
        assert record["mapped_in_guest"] == mapped


# -- VMs that are shared and left behind -----------------------------------------------------------

#: Makes a VM with a vCPU, and a file of private memory if there is one; then `{leave}` makes
#: another process that has a part of it, and prints the PIDs of both.
VMM = """\
import os, socket, subprocess, sys, time
import kvmpriv
from kvmpriv.private.guest_memfd import GuestMemfd
kvm = kvmpriv.Kvm()
try:
    vm = kvmpriv.private.create_vm(kvm)
except OSError:
    vm = kvm.create_vm()
vcpu = vm.create_vcpu(0)
try:
    memory = GuestMemfd(vm, 2 << 20)
except OSError:
    memory = None
SLEEP = [sys.executable, "-S", "-E", "-c", "import sys; sys.stdin.read()"]
{leave}
print(os.getpid(), other, vm.fileno(), memory.fileno() if memory else -1, flush=True)
sys.stdin.readline()  # the VMM ends, the other process stays
"""
FORK = """
other = os.fork()
if other == 0:
    time.sleep(600)
"""
#: The memory alone: KVM's other files are closed on exec.
EXECUTE = """
other = subprocess.Popen(SLEEP, pass_fds=[memory.fileno()] if memory else [vm.fileno()]).pid
"""
#: The receiver's descriptor has another number.
SEND = """
ours, theirs = socket.socketpair()
receive = f"import socket, sys; s = socket.socket(fileno={theirs.fileno()});"
receive += "m = socket.recv_fds(s, 1, 1); s.send(b'x'); sys.stdin.read()"
other = subprocess.Popen([*SLEEP[:-1], receive], pass_fds=[theirs.fileno()]).pid
socket.send_fds(ours, [b"x"], [vm.fileno()])
assert ours.recv(1) == b"x"
"""


class Pair:
    """A VMM and the other process that has a part of its VM."""

    def __init__(self, leave: str, stack: ExitStack) -> None:
        self.vmm = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", VMM.replace("{leave}", leave)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        )
        assert self.vmm.stdout is not None
        numbers = [int(word) for word in self.vmm.stdout.readline().split()]
        self.pid, self.other, self.vm_fd, self.memory_fd = numbers
        stack.callback(self.end_other)

    def end_vmm(self) -> None:
        assert self.vmm.stdin is not None
        self.vmm.kill()
        self.vmm.wait()

    def end_other(self) -> None:
        """It is no child of this process: wait until /proc no longer shows it."""
        with suppress(ProcessLookupError):
            os.kill(self.other, 9)
        while Path(f"/proc/{self.other}/fd/0").exists():
            time.sleep(0.01)


@contextmanager
def pair(leave: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(leave, stack)


def lines(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


@pytest.mark.usefixtures("kvm")
def test_a_child_that_outlives_its_vmm() -> None:
    prefix = with_statistics()
    with pair(FORK) as both:
        found = ps(prefix=prefix)
        (vm,) = [vm for vm in found["vms"] if (vm["creator"] or {}).get("pid") == both.pid]
        assert pids(vm) == {both.pid, both.other}
        assert vm["left_behind"] is False
        (line,) = lines(run(prefix=prefix), "stays alive after", f"of pid {both.pid} (")
        assert f"of pid {both.other} (" in line
        both.end_vmm()
        found = ps(prefix=prefix)
        (vm,) = [vm for vm in found["vms"] if (vm["creator"] or {}).get("pid") == both.pid]
        assert vm["creator"] == {"pid": both.pid, "name": None, "ended": True}
        assert (vm["left_behind"], vm["by_elimination"]) == (True, False)
        assert pids(vm) == {both.other}
        (line,) = lines(run(prefix=prefix), f"of pid {both.pid}, which has ended, is kept alive by")
        assert f"fd {both.vm_fd} (VM)" in line
        assert f"of pid {both.other} (" in line
        both.end_other()
        assert lines(run(prefix=prefix), f"of pid {both.pid}") == []


@pytest.mark.usefixtures("kvm")
def test_a_program_that_inherited_the_memory_alone() -> None:
    """No process has the VM open, and the file keeps it alive."""
    with pair(EXECUTE) as both:
        if both.memory_fd < 0:
            missing("guest_memfd", "no file that pins a VM")
        found = ps()
        (memory,) = files_of(found, both.other, "guest_memfd")
        assert memory["holders"] == sorted(
            ({"pid": pid, "fd": both.memory_fd} for pid in (both.pid, both.other)),
            key=lambda holder: holder["pid"],
        )
        assert not vm_of(found, memory)["left_behind"]
        both.end_vmm()
        found = ps()
        (memory,) = files_of(found, both.other, "guest_memfd")
        vm = vm_of(found, memory)
        assert vm["left_behind"] is True
        assert vm["pinned_by"] == [
            {"file": memory["file"], "pid": both.other, "fd": both.memory_fd}
        ]
        kept = f"kept alive by fd {both.memory_fd} (guest_memfd, 2 MiB) of pid {both.other} ("
        assert len(lines(run(), kept)) == 1
        both.end_other()
        assert lines(run(), f"of pid {both.other} ") == []


@pytest.mark.usefixtures("kvm")
def test_a_process_that_received_the_vm() -> None:
    with pair(SEND) as both:
        (file,) = files_of(ps(), both.other, "vm")
        fds = {holder["pid"]: holder["fd"] for holder in file["holders"]}
        assert fds.keys() == {both.pid, both.other}
        assert fds[both.pid] == both.vm_fd
        both.end_vmm()
        (file,) = files_of(ps(), both.other, "vm")
        assert pids(file) == {both.other}


# -- QEMU ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kvm")
def test_qemu() -> None:
    """A QEMU that has not begun to run its guest (-S)."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        missing("qemu", "no qemu-system-x86_64")
    options = ["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35"]
    options += ["-accel", "kvm", "-smp", "2", "-m", "32", "-S", "-monitor", "stdio"]
    with subprocess.Popen([qemu, *options], stdin=-1, stdout=-1, stderr=-1, text=True) as child:
        try:
            wait_for(lambda: len(files_of(ps(), child.pid, "vcpu")) == 2, child)
            found = ps()
            (file,) = files_of(found, child.pid, "vm")
            assert [one["vcpu"] for one in files_of(found, child.pid, "vcpu")] == [0, 1]
            assert len(files_of(found, child.pid, "device")) == 1
            vm = vm_of(found, file)
            assert (vm["vcpus"], vm["left_behind"]) == ([0, 1], False)
            assert pids(vm) == {child.pid}
            (row,) = [line for line in run().splitlines() if line.startswith(f"{child.pid} ")]
            assert "qemu-system-x86" in row
            assert lines(run(), "which", f"pid {child.pid} ") == []
        finally:
            child.kill()


def wait_for(done: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    for _ in range(100):
        if done():
            return
        if child.poll() is not None:
            assert child.stderr is not None
            missing("qemu", f"QEMU can't use this KVM: {child.stderr.read()[:200]}")
        time.sleep(0.1)
    raise AssertionError("QEMU has not made two vCPUs")
