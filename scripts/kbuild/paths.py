"""Where things are: the checkout, the data of the kernels, the cache."""

from __future__ import annotations

import os
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent
#: Configs, patches, breaks, and the VM's init.
DATA = SCRIPTS / "kernel"


def cache_root() -> Path:
    """The folder of kernels and logs: $KVMPRIV_CACHE, or a folder below the user's cache."""
    if chosen := os.environ.get("KVMPRIV_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvmpriv" / "kernels"
