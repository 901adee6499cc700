"""scripts/kernel/mutate without a kernel: the table of breaks, how they get into a source."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from kbuild.breaks import BREAKS, RMEM, Break, Edit
from kbuild.broken import find, put_breaks
from kbuild.errors import Refused

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "kernel"


def test_the_names() -> None:
    """Each break has a name of its own, fit for the kernel's command line, and a rule."""
    names = [one.name for one in BREAKS]
    assert len(set(names)) == len(names) > 200
    for one in BREAKS:
        assert re.fullmatch(r"[a-z0-9-]+\.[a-z0-9-]+", one.name)
        assert one.rule


def test_the_tests_that_are_named() -> None:
    """Each break names tests, and they are there."""
    for one in BREAKS:
        assert one.tests, one.name
        for test in one.tests:
            file, _, name = test.partition("::")
            source = (ROOT / "tests" / "private" / file).read_text()
            assert f"def {name.partition('[')[0]}(" in source, test


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "mm").mkdir()
    (tmp_path / "include" / "linux").mkdir(parents=True)
    (tmp_path / RMEM).write_text("#include <linux/x.h>\nif (a < b && c)\n\treturn 1;\n")
    return tmp_path


def one(name: str, text: str, broken: str) -> Break:
    return Break(name, "a rule", Edit(RMEM, text, broken), ("test",))


def test_expressions_and_statements(tree: Path) -> None:
    """Several breaks of one place are chained, and a place may be within another."""
    breaks = [
        one("x.a", "«a < b»", "a <= b"),
        one("x.b", "«a < b» && c", "0"),
        one("x.c", "«a < b && c»", "c"),
        one("x.d", "return 1;", ""),
    ]
    put_breaks(tree, breaks)
    text = (tree / RMEM).read_text()
    assert text.startswith("#include <linux/kvmpriv_break.h>\n#include <linux/x.h>\n")
    assert (
        "if ((kvmpriv_broken(3) ? (c) : ((kvmpriv_broken(1) ? (a <= b) : "
        "kvmpriv_broken(2) ? (0) : (a < b)) && c)))\n"
        "\t{ if (kvmpriv_broken(4)) {  } else { return 1; } }\n"
    ) in text
    assert '{ "none", "x.a", "x.b", "x.c", "x.d" }' in text


def test_a_break_that_does_not_apply(tree: Path) -> None:
    """It is named, with the text that it misses, and so is one that applies twice."""
    (tree / RMEM).write_text("#include <linux/x.h>\nreturn 1;\nreturn 1;\n")
    with pytest.raises(Refused) as refused:
        put_breaks(tree, [one("x.gone", "return «2»;", "3"), one("x.twice", "return 1;", "")])
    assert refused.value.code == 4
    assert "x.gone: mm/restrictedmem.c: this is not there:\nreturn «2»;" in str(refused.value)
    assert "x.twice: mm/restrictedmem.c: this is there 2 times:" in str(refused.value)


def test_where_text_is() -> None:
    """The place is what is marked, or all of it."""
    assert find("abcd", "bc") == (1, 3)
    assert find("abcd", "b«c»d") == (2, 3)
    assert find("abcb", "«b»") == "is there 2 times"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no.such"], "there is no break 'no.such'"),
        (["--jobs", "0"], "--jobs wants a number"),
        (["--nothing"], "unrecognized"),
    ],
)
def test_usage(arguments: list[str], words: str) -> None:
    said = subprocess.run([str(SCRIPTS / "mutate"), *arguments], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (2, "")
    assert words in said.stderr


def test_list() -> None:
    """A break a line: name, rule, file."""
    said = subprocess.run(
        [str(SCRIPTS / "mutate"), "--list", "copy.*"],
        capture_output=True,
        text=True,
    )
    lines = [line.split("\t") for line in said.stdout.splitlines()]
    assert said.returncode == 0
    assert len(lines) > 8
    assert all(name.startswith("copy.") and file for name, _, file in lines)
