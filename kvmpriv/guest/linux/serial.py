"""A 16550A serial port, with FIFOs and interrupts.

The registers are those of the data sheet of National Semiconductor's PC16550D.  Output has no baud
rate: it is as fast as the guest writes it.  Input waits here until the guest has read it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["SIZE", "Serial"]

#: How many port addresses it has.
SIZE = 8

_DATA, _ENABLE, _IDENTIFY, _LINE, _MODEM, _LINE_STATUS, _MODEM_STATUS, _SCRATCH = range(8)
_FIFO = _IDENTIFY  # when written
_ENABLE_RECEIVED, _ENABLE_EMPTY = 1, 2
_DIVISOR_ACCESS = 0x80
_LOOPBACK, _OUT2 = 0x10, 0x08
_READY, _EMPTY = 0x01, 0x60
_NO_INTERRUPT, _ID_EMPTY, _ID_RECEIVED = 0x01, 0x02, 0x04
_FIFOS = 0xC0
_FIFO_SIZE = 16
_CONNECTED = 0xB0  # carrier, data set ready, clear to send


class Serial:
    """A serial port.

    `output` is called with each byte that the guest sends, `irq` with the new level (0 or 1) of the
    interrupt line.  Any thread may call.
    """

    def __init__(self, output: Callable[[int], object], irq: Callable[[int], object]) -> None:
        self._output = output
        self._irq = irq
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()  # not in the FIFO yet
        self._received: deque[int] = deque()
        self._enable = self._line = self._modem = self._scratch = self._fifo = 0
        self._divisor = 1
        self._empty_pending = False
        self._level = 0

    def receive(self, data: bytes) -> None:
        """Let the guest receive `data`.

        The bytes wait until its driver enables the interrupt for received data and sets OUT2: a
        driver that starts, or that finds out which kind of port this is, discards what it receives.
        """
        with self._lock:
            self._waiting.extend(data)
            self._update()

    def pending(self) -> int:
        """How many bytes the guest has not read yet."""
        return len(self._waiting) + len(self._received)

    def read(self, offset: int, size: int) -> int:
        """Read the register at `offset`, one byte."""
        if offset == _LINE_STATUS:  # most reads, and the only one that needs no lock
            return _EMPTY | (_READY if self._received else 0)
        with self._lock:
            return self._read(offset)

    def _read(self, offset: int) -> int:
        if self._line & _DIVISOR_ACCESS and offset in (_DATA, _ENABLE):
            return self._divisor >> 8 * offset & 0xFF
        if offset == _DATA:
            value = self._received.popleft() if self._received else 0
            self._update()
            return value
        if offset == _ENABLE:
            return self._enable
        if offset == _IDENTIFY:
            fifos = _FIFOS if self._fifo & 1 else 0
            if self._enable & _ENABLE_RECEIVED and self._received:
                return fifos | _ID_RECEIVED
            if self._enable & _ENABLE_EMPTY and self._empty_pending:
                self._empty_pending = False  # reading it clears it
                self._update()
                return fifos | _ID_EMPTY
            return fifos | _NO_INTERRUPT
        if offset == _MODEM_STATUS and self._modem & _LOOPBACK:
            # In loopback mode the outputs are connected to the inputs.
            set_ = self._modem
            return (set_ & 0x0C) << 4 | (set_ & 0x02) << 3 | (set_ & 0x01) << 5
        return (self._line, self._modem, 0, _CONNECTED, self._scratch)[offset - _LINE]

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the register at `offset`, one byte."""
        value &= 0xFF
        if offset == _DATA and not self._line & _DIVISOR_ACCESS:
            if self._modem & _LOOPBACK:
                with self._lock:
                    if len(self._received) < _FIFO_SIZE:
                        self._received.append(value)
                return
            self._output(value)
            # An interrupt that is already pending does not have to be raised again.
            if self._enable & _ENABLE_EMPTY and not self._empty_pending:
                with self._lock:
                    self._empty_pending = True
                    self._update()
            return
        with self._lock:
            self._write(offset, value)

    def _write(self, offset: int, value: int) -> None:
        if offset in (_DATA, _ENABLE) and self._line & _DIVISOR_ACCESS:
            keep = self._divisor & (0xFF00 if offset == _DATA else 0xFF)
            self._divisor = keep | value << 8 * offset
        elif offset == _ENABLE:
            # Enabling the interrupt of an empty transmitter raises it.
            if value & ~self._enable & _ENABLE_EMPTY:
                self._empty_pending = True
            self._enable = value & 0x0F
        elif offset == _FIFO:
            self._fifo = value
            if value & 0x02:
                self._received.clear()
        elif offset == _LINE:
            self._line = value
        elif offset == _MODEM:
            self._modem = value & 0x1F
        elif offset == _SCRATCH:
            self._scratch = value
        self._update()

    def _update(self) -> None:
        # OUT2 is the gate between the chip and the interrupt line.
        gate = bool(self._modem & _OUT2) and not self._modem & _LOOPBACK
        if self._enable & _ENABLE_RECEIVED and gate:
            while self._waiting and len(self._received) < _FIFO_SIZE:
                self._received.append(self._waiting.popleft())
        wanted = (self._enable & _ENABLE_RECEIVED and bool(self._received)) or (
            self._enable & _ENABLE_EMPTY and self._empty_pending
        )
        level = int(bool(wanted) and gate)
        if level != self._level:
            self._level = level
            self._irq(level)
