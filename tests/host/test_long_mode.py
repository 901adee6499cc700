"""A vCPU that begins in long mode, by the functions that kvmpriv.guest exports for it."""

from __future__ import annotations

import pytest

from kvmpriv import HostMemory, Kvm, uapi
from kvmpriv.guest import x86

MIB = 1 << 20
PML4, GDT, IDT, CODE = 0x10000, 0x20000, 0x21000, 0x1000

pytestmark = pytest.mark.usefixtures("no_leak")


def test_start_long_mode(kvm: Kvm) -> None:
    """The guest uses 64-bit registers and an address of each of the two GiB that are mapped."""
    with (
        kvm.create_vm() as vm,
        HostMemory(MIB) as low,
        HostMemory(MIB) as high,
        vm.create_vcpu() as vcpu,
    ):
        vm.map(low, 0)
        vm.map(high, 1 << 30)
        x86.write_identity_map(low, PML4, 2)
        x86.write_segments(low, GDT, 0x9000)
        low.write(
            CODE,
            bytes.fromhex(
                "48b8 8877665544332211"  # mov $0x1122334455667788, %rax
                "50"  # push %rax
                "48a3 1000004000000000"  # mov %rax, 0x40000010
                "f4"
            ),
        )
        x86.start_long_mode(vcpu, cr3=PML4, gdt=GDT, idt=IDT)
        with vcpu.regs() as regs:
            regs.rip, regs.rsp, regs.rflags = CODE, 0x8000, 2
        assert vcpu.translate((1 << 30) + 0x1234) == (1 << 30) + 0x1234
        assert vcpu.translate(2 << 30) is None, "beyond what is mapped"
        assert vcpu.run() == uapi.kvm.KVM_EXIT_HLT
        value = (0x1122334455667788).to_bytes(8, "little")
        assert (low.read(0x7FF8, 8), high.read(0x10, 8)) == (value, value)


@pytest.mark.parametrize("gib", [-1, 0, 513])
def test_more_than_the_page_tables_map(gib: int) -> None:
    with HostMemory(MIB) as memory, pytest.raises(ValueError, match=f"1 to 512 GiB .*not {gib}"):
        x86.write_identity_map(memory, PML4, gib)
