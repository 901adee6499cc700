"""scripts/suite and scripts/soak: what they run, without a VM."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kbuild import soak, suite, vm
from kbuild.process import exit_on

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


@pytest.mark.parametrize("main", [suite.main, soak.main])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: NAME"),
        (["bogus"], "unknown kernel 'bogus': there are restrictedmem"),
        (["guest_memfd", "--literal"], "guest_memfd has none"),
        (["--append", "nosmp", NAME], "NAME comes first"),
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
    assert ended.value.code == 2
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
