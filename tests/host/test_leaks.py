"""Every object that owns a descriptor, a mapping or a thread gives it back, and is in the table."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import pkgutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

import kvmpriv
from kvmpriv import HostMemory, Kvm, Vcpu, VcpuThread, Vm, private, uapi
from kvmpriv.fd import Fd
from kvmpriv.guest import Machine, Puppet, load_flat
from kvmpriv.guest.linux import GuestProcess, LinuxGuest, LinuxMachine, initrd, load_linux, plan
from kvmpriv.guest.linux.device import Device, InterruptLine
from kvmpriv.guest.linux.disk import Block, Entropy
from kvmpriv.guest.linux.dispatch import GuestThread
from kvmpriv.guest.linux.io import IoThread
from kvmpriv.guest.linux.kernel import LinuxImage
from kvmpriv.guest.linux.net import Net
from kvmpriv.guest.linux.outcome import Ending
from kvmpriv.guest.linux.pause import Gate
from kvmpriv.guest.linux.port import Console, Port
from kvmpriv.guest.linux.protocol import Channel
from kvmpriv.guest.linux.recording import RunRecorder
from kvmpriv.guest.linux.tap import Tap
from kvmpriv.guest.linux.vhost import (
    NET_DEVICE,
    Vhost,
    VhostNet,
    VhostNetPath,
    VhostVsock,
    VhostVsockPath,
)
from kvmpriv.guest.linux.virtio import Transport
from kvmpriv.guest.linux.vsock import Listener, Vsock
from kvmpriv.private import guest_memfd, restrictedmem
from kvmpriv.selftest.kernel_log import KernelLog
from kvmpriv.stats import StatsFd
from kvmpriv.trace.record import Recorder
from private.support.leaks import open_fds
from private.support.requirements import missing
from unit.test_linux_image import bzimage

from .conftest import SPIN, start

MIB = 1 << 20
LARGE = 64 * MIB
INITRD = initrd.pack({"init": b"#!/bin/sh\n"})

#: They own nothing themselves: what is made of them, or what they are given, is in the table.
BASES = {"HeldBySlots", "KvmFd", "PrivateFile", "VirtioDevice", "Cable", "VhostPath"}
#: Their ends are in the guest, or they have no end: they have no descriptor, mapping or thread.
OWN_NOTHING = {Channel, Device, Entropy, GuestProcess, Transport}


class Place(NamedTuple):
    """What the objects are made of."""

    kvm: Kvm
    path: Path
    stack: ExitStack

    def vcpu(self) -> Vcpu:
        """A vCPU of a VM of its own that spins."""
        vm = self.stack.enter_context(self.kvm.create_vm())
        memory = self.stack.enter_context(HostMemory(0x10000))
        vm.map(memory, 0)
        memory.write(0x1000, SPIN)
        vcpu = self.stack.enter_context(vm.create_vcpu())
        start(vcpu)
        return vcpu

    def linux(self) -> LinuxMachine:
        return LinuxMachine(self.kvm, _linux_image(), plan(LARGE), devices=[Entropy()])


def _linux_image() -> LinuxImage:
    return load_linux(bzimage(bytes(0x200) + b"\xf4" * 0x200))


def _stats(place: Place) -> AbstractContextManager[object]:
    if not place.kvm.check_extension(uapi.kvm.KVM_CAP_BINARY_STATS_FD):
        missing("stats", "KVM_CAP_BINARY_STATS_FD is 0")
    return place.vcpu().get_stats_fd()


def _guest_memfd(place: Place) -> AbstractContextManager[object]:
    vm = place.stack.enter_context(place.kvm.create_vm())
    if not vm.check_extension(uapi.guest_memfd.KVM_CAP_GUEST_MEMFD):
        missing("shared-guest-memfd", "KVM_CAP_GUEST_MEMFD is 0 on a default VM")
    return guest_memfd.GuestMemfd(vm, MIB)


def _restrictedmem(place: Place) -> AbstractContextManager[object]:
    try:
        return restrictedmem.RestrictedMem()
    except OSError as error:
        missing("restrictedmem", str(error))


def _tap(_: Place) -> Tap:
    try:
        return Tap()
    except OSError as error:
        missing("network", f"no tap can be made: {error}")


T = TypeVar("T")


def _vhost(make: Callable[[], T]) -> T:
    try:
        return make()
    except OSError as error:
        missing("vhost", str(error))


def _vhost_path(place: Place) -> AbstractContextManager[object]:
    tap = place.stack.enter_context(_tap(place))
    return closing(_vhost(lambda: VhostNetPath(tap.fileno(), 0, required=True)))


def _block(place: Place) -> AbstractContextManager[object]:
    place.path.write_bytes(bytes(4096))
    return closing(Block(place.path))


def _puppet(place: Place) -> AbstractContextManager[object]:
    return Puppet(place.stack.enter_context(place.kvm.create_vm()))


@contextmanager
def _net(_: Place) -> Iterator[object]:
    """The card closes the cable that it is given as an object."""
    card = Net(Fd(os.eventfd(0, os.EFD_CLOEXEC)))
    yield card
    card.close()


@contextmanager
def _io_thread(_: Place) -> Iterator[object]:
    thread = IoThread(lambda error: None, Gate())
    thread.start()
    yield thread
    thread.stop()
    thread.close()


def _kernel_log(place: Place) -> KernelLog:
    place.path.touch()
    return KernelLog(str(place.path))


#: Class -> how an object of it is made; its block's end is to give everything back.
OWNERS: dict[type, Callable[[Place], AbstractContextManager[object]]] = {
    Fd: lambda _: Fd(os.eventfd(0, os.EFD_CLOEXEC)),
    Kvm: lambda _: Kvm(),
    Vm: lambda place: place.kvm.create_vm(),
    Vcpu: lambda place: place.stack.enter_context(place.kvm.create_vm()).create_vcpu(),
    StatsFd: _stats,
    HostMemory: lambda _: HostMemory(LARGE),
    VcpuThread: lambda place: VcpuThread(place.vcpu(), lambda *_: True),
    private.PrivateVm: lambda place: private.GuestMemfdAbi(vm_type=0).create_vm(place.kvm),
    guest_memfd.GuestMemfd: _guest_memfd,
    restrictedmem.RestrictedMem: _restrictedmem,
    Machine: lambda place: Machine(place.kvm, load_flat(SPIN), LARGE),
    Puppet: _puppet,
    LinuxMachine: lambda place: place.linux(),
    LinuxGuest: lambda _: closing(LinuxGuest(_linux_image(), initrd=INITRD, memory=LARGE)),
    Port: lambda _: closing(Port("port", lambda data: None)),
    Console: lambda _: closing(Console(lambda data: None, lambda: True)),
    Block: _block,
    Net: _net,
    Tap: _tap,
    Vhost: lambda _: _vhost(lambda: Vhost(NET_DEVICE)),
    VhostNet: lambda _: _vhost(VhostNet),
    VhostNetPath: _vhost_path,
    VhostVsock: lambda _: _vhost(VhostVsock),
    VhostVsockPath: lambda _: closing(_vhost(lambda: VhostVsockPath(required=True))),
    Vsock: lambda _: closing(_vhost(lambda: Vsock(lambda data: None))),
    Listener: lambda _: closing(
        Listener(socket.create_server(("127.0.0.1", 0)), ("", 0), lambda data: None)
    ),
    IoThread: _io_thread,
    GuestThread: lambda place: GuestThread(
        place.vcpu(), lambda *_: None, lambda: None, None, Gate()
    ),
    InterruptLine: lambda _: closing(InterruptLine()),
    Ending: lambda _: closing(Ending()),
    Recorder: lambda place: closing(Recorder(place.path.open("w"), {})),
    KernelLog: _kernel_log,
    RunRecorder: lambda place: closing(
        RunRecorder(place.path, place.stack.enter_context(place.linux()), lambda text: None)
    ),
}


class Owned(NamedTuple):
    """What this process has."""

    fds: dict[int, str]
    threads: set[threading.Thread]
    mapped: int  # MiB that can be read and written

    @classmethod
    def now(cls) -> Owned:
        mapped = 0
        for line in Path("/proc/self/maps").read_text().splitlines():
            where, rights = line.split()[:2]
            if rights.startswith("rw"):
                low, high = (int(number, 16) for number in where.split("-"))
                mapped += high - low
        return cls(open_fds(), set(threading.enumerate()), mapped // MIB)


def check(make: Callable[[Place], AbstractContextManager[object]], kvm: Kvm, path: Path) -> None:
    """Fails unless an object of `make` owns something and has given it back at its end."""
    for _ in range(2):  # the first makes what stays: imports, the stacks of threads
        gc.collect()  # of other tests: what it closes must not look closed by this one
        before = Owned.now()
        with ExitStack() as stack, make(Place(kvm, path, stack)):
            during = Owned.now()
        after = Owned.now()
    assert (during.fds, during.threads) != (before.fds, before.threads) or (
        during.mapped > before.mapped
    ), "it owns nothing"
    assert after.fds == before.fds, "descriptors are left"
    assert after.threads == before.threads, "threads are left"
    assert after.mapped - before.mapped < LARGE // MIB // 2, "memory is left"


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_nothing_is_left(owner: type, kvm: Kvm, tmp_path: Path) -> None:
    check(OWNERS[owner], kvm, tmp_path / "file")


def test_a_leak_is_seen(kvm: Kvm, tmp_path: Path) -> None:
    """The twins of the test above: a descriptor, a thread and a mapping that stay; and nothing."""
    kept: list[Any] = []

    @contextmanager
    def leaky(make: Callable[[], object]) -> Iterator[None]:
        kept.append(make())
        yield

    stop = threading.Event()

    def thread() -> threading.Thread:
        one = threading.Thread(target=stop.wait)
        one.start()
        return one

    try:
        for make, what in (
            (lambda: Fd(os.eventfd(0, os.EFD_CLOEXEC)), "descriptors are left"),
            (thread, "threads are left"),
            (lambda: HostMemory(LARGE), "memory is left"),
        ):
            with pytest.raises(AssertionError, match=what):
                check(lambda _, make=make: leaky(make), kvm, tmp_path / "file")  # type: ignore[misc]
        with pytest.raises(AssertionError, match="it owns nothing"):
            check(lambda _: leaky(object), kvm, tmp_path / "file")
    finally:
        stop.set()
        for one in kept:
            if isinstance(one, threading.Thread):
                one.join()
            elif hasattr(one, "close"):
                one.close()


def owners() -> set[type]:
    """The public classes of the package that can be closed, or are threads."""
    found = set()
    for module in pkgutil.walk_packages(kvmpriv.__path__, "kvmpriv."):
        if module.name.endswith("__main__") or "._suite" in module.name:
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if (
                inspect.isclass(value)
                and value.__module__ == module.name
                and not name.startswith("_")
                and name not in BASES
                and (callable(getattr(value, "close", None)) or issubclass(value, threading.Thread))
            ):
                found.add(value)
    return found


def test_every_owner_is_in_the_table() -> None:
    without = {cls for cls in owners() if cls not in OWNERS} - OWN_NOTHING
    assert not without, "these own something, and no test looks whether they give it back"
    assert owners() >= {Fd, Kvm, Vcpu, HostMemory, VcpuThread, LinuxMachine}
