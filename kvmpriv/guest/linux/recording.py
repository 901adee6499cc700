"""A recording of a Linux guest's run, in the format of :mod:`kvmpriv.trace`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...trace import Recorder

if TYPE_CHECKING:
    from .dispatch import Record
    from .machine import LinuxMachine
    from .outcome import Outcome

__all__ = ["RunRecorder"]


#: What a kernel prints as its last words (init/main.c), and how many bytes may hold the end of it.
_INIT = re.compile(rb"Run (\S{1,64}) as init process")
_INIT_SIZE_MAX = 100


class RunRecorder:
    """Records the run of `machine` in the file at `path`, which is created or truncated.

    `complain` is called if the file can't be written to the end: the guest runs on.  OSError when
    the file can't be opened.
    """

    #: Seconds between two samples of memory and cost.
    SAMPLE_EVERY = 0.25

    def __init__(
        self,
        path: str | os.PathLike[str],
        machine: LinuxMachine,
        complain: Callable[[str], object],
    ) -> None:
        self._path = os.fspath(path)
        self._machine = machine
        self._complain = complain
        file = open(path, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # the recorder closes it
        version = machine.image.version
        self._recorder = Recorder(
            file,
            {
                "what": f"Linux {version}" if version else "Linux",
                "cpus": len(machine.vcpus),
                "ranges": [part._asdict() for part in machine.ranges],
                "private_abi": machine.abi.name if machine.abi else None,
                "cmdline": machine.cmdline,
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "devices": [
                    {"name": each.name, key: each.start, "size": each.size}
                    for key, bus in (("port", machine.ports), ("gpa", machine.mmio))
                    for each in bus.ranges
                ],
            },
        )
        #: Records an event, from any thread.
        self.event: Record = self._recorder.event
        self._last_printed = b""
        self._init_runs = False

    def sample(self) -> None:
        """Record the memory and the CPU time in use; nothing where KVM has no statistics."""
        try:
            usage = self._machine.usage()
        except OSError:
            return
        cost = self._machine.cost(usage)
        self.event(
            memory=[{"resident": use.resident, "private": use.private} for use in usage],
            rss=cost.rss,
            shared=cost.shared,
            cpu=[round(seconds, 3) for seconds in cost.cpu],
            others=round(cost.others, 3),
        )

    def printed(self, data: bytes) -> None:
        """Take what the guest has printed: a mark is recorded when its kernel starts init."""
        if self._init_runs:
            return
        text = self._last_printed + data
        if found := _INIT.search(text):
            self._init_runs = True
            self.event(mark=f"{found[1].decode(errors='backslashreplace')} runs")
        self._last_printed = text[-_INIT_SIZE_MAX:]

    def end(self, outcome: Outcome) -> None:
        """Record how the guest has ended."""
        self.event(end=outcome.how, status=outcome.status, why=outcome.why)

    def close(self) -> None:
        self._recorder.close()
        if self._recorder.error is not None:
            why = self._recorder.error.strerror
            self._complain(f"{self._path}: {why}; the recording is incomplete")
