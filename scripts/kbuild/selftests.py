"""The kernel's own C selftests: building them from a tree, and the outcome of each of their cases.

Such a program only reports whether all of it passed.  The host's side of each is therefore built
with calls at the entry and the exit of its test functions (cases.c).  A case passed if it was
entered and left, and failed if it was only entered; one that was never entered did not run.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from .errors import Refused, Status, say
from .locks import locked
from .packages import TOOLS, ensure
from .paths import DATA, cache_root
from .recipe import Maker, Plan, fingerprint, first_line
from .store import with_source

HOOKS = DATA / "cases.c"
PROGRAMS = (
    "guest_memfd_test",
    "set_memory_region_test",
    "private_mem_conversions_test",
    "private_mem_kvm_exits_test",
    "pre_fault_memory_test",
)
SKIPPED = 4  # kselftest's exit code: KSFT_SKIP
KEEP = 2  # builds: older ones are of other sources
# Most of a tree, that neither its headers nor its selftests need.
LEFT_OUT = ["drivers", "Documentation", "sound", "fs", "net", "samples", "arch/[!x]*", "tools/perf"]

PASS, FAIL, SKIP, NOT_RUN = "passed", "failed", "skipped", "not run"


class Verdict(NamedTuple):
    """How a case ended, and the reason."""

    status: str
    why: str = ""


def is_test(function: str) -> bool:
    return re.match(r"(?:__)?(?:guest_)?test_", function) is not None


def in_guest(function: str) -> bool:
    """Whether a function is the guest's code, which can't be watched from outside."""
    return function.startswith("guest_")


def functions(source: str) -> dict[str, int]:
    """The functions that a C source defines, and the lines at which they begin."""
    defined = {}
    for match in re.finditer(
        r"^(?:[\w*]+[ \t*\n]+)+?\**(\w+)\([^;{}]*\)\s*\{", source, re.MULTILINE
    ):
        defined[match[1]] = source.count("\n", 0, match.start()) + 1
    # kselftest_harness.h makes functions of these.
    for match in re.finditer(r"^(?:\w*_)?TEST\w*\(([^),]*),?\s*(\w*)", source, re.MULTILINE):
        defined[f"test_{match[2] or match[1]}"] = source.count("\n", 0, match.start()) + 1
    return defined


def find_or_build(source: Path | None) -> Path:
    """The folder with the programs, and with their sources beside them."""
    ensure(TOOLS)
    plan = with_source(Plan("guest_memfd-6.12", source=source))
    digest = hashlib.sha256(fingerprint(plan.origin))
    digest.update(first_line([*plan.compiler(), "--version"]))
    for file in (Path(__file__), HOOKS):
        digest.update(file.read_bytes())
    cache = cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    name = f"selftests.{digest.hexdigest()[:20]}"
    entry, scratch = cache / name, cache / f"{name}.building"
    if entry.is_dir():
        return entry
    with locked(cache / f"{name}.lock"):
        if entry.is_dir():  # built while we waited
            return entry
        shutil.rmtree(scratch, ignore_errors=True)
        out = scratch / "out"
        out.mkdir(parents=True)
        try:
            build(plan, scratch, out)
            out.rename(entry)
        except Refused as refused:
            log = cache / "selftests.failed.log"
            shutil.copyfile(out / "build.log", log) if (out / "build.log").exists() else None
            raise Refused(refused.code, f"{refused}\nThe whole log: {log}") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    done = (path for path in cache.glob("selftests.*") if (path / PROGRAMS[0]).exists())
    for old in sorted(done, key=lambda path: path.stat().st_mtime)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return entry


def unpack(maker: Maker, plan: Plan) -> None:
    if plan.source and plan.source.is_dir():
        maker.unpack()
        return
    tarball = plan.origin
    say(f"unpacking {tarball}")
    maker.tree.mkdir()
    command = ["tar", "-xf", str(tarball), "--strip-components=1"]
    command += ["--anchored", "--no-wildcards-match-slash"]
    command += [f"--exclude=*/{name}" for name in LEFT_OUT]
    maker.run(command, Status.NO_SOURCE, f"unpacking {tarball}")


def build(plan: Plan, work: Path, out: Path) -> None:
    maker = Maker(plan, work, out)
    unpack(maker, plan)
    say("building the kernel's selftests")
    maker.make("headers_install", code=Status.COMPILE, what="make headers_install")
    folder = maker.tree / "tools/testing/selftests/kvm"
    sources = {}
    for program in PROGRAMS:
        found = sorted(folder.rglob(f"{program}.c"))
        if not found:
            raise Refused(Status.COMPILE, f"{plan.origin} has no selftest {program}")
        sources[program] = found[0]
        shutil.copy(found[0], out)
    hooks = work / "cases.o"
    compiler = plan.compiler()
    maker.run(
        [*compiler, "-O2", "-fno-PIE", "-c", str(HOOKS), "-o", str(hooks)],
        Status.COMPILE,
        "cases.c",
    )
    defined = [name for source in sources.values() for name in functions(source.read_text())]
    tests = [name for name in defined if is_test(name) and not in_guest(name)]
    # gcc takes these for parts of names: none that is part of a test's.
    silent = {name for name in defined if name not in tests}
    silent = {name for name in silent if not any(name in test for test in tests)}
    flags = [
        "-finstrument-functions",
        "-finstrument-functions-exclude-file-list=lib/,include/",
        f"-finstrument-functions-exclude-function-list={','.join(sorted(silent))}",
    ]
    objects = work / "objects"
    targets = {
        name: objects / source.relative_to(folder).with_suffix("")
        for name, source in sources.items()
    }
    maker.make(
        "-C", str(folder), f"OUTPUT={objects}", f"EXTRA_CFLAGS={' '.join(flags)}",
        f"LDLIBS=-ldl {hooks}", *map(str, targets.values()),
        code=Status.COMPILE, what="make the selftests",
    )  # fmt: skip
    for name, target in targets.items():
        shutil.copy(target, out / name)


def addresses(program: Path) -> dict[int, str]:
    """The program's functions by their addresses."""
    listed = subprocess.run(["nm", str(program)], capture_output=True, text=True, check=True)
    found = {}
    for line in listed.stdout.splitlines():
        words = line.split()
        if len(words) == 3 and words[1] in "tT":
            found[int(words[0], 16)] = words[2].partition(".")[0]  # without .constprop.0
    return found


def verdicts(program: Path, status: int, trace: str, output: str) -> dict[str, Verdict]:
    """How each test function of a program's source fared in one run of it."""
    source = program.with_suffix(".c")
    defined = functions(source.read_text())
    names = addresses(program)
    entered: dict[str, int] = {}
    inside: dict[str, int] = {}
    for line in trace.splitlines():
        name = names.get(int(line[1:], 16), "")
        entered[name] = entered.get(name, 0) + (line[0] == "+")
        inside[name] = inside.get(name, 0) + (1 if line[0] == "+" else -1)
    why = reason(output)
    blamed = to_blame(source.name, defined, output)
    found = {}
    for name in filter(is_test, defined):
        if status == SKIPPED and (inside.get(name) or not entered.get(name)):
            found[name] = Verdict(SKIP, why)
        elif name == blamed or inside.get(name):
            found[name] = Verdict(FAIL, f"exit code {status}: {why}")
        elif in_guest(name):
            # What the guest's code asserts ends the program.
            found[name] = Verdict(NOT_RUN, f"exit code {status}") if status else Verdict(PASS)
        elif entered.get(name):
            found[name] = Verdict(PASS, f"{entered[name]} times" if entered[name] > 1 else "")
        else:
            found[name] = Verdict(NOT_RUN if status else SKIP, why)
    if status not in (0, SKIPPED) and not any(one.status == FAIL for one in found.values()):
        # It ended outside of its tests.
        return dict.fromkeys(found, Verdict(FAIL, f"exit code {status}: {why}"))
    return found


def reason(output: str) -> str:
    """Why a program skipped, or what it complained of, in its own words."""
    for pattern in (r"SKIP - (.*)", r"Test Assertion Failure ====\n\s*(.*)", r"(Skipping .*)"):
        if found := re.findall(pattern, output):
            return "; ".join(found)
    return " ".join(output.split()[-12:])


def to_blame(file: str, defined: dict[str, int], output: str) -> str | None:
    """The function that holds the assertion that failed."""
    if not (match := re.search(rf"Failure ====\s+\S*{re.escape(file)}:(\d+)", output)):
        return None
    before = [name for name, line in defined.items() if line <= int(match[1])]
    return max(before, key=lambda name: defined[name], default=None)
