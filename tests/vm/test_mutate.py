"""scripts/kernel/mutate without a kernel: the breaks, and how they are applied to a source."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from kbuild import breaks, mutant
from kbuild.breaks import Break
from kbuild.errors import Refused
from kbuild.kernels import KERNELS
from kbuild.recipe import Plan
from kbuild.store import with_source
from kvmpriv.selftest import rules
from private.support.requirements import missing

MUTATE = ROOT / "scripts/kernel/mutate"
BREAKS = {name: breaks.read(kernel) for name, kernel in KERNELS.items() if kernel.breaks}
LEAST = {"restrictedmem": 200, "guest_memfd-in-place": 60}
ALL = [one for some in BREAKS.values() for one in some]
SELECTING = "mm/selecting.c"
SOURCE = """\
#include <linux/x.h>
static int f(int a, int b, int c)
{
	int r;
	long n = a ? b : c;

	if (a < b && c)
		return 1;
	r = g(a, b);
	switch (c) {
	case 1:
		h(a);
		break;
	}
	return r;
}
"""


def test_the_names() -> None:
    """Each break has a name that fits the kernel's command line, and a description."""
    assert {name: len(some) >= LEAST[name] for name, some in BREAKS.items()} == dict.fromkeys(
        LEAST, True
    )
    for one in ALL:
        assert re.fullmatch(r"[a-z0-9-]+\.[a-z0-9-]+", one.name)
        assert one.description, one.name


def test_the_rules() -> None:
    """Each break names a rule of the suite's table."""
    table = rules.read(ROOT / "tests/private")
    assert table
    assert [(one.name, one.rule) for one in ALL if one.rule not in table] == []


def test_the_tests_that_are_named() -> None:
    """The tests of each break exist."""
    for one in ALL:
        for test in one.tests:
            file, _, name = test.partition("::")
            source = (ROOT / "tests" / "private" / file).read_text()
            assert f"def {name.partition('[')[0]}(" in source, test


def patched(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the breaks change, with the kernel's patches applied."""
    try:
        plan = with_source(Plan(name))
    except Refused as refused:
        missing(name, str(refused))
    tree = tmp_path_factory.mktemp("series")
    patches = "".join(patch.read_text() for patch in plan.patches())
    pairs = re.findall(r"^--- (\S+)\n\+\+\+ (\S+)", patches, re.MULTILINE)
    files = {new.removeprefix("b/") for old, new in pairs}
    files -= {new.removeprefix("b/") for old, new in pairs if old == "/dev/null"}
    names = [f"*/{file}" for file in sorted(files)]
    command = ["tar", "-xf", str(plan.origin), "--strip-components=1", "--wildcards"]
    command += ["--no-wildcards-match-slash", *names]
    subprocess.run(command, cwd=tree, check=True)
    for patch in plan.patches():
        subprocess.run(["patch", "-p1", "-s", "-F0", "-i", patch], cwd=tree, check=True)
    return tree


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", BREAKS)
def test_every_break_applies(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All breaks are applied to one source, each with a switch."""
    series, some = patched(name, tmp_path_factory), BREAKS[name]
    mutant.put_breaks(series, some, KERNELS[name].selecting)
    text = "".join((series / file).read_text() for one in some for file in set(one.files))
    for number, one in enumerate(some, 1):
        assert f"kvmpriv_broken({number})" in text, one.name


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "mm").mkdir()
    (tmp_path / "include" / "linux").mkdir(parents=True)
    (tmp_path / SELECTING).write_text(SOURCE)
    return tmp_path


def one(name: str, old: str, new: str) -> Break:
    """A break that replaces lines of SOURCE."""
    assert SOURCE.count(old) == 1
    at = SOURCE[: SOURCE.index(old)].count("\n") + 1
    minus, plus = (
        "".join(f"{sign}{line}" for line in text.splitlines(keepends=True))
        for sign, text in (("-", old), ("+", new))
    )
    counts = f"@@ -{at},{old.count(chr(10))} +{at},{new.count(chr(10))} @@\n"
    diff = f"--- a/{SELECTING}\n+++ b/{SELECTING}\n{counts}{minus}{plus}"
    return Break(name, "a.rule", ("test",), "", "", diff)


@pytest.mark.parametrize(
    ("old", "new", "switched"),
    [
        # A whole condition, an argument, a right-hand side: expressions.
        ("\tif (a < b && c)\n", "\tif (a <= b && c)\n",
         "if ((kvmpriv_broken(1) ? (a <= b && c) : (a < b && c)))\n"),
        ("\tr = g(a, b);\n", "\tr = g(a, b + 1);\n",
         "r = g(a, (kvmpriv_broken(1) ? (b + 1) : (b)));\n"),
        ("\tr = g(a, b);\n", "\tr = g(a, b) - 1;\n",
         "r = (kvmpriv_broken(1) ? (g(a, b) - 1) : (g(a, b)));\n"),
        ("\tr = g(a, b);\n", "\tr = 0;\n", "r = (kvmpriv_broken(1) ? (0) : (g(a, b)));\n"),
        ("\treturn r;\n", "\treturn -r;\n", "return (kvmpriv_broken(1) ? (-r) : (r));\n"),
        ("\tlong n = a ? b : c;\n", "\tlong n = a ? b : 0;\n",
         "long n = (kvmpriv_broken(1) ? (a ? b : 0) : (a ? b : c));\n"),
        # A statement that goes, that comes, that becomes two, that is the body of an `if`.
        ("\tr = g(a, b);\n", "", "{ if (kvmpriv_broken(1)) {  } else { r = g(a, b); } }\n"),
        ("\treturn r;\n", "\tmsleep(1);\n\treturn r;\n",
         "{ if (kvmpriv_broken(1)) { msleep(1); } else {  } }return r;\n"),
        ("\t\treturn 1;\n", "\t\t{ h(a); return 1; }\n",
         "{ if (kvmpriv_broken(1)) { { h(a); return 1; } } else { return 1; } }\n"),
        ("\tif (a < b && c)\n\t\treturn 1;\n", "",
         "{ if (kvmpriv_broken(1)) {  } else { if (a < b && c)\n\t\treturn 1; } }\n"),
        # Behind a label.
        ("\t\th(a);\n", "", "case 1:\n\t\t{ if (kvmpriv_broken(1)) {  } else { h(a); } }\n"),
    ],
)  # fmt: skip
def test_what_is_switched(tree: Path, old: str, new: str, switched: str) -> None:
    """The smallest expression or statement around the change."""
    mutant.put_breaks(tree, [one("x.a", old, new)], SELECTING)
    text = (tree / SELECTING).read_text()
    assert text.startswith("#include <linux/kvmpriv_break.h>\n#include <linux/x.h>\n")
    assert switched in text
    assert '{ "none", "x.a" }' in text


def test_breaks_of_one_place_and_within_another(tree: Path) -> None:
    """Several breaks of one place are chained, and a place may be within another."""
    mutant.put_breaks(
        tree,
        [
            one("x.a", "\tr = g(a, b);\n", "\tr = g(a, 1);\n"),
            one("x.b", "\tr = g(a, b);\n", "\tr = g(a, 2);\n"),
            one("x.c", "\tr = g(a, b);\n", "\tr = g(a);\n"),
            one("x.d", "\tr = g(a, b);\n", ""),
        ],
        SELECTING,
    )
    text = (tree / SELECTING).read_text()
    assert (
        "{ if (kvmpriv_broken(4)) {  } else { r = (kvmpriv_broken(3) ? (g(a)) : (g(a, "
        "(kvmpriv_broken(1) ? (1) : kvmpriv_broken(2) ? (2) : (b))))); } }\n"
    ) in text


def test_a_break_that_does_not_apply(tree: Path) -> None:
    """The error names it; likewise a break whose change is not in an expression or a statement."""
    gone = one("x.gone", "\treturn r;\n", "\treturn 0;\n")
    gone = gone._replace(diff=gone.diff.replace("-\treturn r;", "-\treturn q;"))
    outside = one("x.outside", "\tint r;\n", "\tlong r;\n")
    with pytest.raises(Refused) as refused:
        mutant.put_breaks(tree, [gone, outside], SELECTING)
    assert refused.value.code == 4
    assert re.search(r"x\.gone: .*Hunk #1 FAILED at 15", str(refused.value), re.DOTALL)
    assert "x.outside: line 4: the change is not within one expression" in str(refused.value)
    assert (tree / SELECTING).read_text() == SOURCE


@pytest.mark.parametrize("lacking", ["Rule: a.b\n", "Tests: t.py::test\n", "--- a/f\n+++ b/f\n"])
def test_a_header_that_lacks_something(lacking: str) -> None:
    """The error names what is missing."""
    text = "Rule: a.b\nTests: t.py::test\n\nA sentence.\n\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n"
    assert breaks.parse("x.y", text).description == "A sentence."
    with pytest.raises(Refused, match=r"the break x\.y\.patch has no (Rule|Tests|diff)"):
        breaks.parse("x.y", text.replace(lacking, ""))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no.such"], "there is no break 'no.such'"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--kernel", "guest_memfd"], "invalid choice: 'guest_memfd'"),
        (["--kernel", "guest_memfd-in-place", "copy.*"], "there is no break 'copy.*'"),
        (["--nothing"], "unrecognized"),
    ],
)
def test_usage(arguments: list[str], words: str) -> None:
    done = subprocess.run([MUTATE, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


@pytest.mark.parametrize(
    ("options", "group"), [((), "copy."), (("--kernel", "guest_memfd-in-place"), "busy.")]
)
def test_list(options: tuple[str, ...], group: str) -> None:
    """A break a line: name, rule, files."""
    command = [str(MUTATE), *options, "--list", f"{group}*"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert len(lines) > 8
    assert all(name.startswith(group) and rule and files for name, rule, *files in lines)
