#!/usr/bin/env python3
"""Give a Linux guest devices of your own, which a program in it uses.

    scripts/examples/linux_device.py KERNEL

The first is a virtio disk without a file: this program computes its sectors when the guest reads
them, and is called when the guest writes.  Linux has a driver for it.  The second is behind a port,
and the third in device memory; a program in the guest reaches them by /dev/port and /dev/mem, if
the kernel has these (CONFIG_DEVPORT, CONFIG_DEVMEM).  Exit status: 0 if the guest has read and
written what it should have, 1 if not, 2 for bad usage.
"""

from __future__ import annotations

import struct
import sys

from kvmpriv.guest.linux import Chain, Device, GuestDied, LinuxGuest, Queue, RingError, VirtioDevice

SECTOR, SECTORS = 512, 1 << 20
READ, WRITE, FLUSH = 0, 1, 4
OK, IO_ERROR, UNSUPPORTED = b"\0", b"\1", b"\2"
PORT, ADDRESS = 0x500, 0xE0000000


class ComputedDisk(VirtioDevice):
    """A disk of 512 MiB; each sector says which one it is (VIRTIO 1.2, 5.2)."""

    device_id = 2  # a block device: the guest's driver for it is virtio_blk
    name = "computed disk"
    config = struct.pack("<Q", SECTORS).ljust(64, b"\0")
    bounced = 1 << 20  # a guest with private memory has its requests in bounce buffers

    def __init__(self) -> None:
        self.written: dict[int, bytes] = {}

    def serve(self, number: int, queue: Queue) -> bool:
        """Answer the requests that wait; True if there was one."""
        done = False
        while (chain := queue.pop()) is not None:
            queue.push(chain, self._answer(chain))
            done = True
        return done

    def _answer(self, chain: Chain) -> int:
        """Serve a request; returns how many bytes were written to the guest."""
        data = b"".join(chain.readable)
        if len(data) < 16 or not chain.writable or not chain.writable[-1]:
            raise RingError("sent a request without a header, or without room for the answer")
        kind, _, sector = struct.unpack_from("<IIQ", data)
        *room, last = chain.writable  # of which the last byte is the status
        room.append(last[:-1])
        size = sum(map(len, room))
        status = OK
        if kind == READ and sector * SECTOR + size <= SECTORS * SECTOR:
            for part in room:
                part[:] = self._contents(sector, len(part))
                sector += len(part) // SECTOR
        elif kind == WRITE and sector * SECTOR + len(data) - 16 <= SECTORS * SECTOR:
            for at in range(16, len(data), SECTOR):  # a page and not a sector, as a rule
                self.written[sector + at // SECTOR] = data[at : at + SECTOR]
        elif kind != FLUSH:
            status = UNSUPPORTED if kind not in (READ, WRITE) else IO_ERROR
        last[-1:] = status
        return size + 1

    def _contents(self, first: int, size: int) -> bytes:
        sectors = range(first, first + -(-size // SECTOR))
        parts = [self.written.get(n) or (b"this is sector %d\n" % n).ljust(SECTOR) for n in sectors]
        return b"".join(parts)[:size]


class Doubler(Device):
    """Reads as twice what was written last."""

    value = 0

    def read(self, offset: int, size: int) -> int:
        return 2 * self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


#: What the guest runs: (what it needs, the command, what it prints).
PORT_COMMAND = (
    f"printf '\\025' | dd of=/dev/port bs=1 seek={PORT} 2>/dev/null;"
    f" dd if=/dev/port bs=1 skip={PORT} count=1 2>/dev/null | hexdump -e '1/1 \"%d\"'"
)
PROGRAMS = (
    ("/dev/vda", "dd if=/dev/vda bs=512 skip=12345 count=1 2>/dev/null", "this is sector 12345"),
    ("/dev/vda", "echo hello, Python | dd of=/dev/vda bs=512 seek=7 conv=sync,fsync", ""),
    ("/dev/port", PORT_COMMAND, "42"),
    ("/dev/mem", f"devmem {ADDRESS:#x} 32 21; devmem {ADDRESS:#x} 32", "0x0000002A"),
)


def main(kernel: str) -> int:
    disk = ComputedDisk()
    guest = LinuxGuest(kernel)
    guest.add_device(disk)
    guest.add_device(Doubler(), port=PORT, size=1)
    guest.add_device(Doubler(), mmio=ADDRESS, size=4)
    good = True
    with guest:
        for needed, command, wanted in PROGRAMS:
            if guest.run(["test", "-e", needed]).returncode != 0:
                print(f"this kernel has no {needed}")
                continue
            printed = guest.run(command, text=True).stdout.strip()
            print(f"{needed}: the guest has read {printed!r}" if wanted else f"{needed}: written")
            good = good and printed == wanted
    print(f"the guest has written to sector 7: {disk.written.get(7, b'').rstrip(bytes(1))!r}")
    return 0 if good and disk.written.get(7, b"").startswith(b"hello, Python\n") else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(main(sys.argv[1]))
    except (GuestDied, OSError, ValueError) as error:
        sys.exit(f"linux_device.py: {error}")
