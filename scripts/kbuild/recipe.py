"""How a kernel is made from a source, patches and a config.

A build is described by data: the commands with their environment, the options of the config, the
patches, the source, the compiler and the linker.  `Plan.key` is a digest of exactly these, so that
a kernel is built again when one of them changes, and only then: moving or renaming a file, or
changing a message in this module, changes no key.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import trees
from .errors import Refused, Status, say
from .kernels import KERNELS, TRIED, Kernel
from .locks import locked
from .paths import DATA, cache_root
from .process import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# -- what decides the outcome, apart from Plan's fields --------------------------------------------
# Words in braces are filled in by Maker.fill; they stand for paths and for the number of jobs.

MAKE = ("make", "-j{jobs}", "CC={compiler}")
UNPACK = ("tar", "-xf", "{source}", "--strip-components=1")
# Objects of an earlier build in the source would be taken for ours.
COPY = ("rsync", "-a", *(f"--exclude={x}" for x in (".git", "*.o", "*.a", "*.cmd", "/.config")),
        "{source}/", ".")  # fmt: skip
CLEAN = (*MAKE, "mrproper")
# No fuzz: a hunk whose context has changed needs a person's decision.
PATCH = ("patch", "-p1", "-N", "-F0", "--no-backup-if-mismatch", "-i", "{patch}")
ALL_CONFIG = (*MAKE, "KCONFIG_ALLCONFIG={work}/wanted.config", "allnoconfig")
OLD_CONFIG = (*MAKE, "olddefconfig")
# ensure() has installed what Build-Depends asks for; -d keeps dpkg from asking again.
PACKAGES = (*MAKE, "bindeb-pkg", "DPKG_FLAGS=-d")
IMAGE = (*MAKE, "bzImage")
HEADERS = (*MAKE, "headers_install", "INSTALL_HDR_PATH={out}/headers")
#: Files of the built tree that are kept, and their names in the cache.
RESULTS = {
    "arch/x86/boot/bzImage": "bzImage",
    "vmlinux": "vmlinux",
    "System.map": "System.map",
    ".config": "config",
}
ENVIRONMENT = {
    "LC_ALL": "C",
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan 1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "kvmpriv",
    "KBUILD_BUILD_HOST": "kvmpriv",
}
#: Variables that begin like this are removed: an outer make's, a kernel developer's.
FOREIGN = ("KBUILD", "KCONFIG", "MAKE", "LOCALVERSION", "ARCH", "CROSS_COMPILE", "LLVM")
# A distribution's config names signing keys that only the distribution has.
NO_KEYS = 'CONFIG_SYSTEM_TRUSTED_KEYS=""\nCONFIG_SYSTEM_REVOCATION_KEYS=""\n'

# --------------------------------------------------------------------------------------------------

#: Options of KVM whose default does not matter: this one decides about the compiler's warnings.
NO_DEFAULT = ("CONFIG_KVM_WERROR",)
#: Room for a build with modules, and for a plain one, in GiB (measured, rounded up).
MODULES_GIB, PLAIN_GIB = 20.0, 3.5


@dataclass(frozen=True)
class Plan:
    """One kernel to be made; `source` and `config` replace Debian's source and our config."""

    name: str
    debug: bool = False
    literal: bool = False
    source: Path | None = None
    config: Path | None = None
    deb: bool = False
    data: Path = DATA
    #: Debian's source, where the build has found it.
    tarball: Path | None = None

    @property
    def kernel(self) -> Kernel:
        """The entry of the list of kernels."""
        return KERNELS[self.name]

    @property
    def variant(self) -> str:
        """Name and options in one word: the cache's and the kernel release's."""
        words = [self.name, "debug" * self.debug, "literal" * self.literal]
        words += ["config" * (self.config is not None), "deb" * self.deb]
        return "-".join(word for word in words if word)

    @property
    def origin(self) -> Path:
        """The source: a tree or a tarball."""
        origin = self.source or self.tarball
        assert origin, "Debian's source was not looked for"
        return origin

    def patches(self) -> list[Path]:
        """The ABI as it was posted, then, unless literal, the fixes, in order."""
        folders = [self.kernel.posted, "" if self.literal else self.kernel.fixes]
        return [
            patch
            for folder in folders
            if folder
            for patch in sorted((self.data / folder).glob("*.patch"))
        ]

    def wanted(self) -> str:
        """The options that the kernel must have."""
        configs = self.data / "configs"
        names = [] if self.config else ["base"]
        names += [self.kernel.abi] + ["newest"] * bool(self.kernel.suite) + ["debug"] * self.debug
        text = "".join((configs / f"{name}.config").read_text() for name in names)
        return f'{text}CONFIG_LOCALVERSION="-{self.variant}"\n'

    def config_text(self) -> str:
        """The config before Kconfig completes it."""
        wanted = self.wanted()
        if not self.config:
            return wanted
        ours = options(wanted).keys() | options(NO_KEYS).keys()
        theirs = self.config.read_text().splitlines(keepends=True)
        kept = [line for line in theirs if not options(line).keys() & ours]
        return "".join(kept) + NO_KEYS + wanted

    def compiler(self) -> list[str]:
        """$CC, or gcc."""
        return [os.environ.get("CC", "gcc")]

    @property
    def is_kept(self) -> bool:
        """Whether a copy of the source is kept, with its objects, for the next build of it."""
        unchanged = not (self.kernel.posted or self.deb)
        return self.source is not None and unchanged and trees.is_git(self.source)

    def unpacking(self) -> list[tuple[str, ...]]:
        """The commands that put the source into the working folder."""
        if self.is_kept:
            return []
        return [COPY, CLEAN] if self.origin.is_dir() else [UNPACK]

    def configuring(self) -> list[tuple[str, ...]]:
        """The commands that complete the config."""
        return [OLD_CONFIG] if self.config else [ALL_CONFIG, OLD_CONFIG]

    def compiling(self) -> list[tuple[str, ...]]:
        """The commands that compile and install into the output folder."""
        return [*([PACKAGES] if self.deb else []), IMAGE, HEADERS]

    def key(self) -> str:
        """A digest of all that decides the outcome.  It is cheap: every call computes it."""
        commands = [*self.unpacking(), PATCH, *self.configuring(), *self.compiling()]
        rules = [commands, ENVIRONMENT, FOREIGN, RESULTS]
        digest = hashlib.sha256()
        for part in (
            self.variant.encode(),
            json.dumps(rules).encode(),
            json.dumps(options(self.config_text()), sort_keys=True).encode(),
            fingerprint(self.origin),
            first_line([*self.compiler(), "--version"]),
            first_line(["ld", "--version"]),
            *(patch.read_bytes() for patch in self.patches()),
        ):
            digest.update(b"%d\0" % len(part) + part)
        return digest.hexdigest()[:20]


def first_line(command: list[str]) -> bytes:
    """The first line that a command prints."""
    return subprocess.run(command, capture_output=True, check=True).stdout.split(b"\n")[0]


def fingerprint(source: Path) -> bytes:
    """A digest that tells sources apart, without reading the files.

    It is made of names, sizes and times, or of what git knows of a tree without changes.
    """
    if (state := trees.state(source)) is not None:
        return state
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
    """The options of a config; the value of one that is not set is `n`."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"# (CONFIG_\w+) is not set|(CONFIG_\w+)=(.*)", line):
            found[match[1] or match[2]] = "n" if match[1] else match[3].partition(" # ")[0]
    return found


def unmet(
    wanted: str, made: Mapping[str, str], exists: Callable[[str], bool] = lambda option: True
) -> list[str]:
    """The options that were asked for and that Kconfig dropped or changed without a message.

    A mark behind an option is about other releases: with `# if it exists` nothing is said of an
    option that the source does not have, with `# or CONFIG_X=y` that other option is as good.
    """
    asked, gone = options(wanted), []
    marks = dict(re.findall(r"^(CONFIG_\w+)=.* # (if it exists|or CONFIG_\w+=.*)$", wanted, re.M))
    for name, value in sorted(asked.items()):
        now, mark = made.get(name, "n"), marks.get(name, "")
        other, _, as_good = mark.removeprefix("or ").partition("=")
        if now == value or (as_good and made.get(other, "n") == as_good):
            continue
        if now != "n" or exists(name):
            gone.append(f"{name}={value} (now {now})")
        elif mark != "if it exists":
            gone.append(f"{name}={value} (the source has no such option)")
    return gone


class Maker:
    """Runs the steps of a build in `tree`; their output goes to a log, progress to stderr."""

    def __init__(self, plan: Plan, work: Path, out: Path) -> None:
        self.plan, self.work, self.out = plan, work, out
        self.tree = work / "linux"
        self.log = out / "build.log"
        self.known: set[str] | None = None
        self.jobs = os.environ.get("KVMPRIV_JOBS") or str(len(os.sched_getaffinity(0)))

    def fill(self, command: tuple[str, ...], **more: str) -> list[str]:
        """A command with the words in braces filled in."""
        words = {
            "source": str(self.plan.origin),
            "work": str(self.work),
            "out": str(self.out),
            "jobs": self.jobs,
            "compiler": " ".join(self.plan.compiler()),
        }
        return [word.format(**words, **more) for word in command]

    def run(self, command: list[str], code: int, what: str, show: bool = False) -> str:
        """Run one step and return its output; Refused when it fails, with the log's errors."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        lines: list[str] = []
        started = shown = time.monotonic()
        with (
            self.log.open("a") as log,
            subprocess.Popen(
                command,
                cwd=self.tree,
                env=kept | ENVIRONMENT,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (we have no threads)
            ) as child,
            contextlib.ExitStack() as guard,
        ):
            guard.callback(child.terminate)  # does nothing once it has ended; make stops its jobs
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

    def make(self, *targets: str, code: int, what: str) -> str:
        """Run make in the tree."""
        return self.run([*self.fill(MAKE), *targets], code, what)

    def unpack(self) -> None:
        """Put the source into the tree."""
        source = self.plan.origin
        say(f"unpacking {source}")
        self.tree.mkdir()
        for command in self.plan.unpacking():
            self.run(self.fill(command), Status.NO_SOURCE, f"unpacking {source}")
        self.check_tree()

    def check_tree(self) -> None:
        """Refused if the source is not of Linux."""
        source = self.plan.origin
        if not (self.tree / "Kbuild").exists():
            raise Refused(
                Status.NO_SOURCE, f"{source} is not a Linux source tree (it has no Kbuild)"
            )

    def patch(self) -> None:
        """Apply the patches."""
        patches = self.plan.patches()
        if self.plan.kernel.posted and not patches:
            raise Refused(
                Status.PATCH, f"there are no patches in {self.plan.data / self.plan.kernel.posted}"
            )
        for patch in patches:
            label = f"{patch.parent.name}/{patch.name}"
            try:
                self.run(self.fill(PATCH, patch=str(patch)), Status.PATCH, label)
            except Refused:
                raise Refused(Status.PATCH, self.explain(label)) from None
        if patches:
            say(f"applied {len(patches)} patches")

    def explain(self, label: str) -> str:
        """Name the hunks that failed, from the output of patch and the rejects that it left."""
        file, hunks = "", []
        # Only the end of the log is this patch's: a failure of an earlier one ended the build.
        for line in self.log.read_text(errors="replace").splitlines():
            if match := re.match(r"patching file (\S+)", line):
                file = match[1]
            elif match := re.match(r"Hunk #(\d+) FAILED at (\d+)", line):
                hunks.append(f"hunk #{match[1]} of {file} (line {match[2]})")
            elif match := re.match(r"can't find file to patch at input line (\d+)", line):
                hunks.append(f"the file that it names in its line {match[1]} does not exist")
            elif "Reversed (or previously applied)" in line:
                hunks.append(f"{file} seems to contain the change already")
        rejects = "".join(r.read_text(errors="replace") for r in sorted(self.tree.rglob("*.rej")))
        text = f"the patch {label} does not apply to {self.plan.origin}: "
        text += f"{'; '.join(hunks) or 'no hunk'}."
        return text + ("\n" + "\n".join(rejects.splitlines()[:24]) if rejects else "")

    def configure(self) -> None:
        """Write the config and have Kconfig complete it; Refused when it drops an option."""
        plan = self.plan
        asked = self.tree / ".config" if plan.config else self.work / "wanted.config"
        asked.write_text(
            re.sub(r" # (?:if it exists|or CONFIG_.*)$", "", plan.config_text(), flags=re.M)
        )
        for command in plan.configuring():
            self.run(self.fill(command), Status.CONFIG, f"make {command[-1]}")
        wanted, made = plan.wanted(), options((self.tree / ".config").read_text())
        problems = []
        if gone := unmet(wanted, made, self.exists):
            problems.append("options that were asked for did not survive Kconfig: ")
            problems[-1] += ", ".join(gone)
        if not plan.config and (left := self.left_out(made)):
            text = f"options of KVM that are on by default, and that the config leaves out: {left}"
            # A caller's own series may add such an option; ours names what it wants.
            if plan.source:
                say(text)
            else:
                problems.append(text)
        tried = TRIED[plan.kernel.abi]
        if (release := self.release()) not in ("", *tried):
            text = (
                f"this source is Linux {release}, and scripts/kernel/configs was tried with "
                f"{' and '.join(tried)}"
            )
            if problems:
                text += (
                    ": set the options there, and mark those of some releases with '# if it exists'"
                )
                problems.append(text)
            else:
                say(text)
        if problems:
            raise Refused(Status.CONFIG, ".\n".join(problems))

    def exists(self, option: str) -> bool:
        """Whether the source has an option of this name."""
        if self.known is None:
            definition = re.compile(r"^\s*(?:menu)?config\s+(\w+)", re.MULTILINE)
            self.known = set()
            for folder, folders, files in os.walk(self.tree):
                folders[:] = [name for name in folders if name not in (".git", "Documentation")]
                for name in files:
                    if name.startswith("Kconfig"):
                        text = Path(folder, name).read_text(errors="replace")
                        self.known.update(definition.findall(text))
        return option.removeprefix("CONFIG_") in self.known

    def left_out(self, made: Mapping[str, str]) -> str:
        """Options of KVM that a config made from nothing turned off, and Kconfig's defaults on."""
        lines = (self.tree / ".config").read_text().splitlines()
        wanted = options(self.plan.wanted())
        drop = {
            f"# {name} is not set"
            for name in made
            if name.startswith("CONFIG_KVM_") and name not in (*wanted, *NO_DEFAULT)
        }
        other = self.work / "defaults.config"
        other.write_text("".join(f"{line}\n" for line in lines if line not in drop))
        command = [*self.fill(OLD_CONFIG), f"KCONFIG_CONFIG={other}"]
        self.run(command, Status.CONFIG, "make olddefconfig")
        by_default = options(other.read_text())
        return ", ".join(
            f"{name}={value}"
            for name, value in sorted(by_default.items())
            if name.startswith("CONFIG_KVM_") and value != "n" and made.get(name, "n") == "n"
        )

    def release(self) -> str:
        """The release of the source, such as "6.12"; "" if its Makefile does not name it."""
        text = (self.tree / "Makefile").read_text(errors="replace")
        found = dict(re.findall(r"^(VERSION|PATCHLEVEL) = (\d+)$", text, re.MULTILINE))
        return f"{found['VERSION']}.{found['PATCHLEVEL']}" if len(found) == 2 else ""

    def compile(self) -> None:
        """Compile the kernel and install its headers."""
        count = list(options((self.tree / ".config").read_text()).values()).count("y")
        say(f"compiling {self.plan.variant}: {count} options, {self.jobs} jobs")
        for command in self.plan.compiling():
            target = command[len(MAKE)]
            self.run(self.fill(command), Status.COMPILE, f"make {target}", show=True)

    def collect(self) -> None:
        """Copy the results into the output folder."""
        for file, name in RESULTS.items():
            shutil.copyfile(self.tree / file, self.out / name)
        release = (self.tree / "include/config/kernel.release").read_text()
        (self.out / "release").write_text(release)
        for package in self.work.glob("*.deb"):
            shutil.move(package, self.out / package.name)

    def make_kernel(self) -> None:
        """All steps of a build."""
        self.unpack()
        self.patch()
        self.configure()
        self.compile()
        self.collect()


class KeptMaker(Maker):
    """Compiles a copy of a developer's tree, which is kept with its objects."""

    def unpack(self) -> None:
        """Copy what has changed since the last build."""
        assert self.plan.source
        trees.synchronize(self.plan.source, self.tree, self.work / "copied")
        self.check_tree()
        # The number of the build, which is part of the version: it would count on.
        (self.tree / ".version").unlink(missing_ok=True)


def make_kernel(plan: Plan, work: Path, out: Path) -> None:
    """Make the kernel of `plan` in `work` (scratch), leaving its results in `out`."""
    if not plan.is_kept:
        Maker(plan, work, out).make_kernel()
        return
    assert plan.source
    kept = trees.place(cache_root(), plan.source, plan.variant)
    with locked(kept.with_suffix(".lock"), "builds this tree"):
        KeptMaker(plan, kept, out).make_kernel()
