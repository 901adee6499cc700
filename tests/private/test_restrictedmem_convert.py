"""v9: conversion by KVM_MEMORY_ENCRYPT_REG_REGION (to private) and UNREG_REGION (to shared)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from kvmpriv.cdefs import kvm as k

from .support.rules import rule
from .support.slot_requests import RestrictedSlots
from .support.syscalls import GIB, NOWHERE, PAGE, address_of, errno_of

if TYPE_CHECKING:
    from kvmpriv import Vm

pytestmark = pytest.mark.usefixtures("no_leak", "v9")

TOP = 1 << 64
REQUESTS = {
    "private": k.KVM_MEMORY_ENCRYPT_REG_REGION,
    "shared": k.KVM_MEMORY_ENCRYPT_UNREG_REGION,
}
both_ways = pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)


def convert(vm: Vm, request: int, gpa: int, size: int) -> str:
    """The errno of a conversion."""
    region = k.ffi.new("struct kvm_enc_region *", (gpa, size))
    return errno_of(vm.ioctl_errno(request, region))


@rule("v9.convert.no_slot", "v9.convert.again")
@both_ways
def test_without_a_slot(private_vm: Vm, request_: int) -> None:
    """A range is converted also without a slot, and if it has that state already."""
    for gpa, size in ((0, PAGE), (4 * GIB, 512 * PAGE), (3 * PAGE, 5 * PAGE)):
        for _ in range(2):
            assert convert(private_vm, request_, gpa, size) == "ok"


@rule("v9.convert.slots")
@both_ways
def test_across_slots(slots: RestrictedSlots, request_: int) -> None:
    """A range may cover a part of a slot, several slots, ordinary slots, and gaps between them."""
    with (
        slots.held(),
        slots.held(slot=4, guest_phys_addr=4 * GIB + 32 * PAGE, flags=0),
        slots.held(slot=5, guest_phys_addr=4 * GIB + 64 * PAGE),
    ):
        for gpa, size in ((4, 1), (4, 64), (0, 128), (16, 16), (60, 10)):
            said = convert(slots.vm, request_, 4 * GIB + gpa * PAGE, size * PAGE)
            assert said == "ok", (gpa, size)


@rule("v9.convert.size")
@both_ways
def test_size_0(private_vm: Vm, request_: int) -> None:
    """A conversion of size 0 is EINVAL."""
    for gpa in (0, PAGE, 4 * GIB, TOP - PAGE):
        assert convert(private_vm, request_, gpa, 0) == "EINVAL"
    assert convert(private_vm, request_, PAGE, PAGE) == "ok"


@rule("v9.convert.align")
@both_ways
def test_alignment(private_vm: Vm, request_: int) -> None:
    """A gpa or size that is not page aligned is EINVAL."""
    tried = 0
    for off in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4095):
        assert convert(private_vm, request_, PAGE + off, PAGE) == "EINVAL", off
        assert convert(private_vm, request_, PAGE, PAGE + off) == "EINVAL", off
        assert convert(private_vm, request_, PAGE, off) == "EINVAL", off
        assert convert(private_vm, request_, PAGE + off, PAGE - off) == "EINVAL", off
        tried += 1
    assert tried == 13
    assert convert(private_vm, request_, PAGE, PAGE) == "ok"


@rule("v9.convert.wrap", "v9.convert.last_page")
@both_ways
def test_wrap(private_vm: Vm, request_: int) -> None:
    """gpa + size must be below 2^64, else EINVAL: the last page can't be converted."""
    for gpa, size in (
        (TOP - PAGE, PAGE),
        (TOP - PAGE, 2 * PAGE),
        (TOP - 2 * PAGE, 2 * PAGE),
        (PAGE, TOP - PAGE),
        (NOWHERE, NOWHERE),
        (2 * PAGE, TOP - PAGE),
    ):
        assert convert(private_vm, request_, gpa, size) == "EINVAL", (hex(gpa), hex(size))
    assert convert(private_vm, request_, TOP - 2 * PAGE, PAGE) == "ok"
    assert convert(private_vm, request_, TOP - 9 * PAGE, 8 * PAGE) == "ok"


@rule("v9.convert.pointer")
@both_ways
def test_bad_pointers(private_vm: Vm, request_: int) -> None:
    """A struct that can't be read is EFAULT."""
    for address in (0, 1, NOWHERE, 0xFFFF888000000000, TOP - 8):
        assert errno_of(private_vm.ioctl_errno(request_, address)) == "EFAULT", hex(address)
    assert convert(private_vm, request_, PAGE, PAGE) == "ok"


@rule("v9.convert.readonly_struct")
@both_ways
def test_the_struct_is_not_written_to(private_vm: Vm, request_: int) -> None:
    """KVM does not write to the struct."""
    region = k.ffi.new("struct kvm_enc_region *", (PAGE, 7 * PAGE))
    assert errno_of(private_vm.ioctl_errno(request_, address_of(region))) == "ok"
    assert (region.addr, region.size) == (PAGE, 7 * PAGE)


@rule("v9.hook.off.convert")
@both_ways
def test_where_private_is_refused(refusing_vm: Vm, request_: int) -> None:
    """If the arch hook refuses the VM, a conversion is ENOTTY for every range."""
    for gpa, size in ((0, PAGE), (PAGE, 0), (1, PAGE), (TOP - PAGE, PAGE)):
        assert convert(refusing_vm, request_, gpa, size) == "ENOTTY", (gpa, size)


@rule("v9.hook.off.convert.pointer")
@both_ways
def test_bad_pointers_where_private_is_refused(refusing_vm: Vm, request_: int) -> None:
    """If the arch hook refuses the VM, a bad pointer is EFAULT on AMD and ENOTTY elsewhere."""
    from pathlib import Path

    amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    expected = "EFAULT" if amd else "ENOTTY"
    for address in (0, NOWHERE):
        assert errno_of(refusing_vm.ioctl_errno(request_, address)) == expected


@rule("v9.convert.huge")
@pytest.mark.known_defect("conversion-by-page", "far-conversion")
@both_ways
def test_huge_ranges(slots: RestrictedSlots, request_: int) -> None:
    """The size is not limited, and a conversion of any size is fast."""
    with slots.held(), slots.held(slot=4, guest_phys_addr=5 * GIB, flags=0):
        start = time.monotonic()
        for gpa, size in (
            (0, TOP - PAGE),
            (PAGE, TOP - 2 * PAGE),
            (0, 1 << 52),
            (4 * GIB, 1 << 46),
            (4 * GIB + PAGE, 1 << 40),
        ):
            assert convert(slots.vm, request_, gpa, size) == "ok", (hex(gpa), hex(size))
        assert time.monotonic() - start < 5


@rule("v9.convert.scattered")
def test_scattered_ranges(private_vm: Vm) -> None:
    """Thousands of single pages are converted, and converted back."""
    private, shared = REQUESTS["private"], REQUESTS["shared"]
    asked = 0
    for page in range(0, 4000, 2):
        assert convert(private_vm, shared, 4 * GIB + page * PAGE, PAGE) == "ok"
        asked += 1
    assert asked == 2000
    assert convert(private_vm, shared, 4 * GIB, 4000 * PAGE) == "ok"
    for page in range(1, 4000, 2):
        assert convert(private_vm, private, 4 * GIB + page * PAGE, PAGE) == "ok"
    assert convert(private_vm, private, 4 * GIB, 4000 * PAGE) == "ok"
