"""Guests that a program talks to, in the kernels of scripts/kernel: each kernel boots itself."""

from __future__ import annotations

import json

import pytest

from conftest import ROOT
from vm import talk
from vm.test_kernels import image
from vm.test_linux import in_vm

pytestmark = pytest.mark.timeout(2000)

#: Kernel -> the checks that run in it: all in one, in the other those with private memory.
WANTED = {"restrictedmem": "both_", "guest_memfd": ""}
CHECKS = [(name, check) for name, wanted in WANTED.items() for check in talk.names(wanted)]


@pytest.fixture(scope="module")
def talked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What each check of talk.py has found in a kernel: "" or a traceback."""
    name, folder = request.param, tmp_path_factory.mktemp("talk")
    command = [ROOT / "tests/vm/talk.py", folder, image(name), name, WANTED[name]]
    done = in_vm(name, folder, *command)
    assert done.returncode == 0, done.stderr
    results: dict[str, str] = json.loads((folder / "talk.json").read_text())
    return results


@pytest.mark.parametrize(("talked", "check"), CHECKS, indirect=["talked"])
def test_a_guest_that_programs_talk_to(talked: dict[str, str], check: str) -> None:
    assert talked[check] == ""
