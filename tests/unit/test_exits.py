"""Exits decoded from a kvm_run that the test fills: every kind, every ABI's memory fault."""

from __future__ import annotations

import errno
from typing import Any, TypeVar, get_args

import pytest

from kvmpriv import exits, private, uapi
from kvmpriv.cdefs.enums import Cap, InternalError, MemFlag, SystemEvent
from kvmpriv.cdefs.exit_reason import ExitReason
from kvmpriv.fd import describe


@pytest.fixture
def run() -> Any:
    """A struct kvm_run with a page behind it for port I/O."""
    memory = uapi.kvm.ffi.new("char[]", 8192)
    pointer = uapi.kvm.ffi.cast("struct kvm_run *", memory)
    _keep[pointer] = memory
    return pointer


_keep: dict[Any, Any] = {}
_T = TypeVar("_T")


def decoded(run: Any, kind: type[_T]) -> _T:
    """The exit, which is one of this kind."""
    found = exits.decode(run)
    assert isinstance(found, kind)
    return found


def test_io_out(run: Any) -> None:
    run.exit_reason = uapi.kvm.KVM_EXIT_IO
    run.io.direction, run.io.size, run.io.port, run.io.count = uapi.kvm.KVM_EXIT_IO_OUT, 2, 0x3F8, 3
    run.io.data_offset = 4096
    uapi.kvm.ffi.buffer(uapi.kvm.ffi.cast("char *", run) + 4096, 6)[:] = b"abcdef"
    assert exits.decode(run) == exits.IoExit(ExitReason.IO, True, 0x3F8, 2, 3, b"abcdef")
    assert str(exits.decode(run)) == "KVM_EXIT_IO: out 616263646566, port 0x3f8"
    run.io.direction = uapi.kvm.KVM_EXIT_IO_IN
    assert exits.decode(run) == exits.IoExit(ExitReason.IO, False, 0x3F8, 2, 3, b"")


def test_mmio(run: Any) -> None:
    run.exit_reason = uapi.kvm.KVM_EXIT_MMIO
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0xFEE00000, 4, 1
    run.mmio.data = b"\x01\x02\x03\x04\x05\x06\x07\x08"
    assert exits.decode(run) == exits.MmioExit(
        ExitReason.MMIO, True, 0xFEE00000, 4, b"\x01\x02\x03\x04"
    )
    run.mmio.is_write = 0
    assert exits.decode(run) == exits.MmioExit(ExitReason.MMIO, False, 0xFEE00000, 4, b"")


def test_hypercall(run: Any) -> None:
    run.exit_reason = uapi.kvm.KVM_EXIT_HYPERCALL
    run.hypercall.nr, run.hypercall.args, run.hypercall.longmode = 12, [1, 2, 16, 0, 0, 0], 1
    assert exits.decode(run) == exits.HypercallExit(
        ExitReason.HYPERCALL, 12, (1, 2, 16, 0, 0, 0), True
    )


def test_fail_entry(run: Any) -> None:
    run.exit_reason = uapi.kvm.KVM_EXIT_FAIL_ENTRY
    run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu = 0x80000021, 7
    assert exits.decode(run) == exits.FailEntryExit(ExitReason.FAIL_ENTRY, 0x80000021, 7)
    assert "0x80000021 on cpu 7" in str(exits.decode(run))


def test_internal_error(run: Any) -> None:
    run.exit_reason = uapi.kvm.KVM_EXIT_INTERNAL_ERROR
    run.internal.suberror, run.internal.ndata = uapi.kvm.KVM_INTERNAL_ERROR_DELIVERY_EV, 2
    run.internal.data[0], run.internal.data[1], run.internal.data[2] = 5, 6, 7
    found = exits.decode(run)
    assert found == exits.InternalErrorExit(
        ExitReason.INTERNAL_ERROR, InternalError.DELIVERY_EV, (5, 6), b""
    )
    assert "DELIVERY_EV, data 0x5 0x6" in str(found)


def test_internal_error_with_instruction(run: Any) -> None:
    run.exit_reason = uapi.kvm.KVM_EXIT_INTERNAL_ERROR
    run.internal.suberror, run.internal.ndata = uapi.kvm.KVM_INTERNAL_ERROR_EMULATION, 3
    run.emulation_failure.flags = 1
    run.emulation_failure.insn_size = 2
    run.emulation_failure.insn_bytes[0], run.emulation_failure.insn_bytes[1] = 0x0F, 0x0B
    assert decoded(run, exits.InternalErrorExit).instruction == b"\x0f\x0b"
    assert str(exits.decode(run)).endswith("EMULATION, instruction 0f 0b")
    run.internal.ndata = 1  # KVM says the flags are all there is
    assert decoded(run, exits.InternalErrorExit).instruction == b""


def test_system_event(run: Any) -> None:
    run.exit_reason = uapi.kvm.KVM_EXIT_SYSTEM_EVENT
    run.system_event.type, run.system_event.ndata = uapi.kvm.KVM_SYSTEM_EVENT_CRASH, 0
    assert exits.decode(run) == exits.SystemEventExit(
        ExitReason.SYSTEM_EVENT, SystemEvent.CRASH, ()
    )
    assert str(exits.decode(run)) == "KVM_EXIT_SYSTEM_EVENT: CRASH"
    run.system_event.ndata = 1 << 31  # nonsense from a broken kernel reads no further than 16
    assert len(decoded(run, exits.SystemEventExit).data) == 16


@pytest.mark.parametrize("name", ["HLT", "SHUTDOWN", "INTR", "IRQ_WINDOW_OPEN", "NMI", "SET_TPR"])
def test_plain(run: Any, name: str) -> None:
    run.exit_reason = getattr(uapi.kvm, f"KVM_EXIT_{name}")
    assert exits.decode(run) == exits.SimpleExit(ExitReason[name])
    assert str(exits.decode(run)) == f"KVM_EXIT_{name}"


def test_an_unknown_number_is_kept_and_shown(run: Any) -> None:
    run.exit_reason = 12345
    uapi.kvm.ffi.buffer(uapi.kvm.ffi.addressof(run.hw), 4)[:] = b"\xde\xad\xbe\xef"
    found = exits.decode(run)
    assert found == exits.OtherExit(ExitReason(12345), b"\xde\xad\xbe\xef" + bytes(252))
    assert str(found) == "exit 12345: deadbeef"


def test_memory_fault_of_v9(run: Any) -> None:
    run.exit_reason = 38
    raw = uapi.kvm.ffi.buffer(run)
    raw[32:56] = (
        b"\x01\0\0\0"  # flags, 32 bits: private
        b"\0\0\0\0"
        b"\0\x50\x34\x12\0\0\0\0"  # gpa
        b"\0\x10\0\0\0\0\0\0"  # size
    )
    fault = exits.decode(run)
    assert fault == exits.MemoryFaultExit(
        ExitReason(38), 0x12345000, 0x1000, True, 1, 0, "restrictedmem"
    )
    assert "the guest accessed 0x12345000…0x12346000 as private memory" in str(fault)
    raw[32:36] = bytes(4)
    assert decoded(run, exits.MemoryFaultExit).private is False


def test_memory_fault_of_mainline(run: Any) -> None:
    run.exit_reason = 39
    raw = uapi.kvm.ffi.buffer(run)
    raw[32:56] = b"\x08\0\0\0\0\0\0\0\0\x50\x34\x12\0\0\0\0\0\x10\0\0\0\0\0\0"
    fault = exits.decode(run, errno.EFAULT)
    assert fault == exits.MemoryFaultExit(
        ExitReason.MEMORY_FAULT, 0x12345000, 0x1000, True, 8, errno.EFAULT, "guest_memfd"
    )
    raw[32] = b"\x01"  # v9's bit means nothing here
    assert decoded(run, exits.MemoryFaultExit).private is False


def test_each_abi_has_its_own_layout() -> None:
    v9, mainline = (private.ABIS[name].fault_layout for name in ("restrictedmem", "guest_memfd"))
    assert v9.reason == uapi.restrictedmem.KVM_EXIT_MEMORY_FAULT == 38
    assert mainline.reason == uapi.guest_memfd.KVM_EXIT_MEMORY_FAULT == 39
    assert v9.errnos == frozenset()
    assert mainline.errnos == {errno.EFAULT, 133}
    assert exits.exit_name(38) == exits.exit_name(39) == "KVM_EXIT_MEMORY_FAULT"


def test_a_memory_fault_is_decoded_by_the_layout_of_the_vm(run: Any) -> None:
    """Two ABIs may use one exit reason, and lay the fault out differently."""
    own = private.ABIS["guest_memfd"].fault_layout._replace(abi="toy", reason=38, private_flag=1)
    run.exit_reason = 38
    raw = b"\x01\0\0\0\0\0\0\0\0\x50\0\0\0\0\0\0\0\x10\0\0\0\0\0\0"
    uapi.kvm.ffi.buffer(run)[32:56] = raw
    assert exits.decode(run, 14, own) == exits.MemoryFaultExit(
        ExitReason(38), 0x5000, 4096, True, 1, 14, "toy"
    )
    assert decoded(run, exits.MemoryFaultExit).abi == "restrictedmem"


EXITS = [
    cls
    for cls in vars(exits).values()
    if isinstance(cls, type) and hasattr(cls, "_fields") and cls.__module__ == exits.__name__
]


@pytest.mark.parametrize("cls", EXITS, ids=lambda cls: cls.__name__)
def test_every_field_of_an_exit_is_described(cls: type[Any]) -> None:
    for name in cls._fields:
        assert not getattr(cls, name).__doc__.startswith("Alias for field"), name


def test_the_union_has_every_exit() -> None:
    assert set(get_args(exits.Exit)) == set(EXITS)


def test_a_reason_is_shown_by_name_and_is_an_int(run: Any) -> None:
    run.exit_reason = uapi.kvm.KVM_EXIT_HLT
    found = exits.decode(run)
    assert repr(found) == "SimpleExit(reason=<ExitReason.HLT: 5>)"
    assert found.reason == 5
    assert f"{found.reason:#x} {found.reason}" == "0x5 KVM_EXIT_HLT"


def test_a_number_without_a_name_is_shown_as_a_number() -> None:
    unknown = ExitReason(77)
    assert (str(unknown), repr(unknown), unknown) == ("exit 77", "<ExitReason: 77>", 77)
    assert exits.exit_name(77) == "exit 77"
    assert str(Cap(9999)) == "capability 9999"
    with pytest.raises(ValueError, match="'HLT' is not a valid ExitReason"):
        ExitReason("HLT")  # type: ignore[arg-type]


def test_flags_are_shown_by_name() -> None:
    assert str(MemFlag(6)) == "READONLY|PRIVATE"
    assert str(MemFlag(0x41)) == "LOG_DIRTY_PAGES|0x40"
    assert str(MemFlag(0)) == "0x0"


def test_messages_show_capabilities_and_flags_by_name() -> None:
    cap = uapi.kvm.ffi.new("struct kvm_enable_cap *", {"cap": uapi.kvm.KVM_CAP_X86_SMM})
    assert describe(cap) == "cap=KVM_CAP_X86_SMM"
    region = uapi.kvm.ffi.new("struct kvm_userspace_memory_region *", {"slot": 1, "flags": 0x12})
    assert describe(region) == "slot=1, flags=READONLY|0x10"
    event = uapi.kvm.ffi.new("struct kvm_irqfd *", {"flags": 2})
    assert describe(event) == "flags=2", "these are other flags"
