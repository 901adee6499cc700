"""The puppet: a guest that executes single commands from Python, each of which is one exit.

Its agent's code, page tables and mailboxes are in 2 MiB of ordinary shared memory, at any multiple
of 2 MiB, because KVM's emulator, and KVM itself, write to the shared page of a gfn.
The caller lays out all other guest physical memory, private or not.

    with Kvm() as kvm, kvm.create_vm() as vm, HostMemory(1 << 20) as memory, Puppet(vm) as guest:
        vm.map(memory, 0)
        guest.write(0x1000, b"marker")
        assert memory.read(0x1000, 6) == guest.read(0x1000, 6) == b"marker"

A command runs until the guest reports that it is done.  Any other exit on the way is appended to
`exits` and passed to `serve`.  If that does not settle it, the command raises :class:`GuestExit`,
and `resume` continues it once the caller has dealt with the cause:

    try:
        data = guest.read(gpa, 4)
    except GuestExit as stopped:
        fault = stopped.exit
        if not isinstance(fault, MemoryFaultExit):
            raise
        slot.convert(fault.gpa, fault.size, private=fault.private)
        data = guest.resume()

Each vCPU (`cpus=`) has its own mailbox; different threads may use them at the same time.

In a VM with private memory, the puppet can ask for conversions as guests do, and they are made:

    with kvmpriv.private.create_vm(kvm) as vm, Puppet(vm) as guest:
        slot = vm.add_private_memory(gpa, size)
        guest.convert(gpa, size, private=False)
"""

from __future__ import annotations

import errno as _errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..cdefs import kvm as kvm_h
from ..errors import ArgumentError
from ..fd import check_range
from ..kvm import Kvm
from ..libc import os_error
from ..memory import PAGE_SIZE, HostMemory
from ..private import PrivateVm, serve_conversion
from .crash import GuestCrash
from .mailbox import (
    AGENT_SIZE,
    BUFFER_SIZE,
    CPUS_MAX,
    WINDOW_ADDRESS,
    WINDOW_SIZE,
    Agent,
    GuestExit,
    Steps,
    write_agent,
)
from .x86 import LARGE_PAGE

if TYPE_CHECKING:
    from ..cpuid import CpuidEntry
    from ..exits import Exit
    from ..slots import Slot
    from ..vcpu import Vcpu
    from ..vm import Vm

__all__ = [
    "AGENT_SIZE",
    "BASE",
    "GuestCrash",
    "GuestExit",
    "Puppet",
    "PuppetCommands",
    "PuppetCpu",
    "Serve",
]

#: The guest physical address of the agent's memory, unless the caller chooses another.
BASE = 0xC000_0000

_MASK = (1 << 64) - 1
_ADDRESSES_END = 1 << 52  # the first address that a page table can't have
_NO_RANGE: tuple[int, int] = (0, 0)

_T = TypeVar("_T")


class PuppetCommands(ABC):
    """The commands, which `cpu` executes.

    Every address is guest physical, sizes are in bytes, values unsigned.  Each command may raise
    GuestExit and GuestCrash; ArgumentError for a bad argument; ValueError after close.
    """

    @property
    @abstractmethod
    def cpu(self) -> PuppetCpu:
        """The vCPU that executes the commands."""

    def read(self, gpa: int, size: int) -> bytes:
        """Have the guest read `size` bytes; returns them."""
        cpu = self.cpu

        def steps() -> Steps[bytes]:
            data = bytearray()
            for at, part in _parts(gpa, size, BUFFER_SIZE):
                yield "copy", (cpu.buffer, _seen(at), part), (at, part)
                data += cpu.puppet.memory.read(cpu.buffer, part)
            return bytes(data)

        return cpu.execute(steps())

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Have the guest write `data`."""
        cpu = self.cpu

        def steps() -> Steps[None]:
            for at, part in _parts(gpa, len(data), BUFFER_SIZE):
                cpu.puppet.memory.write(cpu.buffer, data[at - gpa : at - gpa + part])
                yield "copy", (_seen(at), cpu.buffer, part), (at, part)

        cpu.execute(steps())

    def fill(self, gpa: int, byte: int, size: int) -> None:
        """Have the guest write `size` bytes, each of them `byte`."""
        _check_byte(byte)

        def steps() -> Steps[None]:
            for at, part in _parts(gpa, size, WINDOW_SIZE - LARGE_PAGE):
                yield "fill", (_seen(at), byte, part), (at, part)

        self.cpu.execute(steps())

    def span(self, gpa: int, byte: int, size: int) -> int:
        """Count the bytes from `gpa` on that are `byte`; stops at the first other, or at `size`."""
        _check_byte(byte)

        def steps() -> Steps[int]:
            for at, part in _parts(gpa, size, WINDOW_SIZE - LARGE_PAGE):
                found = yield "span", (_seen(at), byte, part), (at, part)
                if found < part:
                    return at - gpa + found
            return size

        return self.cpu.execute(steps())

    def checksum(self, gpa: int, size: int) -> int:
        """The sum of the 64-bit words, modulo 2^64; `size` must be a multiple of 8."""
        if size % 8:
            raise ArgumentError(f"size must be a multiple of 8, not {size}")

        def steps() -> Steps[int]:
            total = 0
            for at, part in _parts(gpa, size, WINDOW_SIZE - LARGE_PAGE):
                total += yield "checksum", (_seen(at), part), (at, part)
            return total & _MASK

        return self.cpu.execute(steps())

    def touch(self, gpa: int, stride: int, count: int, byte: int | None = None) -> None:
        """Access `count` bytes that are `stride` bytes apart: write `byte`; None reads."""
        if stride < 1:
            raise ArgumentError(f"stride must be 1 or more, not {stride}")
        if count < 0:
            raise ArgumentError(f"count must be 0 or more, not {count}")
        _check_range(gpa, max(0, count - 1) * stride + 1)
        if byte is not None:
            _check_byte(byte)

        def steps() -> Steps[None]:
            per_window = max(1, (WINDOW_SIZE - LARGE_PAGE) // stride)
            for first in range(0, count, per_window):
                some = min(per_window, count - first)
                at, part = gpa + first * stride, (some - 1) * stride + 1
                value = _MASK if byte is None else byte
                yield "touch", (_seen(at), stride, some, value), (at, part)

        self.cpu.execute(steps())

    def increment(self, gpa: int, times: int) -> int:
        """Add 1 to the 64-bit word, `times` times, by compare and swap; returns the last value."""
        check_range("times", times, 1 << 64)
        return self._one("increment", _seen(gpa), times, shows=(gpa, 8))

    def load(self, gpa: int, size: int) -> int:
        """One load of 1, 2, 4 or 8 bytes."""
        return self._one("load", _seen(gpa), _checked_size(size, 8), shows=(gpa, size))

    def store(self, gpa: int, size: int, value: int) -> None:
        """One store of 1, 2, 4 or 8 bytes: the lowest ones of `value`."""
        self._ask(_nothing, "store", _seen(gpa), _checked_size(size, 8), value, shows=(gpa, size))

    def port_out(self, port: int, size: int, value: int) -> None:
        """One OUT of 1, 2 or 4 bytes, which is an exit: see `serve`."""
        check_range("port", port, 1 << 16)
        self._ask(_nothing, "out", value, _checked_size(size, 4), port)

    def port_in(self, port: int, size: int) -> int:
        """One IN of 1, 2 or 4 bytes, which is an exit: `serve` answers it by `Vcpu.reply`."""
        check_range("port", port, 1 << 16)
        return self._one("in", 0, _checked_size(size, 4), port)

    def hypercall(self, number: int, *arguments: int) -> int:
        """A hypercall of KVM's with up to four arguments; returns rax as a signed number.

        It does not return on a KVM that emulates the instruction again and again, as kvm_pvm does.
        """
        return self._hypercall(int, number, *arguments)

    def _hypercall(self, then: Callable[[int], _T], number: int, *arguments: int) -> _T:
        if len(arguments) > 4:
            raise ArgumentError(f"a hypercall has up to 4 arguments, not {len(arguments)}")
        instruction = self.cpu.puppet.hypercall_instruction
        four = (*arguments, 0, 0, 0, 0)[:4]
        return self._ask(lambda rax: then(rax - (rax >> 63 << 64)), instruction, number, *four)

    def cpuid(self, leaf: int, index: int = 0) -> tuple[int, int, int, int]:
        """CPUID in the guest: (eax, ebx, ecx, edx)."""
        check_range("leaf", leaf, 1 << 32)
        check_range("index", index, 1 << 32)
        cpu = self.cpu

        def registers(_: int) -> tuple[int, int, int, int]:
            raw = cpu.puppet.memory.read(cpu.buffer, 16)
            eax, ebx, ecx, edx = (int.from_bytes(raw[n : n + 4], "little") for n in (0, 4, 8, 12))
            return eax, ebx, ecx, edx

        return self._ask(registers, "cpuid", leaf, index, cpu.buffer)

    def rdtsc(self) -> int:
        """RDTSC in the guest."""
        return self._one("rdtsc")

    def rdmsr(self, index: int) -> int:
        """RDMSR in the guest.  GuestCrash if the vCPU has no such register."""
        check_range("index", index, 1 << 32)
        return self._one("rdmsr", index)

    def wrmsr(self, index: int, value: int) -> None:
        """WRMSR in the guest.  GuestCrash if the vCPU has no such register."""
        check_range("index", index, 1 << 32)
        self._ask(_nothing, "wrmsr", index, value)

    def run(self, gpa: int, argument: int = 0) -> int:
        """Call the code at `gpa` with `argument` in rdi; returns the rax that it returns.

        The code must stay within its 2 MiB.
        """
        return self._one("run", _seen(gpa), argument, shows=(gpa, 1))

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        """Have the guest ask that a range be made private, or shared: KVM_HC_MAP_GPA_RANGE.

        `gpa` and `size` must be page aligned.  OSError: the errno that the hypercall returned;
        EINVAL for memory that is not in private slots.  ValueError if conversions are not served.
        """
        if not self.cpu.puppet.serves_conversions:
            raise ValueError(
                "this puppet does not serve conversions: make its VM by"
                " kvmpriv.private.create_vm, and do not pass serve_conversions=False"
            )
        if size % PAGE_SIZE:
            raise ArgumentError(f"size must be a multiple of {PAGE_SIZE}, not {size:#x}")
        attributes = (
            kvm_h.KVM_MAP_GPA_RANGE_ENCRYPTED if private else kvm_h.KVM_MAP_GPA_RANGE_DECRYPTED
        )

        def check(answer: int) -> None:
            if answer:
                kind = "private" if private else "shared"
                errno = _errno.ENOSYS if answer == -kvm_h.KVM_ENOSYS else -answer
                raise os_error(errno, f"KVM_HC_MAP_GPA_RANGE({gpa:#x}, {size:#x} bytes, {kind})")

        self._hypercall(check, kvm_h.KVM_HC_MAP_GPA_RANGE, gpa, size // PAGE_SIZE, attributes)

    def halt(self) -> None:
        """HLT, which is an exit; `resume` continues with the next instruction."""
        self._ask(_nothing, "halt")

    def _one(self, name: str, *arguments: int, shows: tuple[int, int] = _NO_RANGE) -> int:
        return self._ask(int, name, *arguments, shows=shows)

    def _ask(
        self,
        then: Callable[[int], _T],
        name: str,
        *arguments: int,
        shows: tuple[int, int] = _NO_RANGE,
    ) -> _T:
        """Execute one command; returns `then` of its result."""
        _check_range(*shows)

        def steps() -> Steps[_T]:
            return then((yield name, arguments, shows))

        return self.cpu.execute(steps())


class PuppetCpu(Agent, PuppetCommands):
    """One vCPU of a puppet."""

    def __init__(self, puppet: Puppet, vcpu: Vcpu, number: int) -> None:
        self.puppet = puppet
        #: Called with each exit that does not end a command; True if the guest may go on.
        self.serve: Serve | None = None
        super().__init__(vcpu, puppet.memory, puppet.base, number)

    @property
    def cpu(self) -> PuppetCpu:
        """This vCPU itself."""
        return self

    def settle(self, exit_: Exit) -> bool:
        return self.serve is not None and self.serve(self, exit_)


#: Settles an exit of a vCPU; True if the guest may go on.
Serve = Callable[[PuppetCpu, "Exit"], bool]


class Puppet(PuppetCommands):
    """A puppet in `vm`, with `cpus` vCPUs; the first of them executes the puppet's own commands.

    `base` is the guest physical address of its 2 MiB, a multiple of 2 MiB; `slot` is the number of
    their slot (None: the lowest free one); `cpuid` is what CPUID reports (None: all that KVM
    supports).

    In a PrivateVm the guest's hypercalls for a conversion are served, and with `implicit` also its
    accesses of the other kind; `serve_conversions=False` serves neither.  `serve` may be replaced.

    ArgumentError for a bad base or number of vCPUs, OSError for what the VM refuses; nothing is
    left behind then.
    """

    def __init__(
        self,
        vm: Vm,
        *,
        base: int = BASE,
        cpus: int = 1,
        slot: int | None = None,
        cpuid: list[CpuidEntry] | None = None,
        hypercall_instruction: str | None = None,
        serve_conversions: bool = True,
        implicit: bool = False,
    ) -> None:
        if base % AGENT_SIZE or not 0 <= base < _ADDRESSES_END:
            raise ArgumentError(
                f"base must be a multiple of {AGENT_SIZE:#x} below 2^52, not {base:#x}"
            )
        if hypercall_instruction not in (None, "vmcall", "vmmcall"):
            raise ArgumentError(
                f"hypercall_instruction must be vmcall or vmmcall, not {hypercall_instruction!r}"
            )
        if not 1 <= cpus <= CPUS_MAX:
            raise ArgumentError(f"a puppet can have 1 to {CPUS_MAX} vCPUs, not {cpus}")
        self.base = base
        self.vm = vm
        self.hypercall_instruction: str = hypercall_instruction or _hypercall_instruction()
        private_vm = vm if serve_conversions and isinstance(vm, PrivateVm) else None
        #: Whether the guest's hypercalls for a conversion are served.
        self.serves_conversions: bool = private_vm is not None
        if self.serves_conversions and vm.check_extension(kvm_h.KVM_CAP_EXIT_HYPERCALL):
            vm.enable_cap(kvm_h.KVM_CAP_EXIT_HYPERCALL, 1 << kvm_h.KVM_HC_MAP_GPA_RANGE)
        if cpuid is None:
            with Kvm() as kvm:
                cpuid = kvm.get_supported_cpuid()
        with ExitStack() as stack:
            self.memory: HostMemory = stack.enter_context(HostMemory(AGENT_SIZE))
            self.slot: Slot = vm.map(self.memory, base, slot=slot)
            stack.callback(lambda: None if vm.closed else self.slot.delete())
            write_agent(self.memory)
            #: Every vCPU.
            self.cpus: list[PuppetCpu] = []
            stack.callback(self._release)
            for number in range(cpus):
                vcpu = stack.enter_context(vm.create_vcpu(number))
                if cpuid:  # kernels differ in whether a vCPU without it can enter long mode
                    vcpu.set_cpuid2(cpuid)
                cpu = PuppetCpu(self, vcpu, number)
                if private_vm is not None:
                    cpu.serve = _conversions(private_vm, implicit=implicit)
                self.cpus.append(cpu)
            self._stack = stack.pop_all()

    @property
    def cpu(self) -> PuppetCpu:
        """The first vCPU."""
        return self.cpus[0]

    @property
    def vcpu(self) -> Vcpu:
        """The first vCPU's :class:`Vcpu`."""
        return self.cpu.vcpu

    @property
    def exits(self) -> list[Exit]:
        """The first vCPU's `exits`."""
        return self.cpu.exits

    @property
    def exit_count(self) -> int:
        """The first vCPU's `exit_count`."""
        return self.cpu.exit_count

    @property
    def serve(self) -> Serve | None:
        """The first vCPU's `serve`."""
        return self.cpu.serve

    @serve.setter
    def serve(self, serve: Serve | None) -> None:
        self.cpu.serve = serve

    def reset(self) -> None:
        """Restart the first vCPU; a command that was under way is forgotten."""
        self.cpu.reset()

    def resume(self) -> object:
        """Continue the first vCPU's command that raised GuestExit; returns what it returns."""
        return self.cpu.resume()

    def close(self) -> None:
        """Close the vCPUs, delete the slot of the agent's memory and free it."""
        self._stack.close()

    def _release(self) -> None:
        """Release the views of the agent's memory, which would keep it mapped."""
        for cpu in self.cpus:
            cpu.release()

    def __enter__(self) -> Puppet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _conversions(vm: PrivateVm, *, implicit: bool) -> Serve:
    """Serves hypercalls for a conversion; faults too if `implicit`, or if they are harmless."""
    faults = implicit or vm.abi.traits.access_follows_state

    def serve(cpu: PuppetCpu, exit_: Exit) -> bool:
        if faults or exit_.reason == kvm_h.KVM_EXIT_HYPERCALL:
            return serve_conversion(vm, cpu.vcpu, exit_)
        return False

    return serve


def _hypercall_instruction() -> str:
    """The processor's own; KVM would patch the guest's code where it finds the other one."""
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
        return "vmcall" if "GenuineIntel" in file.read(4096) else "vmmcall"


def _nothing(_: int) -> None:
    pass


def _checked_size(size: int, most: int) -> int:
    if size not in (1, 2, 4, 8) or size > most:
        sizes = "1, 2, 4 or 8" if most == 8 else "1, 2 or 4"
        raise ArgumentError(f"the size of an access must be {sizes} bytes, not {size}")
    return size


def _check_byte(value: int) -> None:
    if not 0 <= value <= 0xFF:
        raise ArgumentError(f"a byte must be 0 to 255, not {value}")


def _check_range(gpa: int, size: int) -> None:
    if gpa < 0 or size < 0 or gpa + size > _ADDRESSES_END:
        raise ArgumentError(
            f"guest physical addresses are 0 to 2^52: {size:#x} bytes at {gpa:#x} are out of range"
        )


def _seen(gpa: int) -> int:
    """The guest virtual address of `gpa`, if the window begins with its 2 MiB."""
    return WINDOW_ADDRESS + gpa % LARGE_PAGE


def _parts(gpa: int, size: int, most: int) -> Generator[tuple[int, int], None, None]:
    """Split a range into pieces of at most `most` bytes: (guest physical address, size)."""
    _check_range(gpa, size)
    for at in range(gpa, gpa + size, most):
        yield at, min(most, gpa + size - at)
