"""Recordings of a guest's run: written, read, and shown as text and as a page."""

from .page import page
from .record import Recorder, Recording, TraceError, read
from .summary import Summary, summarize, text

__all__ = [
    "Recorder",
    "Recording",
    "Summary",
    "TraceError",
    "page",
    "read",
    "summarize",
    "text",
]
