"""``kvmpriv selftest`` from the wheel in both kernels, and the comparison of the two results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from conftest import ROOT
from unit.ktap import parse

from .test_kernels import vm

pytestmark = [pytest.mark.xdist_group("selftest"), pytest.mark.timeout(1900)]

SCHEMA = json.loads((ROOT / "kvmpriv/selftest/schema.json").read_text())
#: A rule of each ABI, and one that both have.
RULES = ["v9.syscall.flags", "gm.create.size", "v9.hook.on", "gm.attr.align"]
V9, GUEST_MEMFD = RULES[::2], RULES[1::2]


def compile_suite(place: Path) -> None:
    """Have Python compile the suite of an installed wheel; `kvmpriv selftest` writes nothing."""
    (suite,) = place.glob("lib/python*/site-packages/kvmpriv/_suite")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command: list[str | Path] = [place / "bin" / "python", "-m", "pytest", "--collect-only"]
    command += ["-q", "-p", "no:cacheprovider", f"--rootdir={suite}", f"-c{os.devnull}"]
    command += ["--import-mode=append", suite]
    subprocess.run(command, cwd=place, env=environment, capture_output=True, check=True)


@pytest.fixture(scope="module")
def documents(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A document of each kernel, and a --ktap run of restrictedmem."""
    folder = tmp_path_factory.mktemp("selftest")
    compile_suite(installed)
    found = {}
    for name in ("restrictedmem", "guest_memfd"):
        selftest = f"{installed}/bin/python -m kvmpriv selftest"
        rules = " ".join(RULES)
        script = f"cd / && {selftest} --json {rules} >{folder}/{name}.json"
        if name == "restrictedmem":
            script += f" && {selftest} --ktap {rules} >{folder}/{name}.ktap"
        output = ("--output-dir", str(folder))
        done = vm(name, "sh", "-c", script, options=output, timeout=900)
        assert done.returncode == 0, done.stderr + done.stdout
        found[name] = folder / f"{name}.json"
    return found


@pytest.mark.parametrize(
    ("name", "release", "verdict", "abi", "passed", "skipped"),
    [
        ("restrictedmem", "6.1.", "v9 usable", "v9", V9, GUEST_MEMFD),
        ("guest_memfd", "7.", "guest_memfd private", "guest_memfd", GUEST_MEMFD, V9),
    ],
)
def test_what_a_kernel_has(
    documents: dict[str, Path],
    name: str,
    release: str,
    verdict: str,
    abi: str,
    passed: list[str],
    skipped: list[str],
) -> None:
    found = json.loads(documents[name].read_text())
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert found["host"]["release"].startswith(release)
    assert found["host"]["verdict"] == verdict
    assert found["host"]["abis"] == [abi]
    results = {rule["rule"]: rule["result"] for rule in found["rules"] if rule["rule"] in RULES}
    assert results == dict.fromkeys(passed, "passed") | dict.fromkeys(skipped, "skipped")


def test_ktap(documents: dict[str, Path]) -> None:
    tests = json.loads(documents["restrictedmem"].read_text())["tests"]
    ktap = parse(documents["restrictedmem"].with_suffix(".ktap").read_text())
    assert ktap.plan == len(tests)
    for test in tests:
        why = f"SKIP {test['message']}" if test["result"] == "skipped" else ""
        assert ktap.tests[test["test"]] == (True, why)


def test_side_by_side(documents: dict[str, Path]) -> None:
    compare = [sys.executable, "-m", "kvmpriv", "selftest", "--compare"]
    a, b = documents["restrictedmem"], documents["guest_memfd"]
    done = subprocess.run([*compare, a, b], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    marked = {
        (cells[2], *cells[:2])
        for cells in map(str.split, done.stdout.splitlines())
        if len(cells) > 2
    }
    assert marked >= {(name, "passed", "skipped") for name in V9}
    assert marked >= {(name, "skipped", "passed") for name in GUEST_MEMFD}
    assert subprocess.run([*compare, a, a], capture_output=True).returncode == 0
