"""Runs in a VM: a guest's network by vhost-net, by this process, and by vhost-net that fails."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyroute2 import netns

from kvmpriv import Kvm, private, trace
from kvmpriv.guest.linux import LinuxImage, LinuxMachine, load_linux, plan
from kvmpriv.guest.linux.net import Net
from kvmpriv.guest.linux.tap import HOST_ADDRESS, Tap
from kvmpriv.guest.linux.vhost import VhostNet

SIZE = 1 << 20
PIECE = 1 << 16


def threads() -> list[str]:
    """The threads of vhost for this process: of the process itself since Linux 6.4."""
    name = f"vhost-{os.getpid()}"
    found = [*Path("/proc").glob("[0-9]*/comm"), *Path("/proc/self/task").glob("*/comm")]
    names = []
    for path in found:
        try:
            names.append(path.read_text().strip())
        except OSError:  # it has ended
            continue
    return [each for each in names if each == name]


def packets() -> list[str]:
    """What the tap of this thread's network namespace has counted, both ways."""
    cards = Path("/proc/thread-self/net/dev").read_text()
    (counts,) = (line.split() for line in cards.splitlines() if "kvmpriv" in line)
    return counts[1:]


def receive(peer: socket.socket) -> bytes:
    return b"".join(iter(lambda: peer.recv(PIECE), b""))


def serve(
    namespace: str, data: bytes, result: dict[str, Any], interrupt: Callable[[], dict[str, Any]]
) -> None:
    """Send `data` over one connection and receive it over the next, twice."""
    netns.setns(namespace)  # of this thread
    with socket.create_server((HOST_ADDRESS, 7000)) as server:
        for turn in range(2):
            peer, _ = server.accept()
            with peer:
                for at in range(0, len(data), PIECE):
                    peer.sendall(data[at : at + PIECE])
                    if turn == 0 and at == SIZE // 2:
                        result |= interrupt()
                peer.shutdown(socket.SHUT_WR)
                peer.recv(1)  # until it has all and goes
            peer, _ = server.accept()
            with peer:
                result.setdefault("same", []).append(receive(peer) == data)


def boot(
    kvm: Kvm, image: LinuxImage, folder: Path, wanted: str, vhost: bool | None, name: str
) -> dict[str, Any]:
    """Boot one guest; `vhost` is as for `Net`."""
    data = random.Random(7).randbytes(SIZE)
    result: dict[str, Any] = {}
    words: list[str] = []
    with Tap() as tap:
        assert tap.namespace is not None
        abi = private.choose(kvm) if wanted == "private" else None
        recording = folder / f"{name}.trace"
        with LinuxMachine(
            kvm,
            image,
            plan(256 << 20, private=abi is not None),
            initrd=(folder / "vhost.cpio").read_bytes(),
            cmdline="quiet",
            cpus=2,
            abi=abi,
            devices=[Net(tap, words.append, vhost=vhost)],
            complain=words.append,
            output=sys.stderr.buffer.write,
        ) as machine:

            def interrupt() -> dict[str, Any]:
                (transport,) = machine._transports
                status = transport.read(0x60, 4)
                seen = threads()
                machine.pause()
                first = packets()
                time.sleep(0.5)
                still = packets() == first
                engaged = transport.engaged
                machine.resume()
                return {
                    "status": status,
                    "threads": seen,
                    "still": still,
                    "engaged_in_pause": engaged,
                    "engaged": transport.engaged,
                }

            arguments = (tap.namespace, data, result, interrupt)
            server = threading.Thread(target=serve, args=arguments, daemon=True)
            server.start()
            outcome = machine.run(timeout=240, trace=recording)
            result["said"] = machine.said
            result["kinds"] = machine.cost().kinds
            result["after_run"] = machine._transports[0].engaged
        server.join(5)
    read = trace.read(recording)
    result |= {
        "outcome": outcome._asdict(),
        "words": words,
        "marks": [event["mark"] for event in read.events if "mark" in event],
        "devices": [device["name"] for device in read.about["devices"]],
    }
    return result


def main(folder: Path, kernel: Path, wanted: str) -> None:
    image = load_linux(kernel.read_bytes())
    results: dict[str, Any] = {}
    real = VhostNet.set_backend

    def fails(self: VhostNet, index: int, tap: int) -> None:
        if index == 1 and tap >= 0:
            raise OSError(errno.EPERM, "VHOST_NET_SET_BACKEND: Operation not permitted")
        real(self, index, tap)

    with Kvm() as kvm:
        for name, vhost in {"kernel": True, "process": False, "refused": None}.items():
            if name == "refused":
                VhostNet.set_backend = fails  # type: ignore[method-assign]
            before = len(os.listdir("/proc/self/fd"))
            results[name] = result = boot(kvm, image, folder, wanted, vhost, name)
            gc.collect()
            result["fds_left"] = len(os.listdir("/proc/self/fd")) - before
            result["threads_left"] = threads()
    (folder / "vhost.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
