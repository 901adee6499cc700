"""Child processes and signals."""

from __future__ import annotations

import ctypes
import signal
from typing import NoReturn


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; call it in a child, before exec."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def exit_on(*signals: signal.Signals) -> None:
    """Turn these signals into SystemExit(128 + number), so that `finally` blocks run."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    for number in signals:
        signal.signal(number, stop)
