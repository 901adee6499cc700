"""The switch by which v9's test hook accepts or refuses private slots."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .requirements import missing

#: The switch of v9's test vehicle; the kernel reads it when a VM is made.
HOOK = Path("/sys/module/kvm/parameters/private_mem_testing")


@contextmanager
def hook(*, on: bool) -> Iterator[None]:
    """VMs made inside accept private slots (`on`) or refuse them, where there is a switch."""
    if not HOOK.exists():
        yield
        return
    before = HOOK.read_text()
    if (before.strip() == "Y") != on:
        if not os.access(HOOK, os.W_OK):
            missing("root", f"{HOOK} can't be written")
        HOOK.write_text("Y" if on else "N")
    try:
        yield
    finally:
        if HOOK.read_text() != before:
            HOOK.write_text(before)
