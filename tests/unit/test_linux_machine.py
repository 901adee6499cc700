"""The parts of a Linux guest's machine that need no KVM: layouts, accounting, reports, power."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmpriv import ArgumentError, uapi
from kvmpriv.guest.linux import Bus, Outcome, Range, plan
from kvmpriv.guest.linux import dispatch as served
from kvmpriv.guest.linux.outcome import Ending
from kvmpriv.guest.linux.power import add_power
from kvmpriv.guest.linux.said import Said
from kvmpriv.guest.linux.usage import emulation, mapped_bytes, range_use

MIB = 1 << 20


def test_struct_kvm_run_is_laid_out_as_the_dispatcher_reads_it() -> None:
    ffi = uapi.kvm.ffi
    run = ffi.new("struct kvm_run *")
    raw = memoryview(ffi.buffer(run)).cast("B")
    run.io.direction, run.io.size, run.io.port, run.io.count = 1, 4, 0x1234, 0x567890AB
    run.io.data_offset = 0x1122334455667788
    io = (1, 4, 0x1234, 0x567890AB, 0x1122334455667788)
    assert served._IO.unpack_from(raw, served._UNION) == io
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0x8877665544332211, 4, 1
    run.mmio.data[0:8] = bytes(range(8))
    mmio = (0x8877665544332211, bytes(range(8)), 4, 1)
    assert served._MMIO.unpack_from(raw, served._UNION) == mmio
    assert bytes(raw[served._MMIO_DATA : served._MMIO_DATA + 8]) == bytes(range(8))


def test_private_memory_is_counted_once() -> None:
    """KVM reports how much is mapped in total: two private ranges must not both get all of it."""
    ranges = [
        Range(0, 128 * MIB, "shared", ""),
        Range(4 << 30, 64 * MIB, "private", ""),
        Range(5 << 30, 64 * MIB, "private", ""),
    ]
    used = range_use(ranges, [10 * MIB, 0, 4096], 110 * MIB)
    assert [use.range for use in used] == ranges
    assert [use.resident for use in used] == [10 * MIB, 0, 4096]
    assert [use.private for use in used] == [0, 64 * MIB, 36 * MIB]
    assert [use.private for use in range_use(ranges, [10 * MIB, 0, 0], 5 * MIB)] == [0, 0, 0]


def test_what_is_mapped_and_what_is_emulated() -> None:
    stats = {"pages_4k": 3, "pages_2m": 2, "pages_1g": 1, "exits": 100}
    assert mapped_bytes(stats) == 3 * 4096 + 2 * (2 << 20) + (1 << 30)
    assert mapped_bytes({}) == 0
    assert emulation({"insn_emulation": 20_000, "exits": 10}) == ""
    assert "(20001 instructions in 10 exits so far)" in emulation(
        {"insn_emulation": 20_001, "exits": 10}
    )
    assert emulation({"insn_emulation": 20_001, "exits": 1001}) == "", "20 for an exit"


def test_what_a_guest_says() -> None:
    said = Said()

    def put(data: bytes) -> None:
        for byte in data:
            said.put(byte)

    put(b"one\r\n\n  two \nexit 7\nexit 1000\nexit seven\n")
    assert said.lines == ["one", "two", "exit 1000", "exit seven"]
    assert said.status == 7
    put(b"exit 258\n\xff\n" + b"x" * 5000 + b"\n")
    assert said.status == 2
    assert said.lines[-2:] == ["\\xff", "x" * 4096]
    put(b"more\n" * 2000)
    assert len(said.lines) == 1000


def test_power() -> None:
    log: list[object] = []
    ports = Bus()
    add_power(
        ports,
        0xF4,
        leave=log.append,
        turn_off=lambda: log.append("off"),
        reset=lambda: log.append("reset"),
    )
    ports.write(0xF4, 1, 7)
    ports.write(0x64, 1, 0x20)
    ports.write(0x64, 1, 0xFE)
    ports.write(0xCF9, 1, 0x02)
    ports.write(0xCF9, 1, 0x06)
    assert log == [7, "reset", "reset"]
    assert ports.read(0x64, 1) == 0
    ports.write(0x600, 2, 0xFFFF)
    assert ports.read(0x600, 2) == 0, "status bits are cleared by writing ones"
    ports.write(0x602, 2, 0x0120)
    assert ports.read(0x602, 2) == 0x0120
    ports.write(0x604, 2, 5 << 10)
    assert ports.read(0x604, 2) == 5 << 10 | 1
    ports.write(0x606, 4, 0xFFFFFFFF)  # beyond the last register
    assert ports.read(0x606, 2) == 0xFFFF
    assert len(log) == 3
    ports.write(0x604, 2, 5 << 10 | 1 << 13 | 1)
    assert log[3:] == ["off"]


def test_the_first_outcome_counts_and_none_after_close() -> None:
    """A timer may outlive the guest: its eventfd's number may then be another file's."""
    ending = Ending()
    first, second = Outcome("off", 0, ""), Outcome("crash", 125, "")
    ending.end(first)
    ending.end(second)
    assert ending.outcome is first
    number = ending.wake.fileno()
    assert os.eventfd_read(number) == 2
    ending.close()
    ours = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        if ours != number:
            os.dup2(ours, number)
        ending.end(second)
        ending.alert()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(number)
    finally:
        for fd in {ours, number}:
            os.close(fd)


def test_memory_that_can_not_be_laid_out() -> None:
    with pytest.raises(ArgumentError, match="not a positive multiple of 4096"):
        plan(4097)
    with pytest.raises(ArgumentError, match="at least 160M: the first 128M are always shared"):
        plan(128 << 20, private=True)
    assert plan(160 << 20, private=True)[1].size == 32 << 20


def test_what_the_package_exports() -> None:
    import kvmpriv.guest
    import kvmpriv.guest.linux

    for module in (kvmpriv.guest, kvmpriv.guest.linux):
        assert set(module.__all__) <= set(dir(module))
        assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(kvmpriv.guest, "nothing")  # noqa: B009
    assert Path(kvmpriv.guest.__file__ or "").name == "__init__.py"
