"""A recorded run: how it is written down, and read again.

A file of JSON lines.  The first one says what ran, each other one what happened and when (``t``, in
seconds from the first): an exit, a conversion, a sample of memory and cost, the end.  A run that
was cut off is a shorter file.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

__all__ = ["Recorder", "Recording", "TraceError", "read"]

VERSION = 1
_LINE_MAX = 1 << 20


class TraceError(ValueError):
    """A file that is no recording; says which line, and why."""


class Recorder:
    """Writes what happens to `file`, from any thread.

    What the file can't take ends the recording, not the run: `error` says why, then.
    """

    def __init__(self, file: TextIO, about: dict[str, Any]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._started = time.monotonic()
        #: Why nothing is recorded any more.
        self.error: OSError | None = None
        self._write({"kvmpriv_trace": VERSION, **about})

    def event(self, **fields: Any) -> None:
        """Something that happens now."""
        self._write({"t": round(time.monotonic() - self._started, 6), **fields})

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":")) + "\n"
        with self._lock:
            if self.error is not None:
                return
            try:
                self._file.write(text)
            except OSError as error:
                self.error = error

    def close(self) -> None:
        """Write what is still held back."""
        with self._lock:
            try:
                self._file.close()
            except OSError as error:
                self.error = self.error or error


class Recording(NamedTuple):
    """What a file says: the first line, and all others in order."""

    about: dict[str, Any]
    events: Sequence[dict[str, Any]]
    cut_off: bool  # in the middle of a line


def _has(entry: dict[str, Any], **types: type) -> bool:
    return all(
        # A bool is an int for Python, but not for a reader of the file.
        isinstance(entry.get(name), (int, float) if kind is float else kind)
        and (kind is bool or not isinstance(entry[name], bool))
        for name, kind in types.items()
    )


def _is_about(entry: dict[str, Any]) -> bool:
    return _has(entry, what=str, cpus=int, ranges=list) and all(
        isinstance(part, dict) and _has(part, gpa=int, size=int, kind=str, purpose=str)
        for part in entry["ranges"]
    )


def _is_event(entry: dict[str, Any], ranges: int) -> bool:
    """Whether it is one of those that are written, whole."""
    if not _has(entry, t=float):
        return False
    if "exit" in entry:
        return _has(entry, cpu=int, exit=str)
    if "convert" in entry:
        return _has(entry, cpu=int, convert=str, gpa=int, size=int, by=str)
    if "memory" in entry:
        return (
            _has(entry, memory=list, rss=int, cpu=list)
            and len(entry["memory"]) == ranges
            and all(
                isinstance(part, dict) and _has(part, resident=int, private=int)
                for part in entry["memory"]
            )
            and all(isinstance(share, (int, float)) for share in entry["cpu"])
        )
    return "end" in entry and _has(entry, end=str, status=int, why=str)


def read(path: Path) -> Recording:
    """Read a recording.  TraceError for what is none, OSError for what can't be read."""
    about: dict[str, Any] | None = None
    events: list[dict[str, Any]] = []
    cut_off = False
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE_MAX), b""), 1):
            if not line.endswith(b"\n"):
                cut_off = about is not None
                if about is None:
                    raise TraceError("not a recording of `kvmpriv boot --trace`")
                break
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if about is None:
                if not isinstance(entry, dict) or "kvmpriv_trace" not in entry:
                    raise TraceError("not a recording of `kvmpriv boot --trace`")
                if entry["kvmpriv_trace"] != VERSION:
                    raise TraceError(
                        f"a recording of version {entry['kvmpriv_trace']!r}, and this kvmpriv reads"
                        f" {VERSION}"
                    )
                about = entry
                ranges = len(about["ranges"]) if _is_about(about) else -1
                if ranges < 0:
                    raise TraceError("line 1: it does not say what ran")
            elif isinstance(entry, dict) and _is_event(entry, ranges):
                events.append(entry)
            else:
                raise TraceError(f"line {number}: no event: {line[:60]!r}")
    if about is None:
        raise TraceError("the file is empty")
    return Recording(about, events, cut_off)
