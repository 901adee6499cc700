"""Guests: bare machine code (`Machine`), single commands from Python (`Puppet`), Linux (`linux`).

`Machine` runs a flat binary or an ELF file.  `Puppet` is a guest that executes one command at a
time.  :mod:`kvmpriv.guest.linux` boots Linux.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import linux
    from .bare import EXIT_PORT, SERIAL_PORT, Machine
    from .crash import GuestCrash, GuestTimeout
    from .image import Image, ImageError, Mode, Segment, load_elf, load_flat, load_image
    from .puppet import GuestExit, Puppet, PuppetCpu
    from .x86 import start_long_mode, write_identity_map, write_segments

__all__ = [
    "EXIT_PORT",
    "SERIAL_PORT",
    "GuestCrash",
    "GuestExit",
    "GuestTimeout",
    "Image",
    "ImageError",
    "Machine",
    "Mode",
    "Puppet",
    "PuppetCpu",
    "Segment",
    "linux",
    "load_elf",
    "load_flat",
    "load_image",
    "start_long_mode",
    "write_identity_map",
    "write_segments",
]

#: Name -> module.  A module is loaded when one of its names is asked for.
_LAZY = {
    "EXIT_PORT": "bare",
    "SERIAL_PORT": "bare",
    "GuestCrash": "crash",
    "GuestExit": "puppet",
    "GuestTimeout": "crash",
    "Image": "image",
    "ImageError": "image",
    "Machine": "bare",
    "Mode": "image",
    "Puppet": "puppet",
    "PuppetCpu": "puppet",
    "Segment": "image",
    "load_elf": "image",
    "load_flat": "image",
    "load_image": "image",
    "start_long_mode": "x86",
    "write_identity_map": "x86",
    "write_segments": "x86",
}

if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> object:
        if name == "linux":
            return import_module(".linux", __name__)
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
