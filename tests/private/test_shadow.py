"""What KVM reads and writes by itself: the shared side of a page, never the private one.

Whatever KVM has to decode, it takes from where the host can write; whatever it hands to the guest
in memory lands where the host can read.  That is how private memory without hardware is; a guest
has to know of it, and here it is shown.  On a processor that hands KVM the bytes or the length of
an instruction there is nothing to decode, and the private bytes count.
"""

from __future__ import annotations

import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvmpriv.cdefs import kvm as k
from kvmpriv.exits import Exit, ExitReason, IoExit, MmioExit
from kvmpriv.guest.crash import GuestCrash

from .support.kernels import cpu_flags
from .support.requirements import missing
from .support.rig import LARGE, MakeRig, Rig, two_backings
from .support.rules import rule
from .support.syscalls import GIB, MIB, PAGE

pytestmark = [pytest.mark.usefixtures("no_leak"), two_backings]

#: 1 MiB of private memory; behind it, still in the same large page, is nothing: MMIO.
BASE, SIZE = 8 * GIB, MIB
CODE, DATA, MMIO = BASE + PAGE, BASE + 2 * PAGE, BASE + SIZE + 64
PORT = 0x10


def decodes_itself() -> bool:
    """Whether KVM fetches instructions that access MMIO: no hardware provides their bytes."""
    return "decodeassists" not in cpu_flags()


def measures_itself() -> bool:
    """Whether KVM decodes an instruction to skip it, because no hardware provides its length."""
    nrips = Path("/sys/module/kvm_amd/parameters/nrips")
    return "svm" in cpu_flags() and nrips.exists() and nrips.read_text().strip() in ("0", "N")


class Shadowed:
    """A private slot, and what the host writes to the shared side of its pages."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.guest = rig, rig.guest
        self.memory = rig.memory(SIZE + 5 * PAGE)
        self.file = rig.file(SIZE + 3 * PAGE)
        rig.bind(BASE, SIZE, self.file, 3 * PAGE, memory=self.memory, memory_offset=5 * PAGE)

    def host_writes(self, gpa: int, data: bytes) -> None:
        self.memory.write(gpa - BASE + 5 * PAGE, data)

    def host_reads(self, gpa: int, size: int) -> bytes:
        return self.memory.read(gpa - BASE + 5 * PAGE, size)

    def runs(self, gpa: int, argument: int = 0) -> tuple[int, list[Any]]:
        """What the code at `gpa` returns, and the exits on the way, which are continued."""
        self.guest.exits.clear()
        self.guest.serve = lambda *_: True
        returned = self.guest.run(gpa, argument)
        return returned, list(self.guest.exits)


@pytest.fixture
def shadowed(rig: Rig) -> Shadowed:
    return Shadowed(rig)


def relative(where: int, instruction: bytes, target: int) -> bytes:
    """An instruction at `where` with a displacement, its last part, to `target`."""
    return instruction + struct.pack("<i", target - where - len(instruction) - 4)


SECRET, PUBLIC, CHOSEN = 0x53454352, 0x11223344, 0x484F5354


def program(instruction: bytes) -> bytes:
    """Loads a secret into eax and something harmless into ecx; then the instruction of 6 bytes."""
    assert len(instruction) == 6
    head = b"\xb8" + struct.pack("<I", SECRET) + b"\xb9" + struct.pack("<I", PUBLIC)
    return head + instruction + b"\x89\xc8\xc3"  # mov %ecx, %eax; ret


#: mov %ecx, MMIO: what the guest means.
STORE = relative(CODE + 10, b"\x89\x0d", MMIO)
#: name -> (what the host puts there, what then comes out, what the guest has in ecx)
CHOICES: dict[str, tuple[bytes, list[Any], int]] = {
    "the same": (
        STORE,
        [MmioExit(ExitReason.MMIO, True, MMIO, 4, struct.pack("<I", PUBLIC))],
        PUBLIC,
    ),
    "another register": (
        relative(CODE + 10, b"\x89\x05", MMIO),  # mov %eax, MMIO
        [MmioExit(ExitReason.MMIO, True, MMIO, 4, struct.pack("<I", SECRET))],
        PUBLIC,
    ),
    "a port": (
        b"\x3e\x3e\x3e\x3e\xe7" + bytes([PORT]),  # out %eax, $PORT
        [IoExit(ExitReason.IO, True, PORT, 4, 1, struct.pack("<I", SECRET))],
        PUBLIC,
    ),
    "a value": (b"\x3e\xb9" + struct.pack("<I", CHOSEN), [], CHOSEN),  # mov $CHOSEN, %ecx
}


@rule("private.shadow.decode.leak", "private.shadow.decode.injection")
@pytest.mark.parametrize("name", CHOICES)
def test_the_host_chooses_the_instruction(shadowed: Shadowed, name: str) -> None:
    """For private code that accesses MMIO, KVM executes what the host wrote to the same address.

    Leak: the exit shows another register.  Injection: the guest gets a value that it never loaded.
    """
    bytes_, exits, result = CHOICES[name]
    if not decodes_itself():
        _, exits, result = CHOICES["the same"]
    shadowed.guest.write(CODE, program(STORE))
    shadowed.host_writes(CODE, program(bytes_))
    assert shadowed.runs(CODE) == (result, exits)
    assert shadowed.guest.read(CODE, 19) == program(STORE), "the private code is as it was"
    # In shared memory it is the host's program that runs, altogether.
    shadowed.rig.convert(CODE, PAGE, private=False)
    assert shadowed.runs(CODE) == (CHOICES[name][2], CHOICES[name][1])


@rule("private.shadow.decode.length")
def test_the_host_chooses_where_the_guest_goes_on(shadowed: Shadowed) -> None:
    """For CPUID in private code, KVM takes the instruction's length from the host's bytes."""
    setting = b"\xb8\x11\x11\x11\x11"  # mov $0x11111111, %eax
    code = b"\xb8\0\0\0\x40" + b"\x0f\xa2" + setting + b"\xc3"
    longer = b"\xb8\0\0\0\x40" + b"\x48\xc7\xc0\0\0\0\0" + b"\xc3"
    shadowed.guest.write(CODE, code)
    shadowed.host_writes(CODE, code)
    assert shadowed.runs(CODE) == (0x11111111, [])
    shadowed.host_writes(CODE, longer)
    leaf, *_ = shadowed.guest.cpuid(0x40000000)
    expected = leaf if measures_itself() else 0x11111111
    assert shadowed.runs(CODE) == (expected, [])


#: lea DATA, %rsi (or %rdi); mov $PORT, %dx; outsl (or insl); ret
OUTSL = relative(CODE, b"\x48\x8d\x35", DATA) + b"\x66\xba" + bytes([PORT, 0]) + b"\x6f\xc3"
INSL = relative(CODE, b"\x48\x8d\x3d", DATA) + b"\x66\xba" + bytes([PORT, 0]) + b"\x6d\xc3"


def shared_code(shadowed: Shadowed, code: bytes) -> None:
    """Shared code, so that only its data is tested."""
    shadowed.rig.convert(CODE, PAGE, private=False)
    shadowed.host_writes(CODE, code)


@rule("private.shadow.emulation.read")
def test_emulated_reads(shadowed: Shadowed) -> None:
    """String output from private memory sends what the host wrote there."""
    shared_code(shadowed, OUTSL)
    shadowed.guest.write(DATA, b"mine")
    shadowed.host_writes(DATA, b"host")
    _, exits = shadowed.runs(CODE)
    assert exits == [IoExit(ExitReason.IO, True, PORT, 4, 1, b"host")]
    assert shadowed.guest.read(DATA, 4) == b"mine", "which is not what it reads"
    shadowed.rig.convert(DATA, PAGE, private=False)
    shadowed.guest.write(DATA, b"both")
    _, exits = shadowed.runs(CODE)
    assert exits == [IoExit(ExitReason.IO, True, PORT, 4, 1, b"both")], (
        "the control, in shared memory"
    )


@rule("private.shadow.emulation.write")
def test_emulated_writes(shadowed: Shadowed) -> None:
    """String input into private memory goes to the shared page; the guest does not see it."""
    shared_code(shadowed, INSL)
    shadowed.guest.write(DATA, b"mine")
    shadowed.host_writes(DATA, b"host")

    def serve(_: object, exit_: Exit) -> bool:
        assert isinstance(exit_, IoExit)
        assert (exit_.is_write, exit_.port, exit_.size) == (False, PORT, 4)
        page = shadowed.guest.vcpu.kvm_run
        start = k.ffi.cast("char *", page) + page.io.data_offset
        k.ffi.buffer(start, 4)[:] = b"came"
        return True

    shadowed.guest.serve = serve
    shadowed.guest.run(CODE)
    assert len(shadowed.guest.exits) == 1
    assert shadowed.host_reads(DATA, 4) == b"came"
    assert shadowed.guest.read(DATA, 4) == b"mine"
    shadowed.rig.convert(DATA, PAGE, private=False)
    shadowed.host_writes(DATA, b"host")
    shadowed.guest.run(CODE)
    assert shadowed.guest.read(DATA, 4) == b"came", "the control, in shared memory"


# -- what KVM writes -------------------------------------------------------------------------------

WALL_CLOCK, SYSTEM_TIME, STEAL_TIME, PV_EOI = (
    0x4B564D00, 0x4B564D01, 0x4B564D03, 0x4B564D04,
)  # fmt: skip
#: What the page is full of before.
FULL = b"\xee"
#: name -> MSR, its low bits, the feature's bit in CPUID 0x40000001, where KVM writes something new
WRITERS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "wall-clock": (WALL_CLOCK, 0, 3, (0, 4)),  # version, seconds
    "kvmclock": (SYSTEM_TIME, 1, 3, (0, 8, 16, 24)),  # version, TSC, time, multiplier
    "steal-time": (STEAL_TIME, 1, 5, (8,)),  # version
    # A bit that is set while the guest runs, and cleared again.
    "pv-eoi": (PV_EOI, 1, 6, (0,)),
}


def interrupt(shadowed: Shadowed) -> None:
    """Send the guest an interrupt, for which it has but the handler that says it has crashed."""
    rig, vector = shadowed.rig, 0x1F
    lapic = rig.guest.vcpu.get_lapic()
    registers = k.ffi.buffer(lapic)
    registers[0xF0:0xF4] = struct.pack("<I", 0x1FF)  # enabled
    registers[0x100:0x104] = bytes(4)  # nothing is in service
    rig.guest.vcpu.set_lapic(lapic)
    rig.vm.signal_msi(0xFEE00000, vector)
    shared_code(shadowed, b"\xfb\x90\x90\xfa\xc3")  # sti; nop; nop; cli; ret
    with pytest.raises(GuestCrash):
        rig.guest.run(CODE)
    rig.guest.reset()


@rule("private.shadow.kvm-writes")
@pytest.mark.parametrize("name", WRITERS)
def test_what_kvm_writes(make_rig: MakeRig, name: str) -> None:
    """What KVM writes into a private page for the guest is seen by the host only."""
    msr, low, bit, changed = WRITERS[name]
    rig = make_rig(irqchip=msr == PV_EOI)
    shadowed, guest = Shadowed(rig), rig.guest
    if not guest.cpuid(0x40000001)[0] >> bit & 1:
        missing(name, f"KVM does not offer it: bit {bit} of CPUID 0x40000001")
    rig.convert(DATA + PAGE, PAGE, private=False)
    guest.fill(DATA, 0x5A, PAGE)
    shadowed.host_writes(DATA, FULL * 2 * PAGE)
    for gpa in (DATA, DATA + PAGE):
        guest.wrmsr(msr, gpa | low)
        if msr == PV_EOI:
            interrupt(shadowed)
        assert guest.span(DATA, 0x5A, PAGE) == PAGE, "the guest's page is as it was"
        page = shadowed.host_reads(gpa, PAGE)
        for at in changed:
            assert page[at : at + 4] != FULL * 4, (hex(gpa), at)
        assert page[64:] == FULL * (PAGE - 64)
    # The second one was shared: there the guest finds it, too.
    page = guest.read(DATA + PAGE, PAGE)
    for at in changed:
        assert page[at : at + 4] != FULL * 4, at


# -- page tables -----------------------------------------------------------------------------------

TARGET = 12 * GIB
#: Where the tables below map a large page of TARGET.
VIRTUAL = 2 << 30


@rule("private.shadow.page-tables")
def test_page_tables(shadowed: Shadowed) -> None:
    """With page tables in private memory the processor walks the guest's, and KVM the host's."""
    rig, guest = shadowed.rig, shadowed.guest
    target = rig.memory(2 * LARGE)
    rig.vm.map(target, TARGET)
    load, out = PAGE, 2 * PAGE
    for offset, data in (
        (0, b"guests'!"),
        (LARGE, b"the host"),
        (load, b"\x48\x8b\x07\xc3"),  # mov (%rdi), %rax; ret
        # mov %rdi, %rsi; mov $PORT, %dx; outsl; ret
        (out, b"\x48\x89\xfe\x66\xba" + bytes([PORT, 0]) + b"\x6f\xc3"),
    ):
        target.write(offset, data)

    # As the puppet's own tables, with one large page more at VIRTUAL.
    sregs = guest.vcpu.get_sregs()
    top = guest.memory.read(sregs.cr3 - guest.base, PAGE)
    (entry,) = struct.unpack_from("<Q", top)
    second = guest.memory.read((entry & -PAGE) - guest.base, PAGE)
    pml4, pdpt, pd = (BASE + number * PAGE for number in (8, 9, 10))

    def tables(gpa: int) -> list[tuple[int, bytes]]:
        mine = bytearray(second)
        struct.pack_into("<Q", mine, 8 * (VIRTUAL >> 30), pd | 3)
        return [
            (pml4, struct.pack("<Q", pdpt | 3) + top[8:]),
            (pdpt, bytes(mine)),
            (pd, struct.pack("<Q", gpa | 0x83)),
        ]

    for gpa, data in tables(TARGET):
        guest.write(gpa, data)
    sregs.cr3 = pml4
    guest.vcpu.set_sregs(sregs)
    translate = guest.vcpu.translate
    assert guest.run(TARGET + load, VIRTUAL).to_bytes(8, "little") == b"guests'!"
    assert (translate(0), translate(VIRTUAL)) == (None, None), "KVM finds no tables"
    for gpa, data in tables(TARGET + LARGE):
        shadowed.host_writes(gpa, data)
    assert (translate(0), translate(VIRTUAL + 5)) == (guest.base, TARGET + LARGE + 5)
    _, exits = shadowed.runs(TARGET + out, VIRTUAL)
    assert exits == [IoExit(ExitReason.IO, True, PORT, 4, 1, b"the ")]
    assert guest.run(TARGET + load, VIRTUAL).to_bytes(8, "little") == b"guests'!"
    # Each of them notes down in its own tables that a page was accessed.
    assert struct.unpack("<Q", shadowed.host_reads(pd, 8)) == (TARGET + LARGE | 0xA3,)
    assert int.from_bytes(guest.read(pd, 8), "little") & ~0x40 == TARGET | 0xA3


# -- hypercalls of the other vendor ----------------------------------------------------------------

HYPERCALLS = {"vmcall": b"\x0f\x01\xc1", "vmmcall": b"\x0f\x01\xd9"}
DISABLE_QUIRKS2, FIX_HYPERCALL = 213, 1 << 5  # <linux/kvm.h>, <asm/kvm.h>


def foreign_hypercall(shadowed: Shadowed) -> tuple[bytes, bytes]:
    """The instruction that this processor does not have, and the one that it has."""
    native = shadowed.guest.hypercall_instruction
    (foreign,) = set(HYPERCALLS) - {native}
    return HYPERCALLS[foreign], HYPERCALLS[native]


def undefined(shadowed: Shadowed) -> bool:
    """Whether the code ends with an invalid opcode."""
    with pytest.raises(GuestCrash) as crash:
        shadowed.guest.run(CODE)
    shadowed.guest.reset()
    return "#UD" in str(crash.value)


@rule("private.shadow.hypercall-patch")
def test_the_other_vendors_hypercall(shadowed: Shadowed) -> None:
    """KVM patches the shared page; the private instruction stays, and the guest is stuck."""
    foreign, native = foreign_hypercall(shadowed)
    code = b"\xb8\x63\0\0\0" + foreign + b"\xc3"  # mov $99, %eax; hypercall; ret
    at = 5
    shadowed.guest.write(CODE, code)
    assert undefined(shadowed), "what KVM sees there is no hypercall"
    assert shadowed.host_reads(CODE, PAGE) == bytes(PAGE)
    shadowed.host_writes(CODE, code)
    patched: list[bytes] = []
    over = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + 20
        while shadowed.host_reads(CODE + at, 3) == foreign and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # it would go on now, if it could
        patched.append(shadowed.host_reads(CODE, len(code)))
        while not over.is_set():  # KVM may be about to write it once more
            shadowed.host_writes(CODE, bytes(len(code)))  # no hypercall any more
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        ended = undefined(shadowed)
    finally:
        over.set()
        thread.join()
    assert ended, "it had run the same instruction again and again"
    assert patched == [code.replace(foreign, native)]
    assert shadowed.guest.read(CODE, len(code)) == code
    # The twin: in shared memory KVM patches the instruction, and it works.
    shadowed.rig.convert(CODE, PAGE, private=False)
    shadowed.host_writes(CODE, code)
    assert shadowed.guest.run(CODE) == (1 << 64) - 1000, "KVM has no hypercall 99"
    assert shadowed.host_reads(CODE, len(code)) == code.replace(foreign, native)


@rule("private.shadow.hypercall-patch.quirk")
def test_the_other_vendors_hypercall_unmended(shadowed: Shadowed) -> None:
    """With the quirk off KVM patches nothing, and the guest gets an invalid opcode at once."""
    vm = shadowed.rig.vm
    if not vm.check_extension(DISABLE_QUIRKS2) & FIX_HYPERCALL:
        missing("disable-quirks2", "the quirk can't be switched off")
    vm.enable_cap(DISABLE_QUIRKS2, FIX_HYPERCALL)
    foreign, _ = foreign_hypercall(shadowed)
    code = b"\xb8\x63\0\0\0" + foreign + b"\xc3"
    shadowed.guest.write(CODE, code)
    shadowed.host_writes(CODE, code)
    assert undefined(shadowed)
    assert shadowed.host_reads(CODE, len(code)) == code
