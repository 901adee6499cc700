"""The tutorial, scripts/examples/README.md: each of its steps is executed and its output compared.

Steps 1 to 3 need a KVM only and run on this host, but for the commands that name scripts/vm; the
Python sessions of the later steps run in the restrictedmem kernel.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvmpriv
from conftest import ROOT
from private.support.requirements import missing
from vm.test_kernels import image

pytestmark = pytest.mark.xdist_group("tutorial")

TUTORIAL = (ROOT / "scripts" / "examples" / "README.md").read_text()
STEPS = re.split(r"\n## (?=\d+\. )", TUTORIAL.split("\n## Where to go")[0])[1:]
#: The first step whose Python session needs private memory.
PRIVATE = next(at for at, step in enumerate(STEPS) if step.startswith("4. Private memory"))
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def sessions(steps: list[str], to: Path) -> Path:
    """Write the Python sessions of these steps to a file that doctest reads; returns it."""
    blocks = [block for step in steps for block in re.findall(r"```pycon\n(.*?)```", step, re.S)]
    assert blocks
    to.write_text("\n".join(blocks))
    return to


def commands() -> list[tuple[str, str]]:
    """The shell commands of the tutorial, each with the output that it shows."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", TUTORIAL, re.DOTALL):
        for part in block.split("$ ")[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_every_block_is_executed() -> None:
    """A block in another language would be shown and not executed."""
    assert set(re.findall(r"^```(\w+)", TUTORIAL, re.MULTILINE)) == {"console", "pycon"}
    assert len(STEPS) == 8


def test_the_sessions_without_private_memory(kvm: kvmpriv.Kvm, tmp_path: Path) -> None:
    text = sessions(STEPS[:PRIVATE], tmp_path / "sessions.txt")
    done = run(sys.executable, "-m", "doctest", "-o", "ELLIPSIS", text)
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(400)
def test_the_sessions_with_private_memory(tmp_path: Path) -> None:
    image("restrictedmem")
    text = sessions(STEPS[PRIVATE:], tmp_path / "sessions.txt")
    vm = (ROOT / "scripts" / "vm", "restrictedmem", "-q", "--timeout", "350", "--")
    done = run(*vm, sys.executable, "-m", "doctest", "-o", "ELLIPSIS", text)
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("command", "shown"), [pytest.param(*pair, id=pair[0][:40]) for pair in commands()]
)
def test_the_command(command: str, shown: str) -> None:
    """The commands run in the tutorial's order: a later one may read what an earlier one wrote."""
    if "scripts/vm" in command:
        image("restrictedmem")
    elif not os.access("/dev/kvm", os.R_OK | os.W_OK):
        missing("host", "/dev/kvm can't be opened")
    done = run("bash", "-c", command)
    assert done.returncode == 0, done.stdout
    checker = doctest.OutputChecker()
    assert checker.check_output(shown, done.stdout, doctest.ELLIPSIS), done.stdout
