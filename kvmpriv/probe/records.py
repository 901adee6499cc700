"""The findings of a probe, and the verdict that follows from them.  Nothing here asks the host."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, cast

from ..exit_status import ExitStatus

if TYPE_CHECKING:
    from .documents import CheckDocument, Holders, HostFacts, ReportDocument
    from .profiles import Judgement

__all__ = [
    "FAIL",
    "PASS",
    "SCHEMA_VERSION",
    "SKIP",
    "VERDICTS",
    "Asked",
    "Check",
    "Group",
    "Report",
    "Step",
]

SCHEMA_VERSION = 2

#: Asked or tried, and the answer was yes.
PASS = "PASS"  # noqa: S105  # no password
#: Asked or tried, and the answer was no.
FAIL = "FAIL"
#: Not tried, or undecided; the result gives the reason.
SKIP = "SKIP"

VERDICTS = (
    V9_USABLE := "v9 usable",
    V9_REFUSED := "v9 advertised but refused",
    V10_RECOGNISED := "v10 recognised",
    GUEST_MEMFD_PRIVATE := "guest_memfd private",
    GUEST_MEMFD_IN_PLACE := "guest_memfd in place",
    GUEST_MEMFD_SHARED := "guest_memfd shared only",
    NONE := "none",
    COULD_NOT_PROBE := "could not probe",
)

#: What each verdict means, in one sentence; COULD_NOT_PROBE gives the reason instead.
_MEANINGS = {
    V9_USABLE: "A guest's memory can be private: this kernel has v9 of memfd_restricted, and KVM "
    "bound a private slot and converted a page.",
    V9_REFUSED: "This kernel has v9 of memfd_restricted, but KVM gives no VM a private slot that "
    "works.",
    V10_RECOGNISED: "This kernel has v10 of memfd_restricted, which kvmpriv recognises and does "
    "not use.",
    GUEST_MEMFD_PRIVATE: "A guest's memory can be private: KVM bound a guest_memfd to a VM and "
    "converted a page.",
    GUEST_MEMFD_IN_PLACE: "A guest's memory can be private: KVM bound a guest_memfd to a VM and "
    "converted a page of the file in place.",
    GUEST_MEMFD_SHARED: "KVM can hold guest memory in a guest_memfd, but no VM type that it offers "
    "has private memory: the host can read all of it.",
    NONE: "KVM makes VMs, but it binds neither v9's files nor a guest_memfd to any of them.",
}
_EXIT_STATUS = {
    V9_USABLE: ExitStatus.OK,
    GUEST_MEMFD_PRIVATE: ExitStatus.OK,
    GUEST_MEMFD_IN_PLACE: ExitStatus.OK,
    COULD_NOT_PROBE: ExitStatus.UNABLE,
}  # all others: ExitStatus.NEGATIVE


class Asked(NamedTuple):
    """A capability and what KVM_CHECK_EXTENSION returned for it.

    If a VM was asked, `device` is what the device returned for the same capability, else None.
    """

    capability: str
    value: int
    device: int | None = None


class Group(Enum):
    """What a check is about; a report has the groups in this order."""

    KVM = "kvm"
    VM = "vm"
    V9 = "v9"
    V10 = "v10"
    GUEST_MEMFD = "guest_memfd"
    TREE = "tree"


class Step(Enum):
    """What a check asks or tries."""

    DEVICE = "device"
    IOCTL = "ioctl"
    VM_TYPES = "vm_types"
    ENCRYPTION = "encryption"
    #: KVM_CREATE_VM, which is all that the group VM tries.
    CREATE = ""
    SYSCALL = "syscall"
    CAPABILITY = "capability"
    ATTRIBUTES = "attributes"
    FILE = "file"
    SLOT = "slot"
    CONVERSION = "conversion"
    MMAP = "mmap"
    INIT_SHARED = "init_shared"
    NO_DIRECT_MAP = "no_direct_map"
    PUNCH_HOLE = "punch_hole"
    IN_PLACE = "in_place"
    USERFAULT = "userfault"
    HYPERCALL = "hypercall"
    PRE_FAULT = "pre_fault"
    INODE = "inode"
    CREATE_FLAGS = "create_flags"
    CAPABILITIES = "capabilities"


class Check(NamedTuple):
    """One finding.

    `vm_type` is the type of the VM that was asked, empty if it was the device or the kernel.
    `asked` are the capabilities that were asked for; `tried` is what was done, `result` what came
    back, `hint` what may repair it.  `shortage` is what this process or the host ran out of
    (``EMFILE``, ``ENFILE``, ``ENOMEM``, ``EAGAIN``, ``RLIMIT_CPU``): the check is undecided.  Else
    it is empty.
    """

    group: Group
    step: Step
    status: str
    vm_type: str = ""
    asked: tuple[Asked, ...] = ()
    tried: str = ""
    result: str = ""
    hint: str = ""
    shortage: str = ""

    @property
    def name(self) -> str:
        """The group, the VM type and the step as a path, without those that are empty."""
        return "/".join(filter(None, (self.group.value, self.vm_type, self.step.value)))

    def to_json(self) -> CheckDocument:
        """The check in the document of ``--json``."""
        return {
            "name": self.name,
            "status": self.status,
            "asked": [
                {"capability": one.capability, "value": one.value, "device": one.device}
                for one in self.asked
            ],
            "tried": self.tried,
            "result": self.result,
            "hint": self.hint,
            "shortage": self.shortage,
        }

    @classmethod
    def from_json(cls, document: object) -> Check:
        """The check that `to_json` made a document from.

        ValueError for an unknown name, and for a field that is missing or of the wrong type.
        """
        match document:
            case {
                "name": str(name),
                "status": str(status),
                "asked": [*asked],
                "tried": str(tried),
                "result": str(result),
                "hint": str(hint),
                "shortage": str(shortage),
            }:
                first, *between, last = name.split("/")
                if (group := Group(first)) is Group.VM:
                    between, last = [last], ""
                answers = tuple(map(_read_asked, asked))
                vm_type = "/".join(between)
                return cls(
                    group, Step(last), status, vm_type, answers, tried, result, hint, shortage
                )
        raise ValueError(f"not a check of `kvmpriv probe --json`: {document!r:.200}")


def _read_asked(document: object) -> Asked:
    match document:
        case {"capability": str(capability), "value": int(value), "device": None | int() as device}:
            return Asked(capability, value, device)
    raise ValueError(f"not a capability and its value: {document!r:.200}")


class Report(NamedTuple):
    """A whole probe: the checks in the order of the tree, and facts about the host.

    `holders` are the processes that have the device open, None if they were not looked for.
    `profiles` are the profiles that were asked for, None if none were.  They follow from the
    checks, and `from_json` does not read them.
    """

    checks: tuple[Check, ...]
    host: HostFacts
    holders: Holders | None = None
    profiles: tuple[Judgement, ...] | None = None

    @property
    def verdict(self) -> str:
        """One of VERDICTS; private memory that works comes before what is only there.

        Private memory that was seen to work is usable, whatever ran out elsewhere.  All other
        verdicts need a probe that was complete.
        """
        seen = self._seen()
        if _EXIT_STATUS.get(seen) is ExitStatus.OK or self.complete:
            return seen
        return COULD_NOT_PROBE

    @property
    def complete(self) -> bool:
        """Whether a VM was made, nothing ended the probe early, and nothing ran out."""
        made = False
        for check in self.checks:
            if check.shortage or (check.step is Step.IOCTL and check.status != PASS):
                return False
            made = made or (check.group is Group.VM and check.status == PASS)
        return made

    def _seen(self) -> str:
        status = {(check.group, check.step, check.vm_type): check.status for check in self.checks}
        types = {check.vm_type for check in self.checks if check.vm_type}

        def works(group: Group, *steps: Step, vm_type: str = "") -> bool:
            return all(status.get((group, step, vm_type)) == PASS for step in steps)

        def works_in_a_vm(group: Group, *steps: Step) -> bool:
            return any(works(group, *steps, vm_type=vm_type) for vm_type in types)

        v9, v10, guest_memfd = Group.V9, Group.V10, Group.GUEST_MEMFD
        advertised = works(v9, Step.CAPABILITY)
        if advertised and works(v9, Step.FILE) and works_in_a_vm(v9, Step.SLOT, Step.CONVERSION):
            return V9_USABLE
        if works_in_a_vm(guest_memfd, Step.FILE, Step.SLOT, Step.CONVERSION):
            return GUEST_MEMFD_PRIVATE
        if works_in_a_vm(guest_memfd, Step.FILE, Step.SLOT, Step.IN_PLACE):
            return GUEST_MEMFD_IN_PLACE
        if advertised:
            return V9_REFUSED
        if status.get((v9, Step.SYSCALL, ""), FAIL) != FAIL and (
            works_in_a_vm(v10, Step.CAPABILITY) or works_in_a_vm(v10, Step.ATTRIBUTES)
        ):
            return V10_RECOGNISED
        if works_in_a_vm(guest_memfd, Step.FILE, Step.SLOT):
            return GUEST_MEMFD_SHARED
        return NONE

    @property
    def verdict_status(self) -> ExitStatus:
        """0 usable private memory, 1 probed and none usable, 3 could not probe.

        It follows from the verdict alone.
        """
        return _EXIT_STATUS.get(self.verdict, ExitStatus.NEGATIVE)

    @property
    def exit_status(self) -> ExitStatus:
        """That of the worst of `profiles` if there are any, else `verdict_status`."""
        if self.profiles:
            return max(judgement.exit_status for judgement in self.profiles)
        return self.verdict_status

    @property
    def meaning(self) -> str:
        """One sentence that explains the verdict; for COULD_NOT_PROBE the reason and the hint."""
        if self.verdict != COULD_NOT_PROBE:
            return _MEANINGS[self.verdict]
        check = self._reason()
        if check is None:
            return "The probe made no VM."
        return f"{check.tried}: {check.result}{f' ({check.hint})' if check.hint else ''}"

    def _reason(self) -> Check | None:
        """The check because of which the probe is not complete."""
        tried = [check for check in self.checks if check.tried]
        for check in tried:
            if check.shortage:
                return check
        for check in tried:
            if check.status == FAIL and (
                check.group is Group.VM or check.step in (Step.DEVICE, Step.IOCTL)
            ):
                return check
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must not overlook: where the device and a VM give different answers."""
        differ: dict[tuple[str, int | None, int], list[str]] = {}
        for check in self.checks:
            for name, value, device in check.asked:
                if device is not None and device != value:
                    types = differ.setdefault((name, device, value), [])
                    if check.vm_type not in types:
                        types.append(check.vm_type)
        notes = [
            f"the device reports {name} = {device}, but a VM of type {' or '.join(types)} reports"
            f" {value}: ask the VM"
            for (name, device, value), types in differ.items()
        ]
        notes += [
            f"this kernel is patched: {check.tried}: {check.result}"
            for check in self.checks
            if check.group is Group.TREE and check.status == FAIL
        ]
        if self.host["parameters"].get("kvm.gmem_in_place_conversion") == "N":
            notes.append(
                "this kernel has conversion in place, switched off; "
                "kvm.gmem_in_place_conversion=1 on its command line switches it on, and the "
                "conversion of VMs off"
            )
        return tuple(notes)

    def to_json(self) -> ReportDocument:
        """The document of ``--json``; ``schema.json`` describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "meaning": self.meaning,
            "notes": [*self.notes],
            "exit_status": self.exit_status,
            "checks": [check.to_json() for check in self.checks],
            "profiles": (
                None
                if self.profiles is None
                else [judgement.to_json() for judgement in self.profiles]
            ),
            "host": self.host,
            "holders": self.holders,
        }

    @classmethod
    def from_json(cls, document: object) -> Report:
        """The report that a document was made from.

        ValueError for another schema version, for a document without a part that the report needs,
        and for a check that can't be read.  ``schema.json`` describes the values of all parts.
        """
        match document:
            case {"schema_version": version} if version != SCHEMA_VERSION:
                raise ValueError(f"schema version {version}, not {SCHEMA_VERSION}")
            case {
                "schema_version": _,
                "checks": [*checks],
                "host": dict(host),
                "holders": None | {"processes": [*_], "unknown": int()} as holders,
            }:
                from .documents import HostFacts

                if lacking := HostFacts.__required_keys__ - host.keys():
                    raise ValueError(f"the host's facts have no {', '.join(sorted(lacking))}")
                return cls(
                    tuple(map(Check.from_json, checks)),
                    cast("HostFacts", host),
                    cast("Holders | None", holders),
                )
        raise ValueError(f"not a document of `kvmpriv probe --json`: {document!r:.200}")
