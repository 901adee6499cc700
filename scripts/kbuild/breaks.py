"""The breaks of `mutate`: patches of a kernel's folder of breaks, each of which breaks a rule.

A break is a diff that applies on top of the kernel's patches, below a header like that of a mail:

    Rule: v9.slot.copy.recheck
    Tests: test_restrictedmem_slots.py::test_flags_that_change
    Append: kvm.tdp_mmu=0

    What the kernel does wrong, in a sentence.

The file's name without `.patch` is the name of the break.  `Rule` is an id of the suite's table of
rules.  `Tests` names a test below tests/private that should notice the break; there may be several
such lines.  `Append` has words for the kernel's command line; most breaks need none.
"""

from __future__ import annotations

import email
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from .errors import Refused, Status
from .kernels import Kernel
from .paths import DATA


class Break(NamedTuple):
    """One break: its name, the rule, the tests that should notice it, and the diff."""

    name: str
    rule: str
    tests: tuple[str, ...]
    append: str
    description: str
    diff: str

    @property
    def files(self) -> list[str]:
        """The files that the diff changes, as paths in the kernel's tree."""
        marks = (line for line in self.diff.splitlines() if line.startswith("+++ b/"))
        return [line.removeprefix("+++ b/").split("\t")[0] for line in marks]


def parse(name: str, text: str) -> Break:
    """A break from the text of its file; Refused, if the header lacks something."""
    head, mark, diff = text.partition("\n--- a/")
    message = email.message_from_string(head)
    rule, tests = message["Rule"], message.get_all("Tests", [])
    description = str(message.get_payload()).strip()
    for what, value in (("Rule:", rule), ("Tests:", tests), ("diff", mark)):
        if not value:
            raise Refused(Status.PATCH, f"the break {name}.patch has no {what}")
    append = message.get("Append", "")
    return Break(name, rule, tuple(tests), append, description, mark.lstrip("\n") + diff)


def read(kernel: Kernel, data: Path = DATA) -> list[Break]:
    """All breaks of a kernel, by name."""
    paths = sorted((data / kernel.breaks).glob("*.patch")) if kernel.breaks else []
    return [parse(path.stem, path.read_text()) for path in paths]


def apply(diff: str, sources: dict[str, str]) -> dict[str, str]:
    """The files of `sources` (path -> text) after a diff; Refused if it does not apply."""
    with tempfile.TemporaryDirectory() as scratch:
        for file, text in sources.items():
            path = Path(scratch, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        # No fuzz, as for the series.
        done = subprocess.run(
            ["patch", "-p1", "-N", "-F0", "--no-backup-if-mismatch"],
            cwd=scratch,
            input=diff,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            raise Refused(Status.PATCH, done.stdout.strip())
        return {file: Path(scratch, file).read_text() for file in sources}
