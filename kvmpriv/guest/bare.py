"""A small machine: memory from address 0, one vCPU, a port to print on and a port to exit by.

The guest writes its output to port 0x3f8 (SERIAL_PORT), byte by byte or with ``rep outsb``; the
line status register (0x3fd) always reads as ready.  A byte written to port 0xf4 (EXIT_PORT) ends
the guest with that exit status, 0 to 255.  HLT ends it with status 0.  Other ports read as ones and
ignore writes, as an empty bus does.  An access to an address without memory is a crash.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from threading import Timer
from typing import TYPE_CHECKING

from ..cdefs import kvm as kvm_h
from ..exits import IoExit
from ..memory import HostMemory
from . import crash, exceptions, loader
from .crash import GuestCrash, GuestTimeout
from .image import Mode

if TYPE_CHECKING:
    from ..kvm import Kvm
    from ..vcpu import Vcpu
    from ..vm import Vm
    from .image import Image

__all__ = ["EXIT_PORT", "SERIAL_PORT", "GuestCrash", "GuestTimeout", "Machine"]

SERIAL_PORT = 0x3F8
EXIT_PORT = 0xF4
_LINE_STATUS = SERIAL_PORT + 5
_TRANSMITTER_EMPTY = 0x60


class Machine:
    """A guest with `memory_size` bytes of memory, `image` loaded, ready to run.

    `memory_size` is in bytes and page aligned.  `arguments` are passed to the guest as
    :mod:`kvmpriv.guest.loader` describes.  `output` is called with what the guest prints, in the
    thread that calls `run`.

    ImageError if the image does not fit, ArgumentError for a bad size, OSError if KVM refuses
    something.
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
            self.vm: Vm = stack.enter_context(kvm.create_vm())
            self.memory: HostMemory = stack.enter_context(HostMemory(memory_size))
            self.vm.map(self.memory, 0)
            if image.mode is Mode.REAL and memory_size <= 0xFFFBC000:
                # Where Intel's KVM emulates real mode it needs three pages that the guest does not.
                self.vm.set_tss_addr(0xFFFBD000)
            self.vcpu: Vcpu = stack.enter_context(self.vm.create_vcpu())
            if image.mode is Mode.LONG:
                self.vcpu.set_cpuid2(kvm.get_supported_cpuid())
            loader.load(image, self.memory, self.vcpu, arguments)
            self._stack = stack.pop_all()

    def run(self, timeout: float | None = None) -> int:
        """Run until the guest ends; returns its exit status, 0 to 255.

        GuestCrash if it can't go on, GuestTimeout after `timeout` seconds; what `output` raises
        is raised here.
        """
        expired: list[bool] = []

        def expire() -> None:
            expired.append(True)
            with suppress(ValueError):  # closed meanwhile
                self.vcpu.kick()

        timer = None if timeout is None else Timer(timeout, expire)
        if timer is not None:
            timer.daemon = True
            timer.start()
        vcpu = self.vcpu
        try:
            while True:
                reason = vcpu.run()
                if reason == kvm_h.KVM_EXIT_IO:
                    io = vcpu.exit()
                    assert isinstance(io, IoExit)
                    if not io.is_write:
                        ready = _TRANSMITTER_EMPTY if io.port == _LINE_STATUS else 0xFF
                        vcpu.reply(bytes((ready,)) * (io.size * io.count))
                    elif io.port == SERIAL_PORT:
                        self._output(io.data)
                    elif io.port == EXIT_PORT:
                        return io.data[0]
                    elif io.port == exceptions.CRASH_PORT:
                        raise self._exception()
                elif reason == kvm_h.KVM_EXIT_HLT:
                    return 0
                elif reason != kvm_h.KVM_EXIT_INTR:
                    raise self._crash(crash.describe_exit(vcpu.exit()))
                elif expired:
                    raise self._crash(f"still running after {timeout:g} s", GuestTimeout)
        finally:
            if timer is not None:
                timer.cancel()

    def _exception(self) -> GuestCrash:
        exception = loader.read_exception(self._image.mode, self.memory, self.vcpu)
        if exception is None:
            port = exceptions.CRASH_PORT
            return self._crash(
                f"the guest wrote to port {port:#x}, which is reserved for exception reports"
            )
        return self._crash(crash.describe(exception, self.vcpu), exception=exception)

    def _crash(
        self,
        why: str,
        kind: type[GuestCrash] = GuestCrash,
        exception: exceptions.GuestException | None = None,
    ) -> GuestCrash:
        return kind(why, crash.report(self.vcpu, self.memory, why, exception))

    def close(self) -> None:
        """End the guest and free its memory."""
        self._stack.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
