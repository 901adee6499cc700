"""The benchmarks: kvmpriv beside the least that does the same, in pairs within one run.

Prints a table and writes bench.json: name -> ratio (ours by theirs, over the pairs: median, min,
max, quartiles), ours, theirs (medians), over (median of the differences), unit, n, and the limit
with what it is held against (`ratio`, `over` or `ours`).  Exit status: 0 all limits met, 1 not (or
skipped or failed), 2 could not run.

The two sides of a pair follow each other at once, so that what else the machine does hits both;
only ratios and differences within pairs mean something, and of those the medians.  Min and max are
pairs of which something else took one side's CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kbuild.paths import ROOT, cache_root
from kvmpriv import HostMemory, IoExit, Kvm, Vcpu, private
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as cdefs
from kvmpriv.guest.mailbox import DONE_PORT
from kvmpriv.guest.puppet import Puppet

from . import guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
HERE = Path(__file__).resolve().parent

#: What kvmpriv stands on: a process that imports it and does nothing.
BASE = (sys.executable, "-c", "import cffi, ctypes")
PROBE = (sys.executable, "-m", "kvmpriv", "probe")
US, MS = 1e3, 1e6  # nanoseconds
#: What linux.py measures of a boot.
BOOTED = ("start", "init", "serial", "memory")
SERIAL = BOOTED.index("serial")
#: From this cost of an exit on (ns) the ratio counts; where exits are cheaper than on any
#: hardware, a ratio says nothing of kvmpriv and its overhead is held to the same time instead.
DEAR_EXIT = 7000
EXIT_RATIO = 1.15
#: The kernels in which conversions and Linux are measured.
KERNELS = ("restrictedmem", "guest_memfd")
IN_PLACE = "guest_memfd-in-place"


class Skipped(Exception):  # noqa: N818  # no error
    """A benchmark that can't be run, and why."""


class Failed(Exception):  # noqa: N818
    """A side that did not do what it should have, and what it did."""


class Limit(NamedTuple):
    on: str  # ratio, over, ours
    bound: float
    at_least: bool = False


class Result(NamedTuple):
    """Pairs of measurements (ours, theirs), in `unit`."""

    name: str
    unit: str
    pairs: list[tuple[float, float]]
    limit: Limit | None = None
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in self.pairs]

    @property
    def quartiles(self) -> tuple[float, float]:
        first, _, third = quantiles(self.ratios, n=4)
        return first, third

    @property
    def ours(self) -> float:
        return median(ours for ours, _ in self.pairs)

    @property
    def theirs(self) -> float:
        return median(theirs for _, theirs in self.pairs)

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def over(self) -> float:
        return median(ours - theirs for ours, theirs in self.pairs)

    @property
    def met(self) -> bool:
        if self.limit is None:
            return True
        value, bound = getattr(self, self.limit.on), self.limit.bound
        return bool(value >= bound if self.limit.at_least else value <= bound)

    def as_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "ratio": {
                "median": round(self.ratio, 3),
                "min": round(min(self.ratios), 3),
                "max": round(max(self.ratios), 3),
                "quartiles": [round(value, 3) for value in self.quartiles],
            },
            "ours": round(self.ours, 3),
            "theirs": round(self.theirs, 3),
            "over": round(self.over, 3),
            "unit": self.unit,
            "n": len(self.pairs),
        }
        if self.limit:
            entry.update(limit=self.limit.bound, limit_on=self.limit.on, met=self.met)
            entry.update(limit_is="least" if self.limit.at_least else "most")
        return entry

    def as_row(self) -> tuple[str, ...]:
        def show(value: float) -> str:
            return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}"

        held = "none"
        if self.limit:
            mark = "✓" if self.met else "✗ MISSED"
            unit = "×" if self.limit.on == "ratio" else f" {self.unit}"
            sign = "≥" if self.limit.at_least else "≤"
            held = f"{self.limit.on} {sign} {self.limit.bound:g}{unit} {mark}"
        return (
            self.name,
            f"{self.ratio:.2f}×",
            "{:.2f}…{:.2f}".format(*self.quartiles),
            f"{min(self.ratios):.2f}…{max(self.ratios):.2f}",
            show(self.ours),
            show(self.theirs),
            f"{'+' if self.over >= 0 else ''}{show(self.over)}",
            self.unit,
            str(len(self.pairs)),
            held,
        )


HEADINGS = (
    *("benchmark", "ratio", "quartiles", "min…max"),
    *("ours", "theirs", "over", "unit", "n", "limit"),
)


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


class Twin:
    """twin.c as a child that does one thing a line."""

    def __init__(self, program: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            (program, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: str) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
            return [int(word) for word in self._process.stdout.readline().split()]
        except BrokenPipeError:
            return []

    def __enter__(self) -> Twin:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class Bench:
    """What the benchmarks share."""

    def __init__(self, twin: Path, library: Path, quick: bool) -> None:
        self._twin = twin
        self._quick = quick
        self._library = library
        self._calls = ctypes.CDLL(str(library))
        cycle = self._calls.timed_cycle
        number, pointer = ctypes.c_ulong, ctypes.c_void_p
        cycle.argtypes = (ctypes.c_int, number, pointer, number, pointer, ctypes.c_int)
        cycle.restype = ctypes.c_int64

    def count(self, full: int) -> int:
        """How many pairs: a fifth where it has to be quick."""
        return full // 5 if self._quick else full

    # -- within this process -------------------------------------------------------------------

    def checked_ioctl(self) -> Iterator[Result]:
        calls = 100
        bare = ctypes.CDLL(None).ioctl  # without errno even: the least there is
        bare.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
        bare.restype = ctypes.c_int
        cap, request = cdefs.KVM_CAP_USER_MEMORY, cdefs.KVM_CHECK_EXTENSION
        with Kvm() as kvm:
            fd = kvm.fileno()

            def ours() -> float:
                start = perf_counter_ns()
                for _ in range(calls):
                    kvm.check_extension(cap)
                return (perf_counter_ns() - start) / calls

            def theirs() -> float:
                start = perf_counter_ns()
                for _ in range(calls):
                    bare(fd, request, cap)
                return (perf_counter_ns() - start) / calls

            pairs = alternate(ours, theirs, self.count(2000))
        yield Result("checked_ioctl", "ns", pairs, Limit("ratio", 1.25))

    def exit_loop(self) -> Iterator[Result]:
        """The exit handled in place; and, for comparison, decoded to a tuple each time."""
        exits = 50  # short rounds: most are over before anything else gets the CPU
        with (
            Kvm() as kvm,
            Twin(self._twin, "loop", guest.CODE.hex()) as twin,
            on_one_cpu(twin.pid),
        ):
            vm, vcpu = guest.bring_up(kvm)
            with vm, vcpu:

                def theirs() -> float:
                    answer = twin.ask(str(exits))
                    if not answer:
                        raise Failed("the C loop failed")
                    sums["C"] = sums.get("C", 0) + answer[1]
                    return answer[0] / exits

                def ours(loop: Callable[[Vcpu, int], int]) -> Callable[[], float]:
                    def measure() -> float:
                        start = perf_counter_ns()
                        total = loop(vcpu, exits)
                        elapsed = perf_counter_ns() - start
                        sums["Python"] = sums.get("Python", 0) + total
                        return elapsed / exits

                    return measure

                for name, loop, n in (
                    ("exit_loop", handle_in_place, 1000),
                    ("exit_decoded", handle_decoded, 300),
                ):
                    sums: dict[str, int] = {}
                    pairs = alternate(ours(loop), theirs, self.count(n))
                    if sums["C"] != sums["Python"]:
                        raise Failed("C and Python saw different data")  # one lost an exit
                    result = Result(name, "ns", pairs)
                    if name == "exit_loop":
                        result = judge_exits(result)
                    yield result

    def slot_cycle(self) -> Iterator[Result]:
        """Make and delete a slot with a guest_memfd, in a VM that this KVM gives it to."""
        cycles, size = 20, 1 << 20
        with Kvm() as kvm, ExitStack() as stack:
            try:
                abi, vm, file = guest_memfd_vm(kvm, size, stack)
            except OSError as error:
                raise Skipped(f"no VM with guest_memfd here: {error.strerror}") from None
            memory = stack.enter_context(HostMemory(size))
            region = gm.ffi.new("struct kvm_userspace_memory_region2 *")
            region.flags, region.guest_memfd = gm.KVM_MEM_GUEST_MEMFD, file.fileno()
            region.memory_size, region.userspace_addr = size, memory.userspace_addr
            gone = gm.ffi.new("struct kvm_userspace_memory_region2 *")
            addresses = [int(gm.ffi.cast("uintptr_t", one)) for one in (region, gone)]
            requests = (gm.KVM_SET_USER_MEMORY_REGION2, cdefs.KVM_SET_USER_MEMORY_REGION)

            def ours() -> float:
                start = perf_counter_ns()
                for _ in range(cycles):
                    abi.bind(vm, 0, size, file, memory=memory, slot=0).delete()
                return (perf_counter_ns() - start) / cycles

            def theirs() -> float:
                (set_, delete), (first, second) = requests, addresses
                took = self._calls.timed_cycle(vm.fileno(), set_, first, delete, second, cycles)
                if took < 0:
                    raise Failed("C's ioctl failed")
                return float(took) / cycles

            pairs = alternate(ours, theirs, self.count(300))
        yield Result("slot_cycle", "ns", pairs, Limit("ratio", 1.3))

    def puppet(self) -> Iterator[Result]:
        """A command told through the mailbox; and the same guest, doing it again untold."""
        commands, gpa = 50, 0x1000
        with Kvm() as kvm, kvm.create_vm() as vm, HostMemory(1 << 20) as memory:
            vm.map(memory, 0)
            with Puppet(vm) as guest_:
                guest_.store(gpa, 8, 0x1234)
                guest_.load(gpa, 8)
                vcpu = guest_.vcpu
                run, done, reason = vcpu.kvm_run, DONE_PORT, cdefs.KVM_EXIT_IO
                io = run.io

                def ours() -> float:
                    start = perf_counter_ns()
                    for _ in range(commands):
                        if guest_.load(gpa, 8) != 0x1234:
                            raise Failed("the puppet read something else")
                    return (perf_counter_ns() - start) / commands

                def theirs() -> float:
                    start = perf_counter_ns()
                    for _ in range(commands):
                        if vcpu.run() != reason or io.port != done:
                            raise Failed(f"unexpected exit {vcpu.exit()}")
                    return (perf_counter_ns() - start) / commands

                pairs = alternate(ours, theirs, self.count(500))
        yield Result("puppet", "ns", pairs, Limit("ratio", 1.3))

    def conversions(self) -> Iterator[Result]:
        """In each built kernel that has private memory, run under scripts/vm."""
        for name in KERNELS:
            built(name)
            found = self._in_kernel(name, "bench.conversions", self._library)
            pairs = [(ours, theirs) for ours, theirs in found["convert_1gib"]["pairs"]]
            costs = [f"{name}: a conversion costs, in ns a page:"]
            for page in ("4 KiB", "2 MiB"):
                cost = found[page]
                if cost is None:
                    costs.append(f"    {page}: this kernel maps no such pages here")
                    continue
                count = cost.pop("pages")
                shown = "; ".join(f"{kind} {value:.0f}" for kind, value in cost.items())
                costs.append(f"    {page} ({count} pages): {shown}")
            unit_pairs = [(ours / MS, theirs / MS) for ours, theirs in pairs]
            limit = Limit("ratio", 1.05)
            yield Result(f"convert_1gib {name}", "ms", unit_pairs, limit, "\n".join(costs))

    def in_place(self) -> Iterator[Result]:
        """Conversion in place beside the VM's attributes: one image, its parameter on and off."""
        kernel = built(IN_PLACE)
        parameter = "kvm.gmem_in_place_conversion=1"
        ours = self._in_kernel(IN_PLACE, "bench.in_place", kernel, options=("--append", parameter))
        theirs = self._in_kernel(IN_PLACE, "bench.in_place", kernel)
        if (ours["abi"], theirs["abi"]) != ("guest_memfd_in_place", "guest_memfd"):
            raise Failed(
                f"{parameter}: private memory by {ours['abi']}, without by {theirs['abi']}"
            )
        for kind, mine in ours["costs"].items():
            pairs = [(a / US, b / US) for a, b in zip(mine, theirs["costs"][kind], strict=True)]
            yield Result(f"in_place {kind}", "us", pairs)
        for kind, limit in (("held", Limit("ours", 1.05)), ("held, without holes", None)):
            pairs = [(ours[kind], theirs[kind])] * 2  # it is the same each time
            yield Result(f"in_place {kind}", "of the guest's size", pairs, limit)
        pairs = [*zip(ours["boots"], theirs["boots"], strict=True)]
        yield Result("in_place boot to init", "s", pairs)

    def linux(self) -> Iterator[Result]:
        """A stock kernel brought up beside QEMU's microvm, in each built kernel."""
        for name in KERNELS:
            found = self._in_kernel(name, "bench.linux", built(name))
            ours, theirs = (
                [dict(zip(BOOTED, one, strict=True)) for one in side]
                for side in zip(*found["qemu"], strict=True)
            )
            start = median(one["start"] for one in ours)
            note = f"{name}: start of our interpreter and imports, not counted: {start:.2f} s"
            for what, field, unit, scale, limit in (
                ("boot_to_init", "init", "s", 1, 1.0),
                ("vmm_memory", "memory", "MiB", 1 << 20, 0.8),
                ("serial", "serial", "s", 1, 3.0),
            ):
                pairs = [
                    (mine[field] / scale, other[field] / scale)
                    for mine, other in zip(ours, theirs, strict=True)
                ]
                yield Result(f"{what} {name}", unit, pairs, Limit("ratio", limit), note)
                note = ""
            for what, limit, sides in zip(
                ("console", "console_virtio"), (1.0, 1.2), found["console"], strict=True
            ):
                pairs = [(mine[SERIAL], other[SERIAL]) for mine, other in sides]
                note = f"{name}: our virtio console beside QEMU's " + (
                    "serial port" if what == "console" else "virtio console"
                )
                yield Result(f"{what} {name}", "s", pairs, Limit("ratio", limit), note)
            pairs = [(private, shared) for private, shared in found["private"]]
            note = f"{name}: the private guest's network, MiB/s down and up: " + "; ".join(
                f"{'with' if kind == 'vhost' else 'without'} vhost {rate['down']:.1f},"
                f" {rate['up']:.1f}"
                for kind, rate in found["private network"].items()
            )
            yield Result(f"boot_private {name}", "s", pairs, Limit("ratio", 1.3), note)
            note = f"{name}: boot_to_ready is held against our own boot to init"
            pairs = [(ready, init) for ready, init in found["ready"]]
            yield Result(f"boot_to_ready {name}", "s", pairs, Limit("ratio", 1.15), note)
            note = f"{name}: run_true is held against the same command in a shell on ttyS0"
            pairs = [(agent * 1000, serial * 1000) for agent, serial in found["commands"]]
            yield Result(f"run_true {name}", "ms", pairs, Limit("ratio", 3.0), note)
            yield from self._rates(name, found)

    @staticmethod
    def _rates(name: str, found: dict[str, Any]) -> Iterator[Result]:
        """The network and the disk, in MiB/s: more is better."""
        alone = [rates for pair in found["devices"] + found["vhost"] for rates in pair]
        if not all(rates["same"] for rates in [*alone, *found["private network"].values()]):
            raise Failed(f"in kernel {name}: the bytes that came are not those that were sent")
        for what, key, way, limit in (
            ("net_down", "devices", "down", 0.8),
            ("net_up", "devices", "up", 0.8),
            ("vhost_down", "vhost", "down", 1.0),
            ("vhost_up", "vhost", "up", 1.0),
            ("disk_read", "devices", "read", 0.8),
            ("disk_write", "devices", "write", 0.8),
        ):
            pairs = [(ours[way], theirs[way]) for ours, theirs in found[key]]
            yield Result(f"{what} {name}", "MiB/s", pairs, Limit("ratio", limit, at_least=True))

    def _in_kernel(
        self, name: str, module: str, *arguments: object, options: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        quick = ("--quick",) if self._quick else ()
        command: tuple[str | Path, ...] = (ROOT / "scripts" / "vm", name, "-q")
        command += (*options, "--timeout", "1500", "--")
        command += (sys.executable, ROOT / "scripts" / "launch.py", module)
        command += (*map(str, arguments), *quick)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Failed(f"in kernel {name}: status {done.returncode}: {done.stderr.strip()}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    # -- whole processes -----------------------------------------------------------------------

    def probe_process(self) -> Iterator[Result]:
        need_probe()
        yield self._processes("probe_process", PROBE, BASE, Limit("ratio", 2.6))

    def import_(self) -> Iterator[Result]:
        ours = (sys.executable, "-c", "from kvmpriv import Kvm, private")
        yield self._processes("import", ours, BASE, Limit("over", 40))

    def first_exit(self) -> Iterator[Result]:
        need_probe()
        ours = (sys.executable, str(HERE / "guest.py"))
        yield self._processes("first_exit", ours, PROBE, Limit("ratio", 1.5), "first")

    def probe_memory(self) -> Iterator[Result]:
        need_probe()
        with Twin(self._twin, "spawn") as twin:
            pairs = alternate(
                lambda: spawn(twin, PROBE).resident,
                lambda: spawn(twin, BASE).resident,
                self.count(25),
            )
        yield Result("probe_memory", "MiB", pairs, Limit("ours", 40))

    def ps_process(self) -> Iterator[Result]:
        """`kvmpriv ps` on a host with 200 processes more, each with 50 descriptors."""
        script = "for fd in $(seq 10 59); do eval exec $fd</dev/null; done; echo; read line"
        with ExitStack() as stack:
            for _ in range(200):
                child = stack.enter_context(
                    subprocess.Popen(
                        ["bash", "-c", script.replace("$fd<", '"$fd<"')],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                    )
                )
                stack.callback(child.kill)
                if child.stdout is None or child.stdout.read(1) != b"\n":
                    raise Failed("a process with 50 descriptors did not start")
            ours = (sys.executable, "-m", "kvmpriv", "ps")
            yield self._processes("ps_process", ours, BASE, Limit("ours", 500))

    def _processes(
        self,
        name: str,
        ours: tuple[str, ...],
        theirs: tuple[str, ...],
        limit: Limit,
        until: str = "end",
    ) -> Result:
        """Milliseconds from start to end, or of ours to its first output."""
        with Twin(self._twin, "spawn") as twin:
            spawned = alternate(
                lambda: spawn(twin, ours), lambda: spawn(twin, theirs), self.count(40)
            )
        # What a busy machine changes less.
        cpu = Result("", "ms", [(mine.cpu, other.cpu) for mine, other in spawned])
        note = f"CPU time {cpu.ours:.1f}, {cpu.theirs:.1f} ms to the end: {cpu.ratio:.2f}×"
        note += f", {cpu.over:+.1f} ms"
        pairs = [(getattr(mine, until), other.end) for mine, other in spawned]
        return Result(name, "ms", pairs, limit, note)


class Spawned(NamedTuple):
    first: float  # ms until it wrote something
    end: float  # ms
    cpu: float  # ms
    resident: float  # MiB


def spawn(twin: Twin, command: tuple[str, ...]) -> Spawned:
    """Run a command to its end.  A probe may say 1: no usable private memory."""
    answer = twin.ask("\t".join(command))
    if not answer:
        raise Failed(f"could not start {command[0]}")
    first, end, cpu, resident, status = answer
    code = os.waitstatus_to_exitcode(status)
    # Python ends with 1 as well when it fails, but then nothing has been printed.
    if code != 0 and not (command == PROBE and code == 1 and first):
        raise Failed(f"`{' '.join(command[1:])}` ended with status {code}")
    return Spawned(first / MS, end / MS, cpu / MS, resident / 1024)


def built(name: str) -> Path:
    """The image of a kernel that is built."""
    if not [*cache_root().glob(f"{name}.*/bzImage")]:
        raise Skipped(f"no kernel {name} is built: scripts/kernel/build {name}")
    build = (ROOT / "scripts" / "kernel" / "build", name)
    done = subprocess.run(build, check=True, capture_output=True, text=True)
    return Path(done.stdout.splitlines()[-1])


def need_probe() -> None:
    if importlib.util.find_spec("kvmpriv.__main__") is None:
        raise Skipped("there is no `python -m kvmpriv probe`")


def handle_in_place(vcpu: Vcpu, exits: int) -> int:
    """What the C loop does: reason, port, and the byte that the guest wrote."""
    run = vcpu.kvm_run
    io = run.io
    data = cdefs.ffi.cast("unsigned char *", run)
    reason, port = cdefs.KVM_EXIT_IO, guest.PORT
    total = 0
    for _ in range(exits):
        if vcpu.run() != reason or io.port != port:
            raise Failed(f"unexpected exit {vcpu.exit()}")
        total += data[io.data_offset]
    return total


def handle_decoded(vcpu: Vcpu, exits: int) -> int:
    total = 0
    for _ in range(exits):
        vcpu.run()
        decoded = vcpu.exit()
        if not isinstance(decoded, IoExit):
            raise Failed(f"unexpected exit {decoded}")
        total += decoded.data[0]
    return total


def judge_exits(result: Result) -> Result:
    cost = result.theirs
    note = f"an exit costs {cost:.0f} ns, kvmpriv's part is {result.over:.0f} ns"
    if cost >= DEAR_EXIT:
        return result._replace(limit=Limit("ratio", EXIT_RATIO), note=note)
    allowed = round((EXIT_RATIO - 1) * DEAR_EXIT)
    note += f"; exits below {DEAR_EXIT} ns: judged by the overhead"
    return result._replace(limit=Limit("over", allowed), note=note)


def alternate(ours: Callable[[], T], theirs: Callable[[], T], n: int) -> list[tuple[T, T]]:
    """n pairs, after one of each to warm up; every other pair begins with theirs."""
    ours(), theirs()
    pairs = []
    for i in range(n):
        if i % 2:
            second = theirs()
            pairs.append((ours(), second))
        else:
            first = ours()
            pairs.append((first, theirs()))
    return pairs


@contextmanager
def on_one_cpu(pid: int) -> Iterator[None]:
    """Keep ourselves and `pid` on one CPU: two may differ in what else they do."""
    before = os.sched_getaffinity(0)
    one = {max(before)}
    os.sched_setaffinity(0, one)
    os.sched_setaffinity(pid, one)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def guest_memfd_vm(
    kvm: Kvm, size: int, stack: ExitStack
) -> tuple[private.PrivateAbi, private.PrivateVm, private.PrivateFile]:
    """A VM and a guest_memfd for it: private where KVM has that, else shared."""
    try:
        abi: private.PrivateAbi = private.GuestMemfdAbi()
        vm = stack.enter_context(abi.create_vm(kvm))
    except OSError:
        flags = gm.GUEST_MEMFD_FLAG_MMAP | gm.GUEST_MEMFD_FLAG_INIT_SHARED
        abi = private.GuestMemfdAbi(vm_type=0, file_flags=flags)
        vm = stack.enter_context(abi.create_vm(kvm))
    return abi, vm, stack.enter_context(abi.create_file(vm, size))


def compile_c(source: str, target: Path, *options: str) -> Path:
    command = ("cc", "-O2", "-Wall", "-Wextra", *options)
    subprocess.run([*command, "-o", target, HERE / source], check=True)
    return target


def missing() -> str | None:
    """What this machine lacks to run the benchmarks."""
    try:
        Kvm().close()
    except OSError as error:
        return str(error)
    return None if shutil.which("cc") else "no C compiler (cc)"


def main(arguments: list[str]) -> int:
    """Run the benchmarks, print the table, write bench.json."""
    names = (
        *("checked_ioctl", "exit_loop", "probe_process", "import", "first_exit", "probe_memory"),
        *("ps_process", "slot_cycle", "puppet", "conversions", "in_place", "linux"),
    )
    about = "kvmpriv's benchmarks, on this host's /dev/kvm and in the kernels built here"
    parser = argparse.ArgumentParser(prog="bench", description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="a fifth of the pairs")
    parser.add_argument("--output", default=ROOT / "bench.json", help="where the JSON goes")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if what := missing():
        print(f"bench: {what}", file=sys.stderr)
        return 2
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)  # both sides alike; what else runs disturbs less
    results: list[Result] = []
    without: list[str] = []  # a figure
    with tempfile.TemporaryDirectory() as folder:
        # The programs started find the package that is measured here, and after the warm-up its
        # byte code, whatever the environment and the permissions say.
        os.environ.update(PYTHONPATH=str(ROOT), PYTHONPYCACHEPREFIX=f"{folder}/pycache")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        twin = compile_c("twin.c", Path(folder) / "twin")
        library = compile_c("calls.c", Path(folder) / "calls.so", "-shared", "-fPIC")
        bench = Bench(twin, library, options.quick)
        for name in options.names or names:
            print(f"bench: {name} …", file=sys.stderr)
            try:
                results += getattr(bench, "import_" if name == "import" else name)()
            except Skipped as why:
                without.append(f"[ SKIP ] {name}: {why}")
            except Failed as why:
                without.append(f"[ FAIL ] {name}: {why}")
    rows = [HEADINGS, *(result.as_row() for result in results)]
    notes = [f"{result.name}: {result.note}" for result in results if result.note]
    if (load := os.getloadavg()[0]) > len(os.sched_getaffinity(0)) + 1:
        notes.append(f"The machine is busy (load {load:.1f}): times and differences are inflated.")
    print("\n".join([table(rows), *notes, *without]))
    document = {result.name: result.as_json() for result in results}
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if not without and all(result.met for result in results) else 1
