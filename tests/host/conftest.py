"""A guest of a few bytes for the host tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

import kvmpriv

MakeGuest = Callable[..., tuple[kvmpriv.Vm, kvmpriv.Vcpu, kvmpriv.HostMemory]]

CODE = 0x1000
SPIN = b"\xeb\xfe"  # jmp .
OUT_LOOP = bytes.fromhex("ba f803 b0 2a ee eb fd")  # mov $0x3f8,%dx; mov $42,%al; 1: out; jmp 1b


@pytest.fixture
def make_guest(kvm: kvmpriv.Kvm) -> Iterator[MakeGuest]:
    """Make a VM with 64 KiB of memory and a vCPU in real mode that is about to run `code`."""
    with ExitStack() as stack:

        def make(code: bytes) -> tuple[kvmpriv.Vm, kvmpriv.Vcpu, kvmpriv.HostMemory]:
            vm = stack.enter_context(kvm.create_vm())
            memory = stack.enter_context(kvmpriv.HostMemory(0x10000))
            vm.map(memory, 0)
            memory.write(CODE, code)
            vcpu = stack.enter_context(vm.create_vcpu())
            start(vcpu)
            return vm, vcpu, memory

        yield make


def start(vcpu: kvmpriv.Vcpu, rip: int = CODE) -> None:
    """Real mode, every segment 0, at `rip`, with a stack."""
    vcpu.start_real_mode(rip, rsp=0xFFF0)
