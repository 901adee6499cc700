"""A small machine: memory from address 0, one vCPU, a serial port to print on, a port to exit by.

Port 0x3f8 (SERIAL_PORT) takes the guest's output, byte by byte or with ``rep outsb``; its line
status register (0x3fd) always says "ready".  A byte written to port 0xf4 (EXIT_PORT) ends the
guest: its exit status, 0 to 255.  HLT ends it with status 0.  Other ports read as ones and take
writes without effect, as an empty bus does; an access to an address without memory is a crash.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from threading import Timer
from typing import TYPE_CHECKING, Any

from ..cdefs import kvm as k
from ..memory import HostMemory
from . import boot
from .image import Mode

if TYPE_CHECKING:
    from types import TracebackType

    from ..kvm import Kvm
    from .image import Image

__all__ = ["EXIT_PORT", "SERIAL_PORT", "GuestCrash", "GuestTimeout", "Machine"]

SERIAL_PORT = 0x3F8
EXIT_PORT = 0xF4
_LINE_STATUS = SERIAL_PORT + 5
_TRANSMITTER_EMPTY = 0x60

_EXCEPTIONS = {
    0: "#DE divide error", 1: "#DB debug", 2: "NMI", 3: "#BP breakpoint", 4: "#OF overflow",
    5: "#BR bound range exceeded", 6: "#UD invalid opcode", 7: "#NM no FPU", 8: "#DF double fault",
    10: "#TS invalid TSS", 11: "#NP segment not present", 12: "#SS stack fault",
    13: "#GP general protection", 14: "#PF page fault", 16: "#MF x87 error",
    17: "#AC alignment check", 18: "#MC machine check", 19: "#XM SIMD error",
    20: "#VE virtualization", 21: "#CP control protection",
}  # fmt: skip
_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12",
            "r13", "r14", "r15")  # fmt: skip
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")


class GuestCrash(Exception):  # noqa: N818  # it is the guest's error, not ours
    """The guest can't go on.  `why` in one line; `report` adds registers and code."""

    def __init__(self, why: str, report: str) -> None:
        super().__init__(report)
        self.why = why
        self.report = report


class GuestTimeout(GuestCrash):
    """The guest was still running when its time was up."""


class Machine:
    """A guest with `memory_size` bytes of memory, `image` loaded, ready to run.

    `memory_size` is page aligned; `arguments` reach the guest as :mod:`kvmpriv.guest.boot` says;
    `output` is given what the guest prints.  ImageError, OSError and ValueError when the guest
    can't be made; nothing is left behind then.
    """

    def __init__(
        self,
        kvm: Kvm,
        image: Image,
        memory_size: int,
        *,
        arguments: tuple[bytes, ...] = (),
        output: Callable[[bytes], object] = lambda data: None,
    ) -> None:
        self._image = image
        self._output = output
        with ExitStack() as stack:
            self.vm = stack.enter_context(kvm.create_vm())
            self.memory = stack.enter_context(HostMemory(memory_size))
            self.vm.map(self.memory, 0)
            if image.mode is Mode.REAL and memory_size <= 0xFFFBC000:
                # Where Intel's KVM emulates real mode it needs three pages that nobody uses.
                self.vm.set_tss_addr(0xFFFBD000)
            self.vcpu = stack.enter_context(self.vm.create_vcpu())
            if image.mode is Mode.LONG:
                self.vcpu.set_cpuid2(kvm.get_supported_cpuid())
            boot.load(image, self.memory, self.vcpu, arguments)
            self._stack = stack.pop_all()

    def run(self, timeout: float | None = None) -> int:
        """Run until the guest ends; returns its exit status, 0 to 255.

        GuestCrash when it can't go on, GuestTimeout after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        timer = None if timeout is None else Timer(timeout, self.vcpu.kick)
        if timer is not None:
            timer.daemon = True
            timer.start()
        vcpu, page = self.vcpu, self.vcpu.page
        try:
            while True:
                reason = vcpu.run()
                if reason == k.KVM_EXIT_IO:
                    if page.io.direction == k.KVM_EXIT_IO_IN:
                        self._port_in(page)
                        continue
                    port = page.io.port
                    if port == SERIAL_PORT:
                        self._output(vcpu.exit().data)
                    elif port == EXIT_PORT:
                        return int(vcpu.exit().data[0])
                    elif port == boot.CRASH_PORT:
                        raise self._exception()
                elif reason == k.KVM_EXIT_HLT:
                    return 0
                elif reason != k.KVM_EXIT_INTR:
                    raise self._crash(_why(vcpu.exit()))
                elif deadline is not None and time.monotonic() >= deadline:
                    raise self._crash(f"still running after {timeout:g} s", GuestTimeout)
        finally:
            if timer is not None:
                timer.cancel()

    @staticmethod
    def _port_in(page: Any) -> None:
        io = page.io
        value = _TRANSMITTER_EMPTY if io.port == _LINE_STATUS else 0xFF
        target = k.ffi.cast("unsigned char *", page) + io.data_offset
        k.ffi.memmove(target, bytes((value,)) * (io.size * io.count), io.size * io.count)

    def _exception(self) -> GuestCrash:
        exception = boot.read_exception(self._image.mode, self.memory, self.vcpu.get_regs().rsp)
        if exception is None:
            return self._crash("it wrote to the port of the exception handlers by itself")
        name = _EXCEPTIONS.get(exception.vector, "no handler for this interrupt")
        why = f"exception {exception.vector} ({name})"
        if exception.error_code is not None:
            why += f", error code {exception.error_code:#x}"
        if exception.vector == 14:
            why += f", address {self.vcpu.get_sregs().cr2:#x}"
        return self._crash(why, exception=exception)

    def _crash(
        self,
        why: str,
        kind: type[GuestCrash] = GuestCrash,
        exception: boot.Exception_ | None = None,
    ) -> GuestCrash:
        regs, sregs = self.vcpu.get_regs(), self.vcpu.get_sregs()
        rip, rsp, rflags, cs = regs.rip, regs.rsp, regs.rflags, sregs.cs.selector
        linear = sregs.cs.base + rip
        if exception is not None:  # the handler's own are of no interest
            _, _, rip, cs, rflags, rsp = exception
            linear = rip if self._image.mode is Mode.LONG else cs * 16 + rip
        values = [("rip", rip), ("rsp", rsp), ("rflags", rflags), ("cs", cs)]
        values += [(name, getattr(regs, name)) for name in _GENERAL]
        values += [(name, getattr(sregs, name)) for name in _CONTROL]
        lines = [f"{why} at rip {rip:#x}"]
        for first in range(0, len(values), 4):
            row = values[first : first + 4]
            lines.append("  " + "  ".join(f"{name:>6} {value:016x}" for name, value in row))
        lines.append(f"  code at {linear:#x}: {self._code(linear)}")
        return kind(why, "\n".join(lines))

    def _code(self, linear: int) -> str:
        try:
            address = self.vcpu.translate(linear)
        except OSError as error:
            return f"KVM_TRANSLATE: {error.strerror}"
        if address is None:
            return "not mapped"
        if address >= self.memory.size:
            return "outside memory"
        return self.memory.read(address, min(16, self.memory.size - address)).hex(" ")

    def close(self) -> None:
        """End the guest and give its memory back."""
        self._stack.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _why(exit_: Any) -> str:
    if exit_.reason == k.KVM_EXIT_SHUTDOWN:
        return "triple fault (KVM_EXIT_SHUTDOWN)"
    if exit_.reason == k.KVM_EXIT_MMIO:
        return f"no memory there: {exit_}"
    return str(exit_)
