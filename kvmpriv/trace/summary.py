"""The summary of a recording: its events counted, and shown as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ..terminal import format_size
from .devices import Devices
from .record import ConversionEvent, EndEvent, MarkEvent, Recording, SampleEvent
from .scale import format_bytes

__all__ = ["Summary", "counted", "document", "headline", "summarize", "text"]

SCHEMA_VERSION = 1
_PLACES_MAX = 5  # how many devices to list for each kind of exit


class Summary(NamedTuple):
    """The events of a recording, counted and sorted by kind."""

    #: How long the recording is.
    seconds: float
    #: How many exits there are of each kind.
    exits: Counter[str]
    #: For each kind of exit, how many there are for each device, or port or address without one.
    places: dict[str, Counter[str]]
    conversions: list[ConversionEvent]
    #: What memory and CPU time was in use, in order.
    samples: list[SampleEvent]
    marks: list[MarkEvent]
    #: How the guest ended; None if the recording was cut off.
    end: EndEvent | None


def summarize(recording: Recording) -> Summary:
    """Count the events of a recording."""
    devices = Devices(recording.about)
    exits: Counter[str] = Counter()
    places: dict[str, Counter[str]] = {}
    conversions: list[ConversionEvent] = []
    samples: list[SampleEvent] = []
    marks: list[MarkEvent] = []
    end: EndEvent | None = None
    seconds = 0.0
    for event in recording.events:
        seconds = max(seconds, event["t"])
        if "exit" in event:
            kind = event["exit"]
            exits[kind] += 1
            if place := devices.place(event):
                places.setdefault(kind, Counter())[place] += 1
        elif "convert" in event:
            conversions.append(event)
        elif "memory" in event:
            samples.append(event)
        elif "mark" in event:
            marks.append(event)
        else:
            end = event
    return Summary(seconds, exits, places, conversions, samples, marks, end)


def counted(number: int, what: str) -> str:
    """A number of things, with the plural where there is not one."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def headline(recording: Recording, found: Summary) -> str:
    """What the recording shows, in a sentence: how much of the memory the host could read."""
    ranges = recording.about["ranges"]

    def most(field: str, kind: str) -> int:
        sums = (
            sum(
                use["private"] if field == "private" else use["resident"]
                for part, use in zip(ranges, sample["memory"], strict=True)
                if part["kind"] == kind
            )
            for sample in found.samples
        )
        return max(sums, default=0)

    if not found.samples:
        return "This recording has no samples of the guest's memory"
    if all(part["kind"] != "private" for part in ranges):
        used = format_bytes(most("resident", "shared"))
        return f"The host could read all {used} that the guest used"
    private, readable = most("private", "private"), most("resident", "private")
    if not private:
        return "The guest used no private memory"
    if not readable:
        return f"The host could read 0 of the {format_bytes(private)} that the guest kept private"
    return (
        f"The host could read {format_bytes(readable)} where the guest kept"
        f" {format_bytes(private)} private"
    )


def document(recording: Recording) -> dict[str, object]:
    """The summary for ``kvmpriv trace --json``, as ``schema.json`` describes it."""
    about, found = recording.about, summarize(recording)
    last = found.samples[-1] if found.samples else None
    converted = Counter((event["convert"], event["by"]) for event in found.conversions)
    sizes: Counter[tuple[str, str]] = Counter()
    for event in found.conversions:
        sizes[event["convert"], event["by"]] += event["size"]
    return {
        "schema_version": SCHEMA_VERSION,
        "what": about["what"],
        "cpus": about["cpus"],
        "private_abi": about.get("private_abi"),
        "cmdline": about.get("cmdline"),
        "date": about.get("date"),
        "seconds": found.seconds,
        "cut_off": recording.cut_off,
        "end": found.end,
        "marks": found.marks,
        "exits": [
            {"exit": kind, "count": count, "places": dict(found.places.get(kind, {}))}
            for kind, count in found.exits.most_common()
        ],
        "conversions": [
            {"to": to, "by": by, "count": count, "size": sizes[to, by]}
            for (to, by), count in sorted(converted.items())
        ],
        "memory": [
            {**part, **(last["memory"][number] if last else {"resident": None, "private": None})}
            for number, part in enumerate(about["ranges"])
        ],
        "process": {
            "rss_max": max((sample["rss"] for sample in found.samples), default=None),
            "cpu": last["cpu"] if last else None,
            "others": last.get("others") if last else None,
        },
    }


def text(recording: Recording) -> Iterator[str]:
    """The summary, line by line."""
    about, found = recording.about, summarize(recording)
    ram = sum(part["size"] for part in about["ranges"])
    abi = about.get("private_abi")
    yield (
        f"{about['what']}: {counted(about['cpus'], 'vCPU')}, {format_size(ram)} of RAM"
        + (f", private by {abi}" if abi else "")
    )
    if found.end is not None:
        yield f"after {found.seconds:.3f} s: {found.end['why']} (exit status {found.end['status']})"
    else:
        yield f"after {found.seconds:.3f} s the recording ends, before the end of the guest"
    if found.samples:
        yield headline(recording, found)
    for mark in found.marks:
        yield f"at {mark['t']:.3f} s: {mark['mark']}"
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
