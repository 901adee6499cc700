"""The wheel: pure Python, and can be installed without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

from conftest import pip_in
from private.support.requirements import missing


def test_the_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".c", ".pyc"))]
    needs = (
        "cdefs/kvm.py",
        "cdefs/kvm.pyi",
        "cdefs/kvm_structs.py",
        "cdefs/include/kvm.h",
        "guest/ready.py",
        "probe/schema.json",
        "probe/profiles/v9.profile",
        "trace/page.css",
        "trace/schema.json",
        "ps/schema.json",
        "py.typed",
        "_suite/support/rules.py",
        "CHANGELOG.md",
    )
    for needed in needs:
        assert f"kvmpriv/{needed}" in names


def test_its_metadata_fits_a_package_index(wheel: Path) -> None:
    """A licence expression, an author and keywords; a description without links into the tree."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Author"]
    assert metadata["Keywords"]
    description = metadata.get_payload()
    assert isinstance(description, str)
    assert description.startswith("# kvmpriv\n")
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert [target for target in targets if not target.startswith(("http", "#"))] == []


def test_it_installs_and_runs_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "env"
    venv.create(place, with_pip=False)
    # A PATH with nothing on it: no cc, no ld, no as.
    environment = {"PATH": str(tmp_path / "nothing"), "HOME": str(tmp_path)}
    for name in ("PIP_INDEX_URL", "PIP_CONFIG_FILE", "PIP_FIND_LINKS", "https_proxy"):
        if name in os.environ:
            environment[name] = os.environ[name]
    assert shutil.which("cc", path=environment["PATH"]) is None
    python = place / "bin" / "python"
    # What pip would compile to Python's byte code, it compiles when it is imported.
    installed = subprocess.run(
        [*pip_in(place), "--no-compile", "--only-binary", ":all:", wheel],
        env=environment,
        capture_output=True,
        text=True,
    )
    if "Could not find a version" in installed.stderr or "Max retries" in installed.stderr:
        missing("network", f"what kvmpriv depends on can't be had: {installed.stderr[-200:]}")
    assert installed.returncode == 0, installed.stderr
    # From here on the checkout is out of reach.
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    for command in ([place / "bin" / "kvmpriv"], [python, "-m", "kvmpriv"]):
        helped = subprocess.run([*command, "--help"], **options)  # type: ignore[call-overload]
        assert helped.returncode == 0, helped.stderr
        assert "probe" in helped.stdout
        mistaken = subprocess.run([*command, "prob"], **options)  # type: ignore[call-overload]
        assert mistaken.returncode == 2
        assert "there is no command 'prob'" in mistaken.stderr
    program = (
        "import kvmpriv; abi = kvmpriv.declare('#define A _IOW(KVMIO, 1, struct kvm_regs)');"
        "print(hex(abi.A), kvmpriv.__file__)"
    )
    said = subprocess.run([python, "-c", program], **options)  # type: ignore[call-overload]
    assert said.stdout.startswith("0x4090ae01 "), said.stderr
    assert str(place) in said.stdout
