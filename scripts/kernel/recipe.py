"""How a kernel is made from a source, patches and a config.

Every file of this folder that decides what comes out is part of the cache's key, this one
included; what only decides how it is called (command line, cache, locks) is in `build`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packages import NO_SOURCE, Refused, die_with_parent, say

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
USAGE, PATCH, CONFIG, COMPILE, SPACE = 2, 4, 5, 6, 7
SERIES = {"restrictedmem": "6.1", "guest_memfd": "6.12"}  # the name: Debian's linux-source
MODULES_GIB, PLAIN_GIB = 20.0, 3.5  # room for a build (measured, rounded up)


@dataclass(frozen=True)
class Plan:
    """One kernel to be made."""

    name: str
    debug: bool = False
    literal: bool = False
    source: Path | None = None
    config: Path | None = None
    deb: bool = False
    here: Path = HERE

    @property
    def variant(self) -> str:
        words = [self.name, "debug" * self.debug, "literal" * self.literal]
        words += ["config" * (self.config is not None), "deb" * self.deb]
        return "-".join(word for word in words if word)

    @property
    def tarball(self) -> Path:
        return Path(f"/usr/src/linux-source-{SERIES[self.name]}.tar.xz")

    def patches(self) -> list[Path]:
        """First the ABI as it was posted, then (unless literal) what mends it."""
        folders = ["abi"] if self.literal else ["abi", "mend"]
        found: list[Path] = []
        for folder in folders:
            found += sorted((self.here / self.name / folder).glob("*.patch"))
        return found

    def fragments(self) -> list[Path]:
        own = [self.here / f"{self.name}.config"]
        base = [] if self.config else [self.here / "base.config"]
        return base + own + ([self.here / "debug.config"] if self.debug else [])

    def compiler(self) -> list[str]:
        return [os.environ.get("CC", "gcc")]

    def key(self) -> str:
        """A digest of all that decides the outcome; cheap, since every call computes it."""
        digest = hashlib.sha256()

        def add(label: str, data: bytes) -> None:
            digest.update(f"{label}\0{len(data)}\0".encode() + data)

        add("variant", self.variant.encode())
        add("source", fingerprint(self.source or self.tarball))
        add("compiler", first_line([*self.compiler(), "--version"]))
        add("linker", first_line(["ld", "--version"]))
        files = [*self.patches(), *self.fragments(), Path(__file__)]
        for file in files + ([self.config] if self.config else []):
            add(file.name, file.read_bytes())
        return digest.hexdigest()[:20]


def first_line(command: list[str]) -> bytes:
    return subprocess.run(command, capture_output=True, check=True).stdout.split(b"\n")[0]


def fingerprint(source: Path) -> bytes:
    """Tells one source from another without reading a gigabyte."""
    if source.is_file():
        status = source.stat()
        return f"{source.name} {status.st_size} {status.st_mtime_ns}".encode()

    def walk(folder: str) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != ".git":
                        yield from walk(entry.path)
                elif not entry.name.endswith((".o", ".cmd", ".a", ".d")):
                    status = entry.stat(follow_symlinks=False)
                    yield f"{entry.path} {status.st_size} {status.st_mtime_ns}\n"

    return hashlib.sha256("".join(walk(str(source))).encode()).digest()


def options(text: str) -> dict[str, str]:
    """The options of a config; one that is not set reads `n`."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"# (CONFIG_\w+) is not set|(CONFIG_\w+)=(.*)", line):
            found[match[1] or match[2]] = "n" if match[1] else match[3]
    return found


def lost(asked: dict[str, str], made: dict[str, str]) -> list[str]:
    """What was asked for and did not come: Kconfig drops such options without a word."""
    return [
        f"{name}={value} (now {made.get(name, 'n')})"
        for name, value in sorted(asked.items())
        if made.get(name, "n") != value
    ]


class Maker:
    """Runs the steps in `tree`; all output goes to a log, progress to stderr."""

    def __init__(self, plan: Plan, work: Path, out: Path) -> None:
        self.plan, self.work, self.out = plan, work, out
        self.tree = work / "linux"
        self.log = out / "build.log"
        self.jobs = os.environ.get("KVMPRIV_JOBS") or str(len(os.sched_getaffinity(0)))

    def run(self, command: list[str], code: int, what: str, show: bool = False) -> str:
        """Run one step; on failure say what, with the log's relevant lines."""
        # An outer make's or a kernel developer's settings must not leak into what is cached.
        foreign = ("KBUILD", "KCONFIG", "MAKE", "LOCALVERSION", "ARCH", "CROSS_COMPILE", "LLVM")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
            "LC_ALL": "C",
            "KBUILD_BUILD_TIMESTAMP": "Thu Jan 1 00:00:00 UTC 1970",
            "KBUILD_BUILD_USER": "kvmpriv",
            "KBUILD_BUILD_HOST": "kvmpriv",
        }
        lines: list[str] = []
        started = shown = time.monotonic()
        with (
            self.log.open("a") as log,
            subprocess.Popen(
                command,
                cwd=self.tree,
                env=environment,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (we have no threads)
            ) as child,
            contextlib.ExitStack() as guard,
        ):
            guard.callback(child.terminate)  # nothing once it has ended; else make stops its jobs
            assert child.stdout
            for line in child.stdout:
                log.write(line)
                lines.append(line)
                now = time.monotonic()
                if show and now - shown > (1 if sys.stderr.isatty() else 30):
                    shown = now
                    text = f"  {now - started:4.0f} s, {len(lines)} steps: {line.strip()}"
                    end = "\r" if sys.stderr.isatty() else "\n"
                    print(f"{text[:79]:<79}", end=end, file=sys.stderr, flush=True)
            child.wait()
        output = "".join(lines)
        if child.returncode:
            if "No space left on device" in output:
                raise OSError(errno.ENOSPC, f"No space left on device ({what})")
            marks = ("error:", "***", "undefined reference", "Error ", "fatal:")
            hits = [line for line in lines if any(mark in line for mark in marks)]
            raise Refused(code, f"{what} failed:\n" + "".join((hits or lines)[:15]).rstrip())
        return output

    def make(self, *targets: str, code: int, what: str, show: bool = False) -> str:
        compiler = " ".join(self.plan.compiler())
        return self.run(["make", f"-j{self.jobs}", f"CC={compiler}", *targets], code, what, show)

    def unpack(self) -> None:
        source = self.plan.source or self.plan.tarball
        say(f"unpacking {source}")
        self.tree.mkdir()
        if source.is_dir():
            # A tree that was built in would poison ours: leave what make made behind.
            drop = [f"--exclude={x}" for x in (".git", "*.o", "*.a", "*.cmd", "/.config")]
            copy = ["rsync", "-a", *drop, f"{source}/", "."]
            self.run(copy, NO_SOURCE, f"copying {source}")
            self.make("mrproper", code=NO_SOURCE, what=f"cleaning the copy of {source}")
        else:
            unpack = ["tar", "-xf", str(source), "--strip-components=1"]
            self.run(unpack, NO_SOURCE, f"unpacking {source}")
        if not (self.tree / "Kbuild").exists():
            raise Refused(NO_SOURCE, f"{source} is not a Linux source tree (it has no Kbuild)")

    def patch(self) -> None:
        if self.plan.name == "restrictedmem" and not self.plan.patches():
            raise Refused(PATCH, f"there are no patches in {self.plan.here / self.plan.name}")
        for patch in self.plan.patches():
            label = f"{patch.parent.name}/{patch.name}"
            # No fuzz: a hunk whose surroundings changed wants a person's eyes.
            command = ["patch", "-p1", "-N", "-F0", "--no-backup-if-mismatch", "-i", str(patch)]
            try:
                self.run(command, PATCH, label)
            except Refused:
                raise Refused(PATCH, self.explain(label)) from None
        if patches := self.plan.patches():
            say(f"applied {len(patches)} patches")

    def explain(self, label: str) -> str:
        """Name the hunks that failed, from patch's own words and the rejects it left."""
        file, hunks = "", []
        # Only the end of the log is this patch's: an earlier one would have stopped us.
        for line in self.log.read_text(errors="replace").splitlines():
            if match := re.match(r"patching file (\S+)", line):
                file = match[1]
            elif match := re.match(r"Hunk #(\d+) FAILED at (\d+)", line):
                hunks.append(f"hunk #{match[1]} of {file} (line {match[2]})")
            elif match := re.match(r"can't find file to patch at input line (\d+)", line):
                hunks.append(f"the file it names at its line {match[1]} is not there")
            elif "Reversed (or previously applied)" in line:
                hunks.append(f"{file} seems to have it already")
        rejects = "".join(r.read_text(errors="replace") for r in sorted(self.tree.rglob("*.rej")))
        source = self.plan.source or self.plan.tarball
        text = f"the patch {label} does not apply to {source}: {'; '.join(hunks) or 'no hunk'}."
        return text + ("\n" + "\n".join(rejects.splitlines()[:24]) if rejects else "")

    def configure(self) -> None:
        plan = self.plan
        wanted = "".join(fragment.read_text() for fragment in plan.fragments())
        wanted += f'CONFIG_LOCALVERSION="-{plan.variant}"\n'
        mine = options(wanted)
        if plan.config:
            # A distribution's config names signing keys that only the distribution has.
            keys = 'CONFIG_SYSTEM_TRUSTED_KEYS=""\nCONFIG_SYSTEM_REVOCATION_KEYS=""\n'
            ours = mine.keys() | options(keys).keys()
            theirs = plan.config.read_text().splitlines(keepends=True)
            kept = [line for line in theirs if not options(line).keys() & ours]
            (self.tree / ".config").write_text("".join(kept) + keys + wanted)
        else:
            (self.work / "wanted.config").write_text(wanted)
            all_config = f"KCONFIG_ALLCONFIG={self.work / 'wanted.config'}"
            self.make(all_config, "allnoconfig", code=CONFIG, what="make allnoconfig")
        self.make("olddefconfig", code=CONFIG, what="make olddefconfig")
        if gone := lost(mine, options((self.tree / ".config").read_text())):
            raise Refused(
                CONFIG, "options that were asked for did not survive Kconfig: " + ", ".join(gone)
            )

    def compile(self) -> None:
        count = len([v for v in options((self.tree / ".config").read_text()).values() if v == "y"])
        say(f"compiling {self.plan.variant}: {count} options, {self.jobs} jobs")
        if self.plan.deb:
            # What Build-Depends asks for, ensure() has seen to; -d keeps dpkg from asking again.
            self.make(
                "bindeb-pkg", "DPKG_FLAGS=-d", code=COMPILE, what="make bindeb-pkg", show=True
            )
        self.make("bzImage", code=COMPILE, what="make bzImage", show=True)
        headers = f"INSTALL_HDR_PATH={self.out / 'headers'}"
        self.make("headers_install", headers, code=COMPILE, what="make headers_install")

    def collect(self) -> None:
        for file, name in (
            ("arch/x86/boot/bzImage", "bzImage"),
            ("vmlinux", "vmlinux"),
            ("System.map", "System.map"),
            (".config", "config"),
        ):
            shutil.copyfile(self.tree / file, self.out / name)
        release = (self.tree / "include/config/kernel.release").read_text()
        (self.out / "release").write_text(release)
        for package in self.work.glob("*.deb"):
            shutil.move(package, self.out / package.name)


def make_kernel(plan: Plan, work: Path, out: Path) -> None:
    """Make the kernel of `plan` in `work` (scratch), leaving its results in `out`."""
    maker = Maker(plan, work, out)
    maker.unpack()
    maker.patch()
    maker.configure()
    maker.compile()
    maker.collect()
