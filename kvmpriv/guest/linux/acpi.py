"""The ACPI tables that describe a Linux guest's machine: processors, power, virtio devices.

ACPI Specification 6.4: chapter 5 (tables), 19 and 20 (the machine language of the DSDT).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

__all__ = [
    "PM1_CONTROL",
    "PM1_EVENT",
    "RESET_PORT",
    "RESET_VALUE",
    "SLEEP_ENABLE",
    "SLEEP_TYPE_OFF",
    "tables",
]

#: Ports of the power management registers.
PM1_EVENT, PM1_CONTROL = 0x600, 0x604
#: Writing (type << 10 | enable) to PM1_CONTROL turns the machine off.
SLEEP_TYPE_OFF, SLEEP_ENABLE = 5, 1 << 13
#: Writing the value to the port resets the machine.
RESET_PORT, RESET_VALUE = 0xCF9, 0x06

_SCI = 9
_LAPIC, _IOAPIC = 0xFEE00000, 0xFEC00000
_CREATOR = b"KVMP"


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        36 + len(body),
        revision,
        0,
        b"KVMPRV",
        b"KVMPRIV ",
        1,
        _CREATOR,
        1,
    )
    return _summed(header + body, 9)


def _summed(table: bytes, at: int) -> bytes:
    """The same with the byte `at` set so that the sum of all bytes is 0 (mod 256)."""
    return table[:at] + bytes((-sum(table) & 0xFF,)) + table[at + 1 :]


def tables(address: int, cpus: int, devices: Sequence[tuple[int, int, int]] = ()) -> bytes:
    """All tables, for the guest physical address `address`; the root pointer (RSDP) is first.

    `cpus` is the number of processors, whose APIC ids count from 0.  `devices` are virtio-mmio
    devices: (address of the registers, their size, interrupt).
    """
    at = address + 64
    placed: list[bytes] = []

    def place(table: bytes) -> int:
        nonlocal at
        where = at
        placed.append(table + bytes(-len(table) % 64))
        at += len(placed[-1])
        return where

    facs = place(struct.pack("<4sIIIIIB", b"FACS", 64, 0, 0, 0, 0, 2).ljust(64, b"\0"))
    dsdt = place(_table(b"DSDT", 2, _dsdt(devices)))
    entries = [place(_fadt(facs, dsdt)), place(_table(b"APIC", 4, _madt(cpus)))]
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(entries)}Q", *entries)))
    rsdp = _summed(struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"KVMPRV", 2, 0), 8)
    rsdp = _summed(rsdp + struct.pack("<IQB3x", 36, xsdt, 0), 32)
    return rsdp.ljust(64, b"\0") + b"".join(placed)


def _fadt(facs: int, dsdt: int) -> bytes:
    table = bytearray(276)

    def put(offset: int, layout: str, *values: int) -> None:
        struct.pack_into("<" + layout, table, offset, *values)

    put(36, "II", facs, dsdt)
    put(46, "H", _SCI)
    put(56, "I", PM1_EVENT)
    put(64, "I", PM1_CONTROL)
    put(88, "BB", 4, 2)  # lengths of the two
    put(96, "HH", 101, 1001)  # no C2, no C3
    # IAPC_BOOT_ARCH: no 8042, no VGA, no MSI, no ASPM, no CMOS clock
    put(109, "H", 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5)
    # WBINVD works, C1 is there, power and sleep button are not, there is a reset register
    put(112, "I", 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 10)
    put(116, "BBBBQB", 1, 8, 0, 1, RESET_PORT, RESET_VALUE)
    put(140, "Q", dsdt)
    put(148, "BBBBQ", 1, 32, 0, 0, PM1_EVENT)
    put(172, "BBBBQ", 1, 16, 0, 0, PM1_CONTROL)
    return _table(b"FACP", 6, bytes(table[36:]))


def _madt(cpus: int) -> bytes:
    body = struct.pack("<II", _LAPIC, 1)  # with two 8259s
    for cpu in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
    return body + struct.pack("<BBBBII", 1, 12, 0, 0, _IOAPIC, 0)


# -- the DSDT ----------------------------------------------------------------------------------


def _package(opcode: bytes, content: bytes) -> bytes:
    """An opcode, the length of what follows (20.2.4), and the content."""
    size = len(content) + 1
    if size < 0x40:
        return opcode + bytes((size,)) + content
    size += 1
    if size < 0x1000:
        return opcode + bytes((0x40 | size & 0xF, size >> 4)) + content
    size += 1
    return opcode + bytes((0x80 | size & 0xF, size >> 4 & 0xFF, size >> 12)) + content


def _name(name: bytes, value: bytes) -> bytes:
    return b"\x08" + name + value


def _dsdt(devices: Sequence[tuple[int, int, int]]) -> bytes:
    off = bytes((0x0A, SLEEP_TYPE_OFF))
    code = _name(b"_S5_", _package(b"\x12", b"\x04" + off + off + b"\0\0"))
    made = b""
    for number, (address, size, interrupt) in enumerate(devices):
        resources = (
            # Memory32Fixed, read and write; an edge-triggered interrupt, active high; the end.
            struct.pack("<BHBII", 0x86, 9, 1, address, size)
            + struct.pack("<BHBBI", 0x89, 6, 0x03, 1, interrupt)
            + b"\x79\0"
        )
        made += _package(
            b"\x5b\x82",
            b"V%03d" % number
            + _name(b"_HID", b"\x0dLNRO0005\0")
            + _name(b"_UID", bytes((0x0A, number)))
            + _name(b"_CCA", b"\x01")
            + _name(b"_CRS", _package(b"\x11", bytes((0x0A, len(resources))) + resources)),
        )
    if made:
        code += _package(b"\x10", b"\\_SB_" + made)
    return code
