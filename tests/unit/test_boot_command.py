"""`kvmpriv boot` around its guest: signals and messages, without KVM."""

from __future__ import annotations

import io
import os
import signal
import sys

import pytest

from kvmpriv.commands import boot


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup kvmpriv boot` runs on when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with boot._signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_message_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not replace the guest's exit status by a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    raw = io.FileIO(writing, "w")
    with pytest.raises(BrokenPipeError):
        raw.write(b"x")
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
    boot._Screen(sys.stdout).say("the guest crashed")
    raw.close()
