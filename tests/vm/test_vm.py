"""scripts/vm: it passes streams and statuses on, and tells its own failures from the command's."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import pty
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from kbuild import vm as vm_script
from kbuild.kernel_log import complaints
from kbuild.paths import cache_root
from private.support.requirements import missing

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def image() -> str:
    """Any kernel that is built: these tests are about the runner."""
    found = [
        path
        for name in ("restrictedmem", "guest_memfd")
        for path in cache_root().glob(f"{name}.*/bzImage")
    ]
    lacking = "" if found else "no built kernel (scripts/kernel/build guest_memfd)"
    lacking = lacking or ("" if shutil.which("qemu-system-x86_64") else "no qemu-system-x86_64")
    if lacking:
        missing("guest_memfd", lacking)
    return str(max(found, key=lambda path: path.stat().st_mtime))


def vm(
    image: str, *command: str, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the words before `--` as options and those after it as the command."""
    return subprocess.run(
        [str(SCRIPTS / "vm"), image, "-q", "--timeout", "90", *command],
        input=stdin,
        capture_output=True,
        check=False,
        env=env,
        timeout=120,
    )


def sh(script: str) -> tuple[str, str, str, str]:
    return "--", "sh", "-c", script


def qemus_of(pid: int) -> list[str]:
    """The QEMU processes that a runner with this pid started and that still run; no zombies."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = status.read_text().rpartition(") ")
            arguments = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        mine = f"kvmpriv-vm-{pid}-".encode() in arguments
        if "qemu" in name and mine and not fields.startswith("Z"):
            found.append(name)
    return found


def test_status_streams_and_surroundings(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results, kept"
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("KVMPRIV_WORD", "a 'word' and\na line")
    monkeypatch.setenv("UNRELATED", "1")
    lines = [
        r"printf 'out\0\r\n\377'; printf 'err\0\r\n\376' >&2",
        f"exec >'{out}/told'; pwd; id -u; uname -n",
        'test -c /dev/kvm && test -w /dev/kvm && echo kvm; echo "$KVMPRIV_WORD"; echo "$UNRELATED"',
        "echo lost >lost; cat lost; echo again >/dev/stderr",
        "stat -f -c %T /sys/fs/cgroup /sys/kernel/debug /dev/shm; cat /sys/class/net/lo/flags",
        "unshare -Ur id -u; read x || echo end; exit 7",
    ]
    log = tmp_path / "kernel, log"
    result = vm(image, "--output-dir", str(out), "--log", str(log), *sh("\n".join(lines)))
    assert result.returncode == 7, result.stderr
    assert result.stdout == b"out\0\r\n\xff"
    assert result.stderr == b"err\0\r\n\xfeagain\n"
    told = (out / "told").read_text().splitlines()
    name = Path(image).parent.name
    assert told == [
        *(str(here), "0", name, "kvm", "a 'word' and", "a line", "", "lost"),
        *("cgroup2fs", "debugfs", "tmpfs", "0x9", "0", "end"),
    ]
    assert list(here.iterdir()) == []
    assert "Linux version" in log.read_text()


def test_stdin_and_much_output_are_binary_clean(image: str) -> None:
    data = random.Random(3).randbytes(1 << 20)
    result = vm(image, "--stdin", *sh("tee /dev/fd/2 | cat"), stdin=data)
    assert result.returncode == 0
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()
    assert hashlib.sha256(result.stderr).digest() == hashlib.sha256(data).digest()


def test_this_python_runs_inside(image: str) -> None:
    code = "import ssl, sys; print(sys.version)"
    result = vm(image, "--", sys.executable, "-c", code)
    assert (result.returncode, result.stdout.decode()) == (0, f"{sys.version}\n")


def test_what_the_command_left_running_does_not_hang_it(image: str) -> None:
    started = time.monotonic()
    result = vm(image, *sh("(trap '' TERM; sleep 1000) & sleep 1000 & echo fine; kill -9 $$"))
    assert (result.returncode, result.stdout, result.stderr) == (128 + 9, b"fine\n", b"")
    assert time.monotonic() - started < 45


def test_words_for_the_kernel_that_it_does_not_know(image: str) -> None:
    """The kernel passes them to init, as arguments and environment."""
    result = vm(image, "--append", "nosuchword other=1", *sh("cat /proc/cmdline; echo $other"))
    assert (result.returncode, result.stderr) == (0, b"")
    cmdline, other = result.stdout.decode().splitlines()
    assert cmdline.endswith(" nosuchword other=1")
    assert other == "1"


def test_panic(image: str) -> None:
    result = vm(image, *sh("echo before; sync; echo c >/proc/sysrq-trigger; sleep 60"))
    assert result.returncode == 121
    assert result.stdout == b"before\n"
    assert b"Kernel panic - not syncing: sysrq triggered crash" in result.stderr
    assert b"the whole log: " in result.stderr


def test_oops_is_a_panic(image: str) -> None:
    result = vm(image, *sh("echo BUG >/sys/kernel/debug/provoke-crash/DIRECT; exit 0"))
    assert result.returncode == 121
    assert b"kernel BUG at drivers/misc/lkdtm" in result.stderr


@pytest.mark.parametrize(("more", "status"), [([], 120), (["--tolerate"], 3)])
def test_warning(image: str, more: list[str], status: int) -> None:
    script = "echo WARNING >/sys/kernel/debug/provoke-crash/DIRECT; echo after; exit 3"
    result = vm(image, *more, *sh(script))
    assert (result.returncode, result.stdout) == (status, b"after\n")
    assert b"complained (1 messages, taint 512)" in result.stderr
    assert (b"lkdtm_WARNING+0x" in result.stderr) == (not more)


def test_reboot_is_a_lost_vm(image: str) -> None:
    result = vm(image, *sh("echo b >/proc/sysrq-trigger; sleep 60"))
    assert result.returncode == 122
    assert b"the VM was lost" in result.stderr


@pytest.mark.parametrize("script", ["sleep 1000", "yes"])
def test_timeout(image: str, script: str) -> None:
    started = time.monotonic()
    result = vm(image, "--timeout", "20", *sh(f"echo here; {script}"))
    assert result.returncode == 124
    assert result.stdout.startswith(b"here\n")
    assert b"the command did not end; stopped after 20 s" in result.stderr
    assert 20 <= time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("script", "status"),
    [("sleep 100", 124), ("timeout 30 sh -c 'while :; do :; done'; exit 7", 7)],
)
def test_silence_is_not_waited_for_where_nothing_runs(image: str, script: str, status: int) -> None:
    """Twins: both commands are silent; one sleeps and is ended, the other works and is not."""
    result = vm(image, "--silence", "12", *sh(f"echo here; {script}"))
    assert result.returncode == status
    assert result.stdout == b"here\n"
    assert (b"silent and idle" in result.stderr) == (status == 124)


#: `FXRSTOR (%rdi)` for ever on one of the command's CPUs, a guest's exits on the other.
BESIDE_FXRSTOR = """
import ctypes, mmap, os
from kvmpriv import Kvm
from kvmpriv.guest.puppet import Puppet
cpus = sorted(os.sched_getaffinity(0))
print(*cpus, os.cpu_count())
for cpu in cpus:
    child = os.fork()
    os.sched_setaffinity(0, {cpu} if child else {*cpus} - {cpu})
    if not child:
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(bytes.fromhex("0fae07 0fae0f ebfb"))  # FXSAVE (%rdi); 1: FXRSTOR (%rdi); JMP 1b
        at = ctypes.addressof(ctypes.c_char.from_buffer(page))
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(at)(at + 1024)
    with Kvm() as kvm, kvm.create_vm() as vm, Puppet(vm) as guest:
        for _ in range(10000):
            guest.rdtsc()
    os.kill(child, 9)
    print("signal", os.waitpid(child, 0)[1])
"""


def test_a_guest_beside_a_process_that_restores_its_registers(image: str) -> None:
    """The command does not get the CPU on which the emulator would confuse guest and process."""
    result = vm(image, "--silence", "30", "--", sys.executable, "-c", BESIDE_FXRSTOR)
    assert (result.returncode, result.stderr) == (0, b"")
    cpus, *ended = result.stdout.decode().splitlines()
    assert cpus in ("1 2 3", "0 1 2")  # the emulator, KVM
    assert ended == [f"signal {signal.SIGKILL}"] * 2, "the other process ran all the time"


def test_a_stalled_kernel_is_not_waited_for(image: str) -> None:
    """A kernel that reports a stall ends the run, whatever the time limit is."""
    # The kernel notices when something waits for that CPU: each process that ends has RCU do so.
    others = "(while sleep 1; do :; done) &"
    result = vm(image, *sh(f"{others} echo SOFTLOCKUP >/sys/kernel/debug/provoke-crash/DIRECT"))
    assert result.returncode == 120
    assert b"stall" in result.stderr
    assert b"; stopped after" in result.stderr


def test_vm_that_does_not_come_up(tmp_path: Path) -> None:
    image = tmp_path / "bzImage"
    image.write_bytes(b"no kernel")
    result = vm(str(image), "--", "true")
    assert result.returncode == 123
    assert b"invalid kernel header" in result.stderr
    assert re.search(rb"If QEMU \d\S+ is too old for this kernel, put a newer one", result.stderr)


#: Called as QEMU it waits, as often as there are lines in a file, and then is QEMU.
STOPS = """#!/bin/sh
if [ -s {left} ]; then
    sed -i 1d {left}
    exec sleep 1000
fi
exec {qemu} "$@"
"""
#: scripts/vm with less patience.
IMPATIENT = """
import sys
sys.path.insert(0, {scripts!r})
from kbuild import vm
vm.BOOT_SILENCE = {seconds}, {seconds}
sys.exit(vm.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("boots", "seconds"), [(0, 30), (1, 30), (2, 2)])
def test_a_kernel_that_stops_in_its_boot(
    image: str, tmp_path: Path, boots: int, seconds: int
) -> None:
    """QEMU's emulation stops at times before the kernel is up: one that does is booted again."""
    qemu = shutil.which("qemu-system-x86_64")
    left = tmp_path / "left"
    left.write_text("one more\n" * boots)
    wrapper = tmp_path / "bin" / "qemu-system-x86_64"
    wrapper.parent.mkdir()
    wrapper.write_text(STOPS.format(left=left, qemu=qemu))
    wrapper.chmod(0o755)
    program = IMPATIENT.format(scripts=str(SCRIPTS), seconds=float(seconds))
    options = [image, "--accel", "tcg", "--timeout", "300", "--stdin", "--", "cat"]
    result = subprocess.run(
        [sys.executable, "-c", program, *options],
        input=b"for the command\n",
        capture_output=True,
        env={**os.environ, "PATH": f"{wrapper.parent}:{os.environ['PATH']}"},
    )
    assert left.read_bytes() == b""
    again = b"vm: the kernel has stopped in its boot, after: nothing\n  it is booted once more\n"
    assert result.stderr.count(again) == (boots > 0)
    if boots < 2:
        assert (result.returncode, result.stdout) == (0, b"for the command\n")
    else:
        assert (result.returncode, result.stdout) == (123, b"")
        assert b"vm: the VM did not come up; stopped after " in result.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_qemu_is_left_behind(image: str, how: signal.Signals) -> None:
    command = [str(SCRIPTS / "vm"), image, *sh("echo started; sleep 1000")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout
        assert run.stdout.readline() == b"started\n"
        assert len(qemus_of(run.pid)) == 1
        run.send_signal(how)
        assert run.wait(10) == (-9 if how == signal.SIGKILL else 128 + how)
        until = time.monotonic() + 5
        while qemus_of(run.pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert qemus_of(run.pid) == []


def test_ctrl_c_leaves_the_terminal_as_it_was(image: str) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(SCRIPTS / "vm", ["vm", image, *sh("echo started; sleep 1000")])
    before = termios.tcgetattr(terminal)
    seen = b""
    while b"started" not in seen:
        seen += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert termios.tcgetattr(terminal) == before
    assert qemus_of(pid) == []
    os.close(terminal)


def test_closed_stdout_ends_the_run(image: str) -> None:
    command = [str(SCRIPTS / "vm"), image, "-q", "--", "yes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout
        assert run.stderr
        assert run.stdout.readline() == b"y\n"
        run.stdout.close()
        assert run.wait(30) == 128 + signal.SIGPIPE
        assert run.stderr.read() == b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus", "--", "true"], "unknown kernel 'bogus'"),
        (["./bogus", "--", "true"], "the kernel image bogus does not exist"),
        (["guest_memfd"], "no command"),
        (["guest_memfd", "--memory", "much", "--", "true"], "--memory must be a size"),
        (["guest_memfd", "--bogus", "--", "true"], "unrecognized arguments: --bogus"),
        (["--source", "/nonexistent", "--", "true"], "/nonexistent does not exist"),
        (["./bogus", "--source", "/", "--", "true"], "./bogus is an image: give one of them"),
    ],
)
def test_usage(arguments: list[str], words: str) -> None:
    result = subprocess.run(
        [str(SCRIPTS / "vm"), *arguments], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (125, "")
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_without_qemu(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / "launch.py"), "kbuild.vm", "guest_memfd", "--", "true"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 125
    assert "missing: qemu-system-x86_64" in result.stderr


def test_kvm_is_not_taken_where_it_cannot_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(leaf: int, ecx: int) -> object:
        def ioctl(fd: object, request: int, buffer: bytearray) -> int:
            assert request == 0xC008AE05
            buffer[:48] = b"".join(
                number.to_bytes(4, "little") for number in (1, 0, leaf, 0, 0, 0, 0, ecx, 0, 0, 0, 0)
            )
            return 0

        return ioctl

    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        missing("host", "/dev/kvm cannot be opened")
    for leaf, ecx, nests in [
        (1, 1 << 5, True),  # VMX
        (0x80000001, 1 << 2, True),  # SVM
        (1, 1 << 2, False),
        (0x80000001, 1 << 5, False),
        (1, 0, False),
    ]:
        monkeypatch.setattr(fcntl, "ioctl", answers(leaf, ecx))
        assert vm_script.host_kvm_nests() is nests


TROUBLE = """\
[    4.479566] WARNING: CPU: 0 PID: 63 at lkdtm_WARNING+0xa/0x10
[    4.5][   T63] WARNING: possible circular locking dependency detected
[   12.345678] BUG: KASAN: slab-use-after-free in foo+0x1/0x2
[   12.345678] BUG: sleeping function called from invalid context at mm/a.c:1
[   12.345678] BUG kmalloc-64 (Not tainted): Poison overwritten
[   12.345678] kernel BUG at mm/foo.c:12!
[   12.345678] Oops: 0000 [#1] SMP
[   12.345678] general protection fault, probably for non-canonical address
[   12.345678] UBSAN: shift-out-of-bounds in a.c:1:2
[   12.345678] kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)
[   12.345678] rcu: INFO: rcu_sched self-detected stall on CPU
[   12.345678] INFO: task sh:12 blocked for more than 120 seconds.
[   12.345678] INFO: trying to register non-static key.
[   12.345678] Kernel panic - not syncing: Attempted to kill init!
[   12.345678] list_del corruption, ffff->next is LIST_POISON1
[   12.345678] refcount_t: underflow; use-after-free.
[   12.345678] ODEBUG: free active (active state 0) object type: timer_list
unreferenced object 0xffff888003b1a000 (size 64):""".splitlines()

FINE = """\
[    0.1] RETBleed: WARNING: Spectre v2 mitigation leaves CPU vulnerable to RETBleed attacks
[    0.2] Could not switch to high resolution mode on CPU 1
[   12.3] Out of memory: Killed process 12 (python3) total-vm:1kB
[   12.3] python3 invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0
[   12.3] FAULT_INJECTION: forcing a failure.
[   12.3] Call Trace:
[   12.3] kmemleak: Kernel memory leak detector initialized (mem pool available: 15000)
[   12.3] traps: python3[12] general protection fault ip:1 sp:2 error:0
[   12.3] python3[12]: segfault at 0 ip 0 sp 0 error 4
[   12.3] DEBUG: no BUG: here""".splitlines()


def test_complaints_are_told_from_chatter() -> None:
    assert complaints("\n".join(TROUBLE)) == TROUBLE
    assert complaints("\n".join(FINE)) == []


def test_relevant_part_starts_at_the_first_complaint() -> None:
    log = "\n".join([*FINE, *TROUBLE])
    shown = vm_script.relevant(log, limit=5).splitlines()
    assert [line.removeprefix("  | ") for line in shown] == [*FINE[-2:], *TROUBLE[:3]]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_stream_mark_split_anywhere(size: int) -> None:
    mark = b"abcabd"
    sent = b"xabcabcab" + b"abcab" * 3 + mark
    theirs, ours = socket.socketpair()
    read_end, write_end = os.pipe()
    with theirs, ours, os.fdopen(read_end, "rb") as got:
        stream = vm_script.Stream(ours, write_end, mark)
        for at in range(0, len(sent), size):
            theirs.sendall(sent[at : at + size])
            more = stream.pump()
        os.close(write_end)
        assert got.read() == sent.removesuffix(mark)
    assert stream.ended
    assert not more


def test_old_logs_go_but_not_those_of_running_vms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMPRIV_CACHE", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    logs = tmp_path / "logs"
    logs.mkdir()
    running = logs / f"restrictedmem-20000101-000000-{os.getpid()}.log"
    running.touch()
    os.utime(running, (0, 0))
    for number in range(vm_script.LOGS_KEPT + 5):
        log = logs / f"restrictedmem-{number:08}-000000-{ended.pid}.log"
        log.touch()
        os.utime(log, (number + 1, number + 1))
    new = vm_script.find_log(argparse.Namespace(name="restrictedmem", log=None))
    assert new.parent == logs
    assert running.exists()
    left = sorted(log.name.split("-")[1] for log in logs.iterdir() if log != running)
    assert left == [f"{number:08}" for number in range(5, vm_script.LOGS_KEPT + 5)]
