"""The page of a recording: one HTML file that needs no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import pairwise

from .chart import WIDTH, End, Mark, Times, Track, area, bars, chart, line, thin
from .devices import Devices
from .record import ConversionEvent, RangeAbout, Recording, SampleEvent, UseAbout
from .scale import BYTES, CPUS, LEAST, PER_SECOND, axis, format_bytes, format_seconds
from .summary import Summary, counted, headline, summarize, text

__all__ = ["page"]

_BARS = 100  # slices of time
_ROWS_MAX = 8  # devices with a row of their own
_SERIES_MAX = 5
_CELLS = (250, 160)  # conversions: slices of time and of the addresses
_MEMORY_HEIGHT, _ROW_HEIGHT, _LANE_HEIGHT, _COST_HEIGHT = 240, 44, 40, 120


def page(recording: Recording) -> Iterator[str]:
    """The page, piece by piece."""
    found = summarize(recording)
    what = escape(recording.about["what"])
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width,initial-scale=1">'
    yield f"<title>{what} – kvmpriv trace</title><style>{style}</style></head><body>"
    yield from _head(recording, found)
    times = Times(found.seconds, _marks(recording, found))
    for title, note, nothing, pictures in (
        ("Memory", "What the host can read, and what only the guest can.", "No samples.", _memory),
        (
            "Conversions",
            "Between private and shared memory, at the guest's request.",
            "The guest converted no memory.",
            _conversions,
        ),
        (
            "Exits by device",
            "What the guest asked the process for, and how often.",
            "None.",
            _exits,
        ),
        ("CPU time", "How many CPUs of the host the process kept busy.", "No samples.", _cpu),
        (
            "Resident memory",
            "The process's own, without the guest's private memory.",
            "No samples.",
            _resident,
        ),
    ):
        parts = list(pictures(recording, found, times))
        yield f'<section><h2>{title}</h2><p class="note">{note if parts else nothing}</p>'
        yield from parts
        yield "</section>"
    yield "<details><summary>The summary as text</summary>"
    yield f"<pre>{escape(chr(10).join(text(recording)))}</pre></details></body></html>\n"


# -- what is above the pictures ------------------------------------------------------------------


def _head(recording: Recording, found: Summary) -> Iterator[str]:
    about, end = recording.about, found.end
    what, seconds = escape(about["what"]), format_seconds(found.seconds)
    yield f'<header><p class="what">{what}</p><h1>{escape(headline(recording, found))}</h1>'
    if end is not None:
        why = escape(end["why"].split("\n", 1)[0])
        yield f'<p class="end">After {seconds}: {why} (exit status {end["status"]}).</p>'
    else:
        yield f'<p class="end">After {seconds} the recording ends, before the end of the guest.</p>'
    yield '<dl class="facts">'
    for name, value, more in _facts(found):
        yield f"<div><dt>{name}</dt><dd>{value}<small>{escape(more)}</small></dd></div>"
    yield '</dl><dl class="about">'
    if date := about.get("date"):
        yield f"<dt>Recorded</dt><dd>{escape(date.replace('T', ' ').replace('Z', ' UTC'))}</dd>"
    yield f"<dt>Machine</dt><dd>{counted(about['cpus'], 'vCPU')}</dd>"
    abi = about.get("private_abi")
    for kind, some in _by_kind(about["ranges"]).items():
        size = format_bytes(sum(part["size"] for part in some))
        by = f" ({abi})" if abi and kind == "private" else ""
        purposes = ", ".join(dict.fromkeys(part["purpose"] for part in some))
        yield f"<dt>{escape(kind.capitalize())} memory</dt>"
        yield f"<dd>{size}{escape(by)}: {escape(purposes)}</dd>"
    if cmdline := about.get("cmdline"):
        yield f"<dt>Command line</dt><dd><code>{escape(cmdline)}</code></dd>"
    yield "</dl></header>"


def _facts(found: Summary) -> Iterator[tuple[str, str, str]]:
    """Name, value, and what is to be said about it, in plain text."""
    yield "Ran for", format_seconds(found.seconds), ""
    total = found.exits.total()
    rate = f"{total / found.seconds:.3g} per second" if found.seconds else ""
    yield "Exits to user space", f"{total:,}", rate
    size = sum(event["size"] for event in found.conversions)
    yield "Conversions", f"{len(found.conversions):,}", format_bytes(size) if size else ""
    if found.samples:
        last = found.samples[-1]
        others = f"and {format_seconds(last['others'])} elsewhere" if "others" in last else ""
        yield "CPU time of vCPUs", format_seconds(sum(last["cpu"])), others
        most = max(sample["rss"] for sample in found.samples)
        yield "Resident memory", format_bytes(most), "of the process, at most"


def _by_kind(ranges: Iterable[RangeAbout]) -> dict[str, list[RangeAbout]]:
    found: dict[str, list[RangeAbout]] = {}
    for part in ranges:
        found.setdefault(part["kind"], []).append(part)
    return found


def _marks(recording: Recording, found: Summary) -> list[Mark]:
    marks = [Mark(event["t"], event["mark"]) for event in found.marks]
    devices = Devices(recording.about)
    for event in recording.events:
        if "exit" in event and devices.place(event).startswith(("console", "COM1")):
            marks.append(Mark(event["t"], "console is used"))
            break
    if found.end is not None:
        marks.append(Mark(found.end["t"], f"end: {found.end['end']}"))
    return marks


# -- pictures ------------------------------------------------------------------------------------


def _memory(recording: Recording, found: Summary, times: Times) -> Iterator[str]:
    """For each purpose a line for what the host can read, and an area for what is private."""
    if not found.samples:
        return
    series: dict[tuple[str, str], list[int]] = {}
    for number, part in enumerate(recording.about["ranges"]):
        uses = [sample["memory"][number] for sample in found.samples]
        _add(series, "host-readable", part["purpose"], uses, lambda use: use["resident"])
        if part["kind"] == "private":
            _add(series, "private", part["purpose"], uses, lambda use: use["private"])
    chosen = sorted(series, key=lambda key: -max(series[key]))[:_SERIES_MAX]
    most = max((max(series[key]) for key in chosen), default=0)
    track = Track(_MEMORY_HEIGHT, "memory over time", (), axis(most, BYTES, 5))
    shapes: list[str] = []
    ends, dashes = [], 0
    for what, purpose in chosen:
        values = series[what, purpose]
        points = _points(times, found.samples, [track.y(value) for value in values])
        kind = "private"
        if what == "private":
            shapes.insert(0, area("private", points, track.height))
        else:
            kind = f"host dash{dashes}"
            dashes += 1
        shapes.append(line(kind, points))
        ends.append(End(points[-1][1], kind, f"{format_bytes(values[-1])} {what}", purpose))
    yield from chart(
        times,
        [*_lanes(found.conversions, times), track._replace(shapes=shapes, ends=ends)],
        named_marks=True,
    )
    if any(part["kind"] == "private" for part in recording.about["ranges"]):
        yield (
            '<p class="note">Private is at least as much as shown: KVM reports how much memory it'
            " has mapped into the guest.</p>"
        )


def _add(
    series: dict[tuple[str, str], list[int]],
    what: str,
    purpose: str,
    uses: Sequence[UseAbout],
    value: Callable[[UseAbout], int],
) -> None:
    """Add a range's values to those of the ranges with the same purpose."""
    before = series.get((what, purpose), [0] * len(uses))
    series[what, purpose] = [old + value(use) for old, use in zip(before, uses, strict=True)]


def _points(
    times: Times, samples: Sequence[SampleEvent], tops: Sequence[float]
) -> list[tuple[float, float]]:
    return thin([(times.x(sample["t"]), top) for sample, top in zip(samples, tops, strict=True)])


def _lanes(conversions: Sequence[ConversionEvent], times: Times) -> Iterator[Track]:
    """Marks for the conversions, those to private memory above those to shared memory."""
    if not conversions:
        return
    half = _LANE_HEIGHT // 2
    shapes = []
    for kind, colour, top in (("private", "private", 3), ("shared", "host", half + 3)):
        at = sorted({round(times.x(e["t"])) for e in conversions if e["convert"] == kind})
        path = "".join(f"M{x} {top}v{half - 6}" for x in at)
        if path:
            shapes.append(f'<path class="line {colour}" d="{path}"/>')
    sides = [(half / 2, "to private"), (half * 1.5, "to shared")]
    yield Track(_LANE_HEIGHT, "conversions over time", shapes, sides=sides)


def _conversions(recording: Recording, found: Summary, times: Times) -> Iterator[str]:
    """A mark for each conversion at its time and address; the ranges of RAM follow each other."""
    if not found.conversions:
        return
    ranges = recording.about["ranges"]
    everything = sum(part["size"] for part in ranges) or 1
    height = _CELLS[1]
    # At each place that a mark can have, the last conversion counts.
    cells: dict[tuple[int, int], tuple[float, str]] = {}
    shapes, ends = [f'<path class="grid" d="M0 {height}H{WIDTH}"/>'], []
    below = 0
    for part in ranges:
        for event in found.conversions:
            if part["gpa"] <= event["gpa"] < part["gpa"] + part["size"]:
                start = (below + event["gpa"] - part["gpa"]) / everything
                cell = int(times.x(event["t"]) / WIDTH * (_CELLS[0] - 1)), int(height * start)
                size = max(height * event["size"] / everything, cells.get(cell, (3.0, ""))[0])
                cells[cell] = (size, event["convert"])
        middle = height * (1 - (below + part["size"] / 2) / everything)
        ends.append(
            End(middle, "none", f"{format_bytes(part['size'])} {part['kind']}", part["purpose"])
        )
        below += part["size"]
        shapes.append(f'<path class="grid" d="M0 {height * (1 - below / everything):g}H{WIDTH}"/>')
    width = WIDTH / _CELLS[0]
    for (column, row), (size, kind) in sorted(cells.items()):
        top = max(0.0, height - row - size)
        shapes.append(
            f'<rect class="to-{kind}" x="{column * width:g}" y="{top:.1f}" width="{width:g}"'
            f' height="{min(size, height):.1f}"/>'
        )
    scale = axis(everything, BYTES, 4, round_up=False)
    ends = ends[:_SERIES_MAX]
    yield from chart(times, [Track(height, "conversions by address", shapes, scale, ends)])
    yield '<p class="note"><svg class="key" viewBox="0 0 10 10"><rect class="to-private" '
    yield 'width="10" height="10"/></svg> to private <svg class="key" viewBox="0 0 10 10">'
    yield '<rect class="to-shared" x="1" y="1" width="8" height="8"/></svg> to shared; '
    yield "addresses count within the guest's RAM.</p>"


def _exits(recording: Recording, found: Summary, times: Times) -> Iterator[str]:
    """A row for each device, with a bar for each slice of time; all have the same scale."""
    if not found.exits:
        return
    devices = Devices(recording.about)
    totals: Counter[str] = Counter()
    slices: dict[str, list[int]] = {}
    for event in recording.events:
        if "exit" in event:
            name = devices.label(event)
            totals[name] += 1
            at = min(int(times.x(event["t"]) / WIDTH * _BARS), _BARS - 1)
            slices.setdefault(name, [0] * _BARS)[at] += 1
    names = [name for name, _ in totals.most_common()]
    if len(names) > _ROWS_MAX:
        rest = names[_ROWS_MAX - 1 :]
        names = names[: _ROWS_MAX - 1]
        other = f"{len(rest)} others"
        names.append(other)
        slices[other] = [sum(some) for some in zip(*(slices[name] for name in rest), strict=True)]
        totals[other] = sum(totals[name] for name in rest)
    each = found.seconds / _BARS if found.seconds >= LEAST else 1.0
    scale = axis(max(max(slices[name]) for name in names) / each, PER_SECOND, 1)
    tracks = []
    for name in names:
        about = f"exits for {name} over time"
        head = (name, counted(totals[name], "exit"))
        track = Track(_ROW_HEIGHT, about, (), scale, head=head)
        tops = [track.y(count / each) for count in slices[name]]
        tracks.append(track._replace(shapes=list(bars("bar", tops, _ROW_HEIGHT))))
    yield from chart(times, tracks)


def _cpu(recording: Recording, found: Summary, times: Times) -> Iterator[str]:
    """How many CPUs were busy between two samples: with vCPUs, and with the other threads."""
    if len(found.samples) < 2 or found.samples[-1]["t"] <= found.samples[0]["t"]:
        return
    # CPU time is counted in ticks: short steps are noise.
    every = -(-len(found.samples) // _BARS)
    chosen = range((len(found.samples) - 1) % every, len(found.samples), every)
    some = [found.samples[0], *(found.samples[number] for number in chosen[1:])]
    # So is the last step, from the last regular sample to the guest's end.
    if len(some) > 2 and some[-1]["t"] - some[-2]["t"] < (some[-2]["t"] - some[-3]["t"]) / 2:
        del some[-2]
    used: list[tuple[str, str, list[float]]] = [
        ("work", "vCPUs", [sum(sample["cpu"]) for sample in some]),
        ("other dash1", "other threads", [sample.get("others", 0.0) for sample in some]),
    ]
    rates: list[tuple[float, float, list[float]]] = []
    for number, (old, new) in enumerate(pairwise(some), 1):
        if (passed := new["t"] - old["t"]) > 0:
            spent = [max(0.0, times_[number] - times_[number - 1]) for *_, times_ in used]
            rates.append((old["t"], new["t"], [one / passed for one in spent]))
    scale = axis(max(max(rate) for *_, rate in rates), CPUS, 4)
    track = Track(_COST_HEIGHT, "CPU time over time", (), scale)
    shapes, ends = [], []
    for number, (kind, name, spent) in enumerate(used):
        points = [
            (times.x(at), track.y(rate[number]))
            for start, stop, rate in rates
            for at in (start, stop)
        ]
        if number == 0:
            shapes.append(area(kind, points, track.height))
        shapes.append(line(kind, points))
        total = format_seconds(max(0.0, spent[-1] - spent[0]))
        ends.append(End(points[-1][1], kind, total, name))
    yield from chart(times, [track._replace(shapes=shapes, ends=ends)])


def _resident(recording: Recording, found: Summary, times: Times) -> Iterator[str]:
    """The process's resident memory, and the part of it that other processes share."""
    if not found.samples:
        return
    all_of_it = [sample["rss"] for sample in found.samples]
    shared = [sample.get("shared", 0) for sample in found.samples]
    track = Track(_COST_HEIGHT, "resident memory over time", (), axis(max(all_of_it), BYTES, 4))
    shapes, ends = [], []
    for kind, values, name in (
        ("work", all_of_it, "in all"),
        ("other dash1", shared, "of it shared with others"),
    ):
        points = _points(times, found.samples, [track.y(value) for value in values])
        if kind == "work":
            shapes.append(area(kind, points, track.height))
        shapes.append(line(kind, points))
        ends.append(End(points[-1][1], kind, format_bytes(values[-1]), name))
    yield from chart(times, [track._replace(shapes=shapes, ends=ends)])
