"""The search for a mismatch, on simulated kernels with a known fault."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st

from private.support import model_search
from private.support.model import MODELS, Model
from private.support.model_driver import FILE_SIZE, PAGE
from private.support.model_search import (
    EXAMPLES_MIN,
    LAYOUTS,
    SMALL,
    Machine,
    MismatchError,
    Report,
    Step,
    search,
)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ABI = "restrictedmem"
#: Few, and short: these tests are not about the drawing.
STEPS: list[Step] = [
    ("convert", {"gpa": SMALL, "size": PAGE, "private": False, "keep": True}),
    ("poke", {"offset": 0, "data": b"some"}),
]


class Kernel:
    """Behaves as the model, except for one step after a number of conversions."""

    name, after = "convert", 30
    fault: Any = "odd"
    made: ClassVar[list[Kernel]]

    def __init__(self, abi: str) -> None:
        self.model, self.conversions, self.closed = MODELS[abi](file_size=FILE_SIZE), 0, False
        self.made.append(self)

    def close(self) -> None:
        self.closed = True

    def do(self, name: str, **arguments: Any) -> Any:
        outcome = self.model.do(name, **arguments)
        if name == self.name and self.conversions >= self.after:
            if isinstance(self.fault, Exception):
                raise self.fault
            outcome = self.fault
        self.conversions += name == "convert"
        return outcome


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> type[Kernel]:
    class Own(Kernel):
        made: ClassVar[list[Kernel]] = []

    monkeypatch.setattr(model_search, "Driver", Own)
    some = st.lists(st.sampled_from(STEPS), max_size=5)
    monkeypatch.setattr(model_search, "examples", lambda abi: some)
    return Own


def found(folder: Path, **options: Any) -> Report:
    """The report of a failure, which is reproduced in a new VM, and by its script."""
    report = search(ABI, seed=1, steps=5000, artifacts=folder, shrink_tries=40, **options)
    assert report.failure
    assert report.script is not None
    assert len(report.script.read_text().split("\n    expect(")) == len(report.failed) + 1
    machine = Machine(ABI, MODELS[ABI])
    assert machine.failing(report.failed) == report.failed
    machine.close()
    return report


def conversions(report: Report) -> int:
    return sum(name == "convert" for _, name, _ in report.failed)


@pytest.mark.parametrize("shrink_seconds", [0, 2])
@pytest.mark.parametrize(("name", "after"), [("convert", 27), ("convert", 30), ("poke", 3)])
def test_what_is_left_of_a_failure_fails_alone(
    kernel: type[Kernel], tmp_path: Path, name: str, after: int, shrink_seconds: float
) -> None:
    """A failure counts only if it is reproduced in a new VM."""
    kernel.name, kernel.after = name, after
    report = found(tmp_path, shrink_seconds=shrink_seconds)
    assert conversions(report) == after + (name == "convert")
    assert all(one.closed for one in kernel.made)
    whole, shrunk = sorted(tmp_path.iterdir(), key=lambda path: -path.stat().st_size)
    assert whole.stem == f"{shrunk.stem}-whole"
    assert shrunk == report.script


@pytest.mark.parametrize("after", [0, 8, 30])
def test_what_the_driver_raises_leaves_a_script(
    kernel: type[Kernel], tmp_path: Path, after: int
) -> None:
    kernel.after, kernel.fault = after, ValueError("which nobody expects")
    report = found(tmp_path, shrink_seconds=0)
    assert "got \"ValueError('which nobody expects')\"" in report.failure
    assert conversions(report) == after + 1


def test_the_script_of_all_steps_is_there_before_it_is_shrunk(
    kernel: type[Kernel], tmp_path: Path
) -> None:
    """It is also the result if no step can be left out, or the time is up."""
    told: list[str] = []
    seen: list[list[Path]] = []

    def tell(text: str) -> None:
        told.append(text)
        seen.append(list(tmp_path.iterdir()))

    report = search(
        ABI, seed=7, steps=5000, artifacts=tmp_path, shrink_seconds=0, shrink_tries=0, tell=tell
    )
    assert report.script == tmp_path / "replay-restrictedmem-7-whole.py"
    assert seen == [[report.script]] * 2
    assert str(report.script) in told[0]


def test_the_seed_of_a_failure_is_that_of_its_round(kernel: type[Kernel], tmp_path: Path) -> None:
    """That seed alone reproduces it."""
    kernel.name, kernel.after = "poke", 50
    report = search(ABI, seed=1, steps=5000, artifacts=tmp_path, shrink_seconds=0, shrink_tries=0)
    again = search(
        ABI, seed=report.seed, steps=1, artifacts=tmp_path, shrink_seconds=0, shrink_tries=0
    )
    assert report.seed > 1, "the failure is not in the first round"
    assert again.failed == report.failed
    assert (again.seed, again.failure) == (report.seed, report.failure)
    assert report.failure.startswith(f"seed {report.seed}")


@pytest.fixture
def machine(kernel: type[Kernel]) -> Machine:
    """A machine with a slot of six pages, which is correct except for what a test changes."""
    kernel.name = "none"
    made = Machine(ABI, MODELS[ABI])
    made.take(*LAYOUTS[1][0])
    return made


def its(machine: Machine) -> Model:
    """The state of its simulated kernel."""
    assert isinstance(machine.driver, Kernel)
    return machine.driver.model


def test_a_file_that_should_be_empty_is_read_back(machine: Machine) -> None:
    """A hole that freed nothing is found although no slot is left."""
    machine.do("write", cpu=0, gpa=SMALL + 5 * PAGE, data=b"private")
    machine.do("delete", slot=0)
    its(machine).punch = lambda file, offset, size: "ok"  # type: ignore[method-assign]
    machine.do("punch", file=0, offset=0, size=FILE_SIZE)
    with pytest.raises(MismatchError, match=r"read.*\n.*got 70 72 69 76 61 74 65"):
        machine.sweep()


def test_where_the_guest_should_stop_both_ends_are_tried(machine: Machine) -> None:
    machine.do("want", cpu=0, gpa=SMALL + PAGE, size=3 * PAGE, private=False)
    machine.look()
    del its(machine).wishes[SMALL // PAGE + 3]
    with pytest.raises(MismatchError, match=r"load.*\n.*got 0"):
        machine.look()


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> ModuleType:
    """The suite's model test; the suite's conftest registers its marks."""
    for mark in ("dangerous", "rule"):
        request.config.addinivalue_line("markers", mark)
    return importlib.import_module("private.test_model")


@pytest.mark.parametrize(("wanted", "taken"), [(None, 100), (5000, 5000), (1, 1)])
@pytest.mark.parametrize("enough", [True, False])
def test_a_run_is_held_to_the_steps_that_were_wanted(
    wanted: int | None,
    taken: int,
    enough: bool,
    suite: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A run with fewer steps than required fails, whatever ended it."""
    report = Report(seed=1, steps=taken if enough else taken - 1, examples=EXAMPLES_MIN)
    monkeypatch.setattr(capfd, "disabled", nullcontext)
    monkeypatch.setattr(suite, "search", lambda *_, **__: report)
    monkeypatch.setattr(suite, "_STEPS", wanted)
    with nullcontext() if enough else pytest.raises(AssertionError, match="no more in 0 s"):
        suite.test_the_kernel_does_what_the_model_says(ABI, tmp_path, capfd)


def test_what_a_failure_says_repeats_it(
    suite: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command has the failing round's seed, and no time limit that could end it earlier."""
    report = Report(seed=23, failure="odd")
    monkeypatch.setenv("KVMPRIV_MODEL_SEED", "20")
    monkeypatch.setattr(capfd, "disabled", nullcontext)
    monkeypatch.setattr(suite, "search", lambda *_, **__: report)
    says = r"^odd\n *KVMPRIV_MODEL_SEED=23 KVMPRIV_MODEL_STEPS=1 repeats it"
    with pytest.raises(AssertionError, match=says):
        suite.test_the_kernel_does_what_the_model_says(ABI, tmp_path, capfd)
