"""Random steps on the kernel and on a model of what guest and host must see.

KVMPRIV_MODEL_STEPS and KVMPRIV_MODEL_SECONDS bound a run, which fails if these end it before those
are taken.  KVMPRIV_MODEL_SEED repeats one; the script of a failure goes to the folder
KVMPRIV_ARTIFACTS.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from kvmpriv import Kvm

from .support.arch_hook import hook
from .support.behaviour import behaviour_of
from .support.model import MODELS, PAGE, File, Model, Outcome
from .support.model_driver import FILE_SIZE, abi_of
from .support.model_search import EXAMPLES_MIN, STEPS_MIN, search, write_script
from .support.rules import rule
from .support.slot_requests import FILE_OVERLAP
from .support.syscalls import answer

#: Seconds of a search, unless the environment sets them.
SECONDS = 10.0
_LIMIT = float(os.environ.get("KVMPRIV_MODEL_SECONDS") or SECONDS)
_STEPS = int(os.environ.get("KVMPRIV_MODEL_STEPS") or 0) or None

# Beside the search there may be a failure to be shrunk; a step that hangs has a limit of its own.
pytestmark = [
    pytest.mark.usefixtures("no_leak"),
    pytest.mark.timeout(0 if _STEPS or _LIMIT > SECONDS else 600),
]


#: What the steps do to a kernel that has the known defects, by ABI.
_DANGERS = {"restrictedmem": "it writes to pages that a hole has left mapped"}


def _abis(*, convert: bool = False) -> list[Any]:
    """The name of each ABI that has a model; with `convert` of those that convert pages."""
    return [
        pytest.param(
            name, marks=[pytest.mark.dangerous(_DANGERS[name])] if name in _DANGERS else []
        )
        for name, model in MODELS.items()
        if model.can_convert or not convert
    ]


@pytest.fixture(params=_abis())
def abi(request: pytest.FixtureRequest, kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of each ABI that has a model and that this kernel supports."""
    chosen = abi_of(request.param)
    behaviour_of(chosen).require(kvm)
    if not behaviour_of(chosen).shares_files:
        with chosen.create_vm(kvm) as vm, chosen.create_file(vm, PAGE) as file:
            chosen.bind(vm, 0, PAGE, file)
            said = answer(lambda: chosen.bind(vm, PAGE, PAGE, file))
        assert said in FILE_OVERLAP
        monkeypatch.setattr(Model, "file_overlap", said)
    with hook(on=True):
        yield request.param


@rule("model.both-sides", "model.errnos", "model.fault-exits", "model.refused-has-no-effect")
def test_the_kernel_does_what_the_model_says(
    abi: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Slots, states, chosen accesses, holes, and accesses of both sides, in any order."""
    seed = int(os.environ.get("KVMPRIV_MODEL_SEED") or random.SystemRandom().randrange(1 << 32))
    artifacts = Path(os.environ.get("KVMPRIV_ARTIFACTS") or tmp_path)

    def tell(text: str) -> None:
        with capfd.disabled():
            print(f"model: {abi}: seed {seed}: {text}", flush=True)

    tell("begins")
    report = search(
        abi,
        seed=seed,
        steps=_STEPS,
        seconds=_LIMIT if not _STEPS or "KVMPRIV_MODEL_SECONDS" in os.environ else None,
        artifacts=artifacts,
        tell=tell,
    )
    assert not report.failure, (
        f"{report.failure}\nKVMPRIV_MODEL_SEED={report.seed} KVMPRIV_MODEL_STEPS=1 repeats it; "
        f"{report.script} does alone:\n"
        f"{steps_of(report.script)}"
    )
    assert report.examples >= EXAMPLES_MIN
    assert report.steps >= (_STEPS or STEPS_MIN), f"no more in {report.seconds:.0f} s"


def forgets_conversions(abi: str) -> type[Model]:
    """A wrong model, whose conversions change nothing; the search finds that soon."""
    right: Any = MODELS[abi]

    class Forgetful(right):  # type: ignore[misc]  # the class is chosen here
        converted: set[int]
        files: list[File]

        def convert(self, gpa: int, size: int, private: bool, keep: bool) -> Outcome:
            before, files = set(self.converted), [bytes(file.private) for file in self.files]
            outcome = super().convert(gpa, size, private, keep)
            self.converted = before
            for file, private_before in zip(self.files, files, strict=True):
                file.private[:] = private_before
            return outcome

    return cast("type[Model]", Forgetful)


@rule("model.failures-replay")
@pytest.mark.parametrize("abi", _abis(convert=True), indirect=True)
def test_a_failure_becomes_a_script(abi: str, tmp_path: Path) -> None:
    """With a wrong model, the failing steps are reduced, and fail in the same way as a script."""
    report = search(
        abi,
        seed=1,
        steps=5000,
        artifacts=tmp_path,
        shrink_seconds=0,  # Hypothesis goes on drawing for minutes
        shrink_tries=25,
        model_class=forgets_conversions(abi),
    )
    assert report.failure
    assert report.script is not None
    steps = steps_of(report.script).splitlines()
    assert 1 <= len(steps) <= report.shrunk_from / 2, steps
    # By the host, or by a guest that asks for it.
    assert any("'convert'" in line or "'ask'" in line for line in steps)
    status, said = run(report.script)
    assert status == 1, said
    assert "MISMATCH" in said
    assert said.count(" ok ") == len(steps) - 1

    # The same steps with what the right model expects: nothing is wrong with the kernel.
    model = MODELS[abi](file_size=FILE_SIZE)
    right = [(model.do(name, **arguments), name, arguments) for _, name, arguments in report.failed]
    status, said = run(write_script(tmp_path / "right", abi, right, "1"))
    assert status == 0, said
    assert said.count(" ok ") == len(steps)


def steps_of(script: Path | None) -> str:
    """The steps in a script."""
    text = script.read_text() if script else ""
    return "\n".join(line for line in text.splitlines() if line.startswith("    expect("))


def run(script: Path) -> tuple[int, str]:
    """Run a script by itself; returns its exit status and its output."""
    done: Any = subprocess.run(
        [sys.executable, "-I", script], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr
