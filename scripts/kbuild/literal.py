"""Hold v9 as it was posted, without the mending patches, to the suite: known defects, all of them.

Without arguments the suite runs: 0 if each defect was found that can be looked for without harm,
and every failure was named as one.  With --dangerous (and a name) each of the others is looked for
alone, in a VM of its own, and what became of that is printed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NamedTuple

from .paths import ROOT

PYTHON = ".venv/bin/python"
KERNEL = ["restrictedmem", "--literal"]
NAMED = re.compile(r"known defect: ([a-z0-9-]+):")
TESTS_FAILED = 1  # pytest's exit code

LIST = """\
from private.support.defects import DEFECTS
for one in DEFECTS.values():
    print(one.name, int(one.dangerous), int(not one.dangerous and not one.needs), sep="\\t")
"""


class Defect(NamedTuple):
    """A known defect of v9: can the kernel crash, and does the plain suite find it."""

    name: str
    dangerous: bool
    expected: bool


def defects() -> list[Defect]:
    """The suite's list of known defects."""
    # Asked of a Python that runs in tests/, which is where the suite finds its modules.
    done = subprocess.run(
        [ROOT / PYTHON, "-c", LIST],
        cwd=ROOT / "tests",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [Defect(name, bool(int(harm)), bool(int(found))) for name, harm, found in rows]


def suite() -> int:
    """The whole suite; 0 when it found what there is to be found, and nothing else failed."""
    # Wide enough for the summary to keep every message.
    command = ["scripts/suite", *KERNEL, "--timeout", "1800", "--env", "COLUMNS=2000"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    unnamed = [line[:300] for line in failed if not NAMED.search(line)]
    found = {name for line in failed for name in NAMED.findall(line)}
    expected = {one.name for one in defects() if one.expected}
    print(f"exit code {done.returncode}, {len(failed)} failures")
    for name in sorted(found | expected):
        how = "found" if name in found & expected else "MISSED" if name in expected else "EXTRA"
        print(f"  {how:8}{name}")
    for line in unnamed:
        print(f"  UNNAMED {line}")
    if done.returncode != TESTS_FAILED:
        print(done.stdout[-4000:])
    return int(done.returncode != TESTS_FAILED or found != expected or bool(unnamed))


def dangerous(names: list[str]) -> int:
    """One defect a VM: what the VM's exit code is, and the first words of its complaint."""
    for name in names or [one.name for one in defects() if one.dangerous]:
        test = f"tests/private/test_defects.py::test_known_defect[{name}]"
        command = ["scripts/vm", *KERNEL, "--timeout", "900", "--env", "KVMPRIV_KERNEL=literal"]
        command += ["--", PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "--dangerous", "--timeout", "60", test],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        both = (done.stdout + done.stderr).splitlines()
        words = [
            line.strip() for line in both if re.search(r"known defect: |vm: the |BUG|WARN", line)
        ]
        print(f"{name}: exit code {done.returncode}")
        for line in words[:3]:
            print(f"    {line[:160]}")
    return 0


def main(arguments: list[str]) -> int:
    known = {one.name for one in defects()} if arguments else set()
    if arguments[:1] == ["--dangerous"] and set(arguments[1:]) <= known:
        return dangerous(arguments[1:])
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    return suite()
