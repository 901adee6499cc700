"""Write the manual pages and the shell completions; with --check, fail if they are not current.

Both come from the parsers of the commands, so that they can't disagree with them.  They are checked
in: a build of the wheel then needs neither shtab nor kvmpriv's own dependencies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import shtab

import kvmpriv
from kvmpriv import cli
from kvmpriv.commands import COMMANDS
from kvmpriv.commands._options import parse_path

PACKAGE = Path(kvmpriv.__file__).parent
COMPLETIONS = {"bash": "kvmpriv.bash", "zsh": "_kvmpriv", "fish": "kvmpriv.fish"}

ENVIRONMENT = {
    "COLUMNS": "The width of the help.",
    "NO_COLOR": "If it is set, the output has no colours.",
    "KVMPRIV_REQUIRE": "For the suite: names, separated by commas, of what must be there "
    "(restrictedmem, guest_memfd, host, root, ...). A test that lacks it fails; without this "
    "variable it is skipped. A wrong name prints the list of the names.",
    "KVMPRIV_KERNEL": "For the suite: the name of the bundled kernel that runs (restrictedmem, "
    "restrictedmem-debug, literal, guest_memfd, ...). It decides which tests are dangerous to it, "
    "and which of them look for known defects.",
    "KVMPRIV_VM": "Set by scripts/vm in the VM, where tests may change settings of the kernel.",
    "KVMPRIV_ARTIFACTS": "For the suite: the folder for the scripts that repeat a failure of the "
    "model test.",
    "KVMPRIV_MODEL_STEPS, KVMPRIV_MODEL_SECONDS": "The least number of steps of the model test, "
    "and the time that it may take.",
    "KVMPRIV_MODEL_SEED": "The seed of the model test; a failure prints the one that repeats it.",
    "KVMPRIV_CACHE": "For scripts/vm and scripts/kernel/build: the folder of kernels and logs "
    "(default: kvmpriv in $XDG_CACHE_HOME, or ~/.cache/kvmpriv).",
    "KVMPRIV_JOBS": "For scripts/kernel/build: the number of parallel jobs (default: one a CPU).",
}
#: Which of them a command reads; kvmpriv(1) has them all.
READS = {
    "probe": ("COLUMNS", "NO_COLOR"),
    "ps": ("COLUMNS", "NO_COLOR"),
    "run": ("COLUMNS",),
    "boot": ("COLUMNS",),
    "trace": ("COLUMNS",),
    "selftest": (
        *("COLUMNS", "NO_COLOR", "KVMPRIV_REQUIRE", "KVMPRIV_KERNEL", "KVMPRIV_ARTIFACTS"),
        *("KVMPRIV_MODEL_STEPS, KVMPRIV_MODEL_SECONDS", "KVMPRIV_MODEL_SEED"),
    ),
}
DEVICE = {"/dev/kvm": "KVM's device node. A command needs permission to read and write it."}
SCHEMA = "The JSON schema of --json, in the folder of the Python package."
FILES = {
    "probe": {**DEVICE, "kvmpriv/probe/schema.json": SCHEMA},
    "ps": {
        "/proc": "Descriptors, their links, and mappings. Without it the exit status is 3.",
        "/sys/kernel/debug/kvm": "KVM's statistics: which task made a VM, and how much memory its "
        "page tables map. Needs root, and debugfs mounted at /sys/kernel/debug.",
        "kvmpriv/ps/schema.json": SCHEMA,
    },
    "run": DEVICE,
    "boot": {
        **DEVICE,
        "/dev/net/tun": "Needed for --net.",
    },
    "trace": {},
    "selftest": {
        **DEVICE,
        "/dev/kmsg": "The kernel log. A warning of the kernel fails the test in which it came.",
        "kvmpriv/selftest/schema.json": SCHEMA,
    },
}
TROUBLE = {
    "/dev/kvm: Permission denied": "Add your user to the group of the device node (usually kvm) "
    "and log in again. `kvmpriv probe` prints the command.",
    "/dev/kvm: No such file or directory": "Load KVM's module, or enable virtualization in the "
    "firmware; in a container, pass the device on (--device /dev/kvm). `kvmpriv probe` prints "
    "which of these is missing.",
    "Unevictable grows and no VM runs": "A descriptor keeps a VM and its private memory alive. "
    "`kvmpriv ps` names the process that has it.",
    "The verdict is `none` on a new kernel": "Private memory needs a VM type that offers it: "
    "CONFIG_KVM_SW_PROTECTED_VM, SEV-SNP or TDX. Without them, use the kernels that come with the "
    "source tree (scripts/vm).",
    "scripts/vm prints that it uses TCG": "KVM on this host can't run nested guests, so QEMU "
    "emulates the CPU. Everything works, about ten times slower.",
    "scripts/vm exits with 120": "The command has ended, and the kernel has reported a warning, a "
    "bug, a leak or a taint. The log names it.",
    "scripts/vm exits with 123": "The VM did not come up. The log in the cache folder shows how "
    "far it came.",
}


def escape(text: str) -> str:
    """Text as roff takes it: no escape of its own, and no line that is a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return "\n".join(f"\\&{line}" if line[:1] in ".\\" else line for line in text.split("\n"))


def paragraphs(text: str) -> str:
    return "\n.PP\n".join(escape(part) for part in text.split("\n\n")) + "\n"


def terms(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Tagged paragraphs; the tags are roff already."""
    for tag, text in entries:
        yield f".TP\n{tag}\n{escape(text)}\n"


def bold(text: str) -> str:
    return f"\\fB{escape(text)}\\fR"


def italic(text: str) -> str:
    return f"\\fI{escape(text)}\\fR"


def value(action: argparse.Action) -> str:
    """What follows an option, or stands for a positional argument: in italics, [ ] if optional."""
    if action.nargs == 0:
        return ""
    names = action.metavar or "{" + ",".join(map(str, action.choices or (action.dest,))) + "}"
    words = " ".join(italic(name) for name in ([names] if isinstance(names, str) else names))
    if action.nargs == "?":
        return f"[{'=' if action.option_strings else ''}{words}]"
    return f"[{words} ...]" if action.nargs == "*" else words


def tag(action: argparse.Action) -> str:
    shown = value(action)
    if not action.option_strings:
        return shown
    separator = "" if action.nargs == "?" else " "
    names = ", ".join(bold(option) for option in action.option_strings)
    return f"{names}{separator}{shown}" if shown else names


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser: positional ones first."""
    found: list[argparse.Action] = parser._actions  # noqa: SLF001  # there is no public way
    return sorted(
        (action for action in found if action.help != argparse.SUPPRESS),
        key=lambda action: bool(action.option_strings),
    )


def synopsis(parser: argparse.ArgumentParser) -> str:
    """The arguments of a command as argparse's usage has them."""
    groups = parser._mutually_exclusive_groups  # noqa: SLF001
    grouped = {id(action): group for group in groups for action in group._group_actions}  # noqa: SLF001
    words: list[str] = []
    done: set[int] = set()
    for action in sorted(actions(parser), key=lambda action: not action.option_strings):
        if id(action) in done:
            continue
        group = grouped.get(id(action))
        members = [action] if group is None else list(group._group_actions)  # noqa: SLF001
        done.update(map(id, members))
        shown = " | ".join(short(member) for member in members)
        optional = (not action.required and bool(action.option_strings)) or action.nargs == "?"
        words.append(f"[{shown}]" if optional and not shown.startswith("[") else shown)
    return "\n".join(words)


def short(action: argparse.Action) -> str:
    """An argument with its first name alone."""
    shown = value(action)
    if not action.option_strings:
        return shown
    separator = " " if shown and action.nargs != "?" else ""
    return f"{bold(action.option_strings[0])}{separator}{shown}"


def described(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Each argument and its help, with %(default)s and such filled in."""
    for action in actions(parser):
        values = {**vars(action), "prog": parser.prog}
        yield tag(action), (action.help or "") % values


def section(title: str, *parts: str) -> str:
    return f".SH {title}\n{''.join(parts)}" if any(parts) else ""


def page(name: str, *sections: str) -> str:
    """A manual page; it has no date, so that the same parsers make the same page."""
    head = f'.TH {escape(name).upper()} 1 "" "kvmpriv {kvmpriv.__version__}" "User Commands"\n'
    return '.\\" Written by scripts/generate/pages.py: change the parsers instead.\n' + "".join(
        [head, *sections]
    )


def see_also(but: str) -> str:
    names = [f"kvmpriv-{name}" for name in COMMANDS]
    names = [name for name in ["kvmpriv", *names] if name != but]
    return ",\n".join(f"\\%{bold(name)}(1)" for name in names) + "\n"  # no hyphen in it


def command_page(command: str) -> str:
    """The page of a command."""
    module: Any = cli.command_module(command)
    parser = argparse.ArgumentParser(prog=f"kvmpriv {command}")
    module.add_arguments(parser)
    name = f"kvmpriv-{command}"
    examples = "".join(
        f".TP\n{bold(example)}\n{escape(about)}\n" for example, about in module.EXAMPLES
    )
    variables = ((bold(key), ENVIRONMENT[key]) for key in READS[command])
    return page(
        name,
        section("NAME", f"{escape(name)} \\- {escape(COMMANDS[command])}\n"),
        section("SYNOPSIS", f"{bold(f'kvmpriv {command}')}\n{synopsis(parser)}\n"),
        section("DESCRIPTION", paragraphs(parser.description or COMMANDS[command])),
        section("OPTIONS", *terms(described(parser))),
        section(
            "EXIT STATUS",
            *terms((bold(cli.status_text(key)), text) for key, text in module.EXIT_STATUS.items()),
        ),
        section("ENVIRONMENT", *terms(variables)),
        section("FILES", *terms((italic(key), text) for key, text in FILES[command].items())),
        section("EXAMPLES", examples),
        section("SEE ALSO", see_also(name)),
    )


def main_page() -> str:
    """The page of kvmpriv: the commands, and what they share."""
    parser = cli.make_parser()
    options = [entry for entry in described(parser) if entry[0].startswith("\\fB")]
    return page(
        "kvmpriv",
        section("NAME", "kvmpriv \\- KVM guest private memory: probe, run, boot, test\n"),
        section(
            "SYNOPSIS",
            f"{bold('kvmpriv')} {italic('COMMAND')} [{italic('ARGUMENT')} ...]\n.br\n",
            f"{bold('kvmpriv')} {bold('help')} [{italic('COMMAND')}]\n",
        ),
        section(
            "DESCRIPTION",
            paragraphs(
                "kvmpriv finds out what a host's KVM can do with guest private memory, runs guests "
                "with and without it, and tests a kernel against the rules of its ABIs: "
                "memfd_restricted (v9, a series of October 2022 that was never merged) and "
                "guest_memfd (Linux 6.8 and later).\n\n"
                "Results go to standard output, messages to standard error. --json prints one "
                "document with a schema version."
            ),
        ),
        section(
            "COMMANDS",
            *terms((bold(f"kvmpriv-{name}") + "(1)", text[0].upper() + text[1:] + ".")
                   for name, text in COMMANDS.items()),
        ),
        section("OPTIONS", *terms(options)),
        section(
            "EXIT STATUS",
            paragraphs(
                "Each command's page lists its own. Common to all are 2 for a command line or an "
                "input file that can't be used, 3 for KVM or an output that can't be used, and "
                "128+N when signal N ended the command."
            ),
        ),
        section("ENVIRONMENT", *terms((bold(key), text) for key, text in ENVIRONMENT.items())),
        section("FILES", *terms((italic(key), text) for key, text in DEVICE.items())),
        section("TROUBLESHOOTING", *terms((bold(key), text) for key, text in TROUBLE.items())),
        section("EXAMPLES", *terms([
            (bold("kvmpriv probe"), "Find out what this host can do; nothing is changed."),
            (bold("kvmpriv selftest"), "Test the running kernel."),
            (bold("kvmpriv help boot"), "Print the help of a command."),
        ])),
        section("SEE ALSO", see_also("kvmpriv")),
    )  # fmt: skip


def completion(shell: str) -> str:
    """The completion of kvmpriv for a shell, by shtab; it completes names of files, too."""
    parser = cli.make_parser(complete=True)
    (commands,) = (
        action.choices
        for action in actions(parser)
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001
    )
    for name, summary in COMMANDS.items():
        commands[name].description = summary  # zsh and fish show it beside the name
        for action in actions(commands[name]):
            if action.type is parse_path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def generate() -> dict[Path, str]:
    """Every file and its text."""
    texts = {PACKAGE / "man" / "kvmpriv.1": main_page()}
    for command in COMMANDS:
        texts[PACKAGE / "man" / f"kvmpriv-{command}.1"] = command_page(command)
    for shell, name in COMPLETIONS.items():
        texts[PACKAGE / "completion" / name] = completion(shell)
    return texts


def main() -> int:
    texts = generate()
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is not current: make manual", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(texts[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
