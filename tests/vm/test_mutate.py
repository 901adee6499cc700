"""scripts/kernel/mutate without a kernel: the breaks, and how they are applied to a source."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from kbuild import breaks, literal, mutant, mutate, trial
from kbuild.breaks import Break
from kbuild.errors import Refused
from kbuild.kernels import KERNELS
from kbuild.recipe import Plan
from kbuild.store import with_source
from kvmpriv.selftest import rules
from private.support.defects import DEBUG, DEFECTS
from private.support.requirements import missing

MUTATE, HISTORY = ROOT / "scripts/kernel/mutate", ROOT / "scripts/kernel/history"
#: What the image of each kernel contains.
BREAKS = {name: breaks.read(kernel) for name, kernel in KERNELS.items() if kernel.breaks}
LEAST = {"restrictedmem": 200, "guest_memfd": 220, "guest_memfd-in-place": 60}
PAST = [one for kernel in KERNELS.values() for one in breaks.of(kernel.past)]
ALL = [one for some in BREAKS.values() for one in some] + [one for one in PAST if not one.diff]
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
    for some in BREAKS.values():
        assert len({one.name for one in some}) == len(some)


def test_the_bugs_that_history_had() -> None:
    """Each names the commit that fixed it, or its CVE; and either tests or why none can see it."""
    assert len(PAST) >= 20
    for one in PAST:
        assert re.fullmatch(
            r"([0-9a-f]{12}, )*[0-9a-f]{12} \(\d\.\d+\)|CVE-\d{4}-\d+", one.commit
        ), one.name
    for one in ALL:
        assert bool(one.tests) != bool(one.unseen), one.name


def test_the_patches_that_are_undone() -> None:
    """Each line `Undoes` names a patch of fixes/ and a known defect, which no other break names."""
    patches = (ROOT / "scripts/kernel" / KERNELS["restrictedmem"].fixes).iterdir()
    numbers = {path.name.partition("-")[0] for path in patches}
    undone = [one.undoes.split() for one in BREAKS["restrictedmem"] if one.undoes]
    assert {number for number, _ in undone} <= numbers
    names = [name for _, name in undone]
    assert sorted(names) == sorted(set(names))
    # What else there is needs a debug kernel, or code that a later patch has replaced.
    debug = {one.name for one in DEFECTS.values() if one.needs in DEBUG}
    assert set(names) == DEFECTS.keys() - debug - {"conversion-by-page"}
    assert [one.undoes.split() for one in literal.undoing()] == sorted(undone)


@pytest.mark.parametrize(
    ("patch", "code", "found", "unnamed", "ended", "good"),
    [
        ("0013", 1, {"notified-in-bytes"}, [], 0, True),
        ("0013", 0, set(), [], 0, False),
        ("0013", 1, {"notified-in-bytes", "size-0-frees"}, [], 0, False),
        ("0013", 1, {"notified-in-bytes"}, ["FAILED x - assert 1 == 2"], 0, False),
        ("0013", 120, {"notified-in-bytes"}, [], 0, False),
        # A dangerous defect: the suite must not meet it, and its detector must.
        ("0012", 0, set(), [], 121, True),
        ("0012", 121, set(), [], 121, False),
        ("0012", 1, {"fstat"}, [], 121, False),
        ("0012", 0, set(), [], 0, False),
        # No test can notice this one.
        ("0031", 0, set(), [], 0, True),
    ],
)
def test_a_row_of_the_patches(
    patch: str,
    code: int,
    found: set[str],
    unnamed: list[str],
    ended: int,
    good: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A row is right if the suite named just the defect, or did not meet a dangerous one."""
    known = [literal.Defect(name, bool(one.dangerous), "") for name, one in DEFECTS.items()]
    booted: list[list[str]] = []

    def run(kernel: list[str], _: list[str]) -> literal.Seen:
        booted.append(kernel)
        return literal.Seen(code, "", [*found, *unnamed], found, unnamed)

    monkeypatch.setattr(literal, "defects", lambda: known)
    monkeypatch.setattr(literal, "find_or_build", lambda *_: Path("/folder"))
    monkeypatch.setattr(literal, "run", run)
    monkeypatch.setattr(literal, "alone", lambda *_: (ended, ["vm: the kernel panicked"]))
    assert literal.main(["--without", patch]) == int(not good)
    row, *more = capsys.readouterr().out.splitlines()
    number, name, arrow, *_ = row.split()
    assert (number, arrow) == (patch, "→")
    assert [name] == [one.undoes.split()[1] for one in literal.undoing() if patch in one.undoes]
    assert row.endswith("WRONG") == (not good)
    assert [line.strip() for line in more] == [f"UNNAMED {line}" for line in unnamed]
    [(image, option, words)] = booted
    assert (image, option) == ("/folder/bzImage", "--append")
    assert words.startswith("restrictedmem.break=")


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
    """The files that the breaks and the kernel's patches change, with the patches applied."""
    try:
        plan = with_source(Plan(name))
    except Refused as refused:
        missing(name.replace("-", "_"), str(refused))
    tree = tmp_path_factory.mktemp("series")
    patches = "".join(patch.read_text() for patch in plan.patches())
    pairs = re.findall(r"^--- (\S+)\n\+\+\+ (\S+)", patches, re.MULTILINE)
    files = {new.removeprefix("b/") for old, new in pairs}
    files |= {file for one in BREAKS[name] for file in one.files}
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
    (series / mutant.HEADER).parent.mkdir(parents=True, exist_ok=True)
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
    unseen = text.replace("Tests: t.py::test", "Unseen: no\n way")
    assert breaks.parse("x.y", unseen).unseen == "no way"
    past = "Commit: 123456789abc (7.3)\n" + unseen.partition("\n--- a/")[0]
    assert not breaks.parse("x.y", past).diff
    with pytest.raises(Refused, match=r"the break x\.y\.patch has no (Rule|Tests|diff)"):
        breaks.parse("x.y", text.replace(lacking, ""))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no.such"], "there is no break 'no.such'"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--kernel", "guest_memfd-6.12"], "invalid choice: 'guest_memfd-6.12'"),
        (["--kernel", "guest_memfd-in-place", "copy.*"], "there is no break 'copy.*'"),
        (["--nothing"], "unrecognized"),
    ],
)
def test_usage(arguments: list[str], words: str) -> None:
    done = subprocess.run([MUTATE, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


@pytest.mark.parametrize(
    ("command", "group"),
    [
        ((MUTATE,), "copy."),
        ((MUTATE, "--kernel", "guest_memfd"), "prefault."),
        ((MUTATE, "--kernel", "guest_memfd-in-place"), "busy."),
        ((HISTORY,), "bug."),
    ],
)
def test_list(command: tuple[str, ...], group: str) -> None:
    """A break a line: name, rule, files; a bug that can't be put back has no file."""
    done = subprocess.run([*command, "--list", f"{group}*"], capture_output=True, text=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert len(lines) > 8
    assert all(name.startswith(group) and rule for name, rule, *_ in lines)
    assert sum(bool(files) for _, _, *files in lines) > 8


def test_the_table() -> None:
    """A line for each: what caught it, that nothing did, or why nothing can; a bug's commit."""
    diff = "--- a/f\n+++ b/f\n"
    chosen = [
        Break("a.b", "a.rule", ("test",), "", "", diff),
        Break("a.c", "a.rule", ("test",), "", "", diff),
        Break("a.d", "a.rule", ("test",), "", "", diff, "123456789abc (7.3)"),
        Break("a.e", "a.rule", (), "", "", diff, "", "There is no way."),
    ]
    results = {
        "a.b": mutate.Result(caught=True, test="test_x.py::test", how="stuck"),
        "a.c": mutate.Result(caught=False),
        "a.d": mutate.Result(caught=True, test="test_y.py::test"),
    }
    assert mutate.table(chosen, results).splitlines() == [
        "a.b                    → a.rule: test_x.py::test (stuck)",
        "a.c                    → ESCAPED",
        "a.d 123456789abc (7.3) → a.rule: test_y.py::test",
        "a.e                    → not seen: There is no way.",
    ]


@pytest.mark.parametrize("end", ["", "\n"], ids=["a line that has no end", "whole lines"])
def test_what_a_killed_process_has_printed(end: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The tests of a break are killed in the middle of a line; mutate reads the next line."""
    trial.report("some.break")
    print("tests/private/test_x.py::test_y ", end=end, flush=True)
    trial.report("ended", -9)
    trial.report("without", 0)
    trial.report("other.break")
    first, second = mutate.reports(capfd.readouterr().out)
    assert (first.name, first.ended, first.without) == ("some.break", -9, 0)
    assert first.failed()[0] == "test_x.py::test_y"
    assert (second.name, second.ended) == ("other.break", None)
