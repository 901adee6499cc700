"""The shared tests run for an ABI of which the suite knows nothing."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmpriv import private
from private.support.behaviour import behaviour_of


class Toy:
    """An ABI that no table of the suite has."""

    name = "toy"

    def __init__(self, refusal: int) -> None:
        self.refusal = refusal
        self.tried = 0

    def try_out(self, kvm: object) -> None:
        """As a kernel with the ABI, or without it."""
        self.tried += 1
        if self.refusal:
            raise OSError(self.refusal, "no toys here")


def test_an_unknown_abi(monkeypatch: pytest.MonkeyPatch) -> None:
    """It behaves as guest_memfd does, and trying it decides whether its tests run."""
    there: Any = Toy(0)
    absent: Any = Toy(errno.ENOTTY)
    monkeypatch.setitem(private.ABIS, "toy", there)
    kvm: Any = None
    behaviour_of(there).require(kvm)
    with pytest.raises(pytest.skip.Exception, match=r"^toy: \[Errno 25\] no toys here"):
        behaviour_of(absent).require(kvm)
    assert (there.tried, absent.tried) == (1, 1)
    known = behaviour_of(private.ABIS["guest_memfd"])
    new = behaviour_of(there)
    assert (new.slots, new.slots_hold_files, new.shares_files, new.mmio_without_slot) == (
        known.slots,
        known.slots_hold_files,
        known.shares_files,
        known.mmio_without_slot,
    )


def test_the_known_abis_differ() -> None:
    one, other = (behaviour_of(private.ABIS[name]) for name in ("restrictedmem", "guest_memfd"))
    assert one.slots is not other.slots
    assert one.slots_hold_files > other.slots_hold_files
