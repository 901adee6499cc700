"""The table of the rules that a suite holds a kernel to: ``support/rules.toml`` of its folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

__all__ = ["ANY", "TABLE", "Rule", "read"]

#: Where the table is in the suite's folder.
TABLE = Path("support", "rules.toml")
#: In the place of ABIs: every one promises the rule.
ANY = "any"


class Rule(NamedTuple):
    """One promise of the kernel.

    `abis` are names of ABIs, or ANY.  `source` says where the promise is made: commits, files of
    the kernel's documentation, Message-IDs.
    """

    id: str
    sentence: str
    abis: tuple[str, ...]
    source: str


def read(folder: Path) -> dict[str, Rule]:
    """The rules of the suite in `folder` by id; empty if that has no table.

    Raises ValueError if an id is in the table twice, and tomllib's error if it is not TOML.
    """
    try:
        groups = tomllib.loads((folder / TABLE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    rules: dict[str, Rule] = {}
    for group in groups.values():
        for name, sentence in group["rules"].items():
            if name in rules:
                raise ValueError(f"{folder / TABLE}: rule {name!r} is there twice")
            rules[name] = Rule(name, sentence, tuple(group["abis"]), group["source"])
    return rules
