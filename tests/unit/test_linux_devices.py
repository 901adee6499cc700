"""The parts of a Linux guest's machine, one by one."""

from __future__ import annotations

import os
import pty
import struct
import termios
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpriv import ArgumentError, CpuidEntry
from kvmpriv.cdefs import kvm as k
from kvmpriv.guest.linux import Interrupted, acpi, cpuid
from kvmpriv.guest.linux.bus import Bus
from kvmpriv.guest.linux.console import Keyboard, _Raw
from kvmpriv.guest.linux.net import parse_mac
from kvmpriv.guest.linux.serial import Serial

DATA, ENABLE, IDENTIFY, FIFO, LINE, MODEM, LINE_STATUS, MODEM_STATUS, SCRATCH = (
    *(0, 1, 2, 2, 3, 4, 5, 6, 7),
)


class Port:
    """A serial port that logs its output and its interrupt line."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.levels: list[int] = []
        self.serial = Serial(self.sent.append, self.levels.append)

    def read(self, offset: int) -> int:
        return self.serial.read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.serial.write(offset, 1, value)


@pytest.fixture
def port() -> Port:
    """A port whose interrupt gate is open, as a driver sets it."""
    made = Port()
    made.write(FIFO, 0x07)
    made.write(MODEM, 0x0B)
    return made


def test_serial_output_is_always_ready(port: Port) -> None:
    for byte in b"hello":
        assert port.read(LINE_STATUS) == 0x60
        port.write(DATA, byte)
    assert port.sent == b"hello"
    assert port.levels == []


def test_serial_is_a_16550a(port: Port) -> None:
    """The registers by which a driver recognises the kind of port."""
    assert port.read(IDENTIFY) == 0xC1
    port.write(FIFO, 0)
    assert port.read(IDENTIFY) == 0x01
    port.write(SCRATCH, 0x5A)
    assert port.read(SCRATCH) == 0x5A
    port.write(ENABLE, 0xFF)
    assert port.read(ENABLE) == 0x0F
    assert port.read(MODEM_STATUS) == 0xB0
    port.write(MODEM, 0x1A)  # loopback: OUT2 and RTS are seen as carrier and clear to send
    assert port.read(MODEM_STATUS) == 0x90


def test_serial_divisor(port: Port) -> None:
    port.write(LINE, 0x83)
    port.write(DATA, 0x34)
    port.write(ENABLE, 0x12)
    assert (port.read(DATA), port.read(ENABLE)) == (0x34, 0x12)
    port.write(LINE, 0x03)
    assert (port.read(DATA), port.read(ENABLE)) == (0, 0)
    assert port.sent == b""


def test_serial_empty_interrupt(port: Port) -> None:
    port.write(ENABLE, 2)
    assert port.levels == [1]
    assert port.read(IDENTIFY) == 0xC2
    assert port.levels == [1, 0]  # to be told is enough
    assert port.read(IDENTIFY) == 0xC1
    port.write(DATA, 0x41)
    assert port.levels == [1, 0, 1]
    port.write(ENABLE, 0)
    assert port.levels == [1, 0, 1, 0]
    port.write(DATA, 0x42)
    assert port.levels == [1, 0, 1, 0]
    port.write(MODEM, 0x03)  # the gate is shut
    port.write(ENABLE, 2)
    assert port.levels == [1, 0, 1, 0]


def test_serial_input_waits_for_a_driver(port: Port) -> None:
    sent = bytes(range(40))
    port.serial.receive(sent)
    port.write(MODEM, 0x03)
    port.write(ENABLE, 0x0F)  # one that finds out what this port is
    assert port.read(ENABLE) == 0x0F
    port.write(ENABLE, 0)
    port.write(FIFO, 0x07)  # a driver that starts throws away what is there
    port.write(MODEM, 0x0B)
    assert port.read(LINE_STATUS) == 0x60
    assert port.levels == []
    port.write(ENABLE, 1)
    assert port.levels == [1]
    got = bytearray()
    while port.read(LINE_STATUS) & 1:
        assert port.read(IDENTIFY) == 0xC4
        got.append(port.read(DATA))
    assert got == sent
    assert port.levels == [1, 0]
    assert port.read(DATA) == 0
    assert port.serial.pending() == 0


def test_serial_clearing_the_fifo_loses_what_is_in_it_and_no_more(port: Port) -> None:
    port.write(ENABLE, 1)
    port.serial.receive(bytes(range(40)))
    port.write(FIFO, 0x03)
    assert port.read(DATA) == 16
    assert port.serial.pending() == 23


def test_serial_loopback_stays_inside(port: Port) -> None:
    port.write(MODEM, 0x10)
    for byte in range(20):
        port.write(DATA, byte)
    assert port.sent == b""
    assert [port.read(DATA) for _ in range(17)] == [*range(16), 0]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(0, 7), st.just(0)),
            st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 2**32 - 1)),
            st.tuples(st.just("receive"), st.integers(0, 50), st.integers(0, 255)),
        )
    )
)
def test_serial_survives_any_driver(steps: list[tuple[str, int, int]]) -> None:
    port = Port()
    for what, number, value in steps:
        if what == "read":
            assert 0 <= port.read(number) <= 0xFF
        elif what == "write":
            port.write(number, value)
        else:
            port.serial.receive(bytes((value,)) * number)
    assert port.levels == [1 - n % 2 for n in range(len(port.levels))]  # each a change


def test_bus() -> None:
    class Log:
        def __init__(self) -> None:
            self.calls: list[tuple[int, ...]] = []

        def read(self, offset: int, size: int) -> int:
            self.calls.append((offset, size))
            return offset

        def write(self, offset: int, size: int, value: int) -> None:
            self.calls.append((offset, size, value))

    bus, device = Bus(), Log()
    bus.add(device, 0x100, 4)
    assert [bus.read(at, 1) for at in (0xFF, 0x100, 0x103, 0x104)] == [0xFF, 0, 3, 0xFF]
    assert bus.read(0x104, 4) == 0xFFFFFFFF
    assert bus.read(0x104, 8) == 0xFFFFFFFFFFFFFFFF
    bus.write(0x102, 2, 7)
    bus.write(0x104, 2, 7)
    assert device.calls == [(0, 1), (3, 1), (2, 2, 7)]
    with pytest.raises(ValueError, match=r"^Log \(0x103…0x10a\) overlaps Log \(0x100…0x103\)$"):
        bus.add(Log(), 0x102 + 1, 8)
    assert bus.read(0x105, 1) == 0xFF  # nothing of the one that was refused is there
    bus.add(Log(), 0x200, 1, "a log")
    assert bus.ranges == [(0x100, 4, "Log"), (0x200, 1, "a log")]
    for start, size in ((0x300, 0), (0x300, -1), (-1, 4)):
        with pytest.raises(ArgumentError, match="at least 1 address, from 0 on: Log"):
            bus.add(Log(), start, size)


def test_a_large_device() -> None:
    """A device of gigabytes takes no memory for its addresses."""

    class Echo:
        wrote: tuple[int, ...] = ()

        def read(self, offset: int, size: int) -> int:
            return offset

        def write(self, offset: int, size: int, value: int) -> None:
            self.wrote = (offset, size, value)

    bus, large, small = Bus(), Echo(), Echo()
    bus.add(large, 1 << 32, 8 << 30, "large")
    bus.add(small, 0x1000, 0x1000, "small")
    end = (1 << 32) + (8 << 30)
    wanted = [0xFFFF, 0, (8 << 30) - 2, 0xFFFF, 4]
    assert [bus.read(at, 2) for at in ((1 << 32) - 1, 1 << 32, end - 2, end, 0x1004)] == wanted
    bus.write(end - 4, 4, 7)
    bus.write(end, 4, 8)
    assert (large.wrote, small.wrote) == (((8 << 30) - 4, 4, 7), ())
    with pytest.raises(ArgumentError, match="overlaps large"):
        bus.add(Echo(), end - 1, 1)
    bus.add(Echo(), end, 1)


def test_acpi_tables_hang_together() -> None:
    base = 0xE0000
    data = acpi.tables(base, 3, [(0xD0000000 + 0x1000 * n, 0x1000, 16 + n) for n in range(8)])
    assert len(data) < 0x20000

    def at(address: int, size: int) -> bytes:
        return data[address - base : address - base + size]

    rsdp = at(base, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0
    found = {}

    def table(address: int) -> bytes:
        signature, size = struct.unpack("<4sI", at(address, 8))
        found[signature] = whole = at(address, size)
        assert len(whole) == size
        assert sum(whole) % 256 == 0 or signature == b"FACS"
        assert address % 64 == 0
        return whole

    xsdt = table(struct.unpack_from("<Q", rsdp, 24)[0])
    for entry in struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:]):
        table(entry)
    fadt = found[b"FACP"]
    table(struct.unpack_from("<I", fadt, 36)[0])
    table(struct.unpack_from("<I", fadt, 40)[0])
    assert struct.unpack_from("<Q", fadt, 140)[0] == struct.unpack_from("<I", fadt, 40)[0]
    assert sorted(found) == [b"APIC", b"DSDT", b"FACP", b"FACS", b"XSDT"]
    cpus = [found[b"APIC"][44 + 8 * n : 52 + 8 * n] for n in range(3)]
    assert cpus == [bytes((0, 8, n, n, 1, 0, 0, 0)) for n in range(3)]
    dsdt = found[b"DSDT"]
    assert dsdt.count(b"LNRO0005\0") == 8
    for n in range(8):
        assert struct.pack("<II", 0xD0000000 + 0x1000 * n, 0x1000) in dsdt
    # One scope, whose length ends with the table.
    scope = dsdt.index(b"\x10", 36 + 14)
    lead = dsdt[scope + 1]
    assert scope + 1 + (lead & 0xF | dsdt[scope + 2] << 4) == len(dsdt)


def leaf(function: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> CpuidEntry:
    return CpuidEntry(function, 0, 0, eax, ebx, ecx, edx)


def test_cpuid_says_who_is_who() -> None:
    supported = [
        leaf(0, 0x1F),
        leaf(1, 1, 0xFF001234, 0, 1 << 28),
        leaf(4, 0xFC000121),
        leaf(0xB, 9, 9, 9, 9),
        leaf(0x1F, 9, 9, 9, 9),
        leaf(k.KVM_CPUID_FEATURES, 0xFFFFFFFF),
        leaf(0x80000008, 0x3028, 0, 0xFFFF),
        leaf(0x8000001E, 9, 9, 9),
    ]
    made = {(e.function, e.index): e for e in cpuid.for_cpu(supported, 2, 3, tsc_deadline=True)}
    assert made[1, 0][3:] == (1, 2 << 24 | 4 << 16 | 0x1234, 1 << 31 | 1 << 24, 1 << 28)
    assert made[4, 0].eax >> 26 == 3
    assert [made[0xB, n][3:] for n in range(3)] == [
        *((0, 1, 0x100, 2), (2, 3, 0x201, 2), (0, 0, 2, 2)),
    ]
    assert (0x1F, 0) not in made
    assert made[0x80000008, 0].ecx == 0x0F00 | 2 << 12 | 2
    assert made[0x8000001E, 0][3:] == (2, 2, 0, 0)
    # No page that KVM would write to behind the guest's back; its clock stays.
    features = made[k.KVM_CPUID_FEATURES, 0].eax
    assert features & 1 << 3
    for bit in (4, 5, 6, 10, 14):
        assert not features & 1 << bit
    alone = {e.function: e for e in cpuid.for_cpu(supported, 0, 1, tsc_deadline=False)}
    assert alone[1].edx == 0
    assert alone[1].ecx == 1 << 31


@pytest.mark.parametrize(
    ("typed", "passed"),
    [
        ([b"ls\r"], b"ls\r"),
        ([b"a\x01\x01b"], b"a\x01b"),
        ([b"a\x01", b"\x01", b"b"], b"a\x01b"),
        ([b"\x03\x1a"], b"\x03\x1a"),
        ([b"ab\x01", b"x"], None),
    ],
)
def test_the_escape_from_a_terminal(typed: list[bytes], passed: bytes | None) -> None:
    ours, theirs = os.pipe()
    keys = Keyboard(ours, escape=True)
    got = b""
    try:
        for data in typed:
            os.write(theirs, data)
            if passed is None and data == typed[-1]:
                with pytest.raises(Interrupted):
                    keys.read()
            else:
                got += keys.read() or b""
        os.close(theirs)
        assert keys.read() is None
    finally:
        os.close(ours)
    assert passed is None or got == passed


def test_a_pipe_has_no_escape() -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b"\x01x")
    assert Keyboard(ours, escape=False).read() == b"\x01x"
    os.close(ours)
    os.close(theirs)


def test_the_terminal_is_restored_whatever_happens() -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    with suppress(KeyboardInterrupt), _Raw(theirs):
        raw = termios.tcgetattr(theirs)
        assert not raw[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
        raise KeyboardInterrupt
    assert termios.tcgetattr(theirs) == before
    with _Raw(theirs):
        os.close(ours)
    os.close(theirs)


def test_the_text_of_a_mac_address() -> None:
    assert parse_mac("52:54:00:12:34:aB") == bytes.fromhex("5254001234ab")
    for text in ("", "52:54:00:12:34", "52:54:00:12:34:5", "5254:00:12:34:56", "52:54:00:12:34:xx"):
        with pytest.raises(ArgumentError, match=f"^{text!r} is not the MAC address of a card"):
            parse_mac(text)
    for text in ("01:00:00:00:00:01", "00:00:00:00:00:00"):
        with pytest.raises(ArgumentError, match="the first of them even, not all of them 0"):
            parse_mac(text)
