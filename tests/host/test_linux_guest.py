"""A guest that programs talk to, around its agent: how it starts, ends, and what it leaves behind.

The kernels are a few bytes; tests/vm has Linux.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from host.test_boot import SPIN, UP, boot, kernel
from kvmpriv import ArgumentError, ClosedError, trace
from kvmpriv.guest.image import ImageError
from kvmpriv.guest.linux import Device, GuestDied, LinuxGuest, Outcome, initrd, load_linux
from kvmpriv.guest.linux.disk import Block, Entropy
from kvmpriv.guest.linux.net import Net
from kvmpriv.guest.linux.tap import Tap
from kvmpriv.guest.linux.vsock import Vsock
from private.support.requirements import missing
from unit.test_linux_vhost import Kernel
from unit.test_linux_vhost import kernel as vhost
from unit.test_linux_vsock import Server, server

__all__ = ["server", "vhost"]

TRIPLE_FAULT = bytes.fromhex("0f0b")
EXIT_7 = bytes.fromhex("b007 e6f4")
POWER_OFF = bytes.fromhex("66ba0406 66b80034 66ef")
INITRD = initrd.pack({"init": b"#!/bin/sh\n"})


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
    if in_use() != before:
        gc.collect()  # a traceback has a device's frame, and that the vCPU
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


def waiting(made: LinuxGuest, text: bytes = b"up") -> threading.Thread:
    """A thread that waits for the guest to be ready, and is told how it ends.

    Returns when the guest has printed `text`, which is all that it prints.
    """
    found: list[BaseException] = []

    def start() -> None:
        try:
            made.start()
        except GuestDied as error:
            found.append(error)

    thread = threading.Thread(target=start)
    thread.found = found  # type: ignore[attr-defined]
    thread.start()
    while text not in made.console:
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
    with pytest.raises(ArgumentError, match="up to 6 virtio devices of its caller, not 7"):
        LinuxGuest(image, initrd=INITRD, devices=[Entropy() for _ in range(7)])
    with pytest.raises(FileNotFoundError):
        LinuxGuest(image, initrd=INITRD, device="/dev/none")


# -- the way of the agent --------------------------------------------------------------------------


def hello() -> bytes:
    return struct.pack("<BBHII8sII", 64, 0, 0, 0, 16, b"kvmpriv\0", 1, 0)


def started(made: LinuxGuest) -> threading.Thread:
    thread = threading.Thread(target=made.start)
    thread.start()
    while b"up" not in made.console:
        time.sleep(0.01)
    return thread


def marks(path: Path) -> list[str]:
    return [event["mark"] for event in trace.read(path).events if "mark" in event]


def test_an_agent_that_comes_over_vsock(vhost: Kernel, server: Server, tmp_path: Path) -> None:
    before = in_use()[0]
    made = guest(UP, trace=tmp_path / "trace", devices=[Entropy() for _ in range(6)])
    assert "kvmpriv_vsock=12345" in made.machine.cmdline.split()
    assert made.machine.mmio.ranges[7].name == "virtio-vsock (vhost)"
    assert made.machine.mmio.ranges[1].name == "virtio-rng", "others have their place without it"
    thread = started(made)
    before_it_came = made.transport
    connection = server.connect_from(vhost.cids[-1])
    connection.sendall(hello())
    thread.join(10)
    assert (before_it_came, made.transport, made.alive) == (None, "vsock", True)
    made._link.power_off()
    assert connection.recv(100) == struct.pack("<BBHII", 8, 0, 0, 0, 0)
    connection.close()
    with pytest.raises(GuestDied, match="its connection was closed; the guest may run on"):
        made.run("true")
    made.close()
    assert marks(tmp_path / "trace") == ["the agent uses vsock"]
    assert in_use()[0] == before - 1, "the server is closed, too"


@pytest.mark.parametrize("wanted", [None, True])
def test_an_agent_that_does_not_come_over_vsock(
    vhost: Kernel, server: Server, wanted: bool | None, tmp_path: Path
) -> None:
    """Its kernel has no vsock: then the listener is closed, and vsock=True ends the guest."""
    made = guest(UP, vsock=wanted, trace=tmp_path / "trace")
    thread = waiting(made)
    made._streams._take("virtio-console", hello())
    thread.join(10)
    words = (
        "the agent uses a port of a virtio console: the guest has not connected over vsock, for"
        " which its kernel needs the driver vmw_vsock_virtio_transport"
    )
    assert made.transport == "virtio-console"
    if wanted:
        (died,) = thread.found  # type: ignore[attr-defined]
        assert isinstance(died, GuestDied)
        assert str(died).startswith(f"the guest can't go on: vsock=True, and {words}")
        assert made.wait(10) == died.outcome
    else:
        assert made.alive
        while server.fileno() >= 0:
            time.sleep(0.01)
    made.close()
    assert marks(tmp_path / "trace") == [words]


def test_a_host_without_vsock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = str(tmp_path / "vhost-vsock")
    monkeypatch.setattr(Vsock.__init__, "__kwdefaults__", {"required": False, "device": absent})
    words: list[str] = []
    with pytest.raises(FileNotFoundError, match=f"{absent} can't be used: No such file"):
        guest(UP, vsock=True)
    for wanted, why in (
        (None, f"{absent} can't be used: No such file or directory"),
        (False, "vsock=False"),
    ):
        made = guest(UP, vsock=wanted, complain=words.append, trace=tmp_path / "trace")
        assert "vsock" not in made.machine.cmdline
        thread = waiting(made)
        made._streams._take("virtio-console", hello())
        thread.join(10)
        assert (made.transport, made.alive) == ("virtio-console", True)
        made.close()
        (mark,) = marks(tmp_path / "trace")
        assert mark == f"the agent uses a port of a virtio console: {why}"
    assert words == []


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


# -- life cycle ------------------------------------------------------------------------------------

#: Prints (or this host's KVM may be found to make no progress) and counts in the word at COUNTER,
#: for ever; and prints for ever.
COUNTER = 0x8000
COUNT = bytes.fromhex("66baf803 b063 ee ff042500800000 ebf7")
FLOOD = bytes.fromhex("66baf803 b03e ee ebfd")


def counted(made: LinuxGuest) -> int:
    return int.from_bytes(made.machine.memory.read(COUNTER, 4), "little")


def starting(made: LinuxGuest, ready: Callable[[], object]) -> threading.Thread:
    """A thread that waits for the guest; returns when `ready()`."""

    def start() -> None:
        with suppress(GuestDied):
            made.start()

    thread = threading.Thread(target=start)
    thread.start()
    while not ready():
        time.sleep(0.01)
    return thread


def test_a_paused_guest_does_nothing() -> None:
    made = guest(COUNT, cpus=2)
    thread = starting(made, lambda: counted(made) > 10)
    for _ in range(5):
        made.pause()
        made.pause()
        assert made.paused
        before = counted(made)
        time.sleep(0.1)
        assert counted(made) == before
        assert made.machine.vcpus[0].get_regs().rip, "no thread runs it"
        made.resume()
        made.resume()
        assert not made.paused
        while counted(made) == before:
            time.sleep(0.01)
    made.pause()
    before = counted(made)
    assert made.outcome is None
    made.close()
    thread.join(10)
    for use in (made.pause, made.resume):
        with pytest.raises(ClosedError):
            use()


def test_a_guest_that_starts_paused() -> None:
    made = guest(COUNT, timeout=30)
    made.machine.pause()
    thread = starting(made, lambda: made.machine._threads)
    time.sleep(0.1)
    assert counted(made) == 0
    made.resume()
    while not counted(made):
        time.sleep(0.01)
    made.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_pause_while_the_console_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that takes the console's output pauses the guest, which floods it."""
    monkeypatch.setattr("kvmpriv.guest.linux.supervisor._OUTPUT_MAX", 4)
    made: LinuxGuest
    paused = threading.Event()

    def output(data: bytes) -> None:
        if not paused.is_set():
            time.sleep(0.3)  # until the vCPU waits
            made.machine.pause()
            paused.set()

    made = guest(FLOOD, output=output)
    thread = starting(made, paused.is_set)
    assert made.machine.paused
    made.resume()
    assert not made.machine.paused
    made.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_device_can_not_pause_its_guest() -> None:
    made = guest(bytes.fromhex("66ba0005 ee f4"))  # out to port 0x500

    class Pauses:
        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            made.machine.pause()

    made.machine.ports.add(Pauses(), 0x500, 1)
    with pytest.raises(GuestDied, match="can't pause it, as it would wait for itself"):
        made.start()
    assert not made.paused
    with pytest.raises(GuestDied):
        made.pause()
    made.close()


def test_a_pause_that_is_interrupted() -> None:
    """The guest goes on as if the pause had not begun."""
    made = guest(COUNT)
    thread = starting(made, lambda: counted(made) > 10)

    def interrupt() -> None:
        raise KeyboardInterrupt

    gate, (vcpu,) = made.machine._gate, made.machine._threads
    with pytest.raises(KeyboardInterrupt):
        gate.shut([vcpu], interrupt)
    assert not made.paused
    before = counted(made)
    while counted(made) == before:
        time.sleep(0.01)
    made.close()
    thread.join(10)


def test_devices_of_ones_own() -> None:
    """Before the start they are added, and afterwards refused."""

    class Ends(Device):
        def write(self, offset: int, size: int, value: int) -> None:
            made.machine.end(Outcome("off", 7, "by a device"))

    made = guest(bytes.fromhex("66ba0005 ee ebfe"))
    made.add_device(Ends(), port=0x500, size=1)
    with pytest.raises(ArgumentError, match="overlaps Ends"):
        made.add_device(Ends(), port=0x500, size=1)
    for _ in range(9 - len(made.machine._virtio)):
        made.add_device(Entropy())
    with pytest.raises(ArgumentError, match="up to 9 virtio devices"):
        made.add_device(Entropy())
    with pytest.raises(GuestDied, match="by a device"):
        made.start()
    with pytest.raises(RuntimeError, match="has been started"):
        made.add_device(Entropy())
    made.close()
    with pytest.raises(ClosedError):
        made.add_device(Entropy())


def test_what_a_guest_costs() -> None:
    made = guest(UP, cpus=2)
    nothing = made.cost()
    assert (nothing.wall, nothing.kinds, nothing.exits) == (0.0, {}, (0, 0))
    thread = waiting(made)
    time.sleep(0.2)
    cost = made.cost()
    assert cost.kinds == {"KVM_EXIT_IO": 3}
    assert cost.exits == (3, 0)
    assert 0.2 < cost.wall < 60
    assert 4096 < cost.memory <= 64 << 20
    assert cost.private == 0
    assert cost.rss > cost.shared > 0
    assert len(cost.cpu) == 2
    assert cost.others >= cost.devices >= 0
    made.close()
    thread.join(10)
    after = made.cost()
    assert after.wall >= cost.wall
    assert after.memory == cost.memory
    assert after.kinds["KVM_EXIT_IO"] == 3
    time.sleep(0.1)
    assert made.cost().wall == after.wall
    never = guest(UP)
    never.close()
    assert never.cost()[4:] == ((0,), {}, 0.0, 0.0, 0, 0)


def test_eight_guests_in_one_process() -> None:
    """Each has its network card, with an address of its own, and figures of its own."""
    cables = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(8)]
    cards = [Net(ours.fileno()) for ours, _ in cables]
    texts = [b"guest %d\n" % number for number in range(8)]
    made, threads = [], []
    for card, text in zip(cards, texts, strict=True):
        code = bytes.fromhex("66baf803") + b"".join(b"\xb0%c\xee" % byte for byte in text)
        made.append(guest(code + bytes.fromhex("f4ebfd"), devices=[card]))
        threads.append(waiting(made[-1], text))
    assert len({card.mac for card in cards}) == 8
    assert [one.console for one in made] == texts
    made[3].pause()
    assert [one.paused for one in made] == [number == 3 for number in range(8)]
    assert [one.cost().kinds for one in made] == [{"KVM_EXIT_IO": len(text)} for text in texts]
    for one, thread in zip(made, threads, strict=True):
        one.close()
        thread.join(10)
    for pair in cables:
        for end in pair:
            end.close()


SCRIPT = f"""
import os, sys, tempfile
from pathlib import Path
from kvmpriv.guest.linux import LinuxGuest, load_linux
from kvmpriv.guest.linux.disk import Block
from kvmpriv.guest.linux.net import Net
from kvmpriv.guest.linux.tap import Tap
folder = Path(sys.argv[1])
devices = [Block(folder / "disk"), Net(Tap())]
image = load_linux((folder / "kernel").read_bytes())
guest = LinuxGuest(image, initrd={INITRD!r}, memory=64 << 20, devices=devices)
import threading
threading.Thread(target=guest.start, daemon=True).start()
while not guest.console:
    pass
print("up", flush=True)
sys.stdin.read()
raise SystemExit("the script died")
"""


def belongings(mark: str, folder: Path) -> dict[str, list[str]]:
    """What there is of a script: processes with `mark` in their environment, networks, files."""
    found: dict[str, list[str]] = {"processes": [], "namespaces": [], "files": []}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found["processes"].append(process.name)
    found["namespaces"] = sorted(path.name for path in Path("/run/netns").glob("kvmpriv-*"))
    found["files"] = sorted(map(str, folder.rglob("*")))
    return found


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_nothing_is_left_of_a_script_that_dies(tmp_path: Path, how: str) -> None:
    """Its processes, its network and its files are counted, and its disk is free again."""
    try:
        Tap().close()
    except OSError as error:
        missing("network", f"no tap can be made: {error}")
    (tmp_path / "kernel").write_bytes(kernel(UP))
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    mark = f"KVMPRIV_MARK={tmp_path}"
    before = belongings(mark, tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path],
        env={**os.environ, "KVMPRIV_MARK": str(tmp_path), "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == b"up\n"
        running = belongings(mark, tmp_path)
        assert len(running["processes"]) == 2, "the script, and what removes its network"
        assert len(running["namespaces"]) == len(before["namespaces"]) + 1
        with pytest.raises(BlockingIOError, match="in use"):
            Block(disk)
        if how == "killed":
            script.kill()
    deadline = time.monotonic() + 10
    while (left := belongings(mark, tmp_path)) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == before
    Block(disk).close()


# -- the pytest plugin -----------------------------------------------------------------------------

TESTS = f"""
import pytest

pytestmark = pytest.mark.linux_guest(initrd={INITRD!r}, memory=64 << 20, timeout=0.3)


def test_an_agent_that_does_not_answer(linux_guest):
    raise AssertionError("there is no guest")


@pytest.mark.linux_guest(private="v8")
def test_private(linux_guest):
    raise AssertionError("there is no guest")
"""


def test_pytest_shows_the_console_of_a_guest(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(kernel(UP))
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--linux-kernel", "bzImage"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "2 errors" in done.stdout, done.stdout
    assert "its agent did not answer in 0.3 s" in done.stdout
    shown = done.stdout.partition("Console of the Linux guest; timeout: ")[2]
    assert shown.splitlines()[1] == "up"
    assert "unknown private memory ABI" in done.stdout
