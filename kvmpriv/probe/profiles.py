"""What a VMM's feature needs, as a file, and whether a probed host has it.

A profile is a text file ``NAME.profile`` of lines ``key = value``; empty lines and lines that begin
with ``#`` are ignored:

``summary``
    One sentence about the feature.
``source``
    From where the requirements are known: project | file, series or pull request | version | date
    (of the version, or when it was read).
``types``
    The VM types that can be used, of which one is enough: ``default``, ``snp``, …, or ``any``.
``require``
    A finding that must be PASS, and what it is for: finding | reason.  ``VM`` stands for the VM
    type, as in ``guest_memfd/VM/file``.
``wish``
    The same, for a part of the feature: without it the profile is usable all the same.

``source`` and ``require`` are given once or more, ``wish`` as often as wanted, the others once.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from ..exit_status import ExitStatus
from .records import COULD_NOT_PROBE, FAIL, PASS, SKIP, Group, Step

if TYPE_CHECKING:
    from .documents import NeedDocument, ProfileDocument
    from .records import Check, Report

__all__ = [
    "BUILT_IN",
    "COULD_NOT_PROBE",
    "FINDINGS",
    "NOT_USABLE",
    "USABLE",
    "VM_TYPES",
    "Judged",
    "Judgement",
    "Need",
    "Profile",
    "ProfileError",
    "find",
    "judge",
    "parse",
    "read_folder",
]

#: The folder of the profiles that come with kvmpriv.
BUILT_IN = f"{os.path.dirname(__file__)}/profiles"  # noqa: PTH120  # pathlib takes a millisecond
SUFFIX = ".profile"
USABLE, NOT_USABLE = "usable", "not usable"
EXIT_STATUS = {
    USABLE: ExitStatus.OK,
    NOT_USABLE: ExitStatus.NEGATIVE,
    COULD_NOT_PROBE: ExitStatus.UNABLE,
}
VM_TYPES = ("default", "sw_protected", "sev", "sev_es", "snp", "tdx")
_LARGEST = 65536  # bytes of a profile

_GUEST_MEMFD = (
    *(Step.FILE, Step.SLOT, Step.CONVERSION, Step.MMAP, Step.INIT_SHARED, Step.NO_DIRECT_MAP),
    *(Step.PUNCH_HOLE, Step.IN_PLACE, Step.USERFAULT, Step.HYPERCALL, Step.PRE_FAULT),
)
#: What a profile can require: the names of all checks, with VM for the VM type.
FINDINGS = frozenset(
    "/".join(filter(None, (group.value, vm, step.value)))
    for group, vm, steps in (
        (Group.KVM, "", (Step.DEVICE, Step.VM_TYPES, Step.ENCRYPTION)),
        (Group.VM, "VM", (Step.CREATE,)),
        (Group.V9, "", (Step.SYSCALL, Step.CAPABILITY, Step.FILE)),
        (Group.V9, "VM", (Step.SLOT, Step.CONVERSION)),
        (Group.V10, "VM", (Step.CAPABILITY, Step.ATTRIBUTES)),
        (Group.GUEST_MEMFD, "VM", _GUEST_MEMFD),
        (Group.TREE, "", (Step.CAPABILITIES, Step.INODE, Step.CREATE_FLAGS)),
    )
    for step in steps
)


class ProfileError(ValueError):
    """A profile can't be used; the message has the file, the line and the reason."""


class Need(NamedTuple):
    """A finding that a profile requires, or wishes for, and the reason."""

    finding: str
    why: str
    wish: bool = False


class Profile(NamedTuple):
    """What a VMM's feature needs.  `types` is empty for any VM type."""

    name: str
    summary: str
    sources: tuple[tuple[str, str, str, str], ...]
    types: tuple[str, ...]
    needs: tuple[Need, ...]


class Judged(NamedTuple):
    """A need on one host: the status that decided it, and the check; None if there is none."""

    need: Need
    finding: str
    status: str
    check: Check | None = None

    def to_json(self) -> NeedDocument:
        """The need in the document of ``--json``."""
        return {
            "finding": self.finding,
            "status": self.status,
            "wish": self.need.wish,
            "why": self.need.why,
        }


class Judgement(NamedTuple):
    """Whether a profile is usable on a host, and the needs of the VM types that decided it."""

    profile: Profile
    verdict: str
    vm_type: str
    needs: tuple[Judged, ...]

    @property
    def exit_status(self) -> ExitStatus:
        """It follows from the verdict alone."""
        return EXIT_STATUS[self.verdict]

    def to_json(self) -> ProfileDocument:
        """The profile in the document of ``--json``."""
        return {
            "name": self.profile.name,
            "summary": self.profile.summary,
            "sources": [" | ".join(source) for source in self.profile.sources],
            "verdict": self.verdict,
            "vm_type": self.vm_type,
            "needs": [need.to_json() for need in self.needs],
        }


# -- files -------------------------------------------------------------------------------------


def find(names: list[str], folder: str | None = None) -> list[Profile]:
    """The profiles with these names, of those that come with kvmpriv and those in `folder`.

    Each is read once, in the order of `names`.  ProfileError for a file that can't be used,
    KeyError for a name that no profile has.
    """
    added = {profile.name: profile for profile in read_folder(folder)} if folder else {}
    for name in added:
        if os.path.exists(f"{BUILT_IN}/{name}{SUFFIX}"):  # noqa: PTH110
            path = os.path.join(folder or "", name + SUFFIX)  # noqa: PTH118
            raise ProfileError(f"{path}:1: a profile {name!r} comes with kvmpriv: rename the file")
    found = []
    for name in dict.fromkeys(names):
        if name in added:
            found.append(added[name])
        elif name in available(BUILT_IN):
            found.append(_read(f"{BUILT_IN}/{name}{SUFFIX}"))
        else:
            raise KeyError(name)
    return found


def available(folder: str) -> list[str]:
    """The names of the profiles in a folder.  ProfileError if it can't be read."""
    try:
        entries = os.listdir(folder)
    except OSError as error:
        raise ProfileError(f"{folder}: {error.strerror}: give a folder of profiles") from None
    return sorted(entry[: -len(SUFFIX)] for entry in entries if entry.endswith(SUFFIX))


def read_folder(folder: str) -> list[Profile]:
    """All profiles of a folder, by name.  ProfileError for one that can't be used."""
    if not (names := available(folder)):
        raise ProfileError(f"{folder}: there is no file NAME{SUFFIX} in this folder")
    return [_read(f"{folder}/{name}{SUFFIX}") for name in names]


def _read(path: str) -> Profile:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ProfileError(f"{path}: not a regular file")
        data = os.read(fd, _LARGEST + 1)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}") from None
    finally:
        os.close(fd)
    return parse(data, path)


def parse(data: bytes, path: str) -> Profile:
    """The profile in `data`; its name is that of the file `path`.  ProfileError."""
    return _Parser(path).parse(data)


class _Parser:
    def __init__(self, path: str) -> None:
        self.path = path
        self.line = 0
        self.seen: dict[str, int] = {}
        self.summary = ""
        self.types: tuple[str, ...] | None = None
        self.sources: list[tuple[str, str, str, str]] = []
        self.needs: dict[str, Need] = {}

    def wrong(self, what: str) -> ProfileError:
        return ProfileError(f"{self.path}:{self.line}: {what}")

    def parse(self, data: bytes) -> Profile:
        name = self.path.rpartition("/")[2].removesuffix(SUFFIX)
        self.line = 1
        if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_."):
            raise self.wrong(f"the name {name!r} must be of a-z, 0-9, '-', '_' and '.'")
        if len(data) > _LARGEST:
            raise self.wrong(f"a profile may have {_LARGEST} bytes, this one has more")
        lines = data.split(b"\n")
        for self.line, raw in enumerate(lines, 1):
            try:
                text = raw.decode().strip()
            except UnicodeDecodeError as error:
                raise self.wrong(f"byte {error.start + 1} is not UTF-8") from None
            if not text or text.startswith("#"):
                continue
            if not text.isprintable():
                raise self.wrong(f"a control character in {text!r}")
            self.entry(text)
        missing = [key for key in ("summary", "source", "types", "require") if key not in self.seen]
        if missing:
            raise self.wrong(f"the file ends without {missing[0]!r}")
        return Profile(
            name, self.summary, tuple(self.sources), self.types or (), tuple(self.needs.values())
        )

    def entry(self, text: str) -> None:
        key, equals, value = (part.strip() for part in text.partition("="))
        readers = {
            "summary": self.set_summary,
            "source": self.add_source,
            "types": self.set_types,
            "require": self.add_need,
            "wish": self.add_wish,
        }
        if not equals:
            raise self.wrong(f"write KEY = VALUE, not {text!r}")
        if key not in readers:
            raise self.wrong(f"unknown key {key!r}: the keys are {', '.join(readers)}")
        if not value:
            raise self.wrong(f"{key!r} has no value")
        if key in ("summary", "types") and key in self.seen:
            raise self.wrong(f"{key!r} is given again; it is in line {self.seen[key]}")
        self.seen.setdefault(key, self.line)
        readers[key](value)

    def set_summary(self, value: str) -> None:
        self.summary = value

    def set_types(self, value: str) -> None:
        types = tuple(part.strip() for part in value.split(","))
        for one in types:
            if one not in VM_TYPES and value != "any":
                raise self.wrong(f"unknown VM type {one!r}: any, or of {', '.join(VM_TYPES)}")
        self.types = () if value == "any" else types

    def add_source(self, value: str) -> None:
        parts = tuple(part.strip() for part in value.split("|"))
        if len(parts) != 4 or not all(parts):
            raise self.wrong(f"a source is PROJECT | FILE | VERSION | DATE, not {value!r}")
        project, file, version, date = parts
        if [len(part) * part.isdecimal() for part in date.split("-")] != [4, 2, 2]:
            raise self.wrong(f"the date {date!r} must be YYYY-MM-DD")
        self.sources.append((project, file, version, date))

    def add_wish(self, value: str) -> None:
        self.add_need(value, wish=True)

    def add_need(self, value: str, *, wish: bool = False) -> None:
        finding, bar, why = (part.strip() for part in value.partition("|"))
        if not bar or not why:
            raise self.wrong(f"write FINDING | REASON, not {value!r}")
        if finding not in FINDINGS:
            near = _near(finding)
            raise self.wrong(f"no check of the probe has the name {finding!r}{near}")
        if finding in self.needs:
            raise self.wrong(f"{finding!r} is given again")
        self.needs[finding] = Need(finding, why, wish)


def _near(finding: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(finding, sorted(FINDINGS), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


# -- hosts -------------------------------------------------------------------------------------


def judge(profile: Profile, report: Report) -> Judgement:
    """Whether the host that `report` describes has what `profile` needs."""
    checks = {check.name: check for check in report.checks}
    types = profile.types or tuple(
        check.vm_type for check in report.checks if check.group is Group.VM and check.status == PASS
    )
    if not any(check.group is Group.VM and check.status == PASS for check in report.checks):
        return Judgement(profile, COULD_NOT_PROBE, "", ())
    tried = [(vm_type, _judge_type(profile, vm_type, checks, report)) for vm_type in types]
    for wanted in (USABLE, COULD_NOT_PROBE):
        for vm_type, needs in tried:
            if _verdict(needs) == wanted:
                return Judgement(profile, wanted, vm_type, needs)
    decided = {one.finding: one for _, judged in tried for one in judged if one.check}
    return Judgement(profile, NOT_USABLE, "", tuple(decided.values()))


def _judge_type(
    profile: Profile, vm_type: str, checks: dict[str, Check], report: Report
) -> tuple[Judged, ...]:
    made = Need("vm/VM", f"the guest is a VM of type {vm_type}")
    judged = [_judge_need(made, vm_type, checks, report)]
    if judged[0].status == PASS:
        judged = [_judge_need(need, vm_type, checks, report) for need in profile.needs]
    return tuple(judged)


def _judge_need(need: Need, vm_type: str, checks: dict[str, Check], report: Report) -> Judged:
    finding = need.finding.replace("VM", vm_type)
    check = checks.get(finding)
    if check is None:
        return Judged(need, finding, FAIL if report.complete else SKIP)
    if check.shortage:
        return Judged(need, finding, SKIP, check)
    return Judged(need, finding, PASS if check.status == PASS else FAIL, check)


def _verdict(needs: tuple[Judged, ...]) -> str:
    """PASS: met.  FAIL: KVM does not do it, or it was not even tried.  SKIP: not known."""
    statuses = {judged.status for judged in needs if not judged.need.wish}
    if FAIL in statuses:
        return NOT_USABLE
    return COULD_NOT_PROBE if SKIP in statuses else USABLE
