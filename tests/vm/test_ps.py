"""``kvmpriv ps`` in both kernels: beside guests with private memory, QEMU, and VMs left behind."""

from __future__ import annotations

import sys

import pytest

from .test_kernels import vm


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", ["restrictedmem", "guest_memfd"])
def test_holders_of_private_memory(name: str) -> None:
    """tests/host/test_ps.py there; only what needs the other ABI may be skipped."""
    required = {"restrictedmem": "dangerous", "guest_memfd": "guest_memfd"}[name]
    done = vm(
        name,
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/host/test_ps.py"),
        options=(
            *("--env", f"KVMPRIV_REQUIRE=host,debugfs,private-memory,qemu,{required}"),
            *("--env", f"KVMPRIV_KERNEL={name}"),
        ),
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
