"""Boot structures: what a guest's memory and registers hold when it starts.

Long mode: at the top of memory lie a GDT, a TSS, an IDT whose handlers report exceptions, and page
tables that map memory, and at least 4 GiB of addresses, one to one; the arguments and then the
stack are right below.  rdi is argc, rsi argv (argv[0] is the first argument; a null pointer ends
it), rdx the size of memory, in bytes.

Real mode: interrupt vectors at 0, their handlers up to LOAD_ADDRESS, where the arguments are too:
di is their number, si the first of them, each ends with a zero byte; sp is 0xfff0, every segment
is 0.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from ..memory import PAGE_SIZE
from .image import LOAD_ADDRESS, Image, ImageError, Mode

if TYPE_CHECKING:
    from ..memory import HostMemory
    from ..vcpu import Vcpu

__all__ = [
    "CRASH_PORT",
    "Exception_",
    "load",
    "read_exception",
    "read_long_exception",
    "set_segment",
    "start_long_mode",
    "write_handlers",
    "write_segments",
]

#: The exception handlers write here; what they say is on the stack.
CRASH_PORT = 0xF5

_GIB = 1 << 30
_ARGUMENTS_MAX = 64 << 10
_REAL_HANDLERS, _REAL_ARGUMENTS, _REAL_STACK = 0x400, 0x800, 0xFFF0

_PRESENT_WRITABLE, _LARGE = 0x3, 0x80
_CODE64, _DATA = 0x00209B0000000000, 0x0000930000000000  # GDT descriptors
_CODE_SELECTOR, _DATA_SELECTOR, _TSS_SELECTOR = 0x08, 0x10, 0x18
_TSS = 0x800  # behind the GDT, in its page
_CR0_PE, _CR0_NE, _CR0_MP, _CR0_PG = 1 << 0, 1 << 5, 1 << 1, 1 << 31
_CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_RFLAGS_FIXED = 1 << 1


class Exception_(NamedTuple):
    """An exception or an interrupt that the guest took without a handler of its own."""

    vector: int
    error_code: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int


class _LongLayout(NamedTuple):
    """Where the boot structures of long mode are."""

    base: int  # the GDT and the TSS
    idt: int
    handlers: int
    exception_stack: int  # its end
    pml4: int


def _long_layout(memory_size: int) -> _LongLayout:
    directories = _directories(memory_size)
    if directories > 512:
        raise ImageError("long mode's page tables are made for at most 512 GiB of memory")
    base = memory_size - (7 + directories) * PAGE_SIZE
    idt, handlers, stack_end, pml4 = (base + n * PAGE_SIZE for n in (1, 2, 5, 5))
    return _LongLayout(base, idt, handlers, stack_end, pml4)


def _directories(memory_size: int) -> int:
    return max(4, -(-memory_size // _GIB))


def load(image: Image, memory: HostMemory, vcpu: Vcpu, arguments: tuple[bytes, ...] = ()) -> None:
    """Put `image` and the boot structures into `memory`, and set the vCPU's registers.

    `memory` is the guest's from address 0.  ImageError when something does not fit.
    """
    if any(0 in argument for argument in arguments):
        raise ImageError("an argument for the guest holds a zero byte")
    strings = b"".join(argument + b"\0" for argument in arguments)
    if len(strings) > _ARGUMENTS_MAX:
        raise ImageError(f"the arguments take {len(strings)} bytes; {_ARGUMENTS_MAX} is the most")
    if image.mode is Mode.REAL:
        _load_real(image, memory, vcpu, strings, len(arguments))
    else:
        _load_long(image, memory, vcpu, arguments)


def _place(image: Image, memory: HostMemory, low: int, high: int) -> None:
    for segment in image.segments:
        end = segment.address + segment.memory_size
        if segment.address < low or end > high:
            raise ImageError(
                f"the image wants {segment.address:#x}…{end:#x}; with {memory.size:#x} bytes of"
                f" memory it may have {low:#x}…{max(low, high):#x}"
            )
        memory.write(segment.address, segment.data)
    if not low <= image.entry < high:
        raise ImageError(f"entry {image.entry:#x} is outside {low:#x}…{max(low, high):#x}")


def _load_real(image: Image, memory: HostMemory, vcpu: Vcpu, strings: bytes, count: int) -> None:
    first = LOAD_ADDRESS[Mode.REAL]
    if _REAL_ARGUMENTS + len(strings) > first:
        raise ImageError(f"the arguments take more than {first - _REAL_ARGUMENTS} bytes")
    if image.entry > 0xFFFF:
        raise ImageError(f"entry {image.entry:#x} is beyond real mode's first 64 KiB")
    if memory.size < 0x10000:
        raise ImageError(f"real mode takes at least 64 KiB of memory, not {memory.size:#x} bytes")
    _place(image, memory, first, memory.size)
    memory.write(0, b"".join(struct.pack("<HH", _REAL_HANDLERS + 3 * n, 0) for n in range(256)))
    # Handler n calls the common part, which so finds on the stack who called.
    common = _REAL_HANDLERS + 3 * 256
    handlers = b"".join(
        b"\xe8" + struct.pack("<h", common - (_REAL_HANDLERS + 3 * n + 3)) for n in range(256)
    )
    memory.write(_REAL_HANDLERS, handlers + bytes((0xE6, CRASH_PORT, 0xF4)))  # out; hlt
    memory.write(_REAL_ARGUMENTS, strings)

    sregs = vcpu.get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base = segment.selector = 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = image.entry, _REAL_STACK, _RFLAGS_FIXED
    regs.rdi, regs.rsi = count, _REAL_ARGUMENTS
    vcpu.set_regs(regs)


def _load_long(image: Image, memory: HostMemory, vcpu: Vcpu, arguments: tuple[bytes, ...]) -> None:
    layout = _long_layout(memory.size)
    stack = layout.base - _arguments_size(arguments)
    if stack <= 0:
        raise ImageError(
            f"{memory.size:#x} bytes of memory do not hold the boot structures of long mode:"
            f" it takes {memory.size - layout.base + PAGE_SIZE:#x} and the image"
        )
    _place(image, memory, 0, stack)
    write_segments(memory, layout.base, layout.exception_stack)
    write_handlers(memory, layout.idt, layout.handlers)
    _write_page_tables(memory, layout.pml4)
    argv = _write_arguments(memory, stack, arguments)

    start_long_mode(vcpu, cr3=layout.pml4, gdt=layout.base, idt=layout.idt)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = image.entry, stack, _RFLAGS_FIXED
    regs.rdi, regs.rsi, regs.rdx = len(arguments), argv, memory.size
    vcpu.set_regs(regs)


def set_segment(segment: object, *, is_code: bool, selector: int) -> None:
    """A flat segment, 64-bit code or data, as it would be loaded from a GDT."""
    values = {
        "base": 0,
        "limit": 0xFFFFFFFF,
        "selector": selector,
        "type": 11 if is_code else 3,  # execute/read or read/write, accessed
        "present": 1,
        "dpl": 0,
        "s": 1,
        "g": 1,
        "l": int(is_code),
        "db": int(not is_code),
        "unusable": 0,
    }
    for name, value in values.items():
        setattr(segment, name, value)


def write_segments(memory: HostMemory, base: int, exception_stack: int) -> None:
    """A GDT at `base` and a TSS in the second half of its page; `exception_stack` is IST 1.

    Like all addresses here these are offsets into `memory`, mapped one to one.
    """
    tss = base + _TSS
    tss_low = 0x67 | (tss & 0xFFFFFF) << 16 | 0x8B << 40 | (tss >> 24 & 0xFF) << 56
    memory.write(base, struct.pack("<5Q", 0, _CODE64, _DATA, tss_low, tss >> 32))
    # In the TSS: the stack that interrupt gates with IST 1 take, 0x24 bytes in.
    memory.write(tss, bytes(0x24) + struct.pack("<Q", exception_stack) + bytes(0x3C))


def write_handlers(memory: HostMemory, idt: int, handlers: int) -> None:
    """An IDT whose handlers report to CRASH_PORT: a page, and 1.3 KiB at `handlers`."""
    gates, code = [], []
    common = handlers + 5 * 256
    for vector in range(256):
        handler = handlers + 5 * vector
        gates.append(
            struct.pack(
                "<HHBBHII",
                handler & 0xFFFF,
                _CODE_SELECTOR,
                1,  # IST 1: a good stack whatever rsp is
                0x8E,
                handler >> 16 & 0xFFFF,
                handler >> 32,
                0,
            )
        )
        # Handler n calls the common part, which so finds on the stack who called.
        code.append(b"\xe8" + struct.pack("<i", common - (handler + 5)))
    memory.write(idt, b"".join(gates))
    memory.write(handlers, b"".join(code) + bytes((0xE6, CRASH_PORT, 0xF4)))  # out; hlt


def start_long_mode(vcpu: Vcpu, *, cr3: int, gdt: int, idt: int) -> None:
    """Long mode, paging on, interrupts off, with what the two functions above have written."""
    sregs = vcpu.get_sregs()
    sregs.cr3 = cr3
    sregs.cr0 = _CR0_PE | _CR0_MP | _CR0_NE | _CR0_PG
    sregs.cr4 = _CR4_PAE | _CR4_OSFXSR | _CR4_OSXMMEXCPT
    sregs.efer = _EFER_LME | _EFER_LMA
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        is_code = name == "cs"
        selector = _CODE_SELECTOR if is_code else _DATA_SELECTOR
        set_segment(getattr(sregs, name), is_code=is_code, selector=selector)
    task = sregs.tr
    task.base, task.limit, task.selector = gdt + _TSS, 0x67, _TSS_SELECTOR
    task.type, task.present, task.s, task.g, task.unusable = 11, 1, 0, 0, 0  # a busy TSS
    sregs.gdt.base, sregs.gdt.limit = gdt, 0x27
    sregs.idt.base, sregs.idt.limit = idt, 0xFFF
    vcpu.set_sregs(sregs)


def _write_page_tables(memory: HostMemory, pml4: int) -> None:
    count = _directories(memory.size)
    pdpt = pml4 + PAGE_SIZE
    first = pdpt + PAGE_SIZE
    memory.write(pml4, struct.pack("<Q", pdpt | _PRESENT_WRITABLE))
    memory.write(
        pdpt,
        struct.pack(
            f"<{count}Q", *(first + n * PAGE_SIZE | _PRESENT_WRITABLE for n in range(count))
        ),
    )
    entries = 512 * count
    memory.write(
        first,
        struct.pack(
            f"<{entries}Q", *((n << 21) | _PRESENT_WRITABLE | _LARGE for n in range(entries))
        ),
    )


def _arguments_size(arguments: tuple[bytes, ...]) -> int:
    size = 8 * (len(arguments) + 1) + sum(len(argument) + 1 for argument in arguments)
    return (size + 15) & ~15


def _write_arguments(memory: HostMemory, base: int, arguments: tuple[bytes, ...]) -> int:
    """Put argv and its strings at `base`; returns where argv is."""
    pointers = []
    place = base + 8 * (len(arguments) + 1)
    for argument in arguments:
        pointers.append(place)
        memory.write(place, argument + b"\0")
        place += len(argument) + 1
    memory.write(base, struct.pack(f"<{len(pointers) + 1}Q", *pointers, 0))
    return base


def read_exception(mode: Mode, memory: HostMemory, vcpu: Vcpu) -> Exception_ | None:
    """What a handler's stack says after its write to CRASH_PORT; None if it says nothing."""
    rsp = vcpu.get_regs().rsp
    if mode is Mode.REAL:
        stack = vcpu.get_sregs().ss.base + (rsp & 0xFFFF)
        if stack + 8 > memory.size:
            return None
        # The caller's address, then what the processor pushed: ip, cs, flags.
        caller, ip, cs, flags = struct.unpack("<4H", memory.read(stack, 8))
        vector, odd = divmod(caller - 3 - _REAL_HANDLERS, 3)
        if odd or not 0 <= vector < 256:
            return None
        return Exception_(vector, None, ip, cs, flags, (rsp & 0xFFFF) + 8)
    layout = _long_layout(memory.size)
    return read_long_exception(memory, rsp, layout.handlers, layout.exception_stack)


def read_long_exception(
    memory: HostMemory, rsp: int, handlers: int, exception_stack: int
) -> Exception_ | None:
    """The same for long mode, wherever :func:`write_handlers` has put the handlers."""
    if not exception_stack - PAGE_SIZE <= rsp < exception_stack:
        return None
    # The processor aligns the stack before it pushes 5 words, or 6 with an error code.
    with_code = rsp % 16 == 8
    words = struct.unpack(f"<{7 if with_code else 6}Q", memory.read(rsp, 56 if with_code else 48))
    vector, odd = divmod(words[0] - 5 - handlers, 5)
    if odd or not 0 <= vector < 256:
        return None
    rip, cs, rflags, stack, _ = words[-5:]
    return Exception_(vector, words[1] if with_code else None, rip, cs, rflags, stack)
