"""Guests that a program talks to, in the kernels of scripts/kernel: each kernel boots itself.

The tests are in talk.py, and get their guests from kvmpriv's plugin.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
from junitparser import JUnitXml, TestCase

from vm import talk
from vm.test_kernels import image
from vm.test_linux import in_vm

pytestmark = pytest.mark.timeout(2000)

#: It boots eight guests, for which 7.3.4's kernel needs four minutes under QEMU's emulation.
EIGHT = "test_several"
#: The example for which only v9's kernel has /dev/port and /dev/mem.
DEVICES = "test_own_devices"
#: What an older kernel's vsock must do, too.
VSOCK = "test_vsock"
#: Kernel -> the tests that run in it: all others in one, in v9's those of both kinds of guests.
WANTED = {
    "restrictedmem": [
        name
        for name in talk.names()
        if name.endswith(("[shared]", "[private]")) or name in (EIGHT, DEVICES, VSOCK)
    ],
    "guest_memfd": [name for name in talk.names() if name != EIGHT],
}
#: Those of a kernel run in one process: they share the VM.
MARKS = {kernel: [pytest.mark.xdist_group(f"talk in {kernel}")] for kernel in WANTED}
MARKS["restrictedmem"].append(pytest.mark.second_kernel)
TESTS = [
    pytest.param(kernel, name, marks=MARKS[kernel])
    for kernel, names in WANTED.items()
    for name in names
]


class Talked(NamedTuple):
    """What a VM has printed, and the problems that each test of talk.py has found in it."""

    done: subprocess.CompletedProcess[str]
    found: dict[str, list[str]]


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Talked]:
    """Runs all tests in a kernel's VM, once: pytest would make a parametrized fixture anew."""

    @cache
    def run(kernel: str) -> Talked:
        folder = tmp_path_factory.mktemp("talk")
        report = folder / "junit.xml"
        tests = [f"tests/vm/talk.py::{name}" for name in WANTED[kernel]]
        options = ["-p", "no:cacheprovider", "--timeout=600", "--linux-guest-required"]
        options += [f"--linux-kernel={image(kernel)}", f"--junitxml={report}"]
        done = in_vm(kernel, folder, "-m", "pytest", *options, *tests, seconds=1900)
        cases = JUnitXml.fromfile(str(report)) if report.exists() else ()
        return Talked(done, {case.name: problems(case) for suite in cases for case in suite})

    return run


def problems(case: TestCase) -> list[str]:
    """Why a test failed, or was not run."""
    return [f"{type(result).__name__}: {result.text}" for result in case.result]


@pytest.mark.parametrize(("kernel", "test"), TESTS)
def test_a_guest_that_programs_talk_to(
    talked: Callable[[str], Talked], kernel: str, test: str
) -> None:
    done, found = talked(kernel)
    assert test in found, f"it did not run: {done.stdout}{done.stderr}"
    assert not found[test], "\n".join(found[test])
