"""Getting out of KVM_RUN: kicks, signals, Ctrl-C, two threads; no wake-up is ever lost."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvmpriv import HostMemory, Kvm, Vcpu, VcpuThread, wakeup
from kvmpriv.cdefs import kvm as k
from kvmpriv.exits import IoExit
from private.support.leaks import open_fds

from .conftest import OUT_LOOP, SPIN, MakeGuest, start

pytestmark = pytest.mark.usefixtures("no_leak")

ROUNDS = 10_000
LOST_AFTER = 10.0  # seconds without an answer


@pytest.fixture
def alarm_handler() -> Iterator[list[int]]:
    """A Python handler for SIGUSR1 that counts."""
    seen = [0]

    def handler(*_: object) -> None:
        seen[0] += 1

    before = signal.signal(signal.SIGUSR1, handler)
    yield seen
    signal.signal(signal.SIGUSR1, before)


def test_no_kick_is_lost(make_guest: MakeGuest) -> None:
    """10,000 kicks at random moments against a guest that spins: each one ends a run."""
    _, vcpu, _ = make_guest(SPIN)
    answered = threading.Semaphore(0)
    stop = False
    reasons: list[int] = []

    def runner() -> None:
        while not stop:
            reason = vcpu.run()
            if reason != k.KVM_EXIT_INTR:
                reasons.append(reason)
                return
            answered.release()

    thread = threading.Thread(target=runner)
    thread.start()
    dice = random.Random(1)
    for number in range(ROUNDS):
        # Whatever was answered before belongs to an earlier kick.
        while answered.acquire(blocking=False):
            pass
        vcpu.kick()
        assert answered.acquire(timeout=LOST_AFTER), f"kick {number} was lost"
        for _ in range(dice.randrange(40)):
            pass
    stop = True
    vcpu.kick()
    thread.join(LOST_AFTER)
    assert not thread.is_alive()
    assert not reasons


_SIGNALLER = """
import os, random, signal, sys, time
dice = random.Random(3)
for number in range(int(sys.argv[2])):
    until = time.perf_counter_ns() + dice.randrange(20_000)
    while time.perf_counter_ns() < until:
        pass
    os.kill(int(sys.argv[1]), signal.SIGUSR1)
    if not os.read(0, 1):
        sys.exit(1)
"""


def test_no_signal_is_lost_in_the_main_thread(
    make_guest: MakeGuest, alarm_handler: list[int]
) -> None:
    """10,000 signals from another process while the main thread runs a guest that spins.

    The next one is sent when Python's handler has run for the last, and meets the main thread
    anywhere on its way into the guest; one that came between Python's last look and the ioctl
    would leave the guest spinning for ever.
    """
    _, vcpu, _ = make_guest(SPIN)
    read, write = os.pipe()
    sender = subprocess.Popen(
        [sys.executable, "-c", _SIGNALLER, str(os.getpid()), str(ROUNDS)], stdin=read
    )
    os.close(read)
    lost: list[int] = []
    at_last_look = [-1]

    def look() -> None:
        if alarm_handler[0] == at_last_look[0]:  # noted, and the guest ended
            lost.append(alarm_handler[0])
            vcpu.kick()
        at_last_look[0] = alarm_handler[0]

    watchdog = _Every(LOST_AFTER, look)
    watchdog.start()
    dice = random.Random(2)
    answered = in_guest = 0
    reach = 20_000.0  # nanoseconds
    try:
        while answered < ROUNDS and not lost:
            until = time.perf_counter_ns() + dice.randrange(int(reach))
            while time.perf_counter_ns() < until:
                pass
            if alarm_handler[0] == answered:
                assert vcpu.run() == k.KVM_EXIT_INTR
                in_guest += 1
                reach = min(reach * 1.02, 1e6)
            else:  # too late: be sooner next time, so that half of them meet us on the way
                reach = max(reach / 1.02, 100)
            while answered < alarm_handler[0]:
                answered += 1
                os.write(write, b".")
    finally:
        watchdog.stop()
        os.close(write)
        sender.wait()
    assert not lost, f"signal {lost} was not seen for {LOST_AFTER} s"
    assert answered == alarm_handler[0] == ROUNDS
    assert sender.returncode == 0
    assert in_guest > 0, "some came while the guest ran"


class _Every(threading.Thread):
    """Calls something again and again until stopped."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._seconds, self._call, self._stopped = seconds, call, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._call()

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def test_a_signal_to_another_thread_is_seen_too(
    make_guest: MakeGuest, alarm_handler: list[int]
) -> None:
    """A signal may be delivered to any thread; Python's handler runs in the main one."""
    _, vcpu, _ = make_guest(SPIN)
    for number in range(200):
        threading.Timer(0.001, signal.raise_signal, (signal.SIGUSR1,)).start()
        while alarm_handler[0] <= number:
            assert vcpu.run() == k.KVM_EXIT_INTR
    assert alarm_handler[0] == 200


def interrupt(vcpu: Vcpu) -> None:
    """Ctrl-C, once the guest runs."""
    while not vcpu._runner:
        time.sleep(0.0005)
    time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGINT)


def _run_for_ever(vcpu: Vcpu) -> None:
    while True:
        vcpu.run()


def test_ctrl_c_in_the_main_thread(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(SPIN)
    for _ in range(100):
        timer = threading.Thread(target=interrupt, args=(vcpu,))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            _run_for_ever(vcpu)
        timer.join()
    start(vcpu)
    vcpu.kick()
    assert vcpu.run() == k.KVM_EXIT_INTR, "it can be run after each of them"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
def test_ctrl_c_while_the_watch_begins(
    make_guest: MakeGuest, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """The pipe is closed exactly once, and the next run has a watch."""
    _, vcpu, _ = make_guest(SPIN)
    start_thread, before, interrupted = threading.Thread.start, open_fds(), 0

    def interrupted_start(thread: threading.Thread) -> None:
        nonlocal interrupted
        interrupted += 1
        if begun:
            start_thread(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted_start)
        for turn in range(20):
            with pytest.raises(KeyboardInterrupt):
                vcpu.run()
            for thread in threading.enumerate():
                if thread.name == "kvmpriv-signals":
                    thread.join(10)
            assert interrupted == turn + 1
            assert open_fds() == before
    timer = threading.Thread(target=interrupt, args=(vcpu,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        _run_for_ever(vcpu)
    timer.join()


def test_a_handler_that_raises_never_leaves_it_running(make_guest: MakeGuest) -> None:
    """Wherever in run() the signal comes, the vCPU can be run and closed afterwards."""
    _, vcpu, _ = make_guest(OUT_LOOP)

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))
                _run_for_ever(vcpu)
            except KeyboardInterrupt:
                interrupted += 1
                assert not vcpu._runner
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100


def test_a_run_before_whose_entry_a_signal_handler_runs_the_vcpu(
    make_guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark that the vCPU is running is the outer run's: kicks and close() rely on it."""
    _, vcpu, _ = make_guest(OUT_LOOP)
    prepare, inner, marked = vcpu._prepare, [], []

    def interrupted(me: object) -> None:
        prepare(me)
        monkeypatch.undo()  # the inner run prepares as usual
        inner.append(vcpu.run())
        marked.append(bool(vcpu._runner))

    monkeypatch.setattr(vcpu, "_prepare", interrupted)
    assert vcpu.run() == k.KVM_EXIT_IO
    assert inner == [k.KVM_EXIT_IO]
    assert marked == [True]
    assert vcpu._runner == {}


def test_signal_handlers_that_run_the_vcpu(make_guest: MakeGuest) -> None:
    """Wherever in run() the signal comes, the handler's run works and leaves the mark alone."""
    _, vcpu, _ = make_guest(OUT_LOOP)
    nested: list[tuple[int, bool]] = []

    def handler(*_: object) -> None:
        outer = bool(vcpu._runner)
        reason = vcpu.run()
        if outer:
            nested.append((reason, bool(vcpu._runner)))
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))

    before = signal.signal(signal.SIGALRM, handler)
    reasons = set()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4)
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            reasons.add(vcpu.run())
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert reasons <= {k.KVM_EXIT_IO, k.KVM_EXIT_INTR}
    assert {reason for reason, _ in nested} <= {k.KVM_EXIT_IO, k.KVM_EXIT_INTR}
    assert len(nested) > 20
    assert all(marked for _, marked in nested)
    assert vcpu._runner == {}


def test_one_thread_after_another(make_guest: MakeGuest) -> None:
    """A new thread gets the id of one that has ended; each can be kicked."""
    _, vcpu, _ = make_guest(SPIN)
    for _ in range(20):
        with VcpuThread(vcpu, lambda *_: True) as thread:
            while not vcpu._runner:
                time.sleep(0.001)
        assert not thread.is_alive()
        assert thread.result() is None


def test_ctrl_c_while_a_thread_runs_the_guest(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(SPIN)
    timer = threading.Thread(target=interrupt, args=(vcpu,))
    timer.start()
    with pytest.raises(KeyboardInterrupt), VcpuThread(vcpu, lambda *_: True) as thread:
        thread.result()
    assert not thread.is_alive()
    timer.join()


def test_a_kick_before_the_run(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(SPIN)
    vcpu.kick()
    vcpu.kick()
    assert vcpu.run() == k.KVM_EXIT_INTR
    assert str(vcpu.exit()) == "KVM_EXIT_INTR"
    assert vcpu.kvm_run.immediate_exit == 0


def test_a_kick_from_a_signal_handler(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(OUT_LOOP)
    before = signal.signal(signal.SIGALRM, lambda *_: vcpu.kick())
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    interrupted = 0
    try:
        while interrupted < 200:
            interrupted += vcpu.run() == k.KVM_EXIT_INTR
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 200


def test_eintr_storm(make_guest: MakeGuest, alarm_handler: list[int]) -> None:
    """Signals every 100 µs interrupt every call; each call works or fails with EINTR."""
    vm, vcpu, _ = make_guest(OUT_LOOP)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    outs = interrupted = made = 0
    try:
        with Kvm() as system:
            deadline = time.monotonic() + 1.5
            while time.monotonic() < deadline:
                reason = vcpu.run()
                if reason == k.KVM_EXIT_IO:
                    outs += 1
                    out = vcpu.exit()
                    assert isinstance(out, IoExit)
                    assert out.data == b"\x2a"
                else:
                    assert reason == k.KVM_EXIT_INTR
                    interrupted += 1
                if outs // 50 > made:
                    with system.create_vm() as other, HostMemory(4096) as memory:
                        other.map(memory, 0)
                        with other.create_vcpu() as second:
                            assert second.get_mp_state() == k.KVM_MP_STATE_RUNNABLE
                    made += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert made > 0
    assert outs > 0
    assert interrupted > 0
    assert vm.slots
    assert alarm_handler == [0]


def test_two_threads_on_one_vcpu(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(SPIN)
    with VcpuThread(vcpu, lambda *_: True):
        while not vcpu._runner:
            time.sleep(0.001)
        for use in (vcpu.run, vcpu.get_regs):
            for _ in range(100):
                with pytest.raises(RuntimeError, match="vCPU 0 is being run by another thread"):
                    use()
    vcpu.kick()
    assert vcpu.run() == k.KVM_EXIT_INTR, "the other one has let go of it"
    assert vcpu.get_regs().rip == 0x1000


def test_two_threads_at_the_same_moment(make_guest: MakeGuest) -> None:
    """The second thread is refused every time, without effect on the first."""
    _, vcpu, _ = make_guest(OUT_LOOP)
    results: list[list[Any]] = [[], []]
    gate = threading.Barrier(2)

    def contend(mine: list[Any]) -> None:
        gate.wait()
        for _ in range(2000):
            try:
                mine.append(vcpu.run())
            except RuntimeError:
                mine.append(None)

    threads = [threading.Thread(target=contend, args=(mine,)) for mine in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = list(itertools.chain(*results))
    assert len(counted) == 4000
    assert set(counted) <= {k.KVM_EXIT_IO, None}
    assert counted.count(k.KVM_EXIT_IO) >= 2000


def test_close_calls_a_running_vcpu_back(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(SPIN)
    thread = VcpuThread(vcpu, lambda *_: True)
    thread.start()
    while not vcpu._runner:
        time.sleep(0.001)
    vcpu.close()
    with pytest.raises(ValueError, match="vCPU is closed"):
        thread.result(LOST_AFTER)


def test_a_signal_handler_that_closes_the_vcpu_it_finds_in_a_kick(make_guest: MakeGuest) -> None:
    """The thread that watches for signals kicks, too, and must not keep the handler waiting."""
    _, vcpu, _ = make_guest(OUT_LOOP)
    assert vcpu.run() == k.KVM_EXIT_IO  # from now on it is watched
    watching = threading.Event()

    class Lock:
        """vcpu._kick_lock, which tells when the other thread wants it."""

        def __init__(self) -> None:
            self._lock = threading.RLock()

        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
            if threading.current_thread().name == "kvmpriv-signals":
                watching.set()
            return self._lock.acquire(blocking, timeout)

        def release(self) -> None:
            self._lock.release()

        def __enter__(self) -> bool:
            return self.acquire()

        def __exit__(self, *_: object) -> None:
            self.release()

    vcpu._kick_lock = Lock()  # type: ignore[assignment]
    closed: list[bool] = []

    def handler(*_: object) -> None:
        assert watching.wait(LOST_AFTER)  # it waits for the lock that the kick has
        vcpu.close()
        closed.append(vcpu.closed)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with vcpu._kick_lock:  # as in kick
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert closed == [True]


def test_try_kick(make_guest: MakeGuest) -> None:
    """It gives up while another thread kicks, and is a kick otherwise."""
    _, vcpu, _ = make_guest(OUT_LOOP)
    assert vcpu.try_kick(0)
    assert vcpu.run() == k.KVM_EXIT_INTR
    with vcpu._kick_lock, ThreadPoolExecutor(1) as pool:
        assert not pool.submit(vcpu.try_kick, 0.001).result(LOST_AFTER)
    assert vcpu.run() == k.KVM_EXIT_IO
    vcpu.close()
    with pytest.raises(ValueError, match="closed"):
        vcpu.try_kick(0)


def test_kick_against_close(kvm: Kvm) -> None:
    """A kick at the moment of close raises ValueError and never crashes."""
    for _ in range(100):
        with kvm.create_vm() as vm:
            vcpu = vm.create_vcpu()
            kicks: list[str] = []

            def kick(target: Vcpu = vcpu, log: list[str] = kicks) -> None:
                try:
                    while True:
                        target.kick()
                except ValueError as error:
                    log.append(str(error))

            kicker = threading.Thread(target=kick)
            kicker.start()
            vcpu.close()
            kicker.join()
            assert kicks == ["vCPU is closed"]


def test_vcpu_thread(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(OUT_LOOP)
    seen: list[int] = []

    def handler(which: Vcpu, reason: int) -> int | None:
        out = which.exit()
        assert isinstance(out, IoExit)
        seen.append(out.port)
        return len(seen) if len(seen) == 3 else None

    with VcpuThread(vcpu, handler) as thread:
        assert thread.result(LOST_AFTER) == 3
    assert seen == [0x3F8] * 3

    def broken(which: Vcpu, reason: int) -> None:
        raise LookupError("the handler's own")

    with VcpuThread(vcpu, broken) as thread, pytest.raises(LookupError, match="the handler's own"):
        thread.result(LOST_AFTER)
    with VcpuThread(vcpu, lambda *_: None) as thread, pytest.raises(TimeoutError, match="vCPU 0"):
        thread.result(0.05)
    assert thread.result() is None, "stopped"


def test_what_a_thread_raises_is_not_lost(make_guest: MakeGuest) -> None:
    """The block raises it, unless the block fails itself or result() has raised it."""
    _, vcpu, _ = make_guest(OUT_LOOP)

    def broken(which: Vcpu, reason: int) -> int:
        raise LookupError("the handler's own")

    def fail(thread: threading.Thread) -> None:
        thread.join(LOST_AFTER)
        raise KeyError("the block's")

    with pytest.raises(LookupError, match="the handler's own"), VcpuThread(vcpu, broken) as thread:
        thread.join(LOST_AFTER)
    with pytest.raises(KeyError, match="the block's"), VcpuThread(vcpu, broken) as thread:
        fail(thread)
    with VcpuThread(vcpu, broken) as thread:
        with pytest.raises(LookupError, match="the handler's own"):
            thread.result(LOST_AFTER)
        thread.join()
    idle: VcpuThread[int] = VcpuThread(vcpu, lambda *_: None)
    with idle:
        idle.stop()
    assert idle.result() is None


def test_two_vcpus_run_at_once(make_guest: MakeGuest) -> None:
    vm, first, memory = make_guest(bytes.fromhex("a0 0020 3c01 75f9 c606 0120 01 f4"))
    # first: wait until [0x2000] is 1, then [0x2001] = 1; second does it the other way round
    memory.write(0x3000, bytes.fromhex("c606 0020 01 a0 0120 3c01 75f9 f4"))
    with vm.create_vcpu(1) as second:
        start(second, 0x3000)
        halted = lambda _, reason: reason  # noqa: E731
        with VcpuThread(first, halted) as one, VcpuThread(second, halted) as two:
            assert one.result(LOST_AFTER) == k.KVM_EXIT_HLT
            assert two.result(LOST_AFTER) == k.KVM_EXIT_HLT
    assert memory.read(0x2000, 2) == b"\x01\x01"


def test_the_wakeup_fd_of_others(make_guest: MakeGuest, alarm_handler: list[int]) -> None:
    """An earlier wake-up fd gets each byte while kvmpriv has its own, and is restored."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    theirs = signal.set_wakeup_fd(write)
    try:
        _, vcpu, _ = make_guest(SPIN)
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        while not alarm_handler[0]:
            vcpu.run()
        assert os.read(read, 1) == bytes((signal.SIGUSR1,))
        vcpu.close()
        assert signal.set_wakeup_fd(write) == write
        assert "kvmpriv-signals" not in [thread.name for thread in threading.enumerate()]
    finally:
        signal.set_wakeup_fd(theirs)
        os.close(read)
        os.close(write)


def test_a_handler_of_the_users_own_is_left_alone(make_guest: MakeGuest) -> None:
    hits = [0]

    def handler(*_: object) -> None:
        hits[0] += 1

    before = signal.signal(wakeup.KICK_SIGNAL, handler)
    try:
        _, vcpu, _ = make_guest(SPIN)
        for _ in range(100):  # a kick that comes before KVM_RUN is entered needs no signal
            threading.Timer(0.05, vcpu.kick).start()
            assert vcpu.run() == k.KVM_EXIT_INTR
            if hits[0]:
                break
        assert hits[0] == 1
        timer = threading.Timer(0.2, vcpu.kick)
        timer.start()
        interrupted = 0
        while timer.is_alive() or hits[0] < 2:
            interrupted += vcpu.run() == k.KVM_EXIT_INTR
        assert hits[0] == 2
        assert interrupted < 5, "a kick is answered once, not for ever"
    finally:
        signal.signal(wakeup.KICK_SIGNAL, before)


def test_a_blocked_kick_signal_is_unblocked(make_guest: MakeGuest) -> None:
    _, vcpu, _ = make_guest(SPIN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [wakeup.KICK_SIGNAL])
    threading.Timer(0.05, vcpu.kick).start()
    assert vcpu.run() == k.KVM_EXIT_INTR
    assert wakeup.KICK_SIGNAL not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
