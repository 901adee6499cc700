"""What a recording says of a Linux guest, in the words of `kvmpriv.trace`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from ...trace import Recorder

if TYPE_CHECKING:
    from ...private import PrivateAbi
    from .layout import Range
    from .machine import LinuxMachine, Outcome

__all__ = ["end", "sample", "start"]


def start(
    file: TextIO, what: str, ranges: Sequence[Range], *, cpus: int = 1, abi: PrivateAbi | None
) -> Recorder:
    """Begin a recording in `file`; its `event` is what a LinuxMachine takes as `record`."""
    about = {
        "what": what,
        "cpus": cpus,
        "ranges": [part._asdict() for part in ranges],
        "private_abi": abi.NAME if abi else None,
    }
    return Recorder(file, about)


def sample(recorder: Recorder, machine: LinuxMachine) -> None:
    """Record what a guest's memory and the process are now; not where KVM has no statistics."""
    try:
        usage = machine.usage()
    except OSError:
        return
    cost = machine.cost()
    recorder.event(
        memory=[{"resident": use.resident, "private": use.private} for use in usage],
        rss=cost.rss,
        shared=cost.shared,
        cpu=[round(seconds, 3) for seconds in cost.cpu],
        others=round(cost.others, 3),
    )


def end(recorder: Recorder, outcome: Outcome) -> None:
    """Record how the guest has ended, and close."""
    recorder.event(end=outcome.how, status=outcome.status, why=outcome.why)
    recorder.close()
