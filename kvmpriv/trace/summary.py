"""The summary of a recording: its events counted, and shown as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ..terminal import format_size
from .record import ConversionEvent, EndEvent, Recording, SampleEvent

__all__ = ["Summary", "summarize", "text"]

_MIB = 1 << 20
_PLACES_MAX = 5  # how many ports or addresses to list for each kind of exit


class Summary(NamedTuple):
    """The events of a recording, counted and sorted by kind."""

    #: How long the recording is.
    seconds: float
    #: How many exits there are of each kind.
    exits: Counter[str]
    #: For each kind of exit, how many there are at each port or address.
    places: dict[str, Counter[str]]
    conversions: list[ConversionEvent]
    #: What memory and CPU time was in use, in order.
    samples: list[SampleEvent]
    #: How the guest ended; None if the recording was cut off.
    end: EndEvent | None


def summarize(recording: Recording) -> Summary:
    """Count the events of a recording."""
    exits: Counter[str] = Counter()
    places: dict[str, Counter[str]] = {}
    conversions: list[ConversionEvent] = []
    samples: list[SampleEvent] = []
    end: EndEvent | None = None
    seconds = 0.0
    for event in recording.events:
        seconds = max(seconds, event["t"])
        if "exit" in event:
            kind = event["exit"]
            exits[kind] += 1
            if (place := event.get("port", event.get("gpa"))) is not None:
                name = f"port {place:#x}" if "port" in event else f"{place:#x}"
                places.setdefault(kind, Counter())[name] += 1
        elif "convert" in event:
            conversions.append(event)
        elif "memory" in event:
            samples.append(event)
        else:
            end = event
    return Summary(seconds, exits, places, conversions, samples, end)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def text(recording: Recording) -> Iterator[str]:
    """The summary, line by line."""
    about, found = recording.about, summarize(recording)
    ram = sum(part["size"] for part in about["ranges"])
    abi = about.get("private_abi")
    yield (
        f"{about['what']}: {_count(about['cpus'], 'vCPU')}, {ram // _MIB} MiB of RAM"
        + (f", private by {abi}" if abi else "")
    )
    if found.end is not None:
        yield f"after {found.seconds:.3f} s: {found.end['why']} (exit status {found.end['status']})"
    else:
        yield f"after {found.seconds:.3f} s the recording ends, before the end of the guest"
    total = found.exits.total()
    yield ""
    yield f"exits to user space: {total}" + (
        f", {total / found.seconds:.0f}/s" if found.seconds else ""
    )
    for kind, count in found.exits.most_common():
        most = found.places.get(kind, Counter()).most_common(_PLACES_MAX)
        yield f"  {count:>9}  {kind}" + (
            "  (" + ", ".join(f"{place}: {n}" for place, n in most) + ")" if most else ""
        )
    yield ""
    yield f"conversions: {len(found.conversions)}"
    for kind in ("private", "shared"):
        some = [event for event in found.conversions if event["convert"] == kind]
        for by in sorted({event["by"] for event in some}):
            sizes = [event["size"] for event in some if event["by"] == by]
            yield f"  {len(sizes):>9}  to {kind}, by {by}: {format_size(sum(sizes))}"
    yield ""
    yield "memory, at the end" if found.samples else "memory: no sample"
    if found.samples:
        last = found.samples[-1]
        for part, held in zip(about["ranges"], last["memory"], strict=True):
            yield (
                f"  {part['gpa']:#x}…{part['gpa'] + part['size']:#x}  {part['kind']}"
                f" ({part['purpose']}): {format_size(held['resident'])} visible to the"
                f" host, at least {format_size(held['private'])} private"
            )
        most_rss = max(sample["rss"] for sample in found.samples)
        yield (
            f"process: at most {format_size(most_rss)} resident; CPU seconds of each vCPU: "
            + ", ".join(f"{share:.2f}" for share in last["cpu"])
        )
