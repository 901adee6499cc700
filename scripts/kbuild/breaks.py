"""The breaks of `mutate` and `history`: patches of a kernel's folders, each of which breaks a rule.

A break is a diff that applies on top of the kernel's patches, below a header like that of a mail:

    Rule: v9.slot.copy.recheck
    Tests: test_restrictedmem_slots.py::test_flags_that_change
    Append: kvm.tdp_mmu=0

    What the kernel does wrong, in a sentence.

The file's name without `.patch` is the name of the break.  `Rule` is an id of the suite's table of
rules.  `Tests` names a test below tests/private that should notice the break; there may be several
such lines.  `Append` has words for the kernel's command line; most breaks need none.

`Commit` names the commit and the release that fixed the bug which the diff puts back.  `Unseen` has
the reason why no test can notice the break; it replaces `Tests`, and a bug with this line may have
no diff.  `Undoes` has the number of a patch in fixes/ and the known defect that it ends: with the
break the kernel is as if this patch had been left out.
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
    commit: str = ""
    unseen: str = ""
    undoes: str = ""

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
    commit, unseen, undoes = (message.get(word, "") for word in ("Commit", "Unseen", "Undoes"))
    description = str(message.get_payload()).strip()
    needed = [("Rule:", rule), ("Tests:", tests or unseen), ("diff", mark or (commit and unseen))]
    for what, value in needed:
        if not value:
            raise Refused(Status.PATCH, f"the break {name}.patch has no {what}")
    append, diff = message.get("Append", ""), mark.lstrip("\n") + diff
    unseen = " ".join(unseen.split())
    undoes = " ".join(undoes.split())
    return Break(name, rule, tuple(tests), append, description, diff, commit, unseen, undoes)


def of(folder: str, data: Path = DATA) -> list[Break]:
    """All breaks of a folder, by name."""
    paths = sorted((data / folder).glob("*.patch")) if folder else []
    return [parse(path.stem, path.read_text()) for path in paths]


def read(kernel: Kernel, data: Path = DATA) -> list[Break]:
    """The breaks that the image of a kernel contains: those of its folders that have a diff."""
    return [one for folder in (kernel.breaks, kernel.past) for one in of(folder, data) if one.diff]


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
