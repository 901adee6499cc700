"""The command line: help, errors, output, and that importing it has no side effects."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpriv import __version__, cli
from kvmpriv.commands import COMMANDS, _options, fail
from kvmpriv.exit_status import ExitStatus

KVMPRIV = [sys.executable, "-m", "kvmpriv"]
ASCII = {**os.environ, "PYTHONIOENCODING": "ascii"}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVMPRIV, *arguments], capture_output=True, text=True, env=env)


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    """Each command's help is ASCII, has examples and exit statuses, and fits the terminal."""
    done = run(name, "--help", env={**ASCII, "COLUMNS": "100"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert done.stdout.startswith(f"usage: kvmpriv {name} ")
    assert "\nexamples:\n  kvmpriv " in done.stdout
    assert "\nexit status:\n" in done.stdout
    for status in (ExitStatus.USAGE, ExitStatus.UNABLE):
        assert re.search(rf"^  {status:d} +\w", done.stdout, re.M)
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert run("help", name, env={**ASCII, "COLUMNS": "100"}).stdout == done.stdout


def test_names_are_spelt_as_their_owners_spell_them() -> None:
    """str.capitalize() made "linux", "bzimage" and "elf" of them."""
    assert "Boot Linux from a bzImage or a vmlinux." in run("boot", "--help").stdout
    assert "ELF" in run("run", "--help").stdout


def test_width() -> None:
    """COLUMNS sets the width of the help; a value that is not a number is ignored."""

    def widest(columns: str) -> int:
        text = run("selftest", "--help", env={**os.environ, "COLUMNS": columns}).stdout
        _, _, text = text.split("\n\nexamples:")[0].partition("\n\n")  # the usage wraps worse
        return max(map(len, text.split("\n")))

    assert 50 < widest("60") <= 60
    assert 150 < widest("200") <= 200
    assert 70 < widest("0") == widest("many") <= 80


def test_help_of_everything() -> None:
    for arguments in (["--help"], ["help"]):
        done = run(*arguments, env=ASCII)
        assert (done.returncode, done.stderr) == (0, "")
        for name in COMMANDS:
            assert name in done.stdout
    assert run("help").stdout == run("--help").stdout


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kvmpriv {__version__}\n", "")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "prog", "says"),
    [
        ([], "kvmpriv", "required: COMMAND"),
        (["prob"], "kvmpriv", "there is no command 'prob'; did you mean `probe`?"),
        (["xyzzy"], "kvmpriv", "there is no command 'xyzzy' (see"),
        (["help", "slftest"], "kvmpriv", "there is no command 'slftest'; did you mean `selftest`?"),
        (["--jsn"], "kvmpriv", "required: COMMAND"),
        (
            ["probe", "--jsn"],
            "kvmpriv probe",
            "arguments: --jsn; did you mean `--json`?",
        ),
        (["probe", "--jsn=1"], "kvmpriv probe", "did you mean `--json`?"),
        (["probe", "x"], "kvmpriv probe", "unrecognized arguments: x (see"),
        (
            ["probe", "--device", ""],
            "kvmpriv probe",
            "--device: the name of a file is empty",
        ),
        (["boot", "bz"], "kvmpriv boot", "required: --kernel; did you mean `--kernel bz`?"),
        (["boot", "--initrd", "i", "bz"], "kvmpriv boot", "did you mean `--kernel bz`?"),
        (["boot"], "kvmpriv boot", "required: --kernel (see"),
        (["boot", "--private", "bz"], "kvmpriv boot", "give the kernel with --kernel"),
        (["run", ""], "kvmpriv run", "argument IMAGE: the name of a file is empty"),
        (["run", "x", "--memory", "1.5G"], "kvmpriv run", "with K, M, G or T (512M)"),
        (["run", "x", "--memory", "9" * 30], "kvmpriv run", "is more than this host has"),
        (["trace", "--pag", "x"], "kvmpriv trace", "required: FILE"),
        (["selftest", "--timeout", "0"], "kvmpriv selftest", "'0' is not a number of seconds"),
    ],
)
def test_usage(arguments: list[str], prog: str, says: str) -> None:
    """An error prints the usage of the command that was given, and what may have been meant."""
    done = run(*arguments, env={**ASCII, "COLUMNS": "200"})
    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    usage, *_, message = done.stderr.splitlines()
    assert usage.startswith(f"usage: {prog} [-h]")
    assert done.stderr.count("usage: ") == 1
    assert message.startswith(f"{prog}: ")
    assert message.endswith(f"(see `{prog} --help`)")
    assert says in message


def test_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """A message can't move the cursor; letters that are not ASCII stay."""
    assert fail("run", "\x1b[2J\udcff é…\nsecond", ExitStatus.UNABLE) is ExitStatus.UNABLE
    assert capsys.readouterr().err == "kvmpriv run: \\x1b[2J\\udcff é…\nsecond\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("0x1000", 4096), ("16K", 16384), ("2MiB", 2 << 20), ("1M", 1 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert _options.parse_size(text) == size


# -- output ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["boot", "--help"], ["--version"]])
def test_help_that_can_not_be_written(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*KVMPRIV, *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == ExitStatus.UNABLE
    assert done.stderr == "kvmpriv: standard output: No space left on device\n"


def test_stderr_that_can_not_be_written() -> None:
    """The status stays that of the error; Python's own is 120."""
    with Path("/dev/full").open("w") as full:
        for arguments, status in ((["prob"], 2), (["run", "/nowhere"], 2)):
            done = subprocess.run([*KVMPRIV, *arguments], stdout=subprocess.PIPE, stderr=full)
            assert (done.returncode, done.stdout) == (status, b"")


def test_reader_that_is_gone() -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -c1 > /dev/null; exit ${PIPESTATUS[0]}', "bash",
         sys.executable, "-c", BIG],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


#: A command that prints more than a pipe holds.
BIG = """\
import sys
from kvmpriv import cli
from kvmpriv.commands import trace
trace.main = lambda options: sys.stdout.write("x" * (1 << 20)) * 0
sys.argv = ["kvmpriv", "trace", "x"]
cli.run()
"""


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        ("MemoryError", ExitStatus.UNABLE, "kvmpriv trace: out of memory (see"),
        ("KeyboardInterrupt", 130, ""),
        ("SystemExit(143)", 143, ""),
    ],
)
def test_what_ends_a_command(raised: str, status: int, says: str) -> None:
    program = BIG.replace('sys.stdout.write("x" * (1 << 20)) * 0', f"fall({raised})")
    program = f"def fall(error):\n    raise error\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(says)
    assert bool(done.stderr) == bool(says)
    assert "Traceback" not in done.stderr


# -- start-up --------------------------------------------------------------------------------------


def test_importing_the_entry_point_changes_nothing() -> None:
    """A documentation generator imports it, too: its garbage collection goes on."""
    program = "import gc, kvmpriv.__main__; print(gc.isenabled(), gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True 0\n"


@pytest.mark.parametrize(
    ("call", "printed"),
    [
        ("sys.argv = ['kvmpriv', 'probe']; cli.run()", "True True"),
        ("gc.disable(); sys.exit(cli.main(['probe']))", "False False"),
        ("sys.exit(cli.main(['probe']))", "True False"),
    ],
    ids=["own-process", "caller-disabled-it", "caller"],
)
def test_a_command_runs_with_garbage_collection(call: str, printed: str) -> None:
    """The command's own process has it on; a caller of main() finds it as it was."""
    program = (
        "import gc, sys; from kvmpriv import cli; from kvmpriv.commands import probe\n"
        "probe.main = lambda _: print(gc.isenabled(), bool(gc.get_freeze_count())) or 7\n"
    )
    done = subprocess.run([sys.executable, "-c", program + call], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == (f"{printed}\n", "", 7)


def test_atexit_and_profilers(tmp_path: Path) -> None:
    """The process ends as any Python process does: exit handlers run, profiles are printed."""
    profile = [sys.executable, "-m", "cProfile", "-o", str(tmp_path / "profile")]
    done = subprocess.run([*profile, "-m", "kvmpriv", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert (tmp_path / "profile").stat().st_size
    program = (
        "import atexit, sys; atexit.register(print, 'ended'); from kvmpriv import cli; cli.run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"kvmpriv {__version__}\nended\n"


def test_main_returns() -> None:
    """In another program it returns the status, for usage and help too."""
    assert cli.main(["--version"]) == ExitStatus.OK
    assert cli.main(["prob"]) == ExitStatus.USAGE
    assert cli.main(["trace", "/nowhere"]) == ExitStatus.USAGE


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        ("MemoryError()", 3, "kvmpriv probe: out of memory (see `ulimit -v`"),
        (
            "ImportError('no segment')",
            3,
            "kvmpriv probe: a module can't be loaded, often for lack of memory or files",
        ),
        ("ModuleNotFoundError('x')", 1, "Traceback"),  # an installation that is damaged
    ],
)
def test_a_command_that_can_not_be_loaded(error: str, status: int, words: str) -> None:
    """Without memory the modules fail to load: exit status 3, which is no verdict."""
    code = f"""\
import sys
from kvmpriv import cli

def fails(name):
    raise {error}

cli.command_module = fails
sys.exit(cli.main(["probe", "-q"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(words)
