"""``kvmpriv run``: runs a guest from a file; its output and exit status are the guest's."""

from __future__ import annotations

import argparse
import os
import sys
import time

from ..exit_status import ExitStatus
from ..guest.bare import EXIT_PORT, SERIAL_PORT, GuestCrash, GuestTimeout, Machine
from ..guest.image import Image, ImageError, Mode, load_flat, load_image
from ..guest.ready import HELLO
from ..kvm import Kvm
from ..terminal import OutputError
from . import fail
from ._options import (
    add_device,
    device_error,
    parse_number,
    parse_path,
    parse_seconds,
    parse_size,
)

__all__ = ["EXAMPLES", "EXIT_STATUS", "add_arguments", "main"]


EXAMPLES = (
    ("kvmpriv run --hello", "run the guest that comes with kvmpriv"),
    ("kvmpriv run hello.elf one two", "run an ELF guest with two arguments"),
    ("kvmpriv run --mode real --timeout 5 boot.bin", "run 16-bit code for at most five seconds"),
)
EXIT_STATUS: dict[ExitStatus | str, str] = {
    "N": "the guest ended with the status N",
    ExitStatus.USAGE: "the command line or the image can't be used",
    ExitStatus.UNABLE: "KVM or standard output can't be used",
    ExitStatus.TIMEOUT: "the guest was ended by --timeout",
    ExitStatus.CRASH: "the guest crashed",
    "128+N": "signal N ended the command",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kvmpriv run``."""
    parser.description = (
        "Run a guest from a flat binary or a static ELF file, on one vCPU. What the guest prints "
        "goes to standard output, and its exit status is the command's.\n\n"
        f"The guest prints by writing bytes to port {SERIAL_PORT:#x}. It ends when it writes its "
        f"exit status, one byte, to port {EXIT_PORT:#x}, or with the instruction HLT (status 0). "
        "In long mode it gets its arguments as main() does: rdi is argc and rsi is argv. In real "
        "mode di is the number of arguments and si points to the first string."
    )
    add = parser.add_argument
    add(
        "image",
        nargs="?",
        type=parse_path,
        metavar="IMAGE",
        help="a flat binary, or a static ELF file for x86-64",
    )
    add("arguments", nargs="*", metavar="ARGUMENT", help="arguments for the guest (after --)")
    add("--hello", action="store_true", help="run the guest that comes with kvmpriv, not IMAGE")
    add(
        "--mode",
        choices=[mode.value for mode in Mode],
        help="the CPU mode in which a flat binary starts (default: long)",
    )
    add(
        "--memory",
        type=parse_size,
        default=16 << 20,
        metavar="SIZE",
        help="the guest's memory: bytes, or with K, M, G or T (default: 16M)",
    )
    add("--load", type=parse_number, metavar="ADDRESS", help="load a flat binary at this address")
    add("--entry", type=parse_number, metavar="ADDRESS", help="start at this address")
    add("--timeout", type=parse_seconds, metavar="SECONDS", help="end the guest after this time")
    add_device(parser)


def _image(options: argparse.Namespace) -> Image:
    mode = Mode(options.mode) if options.mode else None
    if options.hello:
        if mode is Mode.REAL:
            raise ImageError("it is made for long mode")
        return load_flat(HELLO, load=options.load, entry=options.entry)
    return load_image(
        options.image,
        mode,
        load=options.load,
        entry=options.entry,
        limit=options.memory,
        timeout=options.timeout,
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
    if options.image is None and not options.hello:
        return fail("run", "name an IMAGE to run, or give --hello", ExitStatus.USAGE)
    name = "the built-in guest" if options.hello else options.image
    started = time.monotonic()
    try:
        image = _image(options)
    except TimeoutError as error:
        return fail("run", f"{name}: {error.strerror}", ExitStatus.TIMEOUT)
    except (ImageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return fail("run", f"{name}: {reason}", ExitStatus.USAGE)
    left = options.timeout
    if left is not None:  # the time that a pipe took counts
        left = round(max(0.0, left - (time.monotonic() - started)), 2)
    try:
        kvm = Kvm(options.device)
    except OSError as error:
        return fail("run", device_error(options.device, error), ExitStatus.UNABLE)
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
            return fail("run", f"{name}: {error}", ExitStatus.USAGE)
        except OSError as error:
            return fail("run", f"the guest can't be made: {error.strerror}", ExitStatus.UNABLE)
        with machine:
            try:
                status = machine.run(left)
            except OSError as error:
                if isinstance(error, OutputError):
                    raise
                return fail("run", f"the guest can't go on: {error.strerror}", ExitStatus.UNABLE)
            except GuestCrash as crash:
                sys.stdout.flush()
                verb = "" if isinstance(crash, GuestTimeout) else "crashed: "
                code = ExitStatus.TIMEOUT if isinstance(crash, GuestTimeout) else ExitStatus.CRASH
                return fail("run", f"the guest {verb}{_was(crash)}", code)
    return status


def _was(crash: GuestCrash) -> str:
    return f"was {crash.report}" if isinstance(crash, GuestTimeout) else crash.report
