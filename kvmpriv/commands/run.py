"""``kvmpriv run``: bring up a guest from a file, its output ours, its exit status ours."""

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
from . import fail
from ._options import parse_number, parse_seconds, parse_size

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"The guest prints on port {SERIAL_PORT:#x} and ends with a byte, its exit status, on port "
        f"{EXIT_PORT:#x}\n(or with HLT: 0).  It gets its arguments as main() does in long mode, "
        "rdi = argc and rsi = argv;\nin real mode di is their number and si the first of the "
        "strings.\n\n"
        f"exit status: the guest's; {ExitStatus.USAGE:d} usage or a bad image; "
        f"{ExitStatus.UNABLE:d} KVM can't be used;\n"
        f"{ExitStatus.TIMEOUT:d} out of time; {ExitStatus.CRASH:d} the guest crashed"
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
    name = "the built-in guest" if options.hello else options.image or "''"
    started = time.monotonic()
    try:
        image = _image(options)
    except TimeoutError as error:
        return fail("run", f"{name}: {error.strerror}", ExitStatus.TIMEOUT)
    except (ImageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return fail("run", f"{name}: {reason}", ExitStatus.USAGE)
    try:
        kvm = Kvm()
    except OSError as error:
        return fail("run", f"{error.filename}: {error.strerror}", ExitStatus.UNABLE)
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
                left = options.timeout
                if left is not None:  # the time for reading the image counts, too
                    left = round(max(0.0, left - (time.monotonic() - started)), 2)
                status = machine.run(left)
            except OSError as error:
                if error.filename is not None or isinstance(error, BrokenPipeError):
                    raise  # the output's, not KVM's
                return fail("run", f"the guest can't go on: {error.strerror}", ExitStatus.UNABLE)
            except GuestCrash as crash:
                sys.stdout.flush()
                verb = "" if isinstance(crash, GuestTimeout) else "crashed: "
                code = ExitStatus.TIMEOUT if isinstance(crash, GuestTimeout) else ExitStatus.CRASH
                return fail("run", f"the guest {verb}{_was(crash)}", code)
    return status


def _was(crash: GuestCrash) -> str:
    return f"was {crash.report}" if isinstance(crash, GuestTimeout) else crash.report
