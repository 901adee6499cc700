"""A recorded run: how it is written to a file, and how it is read.

A file of JSON lines.  The first line describes the run.  Each other line is an event: an exit, a
conversion, a sample of memory and cost, or the end, with the time ``t`` in seconds since the
recording began.  A run that was cut off is a shorter file.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..terminal import printable

__all__ = ["Event", "Recorder", "Recording", "TraceError", "read"]

VERSION = 1
_LINE_MAX = 1 << 20

#: A line of a recording: the names of its fields, and their values as JSON has them.
Event = Mapping[str, Any]


class TraceError(ValueError):
    """A file is not a recording; the message names the line and what is wrong with it."""


class Recorder:
    """Writes a recording to `file`, which it closes.  Any thread may record events.

    `about` describes the run.  If the file can't be written to, the recording ends and `error` says
    why; nothing is raised.
    """

    def __init__(self, file: TextIO, about: Mapping[str, object]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._started = time.monotonic()
        #: Why nothing more is recorded, or None.
        self.error: OSError | None = None
        self._write({"kvmpriv_trace": VERSION, **about})

    def event(self, **fields: object) -> None:
        """Record an event that happens now."""
        self._write({"t": round(time.monotonic() - self._started, 6), **fields})

    def _write(self, line: Mapping[str, object]) -> None:
        text = json.dumps(line, separators=(",", ":")) + "\n"
        with self._lock:
            if self.error is not None:
                return
            try:
                self._file.write(text)
            except OSError as error:
                self.error = error

    def close(self) -> None:
        """Write what is still buffered, and close the file."""
        with self._lock:
            try:
                self._file.close()
            except OSError as error:
                self.error = self.error or error


class Recording(NamedTuple):
    """What a file contains."""

    #: The first line: ``what``, ``cpus``, ``ranges`` and ``private_abi``.
    about: Event
    #: All other lines, in order.
    events: Sequence[Event]
    #: True if the file ends in the middle of a line.
    cut_off: bool


# -- which lines are valid -----------------------------------------------------------------------

_Check = Callable[[Any], bool]


def _is_int(low: int, high: int) -> _Check:
    # A bool is an int in Python, but not in the file.
    return lambda value: type(value) is int and low <= value <= high


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1e12 and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(check(each) for each in value)


def _has(**fields: _Check) -> _Check:
    """An object that has all of `fields`, and possibly more."""
    return lambda value: (
        isinstance(value, dict)
        and all(name in value and check(value[name]) for name, check in fields.items())
    )


def _may_have(**fields: _Check) -> _Check:
    return lambda value: all(check(value[name]) for name, check in fields.items() if name in value)


_is_address = _is_size = _is_int(0, (1 << 64) - 1)
_is_cpu = _is_int(0, 1 << 16)
_is_status = _is_int(-(1 << 31), (1 << 31) - 1)
_is_range = _has(gpa=_is_address, size=_is_size, kind=_is_text, purpose=_is_text)
_is_about = _has(what=_is_text, cpus=_is_int(1, 1 << 16), ranges=_is_list(_is_range))
_is_abi = _may_have(private_abi=lambda value: value is None or isinstance(value, str))
_is_use = _has(resident=_is_size, private=_is_size)
#: The field that only this kind of event has -> what the event has to have.
_EVENTS: dict[str, _Check] = {
    "exit": _has(cpu=_is_cpu, exit=_is_text),
    "convert": _has(
        cpu=_is_cpu,
        convert=lambda value: value in ("private", "shared"),
        gpa=_is_address,
        size=_is_size,
        by=_is_text,
    ),
    "memory": _has(memory=_is_list(_is_use), rss=_is_size, cpu=_is_list(_is_seconds)),
    "end": _has(end=_is_text, status=_is_status, why=_is_text),
}
_has_time = _has(t=_is_seconds)
_is_place = _may_have(
    port=_is_int(0, 0xFFFF), gpa=_is_address, write=lambda value: isinstance(value, bool)
)


def _is_event(entry: Any, ranges: int) -> bool:
    """True if `entry` is an event with all its fields; `ranges` is how many the run has."""
    if not _has_time(entry):
        return False
    for kind, check in _EVENTS.items():
        if kind in entry:
            valid = check(entry) and (kind != "exit" or _is_place(entry))
            return valid and (kind != "memory" or len(entry["memory"]) == ranges)
    return False


def _clean(value: Any) -> Any:
    """The same with control characters in strings escaped, so that they can be printed."""
    if isinstance(value, str):
        return "\n".join(map(printable, value.split("\n")))
    if isinstance(value, list):
        return [_clean(each) for each in value]
    if isinstance(value, dict):
        return {name: _clean(each) for name, each in value.items()}
    return value


def _parse(line: bytes) -> Any:
    try:
        return _clean(json.loads(line))
    except (ValueError, RecursionError):
        return None


def read(path: Path) -> Recording:
    """Read a recording.

    TraceError if the file is not one, OSError if it can't be read.  Control characters in its
    strings are escaped, but for line breaks.
    """
    about: Event | None = None
    ranges = 0
    events: list[Event] = []
    cut_off = False
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE_MAX), b""), 1):
            if about is None:
                about = _read_about(line)
                ranges = len(about["ranges"])
            elif not line.endswith(b"\n") and len(line) < _LINE_MAX:
                cut_off = True
            else:
                entry = _parse(line)
                if not _is_event(entry, ranges):
                    raise TraceError(f"line {number}: not an event: {line[:60]!r}")
                events.append(entry)
    if about is None:
        raise TraceError("the file is empty")
    return Recording(about, events, cut_off)


def _read_about(line: bytes) -> Event:
    about = _parse(line) if line.endswith(b"\n") else None
    if not isinstance(about, dict) or "kvmpriv_trace" not in about:
        raise TraceError("not a recording of `kvmpriv boot --trace`")
    version = about["kvmpriv_trace"]
    if version != VERSION:
        shown = repr(version)[:60]
        raise TraceError(f"a recording of version {shown}; this kvmpriv reads version {VERSION}")
    if not _is_about(about) or not _is_abi(about):
        raise TraceError("line 1: it does not describe a run")
    return about
