"""What a bare guest's memory and registers hold when it starts.

Long mode: at the top of memory lie a GDT, a TSS, an IDT whose handlers report exceptions, and page
tables that map all of memory, and at least 4 GiB of addresses, one to one.  The arguments and then
the stack are right below.  rdi is argc; rsi is argv, which ends with a null pointer (argv[0] is the
first argument); rdx is the size of memory in bytes.

Real mode: the interrupt vectors are at 0; their handlers and the arguments are below LOAD_ADDRESS.
di is the number of arguments, si the address of the first; each ends with a zero byte.  sp is
0xfff0, and every segment is 0.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from ..memory import PAGE_SIZE
from . import exceptions, x86
from .image import LOAD_ADDRESS, Image, ImageError, Mode

if TYPE_CHECKING:
    from ..memory import HostMemory
    from ..vcpu import Vcpu
    from .exceptions import GuestException

__all__ = ["load", "read_exception"]

_ARGUMENTS_MAX = 64 << 10
_REAL_ARGUMENTS, _REAL_STACK = 0x800, 0xFFF0


class _LongLayout(NamedTuple):
    """Where the boot structures of long mode are; offsets, from the lowest to the highest."""

    base: int  # the GDT and the TSS
    idt: int
    handlers: int
    exception_stack: int  # its end
    pml4: int
    gib: int  # how much the page tables map


def _long_layout(memory_size: int) -> _LongLayout:
    gib = max(4, -(-memory_size // x86.GIB))
    if gib > x86.PAGE_TABLE_ENTRIES:
        raise ImageError(
            f"{memory_size:#x} bytes of memory are too many: the page tables for long mode map"
            f" at most {x86.PAGE_TABLE_ENTRIES} GiB"
        )
    base = memory_size - (7 + gib) * PAGE_SIZE
    idt, handlers, stack_end, pml4 = (base + n * PAGE_SIZE for n in (1, 2, 5, 5))
    return _LongLayout(base, idt, handlers, stack_end, pml4, gib)


def load(image: Image, memory: HostMemory, vcpu: Vcpu, arguments: tuple[bytes, ...] = ()) -> None:
    """Write `image` and the boot structures into `memory`, and set the vCPU's registers.

    `memory` is mapped at guest physical address 0.  ImageError says what does not fit.
    """
    if any(0 in argument for argument in arguments):
        raise ImageError("an argument for the guest contains a zero byte")
    strings = b"".join(argument + b"\0" for argument in arguments)
    if len(strings) > _ARGUMENTS_MAX:
        raise ImageError(
            f"the arguments take {len(strings)} bytes; at most {_ARGUMENTS_MAX} are possible"
        )
    if image.mode is Mode.REAL:
        _load_real(image, memory, vcpu, strings, len(arguments))
    else:
        _load_long(image, memory, vcpu, arguments)


def _place(image: Image, memory: HostMemory, low: int, high: int) -> None:
    for segment in image.segments:
        end = segment.address + segment.memory_size
        if segment.address < low or end > high:
            raise ImageError(
                f"the image needs {segment.address:#x}…{end:#x}; with {memory.size:#x} bytes of"
                f" memory only {low:#x}…{max(low, high):#x} is free for it"
            )
        memory.write(segment.address, segment.data)
    if not low <= image.entry < high:
        raise ImageError(
            f"the entry {image.entry:#x} is outside the memory for the image,"
            f" {low:#x}…{max(low, high):#x}"
        )


def _load_real(image: Image, memory: HostMemory, vcpu: Vcpu, strings: bytes, count: int) -> None:
    first = LOAD_ADDRESS[Mode.REAL]
    if _REAL_ARGUMENTS + len(strings) > first:
        raise ImageError(
            f"the arguments take {len(strings)} bytes; in real mode at most"
            f" {first - _REAL_ARGUMENTS} are possible"
        )
    if image.entry > 0xFFFF:
        raise ImageError(f"the entry {image.entry:#x} is above real mode's first 64 KiB")
    if memory.size < 0x10000:
        raise ImageError(f"real mode needs at least 64 KiB of memory, not {memory.size:#x} bytes")
    _place(image, memory, first, memory.size)
    exceptions.write_real_handlers(memory)
    memory.write(_REAL_ARGUMENTS, strings)

    vcpu.start_real_mode(image.entry, rsp=_REAL_STACK)
    with vcpu.regs() as regs:
        regs.rdi, regs.rsi = count, _REAL_ARGUMENTS


def _load_long(image: Image, memory: HostMemory, vcpu: Vcpu, arguments: tuple[bytes, ...]) -> None:
    layout = _long_layout(memory.size)
    stack = layout.base - _arguments_size(arguments)
    if stack <= 0:
        raise ImageError(
            f"{memory.size:#x} bytes of memory are too few for long mode: its boot structures take"
            f" {memory.size - layout.base + PAGE_SIZE:#x} bytes, and the image comes on top"
        )
    _place(image, memory, 0, stack)
    x86.write_segments(memory, layout.base, layout.exception_stack)
    exceptions.write_handlers(memory, layout.idt, layout.handlers)
    x86.write_identity_map(memory, layout.pml4, layout.gib)
    argv = _write_arguments(memory, stack, arguments)

    x86.start_long_mode(vcpu, cr3=layout.pml4, gdt=layout.base, idt=layout.idt)
    with vcpu.regs() as regs:
        regs.rip, regs.rsp, regs.rflags = image.entry, stack, x86.RFLAGS_FIXED
        regs.rdi, regs.rsi, regs.rdx = len(arguments), argv, memory.size


def _arguments_size(arguments: tuple[bytes, ...]) -> int:
    size = 8 * (len(arguments) + 1) + sum(len(argument) + 1 for argument in arguments)
    return (size + 15) & ~15


def _write_arguments(memory: HostMemory, base: int, arguments: tuple[bytes, ...]) -> int:
    """Write argv and its strings at the offset `base`; returns where argv is."""
    pointers = []
    place = base + 8 * (len(arguments) + 1)
    for argument in arguments:
        pointers.append(place)
        memory.write(place, argument + b"\0")
        place += len(argument) + 1
    memory.write(base, struct.pack(f"<{len(pointers) + 1}Q", *pointers, 0))
    return base


def read_exception(mode: Mode, memory: HostMemory, vcpu: Vcpu) -> GuestException | None:
    """The exception that a handler has just reported by a write to CRASH_PORT.

    None if the stack holds none: the guest itself wrote to that port.
    """
    if mode is Mode.REAL:
        return exceptions.read_real_exception(memory, vcpu)
    layout = _long_layout(memory.size)
    rsp = vcpu.get_regs().rsp
    return exceptions.read_long_exception(memory, rsp, layout.handlers, layout.exception_stack)
