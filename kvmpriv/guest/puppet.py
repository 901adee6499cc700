"""The puppet: a guest that reads, writes and calls as Python tells it to, one command an exit.

Its code, page tables and mailboxes live in ordinary shared memory, its *home* (2 MiB, at any
multiple of 2 MiB), because KVM's emulator and KVM's own writes go by the shared copy of a page.
All other guest physical memory is the caller's to lay out, private or not.

    with Kvm() as kvm, kvm.create_vm() as vm, HostMemory(1 << 20) as memory, Puppet(vm) as guest:
        vm.map(memory, 0)
        guest.write(0x1000, b"marker")
        assert memory.read(0x1000, 6) == guest.read(0x1000, 6) == b"marker"

A command runs until the guest says that it is done.  Any other exit on the way is kept in `exits`
and given to `serve`; where that does not settle it, the command raises :class:`GuestExit`, and
`resume` goes on with it once the cause is mended:

    try:
        data = guest.read(gpa, 4)
    except GuestExit as wanted:
        convert(wanted.exit.gpa, wanted.exit.size, wanted.exit.private)
        data = guest.resume()

Several vCPUs (`cpus=`) have a mailbox each; different threads may drive them at the same time.

In a VM with private memory, a puppet can ask for conversions as guests do, and gets what it asks
for:

    with kvmpriv.private.create_vm(kvm) as vm, Puppet(vm) as guest:
        slot = vm.add_private_memory(gpa, size)
        guest.convert(gpa, size, private=False)
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..cdefs import kvm as kvm_h
from ..kvm import Kvm
from ..libc import os_error
from ..memory import PAGE_SIZE, HostMemory
from ..private import PrivateVm, serve_conversion
from . import crash, exceptions, x86
from .crash import GuestCrash
from .ready import PUPPET
from .x86 import LARGE_PAGE, PTE_LARGE, PTE_PRESENT_WRITABLE

if TYPE_CHECKING:
    from ..cpuid import CpuidEntry
    from ..vcpu import Vcpu
    from ..vm import Vm

__all__ = ["HOME", "HOME_SIZE", "GuestExit", "Puppet", "PuppetCpu"]

#: Where the home is unless told otherwise, and its size, in bytes.
HOME, HOME_SIZE = 0xC000_0000, 2 << 20

# The home's layout; the same numbers are guest virtual addresses.
_CODE, _IDT, _HANDLERS = 0x1000, 0x3000, 0x4000
_CELLS, _CELL_SIZE = 0x20000, 0x20000
# Inside a cell: one for each vCPU.
_MAILBOX, _STACK_END, _PML4, _PDPT, _PD, _WINDOW_PD, _SEGMENTS, _EXCEPTION_STACK_END, _BUFFER = (
    0x0000, 0x2000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x8000, 0x10000,
)  # fmt: skip
_BUFFER_SIZE = _CELL_SIZE - _BUFFER
CPUS_MAX = (HOME_SIZE - _CELLS) // _CELL_SIZE

# puppet.S: the mailbox, in words of 8 bytes.
_COMMAND, _ARGUMENTS, _RESULT, _WINDOW, _PAGES, _DIRECTORY = 0, 1, 6, 7, 8, 11
_COMMANDS = {
    name: number
    for number, name in enumerate(
        (
            "copy", "fill", "checksum", "span", "touch", "increment", "load", "store", "out", "in",
            "vmcall", "vmmcall", "cpuid", "rdtsc", "rdmsr", "wrmsr", "run", "halt",
        )
    )
}  # fmt: skip

_WINDOW_ADDRESS = 1 << 30
_WINDOW_SIZE = 512 * LARGE_PAGE
_MASK = (1 << 64) - 1
_REACH = 1 << 52  # where the addresses end that a page table can have
_KVM_ENOSYS = 1000  # <linux/kvm_para.h>: what KVM answers to a hypercall that it does not do
_OP_NONE: tuple[int, int] = (0, 0)

_T = TypeVar("_T")
#: One command: its name, its arguments, and the guest physical range that the window must show.
_Step = tuple[str, tuple[int, ...], tuple[int, int]]
_Steps = Generator[_Step, int, _T]


class GuestExit(Exception):  # noqa: N818  # not an error, the guest's request
    """The guest stopped on the way for something that nobody has settled: `exit` says what."""

    def __init__(self, cpu: PuppetCpu, exit_: Any) -> None:
        super().__init__(str(exit_))
        self.cpu = cpu
        self.exit = exit_


class PuppetCpu:
    """One vCPU of a puppet.

    Every address is guest physical, sizes are in bytes, values unsigned.  GuestExit and
    GuestCrash may come from each command.
    """

    def __init__(self, puppet: Puppet, vcpu: Vcpu, number: int) -> None:
        self.vcpu = vcpu
        #: A command ends with an OUT to this port.
        self.done_port = 0xF6
        #: Every exit but those that end a command, in order.
        self.exits: list[Any] = []
        #: Called with each such exit; True when it is settled and the guest may go on.
        self.serve: Callable[[PuppetCpu, Any], bool] | None = puppet.first_server()
        self._puppet = puppet
        self._cell = _CELLS + number * _CELL_SIZE
        self._under_way: _Steps[Any] | None = None
        cell, memory = self._cell, puppet.memory
        home = puppet.home
        words = memory.view().cast("Q")
        self._mailbox = words[(cell + _MAILBOX) // 8 : (cell + _MAILBOX) // 8 + 16]
        words[(cell + _PML4) // 8] = home + cell + _PDPT | PTE_PRESENT_WRITABLE
        words[(cell + _PDPT) // 8] = home + cell + _PD | PTE_PRESENT_WRITABLE
        words[(cell + _PDPT) // 8 + 1] = home + cell + _WINDOW_PD | PTE_PRESENT_WRITABLE
        words[(cell + _PD) // 8] = home | PTE_PRESENT_WRITABLE | PTE_LARGE
        x86.write_segments(memory, cell + _SEGMENTS, cell + _EXCEPTION_STACK_END)
        words.release()
        self.reset()

    def reset(self) -> None:
        """Start the agent anew; a command that was under way is forgotten."""
        # Port and memory-mapped I/O is complete only when KVM_RUN is entered once more (api.rst);
        # registers set before that would be overwritten.
        self.vcpu.kick()
        while self.vcpu.run() != kvm_h.KVM_EXIT_INTR:
            self.vcpu.kick()
        cell = self._cell
        for at in range(len(self._mailbox)):
            self._mailbox[at] = 0
        self._mailbox[_DIRECTORY] = cell + _WINDOW_PD
        self._under_way = None
        x86.start_long_mode(
            self.vcpu,
            cr3=self._puppet.home + cell + _PML4,
            gdt=cell + _SEGMENTS,
            idt=_IDT,
        )
        regs = kvm_h.ffi.new("struct kvm_regs *")
        regs.rip, regs.rsp, regs.rbx, regs.rflags = _CODE, cell + _STACK_END, cell + _MAILBOX, 2
        self.vcpu.set_regs(regs)
        self._enter()

    # -- what the guest can be told ------------------------------------------------------------

    def read(self, gpa: int, size: int) -> bytes:
        """What the guest reads."""

        def steps() -> _Steps[bytes]:
            data = bytearray()
            for at, part in _parts(gpa, size, _BUFFER_SIZE):
                buffer = self._cell + _BUFFER
                yield "copy", (buffer, _seen(at), part), (at, part)
                data += self._puppet.memory.read(buffer, part)
            return bytes(data)

        return self._do(steps())

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Have the guest write `data`."""

        def steps() -> _Steps[None]:
            for at, part in _parts(gpa, len(data), _BUFFER_SIZE):
                buffer = self._cell + _BUFFER
                self._puppet.memory.write(buffer, data[at - gpa : at - gpa + part])
                yield "copy", (_seen(at), buffer, part), (at, part)

        self._do(steps())

    def fill(self, gpa: int, byte: int, size: int) -> None:
        """Have the guest write `size` times `byte`."""
        _byte(byte)

        def steps() -> _Steps[None]:
            for at, part in _parts(gpa, size, _WINDOW_SIZE - LARGE_PAGE):
                yield "fill", (_seen(at), byte, part), (at, part)

        self._do(steps())

    def span(self, gpa: int, byte: int, size: int) -> int:
        """How many bytes the guest finds to be `byte` from `gpa` on: `size` when all are."""
        _byte(byte)

        def steps() -> _Steps[int]:
            for at, part in _parts(gpa, size, _WINDOW_SIZE - LARGE_PAGE):
                found = yield "span", (_seen(at), byte, part), (at, part)
                if found < part:
                    return at - gpa + found
            return size

        return self._do(steps())

    def checksum(self, gpa: int, size: int) -> int:
        """The sum of the 64-bit words, modulo 2^64; `size` is a multiple of 8."""
        if size % 8:
            raise ValueError(f"{size} bytes are not a number of 64-bit words")

        def steps() -> _Steps[int]:
            total = 0
            for at, part in _parts(gpa, size, _WINDOW_SIZE - LARGE_PAGE):
                total += yield "checksum", (_seen(at), part), (at, part)
            return total & _MASK

        return self._do(steps())

    def touch(self, gpa: int, stride: int, count: int, byte: int | None = None) -> None:
        """Access one byte each `stride` bytes, `count` times: write `byte`, or read."""
        if stride < 1 or count < 0:
            raise ValueError(f"no {count} accesses can be {stride} bytes apart")
        _reachable(gpa, max(0, count - 1) * stride + 1)
        if byte is not None:
            _byte(byte)

        def steps() -> _Steps[None]:
            per_window = max(1, (_WINDOW_SIZE - LARGE_PAGE) // stride)
            for first in range(0, count, per_window):
                some = min(per_window, count - first)
                at, part = gpa + first * stride, (some - 1) * stride + 1
                value = _MASK if byte is None else byte
                yield "touch", (_seen(at), stride, some, value), (at, part)

        self._do(steps())

    def increment(self, gpa: int, times: int) -> int:
        """Add 1 to the 64-bit word, `times` times, by compare and swap; returns the last value."""
        if times < 0:
            raise ValueError(f"{times} times is no number of times")
        return self._one("increment", _seen(gpa), times, shows=(gpa, 8))

    def load(self, gpa: int, size: int) -> int:
        """One load of 1, 2, 4 or 8 bytes."""
        return self._one("load", _seen(gpa), _sized(size, 8), shows=(gpa, size))

    def store(self, gpa: int, size: int, value: int) -> None:
        """One store of 1, 2, 4 or 8 bytes."""
        self._ask(_nothing, "store", _seen(gpa), _sized(size, 8), value, shows=(gpa, size))

    def out(self, port: int, size: int, value: int) -> None:
        """One OUT of 1, 2 or 4 bytes.  It is an exit: see `serve`."""
        self._ask(_nothing, "out", value, _sized(size, 4), port)

    def in_(self, port: int, size: int) -> int:
        """One IN of 1, 2 or 4 bytes: an exit; `serve` puts the answer into the vCPU's page."""
        return self._one("in", 0, _sized(size, 4), port)

    def hypercall(self, number: int, *arguments: int) -> int:
        """A hypercall of KVM's with up to four arguments; returns rax, signed.

        Where KVM goes on emulating the instruction for ever, as kvm_pvm does, it does not return.
        """
        return self._hypercall(int, number, *arguments)

    def _hypercall(self, then: Callable[[int], _T], number: int, *arguments: int) -> _T:
        if len(arguments) > 4:
            raise ValueError(f"a hypercall has up to 4 arguments, not {len(arguments)}")
        instruction = self._puppet.hypercall_instruction
        four = (*arguments, 0, 0, 0, 0)[:4]
        return self._ask(lambda rax: then(rax - (rax >> 63 << 64)), instruction, number, *four)

    def cpuid(self, leaf: int, index: int = 0) -> tuple[int, int, int, int]:
        """(eax, ebx, ecx, edx) as the guest sees them."""
        buffer = self._cell + _BUFFER

        def four(_: int) -> tuple[int, int, int, int]:
            raw = self._puppet.memory.read(buffer, 16)
            eax, ebx, ecx, edx = (int.from_bytes(raw[n : n + 4], "little") for n in (0, 4, 8, 12))
            return eax, ebx, ecx, edx

        return self._ask(four, "cpuid", leaf, index, buffer)

    def rdtsc(self) -> int:
        return self._one("rdtsc")

    def rdmsr(self, index: int) -> int:
        return self._one("rdmsr", index)

    def wrmsr(self, index: int, value: int) -> None:
        self._ask(_nothing, "wrmsr", index, value)

    def run(self, gpa: int, argument: int = 0) -> int:
        """Call the code at `gpa` (which must not leave its 2 MiB) with rdi set; returns its rax."""
        return self._one("run", _seen(gpa), argument, shows=(gpa, 1))

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        """Have the guest ask for a range to be made private, or shared: KVM_HC_MAP_GPA_RANGE.

        `gpa` and `size` are page aligned.  OSError: what the guest was answered, EINVAL for memory
        that is not in private-capable slots.  ValueError for a puppet that does not serve it.
        """
        if not self._puppet.serves_conversions:
            raise ValueError(
                "this puppet does not serve conversions: its VM must be one of"
                " kvmpriv.private.create_vm, and serve_conversions must not be False"
            )
        if size % PAGE_SIZE:
            raise ValueError(f"{size:#x} bytes are not a number of pages")
        attributes = (
            kvm_h.KVM_MAP_GPA_RANGE_ENCRYPTED if private else kvm_h.KVM_MAP_GPA_RANGE_DECRYPTED
        )

        def judge(answer: int) -> None:
            if answer:
                kind = "private" if private else "shared"
                errno = _errno.ENOSYS if answer == -_KVM_ENOSYS else -answer
                raise os_error(errno, f"KVM_HC_MAP_GPA_RANGE({gpa:#x}, {size:#x} bytes, {kind})")

        self._hypercall(judge, kvm_h.KVM_HC_MAP_GPA_RANGE, gpa, size // PAGE_SIZE, attributes)

    def halt(self) -> None:
        """HLT.  It is an exit; `resume` goes on behind it."""
        self._ask(_nothing, "halt")

    def resume(self) -> Any:
        """Go on with the command that raised GuestExit; returns what it would have."""
        if self._under_way is None:
            raise RuntimeError("no command is under way")
        steps = self._under_way
        self._enter()
        return self._drive(steps, self._mailbox[_RESULT])

    # -- how it is told ------------------------------------------------------------------------

    def _one(self, name: str, *arguments: int, shows: tuple[int, int] = _OP_NONE) -> int:
        return self._ask(int, name, *arguments, shows=shows)

    def _ask(
        self,
        then: Callable[[int], _T],
        name: str,
        *arguments: int,
        shows: tuple[int, int] = _OP_NONE,
    ) -> _T:
        """One step; `then` makes of its result what the command returns."""
        _reachable(*shows)

        def steps() -> _Steps[_T]:
            return then((yield name, arguments, shows))

        return self._do(steps())

    def _do(self, steps: _Steps[_T]) -> _T:
        if self.vcpu.closed:
            raise ValueError("the puppet is closed")
        if self._under_way is not None:
            raise RuntimeError("a command is under way: resume() or reset() first")
        return self._drive(steps, None)

    def _drive(self, steps: _Steps[_T], result: int | None) -> _T:
        mailbox = self._mailbox
        while True:
            self._under_way = None  # nothing is, should the steps themselves go wrong
            try:
                step = next(steps) if result is None else steps.send(result)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            name, arguments, (gpa, size) = step
            mailbox[_COMMAND] = _COMMANDS[name]
            for at, argument in enumerate(arguments, _ARGUMENTS):
                mailbox[at] = argument & _MASK
            if size:
                window = gpa & -LARGE_PAGE
                mailbox[_WINDOW] = window
                mailbox[_PAGES] = (gpa + size - window + LARGE_PAGE - 1) // LARGE_PAGE
            self._under_way = steps
            self._enter()
            result = mailbox[_RESULT]

    def _enter(self) -> None:
        """Run until the command is done."""
        stopped = self._run_on()
        if stopped is not None:
            # Not there: whoever keeps the exception would keep `run`, and with it the vCPU's.
            raise stopped

    def _run_on(self) -> GuestExit | GuestCrash | None:
        vcpu, run = self.vcpu, self.vcpu.kvm_run
        while True:
            reason = vcpu.run()
            if reason == kvm_h.KVM_EXIT_IO:
                port = run.io.port
                if port == self.done_port:
                    return None
                if port == exceptions.CRASH_PORT:
                    return self._exception()
            elif reason == kvm_h.KVM_EXIT_INTR:
                continue
            exit_ = vcpu.exit()
            self.exits.append(exit_)
            if self.serve is not None and self.serve(self, exit_):
                continue
            if reason in (
                kvm_h.KVM_EXIT_SHUTDOWN,
                kvm_h.KVM_EXIT_FAIL_ENTRY,
                kvm_h.KVM_EXIT_INTERNAL_ERROR,
            ):
                return self._crash(crash.describe_exit(exit_))
            return GuestExit(self, exit_)

    def _exception(self) -> GuestCrash:
        rsp = self.vcpu.get_regs().rsp
        end = self._cell + _EXCEPTION_STACK_END
        exception = exceptions.read_long_exception(self._puppet.memory, rsp, _HANDLERS, end)
        if exception is None:
            return self._crash("the exception handlers were called with a broken stack")
        return self._crash(crash.describe(exception, self.vcpu), exception)

    def _crash(self, why: str, exception: exceptions.GuestException | None = None) -> GuestCrash:
        puppet = self._puppet
        return GuestCrash(why, crash.report(self.vcpu, puppet.memory, why, exception, puppet.home))

    def close(self) -> None:
        self._mailbox.release()
        self.vcpu.close()


class Puppet(PuppetCpu):
    """A puppet in `vm`, with `cpus` vCPUs; it is itself the first of them, `cpus[0]`.

    `home` is the guest physical address of its 2 MiB, a multiple of 2 MiB; `slot` the slot for it
    (the lowest free one if none is given); `cpuid` what the vCPUs are given (None: all that KVM
    supports).  In a PrivateVm, its hypercalls for a conversion are served, and if `implicit` its
    accesses to memory of the other kind too, unless `serve_conversions` is False; `serve` may
    be replaced.  ValueError for a bad
    home or number of vCPUs, OSError when the VM refuses; nothing is left behind then.
    """

    def __init__(
        self,
        vm: Vm,
        *,
        home: int = HOME,
        cpus: int = 1,
        slot: int | None = None,
        cpuid: list[CpuidEntry] | None = None,
        hypercall_instruction: str | None = None,
        serve_conversions: bool = True,
        implicit: bool = False,
    ) -> None:
        if home % HOME_SIZE or not 0 <= home < _REACH:
            raise ValueError(f"home {home:#x} is not a multiple of {HOME_SIZE:#x} below 2^52")
        if hypercall_instruction not in (None, "vmcall", "vmmcall"):
            raise ValueError(f"a hypercall is vmcall or vmmcall, not {hypercall_instruction!r}")
        if not 1 <= cpus <= CPUS_MAX:
            raise ValueError(f"a puppet has 1 to {CPUS_MAX} vCPUs, not {cpus}")
        self.home = home
        self.vm = vm
        self._implicit = implicit
        self.hypercall_instruction = hypercall_instruction or _hypercall_instruction()
        self._private_vm = vm if serve_conversions and isinstance(vm, PrivateVm) else None
        if self.serves_conversions and vm.check_extension(kvm_h.KVM_CAP_EXIT_HYPERCALL):
            vm.enable_cap(kvm_h.KVM_CAP_EXIT_HYPERCALL, 1 << kvm_h.KVM_HC_MAP_GPA_RANGE)
        if cpuid is None:
            with Kvm() as kvm:
                cpuid = kvm.get_supported_cpuid()
        with ExitStack() as stack:
            self.memory = stack.enter_context(HostMemory(HOME_SIZE))
            self.slot = vm.map(self.memory, home, slot=slot)
            stack.callback(lambda: None if vm.closed else self.slot.delete())
            self.memory.write(_CODE, PUPPET)
            exceptions.write_handlers(self.memory, _IDT, _HANDLERS)
            #: Every vCPU; this object first.
            self.cpus: list[PuppetCpu] = []
            for number in range(cpus):
                vcpu = stack.enter_context(vm.create_vcpu(number))
                if cpuid:  # kernels differ in whether they let a vCPU without it into long mode
                    vcpu.set_cpuid2(cpuid)
                if number == 0:
                    super().__init__(self, vcpu, 0)
                    self.cpus.append(self)
                else:
                    self.cpus.append(PuppetCpu(self, vcpu, number))
            self._stack = stack.pop_all()

    @property
    def serves_conversions(self) -> bool:
        """Whether the guest's hypercalls for a conversion are served."""
        return self._private_vm is not None

    def first_server(self) -> Callable[[PuppetCpu, Any], bool] | None:
        """What a vCPU's `serve` is at first."""
        vm = self._private_vm
        if vm is None:
            return None

        def serve(cpu: PuppetCpu, exit_: Any) -> bool:
            served = self._implicit or vm.abi.traits.access_follows_state
            served = served or exit_.reason == kvm_h.KVM_EXIT_HYPERCALL
            return served and serve_conversion(vm, cpu.vcpu, exit_)

        return serve

    def close(self) -> None:
        """Close the vCPUs, take the home away from the VM and give it back."""
        for cpu in self.cpus:
            cpu._mailbox.release()  # noqa: SLF001  # the memory's views go before the memory
        self._stack.close()

    def __enter__(self) -> Puppet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hypercall_instruction() -> str:
    """The processor's own: KVM would patch the other into the guest's code."""
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
        return "vmcall" if "GenuineIntel" in file.read(4096) else "vmmcall"


def _nothing(_: int) -> None:
    pass


def _sized(size: int, most: int) -> int:
    if size not in (1, 2, 4, 8) or size > most:
        raise ValueError(f"one access has 1, 2, 4{' or 8' if most == 8 else ''} bytes, not {size}")
    return size


def _byte(value: int) -> None:
    if not 0 <= value <= 0xFF:
        raise ValueError(f"{value} is not a byte")


def _reachable(gpa: int, size: int) -> None:
    if gpa < 0 or size < 0 or gpa + size > _REACH:
        raise ValueError(f"{size:#x} bytes at {gpa:#x} are no guest physical range")


def _seen(gpa: int) -> int:
    """Where in the window a guest physical address is, the window beginning in its 2 MiB."""
    return _WINDOW_ADDRESS + gpa % LARGE_PAGE


def _parts(gpa: int, size: int, most: int) -> Generator[tuple[int, int], None, None]:
    """Split a range into pieces of at most `most` bytes: (guest physical address, size)."""
    _reachable(gpa, size)
    for at in range(gpa, gpa + size, most):
        yield at, min(most, gpa + size - at)
