"""Child processes and signals."""

from __future__ import annotations

import ctypes
import signal
from typing import NoReturn


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; call it in a child, before exec."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def exit_on(*signals: signal.Signals) -> None:
    """Turn these signals into SystemExit(128 + number), so that `finally` blocks run.

    A signal that is ignored stays ignored: nohup(1) does that to SIGHUP.
    """

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
