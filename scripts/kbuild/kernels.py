"""The kernels that can be built, by name: the only list of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    """One kernel: Debian's source, and the folders of patches that are applied to it."""

    name: str
    version: str
    #: The patches of the ABI as it was posted, and those that fix its known defects.
    posted: str = ""
    fixes: str = ""

    @property
    def package(self) -> str:
        """Debian's package with the source."""
        return f"linux-source-{self.version}"

    @property
    def tarball(self) -> Path:
        """The source, where that package installs it."""
        return Path("/usr/src", f"{self.package}.tar.xz")


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("restrictedmem", "6.1", posted="restrictedmem/abi", fixes="restrictedmem/fixes"),
        Kernel("guest_memfd", "6.12"),
    )
}


def problem(name: str, literal: bool = False) -> str:
    """What is wrong with this name or option; "" if such a kernel can be built."""
    if name not in KERNELS:
        return f"unknown kernel {name!r}: there are {names()}"
    if literal and not KERNELS[name].fixes:
        return f"--literal leaves out the fixes of a series, and {name} has none"
    return ""


def names(conjunction: str = "and") -> str:
    """The names of all kernels, for a sentence."""
    *others, last = KERNELS
    return f"{', '.join(others)} {conjunction} {last}"
