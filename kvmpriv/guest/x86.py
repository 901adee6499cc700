"""x86-64 as a vCPU needs it set up: control registers, page tables, segments.

The numbers are those of Intel's Software Developer's Manual, volume 3: 2.5 (control registers),
4.5 (page tables), 3.4 (segment descriptors) and 8.7 (task state segment).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Protocol

from ..memory import PAGE_SIZE

if TYPE_CHECKING:
    from ..cdefs.kvm_structs import kvm_sregs, kvm_sregs2
    from ..vcpu import Vcpu

__all__ = [
    "CODE_SELECTOR",
    "CR0_ET",
    "CR0_MP",
    "CR0_NE",
    "CR0_PE",
    "CR0_PG",
    "CR4_OSFXSR",
    "CR4_OSXMMEXCPT",
    "CR4_PAE",
    "DATA_SELECTOR",
    "EFER_LMA",
    "EFER_LME",
    "GIB",
    "LARGE_PAGE",
    "PAGE_TABLE_ENTRIES",
    "PTE_LARGE",
    "PTE_PRESENT_WRITABLE",
    "RFLAGS_FIXED",
    "SEGMENTS",
    "enable_long_mode",
    "start_long_mode",
    "write_identity_map",
    "write_segments",
]

GIB = 1 << 30
#: What an entry of a page directory maps, in bytes, if it has PTE_LARGE.
LARGE_PAGE = 2 << 20
PAGE_TABLE_ENTRIES = 512
PTE_PRESENT_WRITABLE, PTE_LARGE = 0x3, 0x80

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
#: Bit 1 of RFLAGS is always 1.
RFLAGS_FIXED = 1 << 1

#: The segment registers, as struct kvm_sregs names them.
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")
#: Selectors into the GDT that `write_segments` writes.
CODE_SELECTOR, DATA_SELECTOR, _TSS_SELECTOR = 0x08, 0x10, 0x18
_CODE64, _DATA = 0x00209B0000000000, 0x0000930000000000  # descriptors of that GDT
_TSS = 0x800  # offset of the TSS in the GDT's page
_TSS_LIMIT = 0x67
_SEGMENT_CODE, _SEGMENT_DATA, _SEGMENT_BUSY_TSS = 11, 3, 11  # types


class _Memory(Protocol):
    """Memory of a guest that can be written by offset."""

    def write(self, offset: int, data: bytes, /) -> None: ...


def write_identity_map(memory: _Memory, pml4: int, gib: int) -> None:
    """Write page tables that map the first `gib` GiB of addresses (1 to 512) to themselves.

    The pages are 2 MiB large.  The tables take 2 + `gib` pages from the offset `pml4` on, which is
    also the guest physical address that CR3 needs.
    """
    if not 1 <= gib <= PAGE_TABLE_ENTRIES:
        raise ValueError(f"page tables map 1 to {PAGE_TABLE_ENTRIES} GiB here, not {gib}")
    pdpt, first = pml4 + PAGE_SIZE, pml4 + 2 * PAGE_SIZE
    directories = (first + n * PAGE_SIZE | PTE_PRESENT_WRITABLE for n in range(gib))
    entries = gib * PAGE_TABLE_ENTRIES
    pages = (n * LARGE_PAGE | PTE_PRESENT_WRITABLE | PTE_LARGE for n in range(entries))
    memory.write(pml4, struct.pack("<Q", pdpt | PTE_PRESENT_WRITABLE))
    memory.write(pdpt, struct.pack(f"<{gib}Q", *directories))
    memory.write(first, struct.pack(f"<{entries}Q", *pages))


def write_segments(memory: _Memory, base: int, exception_stack: int) -> None:
    """Write a GDT at the offset `base`, and a TSS into the second half of the same page.

    `exception_stack` is the end of the stack that interrupt gates with IST 1 use.  Offsets into
    `memory` are guest virtual addresses at the same time.
    """
    tss = base + _TSS
    tss_low = _TSS_LIMIT | (tss & 0xFFFFFF) << 16 | 0x8B << 40 | (tss >> 24 & 0xFF) << 56
    memory.write(base, struct.pack("<5Q", 0, _CODE64, _DATA, tss_low, tss >> 32))
    memory.write(tss, bytes(0x24) + struct.pack("<Q", exception_stack) + bytes(0x3C))


def enable_long_mode(
    sregs: kvm_sregs | kvm_sregs2, *, cr3: int, code_selector: int, data_selector: int, cr4: int = 0
) -> None:
    """Set the registers for long mode: paging on, flat 64-bit segments, privilege level 0.

    `cr4` is what to set beside CR4.PAE.  GDT, IDT and TR are left to the caller.
    """
    sregs.cr3 = cr3
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG
    sregs.cr4 = CR4_PAE | cr4
    sregs.efer = EFER_LME | EFER_LMA
    for name in SEGMENTS:
        segment, is_code = getattr(sregs, name), name == "cs"
        segment.base, segment.limit = 0, 0xFFFFFFFF
        segment.selector = code_selector if is_code else data_selector
        segment.type = _SEGMENT_CODE if is_code else _SEGMENT_DATA
        segment.present, segment.s, segment.g, segment.dpl, segment.unusable = 1, 1, 1, 0, 0
        segment.l, segment.db = int(is_code), int(not is_code)


def start_long_mode(vcpu: Vcpu, *, cr3: int, gdt: int, idt: int) -> None:
    """Put `vcpu` into long mode with paging on and interrupts off.

    `cr3` is the guest physical address of the PML4; `gdt` the guest virtual address that
    `write_segments` wrote to; `idt` that of an IDT of 256 gates.  The general registers are left
    as they are: set rip and rsp next.
    """
    with vcpu.sregs() as sregs:
        enable_long_mode(
            sregs,
            cr3=cr3,
            code_selector=CODE_SELECTOR,
            data_selector=DATA_SELECTOR,
            cr4=CR4_OSFXSR | CR4_OSXMMEXCPT,
        )
        task = sregs.tr
        task.base, task.limit, task.selector = gdt + _TSS, _TSS_LIMIT, _TSS_SELECTOR
        task.type, task.present, task.s, task.g, task.unusable = _SEGMENT_BUSY_TSS, 1, 0, 0, 0
        sregs.gdt.base, sregs.gdt.limit = gdt, 0x27
        sregs.idt.base, sregs.idt.limit = idt, 0xFFF
