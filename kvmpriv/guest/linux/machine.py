"""The machine that Linux runs on: RAM, interrupt controllers and timer in the kernel, vCPUs with a
thread each, two serial ports, power.

COM1 (ttyS0) is the console.  COM2 (ttyS1) is for what a guest has to tell its script, in lines: the
line ``exit N`` sets the exit status that turning the machine off gives, all others are kept.  A
byte written to port 0xf4 ends the guest at once, as its exit status.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...cdefs import kvm as kvm_h
from ...exit_status import ExitStatus
from ...exits import HypercallExit, exit_name
from ...memory import PAGE_SIZE, HostMemory
from ...private import serve_conversion
from ...stats import StatsFd
from ...threads import VcpuThread
from .. import crash
from ..bare import EXIT_PORT
from ..image import ImageError
from . import acpi, boot_protocol, cpuid, virtio
from .bus import Bus
from .io import IoThread
from .layout import MMIO, GuestMemory, Range, private_cmdline, resident
from .serial import SIZE as SERIAL_SIZE
from .serial import Serial
from .virtio import Transport

if TYPE_CHECKING:
    from ...kvm import Kvm
    from ...private import PrivateAbi
    from ...vcpu import Vcpu
    from .kernel import LinuxImage
    from .virtio import VirtioDevice

__all__ = [
    "CPUS_MAX",
    "DEFAULT_CMDLINE",
    "EXIT_STATUSES",
    "Cost",
    "LinuxMachine",
    "Outcome",
    "RangeUse",
    "check_pin",
]

#: What the kernel is told before the caller's own words: where to print, and to end when it panics.
DEFAULT_CMDLINE = "console=ttyS0 panic=-1"
#: APIC ids of 8 bits; 255 means all of them.
CPUS_MAX = 254

_COM1, _COM2 = (0x3F8, 4), (0x2F8, 3)  # port, interrupt
_VIRTIO_GSI, _VIRTIO_MAX = 16, 8  # the inputs of the IOAPIC that no legacy device has
_KEYBOARD_COMMAND, _PULSE_RESET = 0x64, 0xFE
_TSS_ADDRESS, _IDENTITY_MAP_ADDRESS = 0xFFFBD000, 0xFFFBC000

# struct kvm_run's io and mmio, 32 bytes in: taken in one go, as each exit comes by here.
_UNION = 32
_IO = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset
_MMIO = struct.Struct("<Q8sIB")  # phys_addr, data, len, is_write

_PANIC = b"Kernel panic - not syncing: "
_PANIC_GRACE = 5.0  # seconds that a kernel which does not reset after a panic is listened to
_TICK = 0.02  # seconds from one look at a stream of output to the next
_OUTPUT_MAX = 64 << 10
_SAID_MAX, _SAID_LINE_MAX = 1000, 4096
# A processor that runs the guest has emulated what exits, and no more.  Looked at this often, in
# seconds, until the guest has printed something.
_EMULATED_EVERY, _EMULATED_MIN, _EMULATED_PER_EXIT = 0.5, 20_000, 20

#: How a guest may end, other than by a status of its own -> our exit status.
EXIT_STATUSES = {
    "no progress": ExitStatus.NO_PROGRESS,
    "timeout": ExitStatus.TIMEOUT,
    "crash": ExitStatus.CRASH,
    "panic": ExitStatus.PANIC,
}


class Outcome(NamedTuple):
    """What became of a guest.

    `how`: "exit" (by port 0xf4), "off", "reset", "panic", "crash", "timeout", "no progress".
    """

    how: str
    status: int  # for a shell: 0 to 255
    why: str


class RangeUse(NamedTuple):
    """What a range holds, in bytes.

    `resident`: in host memory that this process can read; of a private range that is the copy that
    nobody uses, 0 when all is well.  `private`: pages mapped into the guest beyond all that is
    resident, and so out of the private file; at least so much, as not all resident is mapped.
    """

    range: Range
    resident: int
    private: int


class Cost(NamedTuple):
    """What this process spends on a guest.

    `rss` and `shared` in bytes (resident in all, and those of it that are shared with a file or
    another process); `cpu` in seconds of processor time, one for each vCPU's thread, `others` all
    other threads; `exits` to user space, one count for each vCPU.
    """

    rss: int
    shared: int
    cpu: tuple[float, ...]
    others: float
    exits: tuple[int, ...]


class Input(Protocol):
    """Where the console's input comes from."""

    def fileno(self) -> int: ...
    def read(self) -> bytes | None:
        """Bytes for the guest; None at the end, or when the user has had enough."""


class _Thread(VcpuThread):
    """A vCPU's thread, on `cpu` alone if that is given; it says when it has ended, however."""

    def __init__(
        self, vcpu: Vcpu, handler: Any, ended: Callable[[], object], cpu: int | None
    ) -> None:
        super().__init__(vcpu, handler)
        self._ended = ended
        self._cpu = cpu
        #: What it has used in all, once it has ended.
        self.seconds = 0.0

    def run(self) -> None:
        if self._cpu is not None:
            os.sched_setaffinity(0, {self._cpu})  # this thread's
        super().run()
        self.seconds = time.thread_time()
        self._ended()


class _Power:
    """The few registers that turn a machine off or reset it."""

    def __init__(self, machine: LinuxMachine, kind: str) -> None:
        self._machine = machine
        self._kind = kind
        self._values = bytearray(8)

    def read(self, offset: int, size: int) -> int:
        if self._kind == "keyboard":
            return 0  # no controller, but nothing to wait for either
        value = int.from_bytes(self._values[offset : offset + size], "little")
        return value | 1 if self._kind == "pm1" and offset == 4 else value  # SCI_EN

    def write(self, offset: int, size: int, value: int) -> None:
        if self._kind == "exit":
            self._machine.end(Outcome("exit", value & 0xFF, "by its exit port"))
        elif self._kind == "keyboard":
            if value == _PULSE_RESET:
                self._machine.reset()
        elif self._kind == "reset":
            if value & acpi.RESET_VALUE == acpi.RESET_VALUE:
                self._machine.reset()
        elif offset < 4:
            if offset >= 2:  # the status half is cleared by writing ones: nothing is ever set
                self._values[offset : offset + size] = value.to_bytes(size, "little")
        elif value == acpi.SLEEP_TYPE_OFF << 10 | acpi.SLEEP_ENABLE | value & 0x3FF:
            self._machine.end(Outcome("off", self._machine.status, "turned off"))
        else:
            self._values[offset : offset + size] = value.to_bytes(size, "little")


def check_pin(pin: Sequence[int], cpus: int) -> None:
    """ValueError where `pin` gives no CPU of this process to each of `cpus` vCPUs; () does."""
    ours = os.sched_getaffinity(0)
    for cpu in pin:
        if cpu not in ours:
            having = ", ".join(map(str, sorted(ours)))
            raise ValueError(f"CPU {cpu} is none of those that this process has: {having}")
    if pin and len(pin) != cpus:
        raise ValueError(f"{len(pin)} CPUs for {cpus} vCPUs: give each one")


class LinuxMachine:
    """A guest with `image` loaded, ready to run.

    `ranges` is its RAM (`layout.plan`), whose private parts are so by `abi`; `cmdline` the words
    behind DEFAULT_CMDLINE; `devices` are closed with it; `complain` is told when one of them stops;
    `output` is given what the guest prints; `record` each exit and conversion, as `trace.Recorder`
    takes them; `pin` says on which of the host's CPUs each vCPU runs.  ImageError names what does
    not fit, ValueError a CPU that is not ours, OSError what KVM refuses; nothing is left behind
    then.
    """

    def __init__(
        self,
        kvm: Kvm,
        image: LinuxImage,
        ranges: Sequence[Range],
        *,
        initrd: bytes = b"",
        cmdline: str = "",
        cpus: int = 1,
        abi: PrivateAbi | None = None,
        devices: Sequence[VirtioDevice] = (),
        complain: Callable[[str], object] = lambda text: None,
        output: Callable[[bytes], object] = lambda data: None,
        record: Callable[..., object] | None = None,
        pin: Sequence[int] = (),
    ) -> None:
        check_pin(pin, cpus)
        self._pin: list[int | None] = [*pin] or [None] * cpus
        self._record = record
        self._exits = [0] * cpus
        self._threads: list[_Thread] = []
        if not 1 <= cpus <= CPUS_MAX:
            raise ImageError(f"{cpus} vCPUs: 1 to {CPUS_MAX} are possible")
        #: The kernel, without its bytes.
        self.image = image._replace(segments=())
        self.ranges = list(ranges)
        bounced = sum(device.bounced for device in devices)
        words = (DEFAULT_CMDLINE, private_cmdline(ranges, bounced), cmdline)
        self.cmdline = " ".join(filter(None, words))
        self._abi = abi
        #: What the guest has said on COM2, line by line, but for ``exit N``.
        self.said: list[str] = []
        #: The exit status for when the guest turns itself off.
        self.status = 0
        self._output = output
        self._pending = bytearray()
        self._alerted = False
        self._drained = threading.Event()
        self._last_line = b""
        self._panic = ""
        self._panicked_at = 0.0
        self._said_line = bytearray()
        self._outcome: Outcome | None = None
        self._io_error: BaseException | None = None
        self._end_lock = threading.Lock()
        self.ports, self.mmio = Bus(), Bus()
        with ExitStack() as stack:
            for device in devices:
                stack.callback(device.close)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self._wake)
            self.vm = stack.enter_context(abi.create_vm(kvm) if abi else kvm.create_vm())
            self._make_memory(stack)
            self.vm.set_tss_addr(_TSS_ADDRESS)
            self.vm.set_identity_map_addr(_IDENTITY_MAP_ADDRESS)
            self.vm.create_irqchip()
            self.vm.create_pit2(kvm_h.KVM_PIT_SPEAKER_DUMMY)
            self._add_devices()
            found = self._add_virtio(devices, complain, stack)
            self._make_cpus(kvm, cpus, stack)
            boot_protocol.load(
                image,
                self.memory,
                self.ranges,
                os.fsencode(self.cmdline),
                initrd,
                rsdp=boot_protocol.TABLES,
            )
            self.memory.write(boot_protocol.TABLES, acpi.tables(boot_protocol.TABLES, cpus, found))
            boot_protocol.enter(image, self.vcpus[0])
            self._stack = stack.pop_all()

    def _make_memory(self, stack: ExitStack) -> None:
        self._backing: list[HostMemory] = []
        for part in self.ranges:
            memory = stack.enter_context(HostMemory(part.size, reserve=part.kind == "shared"))
            self._backing.append(memory)
            if part.kind == "shared":
                self.vm.map(memory, part.gpa)
            elif self._abi is None:
                raise ValueError(f"{part} is private, but by no ABI")
            else:
                file = stack.enter_context(self._abi.create_file(self.vm, part.size))
                self._abi.bind(self.vm, part.gpa, part.size, file, memory=memory)
                self._abi.convert(self.vm, part.gpa, part.size, private=True)
        if self._abi is not None:
            self.vm.enable_cap(kvm_h.KVM_CAP_EXIT_HYPERCALL, 1 << kvm_h.KVM_HC_MAP_GPA_RANGE)
        self.memory = GuestMemory(list(zip(self.ranges, self._backing, strict=True)))

    def _add_devices(self) -> None:
        def line(number: int) -> Callable[[int], None]:
            return lambda level: self.vm.irq_line(number, level)

        self.console = Serial(self._put, line(_COM1[1]))
        self.ports.add(self.console, _COM1[0], SERIAL_SIZE)
        self.ports.add(Serial(self._hear, line(_COM2[1])), _COM2[0], SERIAL_SIZE)
        self.ports.add(_Power(self, "exit"), EXIT_PORT, 1)
        self.ports.add(_Power(self, "keyboard"), _KEYBOARD_COMMAND, 1)
        self.ports.add(_Power(self, "reset"), acpi.RESET_PORT, 1)
        self.ports.add(_Power(self, "pm1"), acpi.PM1_EVENT, 8)

    def _add_virtio(
        self,
        devices: Sequence[VirtioDevice],
        complain: Callable[[str], object],
        stack: ExitStack,
    ) -> list[tuple[int, int, int]]:
        """Put the devices on the bus; returns what the ACPI tables are to say of them."""
        if len(devices) > _VIRTIO_MAX:
            raise ValueError(f"{len(devices)} virtio devices: {_VIRTIO_MAX} are possible")

        def eventfd() -> int:
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, fd)
            return fd

        self._io = IoThread(self._io_failed)
        stack.callback(self._io.close)
        found = []
        for number, device in enumerate(devices):
            base, gsi = MMIO + number * PAGE_SIZE, _VIRTIO_GSI + number
            interrupt = eventfd()
            self.vm.irqfd(interrupt, gsi)
            transport = Transport(
                device,
                self.memory,
                partial(os.eventfd_write, interrupt, 1),
                complain,
                access_platform=self._abi is not None,
            )
            self.mmio.add(transport, base, virtio.SIZE)
            for queue in range(device.queue_count):
                notify = eventfd()
                self.vm.ioeventfd(
                    notify,
                    base + virtio.QUEUE_NOTIFY,
                    4,
                    datamatch=queue,
                    flags=kvm_h.KVM_IOEVENTFD_FLAG_DATAMATCH,
                )
                self._io.add(notify, transport, queue)
            found.append((base, virtio.SIZE, gsi))
        return found

    def _io_failed(self, error: BaseException) -> None:
        self._io_error = error
        self.end(Outcome("crash", EXIT_STATUSES["crash"], f"its devices: {error}"))

    def _make_cpus(self, kvm: Kvm, cpus: int, stack: ExitStack) -> None:
        supported = kvm.get_supported_cpuid()
        deadline = bool(self.vm.check_extension(kvm_h.KVM_CAP_TSC_DEADLINE_TIMER))
        self._kvm_run_size = kvm.get_vcpu_mmap_size()
        self.vcpus: list[Vcpu] = []
        for number in range(cpus):
            vcpu = stack.enter_context(self.vm.create_vcpu(number))
            vcpu.set_cpuid2(cpuid.for_cpu(supported, number, cpus, tsc_deadline=deadline))
            # 0: the host's rate as it is known now.  Without this word it is the rate that was
            # first measured, which KVM may then find to be one that it can't give.
            vcpu.set_tsc_khz(0)
            self.vcpus.append(vcpu)
        self._stats: int | None = None  # a vCPU that runs could not be asked for it any more
        if self.vm.check_extension(kvm_h.KVM_CAP_BINARY_STATS_FD):
            self._stats = self.vcpus[0].ioctl(kvm_h.KVM_GET_STATS_FD)
            stack.callback(os.close, self._stats)

    # -- what the guest does, in its vCPUs' threads --------------------------------------------

    def _serve(self, number: int, vcpu: Vcpu) -> Callable[[Vcpu, int], Outcome | None]:
        exits, record = self._exits, self._record
        raw = memoryview(kvm_h.ffi.buffer(vcpu.kvm_run, self._kvm_run_size)).cast("B")
        io_of, mmio_of = _IO.unpack_from, _MMIO.unpack_from
        read_port, write_port = self.ports.read, self.ports.write
        read_mmio, write_mmio = self.mmio.read, self.mmio.write

        def serve(vcpu: Vcpu, reason: int) -> Outcome | None:
            exits[number] += 1
            if reason == kvm_h.KVM_EXIT_IO:
                direction, size, port, count, at = io_of(raw, _UNION)
                if direction and size == count == 1:  # most of all, a console being written to
                    write_port(port, 1, raw[at])
                    return self._outcome
                for _ in range(count):
                    if direction:
                        write_port(port, size, _int(raw[at : at + size], "little"))
                    else:
                        value = read_port(port, size) & (1 << 8 * size) - 1
                        raw[at : at + size] = value.to_bytes(size, "little")
                    at += size
            elif reason == kvm_h.KVM_EXIT_MMIO:
                address, data, size, is_write = mmio_of(raw, _UNION)
                if is_write:
                    write_mmio(address, size, _int(data[:size], "little"))
                else:
                    value = read_mmio(address, size) & (1 << 8 * size) - 1
                    raw[_UNION + 8 : _UNION + 8 + size] = value.to_bytes(size, "little")
            else:
                self._other_exit(number, vcpu, reason)
            return self._outcome

        def recorded(vcpu: Vcpu, reason: int) -> Outcome | None:
            assert record is not None
            where: dict[str, int | bool] = {}
            if reason == kvm_h.KVM_EXIT_IO:
                direction, _, port, *_ = io_of(raw, _UNION)
                where = {"port": port, "write": bool(direction)}
            elif reason == kvm_h.KVM_EXIT_MMIO:
                address, *_, is_write = mmio_of(raw, _UNION)
                where = {"gpa": address, "write": bool(is_write)}
            record(cpu=number, exit=exit_name(reason), **where)
            return serve(vcpu, reason)

        return serve if record is None else recorded

    def _record_conversion(self, number: int, vcpu: Vcpu, exit_: Any) -> None:
        """A conversion that has been served; a fault is none where KVM goes by its own state."""
        assert self._record is not None
        assert self._abi is not None
        if isinstance(exit_, HypercallExit):
            if vcpu.kvm_run.hypercall.ret != 0:
                return
            gpa, size = exit_.args[0], exit_.args[1] * PAGE_SIZE
            private, by = bool(exit_.args[2] & kvm_h.KVM_MAP_GPA_RANGE_ENCRYPTED), "hypercall"
        elif self._abi.ACCESS_FOLLOWS_STATE:
            return
        else:
            gpa, size, private, by = exit_.gpa, exit_.size, exit_.private, "fault"
        kind = "private" if private else "shared"
        self._record(cpu=number, convert=kind, gpa=gpa, size=size, by=by)

    def _other_exit(self, number: int, vcpu: Vcpu, reason: int) -> None:
        """An exit that no guest in good health causes, or a conversion."""
        if reason == kvm_h.KVM_EXIT_SYSTEM_EVENT and vcpu.kvm_run.system_event.type in (
            kvm_h.KVM_SYSTEM_EVENT_SHUTDOWN,
            kvm_h.KVM_SYSTEM_EVENT_RESET,
        ):
            self.reset()
            return
        exit_ = vcpu.exit()
        if self._abi is not None and serve_conversion(self._abi, self.vm, vcpu, exit_):
            if self._record is not None:
                self._record_conversion(number, vcpu, exit_)
            return
        why = crash.describe_exit(exit_)
        if reason != kvm_h.KVM_EXIT_FAIL_ENTRY:
            why = crash.report(vcpu, self._backing[0], why)
        self.end(Outcome("crash", EXIT_STATUSES["crash"], f"vCPU {vcpu.vcpu_id}: {why}"))

    def _put(self, value: int) -> None:
        """A byte of the console: only the thread in `run` writes to the outside."""
        self._pending.append(value)
        if not self._alerted:
            self._alerted = True
            os.eventfd_write(self._wake, 1)
        while len(self._pending) >= _OUTPUT_MAX and self._outcome is None:
            self._drained.clear()
            self._drained.wait(0.05)

    def _hear(self, value: int) -> None:
        """A byte on COM2."""
        if value not in b"\r\n":
            if len(self._said_line) < _SAID_LINE_MAX:
                self._said_line.append(value)
            return
        line = self._said_line.decode(errors="backslashreplace").strip()
        self._said_line.clear()
        word, _, number = line.partition(" ")
        if word == "exit" and number.isdecimal() and len(number) < 4:
            self.status = int(number) & 0xFF
        elif line and len(self.said) < _SAID_MAX:
            self.said.append(line)

    def reset(self) -> None:
        """The guest resets itself: over, too."""
        self.end(Outcome("reset", self.status, "reset itself"))

    def end(self, outcome: Outcome) -> None:
        """Let the guest be over; the first word counts."""
        with self._end_lock:
            if self._outcome is None:
                self._outcome = outcome
        self._alert()

    def _alert(self) -> None:
        with suppress(OSError):  # closed: nobody waits any more
            os.eventfd_write(self._wake, 1)

    # -- what its user does, in the thread that calls run --------------------------------------

    def run(
        self,
        timeout: float | None = None,
        source: Input | None = None,
        *,
        look: Callable[[], object] | None = None,
        every: float = 1.0,
    ) -> Outcome:
        """Run until the guest ends, for `timeout` seconds at most.

        `source` gives the console's input; `look` is called now and then: at the beginning and the
        end, and in between each `every` seconds.  Raises what `output`, `source` and `look` raise,
        and OSError where KVM can't go on; the vCPUs have stopped then, too.
        """
        started = time.monotonic()
        deadline = float("inf") if timeout is None else started + timeout
        threads = self._threads = [
            _Thread(vcpu, self._serve(number, vcpu), self._alert, self._pin[number])
            for number, vcpu in enumerate(self.vcpus)
        ]
        try:
            self._io.start()
            for thread in threads:
                thread.start()
            self._watch(threads, started, deadline, source, (look, every) if look else None)
        finally:
            # A thread that waits for room for its output must see that it is over.
            self.end(Outcome("crash", EXIT_STATUSES["crash"], "ended from outside"))
            self._drained.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.stop()
            self._io.stop()
        if look is not None:
            look()
        for thread in threads:
            thread.result()
        if self._io_error is not None:
            raise self._io_error
        self._flush()
        assert self._outcome is not None
        # A kernel that has panicked resets, by whatever way works.
        over = self._panic and self._outcome.how in ("reset", "crash")
        return self._panic_outcome() if over else self._outcome

    def _watch(
        self,
        threads: list[_Thread],
        started: float,
        deadline: float,
        source: Input | None,
        look: tuple[Callable[[], object], float] | None,
    ) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        listening = False
        check_at = started + _EMULATED_EVERY
        look_at = started if look else float("inf")
        while self._outcome is None and all(thread.is_alive() for thread in threads):
            if source is not None and listening != (self.console.pending() < _OUTPUT_MAX):
                listening = not listening
                if listening:
                    poll.register(source.fileno(), select.POLLIN)
                else:
                    poll.unregister(source.fileno())
            now = time.monotonic()
            if look and now >= look_at:
                look[0]()
                look_at = now + look[1]
            until = min(deadline, check_at, look_at)
            if self._alerted:
                until = min(until, now + _TICK)
            if self._panic:
                until = min(until, self._panicked_at + _PANIC_GRACE)
            if source is not None and not listening:
                until = min(until, now + 0.05)  # nothing tells us that the guest has read
            wait = None if until == float("inf") else max(0.0, until - now) * 1000
            ready = [fd for fd, _ in poll.poll(wait)]
            if self._wake in ready:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            if source is not None and listening and source.fileno() in ready:
                data = source.read()
                if data is None:
                    poll.unregister(source.fileno())
                    source = None
                else:
                    self.console.receive(data)
            self._flush_or_rest()
            self._judge(time.monotonic(), deadline, check_at)
            if time.monotonic() >= check_at:
                check_at = float("inf") if self._last_line else check_at + _EMULATED_EVERY

    def _flush_or_rest(self) -> None:
        if self._pending:
            self._flush()
        else:
            self._alerted = False
            if self._pending:  # it came before it could see that we rest
                self._alerted = True

    def _flush(self) -> None:
        size = len(self._pending)
        data = bytes(self._pending[:size])
        del self._pending[:size]
        self._drained.set()
        if not data:
            return
        self._look_for_panic(data)
        self._output(data)

    def _look_for_panic(self, data: bytes) -> None:
        if self._panic:
            return
        lines = self._last_line + data
        at = lines.find(_PANIC)
        if at >= 0 and b"\n" in lines[at:]:
            self._panic = lines[at:].split(b"\n", 1)[0].decode(errors="replace").strip()
            self._panicked_at = time.monotonic()
        self._last_line = lines[max(0, at) if at >= 0 else -len(_PANIC) :][-_SAID_LINE_MAX:]

    def _panic_outcome(self) -> Outcome:
        return Outcome("panic", EXIT_STATUSES["panic"], self._panic)

    def _judge(self, now: float, deadline: float, check_at: float) -> None:
        if now >= deadline:
            self.end(Outcome("timeout", EXIT_STATUSES["timeout"], "its time is up"))
        elif self._panic and now >= self._panicked_at + _PANIC_GRACE:
            self.end(self._panic_outcome())
        elif now >= check_at and (emulated := self._emulated()):
            self.end(Outcome("no progress", EXIT_STATUSES["no progress"], emulated))

    def _emulated(self) -> str:
        """Whether this KVM emulates the guest's kernel, instruction by instruction: what it says.

        Paravirtual ones do where a kernel does not know of them: it would take hours to boot.
        """
        if self._stats is None:
            return ""
        with StatsFd(os.dup(self._stats)) as stats:
            values = stats.read()
        emulated, exits = values.get("insn_emulation", 0), values.get("exits", 0)
        assert isinstance(emulated, int)
        assert isinstance(exits, int)
        if emulated > max(_EMULATED_MIN, _EMULATED_PER_EXIT * exits):
            return (
                f"this KVM emulates a kernel's instructions one by one ({emulated} of them in"
                f" {exits} exits so far), as a paravirtual KVM does: Linux can't run"
            )
        return ""

    # -- what it costs -------------------------------------------------------------------------

    def usage(self) -> list[RangeUse]:
        """What each range holds now.  OSError where KVM has no statistics."""
        held = [resident(memory) for memory in self._backing]
        with self.vm.get_stats_fd() as stats:
            values = stats.read()
        mapped = 0
        for name, size in (("pages_4k", PAGE_SIZE), ("pages_2m", 2 << 20), ("pages_1g", 1 << 30)):
            count = values.get(name, 0)
            assert isinstance(count, int)
            mapped += count * size
        shared = sum(
            size for part, size in zip(self.ranges, held, strict=True) if part.kind == "shared"
        )
        return [
            RangeUse(part, size, min(part.size, max(0, mapped - shared)))
            if part.kind == "private"
            else RangeUse(part, size, 0)
            for part, size in zip(self.ranges, held, strict=True)
        ]

    def cost(self) -> Cost:
        """What this process has spent so far."""
        import psutil

        process = psutil.Process()
        memory = process.memory_info()
        used = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
        cpu = tuple(
            thread.seconds or used.pop(thread.native_id or 0, 0.0) for thread in self._threads
        )
        return Cost(memory.rss, memory.shared, cpu, sum(used.values()), tuple(self._exits))

    def search(self, needle: bytes) -> list[int]:
        """The guest physical addresses at which the host sees `needle`, in all of the guest's RAM.

        In private ranges that is the copy which is not the guest's.
        """
        found = []
        for part, memory in zip(self.ranges, self._backing, strict=True):
            at = memory.find(needle)
            while at >= 0:
                found.append(part.gpa + at)
                at = memory.find(needle, at + 1)
        return found

    def close(self) -> None:
        """End the guest and give its memory back."""
        self._stack.close()

    def __enter__(self) -> LinuxMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_int = int.from_bytes
