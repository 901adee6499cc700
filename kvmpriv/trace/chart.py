"""Pictures of values over time, as HTML whose shapes are SVG.

Only shapes are SVG, which is stretched to the width that there is.  All text is HTML at places in
percent, so that it has the same size on every screen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from .scale import SECONDS, Axis, axis

__all__ = ["End", "Mark", "Times", "Track", "area", "bars", "chart", "line", "thin"]

#: The width of a drawing, in units of its own; a unit of its height is a pixel.
WIDTH = 1000
#: The distance between the labels at the ends of lines, and between those of marks, in pixels.
_END_STEP, _MARK_STEP = 38, 18
_MARKS_MAX = 5
_POINTS_MAX = 300


class Mark(NamedTuple):
    """A moment: a line through all pictures."""

    at: float
    text: str


class End(NamedTuple):
    """The label of a line, beside its last point."""

    #: The last point's distance from the top, in pixels.
    top: float
    #: The line's class in the style sheet.
    kind: str
    value: str
    text: str


class Times:
    """The time axis that the pictures of a page have in common."""

    def __init__(self, seconds: float, marks: Sequence[Mark]) -> None:
        self.axis: Axis = axis(seconds, SECONDS, 5, round_up=False)
        self.marks: list[Mark] = sorted(marks)[:_MARKS_MAX]

    def x(self, at: float) -> float:
        """Where a time is in a drawing."""
        return round(WIDTH * self.axis.part(at), 2)


class Track(NamedTuple):
    """One drawing."""

    height: int
    #: What it shows, for a reader without pictures.
    about: str
    shapes: Iterable[str]
    scale: Axis | None = None
    ends: Sequence[End] = ()
    #: Two texts above it, at the left and at the right.
    head: tuple[str, str] | None = None
    #: Texts beside it, instead of a scale's: each one's middle, in pixels from the top.
    sides: Sequence[tuple[float, str]] = ()

    def y(self, value: float) -> float:
        """Where a value is in the drawing, in pixels from the top."""
        assert self.scale is not None
        return round(self.height * (1 - self.scale.part(value)), 2)


def _at(part: float) -> str:
    return f"{100 * part:.2f}%"


def _named(tag: str, text: str, attributes: str = "") -> str:
    """Text of one line; the style sheet shortens what is too long, and a pointer shows it all."""
    return f'<{tag} {attributes}title="{escape(text)}">{escape(text)}</{tag}>'


# -- shapes --------------------------------------------------------------------------------------


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Fewer points, if there are many: of each stretch of time the least and the largest value."""
    if len(points) <= _POINTS_MAX:
        return list(points)
    size = -(-2 * len(points) // _POINTS_MAX)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        some = range(start, min(start + size, len(points)))
        kept.add(min(some, key=lambda n: points[n][1]))
        kept.add(max(some, key=lambda n: points[n][1]))
    return [points[n] for n in sorted(kept)]


def line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    """A line through the points of a drawing."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="line {kind}" points="{path}"/>'


def area(kind: str, points: Sequence[tuple[float, float]], height: float) -> str:
    """The area below a line."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    first, last = points[0][0], points[-1][0]
    return f'<polygon class="area {kind}" points="{first:g},{height} {path} {last:g},{height}"/>'


def bars(kind: str, tops: Sequence[float], height: float) -> Iterator[str]:
    """A bar for each slice of time, from its top to the bottom; one that is not empty is seen."""
    width = WIDTH / len(tops)
    for number, top in enumerate(tops):
        if top < height:
            size = max(1.5, height - top)
            yield (
                f'<rect class="{kind}" x="{number * width:.2f}" y="{height - size:.2f}"'
                f' width="{width * 0.85:.2f}" height="{size:.2f}"/>'
            )


# -- a picture -----------------------------------------------------------------------------------


def chart(times: Times, tracks: Sequence[Track], *, named_marks: bool = False) -> Iterator[str]:
    """Drawings one below the other, over one time axis; `named_marks` says what the marks are.

    Labels at ends of lines are for the last one: on a narrow screen they are below the axis.
    """
    yield '<div class="chart">'
    if named_marks and times.marks:
        yield from _marks(times)
    for number, track in enumerate(tracks, 1):
        lane = " lane" if track.sides else ""
        yield f'<div class="track{lane}" style="--h:{track.height}px">'
        yield from _track(times, track)
        if number == len(tracks):
            yield '<div class="x">'
            for value, text in times.axis.ticks:
                yield f'<span style="left:{_at(times.axis.part(value))}">{text}</span>'
            yield "</div>"
        yield "</div>"
    yield "</div>"


def _marks(times: Times) -> Iterator[str]:
    """The marks' texts, a row for each.

    A text of the left half is right of its line, and above those of later marks; one of the right
    half is left of its line, and above those of earlier marks: so no line crosses a text.
    """
    parts = [(times.axis.part(mark.at), mark.text) for mark in times.marks]
    left = [each for each in parts if each[0] <= 0.5]
    right = [each for each in parts if each[0] > 0.5][::-1]
    rows = [*left, *right]
    yield f'<div class="marks" style="height:{_MARK_STEP * len(rows)}px">'
    for row, (part, text) in enumerate(rows):
        side, place = ("left", part) if part <= 0.5 else ("right", 1 - part)
        top = _MARK_STEP * row
        yield (
            f'<i style="left:{_at(part)};top:{top}px"></i>'
            + _named("span", text, f'style="{side}:{_at(place)};top:{top}px" ')
        )
    yield "</div>"


def _track(times: Times, track: Track) -> Iterator[str]:
    if track.head is not None:
        left, right = track.head
        yield f'<div class="head">{_named("span", left)}<span>{escape(right)}</span></div>'
    yield '<div class="y">'
    sides = track.sides or [(track.y(value), text) for value, text in _ticks(track)]
    for top, text in sides:
        yield f'<span style="top:{top:g}px">{escape(text)}</span>'
    yield (
        f'</div><div class="plot"><svg viewBox="0 0 {WIDTH} {track.height}"'
        f' preserveAspectRatio="none" role="img"><title>{escape(track.about)}</title>'
    )
    for value, _ in _ticks(track):
        yield f'<path class="grid" d="M0 {track.y(value):g}H{WIDTH}"/>'
    yield from track.shapes
    yield "</svg>"
    for mark in times.marks:
        place = f"left:{_at(times.axis.part(mark.at))}"
        yield f'<i style="{place}" title="{escape(mark.text)}"></i>'
    yield "</div>"
    if track.ends:
        yield '<ul class="ends">'
        for top, end in _spread(track):
            yield (
                f'<li style="--y:{top:g}px"><svg viewBox="0 0 18 10"><path class="line {end.kind}"'
                f' d="M0 5H18"/></svg>{_named("b", end.value)} {_named("span", end.text)}</li>'
            )
        yield "</ul>"


def _ticks(track: Track) -> Sequence[tuple[float, str]]:
    return track.scale.ticks if track.scale is not None else ()


def _spread(track: Track) -> list[tuple[float, End]]:
    """The labels with their places: as near to the lines' ends as they fit."""
    ends = sorted(track.ends)
    places: list[float] = []
    for end in ends:
        least = places[-1] + _END_STEP if places else _END_STEP / 2
        places.append(max(end.top, least))
    # From the bottom upwards, those that would be below the drawing move up.
    most = track.height - _END_STEP / 2
    for number in reversed(range(len(places))):
        places[number] = min(places[number], most)
        most = places[number] - _END_STEP
    return list(zip(places, ends, strict=True))
