"""How the outcomes of the C selftests are read and compared; without a kernel or a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import ROOT
from kbuild import calibrate, selftests
from kbuild.correspondence import RUNS

SOURCE = """\
static void guest_code(void)
{
    GUEST_ASSERT(0);
}

static void guest_test_words(uint64_t gpa,
    bool twice)
{
    GUEST_ASSERT(0);
}

static int *test_one(int fd)
{
    TEST_ASSERT(fd);
}

void __test_two(struct kvm_vm *vm)
{
    if (vm) {
        TEST_ASSERT(0);
    }
}

int main(int argc, char *argv[])
{
}
"""
ADDRESSES = {0x10: "test_one", 0x20: "__test_two", 0x30: "main"}
FAILED = "==== Test Assertion Failure ====\n  prog.c:{}: fd\n  pid=1\n"


def test_functions_of_a_source() -> None:
    found = selftests.functions(SOURCE)
    assert found == {
        "guest_code": 1, "guest_test_words": 6, "test_one": 12, "__test_two": 17, "main": 24,
    }  # fmt: skip
    assert [name for name in found if selftests.is_test(name)] == [
        "guest_test_words", "test_one", "__test_two",
    ]  # fmt: skip
    assert "test_new" in selftests.functions("TEST(new)\n{\n}\n")
    assert "test_new" in selftests.functions("KVM_ONE_VCPU_TEST(suite, new, guest)\n{\n}\n")


@pytest.mark.parametrize(
    ("status", "trace", "output", "expected"),
    [
        (0, "+30 +10 -10 +20 -20 -30", "", ("passed", "passed", "passed")),
        (0, "+30 +10 -10 -30", "Skipping tests for X", ("passed", "passed", "skipped")),
        (4, "", "1..0 # SKIP - Requirement not met: X", ("skipped", "skipped", "skipped")),
        (4, "+30 +10 -10 +20", "1..0 # SKIP - X", ("skipped", "passed", "skipped")),
        (254, "+30 +10", FAILED.format(14), ("not run", "failed", "not run")),
        (254, "+30 +10 -10 +20", FAILED.format(20), ("not run", "passed", "failed")),
        (254, "+30 +10 -10 +20", FAILED.format(9), ("failed", "passed", "failed")),
        (124, "+30 +10 -10 +20", "", ("not run", "passed", "failed")),
        (139, "+30", "", ("failed", "failed", "failed")),
    ],
)
def test_verdicts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    trace: str,
    output: str,
    expected: tuple[str, ...],
) -> None:
    (tmp_path / "prog.c").write_text(SOURCE)
    monkeypatch.setattr(selftests, "addresses", lambda program: ADDRESSES)
    found = selftests.verdicts(tmp_path / "prog", status, trace.replace(" ", "\n"), output)
    names = ("guest_test_words", "test_one", "__test_two")
    assert tuple(found[name].status for name in names) == expected


def test_agreement() -> None:
    verdict, agree = selftests.Verdict, calibrate.agree
    assert agree(verdict("passed"), verdict("passed"))
    unmet = verdict("skipped", "Requirement not met: kvm_has_cap(KVM_CAP_GUEST_MEMFD)")
    assert agree(unmet, verdict("skipped", "guest_memfd: no type of VM"))
    assert not agree(unmet, verdict("skipped", "pre-fault: no"))
    assert not agree(unmet, verdict("passed"))
    assert not agree(verdict("passed"), verdict("skipped", "guest_memfd: no type of VM"))
    assert not agree(verdict("failed"), verdict("failed"))
    assert not agree(verdict("not run"), verdict("skipped", "guest_memfd: no"))


def test_our_tests_together() -> None:
    verdict, together = selftests.Verdict, calibrate.together
    said = {
        "a.py::one[x]": verdict("passed"),
        "a.py::one[y]": verdict("skipped", "z: no"),
        "a.py::one_more": verdict("failed", "assert"),
        "a.py::two": verdict("skipped", "z: no"),
    }
    assert together(["a.py::one"], said) == ("passed", "1 tests, 1 skipped")
    assert together(["a.py::one[y]", "a.py::two"], said) == ("skipped", "z: no")
    assert together(["a.py::one", "a.py::one_more"], said).status == "failed"
    assert together(["a.py::one", "a.py::three"], said).why.endswith("a.py::three")
    assert together([], said).status == "failed"


def test_the_table_names_tests_that_are_there() -> None:

    suite = ROOT / "tests" / "private"
    tests = {test for run in RUNS for ids in run.cases.values() for test in ids}
    for test in tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (suite / file).read_text(), test
    assert {run.program for run in RUNS} == set(selftests.PROGRAMS)
    assert all(ids for run in RUNS for ids in run.cases.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--nope"], "--nope"), (["--source", "/nowhere"], "/nowhere does not exist"), (["x"], "x")],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        calibrate.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
