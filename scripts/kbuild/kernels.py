"""The kernels that can be built, by name: the only list of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Kernel(NamedTuple):
    """One kernel: Debian's source, its config, and the folders of patches that are applied to it.

    The source is Linux `version`, or the newest one, of `suite`, or of the suites of this machine.
    """

    name: str
    #: The ABI of private memory that it has, and the name of its file in configs/.
    abi: str
    version: str = ""
    suite: str = ""
    #: The patches of the ABI as it was posted, and those that fix its known defects.
    posted: str = ""
    fixes: str = ""
    #: Whether IN_PLACE on the kernel's command line replaces the ABI by guest_memfd_in_place.
    in_place: bool = False
    #: Words for its command line, before those of --append.
    words: str = ""
    #: What its config and its words are for, as identifiers of KVMPRIV_REQUIRE: a skip for lack of
    #: it is a failure.
    has: tuple[str, ...] = ()
    #: The folders of its breaks, for `mutate`, and of the bugs that it has had, for `history`; and
    #: the file and the module that select one of them.
    breaks: str = ""
    past: str = ""
    selecting: str = ""
    module: str = ""


#: What configs/newest.config and two nodes of memory are for.
NEWEST_HAS = ("fault-injection", "null-blk", "numa", "numa-migration")
KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "restrictedmem",
            "restrictedmem",
            "6.1",
            posted="restrictedmem/abi",
            fixes="restrictedmem/fixes",
            breaks="restrictedmem/breaks",
            selecting="mm/restrictedmem.c",
            module="restrictedmem",
        ),
        # Two nodes, so that the suite sees where pages are placed.
        Kernel(
            "guest_memfd",
            "guest_memfd",
            suite="trixie-backports",
            words="numa=fake=2",
            has=NEWEST_HAS,
            breaks="mainline/breaks",
            past="mainline/past",
            selecting="virt/kvm/guest_memfd.c",
            module="kvm",
        ),
        Kernel("guest_memfd-6.12", "guest_memfd", "6.12"),
        Kernel(
            "guest_memfd-in-place",
            "guest_memfd",
            "7.3",
            suite="trixie-backports",
            posted="in_place/abi",
            words="numa=fake=2",
            has=NEWEST_HAS,
            in_place=True,
            breaks="in_place/breaks",
            selecting="virt/kvm/guest_memfd.c",
            module="kvm",
        ),
    )
}
#: The word that switches conversion in place on.
IN_PLACE = "kvm.gmem_in_place_conversion=1"
#: The releases with which the configs of an ABI were tried.
TRIED = {"restrictedmem": ("6.1",), "guest_memfd": ("6.12", "7.3")}
#: The kernel whose config is used for the caller's own tree if no name is given.
NEWEST = "guest_memfd"


def has_source(arguments: list[str]) -> bool:
    """Whether a command line names a tree of one's own."""
    return any(word.partition("=")[0] == "--source" for word in arguments)


def with_name(arguments: list[str]) -> list[str]:
    """The words of a command line that begins with NAME, which `--source` makes optional."""
    unnamed = has_source(arguments) and arguments[0].startswith("-")
    return [NEWEST, *arguments] if unnamed else arguments


def abi_of(name: str, words: Iterable[str], own_tree: bool) -> str:
    """The ABI of a kernel that is booted with these words; a tree of one's own may have any."""
    kernel = KERNELS[name]
    can_switch = kernel.in_place or (own_tree and kernel.abi == "guest_memfd")
    return "guest_memfd_in_place" if can_switch and IN_PLACE in words else kernel.abi


def required(name: str, words: Iterable[str], own_tree: bool) -> str:
    """KVMPRIV_REQUIRE for a kernel that is booted with these words."""
    has = () if own_tree else KERNELS[name].has
    return ",".join(("host", abi_of(name, words, own_tree), *has))


def is_image(name: str) -> bool:
    """Whether NAME is the path of an image."""
    return "/" in name


def problem(name: str, literal: bool = False) -> str:
    """What is wrong with this name or option; "" if such a kernel can be built."""
    if name not in KERNELS:
        return f"unknown kernel {name!r}: there are {names()} (the path of an image has a /)"
    if literal and not KERNELS[name].fixes:
        return f"--literal leaves out the fixes of a series, and {name} has none"
    return ""


def problem_with(name: str, literal: bool, source: Path | None) -> str:
    """As problem(), of a NAME that may be the path of an image, and of a tree of one's own."""
    if is_image(name):
        return f"--source builds a tree, and {name} is an image: give one of them" if source else ""
    if source and not source.exists():
        return f"{source} does not exist"
    return problem(name, literal)


def words(name: str) -> str:
    """The words for the command line of a kernel; an image has none."""
    return KERNELS[name].words if name in KERNELS else ""


def names(conjunction: str = "and") -> str:
    """The names of all kernels, for a sentence."""
    *others, last = KERNELS
    return f"{', '.join(others)} {conjunction} {last}"
