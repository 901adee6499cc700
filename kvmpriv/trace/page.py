"""The page of a recording: one HTML file without any other, its pictures drawn as SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from .record import Recording
from .summary import Summary, summarize, text

__all__ = ["page"]

_WIDTH, _HEIGHT = 860, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 16, 30
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
_BARS = 80  # slices of time
_MIB = 1 << 20
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f4;padding:1rem;overflow-x:auto}svg{width:100%;height:auto}"
    "text{font:12px system-ui,sans-serif}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}pre{background:#262626}"
    "text{fill:#ddd}}"
)


def page(recording: Recording) -> Iterator[str]:
    """The page, piece by piece."""
    found = summarize(recording)
    title = escape(str(recording.about["what"]))
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
    yield f"<style>{_STYLE}</style><h1>{title}</h1>"
    yield f"<pre>{escape(chr(10).join(text(recording)))}</pre>"
    yield "<h2>Memory</h2>"
    yield from _memory(recording, found)
    yield "<h2>Exits to user space</h2>"
    yield from _exits(recording, found)
    yield "<h2>Conversions</h2>"
    yield from _conversions(recording, found)


def _open(seconds: float, label: str) -> Iterator[str]:
    yield f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(label)}</title>'
    base = _TOP + _PLOT_HEIGHT
    yield (
        f'<path d="M{_LEFT} {_TOP}V{base}H{_LEFT + _PLOT_WIDTH}" fill="none" stroke="#888"/>'
        f'<text x="{_LEFT}" y="{base + 20}">0 s</text>'
        f'<text x="{_LEFT + _PLOT_WIDTH}" y="{base + 20}" text-anchor="end">{seconds:.2f} s</text>'
    )


def _scale(most: str) -> str:
    return f'<text x="{_LEFT - 6}" y="{_TOP + 10}" text-anchor="end">{escape(most)}</text>'


def _legend(names: Sequence[str]) -> Iterator[str]:
    for number, name in enumerate(names):
        x, y = _LEFT + _PLOT_WIDTH + 12, _TOP + 18 * number
        colour = _COLOURS[number % len(_COLOURS)]
        yield f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>'
        yield f'<text x="{x + 16}" y="{y + 10}">{escape(name)}</text>'


def _x(at: float, seconds: float) -> float:
    return round(_LEFT + _PLOT_WIDTH * (at / seconds if seconds else 0), 2)


def _memory(recording: Recording, found: Summary) -> Iterator[str]:
    """For each range a line for what the host can read, and one for what is private."""
    if not found.samples:
        yield "<p>There is no sample.</p>"
        return
    lines: dict[str, list[int]] = {}
    for number, part in enumerate(recording.about["ranges"]):
        where = f"{part['gpa']:#x}"
        held = [sample["memory"][number] for sample in found.samples]
        lines[f"{where}: host can read"] = [each["resident"] for each in held]
        if part["kind"] == "private":
            lines[f"{where}: private"] = [each["private"] for each in held]
    most = max(max(values) for values in lines.values()) or 1
    yield from _open(found.seconds, "memory over time")
    yield _scale(f"{most / _MIB:.0f} MiB")
    for number, values in enumerate(lines.values()):
        points = " ".join(
            f"{_x(sample['t'], found.seconds)},{round(_TOP + _PLOT_HEIGHT * (1 - value / most), 2)}"
            for sample, value in zip(found.samples, values, strict=True)
        )
        colour = _COLOURS[number % len(_COLOURS)]
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
    yield from _legend(list(lines))
    yield "</svg>"


def _exits(recording: Recording, found: Summary) -> Iterator[str]:
    """A bar for each slice of time, divided by the kind of exit."""
    if not found.exits:
        yield "<p>There were none.</p>"
        return
    kinds = [kind for kind, _ in found.exits.most_common()]
    slices: list[Counter[str]] = [Counter() for _ in range(_BARS)]
    for event in recording.events:
        if "exit" in event:
            at = int(_BARS * event["t"] / found.seconds) if found.seconds else 0
            slices[max(0, min(at, _BARS - 1))][event["exit"]] += 1
    most = max(each.total() for each in slices)
    yield from _open(found.seconds, "exits over time, by kind")
    yield _scale(str(most))
    width = _PLOT_WIDTH / _BARS
    for number, each in enumerate(slices):
        top = float(_TOP + _PLOT_HEIGHT)
        for which, kind in enumerate(kinds):
            if each[kind]:
                height = _PLOT_HEIGHT * each[kind] / most
                top -= height
                yield (
                    f'<rect x="{_LEFT + number * width:.2f}" y="{top:.2f}" width="{width:.2f}"'
                    f' height="{height:.2f}" fill="{_COLOURS[which % len(_COLOURS)]}"/>'
                )
    yield from _legend(kinds)
    yield "</svg>"


def _conversions(recording: Recording, found: Summary) -> Iterator[str]:
    """A mark for each conversion at its time and address; all RAM is drawn without gaps."""
    if not found.conversions:
        yield "<p>There were none.</p>"
        return
    ranges = recording.about["ranges"]
    everything = sum(part["size"] for part in ranges) or 1
    yield from _open(found.seconds, "conversions over time, by address")
    yield _scale(f"{everything / _MIB:.0f} MiB")
    for event in found.conversions:
        below = 0
        for part in ranges:
            if part["gpa"] <= event["gpa"] < part["gpa"] + part["size"]:
                start = below + event["gpa"] - part["gpa"]
                height = max(1.5, _PLOT_HEIGHT * event["size"] / everything)
                y = _TOP + _PLOT_HEIGHT * (1 - start / everything) - height
                colour = _COLOURS[0 if event["convert"] == "private" else 1]
                yield (
                    f'<rect x="{_x(event["t"], found.seconds)}" y="{y:.2f}" width="2"'
                    f' height="{height:.2f}" fill="{colour}"/>'
                )
            below += part["size"]
    yield from _legend(["to private", "to shared"])
    yield "</svg>"
