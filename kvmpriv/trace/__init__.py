"""Recordings of a guest's run: written, read, and shown as text and as a page."""

from .output import is_same_file, write_page
from .page import page
from .record import Event, Recorder, Recording, TraceError, read
from .summary import Summary, summarize, text

__all__ = [
    "Event",
    "Recorder",
    "Recording",
    "Summary",
    "TraceError",
    "is_same_file",
    "page",
    "read",
    "summarize",
    "text",
    "write_page",
]
