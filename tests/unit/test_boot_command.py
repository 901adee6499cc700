"""`kvmpriv boot` around its guest: signals and messages, without KVM."""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import signal
import sys
from pathlib import Path

import pytest

from kvmpriv.commands import boot
from kvmpriv.guest.linux.vhost import VhostNetPath


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


MAC = bytes.fromhex("525400123456")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("none", None),
        ("tap", (None, None, None)),
        ("tap=br0", ("br0", None, None)),
        ("tap,vhost=on", (None, None, True)),
        ("tap=br,0,vhost=off", ("br,0", None, False)),
        ("tap,mac=52:54:00:12:34:56,vhost=off", (None, MAC, False)),
        ("tap=br0,vhost=on,mac=52:54:00:12:34:56", ("br0", MAC, True)),
    ],
)
def test_a_network(text: str, options: tuple[object, ...] | None) -> None:
    assert boot.parse_net(text) == options


def test_a_network_that_must_be_the_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without /dev/vhost-net the command fails, and the tap does not stay."""
    closed: list[bool] = []

    class FakeTap:
        holder = None

        def __init__(self, bridge: str | None) -> None:
            self._fd = os.open("/dev/null", os.O_RDWR)

        def fileno(self) -> int:
            return self._fd

        def close(self) -> None:
            os.close(self._fd)
            closed.append(True)

    monkeypatch.setattr(boot, "Tap", FakeTap)
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    absent = str(tmp_path / "vhost-net")
    monkeypatch.setattr(VhostNetPath.__init__, "__kwdefaults__", {"device": absent})
    options = argparse.Namespace(append="", disk=None, net=boot.NetOptions(None, None, vhost=True))
    with pytest.raises(
        boot._BootError, match="/dev/vhost-net can't be used: No such file"
    ) as error:
        boot._devices(options, print)
    assert error.value.status == 2
    assert closed == [True]
    said: list[str] = []
    options.net = boot.NetOptions(None, None, vhost=None)
    for device in boot._devices(options, said.append):
        device.close()
    assert "No such file or directory; this process serves the card's queues" in said[0]
    assert closed == [True, True]
