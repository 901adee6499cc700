"""The thread that serves the devices' queues, so that no vCPU has to stop for them."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

from .virtio import Transport

__all__ = ["IoThread"]


class IoThread(threading.Thread):
    """Serves queues as their eventfds say, and devices as their descriptors of the host's do.

    `failed` is given what ends it before `stop` does.
    """

    def __init__(self, failed: Callable[[BaseException], object]) -> None:
        super().__init__(name="virtio", daemon=True)
        self._failed = failed
        self._queues: dict[int, tuple[Transport, int]] = {}
        self._stopping = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def add(self, fd: int, transport: Transport, number: int) -> None:
        """Serve queue `number` whenever the eventfd `fd` is written to."""
        self._queues[fd] = (transport, number)

    def run(self) -> None:
        """What the thread does; `start` calls it."""
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001  # whoever waits for the guest raises it
            self._failed(error)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._stopping, select.POLLIN)
        for fd in self._queues:
            poll.register(fd, select.POLLIN)
        transports = {transport for transport, _ in self._queues.values()}
        listening: dict[int, Transport] = {}
        while True:
            wanted = {
                fd: transport for transport in transports if (fd := transport.device.host_fd()) >= 0
            }
            for fd in listening.keys() - wanted.keys():
                poll.unregister(fd)
            for fd in wanted.keys() - listening.keys():
                poll.register(fd, select.POLLIN)
            listening = wanted
            for fd, _ in poll.poll():
                if fd == self._stopping:
                    return
                if fd in self._queues:
                    with suppress(BlockingIOError):
                        os.eventfd_read(fd)
                    transport, number = self._queues[fd]
                    transport.serve(number)
                else:
                    listening[fd].serve(0)

    def stop(self) -> None:
        """End the thread and wait for it."""
        os.eventfd_write(self._stopping, 1)
        if self.ident is not None:
            self.join()

    def close(self) -> None:
        os.close(self._stopping)
