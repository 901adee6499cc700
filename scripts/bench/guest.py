"""The guest of the benchmarks; run as a script, one that writes a byte at its first exit."""

from __future__ import annotations

import os

from kvmpriv import HostMemory, Kvm, Vcpu, Vm

MEMORY = 0x2000  # bytes, from 0
ENTRY = 0x1000
PORT = 0x3F8
#: again: out dx, al; inc al; jmp again.  The same bytes in real and in long mode.
CODE = bytes.fromhex("ee fec0 ebfb")


def bring_up(kvm: Kvm) -> tuple[Vm, Vcpu]:
    """A VM and its vCPU, in real mode, at CODE; the same ioctls as twin.c."""
    vm = kvm.create_vm()
    memory = HostMemory(MEMORY)
    memory.write(ENTRY, CODE)
    vm.map(memory, 0)
    vcpu = vm.create_vcpu()
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rdx, regs.rax, regs.rflags = ENTRY, PORT, 0, 2
    vcpu.set_regs(regs)
    return vm, vcpu


def main() -> None:
    with Kvm() as kvm:
        vm, vcpu = bring_up(kvm)
        with vm, vcpu:
            vcpu.run()
            os.write(1, f"{vcpu.exit()}\n".encode())


if __name__ == "__main__":
    main()
