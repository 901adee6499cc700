"""Compare the suite with the kernel's own C selftests, in the same VM, case by case.

The selftests are built once, from Debian's linux-source-6.12 (or --source), and run in the
guest_memfd-6.12 kernel (or --kernel).  The tests of ours that check the same run in the same boot;
correspondence.py has the table.  A case agrees if both pass, or if both are skipped for the same
reason.  A case of the C sources that the table lacks is a disagreement, and so is a test in the
table that does not exist.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Parser
from .correspondence import RUNS, SAME_REASON
from .errors import Refused, Status, say
from .paths import ROOT, cache_root
from .selftests import (
    FAIL,
    NOT_RUN,
    PASS,
    SKIP,
    Verdict,
    find_or_build,
    functions,
    is_test,
    verdicts,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

SUITE, PYTHON = "tests/private", ".venv/bin/python"
DISAGREE = 1
PATIENCE = 300  # seconds for one program
EXIT_CODES = """exit codes:
  0  all agree
  1  some do not (they are listed), the kernel complained, or something could not be built or run
  2  usage error, or packages are missing and cannot be installed here"""


def job(programs: Path, results: Path) -> str:
    """The script for the shell of the VM."""
    lines = [f"cd {shlex.quote(str(programs))}"]
    for number, run in enumerate(RUNS):
        # Each change of a slot waits for all CPUs: a thousand times as long on two as on one.
        pinned = "taskset -c 0 " if run.pinned else ""
        out = shlex.quote(f"{results}/{number}")
        lines.append(f"echo '  {run.title}' >&2")
        lines.append(
            f"{pinned}timeout -k 5 {PATIENCE} ./{run.title} >{out}.output 2>&1 3>/run/trace; "
            f"echo $? >{out}.status; cp /run/trace {out}.trace"
        )
    tests = {test for run in RUNS for ids in run.cases.values() for test in ids}
    files = sorted({f"{SUITE}/{test.partition('::')[0]}" for test in tests})
    # By their names: an id that is not there would keep all of them from running.
    names = " or ".join(sorted({re.split(r"::|\[", test)[1] for test in tests}))
    out = shlex.quote(f"{results}/ours")
    pytest = f"{PYTHON} -m pytest -q -p no:cacheprovider --junitxml={out}.xml -k '{names}'"
    lines.append(f"cd {shlex.quote(str(ROOT))}; echo '  our tests' >&2")
    lines.append(f"{pytest} {' '.join(files)} >{out}.output 2>&1")
    return "\n".join(lines) + "\n"


def boot(kernel: str, programs: Path, results: Path) -> None:
    """Run all of it in a VM; Refused if the VM failed, or its kernel complained."""
    script = results / "job"
    script.write_text(job(programs, results))
    command = [str(ROOT / "scripts/vm"), kernel, "-q", "--output-dir", str(results)]
    # This names no fixed kernel, so tests that can crash others are skipped.
    command += ["--env", f"KVMPRIV_KERNEL={kernel}", "--", "sh", str(script)]
    if (status := subprocess.run(command, check=False).returncode) > 1:
        raise Refused(DISAGREE, f"the VM's run failed (scripts/vm: exit code {status})")


def ours_said(results: Path) -> dict[str, Verdict]:
    """The outcomes of our tests by their ids, in the form of the table."""
    try:
        tree = ET.parse(results / "ours.xml")  # noqa: S314 (we have just had it written)
    except (OSError, ET.ParseError):
        output = (results / "ours.output").read_text(errors="replace")
        raise Refused(DISAGREE, f"our tests did not run:\n{output[-2000:]}") from None
    found = {}
    for case in tree.iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        verdict = Verdict(PASS)
        for what, status in (("skipped", SKIP), ("failure", FAIL), ("error", FAIL)):
            for mark in case.findall(what):
                verdict = Verdict(status, mark.get("message", ""))
        found[f"{module}.py::{case.get('name')}"] = verdict
    return found


def together(ids: Iterable[str], said: dict[str, Verdict]) -> Verdict:
    """The outcome of the tests that `ids` name; one without brackets names all its variants."""
    found: list[Verdict] = []
    for one in ids:
        those = [v for name, v in said.items() if name == one or name.startswith(f"{one}[")]
        if not those:
            return Verdict(FAIL, f"there is no test {SUITE}/{one}")
        found += those
    for status in (FAIL, PASS, SKIP):
        some = [verdict for verdict in found if verdict.status == status]
        if some and status == PASS:
            skipped = len(found) - len(some)
            return Verdict(PASS, f"{len(some)} tests" + f", {skipped} skipped" * bool(skipped))
        if some:
            return some[0]
    return Verdict(FAIL, "no test of ours is named")


def agree(theirs: Verdict, ours: Verdict) -> bool:
    if theirs.status == ours.status == PASS:
        return True
    return theirs.status == ours.status == SKIP and any(
        re.search(said, theirs.why) and ours.why.startswith(tuple(f"{lack}:" for lack in lacks))
        for said, lacks in SAME_REASON.items()
    )


def compare(programs: Path, results: Path) -> list[str]:
    """Print the table; what disagrees."""
    said = ours_said(results)
    wrong = []
    width = 2 + max(len(f"{run.title}: {case}") for run in RUNS for case in run.cases)
    print(f"{'C selftest: case':<{width}}{'C':<9}{'ours':<9}tests of ours")
    for number, run in enumerate(RUNS):
        part = {name: results / f"{number}.{name}" for name in ("status", "trace", "output")}
        status, trace, output = (path.read_text(errors="replace") for path in part.values())
        program = programs / run.program
        theirs = verdicts(program, int(status), trace, output)
        for case, ids in run.cases.items():
            one = theirs.get(case, Verdict(NOT_RUN, "the C source has no such function"))
            our = together(ids, said)
            row = f"{run.title}: {case}"
            print(f"{row:<{width}}{one.status:<9}{our.status:<9}{', '.join(ids)}")
            if not agree(one, our):
                wrong.append(
                    f"{run.title}: {case}: C {one.status} ({one.why or 'no word'}), "
                    f"ours {our.status} ({our.why or 'no word'})"
                )
        for case in filter(is_test, functions(program.with_suffix(".c").read_text())):
            if case not in run.cases:
                wrong.append(f"{run.title}: {case} is not in correspondence.py")
    return wrong


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("calibrate", __doc__, EXIT_CODES)
    default = "guest_memfd-6.12"
    parser.add_argument("--kernel", default=default, metavar="NAME", help="as scripts/vm's")
    parser.add_argument("--source", type=Path, metavar="TREE", help="a Linux tree or tarball")
    chosen = parser.parse_args(arguments)
    if chosen.source and not chosen.source.exists():
        parser.error(f"{chosen.source} does not exist")
    if not (ROOT / PYTHON).exists():
        parser.error(f"{ROOT / PYTHON} does not exist: `make check` creates it")
    return chosen


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        programs = find_or_build(options.source and options.source.resolve())
        with tempfile.TemporaryDirectory(prefix="calibrate-", dir=cache_root()) as results:
            boot(options.kernel, programs, Path(results))
            wrong = compare(programs, Path(results))
    except Refused as refused:
        say(f"calibrate: {refused}")
        return Status.USAGE if refused.code == Status.USAGE else DISAGREE
    except OSError as error:
        say(f"calibrate: {error}")
        return DISAGREE
    except KeyboardInterrupt:
        say("calibrate: interrupted")
        return 130
    for line in wrong:
        say(f"calibrate: {line}")
    print(f"{len(wrong)} disagree" if wrong else "all agree")
    return DISAGREE if wrong else 0
