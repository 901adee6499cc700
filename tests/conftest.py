"""Fixtures for every test: the suite's own, the checkout and its wheel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import hypothesis
import pytest

import kvmpriv
from kbuild.locks import locked
from private.support.requirements import REQUIRED, check_required

pytest_plugins = ["private.support.fixtures"]

# No test fails because a busy machine took long over one example.
hypothesis.settings.register_profile("kvmpriv", deadline=None)
hypothesis.settings.load_profile("kvmpriv")

ROOT = Path(__file__).resolve().parent.parent

# A shell's job in the background has Ctrl-C ignored, and so would have all that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run have in common (pytest-xdist starts several)."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def wheel(of_this_run: Path) -> Path:
    """The wheel, built from the tree, once in a run."""
    folder = of_this_run / "wheel"
    with locked(of_this_run / "wheel.lock", "is building the wheel"):
        if not folder.exists():
            build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d"]
            partial = of_this_run / "wheel.partial"
            subprocess.run([*build, partial], cwd=ROOT, check=True)
            partial.rename(folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, of_this_run: Path) -> Path:
    """An environment with the wheel and the dependencies of this one, made once in a run."""
    place = of_this_run / "installed" / "env"
    done = place / "done"
    with locked(of_this_run / "installed.lock", "is installing the wheel"):
        if not done.exists():
            venv.create(place, clear=True, with_pip=False)
            (packages,) = place.glob("lib/python*/site-packages")
            (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
            subprocess.run([*pip_in(place), "--no-deps", wheel], check=True)
            done.touch()
    return place


def pip_in(place: Path) -> list[str | Path]:
    """The command that installs into an environment without a pip of its own."""
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", place / "bin" / "python"]
    return [*pip, "install", "--quiet"]


def pytest_configure() -> None:
    check_required()


def pytest_report_header() -> str:
    return (
        f"kvmpriv {kvmpriv.__version__}, required here: {', '.join(sorted(REQUIRED)) or 'nothing'}"
    )
