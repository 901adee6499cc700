"""Linux brought up by kvmpriv and by QEMU, run inside a kernel of ours; prints JSON for run.py.

Usage: launch.py bench.linux KERNEL [--quick]

Each side is a process that is given the same kernel, root file system and memory, and whose
standard output is the guest's console: QEMU, and linux_guest.py.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from pyroute2 import netns

from kvmpriv.guest.linux import initrd
from kvmpriv.guest.linux.machine import CONSOLES
from kvmpriv.guest.linux.tap import GUEST_ADDRESS, HOST_ADDRESS, Tap

from .run import alternate

if TYPE_CHECKING:
    from collections.abc import Iterator

GUEST = Path(__file__).with_name("linux_guest.py").resolve()
TALK_GUEST = GUEST.with_name("talk_guest.py")
MIB = 1 << 20
MEMORY = 256 * MIB
OUTPUT = 32 << 10  # bytes that the guest prints
SENT = 16 * MIB  # bytes through the network, each way
DISK = 64 * MIB  # bytes from the disk, and to it
PORT = 7000
PATIENCE = 300  # seconds for a guest to come to the next sign, or for a command in it
#: QEMU's sides -> their console.
QEMU = {"qemu": "serial", "qemu-virtio": "virtio"}
#: What is measured of the devices, in MiB/s.
RATES = ("down", "up", "read", "write")
# printf and not what is printed: an echo of the command is no sign.
INIT = f"""
printf 'at%s\\n' -init >/dev/console
cat /output >/dev/console
printf 'the%s\\n' -end >/dev/console
if grep -q bench.net /proc/cmdline; then
    ifconfig eth0 {GUEST_ADDRESS} netmask 255.255.255.0 up
    nc {HOST_ADDRESS} {PORT} </dev/null >/tmp/file
    nc {HOST_ADDRESS} {PORT} </tmp/file
    printf 'over%s\\n' -net >/dev/console
fi
if grep -q bench.disk /proc/cmdline; then
    printf 'read%s\\n' -begins >/dev/console
    dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null
    printf 'read%s\\n' -ends >/dev/console
    dd if=/dev/zero of=/dev/vda bs=1M count={DISK // MIB} conv=fsync 2>/dev/null
    printf 'write%s\\n' -ends >/dev/console
fi
sleep 10000"""


class Booted(NamedTuple):
    """Seconds, and bytes of memory that are not the guest's."""

    start: float  # of the interpreter, before there is a VM
    init: float
    serial: float
    memory: int


class Devices(NamedTuple):
    """What a guest has besides its console."""

    tap: Tap | None = None
    vhost: bool = False
    disk: Path | None = None


class Bench:
    """What the sides share."""

    def __init__(self, kernel: Path, folder: Path) -> None:
        self.kernel, self.initrd = kernel, folder / "initrd"
        self._disk = folder / "disk"
        files = {"output": b"x" * (OUTPUT - 1) + b"\n"}
        self.initrd.write_bytes(initrd.busybox(INIT, files))

    def _ours(self, words: str, kind: str, devices: Devices) -> list[str]:
        fd = devices.tap.fileno() if devices.tap else -1
        arguments = [GUEST, self.kernel, self.initrd, words, kind, fd, MEMORY]
        arguments += [int(devices.vhost), devices.disk or ""]
        return [sys.executable, *map(str, arguments)]

    def _qemu(self, words: str, devices: Devices, console: str) -> list[str]:
        # Its ACPI tables have the serial port only for kernels with PNP, and ours has none.
        command = ["qemu-system-x86_64", "-M", "microvm,accel=kvm,acpi=off", "-cpu", "host"]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        if console == "virtio":
            command += ["-serial", "null", "-chardev", "stdio,id=console"]
            command += ["-device", "virtio-serial-device", "-device", "virtconsole,chardev=console"]
        else:
            command += ["-serial", "stdio"]
        command += ["-m", f"{MEMORY // MIB}M", "-kernel", str(self.kernel)]
        command += ["-initrd", str(self.initrd), "-append", f"{CONSOLES[console]} quiet {words}"]
        if devices.tap:
            vhost = "on" if devices.vhost else "off"
            command += ["-netdev", f"tap,id=net,fd={devices.tap.fileno()},vhost={vhost}"]
            command += ["-device", "virtio-net-device,netdev=net"]
        if devices.disk:
            command += ["-drive", f"file={devices.disk},format=raw,if=none,id=disk"]
            command += ["-device", "virtio-blk-device,drive=disk"]
        return command

    @contextmanager
    def _started(self, kind: str, words: str, devices: Devices | None = None) -> Iterator[Console]:
        """A guest; kind: "shared", "private" or "virtio" (its console), or one of QEMU."""
        devices = devices or Devices()
        if kind in QEMU:
            command = self._qemu(words, devices, QEMU[kind])
        else:
            command = self._ours(words, kind, devices)
        tap = devices.tap
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=[tap.fileno()] if tap else [],
        )
        try:
            yield Console(process, began)
        finally:
            process.kill()
            process.wait()

    def boot(self, kind: str) -> Booted:
        with self._started(kind, "") as console:
            theirs = kind in QEMU
            start = 0.0 if theirs else float(console.wait(b"created ", b"\n")[0])
            _, init = console.wait(b"at-init", b"\n")
            _, end = console.wait(b"the-end", b"\n")
            beyond = memory_beyond_ram(console.process.pid)
        began = console.began if theirs else start
        return Booted(began - console.began, init - began, end - init, beyond)

    def boot_to_init(self, kind: str) -> float:
        """Seconds from the VM to the guest's init; kind: "shared" or "private"."""
        with self._started(kind, "") as console:
            created = float(console.wait(b"created ", b"\n")[0])
            return console.wait(b"at-init", b"\n")[1] - created

    def boot_to_ready(self) -> float:
        """Seconds from the VM to the agent's answer."""
        return self._talk("agent", 0)["ready"][0]

    def commands(self, kind: str, count: int = 10) -> float:
        """Seconds for the command `true` (median); kind: "agent" or "serial"."""
        return median(self._talk(kind, count)["true"])

    def _talk(self, kind: str, count: int) -> dict[str, list[float]]:
        arguments = (TALK_GUEST, self.kernel, kind, MEMORY, count)
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=PATIENCE,
        )
        found: dict[str, list[float]] = {}
        for line in done.stdout.splitlines():
            word, seconds = line.split()
            found.setdefault(word, []).append(float(seconds))
        if "ready" in found:
            found["ready"][0] -= found["created"][0]
        return found

    def devices(self, kind: str, *, vhost: bool = False, disk: bool = False) -> dict[str, Any]:
        """SENT bytes through the network, each way; with `disk`, DISK bytes from it and to it.

        RATES, and whether all bytes came back.
        """
        data = random.Random(7).randbytes(SENT)  # noqa: S311  # no secret
        found: dict[str, Any] = {}
        words = "bench.net"
        if disk:
            words += " bench.disk"
            self._disk.write_bytes(random.Random(8).randbytes(DISK))  # noqa: S311
        with Tap() as tap:
            assert tap.namespace is not None
            ready = threading.Event()
            arguments = (tap.namespace, data, found, ready)
            server = threading.Thread(target=serve, args=arguments, daemon=True)
            server.start()
            ready.wait()
            devices = Devices(tap, vhost, self._disk if disk else None)
            with self._started(kind, words, devices) as console:
                console.wait(b"over-net", b"\n")
                server.join(30)
                if disk:
                    times = [
                        console.wait(sign, b"\n")[1]
                        for sign in (b"read-begins", b"read-ends", b"write-ends")
                    ]
                    for way, began, ended in zip(RATES[2:], times, times[1:], strict=True):
                        found[way] = DISK / MIB / (ended - began)
        if disk:
            found["same"] &= not any(self._disk.read_bytes())
        return found


class Console:
    """What a guest prints, and when it came."""

    def __init__(self, process: subprocess.Popen[bytes], began: float) -> None:
        self.process, self.began = process, began
        self._heard = b""
        self.at = began

    def wait(self, sign: bytes, end: bytes) -> tuple[str, float]:
        """Until `sign` and then `end`; what is between them, and the time.

        SystemExit if the guest ends before that, or PATIENCE is over.
        """
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while True:
            at = self._heard.find(sign)
            until = self._heard.find(end, at) if at >= 0 else -1
            if until >= 0:
                between = self._heard[at + len(sign) : until]
                self._heard = self._heard[until:]
                return between.decode(), self.at
            left = max(0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise SystemExit(f"no {sign.decode()!r} within {PATIENCE} s: {self._said()}")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            self.at = time.monotonic()
            if not data:
                raise SystemExit(f"a guest ended before {sign.decode()!r}: {self._said()}")
            self._heard += data

    def _said(self) -> str:
        return self._heard[-2000:].decode(errors="replace")


def memory_beyond_ram(pid: int) -> int:
    """Resident bytes of all mappings but the guest's RAM."""
    total, size = 0, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Size":
            size = int(value.split()[0]) << 10
        elif name == "Rss" and size < MEMORY // 2:
            total += int(value.split()[0]) << 10
    return total


def serve(namespace: str, data: bytes, found: dict[str, Any], ready: threading.Event) -> None:
    """Send `data` to who comes first, and take what the second one sends."""
    netns.setns(namespace)  # of this thread
    with socket.create_server((HOST_ADDRESS, PORT)) as server:
        ready.set()
        peer, _ = server.accept()
        with peer:
            began = time.monotonic()
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
        peer, _ = server.accept()  # it has all, and has gone
        found["down"] = len(data) / MIB / (time.monotonic() - began)
        with peer:
            began = time.monotonic()
            back = b"".join(iter(lambda: peer.recv(1 << 16), b""))
            found["up"] = len(back) / MIB / (time.monotonic() - began)
        found["same"] = back == data


def main(arguments: list[str]) -> None:
    """Measure, and print JSON."""
    kernel, *options = arguments
    count, few = (2, 2) if "--quick" in options else (5, 3)  # few: QEMU's serial port is slow
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(kernel), Path(folder))

        found = {
            "qemu": alternate(lambda: bench.boot("shared"), lambda: bench.boot("qemu"), count),
            "console": [
                alternate(partial(bench.boot, "virtio"), partial(bench.boot, other), few)
                for other in QEMU
            ],
            "private": alternate(
                lambda: bench.boot_to_init("private"), lambda: bench.boot_to_init("shared"), count
            ),
            "ready": alternate(bench.boot_to_ready, lambda: bench.boot_to_init("shared"), count),
            "commands": alternate(
                lambda: bench.commands("agent"), lambda: bench.commands("serial"), count
            ),
            "devices": alternate(
                partial(bench.devices, "shared", disk=True),
                partial(bench.devices, "qemu", disk=True),
                count,
            ),
            "vhost": alternate(
                partial(bench.devices, "shared", vhost=True),
                partial(bench.devices, "qemu", vhost=True),
                count,
            ),
            "private network": {
                name: bench.devices("private", vhost=vhost)
                for name, vhost in (("vhost", True), ("without", False))
            },
        }
    json.dump(found, sys.stdout)
