"""``git bisect run scripts/suite --source``, on a repository whose trees build in a second.

The trees are imitations, whose image says how its VM would end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from kbuild import vm

from .test_build import MAKEFILE, commit, git

#: The commits, from the oldest to the newest: how the VM ends, and what git is to be told.
COMMITS = [
    ("0", 0),
    (f"{vm.NO_BOOT}", 125),
    ("0", 0),
    ("broken", 125),  # does not compile
    ("0", 0),
    (f"{vm.PANIC}", 1),
    ("1", 1),
    ("1", 1),
]
FIRST_BAD = 5
SUITE = f"""\
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
from kbuild import suite, vm

def boot(arguments):
    return int(vm.find_image(vm.parse(arguments)).read_text())

vm.main = boot
suite.compile_tests = lambda: None
sys.exit(suite.main(sys.argv[1:]))
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit for each entry of COMMITS."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "nobody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "nobody@example.org")
    monkeypatch.setenv("KVMPRIV_CACHE", str(tmp_path / "cache"))
    tree = tmp_path / "tree"
    tree.mkdir()
    git(tree, "init", "-q")
    (tree / "Kbuild").touch()
    (tree / "Makefile").write_text(MAKEFILE)
    for number, (ends, _) in enumerate(COMMITS):
        (tree / "body").write_text(f"{ends}\n")
        (tree / "number").write_text(f"{number}\n")
        commit(tree, f"commit {number}")
    return tree


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """scripts/suite with a VM that ends as the image says."""
    script = tmp_path / "suite.py"
    script.write_text(SUITE)
    return [sys.executable, str(script), "--source", ".", "--cpus", "2", "-k", "test_slots"]


def test_each_commit(repository: Path, command: list[str]) -> None:
    """A commit is good, bad, or neither: one that does not compile or does not boot."""
    for number, (_, told) in enumerate(COMMITS):
        git(repository, "checkout", "-q", f"HEAD~{len(COMMITS) - 1 - number}")
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert done.returncode == told, (number, done.stderr)
        git(repository, "checkout", "-q", "-")


def test_bisection_names_the_commit_that_breaks_a_rule(
    repository: Path, command: list[str]
) -> None:
    """Commits that can't be tried are skipped, and the first bad one is found."""
    git(repository, "bisect", "start", "HEAD", f"HEAD~{len(COMMITS) - 1}")
    assert re.search(r"commit 3$", git(repository, "log", "-1", "--format=%s"))
    done = subprocess.run(
        ["git", "bisect", "run", *command], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = git(repository, "bisect", "log")
    assert re.search(rf"# first bad commit: \[\w+\] commit {FIRST_BAD}\n?", log), log
    assert re.search(r"# skip: \[\w+\] commit 3\n", log)


def test_a_fault_of_the_machine_ends_the_bisection(
    repository: Path, command: list[str], tmp_path: Path
) -> None:
    """Without a cache no commit can be tried: git stops at once, and blames none."""
    (tmp_path / "file").touch()
    git(repository, "bisect", "start", "HEAD", f"HEAD~{len(COMMITS) - 1}")
    done = subprocess.run(
        ["git", "bisect", "run", *command],
        cwd=repository,
        env=os.environ | {"KVMPRIV_CACHE": str(tmp_path / "file")},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "suite: [Errno" in done.stderr
    assert "# first bad commit" not in git(repository, "bisect", "log")
