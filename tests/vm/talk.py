"""Guests that a program talks to: runs in a VM, as test_talk.py starts it.

    pytest tests/vm/talk.py --linux-kernel BZIMAGE

Its name is not that of a test: on a host whose KVM can't run Linux all of it would be skipped.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import io
import os
import pty
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from kvmpriv import ClosedError, Kvm, trace
from kvmpriv.guest.linux import (
    GuestDied,
    LinuxGuest,
    LinuxMachine,
    ProtocolError,
    agent_ready,
    initrd,
    load_linux,
    plan,
)
from kvmpriv.guest.linux.disk import Block, Entropy
from kvmpriv.guest.linux.net import Net
from kvmpriv.guest.linux.tap import GUEST_ADDRESS, HOST_ADDRESS, Tap
from kvmpriv.guest.linux.vhost import VhostVsock
from kvmpriv.guest.linux.vsock import Vsock
from kvmpriv.pytest import MakeLinuxGuest
from private.support.leaks import open_fds

MIB = 1 << 20

pytestmark = pytest.mark.linux_guest(memory=256 * MIB)
#: The tests share a guest, whose agent comes over vsock.
shared = pytest.mark.linux_guest(scope="module")
#: With `both` they run in one with private memory, too, and in one without vsock.
KINDS = {
    "shared": shared,
    "private": pytest.mark.linux_guest(scope="module", private=True),
    "port": pytest.mark.linux_guest(scope="module", vsock=False),
}
TRANSPORTS = {"shared": "vsock", "private": "vsock", "port": "virtio-console"}


def in_kinds(*kinds: str) -> pytest.MarkDecorator:
    """The test runs in guests of these kinds."""
    marked = [pytest.param(kind, marks=KINDS[kind]) for kind in kinds]
    return pytest.mark.parametrize("kind", marked, indirect=True)


both = in_kinds(*KINDS)


@pytest.fixture(autouse=True)
def kind(request: pytest.FixtureRequest) -> str:
    """Which guest a test with `in_kinds` has."""
    return getattr(request, "param", "")


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> str:
    """The kernel's file."""
    return str(request.config.getoption("--linux-kernel"))


@contextmanager
def raises(kind: type[BaseException], words: str = "") -> Iterator[list[Any]]:
    """The block raises `kind`, and its message contains `words`."""
    found: list[Any] = []
    with pytest.raises(kind, match=re.escape(words) if words else None) as raised:
        yield found
    found.append(raised.value)


def within(seconds: float, true: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- in one guest, in one with private memory, and in one without vsock ----------------------------


@both
def test_commands(linux_guest: LinuxGuest, kind: str) -> None:
    assert linux_guest.transport == TRANSPORTS[kind]
    done = linux_guest.run(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"\0\xff\r\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"\0\xff\r\n", b"err\n")
    assert linux_guest.run("uname -s", text=True, check=True).stdout == "Linux\n"
    assert linux_guest.run("kill -9 $$").returncode == -9
    assert linux_guest.run(["pwd"]).stdout == b"/\n"
    assert linux_guest.run(["pwd"], cwd="/proc").stdout == b"/proc\n"
    assert linux_guest.run(["env"], env={"A": "1", "PATH": "/bin"}).stdout == b"A=1\nPATH=/bin\n"
    with raises(FileNotFoundError, "no-such"):
        linux_guest.run(["no-such"])
    with raises(subprocess.CalledProcessError):
        linux_guest.run(["false"], check=True)
    assert linux_guest.run("ls -l /proc/self/fd").stdout.count(b"pipe:") == 3


@both
def test_files(linux_guest: LinuxGuest, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    (top / "a b").mkdir(parents=True)
    data = random.Random(3).randbytes(3 * MIB + 17)
    odd = Path(os.fsdecode(os.fsencode(top / "a b") + b"/\xff\n"))
    odd.write_bytes(data)
    odd.chmod(0o711)
    (top / "link").symlink_to("a b")
    linux_guest.put(top, "/tmp/tree")
    listed = linux_guest.run("cd /tmp/tree && find . -print0 | sort -z").stdout.split(b"\0")
    assert listed == [b".", b"./a b", b"./a b/\xff\n", b"./link", b""]
    assert linux_guest.run(["stat", "-c", "%a", b"/tmp/tree/a b/\xff\n"]).stdout == b"711\n"
    back = tmp_path / "back"
    linux_guest.get("/tmp/tree", back)
    copied = Path(os.fsdecode(os.fsencode(back / "a b") + b"/\xff\n"))
    assert copied.read_bytes() == data
    assert copied.stat().st_mode & 0o777 == 0o711
    assert os.readlink(back / "link") == "a b"
    linux_guest.put(b"#!/bin/sh\necho put\n", "/tmp/program", mode=0o755)
    assert linux_guest.run(["/tmp/program"]).stdout == b"put\n"
    assert linux_guest.get("/tmp/program") == b"#!/bin/sh\necho put\n"


@both
def test_streams(linux_guest: LinuxGuest) -> None:
    """Both directions at a time, more than all windows."""
    data = random.Random(4).randbytes(2 * MIB)
    assert linux_guest.run(["cat"], input=data).stdout == data
    flood = linux_guest.run("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2")
    assert (flood.stdout, flood.stderr) == (bytes(1_000_000), bytes(1_000_000))


@both
def test_process(linux_guest: LinuxGuest) -> None:
    with linux_guest.popen(["cat"], text=True) as cat:
        cat.stdin.write("a line\n")
        cat.stdin.flush()
        assert cat.stdout.readline() == "a line\n"
        assert cat.poll() is None
        cat.terminate()
        assert cat.wait(30) == -signal.SIGTERM
    processes = [linux_guest.popen("read x; echo $x") for _ in range(10)]
    for number, process in enumerate(processes):
        assert process.communicate(b"%d\n" % number)[0] == b"%d\n" % number
        assert process.wait() == 0
    with linux_guest.popen("tty; stty size; read x; echo got $x", terminal=(33, 101)) as process:
        process.stdin.write(b"typed\n")
        process.stdin.flush()
        shown = process.stdout.read()
        assert b"33 101\r\n" in shown, shown
        assert shown.endswith(b"got typed\r\n")


@both
def test_timeout(linux_guest: LinuxGuest) -> None:
    with raises(subprocess.TimeoutExpired):
        linux_guest.run("sleep 977 & sleep 977; wait", timeout=2)
    within(20, lambda: b"sleep 977" not in linux_guest.run("ps").stdout)
    with raises(subprocess.TimeoutExpired):
        linux_guest.run("yes & yes >&2", timeout=2)
    assert linux_guest.run(["true"]).returncode == 0


# -- in the guest with shared memory only ----------------------------------------------------------


@shared
def test_room(linux_guest: LinuxGuest, tmp_path: Path) -> None:
    linux_guest.run("mkdir /tmp/small; mount -t tmpfs -o size=1m none /tmp/small", check=True)
    with raises(OSError, "No space left on device (in the guest)") as full:
        linux_guest.put(bytes(2 * MIB), "/tmp/small/big")
    assert (full[0].errno, full[0].filename) == (errno.ENOSPC, "/tmp/small/big")
    assert linux_guest.get("/proc/version").startswith(b"Linux version")
    with raises(OSError, "a character device"):
        linux_guest.get("/dev/null")
    with raises(OSError, "a block device") as refused:
        linux_guest.run("mknod /tmp/node b 7 0", check=True)
        linux_guest.get("/tmp/node")
    assert refused[0].filename == "/tmp/node"
    linux_guest.run("mkdir /tmp/out; ln -s /etc /tmp/out/x", check=True)
    with raises(ProtocolError, "symbolic link"):
        linux_guest.get("/tmp/out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@shared
def test_orphans(linux_guest: LinuxGuest) -> None:
    """Processes that lose their parents are reaped, and the agent has no leftovers."""
    linux_guest.run("(sleep 0.1 &) ; (true &)")
    within(20, lambda: b"[sleep]" not in linux_guest.run("ps").stdout)
    assert b" Z " not in linux_guest.run("ps -o stat,comm").stdout.replace(b"Z  ", b" Z ")
    fds = linux_guest.run(
        "ls /proc/$(pidof -s @.kvmpriv/agent || echo 1)/fd 2>/dev/null | wc -l"
    ).stdout
    assert int(fds) < 12


@shared
def test_threads(linux_guest: LinuxGuest) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                text = f"{number}.{turn}"
                assert linux_guest.run(["echo", text], text=True).stdout == text + "\n"
                linux_guest.put(text.encode(), f"/tmp/{number}")
                assert linux_guest.get(f"/tmp/{number}") == text.encode()
        except BaseException as error:  # noqa: BLE001  # the check gets it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@shared
def test_ctrl_c(linux_guest: LinuxGuest, tmp_path: Path) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for work in (
            lambda: linux_guest.run("sleep 978"),
            lambda: linux_guest.run(["cat"], input=bytes(256 * MIB)),
            lambda: linux_guest.get("/proc/kmsg", tmp_path / "kmsg"),
            lambda: linux_guest.put(bytes(200 * MIB), "/tmp/much"),
        ):
            signal.setitimer(signal.ITIMER_REAL, 1)
            with raises(KeyboardInterrupt):
                work()
            assert linux_guest.run(["true"]).returncode == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / "kmsg").exists()
    within(20, lambda: b"sleep 978" not in linux_guest.run("ps").stdout)


@shared
def test_shell(linux_guest: LinuxGuest) -> None:
    """On a terminal of this process: raw meanwhile, as it was afterwards; its size is passed on."""
    status, shown, same = on_terminal(linux_guest.shell, b"stty size\nexit 5\n")
    assert status == 5, shown
    assert same, "the terminal was not restored"
    assert b"24 80\r\n" in shown or b"31 77\r\n" in shown, shown


def on_terminal(call: Callable[[], int], typed: bytes) -> tuple[int, bytes, bool]:
    """Call with a terminal as standard input and output; what it returned and what it showed."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (31, 77)) if hasattr(termios, "tcsetwinsize") else None
    shown = bytearray()
    before = termios.tcgetattr(slave)

    def user() -> None:
        sent = False
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:
                return
            if not data:
                return
            shown.extend(data)
            if not sent and (b"#" in shown or b"$" in shown):
                os.write(master, typed)
                sent = True

    saved = os.dup(0), os.dup(1)
    thread = threading.Thread(target=user, daemon=True)
    thread.start()
    os.dup2(slave, 0)
    os.dup2(slave, 1)
    captured = sys.stdin, sys.stdout  # pytest's, which are no terminal
    try:
        tcgetpgrp = os.tcgetpgrp
        os.tcgetpgrp = lambda fd: os.getpgrp()  # it is not our controlling terminal
        with open(0, closefd=False) as sys.stdin, open(1, "w", closefd=False) as sys.stdout:
            status = call()
    finally:
        os.tcgetpgrp = tcgetpgrp
        sys.stdin, sys.stdout = captured
        os.dup2(saved[0], 0)
        os.dup2(saved[1], 1)
    same = termios.tcgetattr(slave) == before
    for fd in (slave, master, *saved):
        os.close(fd)
    return status, bytes(shown), same


@both
def test_pause(linux_guest: LinuxGuest) -> None:
    """A paused guest does nothing and answers nothing; afterwards it goes on."""
    line = "i=0; while :; do i=$((i + 1)); [ $((i % 100)) != 0 ] || echo $i; done"
    with linux_guest.popen(line, text=True) as counts:
        assert counts.stdout.readline() == "100\n"
        linux_guest.pause()
        cost = linux_guest.cost()
        with raises(subprocess.TimeoutExpired):
            linux_guest.run(["true"], timeout=1)
        after = linux_guest.cost()
        assert after.exits == cost.exits
        assert after.wall > cost.wall + 0.9
        assert sum(after.cpu) < sum(cost.cpu) + 0.1  # a guest that counts uses all of a CPU
        linux_guest.resume()
        assert linux_guest.run(["true"]).returncode == 0
        # The counting needs no exit, nor do the agent's port and its interrupts.
        within(30, lambda: sum(linux_guest.cost().cpu) > sum(after.cpu) + 0.1)
        counts.kill()
    log = linux_guest.run(["dmesg"]).stdout
    complaints = re.findall(rb".*(?:lockup|\bstall|hung task).*", log)
    assert complaints == []


# -- guests of their own ---------------------------------------------------------------------------


def test_devices(make_linux_guest: MakeLinuxGuest, tmp_path: Path) -> None:
    """The agent's port beside other devices; shutdown writes the disk."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    guest = make_linux_guest(devices=[Entropy(), Block(disk)], cpus=2)
    assert guest.run(["nproc"]).stdout == b"2\n"
    guest.run("echo written | dd of=/dev/vda conv=notrunc", check=True)
    assert guest.shutdown().how == "off"
    assert disk.read_bytes().startswith(b"written\n")


def test_disk(
    make_linux_guest: MakeLinuxGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discard makes a hole, and a flush reaches the host's disk, or fails in the guest."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * (4 * MIB))
    guest = make_linux_guest(devices=[Block(disk)])
    blocks = disk.stat().st_blocks
    guest.run(f"blkdiscard -o {MIB} -l {2 * MIB} /dev/vda", check=True)
    assert disk.stat().st_blocks <= blocks - 2 * MIB // 512
    assert disk.read_bytes() == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB
    write = "echo written | dd of=/dev/vda conv=notrunc,fsync"
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    guest.run(write, check=True)
    assert calls

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    done = guest.run(write)
    assert done.returncode != 0
    assert b"Input/output error" in done.stderr


SWITCH = """\
mkdir /new
mount -t tmpfs none /new
mkdir /new/bin /new/proc /new/dev
cp /bin/busybox /new/bin
for name in sh cat ls; do ln -s busybox /new/bin/$name; done
echo marker >/new/marker
mount -t proc proc /new/proc
cat >/new/init <<END
#!/bin/sh
echo arguments $* >/marker2
exec /bin/busybox sleep 100000
END
chmod 755 /new/init
exec switch_root /new /init"""


def works(guest: LinuxGuest, line: str) -> bool:
    """Whether the line succeeds; while the root file system is exchanged, there is no shell."""
    with suppress(FileNotFoundError):
        return guest.run(line).returncode == 0
    return False


def test_own_initrd(make_linux_guest: MakeLinuxGuest, tmp_path: Path) -> None:
    """The init of another initrd is started, and commands run where it has gone."""
    root = initrd.busybox(SWITCH)
    path = tmp_path / "own.cpio.gz"
    path.write_bytes(subprocess.run(["gzip", "-c"], input=root, capture_output=True).stdout)
    guest = make_linux_guest(initrd=path)
    within(60, lambda: works(guest, "cat /marker2"))
    assert guest.run(["cat", "/marker"]).stdout == b"marker\n"
    assert guest.run("cat /proc/1/cmdline").stdout.startswith(b"/bin/busybox\0sleep")
    assert guest.get("/marker") == b"marker\n"
    with guest.popen("read x; echo $x", terminal=(10, 10)) as process:
        process.stdin.write(b"on a terminal\n")
        process.stdin.flush()
        assert process.stdout.read().endswith(b"on a terminal\r\n")
    other = initrd.busybox("sleep 100000", {"other": b"#!/bin/busybox sh\nexec /init other\n"})
    guest = make_linux_guest(initrd=other, cmdline="quiet rdinit=/other")
    wanted = b"/bin/busybox\0sh\0/init\0other\0"
    within(60, lambda: guest.run("cat /proc/1/cmdline").stdout == wanted)


def test_panic(make_linux_guest: MakeLinuxGuest) -> None:
    guest = make_linux_guest(initrd=initrd.busybox("mkfifo /tmp/f; read x </tmp/f; exit 3"))
    with raises(GuestDied, "the guest's kernel panicked: Kernel panic") as died:
        within(60, lambda: guest.run("[ -p /tmp/f ]").returncode == 0)
        guest.run("echo x >/tmp/f; sleep 100")
    assert died[0].outcome.how == "panic"
    assert "Attempted to kill init" in died[0].outcome.why
    assert died[0].console


def test_ends(make_linux_guest: MakeLinuxGuest) -> None:
    for command, how, append in (
        ("poweroff -f", "off", ""),
        ("reboot -f", "crash", " reboot=t"),
    ):
        guest = make_linux_guest(cmdline="quiet" + append)
        process: Any = None
        with raises(GuestDied) as died:
            process = guest.popen("echo before; sleep 1000")
            assert process.stdout.readline() == b"before\n"
            guest.run(command + "; sleep 100")
        assert died[0].outcome.how == how, died[0].outcome
        with raises(GuestDied):
            process.wait()


def test_agent_killed(make_linux_guest: MakeLinuxGuest) -> None:
    guest = make_linux_guest()
    with raises(GuestDied, "the guest's agent has ended") as died:
        guest.run("kill -9 $(ps | grep @.kvmpriv | grep -v grep | awk '{print $1}'); sleep 100")
    assert died[0].outcome.how == "agent"
    assert guest.outcome is None
    assert not guest.alive
    with raises(GuestDied):
        guest.run("true")
    guest.shutdown()
    assert guest.outcome is not None


def test_close(make_linux_guest: MakeLinuxGuest) -> None:
    """Closed with commands under way; nothing is left in this process."""
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    guest = make_linux_guest()
    found: list[BaseException] = []

    def use(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  # the check gets it
            found.append(error)

    calls: list[Callable[[], object]] = [
        lambda: guest.run("sleep 1000"),
        lambda: guest.run("yes", limit=1 << 40),
        lambda: guest.run(["cat"], input=bytes(200 * MIB)),
        lambda: guest.get("/proc/kmsg"),
        lambda: guest.put(bytes(200 * MIB), "/tmp/x"),
    ]
    threads = [threading.Thread(target=use, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(2)
    guest.close()
    for thread in threads:
        thread.join(60)
    assert [type(error) for error in found] == [GuestDied] * 5, found
    found.clear()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_several(make_linux_guest: MakeLinuxGuest) -> None:
    """Eight guests in one process, each with its network card and files of its own."""
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    guests: list[LinuxGuest] = []
    failed: list[GuestDied] = []

    def start() -> None:
        try:
            guests.append(make_linux_guest(memory=96 * MIB, devices=[Net(Tap())], timeout=400))
        except GuestDied as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(guests) == 8
    for number, guest in enumerate(guests):
        guest.put(b"%d" % number, "/tmp/x")
    assert [guest.get("/tmp/x") for guest in guests] == [b"%d" % number for number in range(8)]
    addresses = {guest.get("/sys/class/net/eth0/address") for guest in guests}
    assert len(addresses) == 8
    line = f"ifconfig eth0 {GUEST_ADDRESS} up; ping -c 1 {HOST_ADDRESS}"
    for guest in guests:
        assert b" 0% packet loss" in guest.run(line, check=True).stdout
        assert guest.cost().kinds["KVM_EXIT_IO"] > 100
        guest.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert list(Path("/run/netns").glob(f"kvmpriv-{os.getpid()}-*")) == []


def examples(word: str) -> str:
    """The README's program in which `word` is."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = (block for block in blocks if word in block)
    return str(found)


def test_readme(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's examples, and the example programs."""
    monkeypatch.chdir(tmp_path)
    Path("bzImage").symlink_to(kernel)
    shown = io.StringIO()
    values: dict[str, Any] = {}
    with redirect_stdout(shown):
        exec(compile(examples("LinuxGuest"), "README.md", "exec"), values)
    assert shown.getvalue() == "42\n\n"
    assert values["version"].startswith(b"Linux version")
    Path("test_it.py").write_text(examples("pytest.mark"))
    command = [sys.executable, "-m", "pytest", "--linux-kernel", "bzImage"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert " 2 passed" in done.stdout, done.stdout
    for name, arguments, status, words in (
        ("linux_command.py", ["echo $((6 * 7)) of $(uname -s); exit 3"], 3, "42 of Linux\n"),
        ("linux_talk.py", [], 0, "that text at 0 addresses; 384 MiB are private\n"),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts/examples" / name, kernel, *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert words in done.stdout


def test_own_devices(kernel: str) -> None:
    """The example's devices; v9's kernel has what a program in the guest needs for all of them."""
    program = ROOT / "scripts/examples/linux_device.py"
    done = subprocess.run([sys.executable, program, kernel], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/dev/vda: the guest has read 'this is sector 12345'\n" in done.stdout
    if os.environ["KVMPRIV_VM"].startswith("restrictedmem"):
        assert "/dev/port: the guest has read '42'\n" in done.stdout
        assert "/dev/mem: the guest has read '0x0000002A'\n" in done.stdout


def test_command_line(kernel: str) -> None:
    """`kvmpriv boot --run` and `--shell`."""
    boot = [sys.executable, "-m", "kvmpriv", "boot", "--kernel", kernel, "--memory", "256M"]

    def run(*arguments: str, **options: Any) -> tuple[int, bytes, bytes]:
        done = subprocess.run([*boot, *arguments], capture_output=True, **options)
        return done.returncode, done.stdout, done.stderr

    line = "cat; echo err >&2; exit 7"
    assert run("--run", line, input=b"in\0") == (7, b"in\0", b"err\n")
    assert run("--run", "kill -9 $$", "--private", stdin=subprocess.DEVNULL)[0] == 137
    status, output, _ = run("--run", "yes | head -c 3000000; exec >&-; exec true", input=b"x" * MIB)
    assert (status, len(output)) == (0, 3_000_000)
    status, output, errors = run("--run", "sleep 1000", "--timeout", "40", stdin=subprocess.DEVNULL)
    assert (status, output) == (124, b""), errors
    assert b"the guest was ended: the time limit is reached" in errors

    def shell() -> int:
        command = [*boot, "--shell"]
        done = subprocess.run(
            command, stderr=subprocess.DEVNULL, preexec_fn=own_terminal, check=False
        )
        return done.returncode

    done = on_terminal(shell, b"stty size; exit 9\n")
    assert done[0] == 9, done
    assert b"31 77\r\n" in done[1] or b"24 80\r\n" in done[1], done
    assert done[2]


def own_terminal() -> None:
    """Make standard input the controlling terminal of a new session."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


HOSTILE = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /dev
/bin/busybox mount -t devtmpfs none /dev
until [ -c /dev/vport0p0 ]; do /bin/busybox sleep 0.1; done
exec 3<>/dev/vport0p0
/bin/busybox sleep 0.5
/bin/busybox cat /.kvmpriv/hello >&3
/bin/busybox head -c 1 <&3 >/dev/null
/bin/busybox cat /.kvmpriv/answer >&3
exec /bin/busybox sleep 100000
"""


#: The same over vsock, after two connections that are not the agent's.
HOSTILE_VSOCK = """\
#!/bin/busybox sh
/bin/busybox mknod /said c 4 65
/bin/busybox mkfifo /fifo
for port in 0 1022; do
echo intruder | /.kvmpriv/connect $port $kvmpriv_vsock >/out
echo "$port: $? $(/bin/busybox wc -c </out)" >/said
done
{
/bin/busybox cat /.kvmpriv/hello
/bin/busybox head -c 1 >/dev/null
/bin/busybox cat /.kvmpriv/answer
/bin/busybox sleep 100000
} </fifo | /.kvmpriv/connect 1023 $kvmpriv_vsock >/fifo
exec /bin/busybox sleep 100000
"""
HOSTILES = {"virtio-console": HOSTILE, "vsock": HOSTILE_VSOCK}


def frame(kind: int, channel: int, payload: bytes = b"", stream: int = 0) -> bytes:
    return struct.pack("<BBHII", kind, stream, 0, channel, len(payload)) + payload


def entry(kind: str, name: bytes = b"", data: bytes = b"") -> bytes:
    return struct.pack("<BBHIQ", ord(kind), 0, len(name), 0o777, len(data)) + name + data


@pytest.mark.parametrize("transport", HOSTILES)
def test_hostile(transport: str, kernel: str, connect: bytes, tmp_path: Path) -> None:
    """A guest whose agent is another program; this process refuses what it sends, and goes on."""
    hello = frame(64, 0, struct.pack("<8sII", b"kvmpriv\0", 1, 0))
    started = frame(65, 1, bytes(4))
    evil = entry("d") + entry("f", b"../../evil") + entry("c", b"", b"x") + entry("e") + entry("z")
    target = tmp_path / "deep/er/to"
    target.parent.mkdir(parents=True)
    answers = (
        (random.Random(6).randbytes(200_000), "the agent sent"),
        (started + frame(2, 1, b"\xff" * 100, 1), "a damaged record"),
        (started + frame(2, 1, evil, 1), "a file with the name"),
    )
    for answer, words in answers[: 1 if transport == "vsock" else 3]:
        real, agent_ready.AGENT = agent_ready.AGENT, HOSTILES[transport].encode()
        try:
            files = {
                ".kvmpriv/hello": hello,
                ".kvmpriv/answer": answer,
                ".kvmpriv/connect": connect,
            }
            root = initrd.busybox("sleep 100000", files)
            guest = LinuxGuest(kernel, initrd=root, memory=256 * MIB)
        finally:
            agent_ready.AGENT = real
        with raises(ProtocolError, words):
            guest.start()
            guest.get("/etc", target)
        assert guest.transport == transport
        if transport == "vsock":
            assert guest.machine.said == ["0: 0 0", "1022: 0 0"], "closed, without a byte"
        guest.close()
        assert list(target.parent.iterdir()) == []
        assert not (tmp_path / "evil").exists()


# -- the way of the agent --------------------------------------------------------------------------


def vhost_threads() -> int:
    """The threads of vhost for this process: of the process itself since Linux 6.4."""
    found = [*Path("/proc").glob("[0-9]*/comm"), *Path("/proc/self/task").glob("*/comm")]
    count = 0
    for path in found:
        with suppress(OSError):  # it has ended
            count += path.read_text().strip() == f"vhost-{os.getpid()}"
    return count


@pytest.fixture(scope="module")
def connect(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A program that connects to the host over vsock."""
    made = tmp_path_factory.mktemp("vsock") / "connect"
    source = ROOT / "tests/vm/vsock_connect.c"
    subprocess.run(["cc", "-static", "-O1", "-Wall", "-Werror", "-o", made, source], check=True)
    return made.read_bytes()


def test_vsock(make_linux_guest: MakeLinuxGuest, connect: bytes, tmp_path: Path) -> None:
    """The host's kernel moves the bytes, for this process alone; a pause stops it."""
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), vhost_threads()
    devices = [Entropy() for _ in range(6)]
    trace_file = tmp_path / "trace"
    guest = make_linux_guest(vsock=True, devices=devices, trace=trace_file)
    vsock = guest._vsock
    assert vsock is not None
    assert guest.transport == "vsock"
    assert vhost_threads() == before[2] + 1
    # The console is the last of nine devices, and has the last interrupt.
    interrupts = guest.run("cat /proc/interrupts", text=True).stdout
    assert re.search(r"^ *13:.* virtio8$", interrupts, re.MULTILINE), interrupts
    guest.run("echo on the console >/dev/console", check=True)
    within(20, lambda: b"on the console" in guest.console)
    # The listener is closed, and a user of the guest can't have the agent's port.
    guest.put(connect, "/bin/connect", mode=0o755)
    for own in (0, 1022):
        assert guest.run(f"connect {own} {vsock.port}").returncode == errno.ECONNRESET
    assert guest.run(f"connect 1023 {vsock.port}").returncode == errno.EADDRINUSE
    guest.run("mkdir -p /etc; echo user:x:7:7::/:/bin/sh >/etc/passwd", check=True)
    assert guest.run(f"su user -c 'connect 1021 {vsock.port}'").returncode == errno.EACCES
    with socket.socket(socket.AF_VSOCK) as stranger, raises(OSError):
        stranger.connect((socket.VMADDR_CID_HOST, vsock.port))
    data = random.Random(9).randbytes(8 * MIB)
    paused = 0
    found: list[bytes] = []
    work = threading.Thread(target=lambda: found.append(guest.run(["cat"], input=data).stdout))
    work.start()
    while work.is_alive():
        guest.pause()
        time.sleep(0.1)
        guest.resume()
        paused += 1
        time.sleep(0.3)
    assert found == [data]
    assert paused > 1
    assert guest.shutdown().how == "off"
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before[:2]
    assert vhost_threads() == before[2]
    marks = [event["mark"] for event in trace.read(trace_file).events if "mark" in event]
    assert "the agent uses vsock" in marks


def test_vsock_of_others(kernel: str, connect: bytes) -> None:
    """Another guest, and the host itself, can connect where the agent will, and get nothing."""
    image = load_linux(Path(kernel).read_bytes())
    guest = LinuxGuest(image, memory=256 * MIB, vsock=True)
    assert guest._vsock is not None
    got = bytearray()

    def received(data: bytes) -> None:
        got.extend(data)
        vsock.stop()

    vsock = Vsock(received)
    assert vsock.cid != guest._vsock.cid
    script = f"""\
for port in {guest._vsock.port} {vsock.port}; do
echo a line | connect 1023 $port >/out
echo "$? $(wc -c </out)" >/dev/ttyS1
done
poweroff -f"""
    root = initrd.busybox(script, {"bin/connect": connect})
    with (
        Kvm() as kvm,
        LinuxMachine(kvm, image, plan(256 * MIB), initrd=root, devices=[vsock]) as machine,
        socket.socket(socket.AF_VSOCK) as stranger,
    ):
        stranger.settimeout(10)
        with suppress(OSError):  # a host without the transport for itself
            stranger.connect((socket.VMADDR_CID_HOST, guest._vsock.port))
        running = threading.Thread(target=machine.run, args=(240,))
        running.start()

        def said() -> list[str]:
            assert guest._vsock is not None
            guest._vsock.own_ready()  # as the guest's thread does it
            return machine.said

        within(240, said)
        with suppress(OSError):
            assert stranger.recv(1) == b""
        running.join(240)
        assert machine.said == ["0 0", "0 0"]
        assert bytes(got) == b"a line\n", "its own device takes the same"
    assert not guest._vsock._listener.connected
    guest.start()
    assert guest.transport == "vsock"
    assert guest.run(["echo", "mine"]).stdout == b"mine\n"
    guest.close()


def test_vsock_of_a_killed_process(kernel: str) -> None:
    """Its CID is free again, and its thread of vhost has ended."""
    program = (
        "import sys, time\n"
        "from kvmpriv.guest.linux import LinuxGuest\n"
        "guest = LinuxGuest(sys.argv[1], memory=256 << 20, vsock=True)\n"
        "guest.start()\n"
        "print(guest._vsock.cid, flush=True)\n"
        "guest.run('sleep 1000')\n"
    )
    command = [sys.executable, "-c", program, kernel]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process, VhostVsock() as device:
        assert process.stdout is not None
        cid = int(process.stdout.readline())
        with raises(OSError, "Address already in use") as taken:
            device.set_guest_cid(cid)
        assert taken[0].errno == errno.EADDRINUSE
        process.kill()
        process.wait()

        def is_free() -> bool:
            with suppress(OSError):
                device.set_guest_cid(cid)
                return True
            return False

        within(20, is_free)


def test_vsock_and_a_forked_process(make_linux_guest: MakeLinuxGuest) -> None:
    """A process that was forked can't use the guest, and does not keep it from its end."""
    guest = make_linux_guest(vsock=True)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with raises(ClosedError):
                guest.run(["true"])
            guest.close()
            os.close(writing)
            status = os.read(reading, 1) != b""
        finally:
            os._exit(status)
    try:
        assert guest.run(["echo", "parent"]).stdout == b"parent\n"
        assert guest.shutdown().how == "off"
        assert make_linux_guest(vsock=True).run(["true"]).returncode == 0
    finally:
        os.close(reading)
        os.close(writing)
    assert os.waitpid(pid, 0)[1] == 0


def test_without_vsock(kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the device, the permission or the guest's driver the agent uses the port."""
    image = load_linux(Path(kernel).read_bytes())
    gc.collect()
    before = open_fds()
    words: list[str] = []

    def made(cmdline: str = "quiet", vsock: bool | None = None) -> LinuxGuest:
        return LinuxGuest(
            image, memory=256 * MIB, cmdline=cmdline, vsock=vsock, complain=words.append
        )

    def works(guest: LinuxGuest) -> None:
        with guest:
            assert guest.transport == "virtio-console"
            assert guest.run(["cat"], input=b"\0\xff").stdout == b"\0\xff"
            guest.close()

    absent = str(tmp_path / "absent")
    with monkeypatch.context() as patch:
        patch.setattr(Vsock.__init__, "__kwdefaults__", {"required": False, "device": absent})
        works(made())
        with raises(FileNotFoundError, f"{absent} can't be used: No such file or directory"):
            made(vsock=True)
    Path("/dev/kvm").chmod(0o666)  # of this VM
    os.seteuid(65534)
    try:
        with raises(PermissionError, "/dev/vhost-vsock can't be used: Permission denied"):
            made(vsock=True)
        guest = made()
    finally:
        os.seteuid(0)
    works(guest)
    line = "quiet initcall_blacklist=virtio_vsock_init"
    works(made(line))
    with (
        raises(GuestDied, "vsock=True, and the agent uses a port of a virtio console"),
        made(line, vsock=True),
    ):
        pass
    assert words == []
    real = VhostVsock.set_running

    def fails(self: VhostVsock, running: bool) -> None:
        if running:
            raise OSError(errno.EPERM, "VHOST_VSOCK_SET_RUNNING: Operation not permitted")
        real(self, running)

    monkeypatch.setattr(VhostVsock, "set_running", fails)
    works(made())
    why = "VHOST_VSOCK_SET_RUNNING: Operation not permitted"
    assert words == [f"virtio-vsock (vhost): vhost can't be used: {why}; the guest has no vsock"]
    with raises(GuestDied, why), made(vsock=True):
        pass
    gc.collect()  # a traceback has the vCPU that the exception has ended
    assert open_fds() == before


@in_kinds("shared", "port")
def test_64_mib(linux_guest: LinuxGuest) -> None:
    """64 MiB in, and 64 MiB out, byte for byte."""
    piece = random.Random(5).randbytes(MIB)
    sums = hashlib.md5()
    for _ in range(64):
        sums.update(piece)
    linux_guest.put(piece, "/tmp/piece")
    began = time.monotonic()
    done = linux_guest.run(["md5sum"], input=piece * 64)
    into = time.monotonic()
    assert done.stdout.split()[0].decode() == sums.hexdigest()
    line = "i=0; while [ $i -lt 64 ]; do cat /tmp/piece; i=$((i + 1)); done"
    out = linux_guest.run(line).stdout
    took = time.monotonic() - into
    assert out == piece * 64
    print(f"64 MiB in {into - began:.1f} s in, {took:.1f} s out")


def names() -> list[str]:
    """The names of the tests, as pytest reports them."""
    found = []
    for name, test in globals().items():
        if name.startswith("test_"):
            marks = {mark.name: mark for mark in getattr(test, "pytestmark", [])}
            given = marks["parametrize"].args[1] if "parametrize" in marks else []
            ids = [one if isinstance(one, str) else one.values[0] for one in given]
            found += [f"{name}[{one}]" for one in ids] or [name]
    return found
