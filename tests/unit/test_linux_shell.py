"""`shell` on a terminal, and `relay` over pipes, with an agent that is a process of this host."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from kvmpriv import ArgumentError
from kvmpriv.guest.linux.agent_ready import AGENT
from kvmpriv.guest.linux.console import Keyboard
from kvmpriv.guest.linux.initrd import with_agent
from kvmpriv.guest.linux.shell import relay
from unit.test_linux_agent import Local, agent, program

__all__ = ["agent", "program"]  # fixtures

CHILD = """
import sys
from pathlib import Path
from unit.test_linux_agent import Local
agent = Local(Path(sys.argv[1]))
print("status", agent.shell(["/bin/sh"]), flush=True)
agent.close()
"""


class Terminal:
    """A terminal of a person, and the program on it."""

    def __init__(self, program: Path) -> None:
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "scripts")))
            environment = {**os.environ, "PYTHONPATH": path, "PS1": "ready> ", "TERM": "vt100"}
            command = [sys.executable, "-c", CHILD, str(program)]
            os.execve(sys.executable, command, environment)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("<HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def wait(self, what: bytes, seconds: float = 30) -> bytes:
        """Read until `what` is there; what was read."""
        deadline = time.monotonic() + seconds
        while what not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 4096)
        at = self.seen.index(what) + len(what)
        found, self.seen = self.seen[:at], self.seen[at:]
        return found

    def raw(self) -> bool:
        return not termios.tcgetattr(self.fd)[3] & termios.ICANON

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(program: Path) -> Iterator[Terminal]:
    made = Terminal(program)
    made.resize(31, 77)
    yield made
    made.close()


def test_a_shell(terminal: Terminal) -> None:
    before = termios.tcgetattr(terminal.fd)
    assert not terminal.raw()
    terminal.wait(b"# ")
    assert terminal.raw()
    terminal.type(b"stty size; echo $TERM; tty\n")
    assert b"31 77\r\nvt100\r\n/dev/pts/" in terminal.wait(b"# ")
    terminal.type(b"sleep 100\n")
    time.sleep(0.5)
    terminal.type(b"\3")  # Ctrl-C goes to the guest
    terminal.wait(b"# ")
    terminal.resize(20, 30)
    deadline = time.monotonic() + 20
    while b"20 30\r\n" not in terminal.seen and time.monotonic() < deadline:
        terminal.type(b"stty size\n")
        terminal.seen = terminal.wait(b"# ")
    assert b"20 30\r\n" in terminal.seen
    terminal.seen = b""
    terminal.type(b"exit 7\n")
    terminal.wait(b"status 7")
    assert termios.tcgetattr(terminal.fd) == before


def test_leaving_a_shell_that_does_not_end(terminal: Terminal) -> None:
    terminal.wait(b"# ")
    terminal.type(b"trap '' HUP INT TERM; echo trapped; while :; do sleep 1; done\n")
    terminal.wait(b"\ntrapped")
    terminal.type(b"\1x")  # Ctrl-A x
    terminal.wait(b"status 130")
    assert not terminal.raw()


def test_no_terminal(agent: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(ArgumentError, match="standard input is not a terminal"):
            agent.shell()


def through_pipes(agent: Local, command: str, data: bytes | None) -> tuple[int, bytes, bytes]:
    """What `kvmpriv boot --run` does; the status, standard output and error."""
    pipes = [os.pipe() for _ in range(3)]
    found: dict[int, bytes] = {}

    def read(number: int) -> None:
        with os.fdopen(pipes[number][0], "rb") as file:
            found[number] = file.read()

    def write() -> None:
        with os.fdopen(pipes[0][1], "wb") as file:
            try:
                file.write(data or b"")
            except BrokenPipeError:
                found[0] = b"broken"

    threads = [threading.Thread(target=read, args=(n,)) for n in (1, 2)]
    threads.append(threading.Thread(target=write))
    for thread in threads:
        thread.start()
    source = Keyboard(pipes[0][0], escape=False) if data is not None else None
    status = relay(agent.popen(command), source, pipes[1][1], pipes[2][1])
    for fd in (pipes[0][0], pipes[1][1], pipes[2][1]):
        os.close(fd)
    for thread in threads:
        thread.join(10)
    return status, found[1], found[2]


def test_streams_of_this_process(agent: Local) -> None:
    data = os.urandom(1_000_000)
    assert through_pipes(agent, "cat; echo err >&2; exit 7", data) == (7, data, b"err\n")
    assert through_pipes(agent, "cat", None) == (0, b"", b"")
    assert through_pipes(agent, "kill -9 $$", b"x")[0] == 137
    assert through_pipes(agent, "exec <&-; sleep 0.5; echo on", b"x" * 1_000_000)[:2] == (
        0,
        b"on\n",
    )
    status, output, _ = through_pipes(agent, "yes | head -c 3000000; exec >&- 2>&-; sleep 0.2", b"")
    assert (status, len(output)) == (0, 3_000_000)


def test_streams_that_can_not_be_written(agent: Local) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        relay(agent.popen("yes"), None, writing, writing)
    os.close(writing)


def test_an_initrd_with_the_agent() -> None:
    root, cmdline = with_agent(b"12345", "quiet rdinit=/a b=c rdinit=/sbin/other")
    assert root[:8] == b"12345\0\0\0"
    assert root[8:14] == b"070701"
    assert AGENT in root
    assert b".kvmpriv/init\0" in root
    assert cmdline == "rdinit=/.kvmpriv/init kvmpriv_init=/sbin/other quiet b=c"
    assert with_agent(b"1234", "root=/dev/vda")[1] == (
        "rdinit=/.kvmpriv/init kvmpriv_wait_for_root=1 root=/dev/vda"
    )
    assert with_agent(b"1234", "rdinit=/a root=/dev/vda -- x", vsock_port=77)[1] == (
        "rdinit=/.kvmpriv/init kvmpriv_vsock=77 kvmpriv_init=/a kvmpriv_wait_for_root=1"
        " root=/dev/vda -- x"
    )
    many, _ = with_agent(b"1234", "", [b"a module", b"another module"])
    assert many.index(b".kvmpriv/modules/0\0") < many.index(b"a module")
    assert many.index(b".kvmpriv/modules/1\0") < many.index(b"another module")
    with pytest.raises(ArgumentError, match="up to 32 modules, not 33"):
        with_agent(b"1234", "", [b""] * 33)
    own, cmdline = with_agent(None, "quiet")
    assert cmdline == "quiet"
    assert with_agent(None, "quiet -- x", vsock_port=77)[1] == "kvmpriv_vsock=77 quiet -- x"
    assert b"bin/busybox\0" in own
    assert b"\nexec /.kvmpriv/agent\n" in own
