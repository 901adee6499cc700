"""A pytest plugin that gives a test a booted Linux guest.

pytest loads it wherever kvmpriv is installed.  A test takes the fixture `linux_guest`, and the mark
of the same name describes the guest:

    import pytest

    pytestmark = pytest.mark.linux_guest(cpus=2)


    def test_two_cpus(linux_guest):
        assert int(linux_guest.run(["nproc"]).stdout) == 2


    @pytest.mark.linux_guest(private=True, scope="module")
    def test_in_private_memory(linux_guest):
        assert linux_guest.run(["true"]).returncode == 0

The mark takes the arguments of `kvmpriv.guest.linux.LinuxGuest` by name (``cpus``, ``memory``,
``private``, ``initrd``, ``cmdline``, …) and these:

`kernel`: the kernel's file.  The default is that of ``--linux-kernel FILE``, and without it that of
``linux_kernel = FILE`` in pytest's configuration; a relative path there begins at the
configuration's folder.

`scope`: "function" (the default), each test has a guest of its own; "module", tests of a module
with the same arguments share one.  If a test ends the shared guest, the next one gets a new one.

Marks of a test, its class and its module add up; of one argument the closest counts.

The fixture `make_linux_guest` is for guests that a mark can't describe, and for several at a time:
``make_linux_guest(devices=[...])`` starts one.  It adds to the arguments of the marks.  A guest is
closed at once when its test (or module) is over; a test that needs what the guest has written to
its disk calls its `shutdown`.

The report of a failed test shows the consoles of its guests.  A test that lacks something (a
kernel, /dev/kvm, private memory, busybox) is skipped; the reason names it, and a summary at the end
lists all.  With ``--linux-guest-required`` such a test fails instead.
"""

from __future__ import annotations

import errno as _errno
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import pytest

if TYPE_CHECKING:
    import pluggy
    from _pytest.terminal import TerminalReporter

    from .guest.linux import LinuxGuest

__all__ = ["MakeLinuxGuest", "linux_guest", "make_linux_guest"]

#: The type of the fixture `make_linux_guest`.
MakeLinuxGuest: TypeAlias = "Callable[..., LinuxGuest]"

_NAME = "linux_guest"
_LINES_SHOWN = 60
_GUESTS = pytest.StashKey["list[LinuxGuest]"]()
_SCOPES = ("function", "module")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup(_NAME, "Linux guests (kvmpriv)")
    group.addoption("--linux-kernel", metavar="FILE", help="the kernel of the Linux guests")
    group.addoption(
        "--linux-guest-required",
        action="store_true",
        help="fail a test for which no Linux guest can be had, instead of skipping it",
    )
    parser.addini("linux_kernel", "the kernel of the Linux guests, without --linux-kernel")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{_NAME}(kernel=FILE, scope='module', private=True, cpus=N, ...): the guest of the fixture"
        f" {_NAME}, by the arguments of kvmpriv.guest.linux.LinuxGuest",
    )
    kernel = config.getoption("--linux-kernel")
    if kernel is not None and not Path(kernel).is_file():
        raise pytest.UsageError(f"--linux-kernel: there is no file {kernel}")


class _Wanted:
    """A guest that a test wants: the arguments of `LinuxGuest`, and whether tests share it."""

    def __init__(self, request: pytest.FixtureRequest, more: Mapping[str, Any]) -> None:
        from .guest.linux import LinuxGuest

        known = [*inspect.signature(LinuxGuest).parameters, "scope"]
        options: dict[str, Any] = {}
        for mark in reversed(list(request.node.iter_markers(_NAME))):
            if mark.args:
                _refuse(f"the mark takes its arguments by name, not {mark.args[0]!r}")
            if "devices" in mark.kwargs:
                _refuse("a guest closes its devices: give them to make_linux_guest, in the test")
            options.update(mark.kwargs)
        options.update(more)
        for name in options.keys() - {*known}:
            _refuse(f"there is no argument {name!r}; there are {', '.join(sorted(known))}")
        self.scope: str = options.pop("scope", "function")
        if self.scope not in _SCOPES:
            _refuse(f"the scope must be 'function' or 'module', not {self.scope!r}")
        self.kernel: object = options.pop("kernel", None) or _kernel(request.config)
        self.options = options

    @property
    def key(self) -> str:
        """The same for tests that may share a guest."""
        return repr((self.kernel, sorted(self.options.items())))


def _refuse(why: str) -> NoReturn:
    pytest.fail(f"{_NAME}: {why}", pytrace=False)


def _kernel(config: pytest.Config) -> str | Path | None:
    given: str | None = config.getoption("--linux-kernel")
    if given is not None:
        return given
    name: str = config.getini("linux_kernel")
    if not name:
        return None
    return (config.inipath.parent if config.inipath else config.rootpath) / name


def _lacks(request: pytest.FixtureRequest, what: str) -> NoReturn:
    if request.config.getoption("--linux-guest-required"):
        pytest.fail(f"{_NAME}: --linux-guest-required, but {what}", pytrace=False)
    pytest.skip(f"{_NAME}: {what}")


def _make(request: pytest.FixtureRequest, wanted: _Wanted) -> LinuxGuest:
    """Make the guest, not started; skips the test if something is missing."""
    from .guest.linux import LinuxGuest
    from .kvm import Kvm
    from .private import choose

    if wanted.kernel is None:
        _lacks(
            request,
            "no kernel is given (--linux-kernel FILE, linux_kernel in pytest's configuration, or"
            " kernel=FILE in the mark)",
        )
    private = wanted.options.get("private", False)
    try:
        with Kvm(wanted.options.get("device", "/dev/kvm")) as kvm:
            if private:
                choose(kvm, private if isinstance(private, str) else None)
    except OSError as error:
        _lacks(request, _reason(error))
    try:
        return LinuxGuest(wanted.kernel, **wanted.options)  # type: ignore[arg-type]  # as given
    except OSError as error:
        if error.errno != _errno.ENOENT:
            raise
        _lacks(request, _reason(error))


def _reason(error: OSError) -> str:
    named = f"{error.filename}: " if error.filename else ""
    return f"{named}{error.strerror}"


def _start(request: pytest.FixtureRequest, guest: LinuxGuest) -> LinuxGuest:
    from .guest.linux import GuestDied

    _used_by(request.node).append(guest)
    try:
        guest.start()
    except GuestDied as died:
        if died.outcome.how == "no progress":
            _lacks(request, f"a KVM that can run Linux: {died.outcome.why}")
        raise
    return guest


def _used_by(node: pytest.Item) -> list[LinuxGuest]:
    return node.stash.setdefault(_GUESTS, [])


@pytest.fixture
def make_linux_guest(request: pytest.FixtureRequest) -> Iterator[MakeLinuxGuest]:
    """Start a guest: a function of the arguments of `LinuxGuest`, by name, or ``kernel``.

    It adds them to those of the marks.  The guests are closed after the test.
    """
    with ExitStack() as stack:

        def make(**options: Any) -> LinuxGuest:
            wanted = _Wanted(request, {"scope": "function", **options})
            made = _make(request, wanted)
            stack.callback(made.close)
            return _start(request, made)

        yield make


@pytest.fixture(scope="module")
def _shared_linux_guests() -> Iterator[dict[str, LinuxGuest]]:
    """The guests that the tests of a module share."""
    made: dict[str, LinuxGuest] = {}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture
def linux_guest(request: pytest.FixtureRequest, make_linux_guest: MakeLinuxGuest) -> LinuxGuest:
    """A Linux guest, booted, as the marks ``linux_guest`` describe it."""
    wanted = _Wanted(request, {})
    if wanted.scope == "function":
        return make_linux_guest()
    guests: dict[str, LinuxGuest] = request.getfixturevalue("_shared_linux_guests")
    shared = guests.get(wanted.key)
    if shared is not None and shared.alive:
        shared.resume()  # a test that failed may have left it paused
        _used_by(request.node).append(shared)
        return shared
    if shared is not None:
        shared.close()
    guests[wanted.key] = shared = _make(request, wanted)
    return _start(request, shared)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pluggy.Result[pytest.TestReport], None]:
    """Add the consoles of the test's guests to the report of its failure."""
    answer = yield
    report = answer.get_result()
    if not report.failed:
        return
    for number, guest in enumerate(dict.fromkeys(_used_by(item)), 1):
        lines = guest.console.decode(errors="replace").replace("\r", "").splitlines()
        which = f" {number}" if len(_used_by(item)) > 1 else ""
        ended = f"; {guest.outcome.how}: {guest.outcome.why}" if guest.outcome else ""
        text = "\n".join(lines[-_LINES_SHOWN:]) or "(it has printed nothing)"
        report.sections.append((f"Console of the Linux guest{which}{ended}", text))


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """List what was missing for the tests that were skipped."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        _, found, what = why.partition(f"{_NAME}: ")
        if found:
            reasons[what] = reasons.get(what, 0) + 1
    if reasons:
        terminalreporter.section("tests skipped for lack of a Linux guest", yellow=True)
        for what, count in reasons.items():
            terminalreporter.line(f"{count}: {what}")
