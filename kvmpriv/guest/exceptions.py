"""Exception handlers for a guest that has none: they report each exception to the host.

Handler number N is a `call` to code that all handlers share, so the return address on the stack
tells the vector.  The shared code writes to CRASH_PORT and halts; the host then reads the stack.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from ..memory import PAGE_SIZE
from .x86 import CODE_SELECTOR

if TYPE_CHECKING:
    from ..memory import HostMemory
    from ..vcpu import Vcpu

__all__ = [
    "CRASH_PORT",
    "REAL_HANDLERS",
    "GuestException",
    "read_long_exception",
    "read_real_exception",
    "write_handlers",
    "write_real_handlers",
]

#: The exception handlers write to this port; the stack then holds what happened.
CRASH_PORT = 0xF5
#: Where the handlers of real mode are; the interrupt vectors end there.
REAL_HANDLERS = 0x400

_VECTORS = 256
_REPORT = bytes((0xE6, CRASH_PORT, 0xF4))  # out %al, $CRASH_PORT; hlt
_REAL_CALL, _LONG_CALL = 3, 5  # the size of a handler: one call
_PRESENT_INTERRUPT_GATE, _IST = 0x8E, 1


class GuestException(NamedTuple):
    """An exception or an interrupt that the guest has no handler of its own for."""

    vector: int
    error_code: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int


def write_handlers(memory: HostMemory, idt: int, handlers: int) -> None:
    """Write an IDT (one page, at the offset `idt`) and its handlers (1.3 KiB, at `handlers`).

    Offsets into `memory` are guest virtual addresses at the same time.  The gates use the stack
    IST 1, so that a handler runs whatever rsp is.
    """
    gates, code = [], []
    common = handlers + _LONG_CALL * _VECTORS
    for vector in range(_VECTORS):
        at = handlers + _LONG_CALL * vector
        low, middle, high = at & 0xFFFF, at >> 16 & 0xFFFF, at >> 32
        gate = (low, CODE_SELECTOR, _IST, _PRESENT_INTERRUPT_GATE, middle, high, 0)
        gates.append(struct.pack("<HHBBHII", *gate))
        code.append(b"\xe8" + struct.pack("<i", common - (at + _LONG_CALL)))
    memory.write(idt, b"".join(gates))
    memory.write(handlers, b"".join(code) + _REPORT)


def write_real_handlers(memory: HostMemory) -> None:
    """Write the interrupt vectors of real mode at 0, and their handlers at REAL_HANDLERS."""
    places = [REAL_HANDLERS + _REAL_CALL * vector for vector in range(_VECTORS)]
    common = REAL_HANDLERS + _REAL_CALL * _VECTORS
    code = [b"\xe8" + struct.pack("<h", common - (at + _REAL_CALL)) for at in places]
    memory.write(0, b"".join(struct.pack("<HH", at, 0) for at in places))
    memory.write(REAL_HANDLERS, b"".join(code) + _REPORT)


def read_real_exception(memory: HostMemory, vcpu: Vcpu) -> GuestException | None:
    """The exception that a handler of `write_real_handlers` has just reported.

    None if the stack holds none: the guest itself wrote to CRASH_PORT.
    """
    sp = vcpu.get_regs().rsp & 0xFFFF
    stack = vcpu.get_sregs().ss.base + sp
    if stack + 8 > memory.size:
        return None
    # The handler's return address, then what the processor pushed: ip, cs, flags.
    caller, ip, cs, flags = struct.unpack("<4H", memory.read(stack, 8))
    vector, odd = divmod(caller - _REAL_CALL - REAL_HANDLERS, _REAL_CALL)
    if odd or not 0 <= vector < _VECTORS:
        return None
    return GuestException(vector, None, ip, cs, flags, sp + 8)


def read_long_exception(
    memory: HostMemory, rsp: int, handlers: int, exception_stack: int
) -> GuestException | None:
    """The exception that a handler of `write_handlers` has just reported; `rsp` is the vCPU's.

    None if the stack holds none: the guest itself wrote to CRASH_PORT.
    """
    if not exception_stack - PAGE_SIZE <= rsp < exception_stack:
        return None
    # The processor aligns the stack before it pushes 5 words, or 6 with an error code.
    with_code = rsp % 16 == 8
    words = struct.unpack(f"<{7 if with_code else 6}Q", memory.read(rsp, 56 if with_code else 48))
    vector, odd = divmod(words[0] - _LONG_CALL - handlers, _LONG_CALL)
    if odd or not 0 <= vector < _VECTORS:
        return None
    rip, cs, rflags, stack, _ = words[-5:]
    return GuestException(vector, words[1] if with_code else None, rip, cs, rflags, stack)
