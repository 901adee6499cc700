"""Run the suite (tests/private) in a kernel of scripts/kernel, an image, or a tree of your own.

    scripts/suite NAME [OPTION of scripts/vm]... [-k EXPRESSION] [-- ARGUMENT of pytest]...
    scripts/suite --source TREE ...         # builds the tree with the config of guest_memfd
    scripts/suite path/to/bzImage ...       # tests what this kernel supports

The exit status is that of scripts/vm, which passes on pytest's: 0 if no test failed, 1 if one did.
With --source it is made for `git bisect run`:

    0    good: no test failed
    1    bad: a test failed, or the kernel complained, panicked or hung
    125  to be skipped: the tree does not build, or does not boot
    255  ends the bisection: the commit is not to blame (usage error, no space, no QEMU)

With --debug the time limit is 90 minutes, else 25; --timeout sets another.  If $KVMPRIV_ARTIFACTS
is set, it is a folder in which the tests may write.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import kernels, vm
from .command import Parser
from .errors import Refused, Status, say
from .paths import ROOT
from .recipe import Plan
from .store import find_or_build

if TYPE_CHECKING:
    from collections.abc import Sequence

#: As a path that is the same in the VM.
PYTHON = ".venv/bin/python"
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
#: Seconds for the suite in a plain and in a debug kernel.
LIMIT, DEBUG_LIMIT = 1500, 5400
#: Seconds that a VM may be silent and idle.  No test is idle so long: its own time limit ends one
#: that hangs, unless timers do not fire.
SILENCE = 240


#: For `git bisect run`: skip this commit, end the bisection.
SKIP, ABORT = 125, 255
#: What it is told for the exit status of a VM that was started; for any other one ABORT.
VERDICTS = {
    0: 0,
    1: 1,
    vm.COMPLAINT: 1,
    vm.PANIC: 1,
    vm.LOST: 1,
    vm.TIMEOUT: 1,
    vm.NO_BOOT: SKIP,
    130: 130,
    143: 143,
}
#: The exit statuses of a build that the tree is to blame for.
UNBUILT = (Status.PATCH, Status.CONFIG, Status.COMPILE)


class Run(NamedTuple):
    """What to run: a kernel, options of scripts/vm, arguments of pytest, a tree of one's own."""

    name: str
    options: list[str]
    tests: list[str]
    source: Path | None = None

    @property
    def is_debug(self) -> bool:
        """Whether the kernel is the debug kernel."""
        return "--debug" in self.options

    @property
    def kernel(self) -> str:
        """What the suite is told as KVMPRIV_KERNEL: it excuses known defects of some kernels."""
        if kernels.is_image(self.name):
            return ""
        return Plan(self.name, self.is_debug, "--literal" in self.options).variant

    @property
    def abi(self) -> str:
        """The ABI that the kernel must have; "" for an image, of which nothing is known."""
        if kernels.is_image(self.name):
            return ""
        return kernels.abi_of(self.name, self._words, self.source is not None)

    @property
    def required(self) -> str:
        """The value of KVMPRIV_REQUIRE; the caller says what an image must have."""
        if kernels.is_image(self.name):
            return ",".join(filter(None, ("host", os.environ.get("KVMPRIV_REQUIRE"))))
        return kernels.required(self.name, self._words, self.source is not None)

    @property
    def _words(self) -> list[str]:
        """The words of the options, among them those of --append."""
        return " ".join(self.options).replace("--append=", "").split()


def parse(prog: str, description: str | None, arguments: list[str]) -> Run:
    """The command line; a usage error exits with 2."""
    usage = f"{prog} NAME [OPTION of scripts/vm]... [-k EXPRESSION] [-- ARGUMENT of pytest]..."
    arguments = kernels.with_name(arguments)
    status = ABORT if kernels.has_source(arguments) else Status.USAGE
    parser = Parser(prog, description, usage=usage, status=status)
    help_ = f"{kernels.names('or')}; or the path of an image"
    parser.add_argument("name", metavar="NAME", help=help_)
    parser.add_argument("--source", type=Path, metavar="TREE", help="build this Linux tree")
    parser.add_argument("-k", dest="expression", metavar="EXPRESSION", help="as pytest's option")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    known, options = parser.parse_known_args(arguments[:at])
    # Otherwise the argument of an option that only scripts/vm knows would be taken for NAME.
    if arguments[0] != known.name:
        parser.error("NAME comes first")
    if problem := kernels.problem_with(known.name, "--literal" in options, known.source):
        parser.error(problem)
    tests = ["-k", known.expression] if known.expression else []
    source = known.source and known.source.resolve()
    name = str(Path(known.name).resolve()) if kernels.is_image(known.name) else known.name
    return Run(name, options, tests + arguments[at + 1 :], source)


def start(run: Run, limit: int, options: list[str], environment: dict[str, str]) -> int:
    """Run pytest in the VM; scripts/vm's exit status.  The options of `run` override `options`."""
    command = [run.name, "--timeout", str(limit), *options, *run.options]
    command += ["--source", str(run.source)] if run.source else []
    environment = {
        "KVMPRIV_REQUIRE": run.required,
        "KVMPRIV_KERNEL": run.kernel,
        **environment,
    }
    for name, value in environment.items():
        command += ["--env", f"{name}={value}"]
    os.chdir(ROOT)
    return vm.main([*command, "--", *PYTEST, *run.tests])


def compile_tests(tests: Sequence[str] = ("tests/private",)) -> None:
    """Have Python compile kvmpriv and these tests here, where it can write the result.

    An emulated machine takes half a minute for it in each run, and its root file system is
    read-only.  It is done even if the caller's environment says that no byte code is written.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    package = [PYTHON, "-m", "compileall", "-q", "kvmpriv", "scripts"]
    # pytest compiles tests itself, since it changes their assertions.
    collect = [*PYTEST, "--collect-only", *tests]
    # A failure is reported by the run in the VM.
    for command in (package, collect):
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)


def main(arguments: list[str]) -> int:
    """The command scripts/suite."""
    run = parse("suite", __doc__, arguments)
    if run.source and (status := build(run)):
        return status
    try:
        compile_tests()
    except FileNotFoundError:
        say(f"suite: {ROOT} has no {PYTHON}, which runs the tests: `make check` installs it")
        return ABORT if run.source else Status.USAGE
    artifacts = os.environ.get("KVMPRIV_ARTIFACTS")
    options = ["--silence", str(SILENCE)]
    options += ["--output-dir", artifacts] if artifacts else []
    if not any(word.startswith("tests/") for word in run.tests):
        run = run._replace(tests=[*run.tests, "tests/private"])
    status = start(run, DEBUG_LIMIT if run.is_debug else LIMIT, options, {})
    return VERDICTS.get(status, ABORT) if run.source else status


def build(run: Run) -> int:
    """Build the tree; 0, or the status for `git bisect run`."""
    try:
        find_or_build(Plan(run.name, run.is_debug, "--literal" in run.options, run.source))
    except Refused as refused:
        say(f"suite: {refused}")
        return SKIP if refused.code in UNBUILT else ABORT
    except OSError as error:
        say(f"suite: {error}")
        return ABORT
    except KeyboardInterrupt:
        return 130
    return 0
