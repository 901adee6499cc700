"""The package as a type checker sees it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from conftest import ROOT
from private.support.requirements import missing

SCRIPTS = Path(sysconfig.get_path("scripts"))
PROGRAM = Path(__file__).parent / "typed.py"


def pyright(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run pyright for this environment's Python; skip where it or Node.js is not installed."""
    if not (SCRIPTS / "pyright").exists() or shutil.which("node") is None:
        missing("pyright", "pyright or Node.js is not installed")
    return subprocess.run(
        [SCRIPTS / "pyright", *arguments],
        env={**os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_mypy_knows_the_types_and_finds_the_mistakes() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stdout


def test_pyright_knows_the_types_and_finds_the_mistakes() -> None:
    found = pyright("--warnings", PROGRAM)
    assert found.returncode == 0, found.stdout


def test_every_public_name_has_a_known_type() -> None:
    """No public function, attribute or constant is of a type that a checker has to guess."""
    report = json.loads(
        pyright("--verifytypes", "kvmpriv", "--ignoreexternal", "--outputjson").stdout
    )["typeCompleteness"]
    unknown = [
        f"{symbol['name']}: {diagnostic['message']}"
        for symbol in report["symbols"]
        if symbol["isExported"] and not symbol["isTypeKnown"]
        for diagnostic in symbol["diagnostics"]
    ]
    assert unknown == []
    assert report["exportedSymbolCounts"]["withKnownType"] > 2000
