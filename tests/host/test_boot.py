"""``kvmpriv boot`` where it can't work: its messages, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from kvmpriv import ArgumentError, Kvm, Vcpu, Vm, private, trace, uapi
from kvmpriv.guest.linux import (
    Cost,
    Device,
    Interrupted,
    LinuxMachine,
    Outcome,
    boot_protocol,
    load_linux,
    plan,
)
from kvmpriv.guest.linux.disk import Entropy
from kvmpriv.guest.linux.dispatch import GuestThread
from kvmpriv.guest.linux.tap import HOST_ADDRESS, Tap
from kvmpriv.slots import Slot
from private.support.requirements import missing
from unit.test_linux_image import bzimage

#: Long mode: print "up", then wait for an interrupt that never comes.
UP = bytes.fromhex("66ba f803 b075 ee b070 ee b00a ee f4 eb fd".replace(" ", ""))
SPIN = bytes.fromhex("ebfe")
CPU = min(os.sched_getaffinity(0))
ENTRY = 0x200  # of the code, where a kernel begins


def kernel(code: bytes) -> bytes:
    """A bzImage that is nothing but `code`."""
    return bzimage(bytes(ENTRY) + code.ljust(0x200, b"\xf4"))


def boot(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpriv", "boot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(kernel(UP))
    return path


def test_usage(image: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"#!/bin/sh\n" * 100)
    short = tmp_path / "short"
    short.write_bytes(image.read_bytes()[:-100])
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    zeros = tmp_path / "zeros"
    zeros.write_bytes(bytes(1 << 20))
    for arguments, words in (
        ((), "the following arguments are required: --kernel"),
        (("--kernel", tmp_path / "none"), "none: No such file or directory"),
        (("--kernel", tmp_path), "Is a directory"),
        (("--kernel", bad), "bad: neither a bzImage nor a vmlinux"),
        (("--kernel", short), "short: truncated: by its header it has"),
        (("--kernel", image, "--initrd", empty), "empty: the file is empty"),
        (("--kernel", image, "--initrd", bad), "bad: not an initrd, which is a cpio archive"),
        (("--kernel", image, "--initrd", image), "a kernel, not an initrd, which is a cpio"),
        (("--kernel", image, "--initrd", "none"), "none: No such file or directory"),
        (("--kernel", image, "--memory", "16M"), "too little memory: the kernel needs 0x1000000"),
        (("--kernel", image, "--memory", "much"), "'much' is not a size"),
        (("--kernel", image, "--cpus", "0"), "'0' is not a number of vCPUs (1 to 254)"),
        (("--kernel", image, "--cpus", "255"), "'255' is not a number of vCPUs (1 to 254)"),
        (("--kernel", image, "--private=v8"), "'v8' is not an ABI"),
        (("--kernel", image, "--net", "wifi"), "'wifi' is not a network: write tap, tap=BRIDGE"),
        (("--kernel", image, "--net", "tap="), "'tap=' is not a network: write tap, tap=BRIDGE"),
        (("--kernel", image, "--net", "none,mac=02:00:00:00:00:01"), "is not a network"),
        (("--kernel", image, "--net", "tap,mac=1:2"), "'1:2' is not the MAC address of a card"),
        (("--kernel", image, "--net", "tap,mac=01:00:00:00:00:01"), "is not the MAC address"),
        (("--kernel", image, "--net", "tap,vhost=maybe"), "is not a network: write tap,"),
        (("--kernel", image, "--net", "tap,vhost=on,vhost=on"), "is not a network: write tap,"),
        (("--kernel", image, "--disk", tmp_path), "Is a directory"),
        (("--kernel", image, "--disk", empty), "a multiple of 512 bytes, more than 0, not 0"),
        (
            ("--kernel", image, "--append", "root=/dev/vda"),
            "--append: root=/dev/vda needs a disk, and the guest has none: add --disk",
        ),
        (
            ("--kernel", image, "--disk", zeros, "--append", "root=/dev/vda rw"),
            "zeros: an empty disk, without a file system: write the guest's root file system",
        ),
        (("--kernel", image, "--append", "x" * 3000), "the command line has 3023 bytes"),
        (("--kernel", image, "--pin", "some"), "'some' is not a list of CPUs such as 0,1"),
        (("--kernel", image, "--pin", "8999"), "--pin: CPU 8999 is not available to this process"),
        (
            ("--kernel", image, "--pin", f"{CPU},{CPU}"),
            "--pin: 2 CPUs for 1 vCPU: list one CPU for each vCPU",
        ),
        (("--kernel", image, "--trace", tmp_path), "Is a directory"),
    ):
        done = boot(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), (arguments, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("kvm")
def test_the_scripts(tmp_path: Path) -> None:
    """The examples report bad usage, bad files and how the guest ended, each with a status."""
    ends = tmp_path / "ends"
    ends.write_bytes(kernel(bytes.fromhex("b02a e6f4")))  # mov $42, %al; out %al, $0xf4
    for script, arguments, status, words in (
        ("linux_command.py", (), 2, "    scripts/examples/linux_command.py /boot/vmlinuz"),
        ("linux_command.py", (ends,), 2, "    scripts/examples/linux_command.py /boot/vmlinuz"),
        ("linux_command.py", (tmp_path / "none", ""), 1, "No such file or directory: '"),
        ("linux_command.py", (os.devnull, ""), 1, "linux_command.py: the file is empty"),
        (
            "linux_command.py",
            (ends, ""),
            42,
            "linux_command.py: the guest has ended itself: ",
        ),
        ("linux_device.py", (), 2, "    scripts/examples/linux_device.py KERNEL"),
        ("linux_device.py", (tmp_path / "none",), 1, "No such file or directory: '"),
        ("linux_talk.py", (), 2, "    scripts/examples/linux_talk.py KERNEL [ABI]"),
        ("linux_talk.py", (ends, "v8"), 1, "linux_talk.py: unknown private memory ABI"),
        ("linux_private.py", (), 2, "    scripts/examples/linux_private.py KERNEL [ABI"),
        ("linux_private.py", (ends, "v8"), 1, "linux_private.py: unknown private memory ABI"),
    ):
        command = [sys.executable, ROOT / "scripts/examples" / script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (status, ""), (script, arguments, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def refusals(kvm: Kvm) -> dict[str, str]:
    """The ABIs that this machine does not support, and why."""
    found = {}
    for name in private.ABIS:
        try:
            private.choose(kvm, name)
        except OSError as error:
            found[name] = str(error.strerror)
    return found


def test_private_memory_that_the_host_refuses(kvm: Kvm, image: Path) -> None:
    refused = refusals(kvm)
    if not refused:
        missing("no-private-memory", "each ABI of private memory can be had here")
    name, why = refused.popitem()
    done = boot("--kernel", image, f"--private={name}")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"kvmpriv boot: {why} (`kvmpriv probe` gives details)\n"


@pytest.mark.usefixtures("kvm")
def test_the_console_and_a_time_limit(image: Path) -> None:
    done = boot("--kernel", image, "--memory", "32M", "--timeout", "1")
    assert (done.returncode, done.stdout) == (124, "up\n")
    assert done.stderr == "kvmpriv boot: the guest was ended: the time limit is reached\n"


@pytest.mark.usefixtures("kvm")
def test_a_recorded_run(image: Path, tmp_path: Path) -> None:
    """Each byte that the guest prints is an exit, and the recording has all of them."""
    path = tmp_path / "run.trace"
    options = ("--memory", "32M", "--timeout", "2.5", "--trace", path, "--watch")
    done = boot("--kernel", image, *options, "--pin", CPU)
    assert (done.returncode, done.stdout) == (124, "up\n")
    recording = trace.read(path)
    assert recording.about["ranges"] == [part._asdict() for part in plan(32 << 20)]
    assert recording.about["cmdline"] == "console=ttyS0 panic=-1"
    when = datetime.strptime(recording.about["date"], "%Y-%m-%dT%H:%M:%S%z")
    assert abs((datetime.now(timezone.utc) - when).total_seconds()) < 60
    devices = recording.about["devices"]
    assert devices[0] == {"name": "console (COM1)", "port": 0x3F8, "size": 8}
    assert devices[-1] == {"name": "virtio-rng", "gpa": 0xD0000000, "size": 0x200}
    exits = [event for event in recording.events if "exit" in event]
    where = {"cpu": 0, "exit": "KVM_EXIT_IO", "port": 0x3F8, "write": True}
    assert [{**event, "t": 0} for event in exits] == [{"t": 0, **where}] * 3
    found = trace.summarize(recording)
    assert found.end is not None
    assert (found.end["end"], found.end["status"]) == ("timeout", 124)
    assert 2.5 <= found.seconds < 30
    assert len(found.samples) >= 3
    assert found.samples[-1]["memory"][0]["resident"] > 4096
    assert found.samples[0]["rss"] > 1 << 20
    watched = [line for line in done.stderr.splitlines() if "exits/s" in line]
    assert watched
    assert re.fullmatch(
        r"kvmpriv boot: \d+ s: vCPUs \d+ %, \d+ exits/s, \d+ MiB resident"
        r" \(\d+ MiB shared with others\)",
        watched[0],
    )


@pytest.mark.usefixtures("kvm")
def test_words_of_ours_begin_a_line(tmp_path: Path) -> None:
    """A message begins a new line if the console prints to the same place, in mid-line."""
    path = tmp_path / "prompt"
    path.write_bytes(kernel(bytes.fromhex("66baf803 b03e ee f4 ebfd")))
    done = boot("--kernel", path, "--memory", "32M", "--timeout", "2.5", "--watch", "--json")
    assert done.returncode == 124
    prompt, *ours = [line for line in done.stderr.split("\n") if "exits/s" not in line]
    assert [prompt, *ours] == [
        ">",
        "kvmpriv boot: the guest was ended: the time limit is reached",
        "",
    ]
    assert re.search(r"^kvmpriv boot: \d+ s: vCPUs", done.stderr, re.M)
    done = boot("--kernel", path, "--memory", "32M", "--timeout", "1")
    assert (done.stdout, done.stderr[:13]) == (">", "kvmpriv boot:"), "each on its own stream"


@pytest.mark.usefixtures("kvm")
def test_a_recording_on_a_full_disk(image: Path) -> None:
    """The guest runs on, and a message reports the error."""
    done = boot("--kernel", image, "--memory", "32M", "--timeout", "1", "--trace", "/dev/full")
    assert (done.returncode, done.stdout) == (124, "up\n")
    assert "/dev/full: No space left on device; the recording is incomplete\n" in done.stderr


def test_what_a_guest_costs(kvm: Kvm) -> None:
    """Only the vCPU that works uses CPU time, and each vCPU runs on its pinned CPU."""
    seen: list[tuple[Cost, set[int]]] = []
    image = load_linux(kernel(bytes.fromhex("66baed00 ee ebfd")))  # OUT to a port, for ever
    with LinuxMachine(kvm, image, plan(32 << 20), cpus=2, pin=[CPU, CPU]) as machine:

        def look() -> None:
            threads = [each for each in threading.enumerate() if each.name in ("vcpu0", "vcpu1")]
            on = set().union(*(os.sched_getaffinity(each.native_id or 0) for each in threads))
            seen.append((machine.cost(), on))

        assert machine.run(timeout=1.5, look=look, every=0.5).how == "timeout"
    assert len(seen) >= 4
    assert {CPU} in [on for _, on in seen]
    last = seen[-1][0]
    assert last.exits[0] > 100
    assert last.exits[1] == 0
    assert last.cpu[0] > 10 * last.cpu[1]
    assert last.cpu[0] > seen[0][0].cpu[0]
    assert last.rss > last.shared > 0


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(("ending", "status"), [("b007e6f4", 7), ("b006 66baf90c ee", 0)])
def test_the_ports_that_end_it(tmp_path: Path, ending: str, status: int) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(kernel(bytes.fromhex(ending)))
    done = boot("--kernel", path, "--memory", "32M", "--timeout", "30")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.usefixtures("kvm")
def test_a_triple_fault(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(kernel(b"\x0f\x0b"))  # ud2, without an IDT
    done = boot("--kernel", path, "--memory", "32M", "--timeout", "30")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("kvmpriv boot: the guest crashed: vCPU 0: triple fault")


def test_without_progress(kvm: Kvm, tmp_path: Path) -> None:
    """A KVM that emulates the kernel is reported; another runs it until the time limit."""
    path = tmp_path / "bzImage"
    path.write_bytes(kernel(SPIN))
    done = boot("--kernel", path, "--memory", "32M", "--timeout", "5")
    assert done.stdout == ""
    if done.returncode == 124:
        missing("paravirtual", "this KVM does not emulate a kernel's instructions")
    assert done.returncode == 123
    assert "this KVM emulates the guest's kernel instruction by instruction" in done.stderr


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_terminal_is_as_it_was(image: Path, how: signal.Signals, status: int) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "kvmpriv", "boot", "--kernel", image, "--memory", "32M"]
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(ours)
        for fd in range(3):
            os.dup2(theirs, fd)
        import fcntl

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(how, signal.SIG_DFL)  # it is ignored under nohup, and a command keeps that
        os.execv(sys.executable, [str(word) for word in command])
    seen = b""
    while b"up\r\n" not in seen:
        seen += os.read(ours, 4096)
    assert b"Ctrl-A x ends the guest" in seen
    assert not termios.tcgetattr(theirs)[3] & termios.ECHO
    if how == signal.SIGINT:
        os.write(ours, b"\x01x")
    else:
        os.kill(pid, how)
    _, waited = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(waited) == status
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


@pytest.mark.usefixtures("kvm")
def test_a_terminal_of_another_session(image: Path) -> None:
    """After setsid the terminal is the earlier session's, whose shell reads it: not the guest."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    options = ("--memory", "32M", "--timeout", "1")
    done = boot("--kernel", image, *options, stdin=theirs, start_new_session=True)
    assert (done.returncode, done.stdout) == (124, "up\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_what_was_printed_before_an_error_is_not_lost(kvm: Kvm) -> None:
    """An error of KVM or a signal handler ends the run: the console's last bytes come before it."""
    image = load_linux(kernel(UP))
    for interrupt in (KeyboardInterrupt, RuntimeError):
        printed = bytearray()
        with LinuxMachine(kvm, image, plan(32 << 20), output=printed.extend) as machine:

            def look(raised: type[BaseException] = interrupt) -> None:
                while len(machine._supervisor._pending) < 3:
                    time.sleep(0.001)
                raise raised("enough")

            with pytest.raises(interrupt, match="enough"):
                machine.run(timeout=30, look=look)
        assert printed == b"up\n"


def test_output_that_fails_is_not_called_again(kvm: Kvm) -> None:
    calls: list[bytes] = []

    def output(data: bytes) -> None:
        calls.append(data)
        raise ConnectionError("nobody listens")

    endless = bytes.fromhex("66baf803 b03e ee ebfd")
    with (
        LinuxMachine(kvm, load_linux(kernel(endless)), plan(32 << 20), output=output) as machine,
        pytest.raises(ConnectionError, match="nobody listens"),
    ):
        machine.run(timeout=30)
    assert len(calls) == 1


@pytest.mark.usefixtures("kvm")
def test_output_that_nobody_reads(image: Path) -> None:
    command = [sys.executable, "-m", "kvmpriv", "boot", "--kernel", str(image), "--memory", "32M"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout
        run.stdout.close()
        assert run.wait(30) == 128 + signal.SIGPIPE
        assert run.stderr
        assert run.stderr.read() == b""


def test_nothing_is_left_of_a_machine(kvm: Kvm, no_leak: object) -> None:
    for _ in range(3):
        with LinuxMachine(kvm, load_linux(kernel(UP)), plan(32 << 20), cpus=2) as machine:
            assert machine.run(timeout=0.2).how == "timeout"
    with pytest.raises(ValueError, match="too little memory"):
        LinuxMachine(kvm, load_linux(kernel(UP)), plan(16 << 20))


def namespaces() -> set[str]:
    folder = Path("/run/netns")
    found = {path.name for path in folder.glob("kvmpriv-*")} if folder.is_dir() else set()
    return {name for name in found if name.split("-")[1] == str(os.getpid())}


def tap_or_skip() -> Tap:
    try:
        return Tap()
    except OSError as error:
        missing("network", f"no tap can be made: {error}")


def test_a_tap_and_its_namespace_come_and_go() -> None:
    with tap_or_skip() as tap:
        assert namespaces() == {tap.namespace}
        with Tap() as other:
            assert namespaces() == {tap.namespace, other.namespace}
    assert namespaces() == set()


def test_taps_made_at_the_same_time() -> None:
    """Each thread gets a namespace of its own."""
    tap_or_skip().close()
    made: list[Tap] = []
    threads = [threading.Thread(target=lambda: made.append(Tap())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tap.namespace for tap in made}) == 8
    for tap in made:
        tap.close()
    assert namespaces() == set()


def test_what_a_killed_process_leaves_is_removed() -> None:
    tap_or_skip().close()
    code = (
        "from kvmpriv.guest.linux.tap import Tap\n"
        "tap = Tap(); print(tap.namespace, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        name = child.stdout.readline().strip()
        assert Path("/run/netns", name).exists()
        with Tap():  # one that is alive keeps what is its own
            assert Path("/run/netns", name).exists()
        child.kill()
    deadline = time.monotonic() + 10
    while Path("/run/netns", name).exists() and time.monotonic() < deadline:
        Tap().close()
    assert not Path("/run/netns", name).exists()


WITHOUT_CAPABILITIES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
USER = 65534
OWN = """
from kvmpriv.guest.linux.tap import Tap
with Tap() as tap:
    print(tap.holder, tap.namespace, tap.name, flush=True)
    input()
print("over", flush=True)
input()
"""


def as_a_user(folder: Path) -> list[str]:
    """The start of a command: run as a user who can read everything and open /dev/net/tun."""
    node = folder / "tun"
    script = f'mknod -m 666 {node} c 10 200 && mount --bind {node} /dev/net/tun && exec "$@"'
    rights = "=-all,+dac_read_search"
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    user += [f"--inh-caps{rights}", f"--ambient-caps{rights}"]
    return ["unshare", "--mount", "sh", "-c", script, "-", *user]


def test_a_tap_for_who_may_not_make_networks(tmp_path: Path) -> None:
    """Without CAP_NET_ADMIN the tap is in a user namespace, with the host's address."""
    tap_or_skip().close()
    child = subprocess.Popen(
        [*as_a_user(tmp_path), sys.executable, "-c", OWN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdin
        assert child.stdout
        holder, namespace, name = child.stdout.readline().split()
        assert (namespace, name) == ("None", "kvmpriv0")
        inside = ["nsenter", "-t", holder, "-U", "-n", "--preserve-credentials"]
        command = (
            f"import socket; print(socket.create_server(({HOST_ADDRESS!r}, 7007)).getsockname())"
        )
        done = subprocess.run(
            [*inside, sys.executable, "-c", command], capture_output=True, text=True
        )
        assert done.stdout == f"('{HOST_ADDRESS}', 7007)\n", done.stderr
        for which in ("user", "net"):
            ours, theirs = (os.readlink(f"/proc/{pid}/ns/{which}") for pid in ("self", holder))
            assert ours != theirs
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "over\n"
        assert not Path("/proc", holder).exists()
        child.stdin.write("\n")
    assert child.returncode == 0


def test_the_network_of_a_killed_process_goes_with_it(tmp_path: Path) -> None:
    """A network in a user namespace ends with its process: it has no name that could remain."""
    tap_or_skip().close()
    command = [*as_a_user(tmp_path), sys.executable, "-c", OWN]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        holder = Path("/proc", child.stdout.readline().split()[0])
        assert holder.exists()
        child.kill()
    deadline = time.monotonic() + 10
    while holder.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not holder.exists()


def test_no_network_without_user_namespaces_either() -> None:
    """Without user namespaces the error names what is missing; the twin is the test before."""
    tap_or_skip().close()
    code = (
        "from kvmpriv.guest.linux.tap import Tap\n"
        "try:\n    Tap()\nexcept OSError as error:\n    print(repr(error))"
    )
    limit = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "-Ur", "sh", "-c", limit, "-", *WITHOUT_CAPABILITIES]
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == (
        "PermissionError(28, 'a network needs CAP_NET_ADMIN and CAP_SYS_ADMIN (root has them), or a"
        " user namespace, and that did not work: unshare(CLONE_NEWUSER | CLONE_NEWNET): No space"
        " left on device')\n"
    ), done.stderr


def test_no_such_bridge() -> None:
    tap_or_skip().close()
    with pytest.raises(OSError, match="there is no bridge nowhere"):
        Tap("nowhere")
    assert namespaces() == set()


def test_a_second_signal_while_the_guest_is_stopped(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that raises while `run` stops its threads does not keep the others running."""
    stop, raised = GuestThread.stop, []

    def interrupted(thread: GuestThread) -> None:
        stop(thread)
        raised.append(thread)
        raise KeyboardInterrupt

    def look() -> None:
        raise Interrupted(Outcome("off", 0, "enough"))

    monkeypatch.setattr(GuestThread, "stop", interrupted)
    before = set(threading.enumerate())
    with LinuxMachine(kvm, load_linux(kernel(SPIN)), plan(32 << 20), cpus=2) as machine:
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=30, look=look, every=0.1)
        assert len(raised) == 2
        assert set(threading.enumerate()) == before


def test_a_cpu_that_goes_away(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vCPU whose host CPU a cpuset takes away ends the run with that error, and does not hang."""

    def refuse(pid: int, cpus: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    image = load_linux(kernel(UP))
    with (
        LinuxMachine(kvm, image, plan(32 << 20), pin=[CPU]) as machine,
        pytest.raises(OSError, match="Invalid argument"),
    ):
        machine.run(timeout=30)


def test_what_the_host_sees_of_a_guest(kvm: Kvm) -> None:
    with LinuxMachine(kvm, load_linux(kernel(UP)), plan(32 << 20)) as machine:
        at = (16 << 20) + ENTRY
        assert machine.search(UP) == [at]
        machine.memory.write((32 << 20) - len(UP), UP)
        assert machine.search(UP) == [at, (32 << 20) - len(UP)]
        assert machine.search(b"nobody has written this") == []
        (use,) = machine.usage()
        assert use.range == machine.ranges[0]
        assert use.private == 0
        assert 4096 < use.resident <= 32 << 20


class Closed(Entropy):
    """A device that records whether it was closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


def test_devices_are_closed_when_there_is_no_machine(kvm: Kvm, no_leak: object) -> None:
    """The machine owns its devices from the call on, and closes them whatever argument is wrong."""
    image = load_linux(kernel(UP))
    for options, words in (
        ({"cpus": 0}, "1 to 254 vCPUs, not 0"),
        ({"cpus": 255}, "1 to 254 vCPUs, not 255"),
        ({"pin": [8999]}, "CPU 8999 is not available"),
        ({"pin": [CPU, CPU]}, "2 CPUs for 1 vCPU: list one"),
        ({"cmdline": "x" * 3000}, "command line"),
    ):
        device = Closed()
        with pytest.raises(ArgumentError, match=words):
            LinuxMachine(kvm, image, plan(32 << 20), devices=[device], **options)
        assert device.closed
    many = [Closed() for _ in range(10)]
    with pytest.raises(ArgumentError, match="up to 9 virtio devices, not 10"):
        LinuxMachine(kvm, image, plan(32 << 20), devices=many)
    assert all(device.closed for device in many)


@pytest.mark.parametrize("mistake", [("--net", "wifi"), ("--memory", "16M"), ("--disk", "none")])
def test_a_mistake_does_not_truncate_a_recording(
    image: Path, tmp_path: Path, mistake: tuple[str, str]
) -> None:
    path = tmp_path / "yesterday.trace"
    path.write_text("a recording")
    assert boot("--kernel", image, "--trace", path, *mistake).returncode == 2
    assert path.read_text() == "a recording"


def test_a_kernel_that_never_comes(tmp_path: Path) -> None:
    """The time limit covers a pipe that no process opens for writing."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = boot("--kernel", pipe, "--timeout", "0.5")
    assert (done.returncode, done.stdout) == (124, "")
    assert done.stderr == f"kvmpriv boot: {pipe}: not read to its end after 0.5 s\n"


@pytest.mark.usefixtures("kvm")
def test_little_memory(image: Path) -> None:
    """A kernel of a few KiB boots where 1 GiB of addresses could not be had."""
    command = [sys.executable, "-m", "kvmpriv", "boot", "--kernel", str(image)]
    command += ["--memory", "32M", "--timeout", "1"]
    limited = ["sh", "-c", 'ulimit -v 700000; exec "$@"', "-", *command]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (124, "up\n"), done.stderr


def test_a_recording_marks_the_start_of_init(kvm: Kvm, tmp_path: Path) -> None:
    """At the kernel's words, and once."""
    words = b"Run /init as init process\nRun /sbin/init as init process\n"
    code = bytes.fromhex("66baf803") + b"".join(b"\xb0%c\xee" % byte for byte in words)
    path = tmp_path / "run.trace"
    image = load_linux(kernel(code + bytes.fromhex("f4ebfd")))
    with LinuxMachine(kvm, image, plan(32 << 20)) as machine:
        machine.run(timeout=0.6, trace=path)
    marks = trace.summarize(trace.read(path)).marks
    assert [mark["mark"] for mark in marks] == ["/init runs"]


def test_a_recording_by_script(kvm: Kvm, tmp_path: Path) -> None:
    """The recording is complete and its file closed, also when `look` raises."""
    path = tmp_path / "run.trace"
    with LinuxMachine(kvm, load_linux(kernel(UP)), plan(32 << 20)) as machine:
        assert machine.run(timeout=0.6, trace=path).how == "timeout"
    found = trace.summarize(trace.read(path))
    assert found.exits["KVM_EXIT_IO"] == 3
    assert found.end is not None
    assert found.end["end"] == "timeout"
    assert len(found.samples) >= 2

    def look() -> None:
        raise RuntimeError("enough")

    with LinuxMachine(kvm, load_linux(kernel(UP)), plan(32 << 20)) as machine:
        with pytest.raises(RuntimeError, match="enough"):
            machine.run(timeout=5, trace=path, look=look)
        with pytest.raises(FileNotFoundError):
            machine.run(trace=tmp_path / "no" / "folder")
    end = trace.summarize(trace.read(path)).end
    assert end is not None
    assert (end["end"], end["why"]) == ("error", "RuntimeError: enough")


def test_a_run_ends_with_the_outcome_of_an_interruption(kvm: Kvm) -> None:
    mine = Outcome("mine", 3, "seen enough")

    def output(data: bytes) -> None:
        raise Interrupted(mine)

    with LinuxMachine(kvm, load_linux(kernel(UP)), plan(32 << 20), output=output) as machine:
        assert machine.run(timeout=10) == mine


def test_end_after_close_has_no_effect(kvm: Kvm) -> None:
    machine = LinuxMachine(kvm, load_linux(kernel(UP)), plan(32 << 20))
    machine.close()
    numbers = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(20)]
    machine.end(Outcome("mine", 0, ""))
    machine.reset()
    for number in numbers:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(number)
        os.close(number)


class Doubles(Device):
    """Reads as twice what was written."""

    value = 0
    closed = False

    def read(self, offset: int, size: int) -> int:
        return 2 * self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value

    def close(self) -> None:
        self.closed = True


def test_a_device_of_ones_own(kvm: Kvm) -> None:
    """A device answers accesses to its port and its memory, and is closed with its machine."""
    # mov $21, %al; mov $0x500, %dx; out; in; mov $0xe0000000, %ebx; mov %al, (%rbx);
    # mov (%rbx), %al; out %al, $0xf4
    code = "b015 66ba0005 ee ec bb000000e0 8803 8a03 e6f4"
    first, second = Doubles(), Doubles()
    with LinuxMachine(kvm, load_linux(kernel(bytes.fromhex(code))), plan(32 << 20)) as machine:
        machine.add_device(first, port=0x500, size=4)
        machine.add_device(second, mmio=0xE0000000, size=8)
        assert machine.run(timeout=20).status == 84
        assert machine.ports.ranges[-1] == (0x500, 4, "Doubles")
        with pytest.raises(RuntimeError, match="has been started: add devices before that"):
            machine.add_device(Doubles(), port=0x600, size=1)
        assert not first.closed
    assert first.closed
    assert second.closed


@pytest.mark.parametrize("raised", [True, False])
def test_the_interrupt_of_a_device(kvm: Kvm, raised: bool) -> None:
    """It arrives at the interrupt controller, which the guest reads until then."""
    # 1: mov $0xa, %al; out %al, $0x20; in $0x20, %al; test $1 << 5, %al; jz 1b; then exit with 42
    image = load_linux(kernel(bytes.fromhex("b00a e620 e420 a820 74f6 b02a e6f4")))
    device, without = Doubles(), Device()
    with LinuxMachine(kvm, image, plan(32 << 20)) as machine:
        machine.add_device(device, port=0x500, size=1, irq=5)
        machine.add_device(without, port=0x501, size=1)
        if raised:
            device.interrupt()
        outcome = machine.run(timeout=20 if raised else 0.3)
        assert (outcome.how, outcome.status) == (("exit", 42) if raised else ("timeout", 124))
        with pytest.raises(RuntimeError, match="the device Device has no interrupt line: add it"):
            without.interrupt()
    device.interrupt()
    assert without.read(0, 2) == 0xFFFF
    without.write(0, 1, 7)


def test_interrupt_lines(kvm: Kvm, no_leak: object) -> None:
    with LinuxMachine(kvm, load_linux(kernel(UP)), plan(32 << 20)) as machine:
        machine.add_device(Doubles(), port=0x500, size=1, irq=5)
        with pytest.raises(ArgumentError, match="irq 5 belongs to another device; free are 6, 7"):
            machine.add_device(Doubles(), port=0x510, size=1, irq=5)
        with pytest.raises(ArgumentError, match="irq 4 is not for devices of your own"):
            machine.add_device(Doubles(), port=0x510, size=1, irq=4)
        with pytest.raises(ArgumentError, match="overlaps"):
            machine.add_device(Doubles(), port=0x500, size=1, irq=6)
        machine.add_device(Doubles(), port=0x510, size=1, irq=6)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({}, "a device needs port and size, or mmio and size"),
        ({"port": 0x500}, "a device needs port and size, or mmio and size"),
        ({"port": 1, "mmio": 1, "size": 1}, "a device needs port and size, or mmio and size"),
        ({"port": 0x500, "size": 0}, "0 ports from 0x500 on: a device has at least 1"),
        ({"port": -1, "size": 4}, "4 ports from -0x1 on"),
        ({"port": 0xFFFF, "size": 2}, "2 ports from 0xffff on: a device has at least 1, all of"),
        (
            {"port": 0x3FF, "size": 2},
            "overlaps console (COM1) (0x3f8…0x3ff)",
        ),
        ({"port": 0x43, "size": 1}, "ports 0x43…0x43 overlap KVM's timer (0x40…0x43)"),
        ({"mmio": 1 << 52, "size": 1}, "1 addresses from 0x10000000000000 on"),
        (
            {"mmio": (32 << 20) - 1, "size": 2},
            "0x1ffffff…0x2000000 overlap RAM (RAM) (0x0",
        ),
        ({"mmio": 0xD0008FFF, "size": 1}, "overlap the virtio devices (0xd0000000…0xd0008fff)"),
        ({"mmio": 0xFEE00020, "size": 4}, "overlap the local APICs"),
    ],
)
def test_a_place_that_a_device_can_not_have(
    kvm: Kvm, no_leak: object, place: dict[str, int], words: str
) -> None:
    device = Doubles()
    with LinuxMachine(kvm, load_linux(kernel(UP)), plan(32 << 20)) as machine:
        before = [*machine.ports.ranges], [*machine.mmio.ranges]
        with pytest.raises(ArgumentError, match=re.escape(words)):
            machine.add_device(device, **place)
        assert ([*machine.ports.ranges], [*machine.mmio.ranges]) == before
    assert not device.closed, "it stays its caller's"


def first_run_fails(
    monkeypatch: pytest.MonkeyPatch,
    suberror: str,
    data: list[int],
    before: Callable[[Vcpu], object] = lambda _vcpu: None,
) -> None:
    """The first KVM_RUN ends with this internal error, after `before`; the later ones are KVM's."""
    run = Vcpu.run
    failed: list[Vcpu] = []

    def fail_once(vcpu: Vcpu) -> int:
        if failed:
            return run(vcpu)
        failed.append(vcpu)
        before(vcpu)
        internal = vcpu.kvm_run.internal
        vcpu.kvm_run.exit_reason = uapi.kvm.KVM_EXIT_INTERNAL_ERROR
        internal.suberror = getattr(uapi.kvm, f"KVM_INTERNAL_ERROR_{suberror}")
        internal.ndata = len(data)
        internal.data[0 : len(data)] = data
        return uapi.kvm.KVM_EXIT_INTERNAL_ERROR

    monkeypatch.setattr(Vcpu, "run", fail_once)


@pytest.mark.parametrize("event", ["", "exception", "interrupt", "nmi"])
def test_an_event_that_kvm_reports(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, event: str) -> None:
    """The report of a delivery that failed ends the guest, if there is an event to deliver."""

    def put_event(vcpu: Vcpu) -> None:
        if event:
            events = vcpu.get_vcpu_events()
            getattr(events, event).injected = 1
            events.exception.nr = 14
            vcpu.set_vcpu_events(events)

    first_run_fails(monkeypatch, "DELIVERY_EV", [], put_event)
    image = load_linux(kernel(bytes.fromhex("b005 e6f4")))  # mov $5, %al; out %al, $0xf4
    with LinuxMachine(kvm, image, plan(32 << 20)) as machine:
        outcome = machine.run(timeout=20)
    if event:
        assert outcome.how == "crash"
        assert "DELIVERY_EV" in outcome.why
    else:
        assert (outcome.how, outcome.status) == ("exit", 5)


@pytest.mark.parametrize(
    ("suberror", "data", "goes_on"),
    [
        ("EMULATION", [0, 0x72, 0, 0, 0xB0E, 0], True),  # as Linux 7.3 reports it
        ("EMULATION", [0, 0x72], True),
        ("EMULATION", [0], False),
        ("EMULATION", [0, 0x73], False),  # another exit of the guest
        ("EMULATION", [1, 0x72], False),  # the words after a flag are the instruction
        ("SIMUL_EX", [0, 0x72], False),
    ],
)
def test_a_cpuid_that_kvm_can_not_skip(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, suberror: str, data: list[int], goes_on: bool
) -> None:
    """The guest goes on behind the instruction, whose result it has; any other one is a crash."""
    first_run_fails(monkeypatch, suberror, data)
    # ud2 in the place of the CPUID; mov $5, %al; out %al, $0xf4
    image = load_linux(kernel(bytes.fromhex("0f0b b005 e6f4")))
    with LinuxMachine(kvm, image, plan(32 << 20)) as machine:
        outcome = machine.run(timeout=20)
    if goes_on:
        assert (outcome.how, outcome.status) == ("exit", 5)
    else:
        assert outcome.how == "crash"
        assert suberror in outcome.why


@pytest.mark.parametrize("readonly", [True, False])
def test_registers_that_cost_no_exit(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, readonly: bool
) -> None:
    """A driver that was interrupted reads why, acknowledges it and notifies the device again."""

    class Plain(Vm):
        def map(self, *arguments: Any, flags: int = 0, **options: Any) -> Slot:
            if flags & uapi.kvm.KVM_MEM_READONLY:
                raise OSError(errno.EINVAL, "no such memory")
            return super().map(*arguments, flags=flags, **options)

    if not readonly:
        monkeypatch.setattr("kvmpriv.kvm.Vm", Plain)
    # mov $0xd0000000, %ebx; mov $4, %eax; mov %eax, 0x70(%rbx) (status: DRIVER_OK);
    # mov 0x60(%rbx), %eax; mov %eax, 0x64(%rbx); xor %ecx, %ecx; mov %ecx, 0x50(%rbx);
    # mov (%rbx), %ecx; add %cl, %al; out %al, $0xf4
    code = "bb000000d0 b804000000 894370 8b4360 894364 31c9 894b50 8b0b 00c8 e6f4"
    image = load_linux(kernel(bytes.fromhex(code)))
    with LinuxMachine(kvm, image, plan(32 << 20), devices=[Entropy()]) as machine:
        outcome = machine.run(timeout=20)
        kinds = machine.cost().kinds
    # Without the page the device is asked: no requests were returned.
    assert outcome.status == readonly + ord("v"), "the first byte of the magic"
    assert kinds == {"KVM_EXIT_MMIO": 1 if readonly else 4, "KVM_EXIT_IO": 1}


def test_virtio_devices_of_ones_own(kvm: Kvm, no_leak: object) -> None:
    """They are as those of the constructor: tables, addresses, closed in the end."""
    image = load_linux(kernel(UP))
    made = [Closed() for _ in range(9)]
    with LinuxMachine(kvm, image, plan(32 << 20), devices=[Closed()] * 3) as machine:
        wanted = machine.memory.read(boot_protocol.TABLES, 0x1000)
    with LinuxMachine(kvm, image, plan(32 << 20), devices=made[:1]) as machine:
        for device in made[1:3]:
            machine.add_device(device)
        assert machine.memory.read(boot_protocol.TABLES, 0x1000) == wanted
        for device in made[3:]:
            machine.add_device(device)
        assert [each.start for each in machine.mmio.ranges] == [
            0xD0000000 + 0x1000 * number for number in range(9)
        ]
        with pytest.raises(ArgumentError, match="up to 9 virtio devices"):
            machine.add_device(Closed())
        with pytest.raises(ArgumentError, match="the machine chooses them"):
            machine.add_device(Closed(), port=0x500)
        assert machine.run(timeout=0.2).how == "timeout"
        assert not any(device.closed for device in made)
    assert all(device.closed for device in made)


def test_bounce_buffers_of_a_device_that_is_added(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line has room for them; one that gets too long for the kernel is refused."""
    monkeypatch.setattr(
        "kvmpriv.guest.linux.machine.private_cmdline", lambda ranges, bounced: f"bounced={bounced}"
    )
    image = load_linux(kernel(UP))
    with LinuxMachine(kvm, image, plan(32 << 20), cmdline="end") as machine:
        assert machine.cmdline.endswith(" bounced=0 end")
        device = Closed()
        device.bounced = 12345
        machine.add_device(device)
        assert machine.cmdline.endswith(" bounced=12345 end")
        assert machine.search(b" bounced=12345 end\0")
        other = Closed()
        other.bounced = 10**3000
        with pytest.raises(ArgumentError, match="the command line has"):
            machine.add_device(other)
        assert len(machine.mmio.ranges) == 1


def test_a_device_that_raises(kvm: Kvm) -> None:
    """The guest ends, and the caller of `run` gets the exception."""

    class Broken:
        def read(self, offset: int, size: int) -> int:
            raise RuntimeError("the device is broken")

        def write(self, offset: int, size: int, value: int) -> None:
            raise NotImplementedError

    # mov $0x500, %dx; in; hlt
    code = bytes.fromhex("66ba0005 ec f4")
    with LinuxMachine(kvm, load_linux(kernel(code)), plan(32 << 20)) as machine:
        machine.ports.add(Broken(), 0x500, 1)
        with pytest.raises(RuntimeError, match="the device is broken"):
            machine.run(timeout=20)


def test_a_virtio_console(kvm: Kvm) -> None:
    """Its words are on the command line, it takes a device's place, and a mistake is reported."""
    image = load_linux(kernel(UP))
    with LinuxMachine(kvm, image, plan(32 << 20), console="virtio", cmdline="quiet x") as machine:
        assert machine.cmdline == "quiet earlycon=uart8250,io,0x3f8 console=hvc0 panic=-1 quiet x"
        assert machine.mmio.ranges == [(0xD0000000, 0x200, "console (hvc0)")]
        printed: list[bytes] = []
        machine._supervisor._output = printed.append
        assert machine.run(timeout=0.5).how == "timeout"
        assert b"".join(printed) == b"up\n", "ttyS0 is there, too"
    with LinuxMachine(kvm, image, plan(32 << 20), console="virtio", cmdline="x") as machine:
        assert machine.cmdline == "earlycon=uart8250,io,0x3f8 console=hvc0 panic=-1 x"
    with pytest.raises(ArgumentError, match="up to 8 virtio devices, not 9"):
        LinuxMachine(kvm, image, plan(32 << 20), console="virtio", devices=[Closed()] * 9)
    with pytest.raises(ArgumentError, match="console must be 'serial' or 'virtio', not 'vga'"):
        LinuxMachine(kvm, image, plan(32 << 20), console="vga")
