"""Runs in a VM: guests that a program talks to; writes what each check has found to a file.

Usage: talk.py FOLDER KERNEL ABI [EXPRESSION, of the names of the checks]

Each check is a function with a guest in its parameter's name: `shared` and `private` are one guest
each for all their checks, `alone` makes its own.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvmpriv.guest.linux import GuestDied, LinuxGuest, ProtocolError, agent_ready, initrd
from kvmpriv.guest.linux.disk import Block, Entropy

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
KERNEL = ""
FOLDER = Path()
ABI = ""


def boot(**options: Any) -> LinuxGuest:
    return LinuxGuest(KERNEL, memory=256 * MIB, timeout=120, **options)


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


# -- in one guest, and in one with private memory --------------------------------------------------


def both_commands(guest: LinuxGuest) -> None:
    done = guest.run(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"\0\xff\r\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"\0\xff\r\n", b"err\n")
    assert guest.run("uname -s", text=True, check=True).stdout == "Linux\n"
    assert guest.run("kill -9 $$").returncode == -9
    assert guest.run(["pwd"]).stdout == b"/\n"
    assert guest.run(["pwd"], cwd="/proc").stdout == b"/proc\n"
    assert guest.run(["env"], env={"A": "1", "PATH": "/bin"}).stdout == b"A=1\nPATH=/bin\n"
    with raises(FileNotFoundError, "no-such"):
        guest.run(["no-such"])
    with raises(subprocess.CalledProcessError):
        guest.run(["false"], check=True)
    assert guest.run("ls -l /proc/self/fd").stdout.count(b"pipe:") == 3


def both_files(guest: LinuxGuest) -> None:
    top = FOLDER / f"tree{id(guest)}"
    (top / "a b").mkdir(parents=True)
    data = random.Random(3).randbytes(3 * MIB + 17)
    odd = Path(os.fsdecode(os.fsencode(top / "a b") + b"/\xff\n"))
    odd.write_bytes(data)
    odd.chmod(0o711)
    (top / "link").symlink_to("a b")
    guest.put(top, "/tmp/tree")
    listed = guest.run("cd /tmp/tree && find . -print0 | sort -z").stdout.split(b"\0")
    assert listed == [b".", b"./a b", b"./a b/\xff\n", b"./link", b""]
    assert guest.run(["stat", "-c", "%a", b"/tmp/tree/a b/\xff\n"]).stdout == b"711\n"
    back = FOLDER / f"back{id(guest)}"
    guest.get("/tmp/tree", back)
    copied = Path(os.fsdecode(os.fsencode(back / "a b") + b"/\xff\n"))
    assert copied.read_bytes() == data
    assert copied.stat().st_mode & 0o777 == 0o711
    assert os.readlink(back / "link") == "a b"
    guest.put(b"#!/bin/sh\necho put\n", "/tmp/program", mode=0o755)
    assert guest.run(["/tmp/program"]).stdout == b"put\n"
    assert guest.get("/tmp/program") == b"#!/bin/sh\necho put\n"


def both_streams(guest: LinuxGuest) -> None:
    """Both directions at a time, more than all windows."""
    data = random.Random(4).randbytes(2 * MIB)
    assert guest.run(["cat"], input=data).stdout == data
    flood = guest.run("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2")
    assert (flood.stdout, flood.stderr) == (bytes(1_000_000), bytes(1_000_000))


def both_process(guest: LinuxGuest) -> None:
    with guest.popen(["cat"], text=True) as cat:
        cat.stdin.write("a line\n")
        cat.stdin.flush()
        assert cat.stdout.readline() == "a line\n"
        assert cat.poll() is None
        cat.terminate()
        assert cat.wait(30) == -signal.SIGTERM
    processes = [guest.popen("read x; echo $x") for _ in range(10)]
    for number, process in enumerate(processes):
        assert process.communicate(b"%d\n" % number)[0] == b"%d\n" % number
        assert process.wait() == 0
    with guest.popen("tty; stty size; read x; echo got $x", terminal=(33, 101)) as process:
        process.stdin.write(b"typed\n")
        process.stdin.flush()
        shown = process.stdout.read()
        assert b"33 101\r\n" in shown, shown
        assert shown.endswith(b"got typed\r\n")


def both_timeout(guest: LinuxGuest) -> None:
    with raises(subprocess.TimeoutExpired):
        guest.run("sleep 977 & sleep 977; wait", timeout=2)
    within(20, lambda: b"sleep 977" not in guest.run("ps").stdout)
    with raises(subprocess.TimeoutExpired):
        guest.run("yes & yes >&2", timeout=2)
    assert guest.run(["true"]).returncode == 0


# -- in the guest with shared memory only ----------------------------------------------------------


def shared_room(guest: LinuxGuest) -> None:
    guest.run("mkdir /tmp/small; mount -t tmpfs -o size=1m none /tmp/small", check=True)
    with raises(OSError, "No space left on device (in the guest)") as full:
        guest.put(bytes(2 * MIB), "/tmp/small/big")
    assert (full[0].errno, full[0].filename) == (errno.ENOSPC, "/tmp/small/big")
    assert guest.get("/proc/version").startswith(b"Linux version")
    with raises(OSError, "a character device"):
        guest.get("/dev/null")
    with raises(OSError, "a block device") as refused:
        guest.run("mknod /tmp/node b 7 0", check=True)
        guest.get("/tmp/node")
    assert refused[0].filename == "/tmp/node"
    guest.run("mkdir /tmp/out; ln -s /etc /tmp/out/x", check=True)
    with raises(ProtocolError, "symbolic link"):
        guest.get("/tmp/out", FOLDER / "out")
    assert not (FOLDER / "out").exists()


def shared_orphans(guest: LinuxGuest) -> None:
    """Processes that lose their parents are reaped, and the agent has no leftovers."""
    guest.run("(sleep 0.1 &) ; (true &)")
    within(20, lambda: b"[sleep]" not in guest.run("ps").stdout)
    assert b" Z " not in guest.run("ps -o stat,comm").stdout.replace(b"Z  ", b" Z ")
    fds = guest.run("ls /proc/$(pidof -s @.kvmpriv/agent || echo 1)/fd 2>/dev/null | wc -l").stdout
    assert int(fds) < 12


def shared_threads(guest: LinuxGuest) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                text = f"{number}.{turn}"
                assert guest.run(["echo", text], text=True).stdout == text + "\n"
                guest.put(text.encode(), f"/tmp/{number}")
                assert guest.get(f"/tmp/{number}") == text.encode()
        except BaseException as error:  # noqa: BLE001  # the check gets it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def shared_ctrl_c(guest: LinuxGuest) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for work in (
            lambda: guest.run("sleep 978"),
            lambda: guest.run(["cat"], input=bytes(256 * MIB)),
            lambda: guest.get("/proc/kmsg", FOLDER / "kmsg"),
            lambda: guest.put(bytes(200 * MIB), "/tmp/much"),
        ):
            signal.setitimer(signal.ITIMER_REAL, 1)
            with raises(KeyboardInterrupt):
                work()
            assert guest.run(["true"]).returncode == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not (FOLDER / "kmsg").exists()
    within(20, lambda: b"sleep 978" not in guest.run("ps").stdout)


def shared_shell(guest: LinuxGuest) -> None:
    """On a terminal of this process: raw meanwhile, as it was afterwards; its size is passed on."""
    status, shown, same = on_terminal(guest.shell, b"stty size\nexit 5\n")
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
    try:
        tcgetpgrp = os.tcgetpgrp
        os.tcgetpgrp = lambda fd: os.getpgrp()  # it is not our controlling terminal
        status = call()
    finally:
        os.tcgetpgrp = tcgetpgrp
        os.dup2(saved[0], 0)
        os.dup2(saved[1], 1)
    same = termios.tcgetattr(slave) == before
    for fd in (slave, master, *saved):
        os.close(fd)
    return status, bytes(shown), same


# -- guests of their own ---------------------------------------------------------------------------


def alone_devices() -> None:
    """The agent's port beside other devices; shutdown writes the disk."""
    disk = FOLDER / "disk"
    disk.write_bytes(bytes(MIB))
    with boot(devices=[Entropy(), Block(disk)], cpus=2) as guest:
        assert guest.run(["nproc"]).stdout == b"2\n"
        guest.run("echo written | dd of=/dev/vda conv=notrunc", check=True)
    assert guest.outcome is not None
    assert guest.outcome.how == "off"
    assert disk.read_bytes().startswith(b"written\n")


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


def alone_own_initrd() -> None:
    """The init of another initrd is started, and commands run where it has gone."""
    root = initrd.busybox(SWITCH)
    path = FOLDER / "own.cpio.gz"
    path.write_bytes(subprocess.run(["gzip", "-c"], input=root, capture_output=True).stdout)
    with boot(initrd=path) as guest:
        within(60, lambda: works(guest, "cat /marker2"))
        assert guest.run(["cat", "/marker"]).stdout == b"marker\n"
        assert guest.run("cat /proc/1/cmdline").stdout.startswith(b"/bin/busybox\0sleep")
        assert guest.get("/marker") == b"marker\n"
        with guest.popen("read x; echo $x", terminal=(10, 10)) as process:
            process.stdin.write(b"on a terminal\n")
            process.stdin.flush()
            assert process.stdout.read().endswith(b"on a terminal\r\n")
    other = initrd.busybox("sleep 100000", {"other": b"#!/bin/busybox sh\nexec /init other\n"})
    with boot(initrd=other, cmdline="quiet rdinit=/other") as guest:
        wanted = b"/bin/busybox\0sh\0/init\0other\0"
        within(60, lambda: guest.run("cat /proc/1/cmdline").stdout == wanted)


def alone_panic() -> None:
    guest = boot(initrd=initrd.busybox("mkfifo /tmp/f; read x </tmp/f; exit 3"))
    with raises(GuestDied, "the guest's kernel panicked: Kernel panic") as died, guest:
        within(60, lambda: guest.run("[ -p /tmp/f ]").returncode == 0)
        guest.run("echo x >/tmp/f; sleep 100")
    assert died[0].outcome.how == "panic"
    assert "Attempted to kill init" in died[0].outcome.why
    assert died[0].console


def alone_ends() -> None:
    for command, how, append in (
        ("poweroff -f", "off", ""),
        ("reboot -f", "crash", " reboot=t"),
    ):
        guest = boot(cmdline="quiet" + append)
        process: Any = None
        with raises(GuestDied) as died, guest:
            process = guest.popen("echo before; sleep 1000")
            assert process.stdout.readline() == b"before\n"
            guest.run(command + "; sleep 100")
        assert died[0].outcome.how == how, died[0].outcome
        with raises(GuestDied):
            process.wait()


def alone_agent_killed() -> None:
    with boot() as guest:
        with raises(GuestDied, "the guest's agent has ended") as died:
            guest.run("kill -9 $(ps | grep @.kvmpriv | grep -v grep | awk '{print $1}'); sleep 100")
        assert died[0].outcome.how == "agent"
        assert guest.outcome is None
        with raises(GuestDied):
            guest.run("true")
    assert guest.outcome is not None


def alone_close() -> None:
    """Closed with commands under way; nothing is left in this process."""
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    guest = boot()
    guest.start()
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


def alone_several() -> None:
    """Guests beside each other in one process."""
    with boot() as one, boot() as two:
        one.put(b"one", "/tmp/x")
        two.put(b"two", "/tmp/x")
        assert (one.get("/tmp/x"), two.get("/tmp/x")) == (b"one", b"two")


def alone_readme() -> None:
    """The README's example, and the example programs."""
    (example,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "LinuxGuest" in block
    )
    os.chdir(FOLDER)
    Path("bzImage").symlink_to(KERNEL)
    shown = io.StringIO()
    values: dict[str, Any] = {}
    with redirect_stdout(shown):
        exec(compile(example, "README.md", "exec"), values)
    assert shown.getvalue() == "42\n\n"
    assert values["version"].startswith(b"Linux version")
    for name, arguments, status, words in (
        ("linux_command.py", ["echo $((6 * 7)) of $(uname -s); exit 3"], 3, "42 of Linux\n"),
        ("linux_talk.py", [ABI], 0, "that text at 0 addresses; 384 MiB are private\n"),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts/examples" / name, KERNEL, *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert words in done.stdout


def alone_command_line() -> None:
    """`kvmpriv boot --run` and `--shell`."""
    boot = [sys.executable, "-m", "kvmpriv", "boot", "--kernel", KERNEL, "--memory", "256M"]

    def run(*arguments: str, **options: Any) -> tuple[int, bytes, bytes]:
        done = subprocess.run([*boot, *arguments], capture_output=True, **options)
        return done.returncode, done.stdout, done.stderr

    line = "cat; echo err >&2; exit 7"
    assert run("--run", line, input=b"in\0") == (7, b"in\0", b"err\n")
    assert run("--run", "kill -9 $$", f"--private={ABI}", stdin=subprocess.DEVNULL)[0] == 137
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


def frame(kind: int, channel: int, payload: bytes = b"", stream: int = 0) -> bytes:
    return struct.pack("<BBHII", kind, stream, 0, channel, len(payload)) + payload


def entry(kind: str, name: bytes = b"", data: bytes = b"") -> bytes:
    return struct.pack("<BBHIQ", ord(kind), 0, len(name), 0o777, len(data)) + name + data


def alone_hostile() -> None:
    """A guest whose agent is another program; this process refuses what it sends, and goes on."""
    hello = frame(64, 0, struct.pack("<8sII", b"kvmpriv\0", 1, 0))
    started = frame(65, 1, bytes(4))
    evil = entry("d") + entry("f", b"../../evil") + entry("c", b"", b"x") + entry("e") + entry("z")
    target = FOLDER / "deep/er/to"
    target.parent.mkdir(parents=True)
    for answer, words in (
        (random.Random(6).randbytes(200_000), "the agent sent"),
        (started + frame(2, 1, b"\xff" * 100, 1), "a damaged record"),
        (started + frame(2, 1, evil, 1), "a file with the name"),
    ):
        real, agent_ready.AGENT = agent_ready.AGENT, HOSTILE.encode()
        try:
            files = {".kvmpriv/hello": hello, ".kvmpriv/answer": answer}
            guest = boot(initrd=initrd.busybox("sleep 100000", files))
        finally:
            agent_ready.AGENT = real
        with raises(ProtocolError, words):
            guest.start()
            guest.get("/etc", target)
        guest.close()
        assert list(target.parent.iterdir()) == []
        assert not (FOLDER / "evil").exists()


def alone_64_mib() -> None:
    """64 MiB in, and 64 MiB out, byte for byte."""
    with boot() as guest:
        piece = random.Random(5).randbytes(MIB)
        sums = hashlib.md5()
        for _ in range(64):
            sums.update(piece)
        guest.put(piece, "/tmp/piece")
        began = time.monotonic()
        done = guest.run(["md5sum"], input=piece * 64)
        into = time.monotonic()
        assert done.stdout.split()[0].decode() == sums.hexdigest()
        out = guest.run("i=0; while [ $i -lt 64 ]; do cat /tmp/piece; i=$((i + 1)); done").stdout
        took = time.monotonic() - into
        assert out == piece * 64
        print(f"64 MiB in {into - began:.1f} s in, {took:.1f} s out", file=sys.stderr)


def names(wanted: str = "") -> list[str]:
    """The names of the checks, as they are in the results; `wanted` as for `main`."""
    checks = [n for n in globals() if re.search(wanted, n)]
    found = []
    for kind in ("shared", "private"):
        mine = [n for n in checks if n.startswith(("both_", kind + "_"))]
        found += [f"{kind}_{n.partition('_')[2]}" for n in mine]
    return found + [n for n in checks if n.startswith("alone_")]


def main(folder: str, kernel: str, abi: str, wanted: str = "") -> None:
    global KERNEL, FOLDER, ABI
    KERNEL, FOLDER, ABI = kernel, Path(folder), abi
    checks = {name: f for name, f in globals().items() if callable(f) and re.search(wanted, name)}
    results: dict[str, str] = {}

    def check(name: str, call: Callable[[], object]) -> None:
        began = time.monotonic()
        try:
            call()
            results[name] = ""
        except BaseException:  # noqa: BLE001  # the test gets it
            results[name] = traceback.format_exc()
        print(f"{name} {time.monotonic() - began:.1f} s {results[name]}", file=sys.stderr)

    for kind, private in (("shared", False), ("private", ABI)):
        mine = {n: f for n, f in checks.items() if n.startswith(("both_", kind + "_"))}
        if mine:
            with boot(private=private) as guest:
                for name, call in mine.items():
                    check(f"{kind}_{name.partition('_')[2]}", partial(call, guest))
    for name, call in checks.items():
        if name.startswith("alone_"):
            check(name, call)
    (FOLDER / "talk.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
