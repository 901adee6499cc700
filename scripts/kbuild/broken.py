"""The image of `mutate`: the mended series with a switch at each line that can be broken."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .breaks import BREAKS, RMEM, Break
from .errors import Refused, Status, say
from .recipe import Maker, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = "include/linux/kvmpriv_break.h"
HEADER_TEXT = """\
/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _LINUX_KVMPRIV_BREAK_H
#define _LINUX_KVMPRIV_BREAK_H
#include <linux/compiler.h>
#include <linux/delay.h>
extern unsigned int kvmpriv_break;
#define kvmpriv_broken(number) unlikely(READ_ONCE(kvmpriv_break) == (number))
#endif
"""
SELECTOR = """
#include <linux/moduleparam.h>

unsigned int kvmpriv_break __read_mostly;
EXPORT_SYMBOL_GPL(kvmpriv_break);

static const char *const kvmpriv_breaks[] = {{ "none", {names} }};

static int kvmpriv_break_set(const char *name, const struct kernel_param *kp)
{{
	int number = sysfs_match_string(kvmpriv_breaks, name);

	if (number < 0)
		return number;
	kvmpriv_break = number;
	pr_notice("restrictedmem.break: %s\\n", kvmpriv_breaks[number]);
	return 0;
}}

static int kvmpriv_break_get(char *buffer, const struct kernel_param *kp)
{{
	return sysfs_emit(buffer, "%s\\n", kvmpriv_breaks[kvmpriv_break]);
}}

static const struct kernel_param_ops kvmpriv_break_ops = {{
	.set = kvmpriv_break_set,
	.get = kvmpriv_break_get,
}};
module_param_cb(break, &kvmpriv_break_ops, NULL, 0644);
"""


@dataclass
class _Place:
    """A piece of a file's text, and what breaks make of it: number -> replacement."""

    start: int
    end: int
    broken: dict[int, str] = dataclasses.field(default_factory=dict)


def find(source: str, text: str) -> tuple[int, int] | str:
    """Where the marked part of `text` is in `source`, or why it can't be told."""
    before, mark, rest = text.partition("«")
    part, _, after = rest.partition("»") if mark else (text, "", "")
    plain = (before if mark else "") + part + after
    if (count := source.count(plain)) != 1:
        return f"is there {count} times" if count else "is not there"
    start = source.index(plain) + (len(before) if mark else 0)
    return start, start + len(part)


def with_breaks(source: str, places: Sequence[_Place]) -> str:
    """`source` with a switch at each place.  Places may lie within others."""
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


def switch(place: _Place, right: str) -> str:
    if right.rstrip().endswith((";", "}")):
        arms = [f"if (kvmpriv_broken({n})) {{ {new} }} else " for n, new in place.broken.items()]
        return "{ " + "".join(arms) + "{ " + right + " } }"
    choices = [f"kvmpriv_broken({n}) ? ({new}) : " for n, new in place.broken.items()]
    return "(" + "".join(choices) + f"({right}))"


def put_breaks(tree: Path, breaks: Sequence[Break]) -> None:
    """Put `breaks` into a patched tree, numbered from 1; Refused names those that do not apply."""
    sources: dict[str, str] = {}
    places: dict[str, dict[tuple[int, int], _Place]] = {}
    lost = []
    for number, one in enumerate(breaks, 1):
        for edit in one.edits:
            if edit.file not in sources:
                path = tree / edit.file
                sources[edit.file] = path.read_text() if path.exists() else ""
            where = find(sources[edit.file], edit.text)
            if isinstance(where, str):
                lost.append(f"{one.name}: {edit.file}: this {where}:\n{edit.text}")
                continue
            place = places.setdefault(edit.file, {}).setdefault(where, _Place(*where))
            place.broken[number] = edit.broken
    if lost:
        raise Refused(
            Status.PATCH, "breaks that no longer apply to the source:\n" + "\n".join(lost)
        )
    (tree / HEADER).write_text(HEADER_TEXT)
    for file, there in places.items():
        text = with_breaks(sources[file], list(there.values()))
        if file == RMEM:
            text += SELECTOR.format(names=", ".join(f'"{one.name}"' for one in breaks))
        if file.endswith(".h"):  # a comment comes first there, and the guard
            guard = re.compile(r"^#define \w+_H\n", re.MULTILINE)
            text = guard.sub(lambda m: m[0] + "#include <linux/kvmpriv_break.h>\n", text, count=1)
        else:
            first = re.compile(r"^#include <", re.MULTILINE)
            text = first.sub("#include <linux/kvmpriv_break.h>\n#include <", text, count=1)
        (tree / file).write_text(text)


class MutatedPlan(Plan):
    """The mended series, and in it the breaks."""

    @property
    def variant(self) -> str:
        return "restrictedmem-mutate"

    def key(self) -> str:
        digest = hashlib.sha256(super().key().encode())
        digest.update(Path(__file__).read_bytes())
        digest.update(repr([(one.name, one.edits) for one in BREAKS]).encode())
        return digest.hexdigest()[:20]


class _Maker(Maker):
    """Puts the breaks in behind the patches."""

    def patch(self) -> None:
        super().patch()
        put_breaks(self.tree, BREAKS)
        say(f"put in {len(BREAKS)} breaks")


def make(plan: Plan, work: Path, out: Path) -> None:
    """As recipe.make_kernel."""
    _Maker(plan, work, out).make_kernel()
