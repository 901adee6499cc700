"""A guest that programs talk to, around its agent: how it starts, ends, and what it leaves behind.

The kernels are a few bytes; tests/vm has Linux.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from host.test_boot import SPIN, UP, boot, kernel
from kvmpriv import ArgumentError, ClosedError
from kvmpriv.guest.image import ImageError
from kvmpriv.guest.linux import GuestDied, LinuxGuest, Outcome, load_linux
from kvmpriv.guest.linux.disk import Entropy

TRIPLE_FAULT = bytes.fromhex("0f0b")
EXIT_7 = bytes.fromhex("b007 e6f4")
POWER_OFF = bytes.fromhex("66ba0406 66b80034 66ef")
INITRD = b"an initrd"


def guest(code: bytes, **options: object) -> LinuxGuest:
    image = load_linux(kernel(code))
    return LinuxGuest(image, initrd=INITRD, memory=64 << 20, **options)  # type: ignore[arg-type]


def in_use() -> tuple[int, list[str]]:
    """The descriptors and the threads of this process."""
    return len(os.listdir("/proc/self/fd")), sorted(t.name for t in threading.enumerate())


@pytest.fixture(autouse=True)
def _leaves_nothing() -> object:
    before = in_use()
    yield
    assert in_use() == before


@pytest.mark.parametrize(
    ("code", "how", "words"),
    [
        (TRIPLE_FAULT, "crash", "the guest crashed: vCPU 0: triple fault"),
        (EXIT_7, "exit", "the guest has ended itself: wrote to port 0xf4"),
        (POWER_OFF, "off", "the guest has turned itself off"),
    ],
)
def test_a_guest_that_ends_before_its_agent_answers(code: bytes, how: str, words: str) -> None:
    made = guest(code)
    with pytest.raises(GuestDied, match=words) as died:
        made.start()
    assert died.value.outcome.how == how
    assert made.outcome == died.value.outcome
    with pytest.raises(GuestDied):
        made.run("true")
    made.close()
    with pytest.raises(ClosedError, match="the guest is closed"):
        made.run("true")
    with pytest.raises(ClosedError):
        made.start()


def test_an_agent_that_does_not_answer() -> None:
    printed: list[bytes] = []
    with (
        pytest.raises(GuestDied, match=r"did not answer in 0\.3 s") as died,
        guest(UP, timeout=0.3, output=printed.append),
    ):
        pass
    assert died.value.outcome.how == "timeout"
    assert died.value.console == "up"
    assert str(died.value).endswith("the last lines of its console:\nup")
    assert b"".join(printed) == b"up\n"
    again = pickle.loads(pickle.dumps(died.value))
    assert (again.outcome, again.console) == (died.value.outcome, "up")


def test_a_panic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the console's text, as LinuxMachine finds it."""
    monkeypatch.setattr("kvmpriv.guest.linux.supervisor._PANIC", b"up")
    monkeypatch.setattr("kvmpriv.guest.linux.supervisor._PANIC_GRACE", 0.1)
    with pytest.raises(GuestDied, match="the guest's kernel panicked: up") as died, guest(UP):
        pass
    assert died.value.outcome.how == "panic"


def waiting(made: LinuxGuest) -> threading.Thread:
    """A thread that waits for the guest to be ready, and is told how it ends."""
    found: list[BaseException] = []

    def start() -> None:
        try:
            made.start()
        except GuestDied as error:
            found.append(error)

    thread = threading.Thread(target=start)
    thread.found = found  # type: ignore[attr-defined]
    thread.start()
    while not made.console:
        time.sleep(0.01)
    return thread


def killed_vcpu(made: LinuxGuest) -> None:
    """A vCPU's thread that ends by an exception."""
    thread = made.machine._threads[0]
    thread._error = OSError(5, "gone")
    thread._stopping = True
    made.machine.vcpus[0].kick()


@pytest.mark.parametrize(
    ("end", "how", "words"),
    [
        (lambda made: made.close(), "closed", "the guest was closed: by its program"),
        (
            lambda made: made.machine.end(Outcome("off", 0, "for a test")),
            "off",
            "turned itself off",
        ),
        (lambda made: made.machine._io_failed(OSError("broken")), "error", "OSError: broken"),
        (killed_vcpu, "error", "OSError: "),
    ],
)
def test_a_guest_that_ends_while_somebody_waits(
    end: Callable[[LinuxGuest], object], how: str, words: str
) -> None:
    made = guest(UP)
    thread = waiting(made)
    end(made)
    thread.join(10)
    (error,) = thread.found  # type: ignore[attr-defined]
    assert error.outcome.how == how
    assert words in str(error)
    assert "up" in error.console
    made.close()
    made.close()


def test_ctrl_c_while_it_starts() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt), guest(SPIN):
            pass
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_guest_that_was_never_started() -> None:
    made = guest(UP)
    for use in (lambda: made.run("true"), lambda: made.popen("true"), made.shutdown):
        with pytest.raises(ClosedError, match="was not started"):
            use()
    made.close()
    assert made.outcome is not None
    assert made.outcome.how == "closed"


def test_a_fork() -> None:
    made = guest(UP)
    thread = waiting(made)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with pytest.raises(ClosedError, match="forked from"):
                made.run("true")
            made.close()
            made.__exit__(None, None, None)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert made.outcome is None, "the child's close did not end it"
    made.close()
    thread.join(10)


def test_bad_arguments(tmp_path: Path) -> None:
    image = load_linux(kernel(UP))
    with pytest.raises(FileNotFoundError):
        LinuxGuest(tmp_path / "none")
    with pytest.raises(ImageError):
        LinuxGuest(image, initrd=INITRD, memory=4 << 20)
    with pytest.raises(ArgumentError):
        LinuxGuest(image, initrd=INITRD, cpus=0)
    with pytest.raises(ArgumentError, match="virtio devices"):
        LinuxGuest(image, initrd=INITRD, devices=[Entropy() for _ in range(8)])
    with pytest.raises(FileNotFoundError):
        LinuxGuest(image, initrd=INITRD, device="/dev/none")


def test_it_is_watched(tmp_path: Path) -> None:
    made = guest(UP, trace=tmp_path / "trace")
    looks: list[int] = []
    made.watch(lambda: looks.append(1))
    thread = waiting(made)
    assert made.wait(0.01) is None
    made.close()
    thread.join(10)
    assert looks
    assert (tmp_path / "trace").stat().st_size > 0
    outcome = made.wait()
    assert outcome is not None
    assert outcome.how == "closed"


# -- kvmpriv boot --run and --shell ----------------------------------------------------------------


@pytest.fixture
def spinning(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(kernel(SPIN))
    return path


def test_usage_of_run_and_shell(spinning: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("--run", " "), "the command is empty"),
        (("--run", "true", "--shell"), "not allowed with argument"),
        (("--run", "true", "--json"), "not allowed with argument"),
        (("--shell",), "--shell needs a terminal as standard input; use --run COMMAND"),
        (("--run", "true", "--trace", tmp_path / "no/trace"), "No such file or directory"),
        (("--run", "true", "--memory", "8M"), "too little memory"),
        (("--run", "true", "--pin", "0,0"), "--pin: 2 CPUs for 1 vCPU"),
    ):
        done = boot("--kernel", spinning, *arguments, stdin=subprocess.DEVNULL)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr, arguments
        assert "Traceback" not in done.stderr
    done = boot("--kernel", spinning, "--run", "true", "--device", tmp_path / "none")
    assert done.returncode == 3


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (TRIPLE_FAULT, 125, "the guest crashed: vCPU 0: triple fault"),
        (EXIT_7, 7, "the guest has ended itself: wrote to port 0xf4"),
        (POWER_OFF, 0, "the guest has turned itself off"),
        (UP, 124, "the last lines of its console:\nup\n"),
    ],
)
def test_run_in_a_guest_that_ends(tmp_path: Path, code: bytes, status: int, words: str) -> None:
    path, root = tmp_path / "bzImage", tmp_path / "initrd"
    path.write_bytes(kernel(code))
    root.write_bytes(INITRD)
    done = boot("--kernel", path, "--initrd", root, "--run", "true", "--timeout", "2")
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_run_is_interrupted(spinning: Path) -> None:
    command = [sys.executable, "-m", "kvmpriv", "boot", "--kernel", str(spinning)]
    process = subprocess.Popen(
        [*command, "--run", "true", "--watch"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "vCPUs" in process.stderr.readline()  # it runs
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
