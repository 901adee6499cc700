"""``kvmpriv selftest`` with real processes: every way for a test to end, signals, and the suite."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from junitparser import JUnitXml

import kvmpriv
from conftest import ROOT
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.exit_status import ExitStatus
from kvmpriv.private.restrictedmem import ask_memfd_restricted
from kvmpriv.selftest.records import (
    CRASHED,
    FAILED,
    KNOWN_DEFECT,
    PASSED,
    SHORTAGE,
    SKIPPED,
    TIMEOUT,
)
from private.support.requirements import missing
from private.support.rules import RULES
from unit.ktap import parse

SCHEMA = json.loads((ROOT / "kvmpriv/selftest/schema.json").read_text())

# -- suites that go wrong --------------------------------------------------------------------------

CONFTEST = """
import pytest
def pytest_addoption(parser):
    parser.addoption("--dangerous", action="store_true")
def pytest_configure(config):
    config.addinivalue_line("markers", "rule(*ids): rules")
"""
#: A suite whose tests end in every way.
TESTS = '''
import ctypes, os, signal, time, sys
import pytest
rule = pytest.mark.rule

@rule("a.passes", "a.both")
def test_passes():
    """It passes."""

@rule("a.fails", "a.both")
def test_fails():
    """It fails.

    And more.
    """
    print("words of the test")
    left = 1
    assert left == 2

@rule("a.raises")
def test_raises():
    raise OSError(22, "no")

@rule("a.skips")
def test_skips():
    pytest.skip("a device: there is none")

@rule("a.defect")
def test_defect():
    pytest.fail("known defect: off-by-one: the end is one too far", pytrace=False)

@rule("a.defect.expected")
def test_expected_defect():
    pytest.xfail("known defect: off-by-two: the end is two too far")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("teardown")

@rule("a.teardown")
def test_teardown(broken):
    pass

@rule("a.defect.teardown")
def test_defect_and_teardown(broken):
    pytest.fail("known defect: off-by-one: the end is one too far", pytrace=False)

@pytest.fixture
def unmade():
    raise RuntimeError("setup")

@rule("a.setup")
def test_setup(unmade):
    pass

@rule("a.crash")
def test_crash():
    ctypes.string_at(0)

@rule("a.exit")
def test_exit():
    os._exit(0)

@rule("a.quit")
def test_quit():
    sys.stderr.write("last words")
    raise KeyboardInterrupt

@rule("a.slow")
@pytest.mark.timeout(0.3)
def test_slow():
    time.sleep(60)

@rule("a.deaf")
@pytest.mark.timeout(0.3)
def test_deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    if os.fork() == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT})
    open(os.environ["PIDS"], "a").write(f"{os.getpid()}\\n")
    time.sleep(60)

@rule("suite.itself")
def test_of_the_suite():
    assert False, "not a kernel's rule"

@rule("a.last", "suite.itself")
def test_last():
    pass

def test_without_a_rule():
    pass
'''
EXPECTED = {
    "test_passes": (PASSED, ""),
    "test_fails": (FAILED, "assert 1 == 2"),
    "test_raises": (FAILED, "OSError: [Errno 22] no"),
    "test_skips": (SKIPPED, "a device: there is none"),
    "test_defect": (KNOWN_DEFECT, "off-by-one: the end is one too far"),
    "test_expected_defect": (KNOWN_DEFECT, "off-by-two: the end is two too far"),
    "test_teardown": (FAILED, "RuntimeError: teardown"),
    "test_defect_and_teardown": (FAILED, "RuntimeError: teardown"),
    "test_setup": (FAILED, "RuntimeError: setup"),
    "test_crash": (CRASHED, "the process was ended by signal 11 (Segmentation fault)"),
    "test_exit": (CRASHED, "the process ended with exit status 0"),
    "test_quit": (CRASHED, "the process ended with exit status 2"),
    "test_slow": (TIMEOUT, "Timeout (>0.3s) from pytest-timeout."),
    "test_deaf": (TIMEOUT, "it did not end in time and was killed"),
    "test_last": (PASSED, ""),
    "test_without_a_rule": (PASSED, ""),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A suite of a conftest; the test adds test_it.py."""
    made_folder = tmp_path / "suite"
    made_folder.mkdir()
    (made_folder / "conftest.py").write_text(CONFTEST)
    return made_folder


def command(folder: Path, *arguments: str, grace: float = 20, between: float = 90) -> list[str]:
    """``kvmpriv selftest`` with the suite in `folder`, and shorter time limits for what hangs."""
    code = (
        "import sys; from pathlib import Path; from kvmpriv.cli import main;"
        "from kvmpriv.selftest import runner;"
        f"runner.suite = lambda: Path({str(folder)!r});"
        f"runner.GRACE, runner.BETWEEN = {grace}, {between};"
        f"sys.exit(main({['selftest', *arguments]!r}))"
    )
    return [sys.executable, "-c", code]


def selftest(
    folder: Path, *arguments: str, grace: float = 20, between: float = 90, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments, grace=grace, between=between),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=100,
    )


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_every_way_to_end(folder: Path, tmp_path: Path) -> None:
    """Each test has a result, and the tests after it run; no process and no file is left."""
    (folder / "test_it.py").write_text(TESTS)
    pids = tmp_path / "pids"
    done = selftest(folder, "--json", grace=2, PIDS=str(pids))
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    tests = {test["test"].removeprefix("test_it.py::"): test for test in found["tests"]}
    assert {name: (test["result"], test["message"]) for name, test in tests.items()} == EXPECTED
    assert found["planned"] == len(EXPECTED)
    assert found["stopped"] == ""
    assert tests["test_fails"]["about"] == "It fails."
    for words in ("assert left == 2", "words of the test"):
        assert words in tests["test_fails"]["detail"]
    assert "string_at" in tests["test_crash"]["detail"]
    assert "in test_deaf" in tests["test_deaf"]["detail"], "where it hung"
    assert 2.3 <= tests["test_deaf"]["seconds"] < 50
    assert {rule["rule"]: rule["result"] for rule in found["rules"]}["a.both"] == FAILED
    assert not [rule for rule in found["rules"] if rule["rule"].startswith("suite.")]
    hung = [int(line) for line in pids.read_text().split()]
    assert len(hung) == 2
    assert not [pid for pid in hung if alive(pid)]
    assert sorted(path.name for path in folder.iterdir()) == ["conftest.py", "test_it.py"]


def test_ktap_and_text_of_the_same(folder: Path) -> None:
    (folder / "test_it.py").write_text(TESTS)
    some = ("-k", "not deaf")
    done = selftest(folder, "--ktap", *some)
    assert done.returncode == 1
    found = parse(done.stdout)
    expected = {name: end for name, end in EXPECTED.items() if name != "test_deaf"}
    assert found.tests.keys() == {f"test_it.py::{name}" for name in expected}
    for name, (result, message) in expected.items():
        ok, why = found.tests[f"test_it.py::{name}"]
        assert ok == (result in (PASSED, SKIPPED))
        assert message in why
    assert found.rules["test_it.py::test_passes"] == "a.passes; a.both"
    assert found.rules["test_it.py::test_without_a_rule"] == ""
    assert "words of the test" in found.diagnostics
    text = selftest(folder, *some)
    assert text.returncode == 1
    assert text.stdout.splitlines()[-1].startswith(
        "15 tests: 3 passed, 5 failed, 3 crashed, 1 timeout, 2 known defect, 1 skipped, in "
    )


ABORTED = "the process was ended by signal 6 (Aborted)"
STATUS = "the process ended with exit status"
HUNG = "it did not end in time and was killed"


@pytest.mark.parametrize(
    ("select", "after", "death", "how", "ends"),
    [
        ("one or no", "", "pass", "", {"one": PASSED, "no": SKIPPED}),
        ("one or no", "one", "os.abort()", ABORTED, {"one": CRASHED, "no": SKIPPED}),
        ("one or no", "one", "os._exit(0)", f"{STATUS} 0", {"one": CRASHED, "no": SKIPPED}),
        ("one or no", "", "os.abort()", ABORTED, {"one": PASSED, "no": CRASHED}),
        ("one", "", "0 / 0", f"{STATUS} 3", {"one": CRASHED}),
        ("one", "", "time.sleep(600)", HUNG, {"one": TIMEOUT}),
        ("one or bad", "", "os.abort()", ABORTED, {"one": PASSED, "bad": FAILED}),
    ],
)
def test_death_after_a_test(
    folder: Path, select: str, after: str, death: str, how: str, ends: dict[str, str]
) -> None:
    """The test that ended last fails for it; all others keep their results."""
    (folder / "conftest.py").write_text(
        f"{CONFTEST}import os, time\n"
        "@pytest.hookimpl(trylast=True)\n"
        "def pytest_runtest_logfinish(nodeid):\n"
        f"    if nodeid.endswith('_{after}'): {death}\n"
        f"def pytest_sessionfinish():\n    if not {after!r}: {death}\n"
    )
    (folder / "test_it.py").write_text(PASSING + "def test_bad():\n    assert False, 'its own'\n")
    done = selftest(folder, "--json", "-k", select, between=5)
    assert (done.returncode, done.stderr) == (1 if how else 0, "")
    tests = json.loads(done.stdout)["tests"]
    assert {test["test"].partition("::test_")[2]: test["result"] for test in tests} == ends
    charged = [test for test in tests if test["result"] not in (PASSED, SKIPPED)]
    assert len(charged) == bool(how)
    for test in charged:
        own = test["result"] == FAILED
        message = "AssertionError: its own" if own else f"after the test: {how}"
        assert test["message"].startswith(message)
        assert f"after the test: {how}" in test["detail"]
    if death == "os.abort()":
        text, ktap = (selftest(folder, *form, "-k", select) for form in ((), ("--ktap",)))
        assert text.returncode == ktap.returncode == 1
        assert f"after the test: {how}" in text.stdout
        assert f"after the test: {how}" in ktap.stdout
        assert [ok for ok, _ in parse(ktap.stdout).tests.values()].count(False) == 1


PASSING = """
import pytest
@pytest.mark.rule("a.one", "b.one")
def test_one(): pass
@pytest.mark.rule("a.two")
@pytest.mark.parametrize("x", [1, 2])
def test_two(x): pass
@pytest.mark.rule("c.no")
def test_no():
    pytest.skip("root: we are not")
"""


def test_selection_and_status(folder: Path) -> None:
    (folder / "test_it.py").write_text(PASSING)

    def ran(*arguments: str) -> tuple[int, list[str]]:
        done = selftest(folder, "--ktap", *arguments)
        assert done.stderr == ""
        return done.returncode, [name.partition("::")[2] for name in parse(done.stdout).tests]

    everything = ["test_one", "test_two[1]", "test_two[2]", "test_no"]
    assert ran() == (0, everything)
    assert ran("a.*") == (0, everything[:3])
    assert ran("b.one", "c.??") == (0, ["test_one", "test_no"])
    assert ran("a.*", "-k", "two") == (0, everything[1:3])
    assert ran("c.*") == (ExitStatus.ALL_SKIPPED, ["test_no"])
    (folder / "support").mkdir()
    (folder / "support/rules.toml").write_text(
        '[some]\nabis = ["any"]\nsource = "commit 0"\n[some.rules]\n"a.one" = "It is one."\n'
    )
    listed = selftest(folder, "--list", "a.one", "a.two")
    assert listed.returncode == 0
    assert listed.stdout.splitlines() == [
        "a.one\ttest_it.py::test_one\tIt is one.",
        "b.one\ttest_it.py::test_one\t",
        "a.two\ttest_it.py::test_two[1]\t",
        "a.two\ttest_it.py::test_two[2]\t",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["x.*", "--ktap"], "no rule matches 'x.*'"),
        (["a.*", "x", "--json"], "no rule matches 'x'"),
        (["-k", "three", "--list"], "no test matches -k 'three'"),
        (["a.one", "-k", "two", "--dangerous"], "no test of 'a.one' matches -k 'two'"),
        (["-k", "(", "--json"], "-k"),
    ],
)
def test_nothing_selected(folder: Path, arguments: list[str], expected: str) -> None:
    (folder / "test_it.py").write_text(PASSING)
    done = selftest(folder, *arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    if "--ktap" in arguments:
        assert done.stdout == f"KTAP version 1\nBail out! {expected} (--list shows what there is)\n"
    else:
        assert done.stdout == ""


def test_a_file_that_breaks_hides_no_other(folder: Path) -> None:
    (folder / "test_a.py").write_text("import nonesuch")
    (folder / "test_b.py").write_text(
        "import pytest; pytest.skip('root: no', allow_module_level=True)"
    )
    (folder / "test_it.py").write_text(
        PASSING + "import os\ndef test_end(): os._exit(5)\ndef test_z(): pass"
    )
    done = selftest(folder, "--ktap")
    assert done.returncode == 1
    tests = parse(done.stdout).tests
    assert tests["test_a.py"][0] is False
    assert "nonesuch" in tests["test_a.py"][1]
    assert tests["test_b.py"] == (True, "SKIP can't be collected: Skipped: root: no")
    assert tests["test_it.py::test_end"][0] is False
    assert tests["test_it.py::test_z"] == (True, "")
    assert len(tests) == 8


def test_a_suite_that_can_not_run(folder: Path) -> None:
    (folder / "test_it.py").write_text(PASSING)
    (folder / "conftest.py").write_text("import os; os.kill(os.getpid(), 11)")
    done = selftest(folder)
    assert (done.returncode, done.stdout) == (ExitStatus.UNABLE, "")
    assert "the process was ended by signal 11" in done.stderr
    (folder / "conftest.py").write_text("import time; time.sleep(600)")
    done = selftest(folder, between=5)
    assert (done.returncode, done.stdout) == (ExitStatus.UNABLE, "")
    assert "it did not end in time and was killed" in done.stderr
    assert "conftest.py" in done.stderr, "where it hung"


def test_ktap_begins_at_once(folder: Path) -> None:
    """The version line is printed before pytest has found the tests."""
    (folder / "test_it.py").write_text(PASSING)
    (folder / "conftest.py").write_text("import time; time.sleep(600)")
    with subprocess.Popen(command(folder, "--ktap"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "KTAP version 1\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "Bail out! interrupted\n"
    assert process.returncode == 130


def test_something_is_shown_before_the_first_test_ends(folder: Path) -> None:
    """The kernel on standard output, and on a terminal what happens meanwhile."""
    (folder / "test_it.py").write_text("import time\ndef test_long(): time.sleep(600)")
    leader, follower = pty.openpty()
    with subprocess.Popen(
        command(folder), stdout=subprocess.PIPE, stderr=follower, text=True
    ) as process:
        os.close(follower)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Linux ")
        said = b""
        while b"test_long" not in said:
            said += os.read(leader, 1000)
        process.send_signal(signal.SIGINT)
        assert "not complete, 0 of 1 tests: interrupted" in process.stdout.read()
    os.close(leader)
    assert said.index(b"looking for the tests") < said.index(b"0/1 test_it.py::test_long")
    assert process.returncode == 130


#: Tests that run out of something, and beside each the twin: a kernel that fails in the same way.
SHORT = '''
import errno, os, signal, threading, time
import pytest
rule = pytest.mark.rule

@rule("a.fds")
def test_descriptors():
    kept = [os.open("/", os.O_RDONLY) for _ in range(300)]

@rule("a.compared")
def test_compared():
    kept = []
    try:
        while len(kept) < 300:
            kept.append(os.dup(0))
    except OSError as error:
        assert errno.errorcode[error.errno] == "EINVAL"
    finally:
        for fd in kept:
            os.close(fd)

@rule("a.skips")
def test_skips():
    try:
        for fd in [os.dup(0) for _ in range(300)]:
            os.close(fd)
    except OSError as error:
        pytest.skip(f"guest_memfd: {error.strerror}")

@rule("a.fds", "a.passes")
def test_passes():
    pass

@rule("a.returned")
def test_returned_by_the_kernel():
    if "FAULTY" in os.environ:
        raise OSError(errno.EMFILE, "KVM_CREATE_VM: Too many open files")

@rule("a.memory")
def test_memory():
    if "MEMORY" in os.environ:
        bytearray(int(os.environ["MEMORY"]))

@rule("a.cpu")
@pytest.mark.timeout(4)
def test_cpu():
    """It gets no CPU beside another process of the same CPU with a better class."""
    if "STARVED" not in os.environ:
        return
    cpu = {min(os.sched_getaffinity(0))}
    hog = os.fork()
    if hog == 0:
        signal.alarm(60)
        os.sched_setaffinity(0, cpu)
        while True:
            pass
    try:
        os.sched_setaffinity(0, cpu)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while True:
            pass
    finally:
        os.kill(hog, signal.SIGKILL)
        os.waitpid(hog, 0)
'''
FEW, ENOUGH = 128, 700


@pytest.mark.parametrize(
    ("which", "low", "high", "environment", "short", "said"),
    [
        (
            "NOFILE",
            FEW,
            ENOUGH,
            {},
            {"test_descriptors", "test_compared", "test_skips"},
            f"descriptors: this process may have {FEW} open files: ulimit -n 1024",
        ),
        (
            "AS",
            1 << 40,
            resource.RLIM_INFINITY,
            {"MEMORY": str(1 << 41)},
            {"test_memory"},
            "memory: this process may use 1 TiB: ulimit -v unlimited",
        ),
    ],
)
def test_a_shortage_of_a_limit(
    folder: Path,
    which: str,
    low: int,
    high: int,
    environment: dict[str, str],
    short: set[str],
    said: str,
) -> None:
    """It is an error of the run; the twin has a higher limit and is charged to the kernel."""
    (folder / "test_it.py").write_text(SHORT)

    def ran(soft: int, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        number = getattr(resource, f"RLIMIT_{which}")
        hard = resource.getrlimit(number)[1]
        return subprocess.run(
            command(folder, *arguments),
            capture_output=True,
            text=True,
            env={**os.environ, **environment, **more},
            preexec_fn=lambda: resource.setrlimit(number, (soft, hard)),
        )

    done = ran(low, "--json")
    assert done.returncode == ExitStatus.UNABLE
    word = "test was" if len(short) == 1 else "tests were"
    assert done.stderr == f"kvmpriv selftest: {len(short)} {word} not tested, for a shortage\n"
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    tests = {test["test"].removeprefix("test_it.py::"): test for test in found["tests"]}
    assert {name for name, test in tests.items() if test["result"] == SHORTAGE} == short
    assert {tests[name]["message"] for name in short} == {said}
    assert {test["result"] for name, test in tests.items() if name not in short} == {PASSED}
    text = ran(low)
    assert text.returncode == ExitStatus.UNABLE
    assert f"Not tested, for a shortage of\n  {said} ({len(short)} test" in text.stdout
    ktap = parse(ran(low, "--ktap").stdout)
    for name in short:
        assert ktap.tests[f"test_it.py::{name}"] == (False, f"ERROR shortage of {said}")
    twin = json.loads(ran(high, "--json", FAULTY="1").stdout)
    results = {test["test"].removeprefix("test_it.py::"): test["result"] for test in twin["tests"]}
    assert results["test_returned_by_the_kernel"] == FAILED
    assert SHORTAGE not in results.values()
    if which == "AS":
        assert results["test_memory"] == FAILED, "the kernel refused what nothing limits"


def test_a_shortage_of_cpu_time(folder: Path) -> None:
    """A test that had to wait for a CPU did not hang in the kernel; test_slow is the twin."""
    (folder / "test_it.py").write_text(SHORT)
    done = selftest(folder, "--json", "-k", "cpu", STARVED="1")
    assert done.returncode == ExitStatus.UNABLE
    (test,) = json.loads(done.stdout)["tests"]
    assert (test["result"], test["message"]) == (
        SHORTAGE,
        "CPU time: the test waited for a CPU for half of its 4 s, or longer",
    )


@pytest.mark.parametrize("limit", [5, 7, 9, 11, 13])
def test_no_descriptors_from_the_start(folder: Path, limit: int) -> None:
    """One sentence, wherever it ends."""
    (folder / "test_it.py").write_text(PASSING)
    done = subprocess.run(
        command(folder),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )
    assert (done.returncode, done.stdout) == (ExitStatus.UNABLE, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith("kvmpriv selftest: ")
    assert said.endswith(f"descriptors: this process may have {limit} open files: ulimit -n 1024")


# -- JUnit XML -------------------------------------------------------------------------------------


def test_junit(folder: Path, tmp_path: Path) -> None:
    """Beside each form of output, with control characters and bytes that are not UTF-8."""
    (folder / "test_it.py").write_text(
        PASSING + "import os\n@pytest.mark.rule('d.odd')\ndef test_odd():\n"
        "    os.write(1, b'\\xff\\x1b[2J\\0]]>\\n')\n    assert 0, '\\x00\\ud800'\n"
    )
    out = tmp_path / "out.xml"
    out.write_text("the old one")
    out.chmod(0o640)
    for form in ((), ("--ktap",), ("--json",)):
        done = selftest(folder, *form, "--junit", str(out))
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout == selftest(folder, *form).stdout or done.stdout.count("\n") > 5
        (suite,) = JUnitXml.fromstring(out.read_bytes())
        assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (5, 1, 0, 1)
        (odd,) = (case for case in suite if case.name == "test_odd")
        (failure,) = odd.result
        assert failure.message == r"AssertionError: \x00\ud800"
        assert r"\x1b[2J\x00]]>" in failure.text
        assert out.stat().st_mode & 0o777 == 0o640
        assert sorted(each.name for each in tmp_path.iterdir()) == ["out.xml", "suite"]


def test_junit_of_a_run_that_was_interrupted(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.xml"
    (folder / "test_it.py").write_text("import time\ndef test_long(): time.sleep(600)")
    with subprocess.Popen(
        command(folder, "--junit", str(out)), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Linux ")
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    (suite,) = JUnitXml.fromstring(out.read_bytes())
    assert (suite.tests, suite.errors) == (1, 1)
    ((error,),) = (case.result for case in suite)
    assert error.message == "0 of 1 tests: interrupted"


def test_junit_that_can_not_be_written(folder: Path, tmp_path: Path) -> None:
    """The command says so before it runs a test; at the end, the old file is kept."""
    (folder / "test_it.py").write_text("open('ran', 'w').close()\ndef test_it(): pass")
    inside, full = tmp_path / "no" / "out.xml", tmp_path / "full.xml"
    for path, why in ((folder, "Is a directory"), (inside, "No such file or directory")):
        done = selftest(folder, "--junit", str(path))
        assert (done.returncode, done.stdout) == (ExitStatus.UNABLE, "")
        assert done.stderr == f"kvmpriv selftest: {path}: {why}\n"
    assert not (ROOT / "ran").exists()
    (folder / "test_it.py").write_text("def test_it(): pass")
    full.write_text("the old one")
    done = subprocess.run(
        command(folder, "--junit", str(full)),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert done.returncode == ExitStatus.UNABLE
    assert done.stderr == f"kvmpriv selftest: {full}: File too large\n"
    assert "1 test: 1 passed" in done.stdout
    assert full.read_text() == "the old one"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["full.xml", "suite"]
    for option in (("--list",), ("--compare", str(full), str(full))):
        done = selftest(folder, *option, "--junit", str(full))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "kvmpriv selftest: --junit needs a run of the suite\n"


def test_in_a_folder_that_is_deleted(folder: Path, tmp_path: Path) -> None:
    (folder / "test_it.py").write_text(PASSING)
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(gone), *command(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(shell, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (ExitStatus.UNABLE, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith("kvmpriv selftest: the current directory can't be used (No such file")


def test_without_dev_null(folder: Path) -> None:
    (folder / "test_it.py").write_text(PASSING)
    code = command(folder)
    code[2] = f"import os; os.devnull = '/nonesuch'; {code[2]}"
    done = subprocess.run(code, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (ExitStatus.UNABLE, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith("kvmpriv selftest: /nonesuch can't be opened (No such file")


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        (["pytest", "pytest_timeout"], "needs pytest and pytest-timeout"),
        (["pytest_timeout"], "needs pytest-timeout"),
        (["hypothesis"], "needs hypothesis"),
    ],
)
def test_without_what_runs_it(lacking: list[str], expected: str) -> None:
    code = (
        "import sys; from kvmpriv.cli import main;"
        f"sys.modules.update(dict.fromkeys({lacking!r}));"
        "sys.exit(main(['selftest', *sys.argv[1:]]))"
    )
    for form in ("--list", "--ktap"):
        done = subprocess.run([sys.executable, "-c", code, form], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (ExitStatus.UNABLE, "")
        assert f"{expected}: pip install 'kvmpriv[test]'" in done.stderr


def test_nobodys_settings_matter(folder: Path, tmp_path: Path) -> None:
    """Settings of the environment and of the current directory are ignored."""
    (folder / "test_it.py").write_text(PASSING)
    (folder.parent / "pytest.ini").write_text("[pytest]\naddopts = --nonesuch\n")
    (folder.parent / "conftest.py").write_text("raise RuntimeError('not ours')")
    done = selftest(folder, PYTEST_ADDOPTS="--nonesuch", PYTEST_PLUGINS="nonesuch")
    assert (done.returncode, done.stderr) == (0, "")


SLOW = """
import os, time
import pytest
@pytest.fixture
def put_back():
    yield
    open(os.environ["BACK"], "w").close()
@pytest.mark.rule("a.b")
def test_one(): pass
@pytest.mark.rule("c.d")
def test_two(put_back):
    time.sleep(60)
@pytest.mark.rule("e.f")
def test_three(): pass
"""


@pytest.mark.parametrize(
    ("number", "status", "form"),
    [
        (signal.SIGINT, 130, "--ktap"),
        (signal.SIGINT, 130, "--json"),
        (signal.SIGTERM, 143, "text"),
    ],
)
def test_interrupted(folder: Path, tmp_path: Path, number: int, status: int, form: str) -> None:
    """The results so far are reported, and the running test's fixtures clean up."""
    (folder / "test_it.py").write_text(SLOW)
    back, out = tmp_path / "back", tmp_path / "out"
    with out.open("w") as stream:
        process = subprocess.Popen(
            command(folder, *([] if form == "text" else [form])),
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "BACK": str(back)},
        )
        deadline = time.monotonic() + 30
        while not (children := _children(process.pid)) or not _in(children[0], CLOCK_NANOSLEEP):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        while not _in(process.pid, SELECT):  # then it has read all that its child has reported
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (status, "")
    assert back.exists()
    assert not alive(children[0])
    said = out.read_text()
    if form == "--ktap":
        found = parse(said)
        assert (found.plan, len(found.tests), found.bailed_out) == (3, 1, "interrupted")
    elif form == "--json":
        found_json = json.loads(said)
        jsonschema.validate(found_json, SCHEMA, cls=jsonschema.Draft202012Validator)
        assert found_json["stopped"] == "interrupted"
        assert (found_json["planned"], len(found_json["tests"])) == (3, 1)
    else:
        assert said.splitlines()[-1] == "not complete, 1 of 3 tests: interrupted"


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


#: Numbers of system calls (x86-64) in /proc/PID/syscall of a process that waits.
CLOCK_NANOSLEEP, SELECT = ("230",), ("23", "270")


def _in(pid: int, calls: tuple[str, ...]) -> bool:
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] in calls


def test_the_parent_dies(folder: Path, tmp_path: Path) -> None:
    """A parent killed by SIGKILL can't stop its tests; they stop at their next report."""
    ran = tmp_path / "ran"
    (folder / "test_it.py").write_text(
        "import os, time, pytest\n"
        "@pytest.mark.parametrize('n', range(200))\n"
        f"def test_it(n):\n    open({str(ran)!r}, 'a').write('x'); time.sleep(0.05)\n"
    )
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not ran.exists() or ran.stat().st_size < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (child,) = _children(process.pid)
    process.kill()
    process.wait()
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ran.stat().st_size < 150


def test_ignored_sigchld(folder: Path) -> None:
    (folder / "test_it.py").write_text(PASSING + "\nimport os\ndef test_x(): os._exit(3)\n")
    done = subprocess.run(
        command(folder, "--ktap"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert parse(done.stdout).tests["test_it.py::test_x"][1].endswith("exit status 3")


def test_a_full_disk(folder: Path) -> None:
    (folder / "test_it.py").write_text(PASSING)
    code = command(folder)[2].replace(f"main({['selftest']!r})", "main()")
    for form in ("--ktap", "--json", "--list"):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code, "selftest", form],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode == 3
        assert done.stderr == "kvmpriv: standard output: No space left on device\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmpriv", "selftest", *arguments], capture_output=True, text=True
    )


# -- the suite -------------------------------------------------------------------------------------


def test_list_is_the_suite() -> None:
    """--list prints the real suite."""
    done = run("--list")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len({test for _, test, _ in rows}) > 300
    assert len(set(map(tuple, rows))) == len(rows)
    for name, test, sentence in rows:
        assert sentence == RULES[name].sentence
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9_-]+)+", name)
        assert not name.startswith("suite.")
        assert re.match(r"test_\w+\.py::test_\w+(\[[^\t]+\])?$", test)
    some = run("--list", "v9.slot.copy.*")
    assert {line.split("\t")[0] for line in some.stdout.splitlines()} == {
        name for name, _, _ in rows if name.startswith("v9.slot.copy.")
    }


@pytest.mark.parametrize("form", ["--list", "--ktap"])
def test_what_can_not_be_required(form: str) -> None:
    environment = {**os.environ, "KVMPRIV_REQUIRE": "host, guest-memfd"}
    wrong = "KVMPRIV_REQUIRE: unknown 'guest-memfd'; known are: "
    selftest = [sys.executable, "-m", "kvmpriv", "selftest", form]
    done = subprocess.run(selftest, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith(f"KTAP version 1\nBail out! {wrong}") == (form == "--ktap")
    assert done.stderr.startswith(f"kvmpriv selftest: {wrong}")
    for tests in ("tests/private/test_rules.py", "tests/unit/test_bench.py"):
        plain = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
        done = subprocess.run(plain, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert done.stderr.startswith(f"ERROR: {wrong}")


# -- as a wheel ------------------------------------------------------------------------------------


def in_wheel(place: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Exit status, output and error output of the installed command, run outside the checkout."""
    command = [*prefix, str(place / "bin" / "kvmpriv"), "selftest", *arguments]
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("KVMPRIV_", "PYTHON"))}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_has_the_suite(installed: Path) -> None:
    """The wheel has the same tests as the checkout, and writes nothing beside them."""
    (suite,) = installed.glob("lib/python*/site-packages/kvmpriv/_suite")
    before = files(suite)
    ours = ROOT / "tests" / "private"
    names = {path.relative_to(ours) for path in ours.rglob("*.py")}
    assert {path.relative_to(suite) for path in before if path.suffix == ".py"} == names
    assert in_wheel(installed, "--list") == (0, run("--list").stdout, "")
    assert files(suite) == before


def test_the_wheel_on_this_kernel(installed: Path, vm: kvmpriv.Vm) -> None:
    """0 with the ABI, 4 without it, 2 for a rule that does not exist."""
    has = {
        "v9.syscall.flags": errno.errorcode[ask_memfd_restricted()] == "EINVAL",
        "gm.create.size": vm.check_extension(gm.KVM_CAP_GUEST_MEMFD) > 0,
    }
    for name, there in has.items():
        status, out, errors = in_wheel(installed, "--json", name)
        assert (status, errors) == (0 if there else ExitStatus.ALL_SKIPPED, "")
        found = json.loads(out)
        jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
        assert found["host"]["release"] == os.uname().release
        (result,) = (rule for rule in found["rules"] if rule["rule"] == name)
        assert result["result"] == ("passed" if there else "skipped")
        assert bool(result["message"]) != there
    status, out, errors = in_wheel(installed, "v9.nonesuch")
    assert (status, out) == (2, "")
    assert "no rule matches 'v9.nonesuch'" in errors


def test_the_wheel_without_kvm(installed: Path) -> None:
    """Every test that needs KVM is skipped, with the reason."""
    unshare = ("unshare", "-m", "sh", "-c", 'mount --bind /dev/null /dev/kvm && exec "$@"', "sh")
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        missing("root", "/dev/kvm can't be hidden in a mount namespace")
    status, out, errors = in_wheel(installed, "--ktap", "gm.create.*", prefix=unshare)
    assert (status, errors) == (ExitStatus.ALL_SKIPPED, "")
    tests = parse(out).tests
    assert len(tests) > 3
    for ok, why in tests.values():
        assert ok
        assert why.startswith("SKIP host: /dev/kvm can't be used: ")


def test_the_wheel_with_tests_that_fail(installed: Path) -> None:
    """A file that is added to the suite counts: its rules, and its failures."""
    (suite,) = installed.glob("lib/python*/site-packages/kvmpriv/_suite")
    broken = suite / "test_broken.py"
    broken.write_text(
        "import os\n"
        "from .support.defects import DEFECTS, known_defect\n"
        "from pytest import mark\n"
        "rule = mark.rule\n"
        "@rule('broken.known')\ndef test_known(): known_defect(next(iter(DEFECTS)), 'seen')\n"
        "@rule('broken.dies')\ndef test_dies(): os.abort()\n"
        "@rule('broken.leaks')\ndef test_leaks(no_leak): os.dup(0)\n"
        "@rule('broken.not')\ndef test_not(): pass\n"
    )
    try:
        status, out, errors = in_wheel(installed, "--json", "broken.*")
        fine = in_wheel(installed, "broken.not")[0]
    finally:
        broken.unlink()
    assert (status, errors, fine) == (1, "", 0)
    found = json.loads(out)
    assert {rule["rule"]: rule["result"] for rule in found["rules"]} == {
        "broken.known": KNOWN_DEFECT,
        "broken.dies": FAILED,
        "broken.leaks": FAILED,
        "broken.not": PASSED,
    }
    messages = {test["test"].partition("::")[2]: test["message"] for test in found["tests"]}
    assert messages["test_known"].endswith("(seen)")
    assert messages["test_dies"] == "the process was ended by signal 6 (Aborted)"
    assert messages["test_leaks"].startswith("AssertionError: descriptors left open: {")
