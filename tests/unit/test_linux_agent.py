"""The agent of Linux guests, on this host: a socket is in the place of the guest's port."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from kvmpriv import ArgumentError, ClosedError
from kvmpriv.guest.linux import GuestProcess
from kvmpriv.guest.linux.agent import Agent
from kvmpriv.guest.linux.agent_ready import AGENT
from kvmpriv.guest.linux.protocol import Link

MIB = 1 << 20


class GoneError(Exception):
    """The agent's process has ended."""


class Local(Agent):
    """An agent that is a process of this host, and the thread that reads what it sends."""

    def __init__(self, program: Path) -> None:
        ours, theirs = socket.socketpair()
        self.socket = ours
        super().__init__(Link(ours.sendall))
        with theirs:
            environment = {"HOME": "/", "PATH": os.environ["PATH"]}
            self.process = subprocess.Popen(
                [str(program), "-"], stdin=theirs.fileno(), env=environment, cwd=program.parent
            )
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        assert self._link.wait_until_ready(10)

    def _read(self) -> None:
        while data := self.socket.recv(1 << 16):
            self._link.received(data)
        self._link.fail(GoneError)

    @property
    def link(self) -> Link:
        return self._link

    def children(self) -> list[int]:
        """The processes that the agent has started and has not reaped."""
        pid = self.process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.process.wait(10)
        self.thread.join(10)
        self.socket.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agent") / "agent"
    path.write_bytes(AGENT)
    path.chmod(0o755)
    return path


@pytest.fixture
def agent(program: Path) -> Iterator[Local]:
    made = Local(program)
    yield made
    leftover = wait_until(lambda: not made.children())
    fds = len(list(Path(f"/proc/{made.process.pid}/fd").iterdir()))
    made.close()
    assert leftover, "processes that the agent has not reaped"
    assert fds == 4, "0 to 2 and its signalfd"


def wait_until(true: object, seconds: float = 10) -> bool:
    assert callable(true)
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_the_agent_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/generate/guests.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(AGENT) < 20_000


def test_a_command(agent: Local) -> None:
    done = agent.run(["sh", "-c", "cat; echo to stderr >&2; exit 3"], input=b"a\0b\r\n\xff")
    assert isinstance(done, subprocess.CompletedProcess)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"a\0b\r\n\xff", b"to stderr\n")
    assert done.args == ["sh", "-c", "cat; echo to stderr >&2; exit 3"]
    text = agent.run("printf 'é\\r\\n'; echo $0 >&2", text=True)
    assert (text.stdout, text.stderr) == ("é\n", "/bin/sh\n")
    assert agent.run(["printf", "%s", "é"], encoding="latin-1").stdout == "Ã©"
    assert agent.run(["cat"], input="ü", encoding="utf-16-le").stdout == "ü"
    assert agent.run([b"printf", b"%s", b"\xff\n "]).stdout == b"\xff\n "
    assert agent.run(["cat"]).stdout == b"", "without input its standard input is at its end"


def test_what_a_command_runs_in(agent: Local, tmp_path: Path) -> None:
    place = tmp_path / "a b\nc"
    place.mkdir()
    assert agent.run(["pwd"], cwd=place).stdout == os.fsencode(place) + b"\n"
    assert agent.run(["/usr/bin/env"], env={}).stdout == b""
    assert agent.run(["/usr/bin/env"], env={b"A": b"\xff=1"}).stdout == b"A=\xff=1\n"
    inherited = agent.run(["env"]).stdout.split(b"\n")
    assert b"HOME=/" in inherited
    tool = place / "tool"
    tool.write_text("#!/bin/sh\necho mine\n")
    tool.chmod(0o755)
    assert agent.run(["tool"], env={"PATH": f"/none:{place}"}).stdout == b"mine\n"
    assert agent.run(["./tool"], cwd=place).stdout == b"mine\n"
    mask = agent.run("grep Sig /proc/self/status").stdout
    assert b"SigBlk:\t0000000000000000" in mask
    alone = agent.run("ls -l /proc/self/fd").stdout
    assert alone.count(b"pipe:") == 3, "no descriptor of the agent"
    assert b"socket:" not in alone
    session = agent.run("ps -o pid=,pgid=,sid= -p $$").stdout.split()
    assert len(set(session)) == 1


def test_a_command_that_can_not_be_started(agent: Local, tmp_path: Path) -> None:
    """The exceptions are those of subprocess."""
    with pytest.raises(FileNotFoundError) as missing:
        agent.run(["no-such-program", "x"])
    assert missing.value.filename == "no-such-program"
    with pytest.raises(FileNotFoundError) as missing:
        agent.run(["true"], cwd="/no/such/folder")
    assert missing.value.filename == "/no/such/folder"
    plain = tmp_path / "plain"
    plain.write_text("x")
    with pytest.raises(PermissionError):
        agent.run([plain])
    with pytest.raises(PermissionError):
        agent.run(["plain"], env={"PATH": str(tmp_path)})
    plain.chmod(0o755)
    with pytest.raises(OSError, match="Exec format error") as wrong:
        agent.run([plain])
    assert wrong.value.errno == errno.ENOEXEC
    with pytest.raises(NotADirectoryError):
        agent.run(["true"], cwd=plain)
    with pytest.raises(OSError, match="at most 65536") as long:
        agent.run(["true", "x" * 70_000])
    assert long.value.errno == errno.E2BIG
    assert agent.run(["true", "x" * 65_000]).returncode == 0
    for bad in ([], ["a\0b"]):
        with pytest.raises(ArgumentError):
            agent.run(bad)
    for variables in ({"": "x"}, {"a=b": "x"}, {"a": "\0"}):
        with pytest.raises(ArgumentError):
            agent.run(["true"], env=variables)
    with pytest.raises(ArgumentError, match="input is a str"):
        agent.run(["cat"], input="text")  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match="input is bytes"):
        agent.run(["cat"], input=b"x", text=True)  # type: ignore[call-overload]
    assert agent.run(["true"]).returncode == 0


def test_ends(agent: Local) -> None:
    assert agent.run("kill -9 $$").returncode == -9
    assert agent.run("kill -SEGV $$").returncode == -11
    assert agent.run("exit 255").returncode == 255
    with pytest.raises(subprocess.CalledProcessError) as failed:
        agent.run("echo out; echo err >&2; exit 4", check=True, text=True)
    assert (failed.value.returncode, failed.value.stdout) == (4, "out\n")
    assert failed.value.stderr == "err\n"


def test_64_mib_each_way_at_once(agent: Local) -> None:
    """Byte for byte, both directions at a time, more than all windows."""
    data = os.urandom(MIB) * 64
    assert agent.run(["cat"], input=data).stdout == data
    flood = agent.run("head -c 20000000 /dev/zero; head -c 20000000 /dev/zero >&2")
    assert (flood.stdout, flood.stderr) == (bytes(20_000_000), bytes(20_000_000))


def test_a_timeout_kills_the_whole_group(agent: Local, tmp_path: Path) -> None:
    began = time.monotonic()
    pids = tmp_path / "pids"
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        agent.run(f"echo begun; sleep 97 & echo $! $$ >{pids}; wait", timeout=1)
    assert time.monotonic() - began < 5
    assert expired.value.timeout == 1
    assert expired.value.stdout == b"begun\n"
    for pid in pids.read_text().split():
        assert wait_until(lambda pid=pid: not alive(int(pid)))


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_timeout_when_the_command_has_left_another(agent: Local) -> None:
    """The leader has ended, and a process of its group holds the streams."""
    with pytest.raises(subprocess.TimeoutExpired):
        agent.run("sleep 98 & echo $!", timeout=1)
    assert wait_until(lambda: not agent.children())
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True).stdout
    assert b"\nsleep 98\n" not in shown


def test_floods_and_the_limit(agent: Local) -> None:
    with pytest.raises(OSError, match="limit of 1000000 bytes") as beyond:
        agent.run("yes", limit=1_000_000)
    assert beyond.value.errno == errno.EFBIG
    with pytest.raises(subprocess.TimeoutExpired):
        agent.run("yes & yes >&2", timeout=0.5)


def test_a_command_that_closes_its_streams_and_lives_on(agent: Local) -> None:
    began = time.monotonic()
    done = agent.run("echo first; exec >&- 2>&- <&-; sleep 1; exit 5", input=b"x" * MIB)
    assert (done.returncode, done.stdout) == (5, b"first\n")
    assert time.monotonic() - began > 0.9


def test_a_command_that_reads_nothing(agent: Local) -> None:
    assert agent.run(["true"], input=b"x" * MIB).returncode == 0
    with agent.popen(["sleep", "100"]) as process:
        process.stdin.write(b"x" * 100_000)  # into the pipe and the agent's window
        process.kill()
        assert process.wait() == -9
        with pytest.raises(BrokenPipeError):
            write_on(process)
    with agent.popen("exec <&-; sleep 100") as process:
        with pytest.raises(BrokenPipeError):
            write_on(process)
        process.kill()


def write_on(process: GuestProcess[bytes]) -> None:
    while True:
        process.stdin.write(b"x" * 4096)


def test_a_process(agent: Local) -> None:
    with agent.popen("trap 'echo usr1' USR1; while :; do read x && echo $x; done") as one:
        assert isinstance(one, GuestProcess)
        assert alive(one.pid)
        assert one.poll() is None
        assert one.returncode is None
        one.stdin.write(b"line\n")
        one.stdin.flush()
        assert one.stdout.readline() == b"line\n"
        one.send_signal(signal.SIGUSR1)
        assert one.stdout.readline() == b"usr1\n"
        with pytest.raises(subprocess.TimeoutExpired):
            one.wait(0.05)
        with pytest.raises(ArgumentError):
            one.send_signal(65)
        one.terminate()
        assert one.wait(10) == -15
        assert one.poll() == -15
        assert one.stdout.read() == b""
        one.send_signal(9)  # it has ended: without effect
    with agent.popen(["cat"], text=True) as text:
        text.stdin.write("ä\n")
        text.stdin.close()
        assert text.stdout.read() == "ä\n"
        assert text.wait() == 0
    two = agent.popen(["cat"])
    assert two.communicate(b"all", timeout=10) == (b"all", b"")
    two.close()
    three = agent.popen("echo x; sleep 100")
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        three.communicate(timeout=0.5)
    three.kill_group()
    three.close()
    assert expired.value.stdout == b"x\n"


def test_leaving_the_block_ends_the_streams(agent: Local) -> None:
    with agent.popen("yes; exit $?") as process:
        assert process.stdout.read(2) == b"y\n"
    assert process.returncode == 128 + signal.SIGPIPE
    with pytest.raises(ZeroDivisionError), agent.popen(["sleep", "100"]) as process:
        raise ZeroDivisionError
    assert wait_until(lambda: not agent.children())


def test_many_at_a_time(agent: Local) -> None:
    processes = [agent.popen(["cat"]) for _ in range(64)]
    with pytest.raises(OSError, match="64 commands run in the guest already") as busy:
        agent.run(["true"])
    assert busy.value.errno == errno.EAGAIN
    for number, process in enumerate(processes):
        process.stdin.write(b"%d " % number * 10_000)
        process.stdin.flush()
    for number, process in enumerate(processes):
        assert process.communicate() == (b"%d " % number * 10_000, b"")
        assert process.wait() == 0
    results: list[bytes] = []

    def work(number: int) -> None:
        for turn in range(20):
            results.append(agent.run(["printf", f"{number}.{turn} "]).stdout)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(results)) == len(results) == 160


def test_a_terminal(agent: Local) -> None:
    with agent.popen("stty size; tty; read x; echo got $x", terminal=(33, 101)) as process:
        seen = b""
        while b"/dev/pts/" not in seen:
            seen += process.stdout.readline()
        assert seen.startswith(b"33 101\r\n")
        process.stdin.write(b"typed\n")
        process.stdin.flush()
        assert process.stdout.read().endswith(b"typed\r\ngot typed\r\n")
        assert process.stderr.read() == b""
        assert process.wait() == 0
    whole = agent.popen("tty", terminal=(10, 10)).communicate(timeout=10)
    assert whole[0].startswith(b"/dev/pts/")
    with agent.popen(["cat"], terminal=(10, 10)) as process:
        process.resize(20, 30)
        with pytest.raises(ArgumentError):
            process.resize(0, 30)
        process.stdin.write(b"\3")  # Ctrl-C
        process.stdin.flush()
        assert process.wait(10) == -2
    assert agent.run("tty").stdout == b"not a tty\n"
    with agent.popen("read x; stty size", terminal=(10, 10)) as process:
        process.resize(20, 30)
        process.stdin.write(b"\n")
        process.stdin.close()  # Ctrl-D follows
        assert process.stdout.read().endswith(b"20 30\r\n")


def test_the_agent_dies(program: Path) -> None:
    agent = Local(program)
    process = agent.popen("echo before; exec sleep 1000")
    assert process.stdout.readline() == b"before\n"
    waiting: list[type[BaseException]] = []

    def wait() -> None:
        try:
            process.wait()
        except GoneError as error:
            waiting.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    agent.process.kill()
    thread.join(10)
    assert waiting == [GoneError]
    for use in (process.poll, process.stdout.read, lambda: agent.run(["true"])):
        with pytest.raises(GoneError):
            use()
    os.kill(process.pid, 9)
    process.close()
    agent.close()


def test_a_fork(agent: Local) -> None:
    """A child can't use the guest of its parent, and does no harm to it."""
    process = agent.popen(["cat"])
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for use in (process.poll, process.kill, lambda: agent.run(["true"], timeout=5)):
                with pytest.raises(ClosedError, match="forked from"):
                    use()
            process.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert process.communicate(b"still mine") == (b"still mine", b"")


def test_a_signal_s_handler_raises(agent: Local, tmp_path: Path) -> None:
    """Ctrl-C while a command runs: it is killed, and the next one works."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    big = tmp_path / "big"
    try:
        for work in (
            lambda: agent.run("sleep 99"),
            lambda: agent.run("yes"),
            lambda: agent.run(["cat"], input=bytes(1 << 30)),
            lambda: agent.get("/proc/kmsg"),
            lambda: agent.put(bytes(1 << 30), big),
        ):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                work()
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert agent.run(["echo", "on"]).stdout == b"on\n"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert wait_until(lambda: not agent.children())


# -- files -----------------------------------------------------------------------------------------


def make_tree(top: Path) -> None:
    """Names and kinds that are unusual."""
    top.mkdir()
    (top / "empty").mkdir(mode=0o500)
    inner = top / "inner"
    inner.mkdir()
    names = [b"spaces in it", b"new\nline", b"\xff\xfe no text", b"-dash", "ü".encode()]
    for number, name in enumerate(names):
        path = Path(os.fsdecode(os.fsencode(inner) + b"/" + name))
        path.write_bytes(os.urandom(number * 50_000))
        path.chmod(0o600 + number)
    (top / "link").symlink_to("inner/spaces in it")
    (inner / "up").symlink_to("../empty")
    (top / "broken").symlink_to("nowhere")
    inner.chmod(0o550)


def listing(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        mode = path.lstat().st_mode
        content: object = None
        if stat.S_ISLNK(mode):
            content = os.readlink(path)
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        found[str(path.relative_to(top))] = (mode, content)
    return found


def test_files_there_and_back(agent: Local, tmp_path: Path) -> None:
    make_tree(tmp_path / "from")
    agent.put(tmp_path / "from", tmp_path / "guest")
    assert listing(tmp_path / "guest") == listing(tmp_path / "from")
    agent.get(tmp_path / "guest", tmp_path / "back")
    assert listing(tmp_path / "back") == listing(tmp_path / "from")
    agent.put(tmp_path / "from", tmp_path / "guest")  # again, over what is there
    assert listing(tmp_path / "guest") == listing(tmp_path / "from")
    agent.put(b"\0\xff", tmp_path / "bytes", mode=0o4711)
    assert stat.S_IMODE((tmp_path / "bytes").stat().st_mode) == 0o4711
    assert agent.get(tmp_path / "bytes") == b"\0\xff"
    agent.get(tmp_path / "bytes", tmp_path / "copy")
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o711, "no setuid on the host"
    agent.put(tmp_path / "from/link", tmp_path / "followed")
    assert agent.get(tmp_path / "followed") == (tmp_path / "from/link").read_bytes()
    assert not sorted(tmp_path.glob(".*")), "no temporary file is left"


def test_16_mib_in_a_file(agent: Local, tmp_path: Path) -> None:
    data = os.urandom(MIB) * 16
    agent.put(data, tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == data
    assert agent.get(tmp_path / "big") == data
    with pytest.raises(OSError, match="limit of 1000 bytes"):
        agent.get(tmp_path / "big", limit=1000)


def test_files_whose_size_is_not_known(agent: Local) -> None:
    assert Path("/proc/version").stat().st_size == 0
    assert agent.get("/proc/version") == Path("/proc/version").read_bytes()


def test_what_can_not_be_copied(agent: Local, tmp_path: Path) -> None:
    for path, kind in (("/dev/null", "a character device"), (tmp_path / "pipe", "a pipe")):
        if not os.path.lexists(path):
            os.mkfifo(path)
        with pytest.raises(OSError, match=f"{kind}: only files") as refused:
            agent.get(path)
        assert (refused.value.errno, refused.value.filename) == (errno.EINVAL, str(path))
        with pytest.raises(ArgumentError, match=f"is {kind}"):
            agent.put(path, tmp_path / "to")
    with pytest.raises(OSError, match="a pipe"):
        agent.get(tmp_path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(FileNotFoundError) as missing:
        agent.get("/no/such\nfile")
    assert missing.value.filename == "/no/such\nfile"
    with pytest.raises(FileNotFoundError):
        agent.put(tmp_path / "none", "/tmp/none")
    with pytest.raises(FileNotFoundError) as missing:
        agent.put(b"x", tmp_path / "none/x")
    assert missing.value.filename == str(tmp_path / "none/x")
    with pytest.raises(IsADirectoryError, match="give `target`"):
        agent.get(tmp_path)
    with pytest.raises(IsADirectoryError):
        agent.put(b"x", tmp_path)
    with pytest.raises(ArgumentError, match="0o10000"):
        agent.put(b"x", "/tmp/x", mode=0o10000)
    (tmp_path / "pipe").unlink()
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        agent.get(tmp_path / "there", tmp_path / "there")
    (tmp_path / "file").write_text("x")
    with pytest.raises(IsADirectoryError):
        agent.get(tmp_path / "file", tmp_path / "there")
    (tmp_path / "there/absolute").symlink_to("/etc")
    assert not sorted(tmp_path.glob(".*"))


def test_a_full_disk_in_the_guest(agent: Local) -> None:
    with pytest.raises(OSError, match="No space left on device") as full:
        agent.put(b"x" * 100_000, "/dev/full")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "/dev/full")


def test_a_full_disk_on_the_host(
    agent: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that was there stays as it was."""
    old = tmp_path / "old"
    old.write_text("old")
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    agent.put(b"x" * 200_000, tmp_path / "source")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            agent.get(tmp_path / "source", old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert old.read_text() == "old"
    assert not sorted(tmp_path.glob(".*"))
    assert agent.run(["true"]).returncode == 0


def test_a_copy_in_time(agent: Local, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        agent.put(bytes(1 << 30), tmp_path / "big", timeout=0.3)
    with pytest.raises(TimeoutError):
        agent.get(tmp_path, tmp_path / "copy", timeout=0.0)
    assert not (tmp_path / "copy").exists()
