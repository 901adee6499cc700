"""A Linux guest that runs in the background, and that a program talks to.

    from kvmpriv.guest.linux import LinuxGuest

    with LinuxGuest("/boot/vmlinuz") as guest:
        print(guest.run(["uname", "-a"], text=True, check=True).stdout)
        guest.put("program", "/bin/program")
        log = guest.get("/proc/kallsyms")

The initrd brings an agent along (agent.c).  It connects to this process over vsock where the host
has /dev/vhost-vsock and the guest's kernel has the driver; else it has the other end of a port of a
virtio console.  The guest needs nothing but a kernel with the drivers virtio_mmio and
virtio_console: built in, or as modules.  Modules come from this host's /lib/modules, or the guest's
own init loads them.

A distribution's disk is booted with the distribution's kernel and initrd:

    disk = Block("root.img")
    with LinuxGuest(
        "vmlinuz", initrd="initrd.img", cmdline="root=/dev/vda", devices=[disk], memory=1 << 30
    ) as guest:
        guest.run(["systemctl", "is-system-running", "--wait"])

With ``root=`` in its command line a guest is ready when init has changed from the initrd to that
root file system, and the agent has come.  Services may still be starting.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ArgumentError, ClosedError
from ...exit_status import ExitStatus
from ...kvm import Kvm
from ...private import PrivateAbi, choose
from . import initrd as _initrd
from .agent import Agent
from .disk import Block
from .kernel import LinuxImage, load_linux
from .layout import VIRTIO_MAX, plan
from .machine import LinuxMachine
from .modules import CONSOLE, DRIVERS, VSOCK, find_modules
from .outcome import EXIT_STATUSES, Outcome
from .port import Port
from .protocol import Link
from .root import check_root
from .streams import Streams
from .usage import Cost
from .vsock import Vsock

if TYPE_CHECKING:
    from collections.abc import Callable

    from .device import Device
    from .virtio import VirtioDevice

__all__ = ["PORT_NAME", "GuestDied", "LinuxGuest"]

#: The name of the agent's port in the guest.
PORT_NAME = "kvmpriv.agent"
#: What the agent uses: `LinuxGuest.transport`.
_BY_PORT, _BY_VSOCK = "virtio-console", "vsock"
_CONSOLE_KEPT = 64 << 10
_LINES_SHOWN = 10
_SETTLES = 1.0  # seconds after the agent's end in which the guest may end, too
_WORDS = {
    "off": "the guest has turned itself off",
    "exit": "the guest has ended itself",
    "reset": "the guest has reset itself",
    "panic": "the guest's kernel panicked",
    "crash": "the guest crashed",
    "timeout": "the guest was ended",
    "no progress": "the guest makes no progress",
    "closed": "the guest was closed",
    "error": "the guest can't go on",
    "agent": "the guest's agent has ended",
}


class GuestDied(Exception):  # noqa: N818  # what happened, not an error of the caller
    """The guest has ended, or its agent has, while something was to be done there."""

    def __init__(self, outcome: Outcome, console: str) -> None:
        #: How it ended.  ``how`` may also be "closed", "error" (an exception of this process) and
        #: "agent" (the agent has ended; the guest may run on).
        self.outcome: Outcome = outcome
        #: The last lines of its console.
        self.console: str = console
        tail = f"; the last lines of its console:\n{console}" if console else ""
        super().__init__(f"{_WORDS.get(outcome.how, outcome.how)}: {outcome.why}{tail}")

    def __reduce__(self) -> tuple[type[GuestDied], tuple[Outcome, str]]:
        return type(self), (self.outcome, self.console)


class LinuxGuest(Agent):
    """A Linux guest with an agent; see the module for an example.

    `kernel`: the file of a bzImage or a vmlinux, or what `load_linux` returned.
    `initrd`: the file or the bytes of an initial root file system with an ``init``; by default one
    with this host's busybox (`initrd.busybox`).  The agent is added to it, starts before ``init``,
    and answers when there is a ``/bin/sh`` (or after 10 s); with ``root=`` in `cmdline` not before
    ``init`` has changed to that root file system.
    `memory`: in bytes.
    `cmdline`: words for the kernel's command line.
    `cpus`: the number of vCPUs.
    `private`: True, or the name of an ABI: all memory above 4 GiB is private (see `plan`).
    `devices`: virtio devices, which the guest owns from now on; at most 6.
    `timeout`: how many seconds `start` waits for the agent.
    `lifetime`: after so many seconds the guest is ended.
    `pin`: for each vCPU the CPU of the host that it runs on; empty: any.
    `output`: called with what the guest prints on its console, in a thread of the guest.
    `complain`: called with a line of text when a device stops, from any thread.
    `vsock`: whether the agent connects over vsock (/dev/vhost-vsock).  None: where the host and the
    guest's kernel can, else it uses a port of a virtio console.  True: it must, or the constructor
    raises an OSError, or `start` GuestDied, with the reason.  False: never.  `transport` says which
    of them it is.  A guest with vsock can also connect to what else listens on vsock on this host.
    `trace`: a file to record the run in.
    `device`: KVM's device node.

    The console is ttyS0 if virtio_console is a module, or with ``root=`` in `cmdline`; else hvc0.

    FileNotFoundError without busybox on this host; ImageError for a file that can't be what it is
    given as; ArgumentError for a disk that can't have the file system of ``root=``; what
    `LinuxMachine` raises.  As a context
    manager it calls `start`, and at the end of the block `shutdown`, or `close` after an exception.

    Every method may be called from any thread, several at a time; up to 64 commands run at a time.
    A process that was forked can't use the guest of its parent: ClosedError.
    """

    #: The machine that it runs on.
    machine: LinuxMachine

    def __init__(
        self,
        kernel: str | os.PathLike[str] | LinuxImage,
        *,
        initrd: str | os.PathLike[str] | bytes | None = None,
        memory: int = 512 << 20,
        cmdline: str = "quiet",
        cpus: int = 1,
        private: bool | str = False,
        devices: Sequence[VirtioDevice] = (),
        timeout: float | None = 120.0,
        lifetime: float | None = None,
        pin: Sequence[int] = (),
        output: Callable[[bytes], object] = lambda data: None,
        complain: Callable[[str], object] = lambda text: None,
        vsock: bool | None = None,
        trace: str | os.PathLike[str] | None = None,
        device: str = "/dev/kvm",
    ) -> None:
        with ExitStack() as stack:
            for one in devices:
                stack.callback(one.close)
            image = kernel if isinstance(kernel, LinuxImage) else load_linux(_contents(kernel))
            for disk in [one for one in devices if isinstance(one, Block)][:1]:
                check_root(cmdline, disk.path)
            super().__init__(Link(self._send))
            self._streams = Streams(self._link.received, self._agent_has_ended, self._agent_came)
            self._vsock_required = bool(vsock)
            self._vsock = self._open_vsock(vsock)
            if self._vsock is not None:
                stack.callback(self._vsock.close)
            own = [VSOCK] if self._vsock is not None else []
            modules = find_modules(image.version, drivers=(*DRIVERS, *own))
            root, cmdline = _initrd.with_agent(
                None if initrd is None else _initrd.check(_contents(initrd)),
                cmdline,
                [module.contents for module in modules],
                vsock_port=None if self._vsock is None else self._vsock.port,
            )
            self._own_root = initrd is not None and _initrd.has_root(cmdline)
            late = self._own_root or any(module.name == CONSOLE for module in modules)
            most = VIRTIO_MAX - (2 if late else 3)
            if len(devices) > most:
                raise ArgumentError(
                    f"a guest with an agent can have up to {most} virtio devices of its caller, not"
                    f" {len(devices)}"
                )
            kvm = stack.enter_context(Kvm(device))
            abi: PrivateAbi | None = None
            if private:
                abi = choose(kvm, private if isinstance(private, str) else None)
            port = self._streams.add(_BY_PORT, lambda *calls: Port(PORT_NAME, *calls))
            stack.callback(port.close)
            ranges = plan(memory, private=abi is not None)
            stack.pop_all()  # the machine closes the devices, also if it can't be made
            with ExitStack() as made:
                made.callback(kvm.close)
                self.machine = made.enter_context(
                    LinuxMachine(
                        kvm,
                        image,
                        ranges,
                        initrd=root,
                        cmdline=cmdline,
                        cpus=cpus,
                        abi=abi,
                        devices=[port, *devices, *([self._vsock] if self._vsock else [])],
                        complain=complain,
                        output=self._print,
                        pin=pin,
                        console="serial" if late else "virtio",
                    )
                )
                self._stack = made.pop_all()
        self._output, self._trace = output, trace
        self._timeout, self._lifetime = timeout, lifetime
        self._console = bytearray()
        self._thread = threading.Thread(target=self._run, name="kvmpriv-guest", daemon=True)
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._look: Callable[[], object] | None = None
        self._closing = threading.RLock()
        self._closed = False

    # -- in the guest's own threads ------------------------------------------------------------

    def _open_vsock(self, wanted: bool | None) -> Vsock | None:
        """The vsock device; None without one, and then `_no_vsock` has the reason."""
        self._no_vsock = "vsock=False"
        if wanted is False:
            return None
        try:
            made = self._streams.add(_BY_VSOCK, lambda *calls: Vsock(*calls, required=bool(wanted)))
        except OSError as error:
            if wanted:
                raise
            self._no_vsock = str(error.strerror)
            return None
        self._no_vsock = (
            f"the guest has not connected over vsock, for which its kernel needs the driver {VSOCK}"
        )
        return made

    def _send(self, data: bytes) -> None:
        self._streams.send(data)

    def _agent_came(self, transport: str) -> None:
        if transport == _BY_VSOCK:
            self.machine.mark("the agent uses vsock")
            return
        how = f"the agent uses a port of a virtio console: {self._no_vsock}"
        self.machine.mark(how)
        if self._vsock is not None:
            self._vsock.stop()
        if self._vsock_required:
            outcome = Outcome("error", ExitStatus.UNABLE, f"vsock=True, and {how}")
            self.machine.end(outcome)
            self._link.fail(lambda: GuestDied(outcome, self._last_lines()))

    def _print(self, data: bytes) -> None:
        self._console += data
        del self._console[:-_CONSOLE_KEPT]
        self._output(data)

    def _run(self) -> None:
        try:
            self._outcome = self.machine.run(self._lifetime, trace=self._trace, look=self._look)
        except BaseException as error:  # noqa: BLE001  # the callers of the guest's methods get it
            why = f"{type(error).__name__}: {error}"
            self._error = error
            self._outcome = Outcome("error", ExitStatus.UNABLE, why)
        self._link.fail(self._died)

    def _died(self) -> GuestDied:
        assert self._outcome is not None
        died = GuestDied(self._outcome, self._last_lines())
        died.__cause__ = self._error
        return died

    def _agent_has_ended(self) -> None:
        """A guest that ends does that, too; then it has an outcome soon."""
        what = "connection" if self._streams.chosen == _BY_VSOCK else "port"
        why = f"its {what} was closed; the guest may run on"
        outcome = Outcome("agent", ExitStatus.UNABLE, why)

        def died() -> Exception:
            self._link.settle(lambda: self._outcome is not None, _SETTLES)
            if self._outcome is not None:
                return self._died()
            return GuestDied(outcome, self._last_lines())

        self._link.fail(died)

    # -- its life ------------------------------------------------------------------------------

    @property
    def console(self) -> bytes:
        """What the guest has printed on its console, the last 64 KiB of it."""
        return bytes(self._console)

    def _last_lines(self) -> str:
        lines = self.console.decode(errors="replace").replace("\r", "").strip().splitlines()
        return "\n".join(lines[-_LINES_SHOWN:])

    @property
    def outcome(self) -> Outcome | None:
        """How the guest ended; None while it runs."""
        return self._outcome

    @property
    def transport(self) -> str | None:
        """What the agent uses: "vsock" or "virtio-console"; None until it has answered."""
        return self._streams.chosen

    @property
    def alive(self) -> bool:
        """Whether it can be talked to: its agent has answered, and neither of them has ended."""
        return self._link.ready and not self._link.failed

    def add_device(
        self,
        device: Device | VirtioDevice,
        *,
        port: int | None = None,
        mmio: int | None = None,
        size: int | None = None,
        irq: int | None = None,
    ) -> None:
        """Add a device of your own, before `start`; see `LinuxMachine.add_device`."""
        self._check()
        self.machine.add_device(device, port=port, mmio=mmio, size=size, irq=irq)

    def watch(self, look: Callable[[], object]) -> None:
        """Call `look` each second, in a thread of the guest.  Before `start`."""
        self._look = look

    def start(self) -> None:
        """Start the guest, and wait until its agent answers.

        GuestDied if the guest ends before that, or has not answered after `timeout` seconds.
        """
        self._check()
        self._thread.start()
        if not self._link.wait_until_ready(self._timeout):
            why = f"its agent did not answer in {self._timeout:g} s; {self._needs()}"
            outcome = Outcome("timeout", EXIT_STATUSES["timeout"], why)
            self.machine.end(outcome)
            self._join()
            raise GuestDied(outcome, self._last_lines())

    def _needs(self) -> str:
        """Why the agent may not have answered."""
        needs = "the kernel needs the drivers virtio_mmio and virtio_console"
        if not self._own_root:
            return needs
        return f"it waits until the guest has changed to the root file system of root=, and {needs}"

    @property
    def paused(self) -> bool:
        """Whether the guest is paused."""
        return self.machine.paused

    def pause(self) -> None:
        """Stop the guest where it is, until `resume`; see `LinuxMachine.pause`.

        A command that runs in it waits; `run` and all others wait for it, or for their timeout.
        GuestDied if the guest has ended.
        """
        self._check_started()
        self.machine.pause()
        if self._outcome is not None:
            raise self._died()

    def resume(self) -> None:
        """Let a paused guest go on; without effect if it is not paused."""
        self._check_started()
        self.machine.resume()

    def cost(self) -> Cost:
        """What the guest has cost so far, and after its end what it has cost in all.

        Exits by reason, CPU time in seconds, memory in bytes, seconds of wall clock: see `Cost`.
        """
        self._link.check_ours()
        with self._closing:  # its memory must not be freed meanwhile
            return self.machine.cost()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait until the guest has ended; how it did, or None after `timeout` seconds."""
        self._thread.join(timeout)
        return self._outcome

    def shutdown(self, timeout: float = 10.0) -> Outcome:
        """Let the guest write its disks and turn the machine off; then `close`.

        systemd is asked to do that, and gets `timeout` seconds to end its services; then, and with
        any other init, the guest's kernel does it at once.  A guest that is still on after
        `timeout` more seconds is closed like that; one that is paused is resumed.  Returns how it
        ended.
        """
        self._check_started()
        try:
            self.machine.resume()
            for _ in range(2):
                if self._thread.is_alive() and not self._link.failed:
                    self._link.power_off()
                    self._thread.join(timeout)
        finally:
            self.close()
        assert self._outcome is not None
        return self._outcome

    def close(self) -> None:
        """End the guest at once, and free what it has used.  Who waits for it gets GuestDied."""
        if not self._link.ours:
            return
        with self._closing:
            if self._closed:
                return
            self.machine.end(Outcome("closed", 0, "by its program"))
            try:
                self._join()
            finally:
                self._closed = True
                if self._outcome is None:  # it was never started
                    self._outcome = Outcome("closed", 0, "by its program")
                self._link.fail(lambda: ClosedError("the guest is closed"))
                self._stack.close()

    def _join(self) -> None:
        """Wait for the guest's thread, which ends soon, also if a signal's handler raises."""
        interrupted: BaseException | None = None
        while self._thread.ident is not None and self._thread.is_alive():
            try:
                self._thread.join()
            except BaseException as error:  # noqa: BLE001  # it is raised below
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _check(self) -> None:
        self._link.check_ours()
        if self._closed:
            raise ClosedError("the guest is closed")

    def _check_started(self) -> None:
        self._check()
        if self._thread.ident is None:
            raise ClosedError("the guest was not started: use `with`, or call start()")

    def __enter__(self) -> LinuxGuest:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._link.ours:
            return
        if kind is None and not self._closed and self._thread.is_alive():
            self.shutdown()
        else:
            self.close()


def _contents(source: str | os.PathLike[str] | bytes) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()
