"""scripts/suite and scripts/soak: what they run, without a VM."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kbuild import kernels, soak, suite, vm
from kbuild.errors import Refused, Status
from kbuild.process import exit_on
from kbuild.recipe import Plan
from private.support.requirements import REQUIREMENTS

Main = Callable[[list[str]], int]
NAME = "restrictedmem"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The arguments with which scripts/vm is called."""
    found: list[str] = []

    def main(arguments: list[str]) -> int:
        found.extend(arguments)
        return 7

    monkeypatch.setattr(vm, "main", main)
    monkeypatch.setattr(suite, "compile_tests", lambda: None)
    monkeypatch.setattr(os, "chdir", lambda path: None)
    monkeypatch.setenv("ARTIFACTS", str(tmp_path / "artifacts"))
    for name in ("KVMPRIV_ARTIFACTS", "HOURS", "STEPS", "SEED"):
        monkeypatch.delenv(name, raising=False)
    return found


def value(asked: list[str], option: str) -> str:
    """The last value of an option; the last one counts."""
    return asked[len(asked) - asked[::-1].index(option)]


@pytest.mark.parametrize("main", [suite.main, soak.main])
@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ("", ""),
        ("--literal", "-literal"),
        ("--debug --append nosmp", "-debug"),
        ("--literal --debug", "-debug-literal"),
    ],
)
def test_the_kernel_is_named(asked: list[str], main: Main, options: str, kernel: str) -> None:
    """The suite expects the known defects of v9 as posted in that kernel, and in no other."""
    assert main([NAME, *options.split()]) == 7
    assert f"KVMPRIV_KERNEL={NAME}{kernel}" in asked
    assert f"KVMPRIV_REQUIRE=host,{NAME}" in asked
    assert asked[0] == NAME
    assert set(options.split()) <= set(asked)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ([], "1500"),
        (["--literal"], "1500"),
        (["--debug"], "5400"),
        (["--literal", "--debug"], "5400"),
        (["--debug", "--timeout", "60"], "60"),
    ],
)
def test_the_time_limit(asked: list[str], options: list[str], limit: str) -> None:
    """A debug kernel has more time, whatever the other options are; --timeout comes last."""
    suite.main([NAME, *options])
    assert value(asked, "--timeout") == limit


def test_what_pytest_is_given(asked: list[str]) -> None:
    """The suite, or what comes after `--`; -k as pytest's own."""
    suite.main([NAME, "--cpus", "4", "-k", "slot and not race", "--", "-x"])
    at = asked.index("--")
    assert asked[at + 1 :] == [
        *suite.PYTEST, "-k", "slot and not race", "-x", "tests/private"
    ]  # fmt: skip
    assert asked[at - 2 : at] != ["-k", "slot and not race"]
    assert value(asked[:at], "--cpus") == "4"
    asked.clear()
    suite.main([NAME, "--", "tests/private/test_rules.py"])
    assert asked[-1] == "tests/private/test_rules.py"
    assert "tests/private" not in asked


def test_what_a_soak_is_given(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The time, the steps and the seed; a VM may take half an hour more."""
    monkeypatch.setenv("HOURS", "0.1")
    monkeypatch.setenv("STEPS", "500")
    soak.main([NAME])
    assert value(asked, "--timeout") == "2160"
    assert value(asked, "--output-dir") == str(tmp_path / "artifacts")
    assert (tmp_path / "artifacts").is_dir()
    assert {"KVMPRIV_MODEL_SECONDS=360", "KVMPRIV_MODEL_STEPS=500", "KVMPRIV_MODEL_SEED="} <= {
        *asked
    }
    assert asked[-1] == f"does_what_the_model_says and {NAME}"


@pytest.mark.parametrize(
    "given", [["-k", "mmio or x"], ["-kmmio or x"], ["-k=mmio or x"]], ids=["two", "one", "equals"]
)
def test_a_soak_of_fewer_tests(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str]
) -> None:
    """The caller's -k selects among the model's tests: pytest would take the last -k alone."""
    soak.main([NAME, "--", "-v", *given, "--durations=1"])
    model = f"does_what_the_model_says and {NAME}"
    assert asked[-4:] == ["-k", f"{model} and (mmio or x)", "-v", "--durations=1"]


@pytest.mark.parametrize("main", [suite.main, soak.main])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: NAME"),
        (["bogus"], "unknown kernel 'bogus': there are restrictedmem"),
        (["guest_memfd", "--literal"], "guest_memfd has none"),
        (["--append", "nosmp", NAME], "NAME comes first"),
        (["bogus/", "--source", "."], "bogus/ is an image: give one of them"),
    ],
)
def test_usage(
    asked: list[str],
    main: Main,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A usage error is one sentence, and exit status 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == (255 if "--source" in arguments else 2)
    assert words in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize("hours", ["long", "inf", "nan", "-1", "0"])
def test_hours_that_are_no_number(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, hours: str
) -> None:
    """Hours that are not a number above 0 are a usage error."""
    monkeypatch.setenv("HOURS", hours)
    assert soak.main([NAME]) == 2
    assert asked == []


def test_empty_hours_are_the_default(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As with STEPS and SEED, an empty variable is one that is not set."""
    monkeypatch.setenv("HOURS", "")
    assert soak.main([NAME]) == 7
    assert "KVMPRIV_MODEL_SECONDS=3600" in asked


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup scripts/soak` runs on when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        exit_on(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_clone_without_an_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names what is missing, and how to install it; no VM is started."""
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    assert suite.main([NAME]) == Status.USAGE
    said = capsys.readouterr().err
    assert said.startswith(
        f"suite: {tmp_path} has no .venv/bin/python, which runs the tests: `make"
    )


def test_an_image(asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is known of its kernel: the caller says what it must support, if anything."""
    image = tmp_path / "bzImage"
    monkeypatch.delenv("KVMPRIV_REQUIRE", raising=False)
    assert suite.main([str(image), "-k", "slot"]) == 7
    assert asked[0] == str(image)
    assert {"KVMPRIV_REQUIRE=host", "KVMPRIV_KERNEL="} <= {*asked}
    asked.clear()
    monkeypatch.setenv("KVMPRIV_REQUIRE", "guest_memfd")
    suite.main([str(image)])
    assert "KVMPRIV_REQUIRE=host,guest_memfd" in asked


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that are built, in no time."""
    plans: list[Plan] = []

    def find_or_build(plan: Plan) -> Path:
        plans.append(plan)
        return Path("entry")

    monkeypatch.setattr(suite, "find_or_build", find_or_build)
    return plans


@pytest.mark.parametrize(
    ("arguments", "name"),
    [([], "guest_memfd"), ([NAME], NAME), (["guest_memfd-6.12"], "guest_memfd-6.12")],
)
def test_a_tree(
    asked: list[str], built: list[Plan], tmp_path: Path, arguments: list[str], name: str
) -> None:
    """The tree is built, with the config of guest_memfd if no other is named, and booted."""
    suite.main([*arguments, "--source", str(tmp_path), "--append", "nosmp"])
    assert built == [Plan(name, source=tmp_path)]
    assert asked[0] == name
    assert value(asked, "--source") == str(tmp_path)
    assert value(asked, "--append") == "nosmp"
    assert f"KVMPRIV_REQUIRE=host,{'guest_memfd' if 'guest' in name else name}" in asked


@pytest.mark.parametrize(
    ("append", "required"),
    [
        ([], "guest_memfd"),
        (["--append", "nosmp kvm.gmem_in_place_conversion=1"], "guest_memfd_in_place"),
        (["--append=kvm.gmem_in_place_conversion=1"], "guest_memfd_in_place"),
        (["--append", "kvm.gmem_in_place_conversion=0"], "guest_memfd"),
    ],
)
def test_a_parameter_that_replaces_the_abi(
    asked: list[str], built: list[Plan], tmp_path: Path, append: list[str], required: str
) -> None:
    """The suite requires the ABI that the kernel has with its command line."""
    suite.main(["guest_memfd-in-place", *append])
    has = ",".join(kernels.NEWEST_HAS)
    assert f"KVMPRIV_REQUIRE=host,{required},{has}" in asked
    asked.clear()
    suite.main(["--source", str(tmp_path), *append])
    assert f"KVMPRIV_REQUIRE=host,{required}" in asked
    asked.clear()
    suite.main(["guest_memfd", *append])
    assert f"KVMPRIV_REQUIRE=host,guest_memfd,{has}" in asked


def test_what_a_kernel_has_is_required_of_it() -> None:
    """Not of a tree of one's own, and not of the kernels whose config lacks it."""
    for name, kernel in kernels.KERNELS.items():
        assert set(kernel.has) <= set(REQUIREMENTS)
        assert kernels.required(name, [], own_tree=True) == f"host,{kernel.abi}"
    assert kernels.required("guest_memfd-6.12", [], own_tree=False) == "host,guest_memfd"
    assert kernels.required("guest_memfd", [], own_tree=False).endswith(",numa,numa-migration")


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (0, 0),
        (1, 1),
        (vm.COMPLAINT, 1),
        (vm.PANIC, 1),
        (vm.LOST, 1),
        (vm.TIMEOUT, 1),
        (vm.NO_BOOT, 125),
        (vm.RUNNER, 255),
        (5, 255),  # pytest: no test was selected
        (130, 130),
    ],
)
def test_what_git_bisect_is_told(
    built: list[Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, verdict: int
) -> None:
    """Good, bad, to be skipped; 128 and above end a bisection."""
    monkeypatch.setattr(suite, "compile_tests", lambda: None)
    monkeypatch.setattr(vm, "main", lambda arguments: status)
    monkeypatch.chdir(tmp_path)
    assert suite.main(["--source", str(tmp_path)]) == verdict
    assert len(built) == 1


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (Refused(Status.COMPILE, "make bzImage failed"), 125),
        (Refused(Status.CONFIG, "an option was lost"), 125),
        (Refused(Status.PATCH, "a patch does not apply"), 125),
        (Refused(Status.SPACE, "no space"), 255),
        (Refused(Status.USAGE, "missing: gcc"), 255),
        (Refused(Status.NO_SOURCE, "not a Linux source tree"), 255),
        (OSError(28, "No space left on device"), 255),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_tree_that_is_not_built(
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    verdict: int,
) -> None:
    """A commit that does not build is skipped; what is not its fault ends the bisection."""

    def find_or_build(plan: Plan) -> Path:
        raise error

    monkeypatch.setattr(suite, "find_or_build", find_or_build)
    assert suite.main(["--source", str(tmp_path)]) == verdict
    assert asked == []
    if verdict != 130:
        assert f"suite: {error}" in capsys.readouterr().err
