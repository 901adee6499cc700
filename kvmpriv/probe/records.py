"""What a probe leaves behind, and what follows from it.  Nothing here touches the machine."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..exit_status import ExitStatus

__all__ = [
    "FAIL",
    "PASS",
    "SCHEMA_VERSION",
    "SKIP",
    "VERDICTS",
    "Asked",
    "Check",
    "Report",
]

SCHEMA_VERSION = 1

#: Asked or tried, and the answer was yes.
PASS = "PASS"  # noqa: S105  # no password
#: Asked or tried, and the answer was no.
FAIL = "FAIL"
#: Not tried, or undecided; the result says why.
SKIP = "SKIP"

VERDICTS = (
    V9_USABLE := "v9 usable",
    V9_REFUSED := "v9 advertised but refused",
    V10_RECOGNISED := "v10 recognised",
    GUEST_MEMFD_PRIVATE := "guest_memfd private",
    GUEST_MEMFD_SHARED := "guest_memfd shared only",
    NONE := "none",
)


class Asked(NamedTuple):
    """A capability and what KVM_CHECK_EXTENSION said of it."""

    capability: str
    value: int


class Check(NamedTuple):
    """One finding.

    `name` is a path: the group (kvm, vm, v9, v10, guest_memfd), the VM type where the VM matters,
    the step.  `asked` was asked of that VM, else of the device; `tried` is what was
    done for real, `result` what came back, `hint` what would mend it.
    """

    name: str
    status: str
    asked: tuple[Asked, ...] = ()
    tried: str = ""
    result: str = ""
    hint: str = ""


class Report(NamedTuple):
    """A whole probe: the checks in the order of the tree, and facts about the host.

    `holders` is who holds the device, None if nobody asked.
    """

    checks: tuple[Check, ...]
    host: dict[str, Any]
    holders: dict[str, Any] | None = None

    @property
    def verdict(self) -> str:
        """One of VERDICTS; private memory that works comes before what is only there."""
        status = {check.name: check.status for check in self.checks}

        def works(group: str, *steps: str) -> bool:
            types = {name.split("/")[1] for name in status if name.count("/") == 2}
            return any(
                all(status.get(f"{group}/{vm_type}/{step}") == PASS for step in steps)
                for vm_type in types
            )

        advertised = status.get("v9/capability") == PASS
        if advertised and status.get("v9/file") == PASS and works("v9", "slot", "conversion"):
            return V9_USABLE
        if works("guest_memfd", "file", "slot", "conversion"):
            return GUEST_MEMFD_PRIVATE
        if advertised:
            return V9_REFUSED
        if status.get("v9/syscall", FAIL) != FAIL and PASS in (
            status.get("v10/default/capability"),
            status.get("v10/default/attributes"),
        ):
            return V10_RECOGNISED
        if works("guest_memfd", "file", "slot"):
            return GUEST_MEMFD_SHARED
        return NONE

    @property
    def exit_status(self) -> ExitStatus:
        """0 usable private memory, 1 probed and none usable, 3 could not probe: no VM was made."""
        if self.verdict in (V9_USABLE, GUEST_MEMFD_PRIVATE):
            return ExitStatus.OK
        made = any(check.status == PASS and check.name.startswith("vm/") for check in self.checks)
        return ExitStatus.NEGATIVE if made else ExitStatus.UNABLE

    def to_json(self) -> dict[str, Any]:
        """The document of ``--json``; ``schema.json`` describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "exit_status": self.exit_status,
            "checks": [
                {**check._asdict(), "asked": [asked._asdict() for asked in check.asked]}
                for check in self.checks
            ],
            "host": self.host,
            "holders": self.holders,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Report:
        """The report that a document was made from; ValueError for another schema version."""
        if document.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"schema version {document.get('schema_version')}, not {SCHEMA_VERSION}"
            )
        return cls(
            tuple(
                Check(**{**check, "asked": tuple(Asked(**asked) for asked in check["asked"])})
                for check in document["checks"]
            ),
            document["host"],
            document["holders"],
        )
