"""A side of linux.py: a guest that a program talks to, by its agent or on its serial port.

Usage: talk_guest.py KERNEL agent|serial MEMORY COUNT

Prints when the machine was begun and when the agent answered, and how long the command `true` took
each time, in seconds.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from pathlib import Path

from kvmpriv import Kvm
from kvmpriv.guest.linux import LinuxGuest, LinuxMachine, Outcome, initrd, load_linux, plan

# The answer is put together by the shell: the echo of the command is no answer.
COMMAND, ANSWER = b"true; echo do''ne $?\n", b"done 0"


def say(word: str, seconds: float) -> None:
    os.write(1, f"{word} {seconds:.6f}\n".encode())


def by_agent(kernel: str, memory: int, count: int) -> None:
    say("created", time.monotonic())
    with LinuxGuest(load_linux(Path(kernel).read_bytes()), memory=memory) as guest:
        say("ready", time.monotonic())
        for _ in range(count):
            began = time.monotonic()
            guest.run(["true"], check=True)
            say("true", time.monotonic() - began)


def by_serial(kernel: str, memory: int, count: int) -> None:
    printed: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    root = initrd.busybox("exec setsid cttyhack sh </dev/ttyS0 >/dev/ttyS0 2>&1")

    def wait(what: bytes) -> None:
        seen = b""
        while what not in seen:
            seen += printed.get(timeout=60)

    with (
        Kvm() as kvm,
        LinuxMachine(
            kvm,
            load_linux(Path(kernel).read_bytes()),
            plan(memory),
            initrd=root,
            cmdline="quiet",
            output=printed.put,
        ) as machine,
    ):
        thread = threading.Thread(target=machine.run)
        thread.start()
        wait(b"# ")
        for _ in range(count):
            began = time.monotonic()
            machine.console.receive(COMMAND)
            wait(ANSWER)
            say("true", time.monotonic() - began)
            wait(b"# ")
        machine.end(Outcome("off", 0, "measured"))
        thread.join()


def main(kernel: str, kind: str, memory: str, count: str) -> None:
    (by_agent if kind == "agent" else by_serial)(kernel, int(memory), int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])
