"""What every test may use, with nothing but kvmpriv and pytest: loud skips, KVM, leak checks."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

import kvmpriv

#: Names of what must be there: a skip for its lack becomes a failure.
REQUIRED = {name for name in os.environ.get("KVMPRIV_REQUIRE", "").split(",") if name}


def missing(name: str, why: str) -> NoReturn:
    """Skip, saying what is missing; fail if KVMPRIV_REQUIRE names it."""
    if name in REQUIRED:
        pytest.fail(f"KVMPRIV_REQUIRE={name}, but {why}", pytrace=False)
    pytest.skip(f"{name}: {why}")


def open_kvm() -> kvmpriv.Kvm:
    """The host's KVM; a skip where there is none to be had."""
    try:
        return kvmpriv.Kvm()
    except OSError as error:
        missing("host", f"/dev/kvm can't be used: {error}")


@pytest.fixture
def kvm() -> Iterator[kvmpriv.Kvm]:
    """The host's KVM."""
    with open_kvm() as opened:
        yield opened


@pytest.fixture
def vm(kvm: kvmpriv.Kvm) -> Iterator[kvmpriv.Vm]:
    """A default VM without memory."""
    with kvm.create_vm() as made:
        yield made


def open_fds() -> dict[int, str]:
    """This process's descriptors and what they are, without following any of them."""
    folder = Path("/proc/self/fd")
    found = {}
    for name in os.listdir(folder):
        try:
            found[int(name)] = os.readlink(folder / name)
        except FileNotFoundError:  # the one that lists the folder
            continue
    return found


@pytest.fixture
def no_leak() -> Iterator[Callable[[], None]]:
    """Fails the test if descriptors or mappings of KVM are left behind at its end.

    Garbage is collected only where something seems to be left: in an emulated machine that takes
    longer than most tests.
    """

    def kvm_mappings() -> int:
        return Path("/proc/self/maps").read_text().count("anon_inode:kvm")

    fds, maps = open_fds(), kvm_mappings()

    def left() -> dict[int, str]:
        return {number: what for number, what in open_fds().items() if number not in fds}

    def check() -> None:
        if left() or kvm_mappings() > maps:
            gc.collect()
        assert not left(), f"descriptors left open: {left()}"
        assert kvm_mappings() <= maps, "mappings of KVM's files left"

    yield check
    check()
