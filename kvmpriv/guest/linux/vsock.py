"""A vsock device for a Linux guest, and the connection that a program in the guest makes over it.

VIRTIO 1.2, 5.10.  The host's kernel moves the packets (/dev/vhost-vsock), and this process has a
socket of AF_VSOCK: vsock(7).
"""

from __future__ import annotations

import errno as _errno
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress

from ...fd import Fd
from .vhost import VSOCK_DEVICE, VhostVsockPath
from .virtio import EVENT_INDEX, INDIRECT, DataPath, Queue, VirtioDevice

__all__ = ["GUEST_PORT", "Listener", "Vsock"]

#: The port that the program in the guest connects from.  A guest's kernel gives it to root only.
GUEST_PORT = 1023
_EVENTS = 2  # the queue that the host's kernel does not serve
_PIECE = 128 << 10


class Listener:
    """Takes one connection to the socket `server`, from the address `peer`: a stream of bytes.

    Other connections are closed at once.  After the guest's one the listener is closed.
    `received` is called with the bytes that have come, and `ended` at the connection's end, both in
    the thread that calls `ready`; they must not block or raise.  `server` belongs to the listener,
    also if this raises an exception.
    """

    def __init__(
        self,
        server: socket.socket,
        peer: tuple[str | int, int],
        received: Callable[[bytes], object],
        ended: Callable[[], object] = lambda: None,
    ) -> None:
        self._peer = peer
        self._received = received
        self._ended = ended
        self._lock = threading.RLock()  # a signal handler may send something
        self._outgoing: deque[memoryview] = deque()
        self._server: socket.socket | None = server
        self._connection: socket.socket | None = None
        self._writes = False  # whether it waits for room to send
        self._over = False
        with ExitStack() as stack:
            stack.callback(server.close)
            server.settimeout(0)
            self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            stack.callback(self._wake.close)
            self._epoll = select.epoll()
            stack.callback(self._epoll.close)
            for each in (self._wake, server):
                self._epoll.register(each.fileno(), select.EPOLLIN)
            stack.pop_all()

    @property
    def connected(self) -> bool:
        """Whether there is the connection."""
        return self._connection is not None

    def fileno(self) -> int:
        """A descriptor that is readable when `ready` is to be called."""
        return self._epoll.fileno()

    def send(self, data: bytes) -> None:
        """Send `data` once there is a connection, or drop it after its end; from any thread."""
        with self._lock:
            if not self._over:
                self._outgoing.append(memoryview(data))
                self._alert()

    def stop(self) -> None:
        """End the connection, and take none any more, from any thread.

        The thread that calls `ready` does it, soon.
        """
        with self._lock:
            self._over = True
            self._alert()

    def _alert(self) -> None:
        if not self._wake.closed:
            os.eventfd_write(self._wake.fileno(), 1)

    def ready(self) -> None:
        """Do what is to be done; one thread calls it."""
        for fd, events in self._epoll.poll(0):
            if fd == self._wake.fileno():
                with suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif self._over:
                continue
            elif self._server is not None and fd == self._server.fileno():
                self._accept(self._server)
            elif self._connection is not None and events & ~select.EPOLLOUT:
                self._read(self._connection)
        if self._connection is not None and not self._over:
            self._write(self._connection)
        if self._over and (self._server is not None or self._connection is not None):
            was_connected = self.connected
            self._close_sockets()
            if was_connected:
                self._ended()

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, peer = server.accept()
        except (BlockingIOError, ConnectionError):  # the other end has gone again
            return
        if peer != self._peer:
            connection.close()
            return
        connection.settimeout(0)
        self._connection = connection
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        self._close_socket(server)
        self._server = None

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:  # the guest has reset it
            data = b""
        if data:
            self._received(data)
        else:
            self._over = True

    def _write(self, connection: socket.socket) -> None:
        waits = False
        while self._outgoing and not waits:
            data = self._outgoing[0]
            try:
                size = connection.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                waits = True
            except OSError:
                self._over = True
                return
            else:
                if size < len(data):
                    self._outgoing[0] = data[size:]
                else:
                    self._outgoing.popleft()
        if waits != self._writes:
            self._writes = waits
            events = select.EPOLLIN | (select.EPOLLOUT if waits else 0)
            self._epoll.modify(connection.fileno(), events)

    def _close_socket(self, one: socket.socket) -> None:
        """A forked process may have it, too: then the kernel does not unregister it by itself."""
        self._epoll.unregister(one.fileno())
        one.close()

    def _close_sockets(self) -> None:
        for one in (self._server, self._connection):
            if one is not None:
                self._close_socket(one)
        self._server = self._connection = None
        self._outgoing.clear()

    def close(self) -> None:
        """Close everything, when no thread calls `ready` any more."""
        self._over = True
        self._close_sockets()
        with self._lock:
            self._wake.close()
        self._epoll.close()


def _listen() -> socket.socket:
    """A socket that guests of this host can connect to; the kernel chooses its port."""
    if not hasattr(socket, "AF_VSOCK"):
        raise OSError(_errno.EAFNOSUPPORT, "this Python was built without it")
    made = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        made.bind((socket.VMADDR_CID_HOST, socket.VMADDR_PORT_ANY))
        made.listen()
    except BaseException:
        made.close()
        raise
    return made


class Vsock(VirtioDevice):
    """A vsock device, and the connection of a program in the guest to `port` of the host.

    Only this guest can connect, from GUEST_PORT, and only once.  `received` is called with the
    bytes that the program has sent, and `ended` at the connection's end, both in the thread of the
    devices; they must not block or raise.  `required`: the guest ends if the host's kernel can't
    serve the device; otherwise it has a device over which no connection can be made.

    OSError, with the reason, if the host has no vsock for guests.
    """

    device_id = 19
    name = "virtio-vsock (vhost)"
    features = INDIRECT | EVENT_INDEX
    queue_count = 3
    queue_size = 128
    host_queues: tuple[int, ...] = ()
    bounced = 2 << 20  # a page and headers for each entry of both rings, and pieces of 64 KiB
    without_path = "the guest has no vsock"

    def __init__(
        self,
        received: Callable[[bytes], object],
        ended: Callable[[], object] = lambda: None,
        *,
        required: bool = False,
        device: str = VSOCK_DEVICE,
    ) -> None:
        try:
            self._path = VhostVsockPath(required=required, device=device)
        except OSError as error:
            why = f"{device} can't be used: {error.strerror or error}"
            raise OSError(error.errno, why) from error
        #: The guest's address.
        self.cid: int = self._path.cid
        self.config: bytes = self.cid.to_bytes(8, "little").ljust(64, b"\0")
        self.data_path: DataPath | None = self._path
        try:
            server = _listen()
            #: The port that the host listens on.
            self.port: int = server.getsockname()[1]
            self._listener = Listener(server, (self.cid, GUEST_PORT), received, ended)
        except OSError as error:
            self._path.close()
            why = f"a socket of AF_VSOCK can't be used: {error.strerror or error}"
            raise OSError(error.errno, why) from error
        except BaseException:
            self._path.close()
            raise
        self.own_fd: int = self._listener.fileno()

    def send(self, data: bytes) -> None:
        """Send `data` to the program, from any thread.  Without effect after the end."""
        self._listener.send(data)

    def stop(self) -> None:
        """End the connection, and take none any more; from any thread, and soon."""
        self._listener.stop()

    def own_ready(self) -> None:
        self._listener.ready()

    def reset(self) -> None:
        if self._listener.connected:  # for the guest it has ended
            self._listener.stop()

    def serve(self, number: int, queue: Queue) -> bool:
        if number != _EVENTS:  # the kernel can't serve its queues: nothing comes, and nothing goes
            self._listener.stop()
        return False  # and there are no events

    def close(self) -> None:
        self._path.close()  # first: a connection without a guest is closed at once
        self._listener.close()
