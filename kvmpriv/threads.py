"""A thread that runs a vCPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .cdefs.kvm import KVM_EXIT_INTR
from .vcpu import Vcpu

__all__ = ["ExitHandler", "VcpuThread"]

#: Told of each exit; a result other than None ends the run and becomes its result.
ExitHandler = Callable[[Vcpu, int], Any]


class VcpuThread(threading.Thread):
    """Runs a vCPU in a thread of its own until `handler` has a result.

    `handler(vcpu, reason)` is called in that thread for each exit but KVM_EXIT_INTR; None means to
    go on.  As a context manager it starts the thread and, however the block ends, stops it:

        with VcpuThread(vcpu, handler) as thread:
            print(thread.result())
    """

    def __init__(self, vcpu: Vcpu, handler: ExitHandler) -> None:
        super().__init__(name=f"vcpu{vcpu.vcpu_id}", daemon=True)
        self._vcpu = vcpu
        self._handler = handler
        self._stopping = False
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """What the thread does; `start` calls it."""
        try:
            while not self._stopping:
                reason = self._vcpu.run()
                if reason == KVM_EXIT_INTR:
                    continue
                self._result = self._handler(self._vcpu, reason)
                if self._result is not None:
                    return
        except BaseException as error:  # noqa: BLE001  # result() raises it
            self._error = error

    def stop(self) -> None:
        """Call the vCPU back and wait for the thread.  What it raised is kept for `result`."""
        self._stopping = True
        while self.is_alive():
            with suppress(ValueError):  # closed: its run has ended or is ending
                self._vcpu.kick()
            self.join(0.05)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the handler's result (None if stopped); raises what the thread raised.

        TimeoutError after `timeout` seconds: the vCPU runs on.
        """
        self.join(timeout)
        if self.is_alive():
            raise TimeoutError(f"vCPU {self._vcpu.vcpu_id} still runs after {timeout} s")
        if self._error is not None:
            raise self._error
        return self._result

    def __enter__(self) -> VcpuThread:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
