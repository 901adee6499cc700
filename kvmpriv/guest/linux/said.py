"""What a guest reports to its script, line by line, on its second serial port."""

from __future__ import annotations

__all__ = ["Said"]

_LINES_MAX, _LINE_MAX = 1000, 4096


class Said:
    """Collects the bytes of COM2 (ttyS1).

    The line ``exit N`` (N from 0 to 999, of which the low 8 bits count) sets `status`.  All others
    go to `lines`, up to 1000 lines of at most 4096 bytes; the rest is dropped.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.status: int = 0
        self._line = bytearray()

    def put(self, value: int) -> None:
        """Take a byte."""
        if value not in b"\r\n":
            if len(self._line) < _LINE_MAX:
                self._line.append(value)
            return
        line = self._line.decode(errors="backslashreplace").strip()
        self._line.clear()
        word, _, number = line.partition(" ")
        if word == "exit" and number.isascii() and number.isdecimal() and len(number) < 4:
            self.status = int(number) & 0xFF
        elif line and len(self.lines) < _LINES_MAX:
            self.lines.append(line)
