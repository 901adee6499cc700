"""Recordings of a guest's run: written, read, and shown as text and as a page."""

from .page import page
from .record import (
    About,
    ConversionEvent,
    DeviceAbout,
    EndEvent,
    Event,
    ExitEvent,
    MarkEvent,
    RangeAbout,
    Recorder,
    Recording,
    SampleEvent,
    TraceError,
    UseAbout,
    read,
)
from .summary import Summary, document, headline, summarize, text

__all__ = [
    "About",
    "ConversionEvent",
    "DeviceAbout",
    "EndEvent",
    "Event",
    "ExitEvent",
    "MarkEvent",
    "RangeAbout",
    "Recorder",
    "Recording",
    "SampleEvent",
    "Summary",
    "TraceError",
    "UseAbout",
    "document",
    "headline",
    "page",
    "read",
    "summarize",
    "text",
]
