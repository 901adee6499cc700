"""What the kernels of scripts/kernel are: the probe's verdict, and two witnesses of the v9 ABI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from kbuild import kernels
from kbuild.paths import cache_root
from kvmpriv.cdefs import restrictedmem
from private.support.requirements import missing
from unit import abi, layouts

SCRIPTS = ROOT / "scripts"


def image(name: str) -> Path:
    """A built kernel; building it is `make kernels`, not a test."""
    if not [*cache_root().glob(f"{name}.*/bzImage")]:
        wanted = f"no such kernel is built: scripts/kernel/build {name}"
        missing(name.replace("-", "_"), wanted)
    built = subprocess.run(
        [SCRIPTS / "kernel" / "build", name], check=True, capture_output=True, text=True
    )
    return Path(built.stdout.splitlines()[-1])


def vm(
    name: str, *command: str | Path, options: tuple[str, ...] = (), timeout: int = 100
) -> subprocess.CompletedProcess[str]:
    image(name)
    settings = ("-q", "--timeout", str(timeout), "--env", "KVMPRIV_REQUIRE=host", *options)
    return subprocess.run(
        [SCRIPTS / "vm", name, *settings, "--", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ("name", "options", "verdict", "status"),
    [
        ("restrictedmem", (), "v9 usable", 0),
        (
            "restrictedmem",
            ("--append", "kvm.private_mem_testing=0"),
            "v9 advertised but refused",
            1,
        ),
        ("guest_memfd", (), "guest_memfd private", 0),
        ("guest_memfd-in-place", (), "guest_memfd private", 0),
        ("guest_memfd-in-place", ("--append", kernels.IN_PLACE), "guest_memfd in place", 0),
    ],
)
def test_the_probes_verdict(name: str, options: tuple[str, ...], verdict: str, status: int) -> None:
    done = vm(name, sys.executable, "-m", "kvmpriv", "probe", options=options)
    assert done.stdout.splitlines()[0] == verdict, done.stderr
    assert done.returncode == status


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["restrictedmem", "guest_memfd"])
def test_guests_with_private_memory(name: str) -> None:
    """tests/guest in a kernel with private memory: no test may be skipped for lack of it."""
    pytest_: tuple[str, ...] = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/guest",
    )
    pytest_ += ("tests/host/test_readme.py::test_private_memory",)
    needs = ("--env", "KVMPRIV_REQUIRE=host,private-memory")
    done = vm(name, *pytest_, options=needs, timeout=450)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def run_examples(name: str, *options: str) -> str:
    """Each example checks what guest and host saw, and exits with 0; returns what they print."""
    examples = ("private_page", "conversions", "conversion_race")
    script = " && ".join(f"{sys.executable} scripts/examples/{example}.py" for example in examples)
    done = vm(name, "sh", "-c", script, options=options)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "hidden while private, found when shared",
        "200 conversions beside ",
        "nothing lost, nothing torn",
    ):
        assert line in done.stdout
    return done.stdout


@pytest.mark.parametrize("name", ["restrictedmem", "guest_memfd"])
def test_the_examples(name: str) -> None:
    """The guest finds another page after a conversion; v9's guests convert implicitly, too."""
    printed = run_examples(name)
    assert "ok     private again: the shared page is gone" in printed
    assert ("ok     what the guest writes as shared, the host reads" in printed) == (
        name == "restrictedmem"
    )


@pytest.mark.parametrize(("value", "count"), [("1", 400), ("0", 20)])
def test_a_witness_to_conversion_in_place(tmp_path: Path, value: str, count: int) -> None:
    """A C program finds what the ABI promises, and what 7.3 has if the parameter is off."""
    name = "guest_memfd-in-place"
    headers = image(name).parent / "headers" / "include"
    witness = tmp_path / "witness"
    source = SCRIPTS / "kernel" / "in_place" / "witness.c"
    subprocess.run(["cc", "-static", "-Wall", "-I", headers, "-o", witness, source], check=True)
    options = ("--append", f"kvm.gmem_in_place_conversion={value}", "--output-dir", str(tmp_path))
    done = vm(name, witness, options=options)
    first, *lines, last = done.stdout.splitlines()
    assert (done.returncode, last) == (0, "all is well"), done.stdout + done.stderr
    assert first == f"parameter {'Y' if value == '1' else 'N'}"
    assert len(lines) > count
    assert all(line.startswith("ok ") for line in lines)


def test_two_witnesses_see_the_same(tmp_path: Path) -> None:
    """A C program, built with the patched tree's headers only, and the binding print the same."""
    headers = image("restrictedmem").parent / "headers" / "include"
    witness = tmp_path / "witness"
    source = SCRIPTS / "kernel" / "restrictedmem" / "witness.c"
    subprocess.run(["cc", "-static", "-Wall", "-I", headers, "-o", witness, source], check=True)
    script = (
        f"{witness} >{tmp_path}/c && {sys.executable} {ROOT}/tests/vm/walk.py >{tmp_path}/python"
    )
    done = vm("restrictedmem", "sh", "-c", script, options=("--output-dir", str(tmp_path)))
    assert done.returncode == 0, done.stderr + done.stdout
    c, python = (
        dict(line.rsplit(" ", 1) for line in (tmp_path / name).read_text().splitlines())
        for name in ("c", "python")
    )
    assert python == c
    assert c["done"] == "1"
    assert c["slot.bind"] == "0"
    assert len(c) > 90


def test_the_patched_trees_headers_agree(tmp_path: Path) -> None:
    headers = image("restrictedmem").parent / "headers" / "include"
    ours = {name: value for name, value in vars(restrictedmem).items() if isinstance(value, int)}
    theirs_name = "kvm_userspace_memory_region_ext"
    structs, values = abi.ask_compiler(
        ["<linux/kvm.h>", "<linux/kvm_para.h>", "<linux/magic.h>", "<asm/unistd.h>"],
        {theirs_name: layouts.RESTRICTEDMEM[theirs_name]},
        ours,
        tmp_path,
        "-I",
        str(headers),
    )
    assert structs == {theirs_name: layouts.RESTRICTEDMEM[theirs_name]}
    assert values == ours
