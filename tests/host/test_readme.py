"""The README: its examples run, its printed outputs are compared, its commands exist."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvmpriv
from conftest import ROOT
from private.support.requirements import missing

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example(kvm: kvmpriv.Kvm, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PYTHON[0], "README.md", "exec"), {})
    expected = re.search(r"print\(vcpu.exit\(\)\)  # (.*)", PYTHON[0])
    assert expected is not None
    assert capsys.readouterr().out == expected[1] + "\n"


def test_private_memory(kvm: kvmpriv.Kvm, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what its comment shows, or raises OSError with the reason."""
    example = compile(PYTHON[1], "README.md", "exec")
    try:
        kvmpriv.private.choose(kvm)
    except OSError as lacking:
        reason = lacking.strerror or ""
        with pytest.raises(OSError, match=re.escape(reason)):
            exec(example, {"kvmpriv": kvmpriv})
        missing("private-memory", reason)
    exec(example, {"kvmpriv": kvmpriv})
    expected = re.search(r"print\(.*\)  # (.*)", PYTHON[1])
    assert expected is not None
    assert capsys.readouterr().out == expected[1] + "\n"


def test_declare(vm: kvmpriv.Vm) -> None:
    """The kernel, which lacks KVM_FOO, answers ENOTTY; everything before that works."""
    with pytest.raises(OSError, match=r"KVM_FOO\(gpa=0x1000, flags=1\)") as refusal:
        exec(compile(PYTHON[4], "README.md", "exec"), {"kvmpriv": kvmpriv, "vm": vm})
    assert refusal.value.errno == errno.ENOTTY
    assert len(PYTHON) == 5
    assert "LinuxGuest" in PYTHON[2], "tests/vm/talk.py executes it"


@pytest.mark.timeout(900)
def test_the_demos_output(kvm: kvmpriv.Kvm) -> None:
    (shown,) = re.findall(r"```\n(guest_memfd shared only\n.*?)```", README, re.DOTALL)
    probe = [sys.executable, "-m", "kvmpriv", "probe", "-q"]
    verdict = subprocess.run(probe, capture_output=True, text=True).stdout.strip()
    if verdict != "guest_memfd shared only":
        missing("shared-only-host", f"the README shows one, this host is {verdict!r}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kernels = Path(os.environ.get("KVMPRIV_CACHE") or cache / "kvmpriv" / "kernels")
    if not [*kernels.glob("restrictedmem.*/bzImage")]:
        missing("restrictedmem", "the demo's kernel is not built: make kernels")
    demo = subprocess.run(
        [ROOT / "scripts" / "demo"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert demo.returncode == 0, demo.stderr
    lines = demo.stdout.splitlines()
    wanted = [line for line in shown.splitlines() if line not in ("", "...")]
    assert len(wanted) > 10
    position = 0
    for line in wanted:  # all of them, in this order
        assert line in lines[position:]
        position += lines[position:].index(line) + 1


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^ {4}make (\w+)", README, re.MULTILINE)
    assert targets
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


def test_the_continuous_integration_runs_the_documented_commands() -> None:
    assert re.search(r"^make check test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert "\n    make test " in README


@pytest.mark.parametrize("command", ["probe", "ps", "run", "boot", "trace", "selftest"])
def test_the_options_in_the_table_of_commands_exist(command: str) -> None:
    table = README.split("\n## Commands\n")[1].split("\n## ")[0]
    (row,) = re.findall(rf"^\| `kvmpriv {command}\b.*", table, re.MULTILINE)
    help_ = subprocess.run(
        [sys.executable, "-m", "kvmpriv", command, "--help"], capture_output=True, text=True
    )
    for option in re.findall(r"--[a-z]+", row):
        assert option in help_.stdout
