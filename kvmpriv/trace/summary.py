"""What a recording comes to: counted, and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..terminal import format_size
from .record import Recording

__all__ = ["Summary", "exit_kind", "summarize", "text"]

_MIB = 1 << 20
_MOST = 5  # of the places that exits come from


class Summary(NamedTuple):
    """A recording, counted; sizes in bytes, times in seconds."""

    seconds: float
    exits: Counter[str]
    places: dict[str, Counter[str]]  # an exit's kind -> its ports or addresses
    conversions: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    end: dict[str, Any] | None


def exit_kind(event: dict[str, Any]) -> str:
    """What an exit is counted as."""
    return str(event["exit"])


def summarize(recording: Recording) -> Summary:
    """Count what is in a recording."""
    exits: Counter[str] = Counter()
    places: dict[str, Counter[str]] = {}
    conversions, samples = [], []
    end = None
    seconds = 0.0
    for event in recording.events:
        seconds = max(seconds, event["t"])
        if "exit" in event:
            kind = exit_kind(event)
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


def text(recording: Recording) -> Iterator[str]:
    """The summary, line by line."""
    about, found = recording.about, summarize(recording)
    ram = sum(part["size"] for part in about["ranges"])
    abi = about.get("private_abi")
    yield (
        f"{about['what']}: {about['cpus']} vCPUs, {ram // _MIB} MiB of RAM"
        + (f", private by {abi}" if abi else "")
    )
    if found.end is not None:
        yield f"after {found.seconds:.3f} s: {found.end['why']} (exit status {found.end['status']})"
    else:
        yield f"after {found.seconds:.3f} s the recording ends, before the guest"
    total = found.exits.total()
    yield ""
    yield f"exits to user space: {total}" + (
        f", {total / found.seconds:.0f}/s" if found.seconds else ""
    )
    for kind, count in found.exits.most_common():
        most = found.places.get(kind, Counter()).most_common(_MOST)
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
    yield "memory, at the end" if found.samples else "memory: never looked at"
    if found.samples:
        last = found.samples[-1]
        for part, held in zip(about["ranges"], last["memory"], strict=True):
            yield (
                f"  {part['gpa']:#x}…{part['gpa'] + part['size']:#x}  {part['kind']}"
                f" ({part['purpose']}): {format_size(held['resident'])} in the host's sight,"
                f" at least {format_size(held['private'])} private"
            )
        most_rss = max(sample["rss"] for sample in found.samples)
        yield (
            f"process: at most {format_size(most_rss)} resident; CPU seconds of each vCPU: "
            + ", ".join(f"{share:.2f}" for share in last["cpu"])
        )
