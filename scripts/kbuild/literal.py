"""Run the suite on v9 as it was posted, without the fixes: it must find each known defect.

    scripts/literal                        the whole suite
    scripts/literal --dangerous [NAME]...  each defect that ends a kernel, in a VM of its own

The first form exits with 0 if every defect was found that does not end the kernel, and if each
failure of a test was attributed to a known defect.  The second prints how each VM ended.
"""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

from .command import Parser
from .paths import ROOT

PYTHON = ".venv/bin/python"
KERNEL = ["restrictedmem", "--literal"]
NAMED = re.compile(r"known defect: ([a-z0-9-]+):")
TESTS_FAILED = 1  # pytest's exit code

LIST = """\
from private.support.defects import DEFECTS
for one in DEFECTS.values():
    print(one.name, int(bool(one.dangerous)), int(not one.dangerous and not one.needs), sep="\\t")
"""


class Defect(NamedTuple):
    """A known defect of v9: can the kernel crash, and does the plain suite find it."""

    name: str
    dangerous: bool
    expected: bool


def defects() -> list[Defect]:
    """The suite's list of known defects."""
    # In tests/, from where the suite's modules can be imported.
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
    """Run the whole suite; 0 if it found what it should find, and nothing else failed."""
    # Wide enough for pytest's summary to keep each message in full.
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
    """One defect a VM: print the VM's exit status, and the first lines of the kernel's report."""
    for name in names or [one.name for one in defects() if one.dangerous]:
        test = f"tests/private/test_defects.py::test_known_defect[{name}]"
        command = [
            "scripts/vm",
            *KERNEL,
            "--timeout",
            "900",
            "--env",
            "KVMPRIV_KERNEL=restrictedmem-literal",
        ]
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
    """The command scripts/literal."""
    parser = Parser("literal", __doc__)
    parser.add_argument("--dangerous", nargs="*", metavar="NAME", help="these defects, or all")
    chosen = parser.parse_args(arguments).dangerous
    if chosen is None:
        return suite()
    known = {one.name for one in defects() if one.dangerous}
    if unknown := sorted(set(chosen) - known):
        parser.error(f"no such dangerous defect: {', '.join(unknown)} (there are {sorted(known)})")
    return dangerous(chosen)
