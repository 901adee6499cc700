"""Fixtures for every test: the suite's own, the checkout and its wheel."""

from __future__ import annotations

import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import hypothesis
import pytest

import kvmpriv
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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", ROOT],
        cwd=folder,
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and the dependencies of this one."""
    place = tmp_path_factory.mktemp("installed") / "env"
    venv.create(place, with_pip=False)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", wheel], check=True)
    return place


def pytest_configure() -> None:
    check_required()


def pytest_report_header() -> str:
    return (
        f"kvmpriv {kvmpriv.__version__}, required here: {', '.join(sorted(REQUIRED)) or 'nothing'}"
    )
