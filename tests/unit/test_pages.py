"""The manual pages and the shell completions: current, readable, and installed by the wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpriv import cli
from kvmpriv.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT"]


#: How Python and the shell read one of kvmpriv's variables.
READ = r"(environ[^A-Z]{1,10}|[$][{]?)KVMPRIV_[A-Z_]+"


def man(page: Path) -> str:
    """A page as `man` prints it on a terminal of 100 columns; groff's warnings are errors."""
    env = {**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8", "MANROFFOPT": ""}
    done = subprocess.run(
        ["man", "--warnings", "-E", "ascii", "-l", page], capture_output=True, text=True, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def in_bash(completion: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    script = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=();'
        "$(complete -p kvmpriv | sed 's/.*-F \\([^ ]*\\).*/\\1/');"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, completion, *words], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_they_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "generate" / "pages.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), "run `make manual`"


def test_the_check_finds_a_stale_page(tmp_path: Path) -> None:
    """The check compares contents, not times."""
    program = (
        "import runpy, sys, pathlib, kvmpriv;"
        f"kvmpriv.__file__ = {str(tmp_path / '__init__.py')!r};"
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    script = str(ROOT / "scripts" / "generate" / "pages.py")
    command = [sys.executable, "-c", program, script]
    stale = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert (stale.returncode, stale.stderr.count("is not current: make manual")) == (1, 10)
    assert subprocess.run(command).returncode == 0
    assert subprocess.run([*command, "--check"]).returncode == 0
    assert (tmp_path / "man" / "kvmpriv.1").read_bytes() == (
        ROOT / "kvmpriv" / "man" / "kvmpriv.1"
    ).read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_for_each_command(installed: Path, command: str) -> None:
    """Read from where the wheel puts it: each option, each exit status, each example."""
    text = man(installed / "share" / "man" / "man1" / f"kvmpriv-{command}.1")
    lines = text.splitlines()
    assert [line for line in SECTIONS if line not in lines] == []
    assert lines[0].startswith(f"KVMPRIV-{command.upper()}(1)")
    for name in ("EXAMPLES", "SEE ALSO"):
        assert name in lines
    module = cli.command_module(command)
    for option in cli.command_parser(command)._option_string_actions:
        assert any(re.match(rf"(-[hqv], )?{option}\b", line.strip()) for line in lines)
    for status in module.EXIT_STATUS:
        assert any(line.split()[:1] == [cli.status_text(status)] for line in lines)
    flat = " ".join(text.split())
    for example, about in module.EXAMPLES:
        assert " ".join(example.split()) in flat
        assert about in flat


def test_the_page_of_kvmpriv(installed: Path) -> None:
    text = man(installed / "share" / "man" / "man1" / "kvmpriv.1")
    lines = text.splitlines()
    for name in [*SECTIONS, "COMMANDS", "FILES", "TROUBLESHOOTING", "EXAMPLES", "SEE ALSO"]:
        assert name in lines
    for command in COMMANDS:
        assert text.count(f"kvmpriv-{command}(1)") == 2


def test_every_variable_is_in_the_page_of_kvmpriv() -> None:
    """Each KVMPRIV_* variable that the code reads."""
    page = (ROOT / "kvmpriv" / "man" / "kvmpriv.1").read_text()
    found = subprocess.run(
        ["grep", "-rhoE", READ, "kvmpriv", "scripts", "tests/private"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    names = {word[word.index("KVMPRIV_") :] for word in found.stdout.splitlines()}
    assert {"KVMPRIV_REQUIRE", "KVMPRIV_CACHE", "KVMPRIV_JOBS"} <= names
    assert sorted(name for name in names if name not in page) == []


def test_completion(installed: Path) -> None:
    """By bash: commands, options, choices, and names of files where a file is meant."""
    script = installed / "share" / "bash-completion" / "completions" / "kvmpriv"
    assert in_bash(script, "kvmpriv", "") == [*COMMANDS, "help"]
    assert in_bash(script, "kvmpriv", "sel") == ["selftest"]
    for command in COMMANDS:
        options = [
            option
            for option in cli.command_parser(command)._option_string_actions
            if option.startswith("--")
        ]
        assert sorted(in_bash(script, "kvmpriv", command, "--")) == sorted(options)
    assert in_bash(script, "kvmpriv", "run", "--mode", "r") == ["real"]
    assert in_bash(script, "kvmpriv", "boot", "--kernel", "Make") == ["Makefile"]
    assert in_bash(script, "kvmpriv", "trace", "pyproj") == ["pyproject.toml"]
    assert in_bash(script, "kvmpriv", "help", "b") == ["boot"]


@pytest.mark.parametrize(
    ("place", "has"),
    [
        ("share/zsh/site-functions/_kvmpriv", "#compdef kvmpriv\n"),
        ("share/fish/vendor_completions.d/kvmpriv.fish", "complete -c kvmpriv "),
    ],
)
def test_completion_of_other_shells(installed: Path, place: str, has: str) -> None:
    """They are where these shells look, and know each option."""
    text = (installed / place).read_text()
    assert has in text
    for command in COMMANDS:
        for option in cli.command_parser(command)._option_string_actions:
            assert option.lstrip("-") in text
