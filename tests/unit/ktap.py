"""A strict reader of KTAP (Documentation/dev-tools/ktap.rst)."""

from __future__ import annotations

import re
from typing import NamedTuple


class Ktap(NamedTuple):
    """The contents of a document: name -> (ok, what follows the hash), and name -> its rules.

    The name is the part of the description before " - ", the rules are the part after it.
    """

    plan: int
    tests: dict[str, tuple[bool, str]]
    rules: dict[str, str]
    diagnostics: list[str]
    bailed_out: str = ""


def parse(text: str) -> Ktap:
    """Parse KTAP of one level; every line must be in the format."""
    version, plan, *lines = text.splitlines()
    assert text.endswith("\n")
    assert version == "KTAP version 1"
    planned = re.fullmatch(r"1\.\.(\d+)", plan)
    assert planned
    tests: dict[str, tuple[bool, str]] = {}
    rules: dict[str, str] = {}
    diagnostics, bailed_out = [], ""
    for line in lines:
        if line.startswith("#"):
            assert line == "#" or line.startswith("# ")
            diagnostics.append(line[2:])
        elif line.startswith("Bail out! "):
            bailed_out = line.removeprefix("Bail out! ")
        else:
            found = re.fullmatch(r"(ok|not ok) (\d+) ([^#]+?)(?: # ([^#]+))?", line)
            assert found, line
            assert int(found[2]) == len(tests) + 1
            name, _, rules_ = found[3].partition(" - ")
            assert name not in tests
            tests[name], rules[name] = (found[1] == "ok", found[4] or ""), rules_
    if not bailed_out:
        assert len(tests) == int(planned[1])
    return Ktap(int(planned[1]), tests, rules, diagnostics, bailed_out)
