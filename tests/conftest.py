"""What every test may use: the suite's own means, and where the checkout is."""

from __future__ import annotations

from pathlib import Path

import kvmpriv
from private.base import REQUIRED, kvm, missing, no_leak, open_fds, vm

__all__ = ["REQUIRED", "ROOT", "kvm", "missing", "no_leak", "open_fds", "vm"]

ROOT = Path(__file__).resolve().parent.parent


def pytest_report_header() -> str:
    return (
        f"kvmpriv {kvmpriv.__version__}, required here: {', '.join(sorted(REQUIRED)) or 'nothing'}"
    )
