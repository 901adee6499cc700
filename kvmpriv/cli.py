"""The command line: it finds the command, and handles output and Ctrl-C for all of them."""

from __future__ import annotations

import argparse
import errno as _errno
import gc
import io
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from .commands import COMMANDS, fail
from .exit_status import ExitStatus
from .terminal import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import ModuleType
    from typing import TextIO

__all__ = ["command_module", "command_parser", "main", "make_parser", "run", "status_text"]

_DESCRIPTION = "KVM guest private memory: probe a host, run guests, test a kernel."
_SIGINT, _SIGPIPE = 2, 13
#: How the name of a fact script ends that Ansible runs without arguments, and what it must do.
#: Ansible reads its output only if the exit status is 0.
_FACT_SCRIPT, _FACT = ".fact", ["probe", "--format", "ansible"]


class _Formatter(argparse.HelpFormatter):
    """Fills paragraphs to the terminal's width; lines that begin with a space, each by itself."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"width": _width() - 2, **options})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        lines: list[str] = []
        for paragraph in text.split("\n\n"):
            if lines:
                lines.append("")
            words: list[str] = []
            for line in [*paragraph.splitlines(), ""]:
                if line and not line.startswith(" "):
                    words.append(line)
                    continue
                if words:
                    lines.append(fill(" ".join(words), width, indent))
                    words = []
                if line:
                    lines += _wrapped(indent + line, width)
        return "\n".join(lines)


def _wrapped(line: str, width: int) -> list[str]:
    """Break a line, with its text under its text: ``  3      text``.  A command stays whole."""
    from textwrap import wrap  # argparse has imported it to fill the other lines

    text = line.lstrip()
    if not line.startswith(" " * 3) and "  " not in text:
        return [line]
    text = text.split("  ")[-1].lstrip()
    return wrap(line, width, subsequent_indent=" " * (len(line) - len(text)))


def _width() -> int:
    """Columns of the terminal, as `shutil.get_terminal_size` returns them.

    argparse asks for each argument that is added, and importing shutil takes milliseconds.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


class _Parser(argparse.ArgumentParser):
    """Reports errors with the usage of the command that was given, and suggests a correction."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})
        self._words: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Remember the words, which `error` looks at."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage, what was wrong and what may have been meant; exit with 2."""
        self.print_usage(sys.stderr)
        hint = self._missing_option(message) or self._misspelt_option(message)
        self.exit(ExitStatus.USAGE, f"{self.prog}: {message}{hint} (see `{self.prog} --help`)\n")

    def _missing_option(self, message: str) -> str:
        """For ``boot KERNEL``: the file was given without its option."""
        required = [action for action in self._actions if action.required and action.option_strings]
        if not required or not message.startswith("the following arguments are required"):
            return ""
        for action in required:
            action.required = False
        _, rest = super().parse_known_args(self._words)
        strays = [word for word in rest if not word.startswith("-")]
        return f"; did you mean `{required[0].option_strings[0]} {strays[0]}`?" if strays else ""

    def _misspelt_option(self, message: str) -> str:
        _, _, words = message.partition("unrecognized arguments: ")
        word = words.split(" ")[0].partition("=")[0]
        return did_you_mean(word, self._option_string_actions) if word.startswith("-") else ""


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The name that is close to `word`, as the end of a message; empty if there is none."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(names), 1)
    return f"; did you mean `{close[0]}`?" if close else ""


def command_module(command: str) -> ModuleType:
    """The module of a command, with `add_arguments` and `main`."""
    return import_module(f".commands.{command}", __package__)


def command_parser(
    name: str, parser: argparse.ArgumentParser | None = None
) -> argparse.ArgumentParser:
    """Add the arguments and the help of a command to `parser`, or to a new one; returns it."""
    parser = parser or _Parser(prog=f"kvmpriv {name}")
    module = command_module(name)
    module.add_arguments(parser)
    parser.description = parser.description or COMMANDS[name]
    parts = [parser.epilog or ""]
    if examples := getattr(module, "EXAMPLES", ()):
        parts.append("examples:")
        parts[-1] += "".join(f"\n  {example}\n      {about}" for example, about in examples)
    if statuses := getattr(module, "EXIT_STATUS", {}):
        parts.append("exit status:")
        parts[-1] += "".join(f"\n  {status_text(key):6} {text}" for key, text in statuses.items())
    parser.epilog = "\n\n".join(filter(None, parts)) or None
    return parser


def status_text(key: ExitStatus | str) -> str:
    """A key of a command's EXIT_STATUS, as help and manual pages print it."""
    return key if isinstance(key, str) else f"{key:d}"


def make_parser(*, complete: bool = False) -> argparse.ArgumentParser:
    """The parser of ``kvmpriv``; `complete` gives it the arguments of every command too."""
    from . import __version__

    parser = _Parser(prog="kvmpriv", description=_DESCRIPTION)
    parser.add_argument(
        "--version",
        action="version",
        version=f"kvmpriv {__version__}",
        help="print the version and exit",
    )
    parser.epilog = "`kvmpriv COMMAND --help` and the manual page kvmpriv-COMMAND(1) describe "
    parser.epilog += "a command."
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        added = commands.add_parser(name, help=summary)
        if complete:
            command_parser(name, added)
    about = commands.add_parser("help", help="print the help of kvmpriv or of a command")
    about.description = "Print the help of kvmpriv, or of a command."
    about.add_argument("about", nargs="?", metavar="COMMAND", choices=list(COMMANDS))
    return parser


def _run(arguments: list[str], own_process: bool) -> int:
    """Parse the command line and run the command; SystemExit for usage and help."""
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        return _run_without_command(name, arguments)
    options = command_parser(name).parse_args(arguments[1:])
    if own_process:
        gc.freeze()
        gc.enable()
    if sys.stdout is None:
        return fail("", "standard output is closed", ExitStatus.UNABLE)
    status: int = command_module(name).main(options)
    return status


def _run_without_command(name: str, arguments: list[str]) -> int:
    parser = make_parser()
    about = arguments[1] if name == "help" and len(arguments) > 1 else name
    if about in COMMANDS and len(arguments) == 2:
        command_parser(about).print_help()
    elif arguments == ["help"]:
        parser.print_help()
    elif about and not about.startswith("-") and about != "help":
        parser.error(f"there is no command {about!r}{did_you_mean(about, COMMANDS)}")
    else:
        parser.parse_args(arguments)  # --help and --version exit, all else is an error
    return ExitStatus.OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    if sys.stderr is None:  # closed: what is printed there must not go to another file
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    is_fact = False
    own_process = argv is None
    if argv is None:  # this process is the command, so the standard streams may be changed
        _prepare_output()
        argv = sys.argv[1:]
        if is_fact := not argv and sys.argv[0].endswith(_FACT_SCRIPT):
            argv = _FACT
    arguments = list(argv)
    name = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    try:
        try:
            status = _run(arguments, own_process)
            if is_fact and sys.stdout is not None:
                status = ExitStatus.OK
        except SystemExit as ended:  # from argparse: the help was printed, or an error
            status = ended.code if isinstance(ended.code, int) else ExitStatus.USAGE
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        status = ExitStatus.SIGNALLED + _SIGPIPE  # as if SIGPIPE had ended this process
    except OutputError as error:
        if error.errno == _errno.EPIPE:
            status = ExitStatus.SIGNALLED + _SIGPIPE
        else:
            status = fail("", f"standard output: {error.strerror}", ExitStatus.UNABLE)
    except KeyboardInterrupt:
        status = ExitStatus.SIGNALLED + _SIGINT
        with suppress(OSError):  # what was printed before Ctrl-C is still right
            sys.stdout.flush()
    except MemoryError:
        status = fail(
            name, "out of memory (see `ulimit -v` and the memory cgroup)", ExitStatus.UNABLE
        )
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        limits = "often for lack of memory or files (see `ulimit -v` and `ulimit -n`)"
        status = fail(name, f"a module can't be loaded, {limits}: {error}", ExitStatus.UNABLE)
    else:
        return status
    _discard(sys.stdout)
    return status


class _Stdout(io.FileIO):
    """File descriptor 1; its errors are OutputError."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


def _prepare_output() -> None:
    """Escape what the encoding of standard output and error lacks, and report failed writes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        return
    raw = _Stdout(sys.stdout.fileno(), "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=sys.stdout.encoding,
        errors="backslashreplace",
        line_buffering=raw.isatty(),
    )


def _discard(stream: TextIO) -> None:
    """Let what is still buffered go to /dev/null: Python would try to write it again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def run() -> NoReturn:
    """Run the command line of this process and exit."""
    gc.disable()  # until the command's modules are imported, since no import makes garbage
    status = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except OSError:  # a message that can't be written doesn't change the status
                _discard(stream)
    gc.freeze()  # else the interpreter examines every object once more, for a fifth of a probe
    sys.exit(status)
