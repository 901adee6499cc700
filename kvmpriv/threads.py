"""A thread that runs a vCPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Generic, TypeAlias, TypeVar

from .cdefs.kvm import KVM_EXIT_INTR
from .errors import ClosedError
from .vcpu import Vcpu

__all__ = ["ExitHandler", "VcpuThread"]

_T = TypeVar("_T")

#: Called with each exit's reason.  A result other than None ends the run and becomes its result.
ExitHandler: TypeAlias = Callable[[Vcpu, int], _T | None]


class VcpuThread(threading.Thread, Generic[_T]):
    """Runs a vCPU in a thread of its own until `handler` returns a result.

    `handler(vcpu, reason)` is called in that thread for each exit but KVM_EXIT_INTR; None means to
    go on.  As a context manager it starts the thread and, however the block ends, stops it; when
    the block ends without an exception it raises what the thread raised, unless :meth:`result` has
    done so.

        with VcpuThread(vcpu, handler) as thread:
            print(thread.result())
    """

    def __init__(self, vcpu: Vcpu, handler: ExitHandler[_T]) -> None:
        super().__init__(name=f"vcpu{vcpu.vcpu_id}", daemon=True)
        self._vcpu = vcpu
        self._handler = handler
        self._stopping = False
        self._result: _T | None = None
        self._error: BaseException | None = None
        self._reported = False

    def run(self) -> None:
        """The thread's own function; only :meth:`start` calls it."""
        try:
            while not self._stopping:
                reason = self._vcpu.run()
                if reason == KVM_EXIT_INTR:
                    self._interrupted()
                    continue
                self._result = self._handler(self._vcpu, reason)
                if self._result is not None:
                    return
        except BaseException as error:  # noqa: BLE001  # result() and __exit__ raise it
            self._error = error

    def _interrupted(self) -> None:
        """A kick or a signal has ended the vCPU's run; a subclass may wait here."""

    def stop(self) -> None:
        """Kick the vCPU and wait for the thread.  :meth:`result` raises what the thread raised."""
        self._stopping = True
        while self.is_alive():
            with suppress(ClosedError):  # its run has ended or is ending
                self._vcpu.kick()
            self.join(0.05)

    def result(self, timeout: float | None = None) -> _T | None:
        """Wait for the handler's result, None if stopped; raises what the thread raised.

        TimeoutError after `timeout` seconds: the vCPU runs on.
        """
        self.join(timeout)
        if self.is_alive():
            raise TimeoutError(f"vCPU {self._vcpu.vcpu_id} still runs after {timeout} s")
        if self._error is not None:
            self._reported = True
            raise self._error
        return self._result

    def __enter__(self) -> VcpuThread[_T]:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if kind is None and not self._reported:
            self.result()
