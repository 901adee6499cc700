"""Where Debian's kernel sources come from: the cache, or a mirror by apt.

apt is run with a configuration of its own, whose lists, cache and status are in the cache: nothing
of the system is changed, and no rights are needed.  The mirror, the proxy and the keys are those of
the system.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from .errors import Refused, Status, say
from .kernels import Kernel
from .locks import locked
from .packages import because
from .paths import cache_root

#: Where Debian's packages install sources.
INSTALLED = Path("/usr/src")
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: Seconds before a newer source is looked for again.
DAY = 24 * 3600
INSTEAD = "Or give a source of your own: scripts/kernel/build NAME --source TREE"
CONFIG = """\
Dir::State::Lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
APT::Sandbox::User "root";
APT::Get::List-Cleanup "true";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
OWN_LIST = """\
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "/dev/null";
"""


class Chosen(NamedTuple):
    """A source package, and when it was last compared with what the mirror has."""

    package: str
    version: str
    asked: float

    @property
    def tarball(self) -> Path:
        """The source in the cache."""
        return _folder() / f"{self.package}_{self.version}" / f"{self.package}.tar.xz"


def _folder() -> Path:
    return cache_root() / "sources"


def _record(kernel: Kernel) -> Path:
    words = filter(None, (kernel.suite, kernel.version))
    return _folder() / f"{'-'.join(words)}.json"


def chosen(kernel: Kernel) -> Chosen | None:
    """The source of `kernel` that is in the cache."""
    try:
        found = Chosen(**json.loads(_record(kernel).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.tarball.is_file() else None


def _choose(kernel: Kernel, source: Chosen) -> None:
    part = _record(kernel).with_suffix(".part")
    part.write_text(json.dumps(source._asdict()) + "\n")
    part.replace(_record(kernel))


def find(kernel: Kernel, look: bool = False) -> Path:
    """The tarball of the kernel's source; it is fetched if there is none.

    With `look` a newer source is looked for, if the kernel is built from the newest one, and if
    that was not done today.
    """
    installed = INSTALLED / f"linux-source-{kernel.version}.tar.xz"
    if kernel.version and installed.is_file():
        return installed
    _folder().mkdir(parents=True, exist_ok=True)
    with locked(_folder() / "lock", "fetches a source"):
        have = chosen(kernel)
        if have and not (look and not kernel.version and time.time() - have.asked > DAY):
            return have.tarball
        try:
            newest = Apt(kernel).newest()
            if not have or newest[:2] != have[:2]:
                Apt(kernel).fetch(newest)
        except Refused as refused:
            if not have or refused.code == Status.SPACE:
                raise
            say(f"{refused}\nThe source in the cache is used: {have.package} {have.version}")
            return have.tarball
        _choose(kernel, newest)
        if have and newest[:2] != have[:2]:
            say(
                f"{kernel.suite} has {newest.package} {newest.version} now, instead of "
                f"{have.package} {have.version}: {kernel.name} is built from it"
            )
            _remove_unused(have)
        return newest.tarball


def _remove_unused(source: Chosen) -> None:
    """Remove a source from the cache, unless another kernel is built from it."""
    for record in _folder().glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            if Chosen(**json.loads(record.read_text())).tarball == source.tarball:
                return
    shutil.rmtree(source.tarball.parent, ignore_errors=True)


class Apt:
    """apt-get and apt-cache, for the sources of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.what = f"linux-source-{kernel.version}" if kernel.version else "a linux-source-N"
        if not shutil.which("apt-get"):
            raise Refused(
                Status.NO_SOURCE,
                f"{self.what} comes from Debian, and this machine has no apt-get. {INSTEAD}",
            )
        self.folder = _folder() / "apt" / (kernel.suite or "system")
        (self.folder / "lists/partial").mkdir(parents=True, exist_ok=True)
        (self.folder / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        text = CONFIG.format(folder=self.folder)
        if kernel.suite:
            text += OWN_LIST.format(folder=self.folder)
            line = f"deb [signed-by={KEYS}] {mirror()} {kernel.suite} main\n"
            (self.folder / "sources.list").write_text(line)
        (self.folder / "apt.conf").write_text(text)

    def run(self, tool: str, *arguments: str, cwd: Path | None = None) -> tuple[int, str]:
        """Run one of apt's programs; its exit status and output."""
        done = subprocess.run(
            [tool, "-q", "-c", str(self.folder / "apt.conf"), *arguments],
            check=False,
            cwd=cwd,
            env=os.environ | {"LC_ALL": "C"},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout

    def newest(self) -> Chosen:
        """The newest source that the mirror has; Refused says why there is none."""
        kernel = self.kernel
        status, said = self.run("apt-get", "update")
        names = self.run("apt-cache", "pkgnames", "linux-source-")[1].split()
        releases = [name for name in names if re.fullmatch(r"linux-source-\d+\.\d+", name)]
        if kernel.version:
            releases = [name for name in releases if name == self.what]
        # An update that failed leaves the lists of the last one.
        if not releases or (kernel.suite and (status or "Err:" in said)):
            where = f"{mirror()} {kernel.suite}" if kernel.suite else "apt's sources"
            if " does not have a Release file" in said or "404" in said:
                cause = f"{where}: there is no such suite"
            elif status or "Err:" in said:
                cause = because(said)
            else:
                cause = f"{where} has no such package"
            raise Refused(
                Status.SPACE if "no space" in cause else Status.NO_SOURCE,
                f"could not look for {self.what}: {cause}.\n{_notes(said)}{INSTEAD}",
            )
        package = max(releases, key=release_of)
        shown = self.run("apt-cache", "show", "--no-all-versions", package)[1]
        match = re.search(r"^Version: (\S+)$", shown, re.MULTILINE)
        assert match, shown
        return Chosen(package, match[1], time.time())

    def fetch(self, source: Chosen) -> None:
        """Download a source and unpack it into the cache."""
        say(f"fetching {source.package} {source.version}")
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=_folder()) as name:
            part = Path(name)
            what = f"{source.package}={source.version}"
            status, said = self.run("apt-get", "download", what, cwd=part)
            packages = list(part.glob("*.deb"))
            if status or not packages:
                cause = because(said)
                raise Refused(
                    Status.SPACE if "no space" in cause else Status.NO_SOURCE,
                    f"could not fetch {what}: {cause}. Call again when that is solved.\n"
                    f"{_notes(said)}{INSTEAD}",
                )
            command = ["dpkg", "-x", str(packages[0]), str(part / "out")]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            tarball = part / "out/usr/src" / source.tarball.name
            if done.returncode or not tarball.is_file():
                cause = because(done.stderr) if done.returncode else f"it has no {tarball.name}"
                raise Refused(
                    Status.SPACE if "no space" in cause else Status.NO_SOURCE,
                    f"could not unpack {packages[0].name}: {cause}.\n{done.stderr}{INSTEAD}",
                )
            shutil.rmtree(source.tarball.parent, ignore_errors=True)
            source.tarball.parent.mkdir()
            tarball.rename(source.tarball)


def release_of(package: str) -> tuple[int, ...]:
    """The release in the name of a source package, for comparisons."""
    return tuple(map(int, package.removeprefix("linux-source-").split(".")))


def mirror() -> str:
    """The address of Debian's archive in the system's own sources of packages."""
    target = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)"
    done = subprocess.run(
        ["apt-get", "indextargets", "--format", target], check=False, capture_output=True, text=True
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    codename = codename_of_system()
    for uri, suite, component in (row for row in rows if len(row) == 3):
        if component == "main" and suite in (codename, "stable", "testing", "unstable", "sid"):
            return uri.rstrip("/")
    raise Refused(
        Status.NO_SOURCE,
        f"apt's sources name no mirror of Debian {codename}: there is nowhere to look for "
        f"kernel sources. {INSTEAD}",
    )


def codename_of_system() -> str:
    """Debian's codename of this system; "" elsewhere."""
    try:
        text = Path("/etc/os-release").read_text()
    except OSError:
        return ""
    words = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    name = words.get("VERSION_CODENAME", "").strip('"')
    return name if words.get("ID", "").strip('"') == "debian" else ""


def _notes(said: str) -> str:
    """apt's own messages, a few of them."""
    lines = [line for line in said.splitlines() if line.startswith(("E:", "Err:", "W:"))]
    return "".join(f"  {line}\n" for line in lines[:4])
