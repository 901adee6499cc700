"""Runs in a VM: a Linux guest with a network, and TCP in both directions, compared byte by byte."""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
import time
from pathlib import Path

from pyroute2 import netns

from kvmpriv import Kvm, private
from kvmpriv.guest.linux import LinuxMachine, load_linux, plan
from kvmpriv.guest.linux.net import Net
from kvmpriv.guest.linux.tap import HOST_ADDRESS, Tap

SIZE = 4 << 20


def received() -> tuple[int, int]:
    """What the tap of this network namespace has received from the guest: bytes, packets."""
    cards = Path("/proc/thread-self/net/dev").read_text()
    (counts,) = (line.split() for line in cards.splitlines() if "kvmpriv" in line)
    return int(counts[1]), int(counts[2])


def serve(namespace: str, data: bytes, result: dict[str, object]) -> None:
    """Send `data` over the first connection; return what the second connection sends."""
    netns.setns(namespace)  # of this thread
    with socket.create_server((HOST_ADDRESS, 7000)) as server:
        peer, _ = server.accept()
        with peer:
            started = time.monotonic()
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)  # until it has all and goes
            result["down_seconds"] = time.monotonic() - started
        before = received()
        peer, _ = server.accept()
        with peer:
            started = time.monotonic()
            back = b"".join(iter(lambda: peer.recv(1 << 16), b""))
            result["up_seconds"] = time.monotonic() - started
    after = received()
    result["bytes_up"], result["packets_up"] = (
        end - at for at, end in zip(before, after, strict=True)
    )
    result["size"] = len(back)
    result["same"] = back == data


def main(folder: Path, kernel: Path, wanted: str) -> None:
    data = random.Random(7).randbytes(SIZE)
    result: dict[str, object] = {}
    words: list[str] = []
    with Kvm() as kvm, Tap() as tap:
        assert tap.namespace is not None
        server = threading.Thread(target=serve, args=(tap.namespace, data, result), daemon=True)
        server.start()
        abi = private.choose(kvm) if wanted == "private" else None
        with LinuxMachine(
            kvm,
            load_linux(kernel.read_bytes()),
            plan(256 << 20, private=abi is not None),
            initrd=(folder / "net.cpio").read_bytes(),
            cmdline="quiet",
            cpus=2,
            abi=abi,
            devices=[Net(tap, words.append, vhost=False)],
            complain=words.append,
            output=sys.stderr.buffer.write,
        ) as machine:
            outcome = machine.run(timeout=400)
        server.join(5)
    result |= {"outcome": outcome._asdict(), "words": words, "said": machine.said}
    (folder / "net.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
