"""What a test may require of the machine, and the skip that names what is missing."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

#: What may be missing, to this suite and to the checkout's other tests.
NAMES = {
    "KVM_CAP_DISABLE_QUIRKS2", "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "a VM of ours",
    "a VM that refuses", "a file that goes", "a refusal", "btf", "compaction", "core dumps",
    "dangerous", "debugfs", "drop_caches", "end of interrupt", "fault injection", "guest_memfd",
    "guest_memfd flags", "host", "huge pages", "implicit conversion", "kvmclock", "mainline",
    "memory", "memory cgroup", "network", "page flags", "paravirtual", "pre-fault",
    "private attribute", "private memory", "ptrace", "pyright", "read-only private slots",
    "refusal",
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
