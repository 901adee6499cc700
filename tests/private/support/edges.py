"""The edge values of integer fields, and guest_memfd's documented checks, stated in Python.

A statement knows no order of checks where the kernel documents none: it returns the errno, and all
refusals of one request here have the same one, or come in a documented order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k

from .syscalls import PAGE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

TOP = 1 << 64
#: Of a field of 64 bits: around each power of two that a type of the kernel ends with.
EDGES = tuple(
    sorted(
        {0, 1, PAGE - 1, PAGE, PAGE + 1, 1 << 52, TOP - PAGE, TOP - 1}
        | {(1 << bits) + off for bits in (31, 32, 63) for off in (-PAGE, -1, 0, 1, PAGE)}
    )
)
#: Of a field of 32 bits.
SHORT_EDGES = tuple(edge for edge in EDGES if edge < 1 << 32)


def changes(
    fields: dict[str, tuple[int, ...]], *pairs: tuple[str, str]
) -> Iterator[dict[str, int]]:
    """Each edge of each field alone, and of each pair of fields every pair of aligned edges."""
    for name, edges in fields.items():
        for edge in edges:
            yield {name: edge}
    for one, other in pairs:
        for first, second in product(fields[one], fields[other]):
            if aligned(first, second):
                yield {one: first, other: second}


@dataclass(frozen=True)
class Limits:
    """What the answers depend on, besides the request."""

    #: The flags that a file of this VM may have, and the attributes that its memory may have.
    file_flags: int
    attributes: int
    #: The number of slots and of address spaces.
    slots: int
    spaces: int
    #: Where user space ends.
    user_end: int
    #: The bits of a guest physical address.
    gpa_bits: int


def aligned(*values: int) -> bool:
    return not any(value % PAGE for value in values)


def create_answer(limits: Limits, *, size: int, flags: int, **_: int) -> str:
    """KVM_CREATE_GUEST_MEMFD: `size` is a positive loff_t, page aligned; reserved is not read."""
    good = 0 < size < 1 << 63 and aligned(size) and not flags & ~limits.file_flags
    return "ok" if good else "EINVAL"


def slot_answer(
    limits: Limits,
    *,
    file: int,
    file_size: int,
    open_files: Collection[int],
    slot: int,
    flags: int,
    guest_phys_addr: int,
    memory_size: int,
    userspace_addr: int,
    guest_memfd_offset: int,
    guest_memfd: int,
    **_: int,
) -> str:
    """KVM_SET_USER_MEMORY_REGION2 in a VM without slots; `file` is the file's descriptor.

    Commits a7800aa80ea4 and eba85fee7fc6; Documentation/virt/kvm/api.rst.
    """
    has_file = flags & gm.KVM_MEM_GUEST_MEMFD
    beside = k.KVM_MEM_LOG_DIRTY_PAGES | k.KVM_MEM_READONLY
    good = (
        not flags & ~(gm.KVM_MEM_GUEST_MEMFD if has_file else beside)
        and aligned(memory_size, userspace_addr, guest_phys_addr)
        and slot >> 16 < limits.spaces
        and slot & 0xFFFF < limits.slots
        and 0 < memory_size // PAGE < 1 << 31
        and userspace_addr + memory_size <= limits.user_end
        and guest_phys_addr + memory_size <= 1 << limits.gpa_bits
    )
    if good and has_file:
        good = aligned(guest_memfd_offset) and guest_memfd_offset + memory_size < TOP
    if not good or not has_file:
        return "ok" if good else "EINVAL"
    if guest_memfd not in open_files:
        return "EBADF"
    fits = guest_memfd == file and guest_memfd_offset + memory_size <= file_size
    return "ok" if fits else "EINVAL"


def attributes_answer(
    limits: Limits, *, address: int, size: int, attributes: int, flags: int
) -> str:
    """KVM_SET_MEMORY_ATTRIBUTES: address + size is below 2^64."""
    good = (
        not flags
        and not attributes & ~limits.attributes
        and size
        and aligned(address, size)
        and address + size < TOP
    )
    return "ok" if good else "EINVAL"


def pre_fault_answer(
    *, gpa: int, size: int, flags: int, start: int, end: int, **_: int
) -> tuple[str, int, int]:
    """KVM_PRE_FAULT_MEMORY with a slot from `start` to `end`: the errno, and gpa and size then."""
    if flags or not aligned(gpa, size) or not size or gpa + size >= TOP:
        return "EINVAL", gpa, size
    if not start <= gpa < end:
        return "ENOENT", gpa, size
    done = min(end - gpa, size)
    return "ok", gpa + done, size - done
