"""The pytest plugin, with guests that are none: which ones a test gets, skips, and reports."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmpriv import guest
from kvmpriv.guest.linux import GuestDied, Outcome

pytest_plugins = ["pytester"]

MODULE = """
import pytest

def names(guest): return guest.number, guest.kernel, guest.options
"""


class Fake:
    """A guest; `made` has all of them."""

    made: list[Fake] = []  # noqa: RUF012  # the fixture empties it
    lacks: OSError | None = None
    dies: Outcome | None = None

    def __init__(
        self,
        kernel: object,
        *,
        cpus: int = 1,
        private: object = False,
        devices: object = (),
        device: str = "/dev/kvm",
    ) -> None:
        if self.lacks is not None:
            raise self.lacks
        self.kernel = kernel
        self.options = (cpus, private, devices)
        self.number = len(self.made)
        self.events: list[str] = []
        self.console = b"line one\r\nline two\r\n"
        self.outcome: Outcome | None = None
        self.alive = False
        self.made.append(self)

    def start(self) -> None:
        if self.dies is not None:
            self.outcome = self.dies
            raise GuestDied(self.dies, "line two")
        self.alive = True

    def resume(self) -> None:
        self.events.append("resume")

    def close(self) -> None:
        self.events.append("close")
        self.alive = False


class FakeKvm:
    error: OSError | None = None

    def __init__(self, device: str) -> None:
        if self.error is not None:
            raise self.error

    def __enter__(self) -> FakeKvm:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.RunResult]:
    """Run tests in this process with Fake guests; the kernel is the file `bzImage`."""
    monkeypatch.setattr(guest.linux, "LinuxGuest", Fake)
    monkeypatch.setattr("kvmpriv.kvm.Kvm", FakeKvm)
    monkeypatch.setattr("kvmpriv.private.choose", lambda kvm, name: None)
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider --strict-markers")
    (pytester.path / "bzImage").touch()

    def run_(text: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=MODULE + text)
        return pytester.runpytest_inprocess(*arguments)

    return run_


KERNEL = ("--linux-kernel", "bzImage")


def test_each_test_has_a_guest_of_its_own(run: Callable[..., pytest.RunResult]) -> None:
    done = run(
        """
pytestmark = pytest.mark.linux_guest(cpus=2)
def test_a(linux_guest):
    assert names(linux_guest) == (0, "bzImage", (2, False, ()))
@pytest.mark.linux_guest(private=True, kernel="other")
def test_b(linux_guest):
    assert names(linux_guest) == (1, "other", (2, True, ()))
@pytest.mark.linux_guest(cpus=3)
def test_c(linux_guest, make_linux_guest):
    assert names(linux_guest) == (2, "bzImage", (3, False, ()))
    assert names(make_linux_guest(devices=[5], cpus=1)) == (3, "bzImage", (1, False, [5]))
    assert linux_guest.alive
""",
        *KERNEL,
    )
    done.assert_outcomes(passed=3)
    assert [one.events for one in Fake.made] == [["close"]] * 4


def test_tests_of_a_module_share_a_guest(run: Callable[..., pytest.RunResult]) -> None:
    done = run(
        """
pytestmark = pytest.mark.linux_guest(scope="module")
@pytest.mark.parametrize("turn", range(3))
def test_a(linux_guest, turn):
    assert linux_guest.number == 0
@pytest.mark.parametrize("kind", [False, pytest.param("x", marks=pytest.mark.linux_guest(cpus=4))])
def test_b(linux_guest, kind):
    assert linux_guest.number == (1 if kind else 0)
def test_c(linux_guest):
    assert linux_guest.number == 0
    linux_guest.alive = False  # it dies
def test_d(linux_guest):
    assert linux_guest.number == 2
@pytest.mark.linux_guest(scope="function")
def test_e(linux_guest):
    assert linux_guest.number == 3
""",
        *KERNEL,
    )
    done.assert_outcomes(passed=8)
    assert len(Fake.made) == 4
    assert all(one.events[-1] == "close" for one in Fake.made)
    assert Fake.made[0].events.count("resume") == 4


def test_the_kernel_of_the_configuration(
    run: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    pytester.makeini("[pytest]\nlinux_kernel = bzImage\n")
    wanted = str(pytester.path / "bzImage")
    text = f"def test_a(linux_guest):\n    assert str(linux_guest.kernel) == {wanted!r}\n"
    run(text).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("arguments", "lacks", "kvm", "dies", "words"),
    [
        ((), None, None, None, "no kernel is given (--linux-kernel FILE, linux_kernel"),
        (KERNEL, OSError(errno.ENOENT, "busybox is not installed"), None, None, "busybox is not"),
        (KERNEL, FileNotFoundError(2, "No such file", "bz"), None, None, "bz: No such file"),
        (KERNEL, None, OSError(errno.EACCES, "Denied", "/dev/kvm"), None, "/dev/kvm: Denied"),
        (
            KERNEL,
            None,
            None,
            Outcome("no progress", 123, "it emulates"),
            "a KVM that can run Linux: it emulates",
        ),
    ],
)
def test_a_skip_names_what_is_missing(
    run: Callable[..., pytest.RunResult],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    lacks: OSError | None,
    kvm: OSError | None,
    dies: Outcome | None,
    words: str,
) -> None:
    monkeypatch.setattr(Fake, "lacks", lacks)
    monkeypatch.setattr(Fake, "dies", dies)
    monkeypatch.setattr(FakeKvm, "error", kvm)
    text = "def test_a(linux_guest): ...\ndef test_b(make_linux_guest): make_linux_guest()\n"
    done = run(text, *arguments)
    done.assert_outcomes(skipped=2)
    done.stdout.fnmatch_lines(["*tests skipped for lack of a Linux guest*"])
    assert any(line.startswith("2: " + words) for line in done.outlines), done.outlines
    required = run(text, *arguments, "--linux-guest-required")
    required.assert_outcomes(errors=1, failed=1)
    assert f"linux_guest: --linux-guest-required, but {words}" in required.stdout.str()


def test_another_error_is_no_skip(
    run: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "lacks", OSError(errno.EMFILE, "Too many open files"))
    run("def test_a(linux_guest): ...\n", *KERNEL).assert_outcomes(errors=1)
    monkeypatch.setattr(Fake, "lacks", None)
    monkeypatch.setattr(Fake, "dies", Outcome("crash", 125, "triple fault"))
    done = run("def test_a(linux_guest): ...\n", *KERNEL)
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*Console of the Linux guest; crash: triple fault*", "line one"])


def test_a_failed_test_shows_the_console(run: Callable[..., pytest.RunResult]) -> None:
    done = run(
        """
def test_good(linux_guest): ...
def test_bad(linux_guest): assert 0
def test_two(make_linux_guest):
    make_linux_guest(), make_linux_guest()
    assert 0
def test_none(): assert 0
""",
        *KERNEL,
    )
    done.assert_outcomes(passed=1, failed=3)
    shown = [line.strip("- ") for line in done.outlines if "Console of the" in line]
    assert shown == [
        "Console of the Linux guest",
        "Console of the Linux guest 1",
        "Console of the Linux guest 2",
    ]
    assert done.outlines.count("line two") == 3


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("cpu=2", "linux_guest: there is no argument 'cpu'; there are cpus, device, devices"),
        ("scope='class'", "the scope must be 'function' or 'module', not 'class'"),
        ("devices=[1]", "a guest closes its devices: give them to make_linux_guest"),
        ("'bzImage'", "the mark takes its arguments by name, not 'bzImage'"),
    ],
)
def test_a_mistake_in_the_mark(run: Callable[..., pytest.RunResult], mark: str, words: str) -> None:
    text = f"@pytest.mark.linux_guest({mark})\ndef test_a(linux_guest): ...\n"
    done = run(text, *KERNEL)
    done.assert_outcomes(errors=1)
    assert words in done.stdout.str()


def test_a_kernel_that_is_not_there(run: Callable[..., pytest.RunResult]) -> None:
    done = run("def test_a(): ...\n", "--linux-kernel", "none")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "--linux-kernel: there is no file none" in done.stderr.str()


def test_the_wheel_registers_it(installed: Path, tmp_path: Path) -> None:
    """pytest loads the plugin of an installed kvmpriv, and kvmpriv works without pytest."""
    python = installed / "bin" / "python"
    (tmp_path / "test_it.py").write_text("def test_a(linux_guest): ...\n")

    def call(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *arguments], cwd=tmp_path, capture_output=True, text=True)

    done = call("-m", "pytest", "-p", "no:cacheprovider")
    assert "1 skipped" in done.stdout, done.stdout
    assert "no kernel is given" in done.stdout
    hidden = "import sys; sys.modules['pytest'] = None; from kvmpriv.guest.linux import LinuxGuest"
    assert call("-c", hidden).returncode == 0, sys.version
