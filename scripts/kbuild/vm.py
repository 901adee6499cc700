"""Run a command in a kernel of scripts/kernel, under QEMU, on this machine's root file system.

    scripts/vm restrictedmem -- sh -c 'ls -l /dev/kvm; exit 7'

The command may write anywhere, but what it writes is thrown away, except in the folders of
--output-dir.  It runs as root in the caller's working directory; its stdout, stderr and exit
status are passed on.  The kernel's log is kept (--log, or in the cache).  QEMU uses KVM if that can
nest, and else emulates a processor (TCG); a message says which.

virtme-ng does a part of this, but it uses KVM wherever /dev/kvm can be opened (a KVM that can't
nest starts the VM and hangs), does not check the kernel's log and has no time limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import kernels
from .command import Parser
from .errors import Refused, say
from .kernel_log import TROUBLE, complaints
from .packages import QEMU, ensure
from .paths import DATA, ROOT, cache_root
from .process import die_with_parent, exit_on
from .recipe import Plan
from .store import find_or_build

if TYPE_CHECKING:
    import argparse

COMPLAINT, PANIC, LOST, NO_BOOT, TIMEOUT, RUNNER = 120, 121, 122, 123, 124, 125
EXIT_CODES = """exit codes: the command's own (128 + N when signal N ended it), but
  120  the kernel complained: WARN, BUG, sanitizer, lockdep, leak, taint
  121  the kernel panicked (an oops is made a panic, except with --tolerate)
  122  the VM was lost: QEMU died, or the command rebooted it
  123  the VM did not come up; under TCG not the second time either
  124  --timeout or --silence ran out
  125  nothing was run: usage error, no QEMU, no kernel
  130, 143  interrupted, terminated"""

PASSED = re.compile(r"(KVMPRIV_|LC_|PYTEST_|PYTHON).*|CI|TERM|PATH|LANG|HOME|NO_COLOR|VIRTUAL_ENV")
LOGS_KEPT = 40
# Seconds to wait, for the plain and the debug kernels: for a VM to come up, for a line in the log
# until it has, and for one that has ended its command and is silent (a debug kernel searches for
# leaks then).
BOOTING, BOOT_SILENCE, ENDING = (600.0, 1800.0), (90.0, 300.0), (20.0, 300.0)

# What a kernel prints that may be stalled for ever: there is nothing left to wait for.
STALL = re.compile(r".*(?:rcu: INFO: .*stall|blocked for more than|watchdog: BUG: soft lockup)")
# Seconds between checks for that, and from the first line of a report until all of it is written.
GLANCE, REPORT = 10.0, 15.0
IDLE = 0.1  # of a processor, at most, is used by a VM that waits for an interrupt that never comes


def host_kvm_nests() -> bool:
    """Ask this machine's KVM whether a guest of it may have SVM or VMX.

    kvmpriv/probe/host.py asks the same, with the package that this must run without.
    """
    get_supported_cpuid, entries = 0xC008AE05, 512
    buffer = bytearray(struct.pack("<II", entries, 0) + bytes(40 * entries))
    try:
        with Path("/dev/kvm").open("r+b", buffering=0) as kvm:
            fcntl.ioctl(kvm, get_supported_cpuid, buffer)
    except OSError:
        return False
    for at in range(8, 8 + 40 * struct.unpack_from("<I", buffer)[0], 40):
        leaf, *_, ecx, _ = struct.unpack_from("<7I", buffer, at)
        if (leaf == 1 and ecx & 1 << 5) or (leaf == 0x80000001 and ecx & 1 << 2):
            return True
    return False


def relevant(log: str, limit: int = 60) -> str:
    """The lines of the log from the first complaint on, or the last ones."""
    lines = log.splitlines()
    first = next((at for at, line in enumerate(lines) if TROUBLE.match(line)), None)
    part = lines[max(first - 2, 0) :][:limit] if first is not None else lines[-12:]
    return "\n".join(f"  | {line}" for line in part)


class Stream:
    """Copies one of the guest's streams, up to the mark that ends it."""

    def __init__(self, source: socket.socket, target: int, mark: bytes) -> None:
        self.source, self.target, self.mark = source, target, mark
        self.held = b""
        self.ended = False

    def pump(self) -> bool:
        """Copy what has arrived; False if the stream has ended."""
        data = self.source.recv(1 << 16)
        self.held += data
        at = self.held.find(self.mark)
        if at >= 0:
            self.ended = True
            self.put(at)
        else:
            # Hold back no more than what may be the beginning of the mark.
            keep = next(
                (n for n in range(len(self.mark) - 1, 0, -1) if self.held.endswith(self.mark[:n])),
                0,
            )
            self.put(len(self.held) - (keep if data else 0))
        return bool(data) and not self.ended

    def put(self, count: int) -> None:
        view, self.held = memoryview(self.held[:count]), self.held[count:]
        while view:
            view = view[os.write(self.target, view) :]


class Machine:
    """One run; everything that it opens is owned by `stack`."""

    def __init__(
        self,
        options: argparse.Namespace,
        image: Path,
        log: Path,
        stack: contextlib.ExitStack,
        *,
        again: bool = False,
    ) -> None:
        self.options, self.image, self.log, self.stack = options, image, log, stack
        #: Whether the caller starts a second VM if the kernel of this one stops in its boot.
        self.again = again
        self.mark = secrets.token_hex(16)
        self.sockets: dict[str, socket.socket] = {}
        self.theirs: list[socket.socket] = []
        self.qemu: subprocess.Popen[bytes]
        self.ready = False
        self.status: int | None = None
        self.tainted: int | None = None
        self.peak, self.elapsed, self.silent = 0, 0.0, False
        self.powered_on = time.monotonic()
        #: Size of the log, and when it had grown to that.
        self.logged = 0, self.powered_on
        # QEMU's emulation writes to the first CPU's SVM flags from all others, without a lock
        # (FXRSTOR and XRSTOR: cpu_clear_ignne() in 7.2): one that runs guests loses GIF or nested
        # paging sooner or later.  So guests run on the others.
        self.spare_cpu = options.accel != "kvm" and options.cpus > 1

    def write_job(self, folder: Path) -> None:
        """Write what the guest's init reads: settings, and the command with its environment."""
        options = self.options
        shutil.copyfile(DATA / "init", folder / "init")
        (folder / "init").chmod(0o755)
        settings = [
            f"mark={self.mark}",
            f"echo {shlex.quote(options.name)} >/proc/sys/kernel/hostname",
        ]
        if self.spare_cpu:
            settings.append(f"taskset -p -c 1-{options.cpus} 1 >/dev/null || exit 1")
        settings.append("input=" + ("/dev/vport0p4" if options.stdin else "/dev/null"))
        here = [
            str(Path.cwd()),
            str(ROOT),
            *options.command,
            *map(str, options.output_dir),
        ]
        # What the command needs of the host's /tmp, an empty one would hide.
        if not any(word.startswith("/tmp/") or word == "/tmp" for word in here):  # noqa: S108
            settings.append("mount -t tmpfs -o mode=1777 tmpfs /tmp")
        for number, path in enumerate(options.output_dir):
            where = shlex.quote(str(path))
            settings.append(
                f"mkdir -p {where}; mount -t 9p -o trans=virtio,version=9p2000.L,cache=mmap,"
                f"msize=512000 output{number} {where}"
            )
        (folder / "settings").write_text("\n".join(settings) + "\n")
        chosen = {k: v for k, v in os.environ.items() if PASSED.fullmatch(k)}
        for word in options.env:
            name, given, value = word.partition("=")
            chosen[name] = value if given else os.environ.get(name, "")
        chosen["KVMPRIV_VM"] = options.name
        script = [f"export {name}={shlex.quote(value)}" for name, value in chosen.items()]
        script.append(f"cd {shlex.quote(str(Path.cwd()))} || exit 127")
        script.append("exec " + shlex.join(options.command))
        (folder / "command").write_bytes(os.fsencode("\n".join(script) + "\n"))

    def arguments(self, folder: Path) -> list[str]:
        options, cpus = self.options, self.options.cpus + self.spare_cpu
        if options.accel == "kvm":
            accel = ["-accel", "kvm", "-cpu", "host"]
        else:
            # tb-size: the default would let translated code alone grow to a gigabyte.
            # -xsave: in QEMU 7.2's emulation, CPUID leaf 0xd of a nested guest keeps the size of
            # the state without AVX after the guest has enabled AVX, and Linux 7.3 panics there.
            accel = ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,-xsave"]
        mount_on = next(p for p in ("/mnt", "/media", "/srv", "/opt") if Path(p).is_dir())
        boot = (
            "console=ttyS0 panic=-1 root=root rootfstype=9p ro "
            "rootflags=trans=virtio,version=9p2000.L,cache=loose,msize=512000 "
            f"{'' if options.tolerate else 'oops=panic '}random.trust_cpu=on no_timer_check "
            f"init={folder}/init vm_job={folder} vm_mount={mount_on} "
            f"{kernels.words(options.name)} {options.append}"
        )
        command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-machine", "q35", *accel, "-smp", str(cpus), "-m", options.memory]
        command += ["-kernel", str(self.image), "-append", boot, "-no-reboot"]
        command += ["-chardev", f"file,id=console,path={comma(self.log)}"]
        command += ["-serial", "chardev:console", "-device", "virtio-serial-pci"]
        for number, name in enumerate(("control", "stdout", "stderr", "stdin"), 1):
            ours, theirs = socket.socketpair()
            self.sockets[name] = self.stack.enter_context(ours)
            self.theirs.append(self.stack.enter_context(theirs))
            command += ["-chardev", f"socket,id={name},fd={theirs.fileno()}"]
            command += ["-device", f"virtserialport,nr={number},chardev={name}"]
        shares = [("root", Path("/"), ",readonly=on")]
        shares += [(f"output{n}", path, "") for n, path in enumerate(options.output_dir)]
        for tag, path, how in shares:
            share = f"local,id={tag},path={comma(path)},security_model=none,multidevs=remap{how}"
            command += ["-fsdev", share, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        return command

    def start(self) -> None:
        # Named by us, so that it survives as a word of the kernel's command line.
        folder = Path(tempfile.mkdtemp(prefix=f"kvmpriv-vm-{os.getpid()}-", dir="/tmp")).resolve()
        self.stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for old in folder.parent.glob("kvmpriv-vm-*"):  # a killed runner could not tidy up
            if not Path("/proc", old.name.split("-")[2]).exists():
                shutil.rmtree(old, ignore_errors=True)
        self.write_job(folder)
        arguments = self.arguments(folder)
        self.log.touch()
        self.words = folder / "qemu.txt"
        with self.words.open("wb") as words:
            self.qemu = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                pass_fds=[end.fileno() for end in self.theirs],
                start_new_session=True,  # a Ctrl-C is ours to handle, not QEMU's
                preexec_fn=die_with_parent,  # noqa: PLW1509 (no thread of ours runs yet)
            )
        self.stack.callback(self.stop)
        for end in self.theirs:
            end.close()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.qemu.pid}/status").read_text()
            if match := re.search(r"VmHWM:\s*(\d+)", status):
                self.peak = int(match[1]) // 1024
        self.qemu.kill()
        self.qemu.wait()

    def feed(self) -> None:
        """Pass our stdin on, in a thread of its own since either end may block."""
        target = self.sockets["stdin"]
        with contextlib.suppress(OSError):
            while data := os.read(0, 1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def run(self, started: float) -> int | None:
        """Copy the streams until the guest has reported the outcome; the exit status.

        `started` is where the time limit begins.  None: the kernel has stopped in its boot, which a
        second VM may not do.
        """
        self.start()
        mark = self.mark.encode()
        streams = {
            "stdout": Stream(self.sockets["stdout"], 1, mark),
            "stderr": Stream(self.sockets["stderr"], 2, mark),
        }
        limit = self.options.timeout or float("inf")
        heard, heard_at, stalled_at = b"", self.powered_on, 0.0
        silence, used, fed = self.options.silence or float("inf"), 0.0, False
        with selectors.DefaultSelector() as selector:
            gone = os.pidfd_open(self.qemu.pid)
            self.stack.callback(os.close, gone)
            selector.register(gone, selectors.EVENT_READ, "gone")
            for name in ("control", *streams):
                selector.register(self.sockets[name], selectors.EVENT_READ, name)
            # The streams end after the verdict where the reader of ours is slow.
            while self.tainted is None or not all(stream.ended for stream in streams.values()):
                # A command that never pauses is out of time, too.
                late = time.monotonic() - started >= limit
                wait = min(limit - (time.monotonic() - started), self.patience(heard_at), GLANCE)
                names = [] if late else [k.data for k, _ in selector.select(max(wait, 0))]
                if names:
                    heard_at, used = time.monotonic(), self.processor_time()
                for name in names:
                    if name == "control":
                        data = self.sockets["control"].recv(4096)
                        *lines, heard = (heard + data).split(b"\n")
                        for line in lines:
                            self.receive(line.decode())
                        if self.ready and not fed and self.options.stdin:
                            fed = True
                            threading.Thread(target=self.feed, daemon=True).start()
                        more = bool(data)
                    else:
                        more = name == "gone" or streams[name].pump()
                    if not more:
                        selector.unregister(self.sockets[name])
                if names == ["gone"]:
                    return self.judge(LOST if self.ready else NO_BOOT)
                if not names:
                    self.elapsed = time.monotonic() - started
                    late = self.elapsed >= limit
                    if late or self.patience(heard_at) <= 0:
                        if self.again and not self.ready and not late and self.stops_in_boot():
                            return None
                        return self.judge(TIMEOUT if self.ready or late else NO_BOOT)
                    quiet = time.monotonic() - heard_at
                    if quiet >= silence and self.processor_time() - used < IDLE * quiet:
                        self.silent = True
                        return self.judge(TIMEOUT)
                    if self.stalled() and not self.options.tolerate:
                        stalled_at = stalled_at or time.monotonic()
                        if time.monotonic() - stalled_at >= REPORT:
                            return self.judge(COMPLAINT)
        self.stop()
        self.elapsed = time.monotonic() - started
        assert self.status is not None
        return self.judge(self.status)

    def receive(self, line: str) -> None:
        """A line on the control port."""
        word, _, number = line.partition(" ")
        if word == "ready":
            self.ready = True
        elif word == "exit":
            self.status = int(number)
        elif word == "tainted":
            self.tainted = int(number)

    def patience(self, heard_at: float) -> float:
        """Seconds for which the VM may go on as it is: without end while the command runs.

        `heard_at` is when anything has come from it.
        """
        now = time.monotonic()
        if not self.ready:
            size = self.log.stat().st_size
            if size != self.logged[0]:
                self.logged = size, now
            quiet = now - self.logged[1]
            debug = self.options.debug
            return min(BOOTING[debug] - (now - self.powered_on), BOOT_SILENCE[debug] - quiet)
        if self.status is not None:
            return ENDING[self.options.debug] - (now - heard_at)
        return float("inf")

    def stops_in_boot(self) -> bool:
        """Whether the kernel has stopped without a complaint, as some do in QEMU's emulation."""
        log = self.log.read_text(errors="replace")
        if self.options.accel == "kvm" or complaints(log.replace("\r", "")):
            return False
        last = log.strip().rpartition("\n")[2].strip() or "nothing"
        if not self.options.quiet:
            say(f"vm: the kernel has stopped in its boot, after: {last}\n  it is booted once more")
        return True

    def processor_time(self) -> float:
        """The processor time that QEMU has used, in seconds."""
        fields = Path(f"/proc/{self.qemu.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stalled(self) -> bool:
        """Whether the kernel reports a stall, of itself or of a task."""
        log = self.log.read_text(errors="replace")
        return any(map(STALL.match, complaints(log.replace("\r", ""))))

    def judge(self, code: int) -> int:
        """The exit status of the run, from how it ended and from the kernel's log; prints why."""
        log = self.log.read_text(errors="replace").replace("\r", "")
        found = complaints(log)
        whole = self.tainted is not None
        ended = f"; the command ended with {self.status}" if self.status is not None else ""
        if not whole and self.elapsed:
            ended += f"; stopped after {self.elapsed:.0f} s"
        if any("Kernel panic" in line for line in found):
            code, text = PANIC, "the kernel panicked"
        elif found or self.tainted:
            taint = f", taint {self.tainted}" if self.tainted else ""
            text = f"the kernel complained ({len(found)} messages{taint})"
            if self.options.tolerate and whole:
                say(f"vm: tolerated: {text}{ended}; kernel log: {self.log}")
                return code
            code = COMPLAINT
        elif whole:
            if not self.options.quiet:
                say(f"vm: {self.elapsed:.1f} s, at most {self.peak} MiB resident")
            return code
        elif self.silent:
            text = f"silent and idle for {self.options.silence:.0f} s"
        elif code == TIMEOUT:
            text = "the VM hung" if self.status is not None else "the command did not end"
        else:
            words = self.words.read_text(errors="replace").strip()
            text = f"the VM {'was lost' if self.ready else 'did not come up'}"
            ended += f" (QEMU: {words or 'no message'})"
        say(f"vm: {text}{ended}\n{relevant(log)}\n  the whole log: {self.log}")
        if code == NO_BOOT:
            say(f"  If {qemu_version()} is too old for this kernel, put a newer one first in PATH.")
        return code


def qemu_version() -> str:
    """The version of QEMU in words."""
    command = ["qemu-system-x86_64", "--version"]
    said = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    match = re.search(r"version (\S+)", said)
    return f"QEMU {match[1]}" if match else "QEMU"


def comma(path: Path) -> str:
    """A path as QEMU's option syntax wants it."""
    return str(path).replace(",", ",,")


def find_image(options: argparse.Namespace) -> Path:
    """The kernel: a path, or what scripts/kernel/build finds or builds."""
    if kernels.is_image(options.name):
        image = Path(options.name)
        if not image.is_file():
            raise Refused(RUNNER, f"the kernel image {image} does not exist")
        options.name = image.resolve().parent.name or "vm"
        return image
    source = options.source and options.source.resolve()
    return find_or_build(Plan(options.name, options.debug, options.literal, source)) / "bzImage"


def find_log(options: argparse.Namespace) -> Path:
    if options.log:
        options.log.parent.mkdir(parents=True, exist_ok=True)
        return Path(options.log).absolute()
    folder = cache_root() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    logs = {}
    for log in folder.glob("*.log"):
        with contextlib.suppress(FileNotFoundError):  # another VM tidies up, too
            logs[log] = log.stat().st_mtime
    for old in sorted(logs, key=logs.__getitem__)[:-LOGS_KEPT]:
        if not Path("/proc", old.stem.rpartition("-")[2]).exists():  # its VM may run yet
            old.unlink(missing_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return folder / f"{options.name}-{stamp}-{os.getpid()}.log"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("vm", __doc__, EXIT_CODES, "vm NAME [options] -- COMMAND...", RUNNER)
    add = parser.add_argument
    add("name", metavar="NAME", help=f"{', '.join(kernels.KERNELS)}, or the path of an image")
    add(
        "--cpus",
        type=int,
        default=2,
        help="processors (2); TCG has one more",
    )
    add("--memory", default="2G", metavar="SIZE", help="such as 512M (default 2G)")
    add(
        "--silence",
        type=float,
        metavar="SECONDS",
        help="end the VM if it is idle and silent for so long (124)",
    )
    add("--timeout", type=float, metavar="SECONDS", help="time limit, from power on")
    add(
        "--debug",
        action="store_true",
        help="use the debug kernel",
    )
    add(
        "--source",
        type=Path,
        metavar="TREE",
        help=f"build this Linux tree, with the config and the patches of NAME ({kernels.NEWEST})",
    )
    add("--literal", action="store_true", help="use v9 as posted, without the fixes")
    add("--append", default="", metavar="WORDS", help="more words for the kernel's command line")
    add(
        "--output-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder in which the command may write",
    )
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set or pass a variable",
    )
    add("--stdin", action="store_true", help="pass stdin on (default: /dev/null)")
    add("--log", type=Path, metavar="FILE", help="write the kernel's log here")
    add("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="default: auto")
    add("--tolerate", action="store_true", help="do not fail if the kernel complains")
    add("-q", "--quiet", action="store_true", help="print nothing unless something fails")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(kernels.with_name(arguments[:at]))
    options.command = arguments[at + 1 :]
    if problem := kernels.problem_with(options.name, options.literal, options.source):
        parser.error(problem)
    if not options.command:
        parser.error("no command: it comes after --")
    if not re.fullmatch(r"\d+[MG]?", options.memory) or options.cpus < 1:
        parser.error("--memory must be a size such as 2G, and --cpus 1 or more")
    options.output_dir = [path.absolute() for path in options.output_dir]
    return options


def main(arguments: list[str]) -> int:
    exit_on(signal.SIGTERM, signal.SIGHUP)
    options = parse(arguments)
    try:
        ensure(QEMU)
        nests = host_kvm_nests()
        if options.accel == "kvm" and not nests:
            raise Refused(RUNNER, "this machine's KVM offers its guests neither SVM nor VMX")
        if options.accel == "auto":
            options.accel = "kvm" if nests else "tcg"
        image, log = find_image(options), find_log(options)
        for path in options.output_dir:
            path.mkdir(parents=True, exist_ok=True)
        if not options.quiet:
            why = "" if nests else " (this machine's KVM offers its guests neither SVM nor VMX)"
            how = "KVM" if options.accel == "kvm" else f"QEMU's emulation, TCG{why}"
            say(f"vm: {options.name} under {how}; kernel log: {log}")
        started = time.monotonic()
        for again in (True, False):
            with contextlib.ExitStack() as stack:
                status = Machine(options, image, log, stack, again=again).run(started)
            if status is not None:
                break
        assert status is not None
        return status
    except Refused as refused:
        say(f"vm: {refused}")
        return RUNNER
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        say("vm: interrupted; the VM is gone")
        return 128 + signal.SIGINT
    except OSError as error:
        say(f"vm: {error}")
        return RUNNER
