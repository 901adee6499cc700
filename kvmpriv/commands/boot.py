"""``kvmpriv boot``: boots Linux; its console and exit status are the guest's."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import NamedTuple, TextIO

from ..errors import ArgumentError
from ..exit_status import ExitStatus
from ..guest.bare import EXIT_PORT
from ..guest.image import ImageError, read_file
from ..guest.linux.console import HELP, Keyboard, keyboard
from ..guest.linux.disk import Block, Entropy
from ..guest.linux.guest import GuestDied, LinuxGuest
from ..guest.linux.initrd import check as check_initrd
from ..guest.linux.kernel import LinuxImage, load_linux
from ..guest.linux.layout import Range, plan
from ..guest.linux.machine import (
    CONSOLES,
    CPUS_MAX,
    DEFAULT_CMDLINE,
    LinuxMachine,
    check_pin,
)
from ..guest.linux.net import Net, parse_mac
from ..guest.linux.outcome import Interrupted, Outcome
from ..guest.linux.root import check_root
from ..guest.linux.shell import relay
from ..guest.linux.tap import HOST_ADDRESS, PREFIX_LENGTH, Tap
from ..guest.linux.usage import Cost, RangeUse
from ..guest.linux.virtio import VirtioDevice
from ..kvm import Kvm
from ..private import ABIS, PrivateAbi, choose
from ..terminal import OutputError, printable
from . import fail
from ._options import add_device, device_error, parse_path, parse_seconds, parse_size

__all__ = ["EXAMPLES", "EXIT_STATUS", "add_arguments", "main"]

_SCHEMA_VERSION = 1
_READY = 120.0  # seconds until the agent must answer
_KERNEL_MAX = 1 << 30  # a vmlinux with everything that debuggers want to know
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def parse_cpus(text: str) -> int:
    """A number of vCPUs."""
    if not text.isdecimal() or not 1 <= int(text) <= CPUS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of vCPUs (1 to {CPUS_MAX})")
    return int(text)


def parse_abi(text: str) -> str:
    """The name of an ABI, or ``any``."""
    if text not in ("any", *ABIS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an ABI (any, {', '.join(ABIS)}); give the kernel with --kernel"
        )
    return text


_NET_OPTION = re.compile(r",(mac|vhost)=([^,]+)$")
_VHOST = {"on": True, "off": False}


class NetOptions(NamedTuple):
    """The value of --net: the bridge, None for a network namespace; the MAC address; vhost."""

    bridge: str | None
    mac: bytes | None
    vhost: bool | None


def parse_net(text: str) -> NetOptions | None:
    """``tap``, ``tap=BRIDGE``, each with ``,mac=MAC`` and ``,vhost=on`` or without; ``none``."""
    if text == "none":
        return None
    where, mac, vhost = text, "", ""
    while found := _NET_OPTION.search(where):
        where, (name, value) = where[: found.start()], found.groups()
        if name == "mac" and not mac:
            mac = value
        elif name == "vhost" and value in _VHOST and not vhost:
            vhost = value
        else:
            where = ""  # twice, or not a value
    kind, equals, bridge = where.partition("=")
    if kind != "tap" or bool(equals) != bool(bridge):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a network: write tap, tap=BRIDGE or none, and after tap ,mac=MAC"
            " and ,vhost=on or ,vhost=off"
        )
    try:
        return NetOptions(bridge or None, parse_mac(mac) if mac else None, _VHOST.get(vhost))
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_line(text: str) -> str:
    """A line for a shell."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the command is empty")
    return text


def parse_pin(text: str) -> list[int]:
    """``0,2``: numbers of CPUs."""
    if not all(word.isdecimal() and len(word) < 8 for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of CPUs such as 0,1")
    return [int(word) for word in text.split(",")]


EXAMPLES = (
    (
        "kvmpriv boot --kernel /boot/vmlinuz-$(uname -r) --initrd initrd.img",
        "boot the host's kernel with an initial root file system",
    ),
    (
        "kvmpriv boot --kernel bzImage --private --trace linux.trace",
        "keep the applications' memory private, and record the run",
    ),
    (
        "kvmpriv boot --kernel bzImage --disk root.img --append root=/dev/vda --net tap --cpus 2",
        "two vCPUs, a disk and a network",
    ),
    (
        (
            "kvmpriv boot --kernel vmlinuz --initrd initrd.img --disk disk.img"
            " --append root=/dev/vda1"
        ),
        "boot a distribution from the first partition of its disk, with its kernel and its initrd",
    ),
    (
        "kvmpriv boot --kernel bzImage --private --run 'uname -a'",
        "run one command in a guest with private memory, with its output and exit status",
    ),
)
EXIT_STATUS: dict[ExitStatus | str, str] = {
    "N": "the guest reported the status N; 0 if it reported none. With --run: the command's",
    ExitStatus.USAGE: "the command line or an input file can't be used",
    ExitStatus.UNABLE: "KVM or standard output can't be used",
    ExitStatus.NO_PROGRESS: "the guest makes no progress",
    ExitStatus.TIMEOUT: "the guest was ended by --timeout",
    ExitStatus.CRASH: "the guest crashed",
    ExitStatus.PANIC: "the guest's kernel panicked",
    "128+N": "signal N ended kvmpriv (130: Ctrl-C, or Ctrl-A x), or the command of --run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kvmpriv boot``."""
    parser.description = (
        "Boot Linux from a bzImage or a vmlinux. The guest's console is connected to "
        f"standard input and output; on a terminal, {HELP}.\n\n"
        "The guest reports its exit status by writing the line `exit N` to ttyS1 before it turns "
        f"itself off; --json also reports the other lines of ttyS1. A byte that the guest writes "
        f"to port {EXIT_PORT:#x} ends it at once, with that status.\n\n"
        "With --run or --shell, kvmpriv adds an agent to the initial root file system (without "
        "--initrd: one with this host's busybox, which must be linked statically), and talks to it "
        "over vsock if this host has /dev/vhost-vsock and the kernel the driver, else over a port "
        "of a virtio console. The kernel needs the drivers virtio_mmio and "
        "virtio_console, built in or as modules: of this host's /lib/modules, of the initrd, or of "
        "the root file system. With `root=` in --append the command starts once the initrd has "
        "changed to that root file system; services may still be starting then. The guest's "
        "console is not connected; if the guest dies, its last lines are printed. After the "
        "command the guest writes its disks and is turned off; systemd first has 10 s to end its "
        "services."
    )
    add = parser.add_argument
    add(
        "--kernel",
        required=True,
        type=parse_path,
        metavar="FILE",
        help="the kernel: a bzImage (vmlinuz) or a vmlinux",
    )
    add(
        "--initrd",
        type=parse_path,
        metavar="FILE",
        help="the initial root file system, in a format that the kernel unpacks",
    )
    add(
        "--append",
        default="",
        metavar="WORDS",
        help=f"add words to the kernel's command line, after `{DEFAULT_CMDLINE}`",
    )
    add(
        "--memory",
        type=parse_size,
        default=512 << 20,
        metavar="SIZE",
        help="the size of the guest's memory: bytes, or with K, M, G or T (default: 512M)",
    )
    add(
        "--console",
        choices=sorted(CONSOLES),
        default="serial",
        help="what the console is: serial (ttyS0, the default), or virtio (hvc0): much faster, for"
        " kernels with CONFIG_VIRTIO_CONSOLE built in; ttyS0 then prints until the kernel has hvc0."
        f" The command line begins with `{CONSOLES['virtio']}`",
    )
    add("--cpus", type=parse_cpus, default=1, metavar="N", help="the number of vCPUs (default: 1)")
    add(
        "--private",
        nargs="?",
        const="any",
        type=parse_abi,
        metavar="ABI",
        help="make all of the guest's memory above 4 GiB private, and keep its applications there."
        f" --private=ABI chooses the ABI ({', '.join(ABIS)}); --private alone uses the first that"
        " works",
    )
    add(
        "--disk",
        type=parse_path,
        metavar="FILE",
        help="a raw disk image, the guest's /dev/vda (virtio-blk); read-only if the file can't be"
        " written",
    )
    add(
        "--net",
        type=parse_net,
        default=None,
        metavar="WHERE",
        help="tap: give the guest a virtio-net card. The command makes a network namespace for it,"
        f" which ends with the guest; the host has the address {HOST_ADDRESS}/{PREFIX_LENGTH} in"
        " it. `ip netns` lists it. Without CAP_NET_ADMIN the command makes it in a user namespace"
        " and prints the PID for `nsenter`. tap=BRIDGE: connect the card to this bridge."
        " tap,mac=MAC: give the card this MAC address (default: a random one). tap,vhost=on: the"
        " host's kernel moves the packets (/dev/vhost-net), or the command fails. tap,vhost=off:"
        " the command moves them (default: the kernel if it can). none: no card (default)",
    )
    talk = parser.add_mutually_exclusive_group()
    talk.add_argument(
        "--run",
        type=parse_line,
        metavar="COMMAND",
        help="run this line by the guest's /bin/sh; standard input, output and error and the exit"
        " status are the command's",
    )
    talk.add_argument(
        "--shell",
        action="store_true",
        help="connect the terminal to a shell in the guest; Ctrl-A x ends it",
    )
    add("--timeout", type=parse_seconds, metavar="SECONDS", help="end the guest after this time")
    add(
        "--pin",
        type=parse_pin,
        default=[],
        metavar="CPU,...",
        help="run the vCPUs on these CPUs of the host: one CPU for each vCPU, in this order",
    )
    add(
        "--watch",
        action="store_true",
        help="print CPU time, exits and memory on standard error each second",
    )
    add(
        "--trace",
        type=parse_path,
        metavar="FILE",
        help="record exits, conversions, and samples of memory and CPU time"
        " (`kvmpriv trace FILE` shows them)",
    )
    talk.add_argument(
        "--json",
        action="store_true",
        help="print a report as JSON on standard output; the console goes to standard error",
    )
    add_device(parser)


class _BootError(Exception):
    """The guest can't be made; the message for the user, and the exit status."""

    def __init__(self, message: object, status: ExitStatus) -> None:
        super().__init__(str(message))
        self.status = status


def _reason(error: Exception) -> object:
    return error.strerror if isinstance(error, OSError) else error


def _load(options: argparse.Namespace) -> tuple[LinuxImage, bytes]:
    """Read the kernel and the initrd; a pipe has to end within the time limit."""
    name = options.kernel
    try:
        image = load_linux(read_file(name, _KERNEL_MAX, options.timeout))
        if options.initrd is None:
            return image, b""
        name = options.initrd
        initrd = read_file(name, options.memory, options.timeout)
        if not initrd:
            raise ImageError("the file is empty")
        check_initrd(initrd)
    except TimeoutError as error:
        raise _BootError(f"{name}: {error.strerror}", ExitStatus.TIMEOUT) from None
    except (ImageError, OSError) as error:
        raise _BootError(f"{name}: {_reason(error)}", ExitStatus.USAGE) from None
    return image, initrd


def _choose(kvm: Kvm, name: str | None) -> PrivateAbi | None:
    """The ABI that --private asks for; None without it."""
    if name is None:
        return None
    try:
        return choose(kvm, None if name == "any" else name)
    except OSError as error:
        message = f"{error.strerror} (`kvmpriv probe` gives details)"
        raise _BootError(message, ExitStatus.UNABLE) from None


def _devices(options: argparse.Namespace, complain: Callable[[str], object]) -> list[VirtioDevice]:
    """Open the devices that the command line asks for."""
    with ExitStack() as stack:
        devices: list[VirtioDevice] = [Entropy()]
        try:
            if options.disk is not None:
                disk = Block(options.disk, complain)
                devices.append(disk)
                stack.callback(disk.close)
            check_root(options.append, options.disk)
        except (OSError, ArgumentError) as error:
            name = options.disk or "--append"
            raise _BootError(f"{name}: {_reason(error)}", ExitStatus.USAGE) from None
        if options.net is not None:
            try:
                tap = Tap(options.net.bridge)
            except OSError as error:
                raise _BootError(error.strerror, ExitStatus.USAGE) from None
            if tap.holder is not None:
                complain(
                    f"the network belongs to process {tap.holder}: enter it with"
                    f" nsenter -t {tap.holder} -U -n"
                )
            stack.callback(tap.close)
            try:
                net = Net(tap, complain, mac=options.net.mac, vhost=options.net.vhost)
            except OSError as error:
                raise _BootError(error.strerror, ExitStatus.USAGE) from None
            devices.append(net)
        stack.pop_all()
    return devices


class _Screen:
    """The console's output on `stream`, and this command's messages on standard error.

    If both go to the same place, a message begins a line of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._together = stream is sys.stderr or (stream.isatty() and sys.stderr.isatty())
        self._in_line = False

    def write(self, data: bytes) -> None:
        """Write what the guest has printed."""
        self._stream.buffer.write(data)
        self._stream.flush()
        self._in_line = not data.endswith(b"\n")

    def say(self, text: str) -> None:
        """Write a message of this command.  It is lost if standard error can't be written."""
        start = "\n" if self._together and self._in_line else ""
        self._in_line = False
        lines = "\n".join(printable(line) for line in text.splitlines())
        with suppress(OSError):  # it must not replace the guest's exit status
            print(f"{start}kvmpriv boot: {lines}", file=sys.stderr, flush=True)


@contextmanager
def _signals() -> Iterator[None]:
    """Make signals that would end the process end the guest: the terminal has to be restored.

    A signal that is ignored stays ignored: nohup(1) does that to SIGHUP.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Interrupted(Outcome("signal", ExitStatus.SIGNALLED + number, name))

    ours = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(options: argparse.Namespace) -> int:
    """Boot the guest that the command line describes; returns the exit status."""
    if options.shell and (sys.stdin is None or not sys.stdin.isatty()):
        message = "--shell needs a terminal as standard input; use --run COMMAND"
        return fail("boot", message, ExitStatus.USAGE)
    screen = _Screen(sys.stderr if options.json else sys.stdout)
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            if options.run is not None or options.shell:
                return _talk(options, screen, stack)
            machine = _open(options, screen, stack)
            _show_layout(machine, screen.say)
            outcome = _run(machine, options, screen)
            if options.json:
                seconds = time.monotonic() - started
                print(json.dumps(_report(machine, outcome, seconds), indent=2))
    except _BootError as refused:
        return fail("boot", str(refused), refused.status)
    except MemoryError:
        return fail("boot", "this process can't get the memory that it needs", ExitStatus.UNABLE)
    sys.stdout.flush()
    if outcome.how in _WORDS:
        screen.say(f"{_WORDS[outcome.how]}: {outcome.why}")
    return outcome.status


class _Parts(NamedTuple):
    """What the guest is made of."""

    image: LinuxImage
    initrd: bytes
    kvm: Kvm
    abi: PrivateAbi | None
    ranges: list[Range]
    devices: list[VirtioDevice]


def _prepare(options: argparse.Namespace, screen: _Screen, stack: ExitStack) -> _Parts:
    """Check the options, and open what they name; `stack` closes KVM.  Raises _BootError."""
    image, initrd = _load(options)
    try:
        check_pin(options.pin, options.cpus)
    except ArgumentError as error:
        raise _BootError(f"--pin: {error}", ExitStatus.USAGE) from None
    try:
        kvm = stack.enter_context(Kvm(options.device))
    except OSError as error:
        raise _BootError(device_error(options.device, error), ExitStatus.UNABLE) from None
    abi = _choose(kvm, options.private)
    try:
        ranges = plan(options.memory, private=abi is not None)
    except ArgumentError as error:
        raise _BootError(f"--memory: {error}", ExitStatus.USAGE) from None
    return _Parts(image, initrd, kvm, abi, ranges, _devices(options, screen.say))


@contextmanager
def _made(options: argparse.Namespace) -> Iterator[None]:
    """Errors of the guest's constructor, as messages for the user."""
    try:
        yield
    except ArgumentError as error:
        raise _BootError(f"{options.kernel}: {error}", ExitStatus.USAGE) from None
    except OSError as error:
        raise _BootError(f"can't make the guest: {error.strerror}", ExitStatus.UNABLE) from None


def _open(options: argparse.Namespace, screen: _Screen, stack: ExitStack) -> LinuxMachine:
    """Make the guest, which `stack` closes.  Raises _BootError."""
    parts = _prepare(options, screen, stack)
    with _made(options):
        machine = LinuxMachine(
            parts.kvm,
            parts.image,
            parts.ranges,
            initrd=parts.initrd,
            cmdline=options.append,
            cpus=options.cpus,
            abi=parts.abi,
            devices=parts.devices,
            complain=screen.say,
            output=screen.write,
            pin=options.pin,
            console=options.console,
        )
    return stack.enter_context(machine)


def _talk(options: argparse.Namespace, screen: _Screen, stack: ExitStack) -> int:
    """Run the command of --run or --shell in the guest; returns the exit status."""
    parts = _prepare(options, screen, stack)
    with _made(options):
        guest = LinuxGuest(
            parts.image,
            initrd=parts.initrd or None,
            memory=options.memory,
            cmdline=" ".join(filter(None, ("quiet", options.append))),
            cpus=options.cpus,
            private=parts.abi.name if parts.abi else False,
            devices=parts.devices,
            lifetime=options.timeout,
            timeout=options.timeout or _READY,
            pin=options.pin,
            complain=screen.say,
            trace=options.trace,
            device=options.device,
        )
    stack.callback(guest.close)
    if options.watch:
        guest.watch(_Watch(guest.machine, screen.say))
    try:
        with _signals(), guest:
            if options.shell:
                print("kvmpriv boot: Ctrl-A x ends the shell", file=sys.stderr)
                return guest.shell()
            with _standard_input() as source:
                process = guest.popen(options.run)
                return relay(process, source, sys.stdout.fileno(), sys.stderr.fileno())
    except Interrupted as interrupted:
        return interrupted.outcome.status
    except GuestDied as died:
        cause = died.__cause__
        if isinstance(cause, OSError):
            _check_trace(options.trace, cause)
        screen.say(str(died))
        return died.outcome.status


@contextmanager
def _standard_input() -> Iterator[Keyboard | None]:
    """Standard input as it is, for a command; None as for `keyboard`."""
    if sys.stdin is None:
        yield None
        return
    fd = sys.stdin.fileno()
    ours = not os.isatty(fd) or os.tcgetpgrp(fd) == os.getpgrp()
    yield Keyboard(fd, escape=False) if ours else None


def _run(machine: LinuxMachine, options: argparse.Namespace, screen: _Screen) -> Outcome:
    try:
        with _signals(), keyboard() as source:
            if source is not None and os.isatty(source.fileno()):
                print(f"kvmpriv boot: {HELP}", file=sys.stderr)
            look = _Watch(machine, screen.say) if options.watch else None
            return machine.run(options.timeout, source, look=look, trace=options.trace)
    except Interrupted as interrupted:  # before the run, or after it
        return interrupted.outcome
    except (OutputError, BrokenPipeError):  # the second: the console, with --json
        raise
    except OSError as error:
        _check_trace(options.trace, error)
        return Outcome("error", ExitStatus.UNABLE, str(error.strerror))


def _check_trace(path: str | None, error: OSError) -> None:
    """_BootError if the error is that the recording can't be created."""
    if path is not None and error.filename == path:
        raise _BootError(f"{path}: {error.strerror}", ExitStatus.USAGE) from None


_WORDS = {
    "error": "the guest can't go on",
    "crash": "the guest crashed",
    "panic": "the guest's kernel panicked",
    "timeout": "the guest was ended",
    "no progress": "the guest makes no progress",
}
_MIB = 1 << 20


class _Watch:
    """Prints what a guest has used since the last call."""

    def __init__(self, machine: LinuxMachine, say: Callable[[str], object]) -> None:
        self._machine = machine
        self._say = say
        self._started = self._last_at = time.monotonic()
        self._last: Cost | None = None

    def __call__(self) -> None:
        now = time.monotonic()
        passed = now - self._last_at
        if passed < 0.1:  # the first call, and the last one soon after another
            return
        cost = self._machine.cost()
        before = self._last.cpu if self._last else (0.0,) * len(cost.cpu)
        busy = " ".join(
            f"{100 * (after - then) / passed:.0f} %"
            for then, after in zip(before, cost.cpu, strict=True)
        )
        exits = (sum(cost.exits) - (sum(self._last.exits) if self._last else 0)) / passed
        self._say(
            f"{now - self._started:.0f} s: vCPUs {busy}, {exits:.0f} exits/s,"
            f" {cost.rss // _MIB} MiB resident ({cost.shared // _MIB} MiB shared with others)"
            + (f", at least {cost.private // _MIB} MiB private" if cost.private else "")
        )
        self._last, self._last_at = cost, now


def _show_layout(machine: LinuxMachine, say: Callable[[str], object]) -> None:
    """Print the ranges of a guest with private memory."""
    if machine.abi is None:
        return
    everything = sum(part.size for part in machine.ranges)
    for part in machine.ranges:
        kind = f"private by {machine.abi.name}" if part.kind == "private" else part.kind
        say(
            f"{part.gpa:#x}…{part.end:#x}: {part.size >> 20}M,"
            f" {100 * part.size / everything:.0f} %, {kind}: {part.purpose}"
        )


def _usage(machine: LinuxMachine) -> list[RangeUse]:
    try:
        return machine.usage()
    except OSError:  # a KVM without statistics
        return []


def _report(machine: LinuxMachine, outcome: Outcome, seconds: float) -> dict[str, object]:
    """The document that --json prints.  Fields may be added; the others stay as they are."""
    image, abi = machine.image, machine.abi
    found = _usage(machine)
    usage = found or [RangeUse(part, -1, -1) for part in machine.ranges]
    everything = sum(part.size for part in machine.ranges)
    cost = machine.cost(found or None)
    memory = [
        {
            **use.range._asdict(),
            "backing": "anonymous memory"
            if abi is None or use.range.kind == "shared"
            else abi.name,
            "share": round(use.range.size / everything, 4),
            "resident": use.resident,
            "private": use.private,
        }
        for use in usage
    ]
    return {
        "schema_version": _SCHEMA_VERSION,
        "kernel": {"kind": image.kind, "version": image.version},
        "cmdline": machine.cmdline,
        "cpus": len(machine.vcpus),
        "private_abi": abi.name if abi else None,
        "memory": memory,
        "cost": cost._asdict(),
        "outcome": outcome._asdict(),
        "seconds": round(seconds, 3),
        "said": machine.said,
    }
