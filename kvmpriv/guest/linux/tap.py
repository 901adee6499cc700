"""A tap device for a guest's network card, in a network namespace of its own or on a bridge.

Documentation/networking/tuntap.rst of the kernel; network_namespaces(7), user_namespaces(7).
"""

from __future__ import annotations

import errno as _errno
import fcntl
import itertools
import os
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from ...libc import unshare

__all__ = ["GUEST_ADDRESS", "HEADER_SIZE", "HOST_ADDRESS", "PREFIX_LENGTH", "Tap", "remove_stale"]

#: The host's address in a namespace of its own, the one that a guest may take, and their prefix.
HOST_ADDRESS, GUEST_ADDRESS, PREFIX_LENGTH = "10.88.0.1", "10.88.0.2", 24
#: The size of struct virtio_net_hdr with num_buffers, with which each packet begins.
HEADER_SIZE = 12
_NAME = "kvmpriv-{pid}-{started}"
_NAMESPACES = Path("/run/netns")
_TUN = "/dev/net/tun"
_numbers = itertools.count()
#: Waits for the end of the process that has made a namespace, and removes it.
_GUARD = 'read -r line; umount -l "$1"; rm -f "$1"'
# <linux/if_tun.h>
_TUNSETIFF, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
# <linux/sched.h>, <linux/capability.h>
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21


def _may_administer() -> bool:
    """True if this process has the capabilities for networks and namespaces."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return all(effective >> number & 1 for number in (_CAP_NET_ADMIN, _CAP_SYS_ADMIN))


def _started(pid: int) -> str:
    """When a process was started: with its PID this is unique until the host is rebooted."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def remove_stale() -> list[str]:
    """Remove the network namespaces of processes that were killed; returns their names."""
    from pyroute2 import netns

    removed = []
    for path in _NAMESPACES.glob(_NAME.format(pid="*", started="*")):
        _, pid, started = path.name.split("-", 2)
        alive = False
        with suppress(OSError, ValueError):
            alive = _started(int(pid)) == started.partition("-")[0]
        if not alive:
            with suppress(OSError):
                netns.remove(path.name)
                removed.append(path.name)
    return removed


def _open(bridge: str | None) -> tuple[int, str]:
    """Make a tap in this thread's network namespace; returns its descriptor and its name."""
    from pyroute2 import IPRoute

    fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        request = fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"kvmpriv%d", flags))
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
        name = request[:16].rstrip(b"\0").decode()
        with IPRoute() as route:
            index = route.link_lookup(ifname=name)[0]
            if bridge is None:
                route.addr("add", index=index, address=HOST_ADDRESS, prefixlen=PREFIX_LENGTH)
                route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
            else:
                bridges = route.link_lookup(ifname=bridge)
                if not bridges:
                    raise OSError(_errno.ENODEV, f"there is no bridge {bridge}")
                route.link("set", index=index, master=bridges[0])
            route.link("set", index=index, state="up")
    except BaseException:
        os.close(fd)
        raise
    return fd, name


class Tap:
    """A tap device.  It exists until it is closed or this process ends.

    With `bridge`, the name of a bridge, it is a port of that bridge.  Without, it is in a new
    network namespace, in which the host has HOST_ADDRESS.  The namespace is called `namespace`; a
    process of the tap removes it if this process is killed.  If this process lacks CAP_NET_ADMIN or
    CAP_SYS_ADMIN, the namespace is that of the process `holder`, which has a user namespace of its
    own (``nsenter -t HOLDER -U -n`` enters it).

    PermissionError says what this process lacks; OSError otherwise (ENODEV: no such bridge).
    """

    #: The name of the network interface.
    name: str

    def __init__(self, bridge: str | None = None) -> None:
        self.bridge = bridge
        #: The name of the network namespace, as `ip netns` lists it; None if there is none.
        self.namespace: str | None = None
        self._fd = -1
        self._holder: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._failure: BaseException | None = None
        try:
            if bridge is None and not _may_administer():
                self._make_by_holder()
                return
            # In another thread, as this one has to stay in its network namespace.
            thread = threading.Thread(target=self._make, name="kvmpriv-tap")
            thread.start()
            thread.join()
            if self._failure is not None:
                raise self._explained(self._failure)
        except BaseException:
            self.close()
            raise

    def _explained(self, error: BaseException) -> BaseException:
        number = getattr(error, "errno", None) or getattr(error, "code", None)
        if number in (_errno.EPERM, _errno.EACCES):
            needed = "CAP_NET_ADMIN" + ("" if self.bridge else " and CAP_SYS_ADMIN")
            return PermissionError(number, f"a network needs {needed} (root has them)")
        if isinstance(error, OSError):
            return error
        if isinstance(number, int) and number > 0:  # pyroute2's NetlinkError
            return OSError(number, f"the network: {os.strerror(number)}")
        return error

    def _make(self) -> None:
        try:
            if self.bridge is None:
                self._enter()
            self._fd, self.name = _open(self.bridge)
        except BaseException as error:  # noqa: BLE001  # the thread that waits raises it
            self._failure = error

    def _enter(self) -> None:
        """Make a network namespace with a name, and move this thread into it."""
        from pyroute2 import netns

        remove_stale()
        me = os.getpid()
        base = _NAME.format(pid=me, started=_started(me))
        # Several threads may make networks at a time: no number is used twice.
        name = f"{base}-{next(_numbers)}"
        self._guard = subprocess.Popen(  # noqa: S603  # a fixed script
            ["/bin/sh", "-c", _GUARD, "kvmpriv-tap", _NAMESPACES / name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not end it
        )
        netns.create(name)
        self.namespace = name
        netns.setns(name)

    def _make_by_holder(self) -> None:
        """Let another process make the tap in a user namespace, and receive its descriptor.

        Only a process with a single thread can enter a new user namespace.
        """
        self._channel, theirs = socket.socketpair()
        with theirs:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}\n"
                f"from kvmpriv.guest.linux.tap import hold; hold({theirs.fileno()})"
            )
            self._holder = subprocess.Popen(  # noqa: S603  # this interpreter
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C must not end it
            )
        message, fds, _, _ = socket.recv_fds(self._channel, 256, 1)
        if fds:
            self._fd, self.name = fds[0], message.decode()
            os.set_inheritable(self._fd, False)  # noqa: FBT003
            return
        number, _, where = message.decode().partition(" ")
        raise PermissionError(
            int(number or _errno.EPERM),
            f"a network needs CAP_NET_ADMIN and CAP_SYS_ADMIN (root has them), or a user namespace,"
            f" and that did not work: {where or 'its process has died'}",
        )

    @property
    def holder(self) -> int | None:
        """The PID of the process whose network namespace the tap is in, if that has no name."""
        return self._holder.pid if self._holder else None

    def fileno(self) -> int:
        """The descriptor, which does not block; -1 after close."""
        return self._fd

    def close(self) -> None:
        """Remove the tap and its network namespace."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._channel is not None:
            self._channel.close()  # the holder ends then
            self._channel = None
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.wait()
        guard, self._guard = self._guard, None
        if guard is not None:  # first, as it removes whatever has the name
            guard.kill()
            guard.communicate()
        name, self.namespace = self.namespace, None
        if name is not None:
            from pyroute2 import netns

            with suppress(OSError):
                netns.remove(name)

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold(fd: int) -> None:
    """Be the holder's process: make the tap, send it over the socket `fd`, wait for its end.

    If there is no tap, it sends an errno and what was refused.
    """
    import pyroute2  # noqa: F401  # while its files can be read

    channel = socket.socket(fileno=fd)
    what = "unshare(CLONE_NEWUSER | CLONE_NEWNET)"
    try:
        user, group = os.geteuid(), os.getegid()
        if error := unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
            raise OSError(-error, "")
        for name, content in (
            ("setgroups", "deny"),  # or gid_map could not be written
            ("uid_map", f"0 {user} 1"),
            ("gid_map", f"0 {group} 1"),
        ):
            what = f"/proc/self/{name}"
            Path(what).write_text(content)
        what = _TUN
        tap, name = _open(None)
    except Exception as error:  # noqa: BLE001  # the other process raises it
        number = getattr(error, "errno", None) or getattr(error, "code", None) or _errno.EPERM
        channel.send(f"{number} {what}: {os.strerror(number)}".encode())
        return
    socket.send_fds(channel, [name.encode()], [tap])
    os.close(tap)
    channel.recv(1)
