"""Fixtures for every test, here and in the checkout's other folders: a pytest plugin."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest

import kvmpriv

from .kernels import open_kvm
from .leaks import kvm_mappings, open_fds


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark of support/rig.py, which tests outside the suite import as well."""
    line = "two_backings: is not run for an ABI by which a page is one in either state"
    config.addinivalue_line("markers", line)


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


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Keep this process and its children on one CPU: KVM's wait for readers of its slots is short.

    The CPU also forgets the translations of freed memory when it runs another process.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def no_leak() -> Iterator[Callable[[], None]]:
    """Fail the test if it leaves descriptors or mappings of KVM's files behind.

    Garbage is collected only if something seems to be left: in an emulated machine a collection
    takes longer than most tests.
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
