"""The image of `mutate`: a kernel with all its patches, and with a switch for each break."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from . import breaks, switches
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

static const char *const kvmpriv_breaks[] = {{ "none", {names} }};

static int kvmpriv_break_set(const char *name, const struct kernel_param *kp)
{{
	int number = sysfs_match_string(kvmpriv_breaks, name);

	if (number < 0)
		return number;
	kvmpriv_break = number;
	pr_notice("kvmpriv: break: %s\\n", kvmpriv_breaks[number]);
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


def put_breaks(tree: Path, chosen: Sequence[breaks.Break], selecting: str) -> None:
    """Put `chosen` into a patched tree, numbered from 1; Refused names those that do not apply.

    The file `selecting` gets the parameter `break` of its module.
    """
    sources: dict[str, str] = {}
    places: dict[str, dict[tuple[int, int], switches.Place]] = {}
    lost = []
    for number, one in enumerate(chosen, 1):
        try:
            before = {file: _text(tree, sources, file) for file in one.files}
            after = breaks.apply(one.diff, before)
            for file, text in before.items():
                for change in switches.changes(text, after[file]):
                    key = (change.start, change.end)
                    place = switches.Place(*key, change.statement)
                    place = places.setdefault(file, {}).setdefault(key, place)
                    place.broken[number] = change.broken
        except (Refused, switches.UnplacedError) as error:
            lost.append(f"{one.name}: {error}")
    if lost:
        raise Refused(Status.PATCH, "breaks that do not apply:\n" + "\n".join(lost))
    (tree / HEADER).write_text(HEADER_TEXT)
    for file, there in places.items():
        text = switches.with_switches(sources[file], list(there.values()))
        if file == selecting:
            text += SELECTOR.format(names=", ".join(f'"{one.name}"' for one in chosen))
        (tree / file).write_text(_include(text, is_header=file.endswith(".h")))


def _text(tree: Path, sources: dict[str, str], file: str) -> str:
    if file not in sources:
        path = tree / file
        if not path.exists():
            raise Refused(Status.PATCH, f"there is no {file}")
        sources[file] = path.read_text()
    return sources[file]


def _include(text: str, is_header: bool) -> str:
    """The text with a line that includes HEADER; in a header behind its guard."""
    line = f"#include <{HEADER.removeprefix('include/')}>\n"
    if is_header:
        guard = re.compile(r"^#define \w+_H\n", re.MULTILINE)
        return guard.sub(lambda match: match[0] + line, text, count=1)
    first = re.compile(r"^#include <", re.MULTILINE)
    return first.sub(lambda match: line + match[0], text, count=1)


class MutatedPlan(Plan):
    """A kernel with all its patches, and in it the breaks."""

    @property
    def variant(self) -> str:
        """The name in the cache, and the kernel's release."""
        return f"{self.name}-mutate"

    def breaks(self) -> list[breaks.Break]:
        """The breaks, from the plan's data."""
        return breaks.read(self.kernel, self.data)

    def key(self) -> str:
        """A digest of all that decides the outcome: also of the code that puts in the switches."""
        digest = hashlib.sha256(super().key().encode())
        for file in (__file__, switches.__file__):
            digest.update(Path(file).read_bytes())
        for one in self.breaks():
            digest.update(f"{one.name}\0{one.diff}\0".encode())
        return digest.hexdigest()[:20]


class _Maker(Maker):
    """Puts the breaks in behind the patches."""

    plan: MutatedPlan

    def patch(self) -> None:
        super().patch()
        chosen = self.plan.breaks()
        put_breaks(self.tree, chosen, self.plan.kernel.selecting)
        say(f"put in {len(chosen)} breaks")


def make(plan: Plan, work: Path, out: Path) -> None:
    """As recipe.make_kernel."""
    _Maker(plan, work, out).make_kernel()
