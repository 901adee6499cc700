"""The machine that Linux runs on.

It has RAM, interrupt controllers and a timer in the kernel, a thread for each vCPU, virtio devices,
two serial ports and a few ports for power:

====== ===========================================================================================
0x3f8  COM1 (ttyS0), the console, or its first lines
0x2f8  COM2 (ttyS1), for reports to the script: see `LinuxMachine.said` and `LinuxMachine.status`
0xf4   a byte written here ends the guest at once, with that exit status
0x64   the keyboard controller's reset pulse (0xfe) resets the machine
0x600  ACPI's power management registers (8 ports), which turn the machine off
0xcf9  ACPI's reset register
====== ===========================================================================================
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from ...cdefs import kvm as kvm_h
from ...errors import ArgumentError
from ...fd import Fd
from ...memory import PAGE_SIZE, HostMemory
from ...private import PrivateVm
from ..bare import EXIT_PORT
from . import acpi, boot_protocol, cpuid, virtio
from .bus import Bus
from .device import Device, InterruptLine, check_interrupt, check_mmio, check_port
from .dispatch import Dispatcher, GuestThread
from .io import IoThread
from .layout import MMIO, VIRTIO_MAX, GuestMemory, Range, private_cmdline, resident
from .outcome import Ending, Interrupted, Outcome, crashed
from .pause import Gate
from .port import Console
from .power import add_power
from .said import Said
from .serial import SIZE as SERIAL_SIZE
from .serial import Serial
from .supervisor import Input, Periodic, Supervisor
from .usage import Cost, RangeUse, emulation, mapped_bytes, measure_cost, range_use
from .virtio import Transport, VirtioDevice, Wires

if TYPE_CHECKING:
    from ...kvm import Kvm
    from ...private import PrivateAbi
    from ...stats import StatsFd
    from ...vcpu import Vcpu
    from ...vm import Vm
    from .dispatch import Record
    from .kernel import LinuxImage
    from .recording import RunRecorder

__all__ = ["CONSOLES", "CPUS_MAX", "DEFAULT_CMDLINE", "LinuxMachine", "check_pin"]

#: The command line begins with this: to reset at once after a panic, and where to print.  The
#: kernel prints on ttyS0 until it has the virtio console.
CONSOLES = {
    "serial": "console=ttyS0 panic=-1",
    "virtio": "earlycon=uart8250,io,0x3f8 console=hvc0 panic=-1",
}
DEFAULT_CMDLINE = CONSOLES["serial"]
#: APIC ids have 8 bits, and 255 addresses all vCPUs.
CPUS_MAX = 254

_COM1, _COM2 = (0x3F8, 4), (0x2F8, 3)  # port, interrupt
# Inputs of the IOAPIC that no other device uses: 13 was that of a separate FPU.
_VIRTIO_GSIS = (*range(16, 24), 13)
_TSS_ADDRESS, _IDENTITY_MAP_ADDRESS = 0xFFFBD000, 0xFFFBC000


def check_pin(pin: Sequence[int], cpus: int) -> None:
    """ArgumentError unless `pin` is empty or lists a CPU of this process for each of `cpus` vCPUs.

    A CPU may be listed several times.
    """
    available = os.sched_getaffinity(0)
    for cpu in pin:
        if cpu not in available:
            listed = ", ".join(map(str, sorted(available)))
            raise ArgumentError(f"CPU {cpu} is not available to this process (available: {listed})")
    if pin and len(pin) != cpus:
        ours, theirs = _count(len(pin), "CPU"), _count(cpus, "vCPU")
        raise ArgumentError(f"{ours} for {theirs}: list one CPU for each vCPU")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


class LinuxMachine:
    """A Linux guest, ready to run.

    `image`: the kernel, from `load_linux`.
    `ranges`: the guest's RAM, from `plan`.
    `initrd`: the initial root file system; `initrd.busybox` makes one.
    `cmdline`: what the kernel's command line contains after DEFAULT_CMDLINE.
    `cpus`: the number of vCPUs, 1 to CPUS_MAX.
    `abi`: the ABI for the private ranges; needed if there are any.
    `devices`: at most 9 virtio devices.  The machine owns them: it closes them, also when it can't
    be made.
    `output`: called with the bytes that the guest prints, in the thread that calls `run`.
    `complain`: called with a line of text when a device stops, from any thread.
    `pin`: for each vCPU the CPU of the host that it runs on; empty: any.
    `console`: "serial", or "virtio": a virtio console, once the kernel has it.  It is much faster,
    and takes the place of a virtio device; the kernel needs CONFIG_VIRTIO_MMIO and
    CONFIG_VIRTIO_CONSOLE, built in.

    ImageError names what does not fit into memory, ArgumentError any other argument that can't be
    used, OSError what KVM refuses.
    """

    #: The kernel, without its bytes.
    image: LinuxImage
    #: The guest's RAM.
    ranges: list[Range]
    #: The kernel's whole command line.
    cmdline: str
    #: The ABI of the private ranges.
    abi: PrivateAbi | None
    #: The shared RAM, by guest physical address.
    memory: GuestMemory
    #: The vCPUs, by vCPU id.
    vcpus: list[Vcpu]
    #: The port I/O bus; `add_device` checks more than its `add`.
    ports: Bus
    #: The same for device memory (MMIO), by guest physical address.
    mmio: Bus
    #: The console.  `console.receive(data)` types `data` in the guest; it may be called from any
    #: thread.
    console: Serial | Console

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
        pin: Sequence[int] = (),
        console: str = "serial",
    ) -> None:
        with ExitStack() as stack:
            for device in devices:
                stack.callback(device.close)
            if console not in CONSOLES:
                raise ArgumentError(f"console must be 'serial' or 'virtio', not {console!r}")
            check_pin(pin, cpus)
            if not 1 <= cpus <= CPUS_MAX:
                raise ArgumentError(f"a guest can have 1 to {CPUS_MAX} vCPUs, not {cpus}")
            most = VIRTIO_MAX - (console == "virtio")
            if len(devices) > most:
                raise ArgumentError(
                    f"a guest can have up to {most} virtio devices, not {len(devices)}"
                )
            self._pin: list[int | None] = [*pin] or [None] * cpus
            self._exits: list[defaultdict[int, int]] = [defaultdict(int) for _ in range(cpus)]
            self._gate = Gate()
            self._began = self._ended = 0.0
            self._used: list[RangeUse] = []  # at the end
            self._threads: list[GuestThread] = []
            self._io_error: BaseException | None = None
            self._complain = complain
            self._mark: Record | None = None  # of the recording, while there is one
            self._said = Said()
            self.image = image._replace(segments=())
            self.ranges = list(ranges)
            self.abi = abi
            self._first_words, self._own_words = CONSOLES[console], cmdline
            if "quiet" in cmdline.split() and console == "virtio":
                # The early console prints what there is when the kernel comes to its word.
                self._first_words = f"quiet {self._first_words}"
            self._bounced = 0
            self._virtio: list[tuple[int, int, int]] = []  # address, size and interrupt of each
            self._transports: list[Transport] = []
            self._interrupts: list[int] = []  # of devices that are not virtio devices
            self._ending = Ending()
            stack.callback(self._ending.close)
            self._supervisor = Supervisor(self._ending, output, self._stuck)
            self.vm: Vm = stack.enter_context(abi.create_vm(kvm) if abi else kvm.create_vm())
            self._make_memory(stack)
            self.vm.set_tss_addr(_TSS_ADDRESS)
            self.vm.set_identity_map_addr(_IDENTITY_MAP_ADDRESS)
            self.vm.create_irqchip()
            self.vm.create_pit2(kvm_h.KVM_PIT_SPEAKER_DUMMY)
            self.ports, self.mmio = Bus(), Bus()
            self._add_ports()
            self._io = IoThread(self._io_failed, self._gate)
            stack.callback(self._io.close)
            for device in devices:
                self._add_virtio(device, stack)
            if console == "virtio":
                self._add_console(stack)
            self.cmdline = self._whole_cmdline()
            self._dispatcher = Dispatcher(
                self.vm,
                self._ending,
                self.ports,
                self.mmio,
                low_memory=self._backing[0],
                reset=self.reset,
            )
            self._make_cpus(kvm, cpus, stack)
            boot_protocol.load(
                image,
                self.memory,
                self.ranges,
                os.fsencode(self.cmdline),
                initrd,
                rsdp=boot_protocol.TABLES,
            )
            self._describe_virtio()
            boot_protocol.enter(image, self.vcpus[0])
            self._stack = stack.pop_all()

    # -- assembly ------------------------------------------------------------------------------

    def _make_memory(self, stack: ExitStack) -> None:
        self._backing: list[HostMemory] = []
        for part in self.ranges:
            if part.kind == "shared":
                memory = stack.enter_context(HostMemory(part.size))
                self.vm.map(memory, part.gpa)
            elif not isinstance(self.vm, PrivateVm):
                raise ArgumentError(f"{part} is private: pass the ABI for it as `abi`")
            else:
                slot = self.vm.add_private_memory(part.gpa, part.size)
                assert slot.memory is not None
                memory = slot.memory
            self._backing.append(memory)
        if self.abi is not None:
            self.vm.enable_cap(kvm_h.KVM_CAP_EXIT_HYPERCALL, 1 << kvm_h.KVM_HC_MAP_GPA_RANGE)
        self.memory = GuestMemory(list(zip(self.ranges, self._backing, strict=True)))

    def _add_ports(self) -> None:
        def serial(output: Callable[[int], object], port: int, irq: int, name: str) -> Serial:
            made = Serial(output, lambda level: self.vm.irq_line(irq, level))
            self.ports.add(made, port, SERIAL_SIZE, name)
            return made

        self.console = serial(self._supervisor.put, *_COM1, "console (COM1)")
        serial(self._said.put, *_COM2, "reports (COM2)")
        add_power(
            self.ports,
            EXIT_PORT,
            leave=lambda status: self.end(Outcome("exit", status, f"wrote to port {EXIT_PORT:#x}")),
            turn_off=lambda: self.end(Outcome("off", self.status, "turned itself off")),
            reset=self.reset,
        )

    def _add_virtio(self, device: VirtioDevice, stack: ExitStack) -> None:
        """Put a virtio device on the MMIO bus; `stack` closes what that takes."""

        def eventfd() -> int:
            made = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            stack.callback(made.close)
            return made.fileno()

        number = len(self._virtio)
        base, gsi = MMIO + number * PAGE_SIZE, _VIRTIO_GSIS[number]
        wires = Wires(eventfd(), [eventfd() for _ in range(device.queue_count)])
        self.vm.irqfd(wires.interrupt, gsi)
        page: HostMemory | None = stack.enter_context(HostMemory(PAGE_SIZE))
        taken = [(fd, virtio.QUEUE_NOTIFY, queue) for queue, fd in enumerate(wires.notify)]
        try:
            # The guest reads the registers without an exit.  The acknowledgement of an interrupt
            # does not exit to this process either: KVM signals an eventfd that no thread reads.
            assert page is not None
            self.vm.map(page, base, flags=kvm_h.KVM_MEM_READONLY)
            taken.append((eventfd(), virtio.INTERRUPT_ACKNOWLEDGE, virtio.USED_BUFFER))
        except OSError:  # a KVM without such memory: reads and acknowledgements exit
            page = None
        transport = Transport(
            device,
            self.memory,
            partial(os.eventfd_write, wires.interrupt, 1),
            self._complained,
            access_platform=self.abi is not None,
            wires=wires,
            page=page,
            changed=self._io.kick,
        )
        stack.callback(transport.close)  # while its memory and its eventfds are there
        self.mmio.add(transport, base, virtio.SIZE, device.name)
        for fd, register, value in taken:
            matches = kvm_h.KVM_IOEVENTFD_FLAG_DATAMATCH
            self.vm.ioeventfd(fd, base + register, 4, datamatch=value, flags=matches)
        for queue, notify in enumerate(wires.notify):
            self._io.add(notify, transport, queue)
        if device.own_fd >= 0:
            self._io.watch(device.own_fd, device.own_ready)
        self._transports.append(transport)
        self._virtio.append((base, virtio.SIZE, gsi))
        self._bounced += device.bounced

    def _add_console(self, stack: ExitStack) -> None:
        supervisor = self._supervisor
        self.console = made = Console(supervisor.put_all, supervisor.has_room)
        stack.callback(made.close)
        supervisor.drained = made.alert
        self._add_virtio(made, stack)

    def _whole_cmdline(self, more_bounced: int = 0) -> str:
        private = private_cmdline(self.ranges, self._bounced + more_bounced)
        return " ".join(filter(None, (self._first_words, private, self._own_words)))

    def _describe_virtio(self) -> None:
        """Write the tables that tell the kernel where its devices are."""
        tables = acpi.tables(boot_protocol.TABLES, len(self.vcpus), self._virtio)
        self.memory.write(boot_protocol.TABLES, tables)

    def add_device(
        self,
        device: Device | VirtioDevice,
        *,
        port: int | None = None,
        mmio: int | None = None,
        size: int | None = None,
        irq: int | None = None,
    ) -> None:
        """Add a device of your own, before `run`; the machine closes it in the end.

        A `Device` has `size` ports from `port` on, or `size` bytes of device memory at the guest
        physical address `mmio`; `irq` is its interrupt line, one of `device.INTERRUPTS`.  For a
        `VirtioDevice` the machine chooses all of that.

        ArgumentError for addresses or a line that another device has or that can't be used, and
        for a ninth virtio device; RuntimeError once the machine has run.  The device stays its
        caller's then.
        """
        if self._began:
            raise RuntimeError("the guest has been started: add devices before that")
        with ExitStack() as stack:
            if isinstance(device, VirtioDevice):
                if (port, mmio, size, irq) != (None,) * 4:
                    raise ArgumentError(
                        "a virtio device has no port, mmio, size or irq of its caller: the machine"
                        " chooses them"
                    )
                if len(self._virtio) == VIRTIO_MAX:
                    raise ArgumentError(
                        f"a guest can have up to {VIRTIO_MAX} virtio devices, not one more"
                    )
                cmdline = self._whole_cmdline(device.bounced)
                boot_protocol.write_cmdline(self.image, self.memory, os.fsencode(cmdline))
                self.cmdline = cmdline
                self._add_virtio(device, stack)
                self._describe_virtio()
            else:
                self._add_own(device, port, mmio, size, irq, stack)
            stack.callback(device.close)
            self._stack.push(stack.pop_all().__exit__)

    def _add_own(
        self,
        device: Device,
        port: int | None,
        mmio: int | None,
        size: int | None,
        irq: int | None,
        stack: ExitStack,
    ) -> None:
        if size is None or (port is None) == (mmio is None):
            raise ArgumentError("a device needs port and size, or mmio and size")
        line: InterruptLine | None = None
        if irq is not None:
            check_interrupt(irq, self._interrupts)
            line = InterruptLine()
            stack.callback(line.close)
            line.attach(self.vm.irqfd, irq)
        if port is not None:
            check_port(port, size)
            self.ports.add(device, port, size, device.name)
        else:
            assert mmio is not None
            check_mmio(mmio, size, self.ranges)
            self.mmio.add(device, mmio, size, device.name)
        if irq is not None:
            self._interrupts.append(irq)
        device.line = line

    def _complained(self, text: str) -> None:
        """A device complains: tell the caller, and record it."""
        self.mark(text)
        self._complain(text)

    def _io_failed(self, error: BaseException) -> None:
        self._io_error = error
        self.end(crashed(f"a device failed: {error}"))

    def _make_cpus(self, kvm: Kvm, cpus: int, stack: ExitStack) -> None:
        supported = kvm.get_supported_cpuid()
        deadline = bool(self.vm.check_extension(kvm_h.KVM_CAP_TSC_DEADLINE_TIMER))
        self._kvm_run_size = kvm.get_vcpu_mmap_size()
        self.vcpus = []
        for number in range(cpus):
            vcpu = stack.enter_context(self.vm.create_vcpu(number))
            vcpu.set_cpuid2(cpuid.for_cpu(supported, number, cpus, tsc_deadline=deadline))
            # 0: the host's rate as it is known now.  Without this call it is the rate that was
            # measured first, which KVM may later find that it can't provide.
            vcpu.set_tsc_khz(0)
            self.vcpus.append(vcpu)
        # Opened now: a vCPU that runs can't be asked for its statistics.
        self._vcpu_stats: StatsFd | None = None
        if self.vm.check_extension(kvm_h.KVM_CAP_BINARY_STATS_FD):
            self._vcpu_stats = stack.enter_context(self.vcpus[0].get_stats_fd())

    def _stuck(self) -> str:
        """Why the guest will make no progress; "" if it may."""
        if self._vcpu_stats is None:
            return ""
        return emulation(self._vcpu_stats.read())

    # -- running -------------------------------------------------------------------------------

    @property
    def said(self) -> list[str]:
        """The lines that the guest has written to COM2 (ttyS1), without those that set `status`.

        At most 1000 lines of at most 4096 bytes are kept.
        """
        return self._said.lines

    @property
    def status(self) -> int:
        """The exit status, 0 to 255, of a guest that turns itself off or resets.

        The guest sets it by the line ``exit N`` on COM2; 0 until then.
        """
        return self._said.status

    def mark(self, text: str) -> None:
        """Mark this moment of the recording with `text`; without effect without a recording."""
        if self._mark is not None:
            self._mark(mark=text)

    def reset(self) -> None:
        """End the guest as one that reset itself.  Callable from any thread."""
        self.end(Outcome("reset", self.status, "reset itself"))

    def end(self, outcome: Outcome) -> None:
        """End the guest: `run` stops the vCPUs and returns `outcome`, or an earlier one.

        Callable from any thread and from signal handlers, and without effect after the end.
        """
        self._ending.end(outcome)

    @property
    def paused(self) -> bool:
        """Whether the guest is paused."""
        return self._gate.closed

    def pause(self) -> None:
        """Stop all vCPUs and devices where they are, until `resume`.

        Returns when each vCPU has left the guest: memory and registers don't change any more.
        Timers of the guest, its clocks and the time limit of `run` go on.  Without effect if the
        guest is paused or has ended; before `run`, the guest starts paused.  RuntimeError in a
        thread of the guest (a device, an exit's handler), which would wait for itself.
        """
        self._supervisor.unlimited = True  # or a vCPU might wait for room for its output
        try:
            started = [each for each in (self._io, *self._threads) if each.ident is not None]
            self._gate.shut(started, self._kick)
            for transport in self._transports:
                transport.pause()
        finally:
            self._supervisor.unlimited = False

    def _kick(self) -> None:
        self._io.kick()
        for thread in self._threads:
            thread.kick()

    def resume(self) -> None:
        """Let the vCPUs and devices of a paused guest go on; without effect if it is not paused.

        A guest with a paravirtual clock is told that it was stopped, so that its watchdogs do not
        complain.
        """
        if not self.paused:
            return
        for vcpu in self.vcpus:
            with suppress(OSError, ValueError):  # without such a clock, or closed
                vcpu.kvmclock_ctrl()
        for transport in self._transports:
            transport.resume()
        self._gate.open()

    def run(
        self,
        timeout: float | None = None,
        source: Input | None = None,
        *,
        trace: str | os.PathLike[str] | None = None,
        look: Callable[[], object] | None = None,
        every: float = 1.0,
    ) -> Outcome:
        """Run until the guest ends, or for `timeout` seconds.

        `source` gives the console's input.  `trace` is a file to record the run in; ``kvmpriv
        trace FILE`` shows it.  `look` is called at the beginning, each `every` seconds, and at the
        end.

        OSError if KVM can't go on or the file can't be created; what `output`, `source` and `look`
        raise is raised here.  The vCPUs have stopped then, too.
        """
        calls = [Periodic(look, every)] if look is not None else []
        with ExitStack() as stack:
            recorder: RunRecorder | None = None
            if trace is not None:
                from .recording import RunRecorder

                recorder = RunRecorder(trace, self, self._complain)
                stack.callback(recorder.close)
                self._supervisor.observe = recorder.printed
                calls.append(Periodic(recorder.sample, recorder.SAMPLE_EVERY))
            try:
                outcome = self._run(timeout, source, calls, recorder)
            except Interrupted as interrupted:
                outcome = interrupted.outcome
            except BaseException as error:
                if recorder is not None:
                    recorder.end(Outcome("error", 1, f"{type(error).__name__}: {error}"))
                raise
            if recorder is not None:
                recorder.end(outcome)
        return outcome

    def _run(
        self,
        timeout: float | None,
        source: Input | None,
        calls: Sequence[Periodic],
        recorder: RunRecorder | None,
    ) -> Outcome:
        record = self._mark = recorder.event if recorder is not None else None
        threads = self._threads = [
            GuestThread(
                vcpu,
                self._dispatcher.handler(vcpu, self._kvm_run_size, self._exits[number], record),
                self._ending.alert,
                self._pin[number],
                self._gate,
            )
            for number, vcpu in enumerate(self.vcpus)
        ]
        self._began = time.monotonic()
        try:
            self._io.start()
            for thread in threads:
                thread.start()
            self._supervisor.watch(
                lambda: any(thread.over for thread in threads),
                self.console,
                source,
                timeout,
                calls,
            )
        finally:
            # Last in, first out.  All of them are called, also if a second signal's handler raises.
            with ExitStack() as stops:
                stops.callback(self._supervisor.flush)  # what the guest printed until its end
                for transport in self._transports:
                    stops.callback(transport.pause)  # a data path in the kernel stops, too
                stops.callback(self._io.stop)
                for thread in threads:
                    if thread.ident is not None:
                        stops.callback(thread.stop)
                # Of a guest that is paused no vCPU runs on before it is stopped.
                stops.callback(self._gate.open)
                for thread in threads:
                    stops.callback(thread.stop_soon)
                # A vCPU that waits for room for its output must see that the guest has ended.
                stops.callback(self._supervisor.release)
                stops.callback(self.end, crashed("ended by the caller"))
        self._ended = time.monotonic()
        for periodic in calls:
            periodic.call()
        for thread in threads:
            thread.result()
        if self._io_error is not None:
            raise self._io_error
        assert self._ending.outcome is not None
        return self._supervisor.judge(self._ending.outcome)

    # -- what it uses --------------------------------------------------------------------------

    def usage(self) -> list[RangeUse]:
        """What each range uses now.  OSError where KVM has no statistics."""
        mapped = mapped_bytes(self.vm.stats())
        return range_use(self.ranges, [resident(memory) for memory in self._backing], mapped)

    def _measure_use(self) -> list[RangeUse]:
        try:
            return self.usage()
        except OSError:
            return range_use(self.ranges, [resident(memory) for memory in self._backing], 0)

    def cost(self, usage: Sequence[RangeUse] | None = None) -> Cost:
        """What this process has spent so far; after `close` it is what it has spent in all.

        `usage`: what `usage` has just returned, for a caller that needs both.
        """
        if usage is None:
            usage = self._used or self._measure_use()
        until = self._ended or time.monotonic()
        wall = until - self._began if self._began else 0.0
        return measure_cost(self._threads, self._exits, self._io, wall, usage)

    def search(self, needle: bytes) -> list[int]:
        """The guest physical addresses at which this process can read `needle`, in all RAM.

        Of a private range this searches what the host can read: the shared pages.
        """
        found = []
        for part, memory in zip(self.ranges, self._backing, strict=True):
            at = memory.find(needle)
            while at >= 0:
                found.append(part.gpa + at)
                at = memory.find(needle, at + 1)
        return found

    def close(self) -> None:
        """Free the guest's memory and close its devices.  Not while `run` is under way."""
        if not self._used:
            self._used = [RangeUse(part, 0, 0) for part in self.ranges]
            with suppress(OSError):  # out of descriptors; `cost` then reports no memory
                self._used = self._measure_use() if self._began else self._used
        self._stack.close()

    def __enter__(self) -> LinuxMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
