"""What every test may use, with nothing but kvmpriv and pytest: loud skips, KVM, leak checks."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

import kvmpriv

#: What may be missing, to this suite and to the checkout's other tests.
NAMES = {
    "KVM_CAP_DISABLE_QUIRKS2", "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "a VM of ours",
    "a VM that refuses", "a file that goes", "a refusal", "btf", "compaction", "core dumps",
    "dangerous", "debugfs", "drop_caches", "end of interrupt", "fault injection", "guest_memfd",
    "guest_memfd flags", "host", "huge pages", "implicit conversion", "kvmclock", "mainline",
    "memory", "memory cgroup", "network", "page flags", "paravirtual", "pre-fault",
    "private attribute", "private memory", "ptrace", "read-only private slots", "refusal",
    "restrictedmem", "root", "second address space", "shared guest_memfd", "shared pages unmapped",
    "shared-only host", "slot zap quirk", "software interrupts", "stats", "steal time",
    "userfaultfd", "vehicle", "wall clock",
}  # fmt: skip


def names_in(text: str) -> set[str]:
    """The names in a list with commas."""
    return {name.strip() for name in text.split(",")} - {""}


#: Names of what must be there: a skip for its lack becomes a failure.
REQUIRED = names_in(os.environ.get("KVMPRIV_REQUIRE", ""))


def check_required() -> None:
    """A usage error where KVMPRIV_REQUIRE names what no test can lack: it would require nothing."""
    if unknown := sorted(REQUIRED - NAMES):
        raise pytest.UsageError(
            f"KVMPRIV_REQUIRE: nothing is called {' or '.join(map(repr, unknown))}; "
            f"there are: {', '.join(sorted(NAMES))}"
        )


def missing(name: str, why: str) -> NoReturn:
    """Skip, saying what is missing; fail if KVMPRIV_REQUIRE names it."""
    assert name in NAMES, f"{name!r} is not in NAMES: nobody could require it"
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
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that lists the folder
            continue
    return found


def kvm_mappings() -> int:
    """How many of this process's mappings are of a file of KVM's."""
    return Path("/proc/self/maps").read_bytes().count(b"anon_inode:kvm")


@pytest.fixture
def no_leak() -> Iterator[Callable[[], None]]:
    """Fails the test if descriptors or mappings of KVM are left behind at its end.

    Garbage is collected only where something seems to be left: in an emulated machine that takes
    longer than most tests.
    """
    fds, maps = open_fds(), kvm_mappings()

    def left() -> tuple[dict[int, str], int]:
        opened = {number: what for number, what in open_fds().items() if number not in fds}
        return opened, max(kvm_mappings() - maps, 0)

    def check() -> None:
        opened, mapped = left()
        if opened or mapped:
            gc.collect()
            opened, mapped = left()
        assert not opened, f"descriptors left open: {opened}"
        assert not mapped, "mappings of KVM's files left"

    yield check
    check()
