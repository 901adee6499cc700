"""``kvmpriv run``: bring up a guest from a file, its output ours, its exit status ours."""

from __future__ import annotations

import argparse
import os
import re
import sys

from ..kvm import Kvm
from ..memory import PAGE_SIZE
from .bare import EXIT_PORT, SERIAL_PORT, GuestCrash, GuestTimeout, Machine
from .image import Image, ImageError, Mode, load_flat, load_image
from .ready import HELLO

__all__ = ["add_arguments", "main"]

#: Exit statuses of ours; a guest may have any other, and these too.
EXIT_USAGE, EXIT_NO_KVM, EXIT_TIMEOUT, EXIT_CRASH = 2, 3, 124, 125

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """``16M``, ``0x10000``, ``4096``: bytes, page aligned, no more than the host has."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)([KMGT]?)(?:i?B)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 16M or 0x1000000")
    size = int(match[1], 0 if match[1][:2] in ("0x", "0X") else 10) * _UNITS[match[2]]
    if size == 0:
        raise argparse.ArgumentTypeError("a guest needs memory: its size can't be 0")
    if size % PAGE_SIZE:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {PAGE_SIZE} bytes")
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > host:
        raise argparse.ArgumentTypeError(f"{text} is more than this host has ({host >> 20}M)")
    return size


def parse_number(text: str) -> int:
    """An address: decimal, or hexadecimal with 0x."""
    try:
        number = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def parse_seconds(text: str) -> float:
    """A time limit: seconds, more than 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:  # beyond it a timer can't wait
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"The guest prints on port {SERIAL_PORT:#x} and ends with a byte, its exit status, on port "
        f"{EXIT_PORT:#x}\n(or with HLT: 0).  It gets its arguments as main() does in long mode, "
        "rdi = argc and rsi = argv;\nin real mode di is their number and si the first of the "
        "strings.\n\n"
        f"exit status: the guest's; {EXIT_USAGE} usage or a bad image; {EXIT_NO_KVM} KVM can't be "
        f"used;\n{EXIT_TIMEOUT} out of time; {EXIT_CRASH} the guest crashed"
    )
    parser.add_argument("image", nargs="?", help="a flat binary, or a static ELF for x86-64")
    parser.add_argument("arguments", nargs="*", help="arguments for the guest (after --)")
    parser.add_argument("--hello", action="store_true", help="the ready guest instead of IMAGE")
    parser.add_argument(
        "--mode",
        choices=[mode.value for mode in Mode],
        help="how a flat binary starts (default: long)",
    )
    parser.add_argument(
        "--memory", type=parse_size, default=16 << 20, metavar="SIZE", help="16M if not given"
    )
    parser.add_argument(
        "--load", type=parse_number, metavar="ADDRESS", help="where a flat binary goes"
    )
    parser.add_argument(
        "--entry", type=parse_number, metavar="ADDRESS", help="where execution begins"
    )
    parser.add_argument(
        "--timeout", type=parse_seconds, metavar="SECONDS", help="end the guest after so long"
    )


def _image(options: argparse.Namespace) -> Image:
    mode = Mode(options.mode) if options.mode else None
    if options.hello:
        if mode is Mode.REAL:
            raise ImageError("it is made for long mode")
        return load_flat(HELLO, load=options.load, entry=options.entry)
    return load_image(
        options.image, mode, load=options.load, entry=options.entry, limit=options.memory
    )


def _print(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    if b"\n" in data or sys.stdout.isatty():
        sys.stdout.buffer.flush()


def main(options: argparse.Namespace) -> int:
    """Run the guest that the command line describes; returns the exit status."""
    arguments = list(options.arguments)
    if options.hello and options.image is not None:
        arguments.insert(0, options.image)
    name = "the ready guest" if options.hello else options.image
    if name is None:
        return _fail("say which IMAGE to run, or --hello for the ready one", EXIT_USAGE)
    try:
        image = _image(options)
    except (ImageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return _fail(f"{name}: {reason}", EXIT_USAGE)
    try:
        kvm = Kvm()
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}", EXIT_NO_KVM)
    with kvm:
        try:
            machine = Machine(
                kvm,
                image,
                options.memory,
                arguments=tuple(os.fsencode(argument) for argument in arguments),
                output=_print,
            )
        except ImageError as error:
            return _fail(f"{name}: {error}", EXIT_USAGE)
        except OSError as error:
            return _fail(f"the guest can't be made: {error.strerror}", EXIT_NO_KVM)
        with machine:
            try:
                status = machine.run(options.timeout)
            except OSError as error:
                if error.filename is not None or isinstance(error, BrokenPipeError):
                    raise  # the output's, not KVM's
                return _fail(f"the guest can't go on: {error.strerror}", EXIT_NO_KVM)
            except GuestCrash as crash:
                sys.stdout.flush()
                verb = "" if isinstance(crash, GuestTimeout) else "crashed: "
                code = EXIT_TIMEOUT if isinstance(crash, GuestTimeout) else EXIT_CRASH
                return _fail(f"the guest {verb}{_was(crash)}", code)
    return status


def _was(crash: GuestCrash) -> str:
    return f"was {crash.report}" if isinstance(crash, GuestTimeout) else crash.report


def _fail(message: str, status: int) -> int:
    print(f"kvmpriv run: {message}", file=sys.stderr)
    return status
