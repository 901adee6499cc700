"""Guests that a program talks to, in the kernels of scripts/kernel: each kernel boots itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest

from conftest import ROOT
from vm import talk
from vm.test_kernels import image
from vm.test_linux import in_vm

pytestmark = pytest.mark.timeout(2000)

#: Kernel -> the checks that run in it: all in one, in the other those with private memory.
WANTED = {"restrictedmem": "both_", "guest_memfd": ""}
CHECKS = [(name, check) for name, wanted in WANTED.items() for check in talk.names(wanted)]


class Talked(NamedTuple):
    """What a VM has printed, and what each check of talk.py has found in it: "" or a traceback."""

    done: subprocess.CompletedProcess[str]
    found: dict[str, str]


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Talked]:
    """Runs all checks in a kernel's VM, once: pytest would make a parametrized fixture anew."""

    @cache
    def run(name: str) -> Talked:
        folder = tmp_path_factory.mktemp("talk")
        command = [ROOT / "tests/vm/talk.py", folder, image(name), name, WANTED[name]]
        done = in_vm(name, folder, *command)
        results = folder / "talk.json"
        return Talked(done, json.loads(results.read_text()) if results.exists() else {})

    return run


@pytest.mark.parametrize(("kernel", "check"), CHECKS)
def test_a_guest_that_programs_talk_to(
    talked: Callable[[str], Talked], kernel: str, check: str
) -> None:
    done, found = talked(kernel)
    assert done.returncode == 0, done.stderr
    assert found[check] == ""
