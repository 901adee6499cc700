"""Run the suite (tests/private) in a kernel of scripts/kernel.

    scripts/suite NAME [OPTION of scripts/vm]... [-k EXPRESSION] [-- ARGUMENT of pytest]...

With --debug the time limit is 90 minutes, else 25; --timeout sets another.  If $KVMPRIV_ARTIFACTS
is set, it is a folder in which the tests may write.
"""

from __future__ import annotations

import os
import subprocess
from typing import NamedTuple

from . import kernels, vm
from .command import Parser
from .paths import ROOT
from .recipe import Plan

#: As a path that is the same in the VM.
PYTHON = ".venv/bin/python"
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
#: Seconds for the suite in a plain and in a debug kernel.
LIMIT, DEBUG_LIMIT = 1500, 5400
#: Seconds that a VM may be silent and idle.  No test is idle so long: its own time limit ends one
#: that hangs, unless timers do not fire.
SILENCE = 240


class Run(NamedTuple):
    """What to run: a kernel, options of scripts/vm, arguments of pytest."""

    name: str
    options: list[str]
    tests: list[str]

    @property
    def is_debug(self) -> bool:
        """Whether the kernel is the debug kernel."""
        return "--debug" in self.options

    @property
    def kernel(self) -> str:
        """What the suite is told as KVMPRIV_KERNEL: it excuses known defects of some kernels."""
        return Plan(self.name, self.is_debug, "--literal" in self.options).variant


def parse(prog: str, description: str | None, arguments: list[str]) -> Run:
    """The command line; a usage error exits with 2."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    usage = f"{prog} NAME [OPTION of scripts/vm]... [-k EXPRESSION] [-- ARGUMENT of pytest]..."
    parser = Parser(prog, description, usage=usage)
    parser.add_argument("name", metavar="NAME", help=kernels.names("or"))
    parser.add_argument("-k", dest="expression", metavar="EXPRESSION", help="as pytest's option")
    known, options = parser.parse_known_args(arguments[:at])
    # Otherwise the argument of an option that only scripts/vm knows would be taken for NAME.
    if arguments[0] != known.name:
        parser.error("NAME comes first")
    if problem := kernels.problem(known.name, "--literal" in options):
        parser.error(problem)
    tests = ["-k", known.expression] if known.expression else []
    return Run(known.name, options, tests + arguments[at + 1 :])


def start(run: Run, limit: int, options: list[str], environment: dict[str, str]) -> int:
    """Run pytest in the VM; scripts/vm's exit status.  The options of `run` override `options`."""
    command = [run.name, "--timeout", str(limit), *options, *run.options]
    environment = {
        "KVMPRIV_REQUIRE": f"host,{run.name}",
        "KVMPRIV_KERNEL": run.kernel,
        **environment,
    }
    for name, value in environment.items():
        command += ["--env", f"{name}={value}"]
    os.chdir(ROOT)
    return vm.main([*command, "--", *PYTEST, *run.tests])


def compile_tests() -> None:
    """Have Python compile the tests here, where the result can be kept, whatever the caller set.

    An emulated machine takes half a minute for it, and its root file system is read-only.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    collect = [*PYTEST, "--collect-only", "tests/private"]
    # A failure is reported by the run in the VM.
    subprocess.run(collect, cwd=ROOT, env=environment, capture_output=True, check=False)


def main(arguments: list[str]) -> int:
    """The command scripts/suite."""
    run = parse("suite", __doc__, arguments)
    compile_tests()
    artifacts = os.environ.get("KVMPRIV_ARTIFACTS")
    options = ["--silence", str(SILENCE)]
    options += ["--output-dir", artifacts] if artifacts else []
    if not any(word.startswith("tests/") for word in run.tests):
        run = run._replace(tests=[*run.tests, "tests/private"])
    return start(run, DEBUG_LIMIT if run.is_debug else LIMIT, options, {})
