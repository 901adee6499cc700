"""A recorded run: how it is written to a file, and how it is read.

A file of JSON lines.  The first line describes the run.  Each other line is an event: an exit, a
conversion, a sample of memory and cost, a mark, or the end, with the time ``t`` in seconds since
the recording began.  A run that was cut off is a shorter file.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO, TypeAlias, TypedDict, cast, final

from ..terminal import printable

__all__ = ["About", "ConversionEvent", "DeviceAbout", "EndEvent", "Event", "ExitEvent"]
__all__ += ["MarkEvent", "RangeAbout", "Recorder", "Recording", "SampleEvent", "TraceError"]
__all__ += ["UseAbout", "read"]

VERSION = 1
_LINE_MAX = 1 << 20


class RangeAbout(TypedDict):
    """A range of the guest's RAM: addresses and sizes in bytes, `kind` "shared" or "private"."""

    gpa: int
    size: int
    kind: str
    purpose: str


class _DeviceAbout(TypedDict):
    name: str
    size: int


@final
class DeviceAbout(_DeviceAbout, total=False):
    """A device: its first address, either a `port` or a `gpa`, and how many addresses it has."""

    port: int
    gpa: int


class _About(TypedDict):
    kvmpriv_trace: int
    what: str
    cpus: int
    ranges: list[RangeAbout]


@final
class About(_About, total=False):
    """The first line: the format's version, what ran, the number of vCPUs, RAM, and the ABI.

    `cmdline` is the kernel's command line, `date` the time when the recording began, in UTC
    (``2026-01-31T12:00:00Z``).  Recordings of earlier versions of kvmpriv do not have the last
    three.
    """

    private_abi: str | None
    cmdline: str
    date: str
    devices: list[DeviceAbout]


class _Timed(TypedDict):
    t: float


class _ExitEvent(_Timed):
    cpu: int
    exit: str


@final
class ExitEvent(_ExitEvent, total=False):
    """An exit to user space of the vCPU `cpu`, at a port or an address if it has one."""

    port: int
    gpa: int
    write: bool


@final
class ConversionEvent(_Timed):
    """A conversion to `convert` ("private" or "shared") that the vCPU `cpu` asked for.

    `by` is "hypercall" or "fault"; `gpa` and `size` are in bytes.
    """

    cpu: int
    convert: str
    gpa: int
    size: int
    by: str


class UseAbout(TypedDict):
    """What a range uses, in bytes: what the host can read, and what is private."""

    resident: int
    private: int


class _SampleEvent(_Timed):
    memory: list[UseAbout]
    rss: int
    cpu: list[float]


@final
class SampleEvent(_SampleEvent, total=False):
    """Memory in bytes, by range and of the process, and CPU time in seconds, by vCPU."""

    shared: int
    others: float


@final
class MarkEvent(_Timed):
    """A moment that the recording program has named, for example "ready"."""

    mark: str


@final
class EndEvent(_Timed):
    """How the guest ended, its exit status, and why."""

    end: str
    status: int
    why: str


#: Any line but the first.  ``"exit" in event`` tells the kinds apart.
Event: TypeAlias = ExitEvent | ConversionEvent | SampleEvent | MarkEvent | EndEvent


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

    #: The first line.
    about: About
    #: All other lines, in order.
    events: Sequence[Event]
    #: True if the file ends in the middle of a line.
    cut_off: bool


# -- which lines are valid -----------------------------------------------------------------------

_Check = Callable[[object], bool]


def _is_int(low: int, high: int) -> _Check:
    # A bool is an int in Python, but not in the file.
    return lambda value: (
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    )


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_seconds(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= cast("float", value) <= 1e12  # neither NaN nor infinite


def _is_text(value: object) -> bool:
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
    return lambda value: (
        isinstance(value, dict)
        and all(check(value[name]) for name, check in fields.items() if name in value)
    )


_is_address = _is_size = _is_int(0, (1 << 64) - 1)
_is_cpu = _is_int(0, 1 << 16)
_is_status = _is_int(-(1 << 31), (1 << 31) - 1)
_is_range = _has(gpa=_is_address, size=_is_size, kind=_is_text, purpose=_is_text)
_is_about = _has(what=_is_text, cpus=_is_int(1, 1 << 16), ranges=_is_list(_is_range))
_is_place = _may_have(port=_is_int(0, 0xFFFF), gpa=_is_address, write=_is_bool)


def _is_device(value: object) -> bool:
    named = _has(name=_is_text, size=_is_size)(value) and _is_place(value)
    return named and isinstance(value, dict) and ("port" in value) != ("gpa" in value)


_is_more_about = _may_have(
    private_abi=lambda value: value is None or isinstance(value, str),
    cmdline=_is_text,
    date=_is_text,
    devices=_is_list(_is_device),
)
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
    "mark": _has(mark=_is_text),
    "end": _has(end=_is_text, status=_is_status, why=_is_text),
}
_has_time = _has(t=_is_seconds)


def _is_event(entry: object, ranges: int) -> bool:
    """True if `entry` is an event with all its fields; `ranges` is how many the run has."""
    if not isinstance(entry, dict) or not _has_time(entry):
        return False
    for kind, check in _EVENTS.items():
        if kind in entry:
            valid = check(entry) and (kind != "exit" or _is_place(entry))
            return valid and (kind != "memory" or len(entry["memory"]) == ranges)
    return False


def _clean(value: object) -> object:
    """The same with control characters in strings escaped, so that they can be printed."""
    if isinstance(value, str):
        return "\n".join(map(printable, value.split("\n")))
    if isinstance(value, list):
        return [_clean(each) for each in value]
    if isinstance(value, dict):
        return {name: _clean(each) for name, each in value.items()}
    return value


def _parse(line: bytes) -> object:
    try:
        return _clean(json.loads(line))
    except (ValueError, RecursionError):
        return None


def read(path: Path) -> Recording:
    """Read a recording.

    TraceError if the file is not one, OSError if it can't be read.  Control characters in its
    strings are escaped, but for line breaks.
    """
    about: About | None = None
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
                events.append(cast("Event", entry))
    if about is None:
        raise TraceError("the file is empty")
    return Recording(about, events, cut_off)


def _read_about(line: bytes) -> About:
    about = _parse(line) if line.endswith(b"\n") else None
    if not isinstance(about, dict) or "kvmpriv_trace" not in about:
        raise TraceError("not a recording of `kvmpriv boot --trace`")
    version = about["kvmpriv_trace"]
    if version != VERSION:
        shown = repr(version)[:60]
        raise TraceError(f"a recording of version {shown}; this kvmpriv reads version {VERSION}")
    if not _is_about(about) or not _is_more_about(about):
        raise TraceError("line 1: it does not describe a run")
    return cast("About", about)
