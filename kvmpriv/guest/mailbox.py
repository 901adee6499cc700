"""How the host gives commands to the puppet's agent, and what happens until one is done.

Each vCPU has a mailbox of 64-bit words.  The host writes a command's number and its arguments into
it and enters the guest; the agent (puppet.S) executes the command, writes the result into the
mailbox, and exits by an OUT to DONE_PORT.  The agent reaches guest physical memory through a window
of up to 1 GiB, which the host moves by two words of the mailbox.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

from ..cdefs import kvm as kvm_h
from ..errors import ClosedError
from . import crash, exceptions, x86
from .crash import GuestCrash
from .ready import PUPPET, PUPPET_SYMBOLS
from .x86 import LARGE_PAGE, PTE_LARGE, PTE_PRESENT_WRITABLE

if TYPE_CHECKING:
    from ..exits import Exit
    from ..memory import HostMemory
    from ..vcpu import Vcpu

__all__ = [
    "AGENT_SIZE",
    "BUFFER_SIZE",
    "CPUS_MAX",
    "DONE_PORT",
    "WINDOW_ADDRESS",
    "WINDOW_SIZE",
    "Agent",
    "GuestExit",
    "Step",
    "Steps",
    "write_agent",
]

#: The size of the agent's memory, in bytes.
AGENT_SIZE = 2 << 20

# The layout of the agent's memory: offsets in it, which are the guest virtual addresses too.
_CODE, _IDT, _HANDLERS = 0x1000, 0x3000, 0x4000
_CELLS, _CELL_SIZE = 0x20000, 0x20000
# Each vCPU has a cell.  Offsets in it:
_MAILBOX, _STACK_END, _PML4, _PDPT, _PD, _WINDOW_PD, _SEGMENTS, _EXCEPTION_STACK_END, _BUFFER = (
    0x0000, 0x2000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x8000, 0x10000,
)  # fmt: skip
#: How many bytes one command can copy.
BUFFER_SIZE = _CELL_SIZE - _BUFFER
CPUS_MAX = (AGENT_SIZE - _CELLS) // _CELL_SIZE

# puppet.S defines these; an offset in the mailbox becomes the index of a 64-bit word.
_COMMAND, _ARGUMENTS, _RESULT, _WINDOW, _PAGES, _DIRECTORY = (
    PUPPET_SYMBOLS[name] // 8
    for name in ("COMMAND", "ARGUMENTS", "RESULT", "WINDOW", "PAGES", "DIRECTORY")
)
#: A command ends with an OUT to this port.
DONE_PORT = PUPPET_SYMBOLS["DONE_PORT"]
_COMMANDS = {
    name.removeprefix("COMMAND_"): number
    for name, number in PUPPET_SYMBOLS.items()
    if name.startswith("COMMAND_")
}

#: The guest virtual address of the window, and its size.
WINDOW_ADDRESS, WINDOW_SIZE = 1 << 30, 512 * LARGE_PAGE
_MASK = (1 << 64) - 1
#: `exits` keeps at least so many of the last exits, and at most twice as many.
_EXITS_KEPT = 8192

_T = TypeVar("_T")
#: One command: its name, its arguments, and the guest physical range that the window must show.
Step = tuple[str, tuple[int, ...], tuple[int, int]]
#: Commands one after another: each `yield` returns the result of the command that it yields.
Steps = Generator[Step, int, _T]


def write_agent(memory: HostMemory) -> None:
    """Write the agent and its exception handlers, which all vCPUs share, into its memory."""
    memory.write(_CODE, PUPPET)
    exceptions.write_handlers(memory, _IDT, _HANDLERS)


class GuestExit(Exception):  # noqa: N818  # not an error, the guest's request
    """A command stopped at `exit`, an exit of the vCPU `cpu` that `serve` did not settle."""

    def __init__(self, cpu: Agent, exit_: Exit) -> None:
        super().__init__(str(exit_))
        self.cpu = cpu
        self.exit = exit_


class Agent:
    """A vCPU that runs the agent, and its mailbox.

    `memory` is the agent's, at guest physical `base`; `number` is that of the vCPU's cell.
    """

    def __init__(self, vcpu: Vcpu, memory: HostMemory, base: int, number: int) -> None:
        self.vcpu = vcpu
        #: The last exits, but those that end a command, in order: at least the last 8192.
        self.exits: list[Exit] = []
        #: How many such exits there have been in all.
        self.exit_count: int = 0
        self._memory = memory
        self._base = base
        self._cell = cell = _CELLS + number * _CELL_SIZE
        #: Where in the memory this vCPU has BUFFER_SIZE bytes for data.
        self.buffer: int = cell + _BUFFER
        self._under_way: Steps[object] | None = None
        words = memory.view().cast("Q")
        self._mailbox = words[(cell + _MAILBOX) // 8 : (cell + _MAILBOX) // 8 + 16]
        words[(cell + _PML4) // 8] = base + cell + _PDPT | PTE_PRESENT_WRITABLE
        words[(cell + _PDPT) // 8] = base + cell + _PD | PTE_PRESENT_WRITABLE
        words[(cell + _PDPT) // 8 + 1] = base + cell + _WINDOW_PD | PTE_PRESENT_WRITABLE
        words[(cell + _PD) // 8] = base | PTE_PRESENT_WRITABLE | PTE_LARGE
        x86.write_segments(memory, cell + _SEGMENTS, cell + _EXCEPTION_STACK_END)
        words.release()
        self.reset()

    def reset(self) -> None:
        """Restart the agent; a command that was under way is forgotten."""
        # KVM completes port and memory-mapped I/O when KVM_RUN is called again (api.rst), which
        # would overwrite registers set before.
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
            cr3=self._base + cell + _PML4,
            gdt=cell + _SEGMENTS,
            idt=_IDT,
        )
        regs = kvm_h.ffi.new("struct kvm_regs *")
        regs.rip, regs.rsp, regs.rbx, regs.rflags = _CODE, cell + _STACK_END, cell + _MAILBOX, 2
        self.vcpu.set_regs(regs)
        self._enter()

    def execute(self, steps: Steps[_T]) -> _T:
        """Have the agent execute commands; returns what `steps` returns.

        Raises GuestExit, GuestCrash; RuntimeError while another command is under way.
        """
        if self.vcpu.closed:
            raise ClosedError("the puppet is closed")
        if self._under_way is not None:
            raise RuntimeError("a command is under way: call resume() or reset() first")
        return self._drive(steps, None)

    def resume(self) -> object:
        """Continue the command that raised GuestExit; returns what that command returns."""
        if self._under_way is None:
            raise RuntimeError("no command is under way")
        steps = self._under_way
        self._enter()
        return self._drive(steps, self._mailbox[_RESULT])

    def settle(self, exit_: Exit) -> bool:
        """Called with each exit that does not end a command; True if the guest may go on."""
        return False

    def release(self) -> None:
        """Give up the mailbox, so that the memory can be unmapped."""
        self._mailbox.release()

    def _drive(self, steps: Steps[_T], result: int | None) -> _T:
        mailbox = self._mailbox
        while True:
            self._under_way = None  # as long as `steps` itself runs, which may raise
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
        """Run the guest until the command is done."""
        stopped = self._run_on()
        if stopped is not None:
            # Raised here, as a kept exception keeps the frame that raised it: that of _run_on
            # holds kvm_run, and so the vCPU's mapping.
            raise stopped

    def _run_on(self) -> GuestExit | GuestCrash | None:
        vcpu, run = self.vcpu, self.vcpu.kvm_run
        while True:
            reason = vcpu.run()
            if reason == kvm_h.KVM_EXIT_IO:
                port = run.io.port
                if port == DONE_PORT:
                    return None
                if port == exceptions.CRASH_PORT:
                    return self._exception()
            elif reason == kvm_h.KVM_EXIT_INTR:
                continue
            exit_ = vcpu.exit()
            self._keep(exit_)
            if self.settle(exit_):
                continue
            if reason in (
                kvm_h.KVM_EXIT_SHUTDOWN,
                kvm_h.KVM_EXIT_FAIL_ENTRY,
                kvm_h.KVM_EXIT_INTERNAL_ERROR,
            ):
                return self._crash(crash.describe_exit(exit_))
            return GuestExit(self, exit_)

    def _keep(self, exit_: Exit) -> None:
        if len(self.exits) >= 2 * _EXITS_KEPT:
            del self.exits[:_EXITS_KEPT]
        self.exits.append(exit_)
        self.exit_count += 1

    def _exception(self) -> GuestCrash:
        rsp = self.vcpu.get_regs().rsp
        end = self._cell + _EXCEPTION_STACK_END
        exception = exceptions.read_long_exception(self._memory, rsp, _HANDLERS, end)
        if exception is None:
            return self._crash("the exception handlers were called with a broken stack")
        return self._crash(crash.describe(exception, self.vcpu), exception)

    def _crash(self, why: str, exception: exceptions.GuestException | None = None) -> GuestCrash:
        return GuestCrash(why, crash.report(self.vcpu, self._memory, why, exception, self._base))
