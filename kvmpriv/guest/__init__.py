"""Scripted guest bring-up: an image, a machine to run it in, and what became of it."""

from .image import Image, ImageError, Mode, load_elf, load_flat, load_image
from .machine import EXIT_PORT, SERIAL_PORT, GuestCrash, GuestTimeout, Machine

__all__ = [
    "EXIT_PORT",
    "SERIAL_PORT",
    "GuestCrash",
    "GuestTimeout",
    "Image",
    "ImageError",
    "Machine",
    "Mode",
    "load_elf",
    "load_flat",
    "load_image",
]
