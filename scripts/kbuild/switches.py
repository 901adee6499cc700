"""One kernel that holds many breaks: where a patch changes the source, a switch is put in.

A break is an ordinary patch.  Its change is extended to the smallest expression or statement around
it, and that is replaced by both: the broken one, if the kernel's variable `kvmpriv_break` has the
number of the break, and else the right one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: How far from a change its expression or statement may begin and end, in tokens.
REACH = 160

_TOKEN = re.compile(
    r"""(?P<space>\s+|/\*.*?\*/|//[^\n]*)
    |(?P<directive>^[ \t]*\#(?:[^\n\\]|\\.)*)
    |(?P<token>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|\w+
      |->|\+\+|--|<<=|>>=|<<|>>|&&|\|\||[-+*/%&|^=!<>]=|\.\.\.|.)""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}"}, {")", "]", "}"}
#: Macros whose argument is not only a value.
_NOT_VALUES = {"READ_ONCE", "WRITE_ONCE", "sizeof", "offsetof", "offsetofend", "typeof"}
_WORDS = {"return", "goto", "if", "else", "for", "while", "do", "switch", "case", "break"}
_ASSIGNMENTS = {"=", "+=", "-=", "*=", "|=", "&=", "^=", "<<=", ">>=", "/=", "%="}


class Token(NamedTuple):
    """A token of C, or a preprocessor's line, and where it is in the text."""

    text: str
    start: int
    end: int


def tokens(text: str) -> list[Token]:
    """The tokens of a C file, without white space and comments."""
    return [
        Token(match[0], match.start(), match.end())
        for match in _TOKEN.finditer(text)
        if match.lastgroup != "space"
    ]


class Change(NamedTuple):
    """A unit of the old text, and the text that a patch has instead."""

    start: int
    end: int
    broken: str
    statement: bool


class UnplacedError(ValueError):
    """A change for which no expression or statement was found."""


@dataclass
class Place:
    """A piece of a file's text, and what breaks make of it: number -> replacement."""

    start: int
    end: int
    statement: bool
    broken: dict[int, str] = dataclasses.field(default_factory=dict)


class _Source:
    """A text with its tokens, and for each token the bracket that it is in."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokens(text)
        self.words = [token.text for token in self.tokens]
        self.starts = [token.start for token in self.tokens]
        self.inside = list(self._brackets())

    def _brackets(self) -> Iterator[int]:
        stack = [-1]
        for at, word in enumerate(self.words):
            yield stack[-1]
            if word in _OPEN:
                stack.append(at)
            elif word in _CLOSE and len(stack) > 1:
                stack.pop()
        yield stack[-1]

    def before(self, at: int) -> int:
        """The token before tokens[at] that is no preprocessor's line; -1 if there is none."""
        at -= 1
        while at >= 0 and self.words[at].startswith("#"):
            at -= 1
        return at

    def is_condition(self, at: int) -> bool:
        """Whether tokens[at] ends the brackets behind `if` or of a loop, before the body."""
        opened = self.inside[at]
        if self.words[at] != ")" or opened < 1:
            return False
        word = self.words[opened - 1]
        return word in ("if", "for", "while", "switch") or "for_each" in word

    def is_label(self, at: int) -> bool:
        """Whether tokens[at] is the colon of a label, not of an expression."""
        if self.words[at] != ":":
            return False
        first = at
        while first > 0 and self.words[first - 1] not in (";", "{", "}", ":"):
            first -= 1
        return at - first == 1 or self.words[first] in ("case", "default")

    def at(self, position: int) -> int:
        """The first token that begins at or behind a position of the text."""
        return bisect_left(self.starts, position)


def _balanced(words: Sequence[str]) -> bool:
    stack: list[str] = []
    for word in words:
        if word in _OPEN:
            stack.append(_OPEN[word])
        elif word in _CLOSE and (not stack or stack.pop() != word):
            return False
    return not stack


def _top(words: Sequence[str]) -> Iterator[str]:
    """The tokens that are in no bracket of the span; a bracket's content is left out."""
    depth = 0
    for word in words:
        if word in _CLOSE:
            depth -= 1
        if depth == 0:
            yield word
        if word in _OPEN:
            depth += 1


def _is_expression(words: Sequence[str]) -> bool:
    top = list(_top(words))
    if not top or top.count("?") != top.count(":"):
        return False
    return not {*top} & ({",", ";", "{", *_WORDS} | _ASSIGNMENTS)


def _is_one_statement(words: Sequence[str]) -> bool:
    top = [word for word in _top(words) if word in (";", "}")]
    return len(top) == 1 and words[-1] in (";", "}")


def _is_statements(words: Sequence[str]) -> bool:
    """Whether these are whole statements, none of which declares what others may use."""
    if not words:
        return True
    top = list(_top(words))
    begins = (at for at in range(len(top) - 1) if at == 0 or top[at - 1] in (";", "}"))
    declares = any(
        top[at].isidentifier()
        and top[at] not in _WORDS
        and (top[at + 1].isidentifier() or top[at + 1] == "*")
        for at in begins
    )
    return words[-1] in (";", "}") and not declares


def _statement(old: _Source, first: int, last: int, new: Sequence[str]) -> bool:
    """Whether tokens[first:last] of `old` may be replaced by `new` as statements."""
    around = old.inside[first]
    if around < 0 or old.words[around] != "{":
        return False
    at = old.before(first)
    before, words = old.words[at], old.words[first:last]
    if before == "else" or old.is_condition(at):
        return _is_one_statement(words) and _is_one_statement(new)
    if not (before in (";", "{", "}") or old.is_label(at)) or "else" in (
        old.words[first],
        old.words[last],
    ):
        return False
    labels = {"case", "default"} & {*_top(words)}
    return _is_statements(words) and _is_statements(new) and not labels


def _expression(old: _Source, first: int, last: int, new: Sequence[str]) -> bool:
    """Whether tokens[first:last] of `old` may be replaced by `new` as an expression."""
    before, behind, around = old.words[old.before(first)], old.words[last], old.inside[first]
    if around < 0 or behind not in (")", ",", ";", "]"):
        return False
    if before == ";" and old.words[around] != "(":
        return False
    if before not in {"(", ",", ";", "return", "["} | _ASSIGNMENTS:
        return False
    if around > 0 and old.words[around - 1] in _NOT_VALUES:
        return False
    return _is_expression(old.words[first:last]) and _is_expression(new)


class _Run(NamedTuple):
    """Lines that a patch replaces: their offsets in the old text, and the new lines."""

    start: int
    end: int
    lines: str


def _runs(before: str, after: str) -> Iterator[_Run]:
    """The lines that differ."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    shorter = min(len(old), len(new))
    head = next((n for n in range(shorter) if old[n] != new[n]), shorter)
    tail = next((n for n in range(shorter - head) if old[-1 - n] != new[-1 - n]), shorter - head)
    old_middle, new_middle = old[head : len(old) - tail], new[head : len(new) - tail]
    offsets = list(itertools.accumulate(map(len, old_middle), initial=sum(map(len, old[:head]))))
    matcher = difflib.SequenceMatcher(None, old_middle, new_middle, autojunk=False)
    for tag, first, last, new_first, new_last in matcher.get_opcodes():
        if tag != "equal":
            yield _Run(offsets[first], offsets[last], "".join(new_middle[new_first:new_last]))


def _unit(source: _Source, run: _Run) -> Change | None:
    """The smallest unit around what a run of lines changes; None if it changes white space only."""
    first, last = source.at(run.start), source.at(run.end)
    here = tokens(run.lines)
    old, new = source.words[first:last], [token.text for token in here]
    shorter = min(len(old), len(new))
    same = next((n for n in range(shorter) if old[n] != new[n]), shorter)
    if same == len(old) == len(new):
        return None
    shorter -= same
    behind = next((n for n in range(shorter) if old[-1 - n] != new[-1 - n]), shorter)
    a, b = first + same, last - behind
    changed = new[same : len(new) - behind]
    for size in range(2 * REACH):
        for left in range(min(size, REACH, a - 1) + 1):
            start, end = a - left, b + size - left
            if end >= len(source.words) or source.inside[start] != source.inside[end]:
                continue
            span = source.words[start:end]
            other = source.words[start:a] + changed + source.words[b:end]
            if not (_balanced(span) and _balanced(other)) or any(w[0] == "#" for w in span):
                continue
            is_expression = _expression(source, start, end, other)
            if not is_expression and not _statement(source, start, end, other):
                continue
            # The unit in the new text: old text around the run's lines, or a part of these.
            begin = source.tokens[start].start
            finish = source.tokens[end - 1].end if span else begin
            cut = here[start - first].start if start > first and here[start - first :] else 0
            cut_end = here[end - last - 1].end if end < last else len(run.lines)
            broken = source.text[begin : run.start] + run.lines[cut:cut_end]
            broken += source.text[run.end : finish]
            return Change(begin, finish, broken.strip(), not is_expression)
    line = source.text.count("\n", 0, run.start) + 1
    raise UnplacedError(f"line {line}: the change is not within one expression or statement")


@functools.lru_cache(16)
def _source(text: str) -> _Source:
    return _Source(text)


def changes(before: str, after: str) -> list[Change]:
    """What a patch that makes `after` of `before` changes, unit by unit."""
    source = _source(before)
    units = (_unit(source, run) for run in _runs(before, after))
    return [unit for unit in units if unit]


def with_switches(source: str, places: Sequence[Place]) -> str:
    """`source` with a switch at each place.  A place may lie within another."""
    ordered = sorted(places, key=lambda place: (place.start, -place.end))

    def render(start: int, end: int) -> str:
        parts, at = [], start
        while ordered and ordered[0].start < end:
            place = ordered.pop(0)
            assert place.end <= end, f"breaks overlap: {source[place.start : place.end]!r}"
            parts += [source[at : place.start], switch(place, render(place.start, place.end))]
            at = place.end
        return "".join([*parts, source[at:end]])

    return render(0, len(source))


def switch(place: Place, right: str) -> str:
    """Both in one: the right text, and those of the breaks."""
    if place.statement:
        arms = [f"if (kvmpriv_broken({n})) {{ {new} }} else " for n, new in place.broken.items()]
        return "{ " + "".join(arms) + "{ " + right + " } }"
    choices = [f"kvmpriv_broken({n}) ? ({new}) : " for n, new in place.broken.items()]
    return "(" + "".join(choices) + f"({right}))"
