"""The thread that serves the queues of virtio devices, while the vCPUs run on."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from .pause import Gate
from .virtio import Transport

__all__ = ["IoThread"]


class IoThread(threading.Thread):
    """Serves a queue when its eventfd is written to or its device's descriptor is readable.

    `failed` is called with the exception if one ends the thread.  While `gate` is closed, a kick
    makes it wait.
    """

    def __init__(self, failed: Callable[[BaseException], object], gate: Gate) -> None:
        super().__init__(name="virtio", daemon=True)
        self._failed = failed
        self._gate = gate
        self._queues: dict[int, tuple[Transport, int]] = {}
        self._watched: dict[int, Callable[[], object]] = {}
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        #: CPU time that the thread has used in all, in seconds; 0 until it has ended.
        self.seconds: float = 0.0

    def add(self, fd: int, transport: Transport, number: int) -> None:
        """Serve queue `number` when the eventfd `fd` is written to.  Call it before `start`."""
        self._queues[fd] = (transport, number)

    def watch(self, fd: int, ready: Callable[[], object]) -> None:
        """Call `ready` when `fd` is readable.  Call this before `start`."""
        self._watched[fd] = ready

    def run(self) -> None:
        """Serve queues until `stop`; the thread that `start` starts calls it."""
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001  # the caller of LinuxMachine.run gets it
            self._failed(error)
        self.seconds = time.thread_time()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for fd in (*self._queues, *self._watched):
            poll.register(fd, select.POLLIN)
        transports = {transport for transport, _ in self._queues.values()}
        listening: dict[int, Transport] = {}
        engaged: set[Transport] = set()
        passed_on: set[int] = set()  # to the host's kernel, which waits for these, and reads none
        while True:
            self._gate.enter()
            if self._stopping:
                return
            wanted = {fd: transport for transport in transports if (fd := transport.host_fd()) >= 0}
            for fd in listening.keys() - wanted.keys():
                poll.unregister(fd)
            for fd in wanted.keys() - listening.keys():
                poll.register(fd, select.POLLIN)
            listening = wanted
            now = {transport for transport in transports if transport.engaged}
            if now != engaged:
                for fd, (transport, number) in self._queues.items():
                    if fd not in passed_on and transport.path_serves(number):
                        poll.unregister(fd)
                        passed_on.add(fd)
                    elif fd in passed_on and not transport.path_serves(number):
                        poll.register(fd, select.POLLIN)
                        passed_on.remove(fd)
                engaged = now
            for fd, _ in poll.poll():
                if fd == self._wake:
                    os.eventfd_read(fd)
                elif self._stopping or self._gate.closed:
                    break  # what is ready is so when the gate is open
                elif fd in self._queues:
                    with suppress(BlockingIOError):
                        os.eventfd_read(fd)
                    transport, number = self._queues[fd]
                    transport.serve(number)
                elif fd in self._watched:
                    self._watched[fd]()
                else:
                    listening[fd].host_ready()

    def kick(self) -> None:
        """Let the thread see that the gate is closed, or that it is to end."""
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End the thread and wait for it; without effect if it never started."""
        self._stopping = True
        self.kick()
        if self.ident is not None:
            self.join()

    def close(self) -> None:
        """Close the thread's own descriptor."""
        os.close(self._wake)
