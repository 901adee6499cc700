"""Mutation testing for a kernel: break one line at a time, and run the tests.

One image of the kernel contains all breaks (the patches in scripts/kernel/*/breaks).  The parameter
`break` of a module, restrictedmem.break or kvm.break, selects one of them at boot, or later by a
write to it in /sys/module; without it nothing is broken.  First the suite has to pass without a
break (--quick leaves this out).  Then a VM tries one break after the other: it runs the tests that
should notice the break, and where they fail, runs them again without the break, when they must
pass.  If they do not, or if the break ended the kernel, the next VM goes on.  A break that its
tests did not notice gets a VM of its own that is booted with it; if the tests do not notice it
there either, the whole suite is run.  The output is a table: each break, with its rule and the test
that caught it, or with how the kernel ended.  Breaks that no test can notice are not tried; the
table has the reason.

NAME is the name of a break, or a pattern such as 'copy.*'.  The output of the VMs is kept in the
cache, beside the logs of the kernels.
"""

from __future__ import annotations

import fnmatch
import json
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import breaks, kernels
from .command import Parser
from .errors import Refused, say
from .mutant import MutatedPlan, make
from .paths import ROOT, cache_root
from .process import die_with_parent, exit_on
from .store import find_or_build
from .trial import STUCK

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from .breaks import Break
    from .kernels import Kernel

EXIT_CODES = """exit codes:
  0  the suite passes without a break and fails for each
  1  it fails without one, or breaks escaped (they are listed)
  2  usage error, or packages are missing and cannot be installed here
  3 to 7  no image, as scripts/kernel/build; 4 also if a break does not apply
  130, 143  interrupted, terminated"""

TRIAL = ("scripts/launch.py", "kbuild.trial")
#: Breaks for one VM, and the seconds that a VM may be silent (tests that spin are ended sooner).
SOME, QUIET = 25, 600

# scripts/vm's exit codes that are the kernel's doing: any of them is a failure of the suite.
HUNG = 124
DEATHS = {120: "the kernel complained", 121: "the kernel panicked", 122: "the VM was lost",
          HUNG: "the VM hung", 128 + signal.SIGKILL: "the kernel ran out of memory"}  # fmt: skip

# -- the runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The outcome of a break: the test that caught it, and how, if it did not simply fail."""

    caught: bool
    test: str = ""
    how: str = ""


@dataclass
class Report:
    """What trial.py reported about one break."""

    name: str
    text: str = ""
    ended: int | None = None
    without: int | None = None

    def failed(self) -> tuple[str, str]:
        """The test that failed, and how if not by an assertion; else the one that ran last."""
        short = re.search(r"^(?:FAILED|ERROR) tests/private/(\S+)", self.text, re.MULTILINE)
        if short:
            return short[1], "timed out" if "Timeout" in self.text else ""
        started = re.findall(r"^tests/private/(\S+::.*?)(?: (?:PASSED|SKIPPED|FAILED|ERROR).*)?$",
                             self.text, re.MULTILINE)  # fmt: skip
        return (started[-1].strip() if started else ""), ""


def reports(said: str) -> list[Report]:
    """The reports of trial.py, break by break."""
    found: list[Report] = []
    for line in said.splitlines(keepends=True):
        if not line.startswith("@@ "):
            if found and found[-1].ended is None:
                found[-1].text += line
            continue
        word, *more = line.split()[1:]
        if word == "ended":
            found[-1].ended = int(more[0])
        elif word == "stuck":
            found[-1].ended = found[-1].ended or -signal.SIGKILL
        elif word == "without":
            found[-1].without = int(more[0])
        else:
            found.append(Report(word))
    return found


class Runner:
    """Runs tests in the image; keeps the output of the VMs."""

    def __init__(self, kernel: Kernel, image: Path) -> None:
        self.kernel, self.image = kernel, image
        self.folder = cache_root() / "logs" / "mutate" / kernel.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.over = False

    def stop(self) -> None:
        """End the VMs, and start no other, so that the threads that wait for them end."""
        self.over = True
        for vm in list(self.running):
            vm.terminate()

    def vm(self, name: str, append: str, command: Sequence[str]) -> tuple[int, str]:
        """Run a command in a VM; its exit status, and its output."""
        if self.over:
            raise Refused(1, "stopped")
        said = self.folder / f"{name}.txt"
        words = f"{self.kernel.words} {append}".strip()
        options = ["--quiet", "--append", words, "--env", "PYTHONUNBUFFERED=1"]
        options += ["--log", str(self.folder / f"{name}.log")]
        required = kernels.required(self.kernel.name, append.split(), own_tree=False)
        options += ["--env", f"KVMPRIV_REQUIRE={required}"]
        options += ["--env", f"KVMPRIV_KERNEL={self.kernel.name}"]
        with (
            said.open("w") as file,
            subprocess.Popen(
                ["scripts/vm", str(self.image), *options, "--", ".venv/bin/python", *command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (it does one system call)
            ) as vm,
        ):
            self.running.add(vm)
            code = None
            try:
                while code is None:
                    try:
                        code = vm.wait(5)
                    except subprocess.TimeoutExpired:
                        if time.time() - said.stat().st_mtime > QUIET:
                            vm.terminate()
                            vm.wait()
                            code = HUNG
            except BaseException:  # interrupted: Popen's own end would wait for the VM's
                vm.terminate()
                raise
            self.running.discard(vm)
        return code, said.read_text(errors="replace")

    def control(self, append: str) -> None:
        """Run the suite without a break; Refused if it fails."""
        name = f"none{append and '-'}{append}"
        tests = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/private"]
        code, said = self.vm(name, append, tests)
        if code:
            test, _ = Report("", said).failed()
            what = DEATHS.get(code, f"exit code {code}")
            raise Refused(
                1,
                f"the suite fails without a break: {test or 'no test'} ({what}); "
                f"see {self.folder}/{name}.txt",
            )
        say(f"the suite passes without a break{append and ' under '}{append}")

    def trial(self, one: Break, tests: Sequence[str]) -> Result:
        """One break in a VM of its own, selected at boot."""
        append = f"{self.kernel.module}.break={one.name} {one.append}".strip()
        job = json.dumps([[one.name, list(tests)]])
        code, text = self.vm(one.name, append, [*TRIAL, self.kernel.module, job])
        return self.judge(one, code, reports(text))

    def judge(self, one: Break, code: int, said: Sequence[Report]) -> Result:
        """The outcome of the break that `said` reports last."""
        if not said or said[-1].name != one.name or (said[-1].ended is None and code not in DEATHS):
            raise Refused(1, f"{one.name}: exit code {code} before any test: see {self.folder}")
        last = said[-1]
        test, how = last.failed()
        if last.ended == 0 and code not in DEATHS:
            return Result(caught=False)
        if last.ended not in (None, 0, 1) and last.ended >= 0:
            raise Refused(1, f"{one.name}: pytest ended with {last.ended}: see {self.folder}")
        if last.ended is not None and last.ended < 0:
            how = "stuck"
        return Result(caught=True, test=test, how=DEATHS.get(code, how))

    def several(self, breaks: Sequence[Break]) -> dict[str, Result]:
        """Those of `breaks` that their tests caught."""
        results: dict[str, Result] = {}
        alone: list[Break] = []
        left = list(breaks)
        while left:
            first, jobs = left[0], json.dumps([[one.name, one.tests] for one in left])
            command = [*TRIAL, self.kernel.module, jobs]
            code, text = self.vm(f"from-{first.name}", first.append, command)
            told = reports(text)
            if not told or code not in (0, STUCK, *DEATHS):
                raise Refused(1, f"a VM ended with {code}: see from-{first.name} in {self.folder}")
            for said in told:
                one = left.pop(0)
                assert one.name == said.name
                # Nothing but this break had been in the VM, or all was well without it.
                if said.ended and said.without == 0:
                    results[one.name] = self.judge(one, 0, [said])
                elif one is first and said.ended != 0:
                    results[one.name] = self.judge(one, code, [said])
                else:  # not noticed, perhaps, because it breaks what is done at boot
                    alone.append(one)
                self.report(one, results.get(one.name))
        for one in alone:
            result = self.trial(one, one.tests)
            if result.caught:
                results[one.name] = result
            self.report(one, result)
        return results

    @staticmethod
    def report(one: Break, result: Result | None) -> None:
        if result and result.caught:
            say(f"{one.name}: {result.test} {result.how and f'({result.how})'}")
        else:
            say(f"{one.name}: not yet")


def try_all(runner: Runner, chosen: Sequence[Break], jobs: int) -> dict[str, Result]:
    """The outcome of each break."""
    groups: list[list[Break]] = []
    for append in dict.fromkeys(one.append for one in chosen):
        alike = [one for one in chosen if one.append == append]
        groups += [alike[at : at + SOME] for at in range(0, len(alike), SOME)]
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for some in pool.map(runner.several, groups):
                results |= some
            escaped = [one for one in chosen if one.name not in results]
            whole = pool.map(lambda one: runner.trial(one, [""]), escaped)
            for one, last in zip(escaped, whole, strict=True):
                results[one.name] = last
                runner.report(one, last)
        except BaseException:
            runner.stop()
            raise
    return results


def table(chosen: Sequence[Break], results: dict[str, Result]) -> str:
    titles = [f"{one.name} {one.commit}".strip() for one in chosen]
    width = max(map(len, titles))
    lines = []
    for title, one in zip(titles, chosen, strict=True):
        result = results.get(one.name)
        if not result:
            what = f"not seen: {one.unseen}"
        elif result.caught:
            what = f"{one.rule}: {result.test}{result.how and f' ({result.how})'}"
        else:
            what = "ESCAPED"
        lines.append(f"{title:<{width}} → {what}")
    return "\n".join(lines)


def parse(
    prog: str, description: str | None, folder: Callable[[Kernel], str], arguments: list[str]
) -> argparse.Namespace:
    parser = Parser(prog, description, EXIT_CODES)
    parser.add_argument("names", metavar="NAME", nargs="*", help="these breaks only")
    mutable = [name for name, kernel in kernels.KERNELS.items() if folder(kernel)]
    help_ = f"the kernel that is broken (default {mutable[0]})"
    parser.add_argument("--kernel", choices=mutable, default=mutable[0], help=help_)
    parser.add_argument("--list", action="store_true", help="list the breaks: name, rule, files")
    parser.add_argument(
        "--quick", action="store_true", help="do not run the suite without a break first"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="VMs that run at the same time (default 1)"
    )
    options = parser.parse_args(arguments)
    known = breaks.of(folder(kernels.KERNELS[options.kernel]))
    if options.jobs < 1:
        parser.error(f"--jobs must be 1 or more, not {options.jobs}")
    for name in options.names:
        if not fnmatch.filter([one.name for one in known], name):
            parser.error(f"there is no break {name!r} (--list prints the names)")
    options.chosen = [
        one
        for one in known
        if not options.names or any(fnmatch.fnmatchcase(one.name, name) for name in options.names)
    ]
    return options


def main(arguments: list[str]) -> int:
    """The command scripts/kernel/mutate."""
    return run("mutate", __doc__, lambda kernel: kernel.breaks, arguments)


def run(
    prog: str, description: str | None, folder: Callable[[Kernel], str], arguments: list[str]
) -> int:
    """A command that tries the breaks of one of a kernel's folders."""
    exit_on(signal.SIGTERM)
    options = parse(prog, description, folder, arguments)
    chosen: list[Break] = options.chosen
    if options.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the output may go to `head`
        for one in chosen:
            print(one.name, one.rule, *one.files, sep="\t")
        return 0
    tried = [one for one in chosen if not one.unseen]
    try:
        image = find_or_build(MutatedPlan(options.kernel), make) / "bzImage"
        runner = Runner(kernels.KERNELS[options.kernel], image)
        if not options.quick:
            for append in dict.fromkeys(["", *(one.append for one in tried)]):
                runner.control(append)
        results = try_all(runner, tried, options.jobs)
    except Refused as refused:
        say(f"{prog}: {refused}")
        return refused.code
    except KeyboardInterrupt:
        say(f"{prog}: interrupted")
        return 130
    print(table(chosen, results))
    escaped = [one.name for one in tried if not results[one.name].caught]
    print(f"{len(tried) - len(escaped)} of {len(tried)} breaks are caught")
    if len(chosen) > len(tried):
        print(f"{len(chosen) - len(tried)} more can't be seen")
    if escaped:
        print("ESCAPED: " + ", ".join(escaped))
    return 1 if escaped else 0
