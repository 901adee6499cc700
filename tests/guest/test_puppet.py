"""The puppet in ordinary memory: it executes each command, and the host sees what it does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from kvmpriv import ArgumentError, ClosedError, HostMemory, Kvm, Vm
from kvmpriv.exits import Exit, ExitReason, IoExit, MmioExit, SimpleExit
from kvmpriv.guest import GuestCrash, mailbox
from kvmpriv.guest.puppet import AGENT_SIZE, BASE, GuestExit, Puppet, PuppetCpu
from private.support.leaks import open_fds

GPA, SIZE = 0x1_0000_0000, 8 << 20

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    with HostMemory(SIZE) as made:
        yield made


@pytest.fixture
def guest(kvm: Kvm, vm: Vm, memory: HostMemory) -> Iterator[Puppet]:
    vm.map(memory, GPA)
    with Puppet(vm, cpus=2, cpuid=kvm.get_supported_cpuid()) as made:
        yield made


@pytest.mark.parametrize("offset", [0, 1, 4095, (2 << 20) - 3, SIZE - 300_001])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 4096, 65536, 65537, 300_001])
def test_write_and_read(guest: Puppet, memory: HostMemory, offset: int, size: int) -> None:
    data = os.urandom(size)
    guest.write(GPA + offset, data)
    assert memory.read(offset, size) == data
    data = os.urandom(size)
    memory.write(offset, data)
    assert guest.read(GPA + offset, size) == data
    assert guest.exits == []


def test_fill_span_checksum_touch(guest: Puppet, memory: HostMemory) -> None:
    guest.fill(GPA + 3, 0xAB, 70_001)
    assert memory.read(0, 4) == b"\0\0\0\xab"
    assert memory.read(3, 70_002) == b"\xab" * 70_001 + b"\0"
    assert guest.span(GPA + 3, 0xAB, 80_000) == 70_001
    assert guest.span(GPA + 3, 0xAB, 70_001) == 70_001
    assert guest.span(GPA, 0xAB, 100) == 0
    assert guest.span(GPA, 0xAB, 0) == 0
    words = memory.view()[:80_000].cast("Q")
    assert guest.checksum(GPA, 80_000) == sum(words) % (1 << 64)
    words.release()
    with pytest.raises(ArgumentError, match="size must be a multiple of 8, not 12"):
        guest.checksum(GPA, 12)
    guest.touch(GPA + 1, 4096, 5, byte=0x55)
    assert [memory.read(n * 4096 + 1, 1) for n in range(6)] == [b"\x55"] * 5 + [b"\xab"]
    guest.touch(GPA, 4096, 5)
    guest.touch(GPA, 4096, 0)


def test_single_accesses(guest: Puppet, memory: HostMemory) -> None:
    for size in (1, 2, 4, 8):
        memory.write(0, b"\xff" * 16)
        guest.store(GPA + 3, size, 0x1122334455667788)
        value = 0x1122334455667788 % (1 << 8 * size)
        assert memory.read(3, size + 1) == value.to_bytes(size, "little") + b"\xff"
        assert guest.load(GPA + 3, size) == value
    for bad in (0, 3, 16):
        with pytest.raises(ArgumentError, match="the size of an access must be"):
            guest.load(GPA, bad)


def test_two_cpus_at_once(guest: Puppet, memory: HostMemory) -> None:
    threads = [
        threading.Thread(target=lambda cpu=cpu: [cpu.increment(GPA, 1000) for _ in range(20)])
        for cpu in guest.cpus
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int.from_bytes(memory.read(0, 8), "little") == 40_000


def test_exits_during_a_command(guest: Puppet) -> None:
    nowhere = GPA + SIZE
    with pytest.raises(GuestExit) as stopped:
        guest.load(nowhere + 8, 4)
    assert stopped.value.exit == MmioExit(ExitReason.MMIO, False, nowhere + 8, 4, b"")
    assert stopped.value.cpu is guest.cpu
    with pytest.raises(RuntimeError, match="a command is under way"):
        guest.load(GPA, 4)
    guest.vcpu.reply(b"\x78\x56\x34\x12")
    assert guest.resume() == 0x12345678
    with pytest.raises(RuntimeError, match="no command is under way"):
        guest.resume()

    with pytest.raises(GuestExit):
        guest.port_out(0x80, 2, 0xBEEF)
    guest.resume()
    with pytest.raises(GuestExit, match="KVM_EXIT_HLT"):
        guest.halt()
    guest.resume()
    assert guest.exits[1:] == [
        IoExit(ExitReason.IO, True, 0x80, 2, 1, b"\xef\xbe"),
        SimpleExit(ExitReason.HLT),
    ]
    assert guest.read(GPA, 4) == bytes(4), "the next command works"


def test_a_server_settles_exits(guest: Puppet) -> None:
    asked = []

    def serve(cpu: PuppetCpu, exit_: Exit) -> bool:
        assert isinstance(exit_, IoExit)
        asked.append((exit_.port, exit_.size))
        cpu.vcpu.reply(b"\x0d\xf0\xad\x8b"[: exit_.size])
        return True

    guest.serve = serve
    assert guest.port_in(0x71, 1) == 0x0D
    assert guest.port_in(0x71, 2) == 0xF00D
    assert guest.port_in(0x71, 4) == 0x8BADF00D
    assert asked == [(0x71, 1), (0x71, 2), (0x71, 4)]


def test_the_oldest_exits_are_forgotten(guest: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run would keep every exit otherwise."""
    monkeypatch.setattr(mailbox, "_EXITS_KEPT", 4)
    guest.serve = lambda _cpu, _exit: True
    for port in range(0x80, 0x80 + 30):
        guest.port_out(port, 1, 0)
    assert guest.exit_count == guest.cpu.exit_count == 30
    assert 4 <= len(guest.exits) <= 8
    last = range(0x80 + 30 - len(guest.exits), 0x80 + 30)
    ports = [exit_.port for exit_ in guest.exits if isinstance(exit_, IoExit)]
    assert ports == list(last)


def test_commands_go_to_the_first_vcpu(guest: Puppet) -> None:
    assert guest.cpu is guest.cpus[0]
    assert guest.vcpu is guest.cpu.vcpu
    assert guest.serve is None
    guest.serve = serve = lambda _cpu, _exit: True
    assert (guest.cpu.serve, guest.cpus[1].serve) == (serve, None)
    halted = SimpleExit(ExitReason.HLT)
    assert (guest.cpu.settle(halted), guest.cpus[1].settle(halted)) == (True, False)
    guest.port_out(0x80, 1, 0)
    assert (guest.cpu.exit_count, guest.cpus[1].exit_count) == (1, 0)
    with pytest.raises(GuestExit) as stopped:
        guest.cpus[1].port_out(0x80, 1, 0)
    assert stopped.value.cpu is guest.cpus[1]
    guest.cpus[1].resume()


def test_reset_during_a_command(guest: Puppet) -> None:
    for _ in range(3):
        with pytest.raises(GuestExit):
            guest.read(GPA + SIZE, 100)
        guest.reset()
        guest.write(GPA, b"works")
        assert guest.read(GPA, 5) == b"works"


def test_code_cpuid_msrs_time(kvm: Kvm, guest: Puppet) -> None:
    guest.write(GPA + 0x1000, bytes.fromhex("488d4701 c3"))  # lea 1(%rdi), %rax; ret
    assert guest.run(GPA + 0x1000, 41) == 42
    vendor = next(entry for entry in kvm.get_supported_cpuid() if entry.function == 0)
    assert guest.cpuid(0)[1:] == (vendor.ebx, vendor.ecx, vendor.edx)
    assert guest.rdtsc() < guest.rdtsc()
    star = 0xC0000081
    guest.wrmsr(star, 0x23000800000000)
    assert guest.rdmsr(star) == 0x23000800000000


def test_a_crash_is_reported(guest: Puppet) -> None:
    guest.write(GPA, b"\x0f\x0b")
    with pytest.raises(GuestCrash, match=r"exception 6 \(#UD invalid opcode\)") as crash:
        guest.run(GPA)
    assert crash.value.why.startswith("exception 6")
    guest.reset()
    assert guest.load(GPA, 2) == 0x0B0F
    with pytest.raises(GuestCrash, match=r"exception 13 \(#GP"):
        guest.rdmsr(0xDEAD0000)


@pytest.mark.parametrize("base", [0, 2 << 20, 1 << 38])
def test_agent_and_memory_anywhere(kvm: Kvm, vm: Vm, memory: HostMemory, base: int) -> None:
    """The agent may be at any multiple of 2 MiB, and memory at any page."""
    at = 64 << 20
    vm.map(memory, at)
    with Puppet(vm, base=base, cpuid=kvm.get_supported_cpuid()) as guest:
        guest.write(at + 5, b"there")
        assert memory.read(5, 5) == b"there"
        assert guest.load(base + 0x1000, 4) != 0, "its own code, for instance"
    assert list(vm.slots) == [0], "the agent's slot is deleted"


def test_bad_arguments(vm: Vm) -> None:
    for base in (BASE + 4096, -AGENT_SIZE, 1 << 52):
        with pytest.raises(ArgumentError, match="base must be a multiple of 0x200000 below"):
            Puppet(vm, base=base)
    for cpus in (0, 16):
        with pytest.raises(ArgumentError, match=f"a puppet can have 1 to 15 vCPUs, not {cpus}"):
            Puppet(vm, cpus=cpus)
    with pytest.raises(ArgumentError, match="must be vmcall or vmmcall, not 'int3'"):
        Puppet(vm, hypercall_instruction="int3")
    assert vm.slots == {}
    with HostMemory(4096) as memory:
        vm.map(memory, BASE)
        with pytest.raises(FileExistsError):
            Puppet(vm)
    with Puppet(vm, base=0) as guest:
        for gpa, size in ((-1, 1), (1 << 52, 1), ((1 << 52) - 1, 2)):
            with pytest.raises(ArgumentError, match=r"guest physical addresses .* out of range"):
                guest.read(gpa, size)


@pytest.mark.parametrize("gpa", [-4096, 1 << 52, (1 << 52) - 7, (1 << 60) + GPA, 1 << 64])
def test_addresses_out_of_range(guest: Puppet, memory: HostMemory, gpa: int) -> None:
    """An address beyond 2^52 is refused, not cut to another one; the next command works."""
    commands = (
        lambda at: guest.load(at, 8),
        lambda at: guest.store(at, 8, 0x4242424242424242),
        lambda at: guest.increment(at, 1),
        lambda at: guest.touch(at - 4096, 4096, 2, 0x42),
        lambda at: guest.read(at, 8),
        lambda at: guest.write(at, b"B" * 8),
        lambda at: guest.fill(at, 0x42, 8),
        lambda at: guest.span(at, 0x42, 8),
        lambda at: guest.checksum(at, 8),
    )
    for command in commands:
        # Beyond the last byte for the shortest of them, too.
        with pytest.raises(ArgumentError, match=r"guest physical addresses .* out of range"):
            command(gpa + 7)
    with pytest.raises(ArgumentError, match=r"guest physical addresses .* out of range"):
        guest.run(gpa + 7)
    assert memory.read(0, SIZE) == bytes(SIZE)
    for command in commands:
        command(GPA + 4096)
    assert memory.read(0, 1) == b"\x42", "what touch wrote"
    assert memory.read(4096, 8) == b"\x42" * 8


def test_numbers_out_of_range(guest: Puppet, memory: HostMemory) -> None:
    for byte in (-1, 256):
        for command in (
            lambda byte=byte: guest.fill(GPA, byte, 1),
            lambda byte=byte: guest.span(GPA, byte, 1),
            lambda byte=byte: guest.touch(GPA, 1, 1, byte),
        ):
            with pytest.raises(ArgumentError, match=f"must be 0 to 255, not {byte}"):
                command()
    for stride, count, wrong in ((0, 1, "stride"), (-1, 1, "stride"), (1, -1, "count")):
        with pytest.raises(ArgumentError, match=f"^{wrong} must be [01] or more, not"):
            guest.touch(GPA, stride, count, 1)
    with pytest.raises(ArgumentError, match=r"times must be .* not -0x1"):
        guest.increment(GPA, -1)
    assert guest.increment(GPA, 0) == 0
    with pytest.raises(ArgumentError, match="a hypercall has up to 4 arguments, not 5"):
        guest.hypercall(1, 1, 2, 3, 4, 5)
    assert memory.read(0, 16) == bytes(16)


def test_after_close(vm: Vm) -> None:
    with Puppet(vm, cpus=2) as guest:
        cpus = guest.cpus
    for cpu in cpus:
        with pytest.raises(ClosedError, match="the puppet is closed"):
            cpu.rdtsc()
        with pytest.raises(ValueError, match="vCPU is closed"):
            cpu.reset()


def test_what_resume_returns(guest: Puppet, memory: HostMemory) -> None:
    """resume() returns what the command itself would have returned without the exit."""
    far = GPA + SIZE
    for command, expected in (
        (lambda: guest.store(far, 8, 0x1234), None),
        (lambda: guest.write(far, b"x"), None),
        (lambda: guest.port_out(0x80, 1, 7), None),
        (guest.halt, None),
        (lambda: guest.load(far, 1), 0xAB),
    ):
        with pytest.raises(GuestExit) as stopped:
            command()
        if expected is not None:
            guest.vcpu.kvm_run.mmio.data[0] = expected
        assert guest.resume() == expected, stopped.value.exit


def test_a_kept_exception_keeps_no_vcpu(kvm: Kvm) -> None:
    with kvm.create_vm() as vm, Puppet(vm) as guest, pytest.raises(GuestExit) as stopped:
        guest.load(GPA, 8)
    assert isinstance(stopped.value.exit, MmioExit)
    assert "kvm-vcpu" not in str(open_fds().values())


def test_the_vm_may_be_closed_first(kvm: Kvm) -> None:
    with kvm.create_vm() as vm, Puppet(vm) as guest:
        guest.rdtsc()
        vm.close()
    with kvm.create_vm() as vm, Puppet(vm) as guest:
        slot = guest.slot
        guest.close()
        assert slot.slot not in vm.slots


@pytest.mark.usefixtures("kvm")
def test_one_that_is_left_open_at_the_end_of_the_program() -> None:
    """Python closes it when nothing can be imported any more, and prints nothing."""
    program = (
        "import builtins; from kvmpriv import Kvm; from kvmpriv.guest.puppet import Puppet;"
        " builtins.left = Puppet(Kvm().create_vm());"
        " print(builtins.left.rdtsc() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
