"""Run the suite on v9 as it was posted, without the fixes: it must find each known defect.

    scripts/literal                        the suite on both MMUs, and the debug kernel's part
    scripts/literal --on PART              one of these: tdp, shadow, debug
    scripts/literal --dangerous [NAME]...  each defect that ends a kernel, in a VM of its own
    scripts/literal --without [PATCH]...   the suite with all fixes but one, for each fix in turn

The first two exit with 0 if every defect was found that does not end the kernel, and if each
failure of a test was attributed to a known defect.  The debug kernel's part are the detectors that
need fault injection or a check of the kernel's own.  The third prints how each VM ended.

PATCH is the number of a patch of scripts/kernel/restrictedmem/fixes, such as 0013.  The kernel is
the image of scripts/kernel/mutate, whose breaks with a line `Undoes` undo a patch.  The output is a
table: the patch, the defect that is back, and what the suite made of it.  A defect that is not
dangerous must be named, and no other.  One that can end the kernel must do no harm to the suite;
the word behind `alone:` is what its detector did in a VM of its own.  The exit status is 0 if all
this is so.
"""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

from . import breaks
from .command import Parser
from .errors import Refused, say
from .kernels import KERNELS
from .mutant import MutatedPlan, make
from .paths import ROOT
from .store import find_or_build

PYTHON = ".venv/bin/python"
NAME = "restrictedmem"
KERNEL = [NAME, "--literal"]
NAMED = re.compile(r"known defect: ([a-z0-9-]+):")
TESTS_FAILED = 1  # pytest's exit code

LIST = """\
from private.support.defects import DEBUG, DEFECTS, SHADOW_MMU
for one in DEFECTS.values():
    part = "debug" if one.needs in DEBUG else "shadow" if one.needs == SHADOW_MMU else ""
    print(one.name, int(bool(one.dangerous)), part, sep="\\t")
"""

#: Options of scripts/vm for each part.
PARTS = {"tdp": [], "shadow": ["--append", "kvm.tdp_mmu=0"], "debug": ["--debug", "--tolerate"]}


class Defect(NamedTuple):
    """A known defect of v9: can the kernel crash, and the only part that can find it, if any."""

    name: str
    dangerous: bool
    part: str

    def is_expected(self, part: str) -> bool:
        """Whether the suite finds it in this part, without --dangerous."""
        return not self.dangerous and (part == self.part or (part != "debug" and not self.part))


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
    return [Defect(name, bool(int(harm)), part) for name, harm, part in rows]


def test_of(name: str) -> str:
    """The test that runs the detector of a defect."""
    return f"tests/private/test_defects.py::test_known_defect[{name}]"


class Seen(NamedTuple):
    """How a run of the suite ended: the failures, the defects they name, those without a name."""

    code: int
    said: str
    failed: list[str]
    found: set[str]
    unnamed: list[str]


def run(kernel: list[str], tests: list[str]) -> Seen:
    """Run the suite, or some of its tests, in a kernel; `kernel` is a name and options."""
    # Wide enough for pytest's summary to keep each message in full.
    command = ["scripts/suite", *kernel, "--timeout", "1800", "--env", "COLUMNS=2000"]
    command += ["--", *tests] if tests else []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    unnamed = [line[:300] for line in failed if not NAMED.search(line)]
    found = {name for line in failed for name in NAMED.findall(line)}
    return Seen(done.returncode, done.stdout, failed, found, unnamed)


def suite(part: str) -> int:
    """Run a part; 0 if it found what it should find, and nothing else failed."""
    expected = {one.name for one in defects() if one.is_expected(part)}
    # The kernel's own checks find more in a debug kernel than the suite does, and in every test.
    tests = [test_of(name) for name in sorted(expected)] if part == "debug" else []
    seen = run([*KERNEL, *PARTS[part]], tests)
    unnamed, found = seen.unnamed, seen.found
    if part == "debug":
        unnamed = [line for line in unnamed if "the kernel complained" not in line]
    print(f"{part}: exit code {seen.code}, {len(seen.failed)} failures")
    for name in sorted(found | expected):
        how = "found" if name in found & expected else "MISSED" if name in expected else "EXTRA"
        print(f"  {how:8}{name}")
    for line in unnamed:
        print(f"  UNNAMED {line}")
    ended = seen.code == TESTS_FAILED or (part == "debug" and found == expected)
    if not ended:
        print(seen.said[-4000:])
    return int(not ended or found != expected or bool(unnamed))


def alone(kernel: list[str], one: Defect, seconds: int = 900) -> tuple[int, list[str]]:
    """Look for a dangerous defect in a VM: its exit status, and what it said of the defect.

    A defect that makes the kernel hang ends the VM after `seconds`.
    """
    command = ["scripts/vm", *kernel, "--timeout", str(seconds), "--", PYTHON, "-m", "pytest", "-q"]
    command += ["-p", "no:cacheprovider", "--dangerous", "--timeout", "60"]
    done = subprocess.run(
        [*command, test_of(one.name)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    both = (done.stdout + done.stderr).splitlines()
    told = re.compile(r"known defect: |^vm: the |\bBUG: |\bWARNING: ")
    words = [line.strip() for line in both if told.search(line)]
    return done.returncode, words


def dangerous(names: list[str]) -> int:
    """One defect a VM: print the VM's exit status, and the first lines of the kernel's report."""
    for one in defects():
        if not one.dangerous or (names and one.name not in names):
            continue
        options = [word for word in PARTS[one.part or "tdp"] if word != "--tolerate"]
        kernel = "restrictedmem-debug-literal" if one.part == "debug" else "restrictedmem-literal"
        code, words = alone([*KERNEL, *options, "--env", f"KVMPRIV_KERNEL={kernel}"], one)
        print(f"{one.name}: exit code {code}")
        for line in words[:3]:
            print(f"    {line[:160]}")
    return 0


def without(chosen: list[breaks.Break]) -> int:
    """One patch a VM: print a row of the table for each of these breaks."""
    known = {one.name: one for one in defects()}
    try:
        image = str(find_or_build(MutatedPlan(NAME), make) / "bzImage")
    except Refused as refused:
        say(f"literal: {refused}")
        return refused.code
    worst = 0
    for one in chosen:
        patch, name = one.undoes.split()
        words = f"{KERNELS[NAME].module}.break={one.name} {one.append}".strip()
        kernel = [image, "--append", words]
        seen = run(kernel, [])
        expected = set() if known[name].dangerous else {name}
        good = seen.code in (0, TESTS_FAILED) and seen.found == expected and not seen.unnamed
        row = f"{patch} {name} → exit code {seen.code}, {len(seen.failed)} failures"
        row += "".join(f", {found}" for found in sorted(seen.found))
        if known[name].dangerous:
            code, said = alone(kernel, known[name], 300)
            good = good and (code != 0 or bool(one.unseen))
            row += f"; alone: exit code {code}, {said[0][:100] if said else 'nothing'}"
        print(row if good else f"{row}  WRONG", flush=True)
        for line in seen.unnamed:
            print(f"  UNNAMED {line}", flush=True)
        worst = max(worst, int(not good))
    return worst


def undoing() -> list[breaks.Break]:
    """The breaks that undo a patch of fixes/, by the number of the patch."""
    some = (one for one in breaks.of(KERNELS[NAME].breaks) if one.undoes)
    return sorted(some, key=lambda one: one.undoes)


def main(arguments: list[str]) -> int:
    """The command scripts/literal."""
    parser = Parser("literal", __doc__)
    parser.add_argument("--on", choices=PARTS, metavar="PART", help="one part: tdp, shadow, debug")
    parser.add_argument("--dangerous", nargs="*", metavar="NAME", help="these defects, or all")
    parser.add_argument("--without", nargs="*", metavar="PATCH", help="these patches, or each")
    options = parser.parse_args(arguments)
    if options.without is not None:
        some = undoing()
        numbers = sorted({one.undoes.split()[0] for one in some})
        if unknown := sorted(set(options.without) - set(numbers)):
            parser.error(f"no break undoes {', '.join(unknown)} (there are {', '.join(numbers)})")
        wanted = options.without or numbers
        return without([one for one in some if one.undoes.split()[0] in wanted])
    if options.dangerous is None:
        return max(suite(part) for part in ([options.on] if options.on else PARTS))
    known = {one.name for one in defects() if one.dangerous}
    if unknown := sorted(set(options.dangerous) - known):
        parser.error(f"no such dangerous defect: {', '.join(unknown)} (there are {sorted(known)})")
    return dangerous(options.dangerous)
