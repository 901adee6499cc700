"""The verdict that follows from records: from real hosts, made up, and in every combination."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import kvmpriv.probe
from kvmpriv.probe import VERDICTS, Asked, Check, Group, Report, Step, report
from kvmpriv.probe.host import facts
from kvmpriv.probe.records import FAIL, PASS, SKIP
from kvmpriv.terminal import format_size

SCHEMA = json.loads((Path(kvmpriv.probe.__file__).parent / "schema.json").read_text())

VM_MADE = {"kvm/device": PASS, "vm/default": PASS}
NOT_V9 = {"v9/syscall": FAIL, "v9/capability": FAIL, "v9/file": SKIP, "v9/default/slot": SKIP}
NOT_V10 = {"v10/default/capability": FAIL, "v10/default/attributes": FAIL}
V9_HERE = {"v9/syscall": PASS, "v9/capability": PASS, "v9/file": PASS}
NO_GUEST_MEMFD = {"guest_memfd/default/file": FAIL, "guest_memfd/default/slot": SKIP}
SHARED = {
    "guest_memfd/default/file": PASS,
    "guest_memfd/default/slot": PASS,
    "guest_memfd/default/conversion": FAIL,
    "guest_memfd/default/mmap": PASS,
}

#: The verdicts with exit status 0.
USABLE = ("v9 usable", "guest_memfd private", "guest_memfd in place")

RECORDED: list[tuple[str, str, int, dict[str, str]]] = [
    (
        "a v9 kernel whose hook says yes",
        "v9 usable",
        0,
        V9_HERE
        | VM_MADE
        | NOT_V10
        | NO_GUEST_MEMFD
        | {"v9/default/slot": PASS, "v9/default/conversion": PASS},
    ),
    (
        "a plain v9 kernel",
        "v9 advertised but refused",
        1,
        V9_HERE
        | VM_MADE
        | NOT_V10
        | NO_GUEST_MEMFD
        | {"v9/default/slot": FAIL, "v9/default/conversion": SKIP},
    ),
    (
        "v9 that binds but does not convert",
        "v9 advertised but refused",
        1,
        V9_HERE | VM_MADE | {"v9/default/slot": PASS, "v9/default/conversion": FAIL},
    ),
    (
        "v9 behind a seccomp filter",
        "v9 advertised but refused",
        1,
        VM_MADE | {"v9/syscall": SKIP, "v9/capability": PASS, "v9/file": SKIP},
    ),
    (
        "v10",
        "v10 recognised",
        1,
        VM_MADE
        | NO_GUEST_MEMFD
        | {"v9/syscall": PASS, "v9/capability": FAIL, "v9/file": PASS, "v9/default/slot": SKIP}
        | {"v10/default/capability": PASS, "v10/default/attributes": PASS},
    ),
    (
        "v10 whose VM has no attributes",
        "v10 recognised",
        1,
        VM_MADE
        | {"v9/syscall": PASS, "v9/capability": FAIL, "v9/file": PASS}
        | {"v10/default/capability": FAIL, "v10/default/attributes": PASS},
    ),
    (
        "memfd_restricted in a kernel whose KVM has nothing of it",
        "none",
        1,
        VM_MADE | NOT_V10 | {"v9/syscall": PASS, "v9/capability": FAIL, "v9/file": PASS},
    ),
    (
        "what is not v10: attributes, but 451 is something else",
        "none",
        1,
        VM_MADE | NOT_V9 | {"v10/default/capability": PASS, "v10/default/attributes": PASS},
    ),
    (
        "mainline 6.12 with KVM_SW_PROTECTED_VM",
        "guest_memfd private",
        0,
        VM_MADE
        | NOT_V9
        | NOT_V10
        | {"vm/sw_protected": PASS}
        | {"guest_memfd/default/file": PASS, "guest_memfd/default/slot": FAIL}
        | {
            "guest_memfd/sw_protected/file": PASS,
            "guest_memfd/sw_protected/slot": PASS,
            "guest_memfd/sw_protected/conversion": PASS,
        },
    ),
    (
        "conversion in place: the VM has no attributes, the file has",
        "guest_memfd in place",
        0,
        VM_MADE
        | NOT_V9
        | NOT_V10
        | SHARED
        | {"vm/sw_protected": PASS, "guest_memfd/default/in_place": FAIL}
        | {
            "guest_memfd/sw_protected/file": PASS,
            "guest_memfd/sw_protected/slot": PASS,
            "guest_memfd/sw_protected/conversion": FAIL,
            "guest_memfd/sw_protected/in_place": PASS,
        },
    ),
    (
        "mainline 6.18, default VM",
        "guest_memfd shared only",
        1,
        VM_MADE | NOT_V9 | NOT_V10 | SHARED,
    ),
    (
        "steps that pass on different VM types add up to nothing",
        "guest_memfd shared only",
        1,
        VM_MADE
        | NOT_V9
        | SHARED
        | {
            "guest_memfd/sw_protected/file": PASS,
            "guest_memfd/sw_protected/slot": FAIL,
            "guest_memfd/sw_protected/conversion": PASS,
        },
    ),
    (
        "a file that no slot takes",
        "none",
        1,
        VM_MADE
        | NOT_V9
        | {"guest_memfd/default/file": PASS, "guest_memfd/default/slot": FAIL}
        | {"guest_memfd/default/conversion": FAIL},
    ),
    ("a KVM of before 2022", "none", 1, VM_MADE | NOT_V9 | NOT_V10 | NO_GUEST_MEMFD),
    (
        "no /dev/kvm",
        "could not probe",
        3,
        {"kvm/device": FAIL, "v9/syscall": FAIL, "vm/default": SKIP},
    ),
    (
        "no VM to be had",
        "could not probe",
        3,
        {"kvm/device": PASS, "vm/default": FAIL, "v9/syscall": FAIL},
    ),
    (
        "a filter that ends the probe after it has made a VM",
        "could not probe",
        3,
        VM_MADE | NOT_V9 | {"kvm/ioctl": FAIL},
    ),
]


def a_check(
    name: str,
    status: str,
    asked: tuple[Asked, ...] = (),
    tried: str = "",
    result: str = "so",
    hint: str = "",
    shortage: str = "",
) -> Check:
    """A check by the name that documents give it."""
    document = {"name": name, "status": status, "tried": tried, "result": result, "hint": hint}
    document["shortage"] = shortage
    return Check.from_json({**document, "asked": [one._asdict() for one in asked]})


def a_report(status: dict[str, str], **rest: Any) -> Report:
    return Report(tuple(a_check(name, what) for name, what in status.items()), **rest)


@pytest.mark.parametrize(
    ("verdict", "exit_status", "status"),
    [case[1:] for case in RECORDED],
    ids=[case[0] for case in RECORDED],
)
def test_verdict(verdict: str, exit_status: int, status: dict[str, str]) -> None:
    found = a_report(status, host={})
    assert found.verdict == verdict
    assert found.exit_status == exit_status
    # It follows from what was found, not from the order in which it was.
    assert a_report(dict(reversed(status.items())), host={}).verdict == verdict


@pytest.mark.parametrize("case", RECORDED, ids=[case[0] for case in RECORDED])
def test_a_shortage_anywhere(case: tuple[str, str, int, dict[str, str]]) -> None:
    """Each check in turn met a shortage: usable memory stays usable, all else is not known."""
    _, verdict, _, status = case
    for short in status:
        checks = [
            a_check(name, SKIP, tried="it", hint="raise it", shortage="EMFILE")
            if name == short
            else a_check(name, what)
            for name, what in status.items()
        ]
        found = Report(tuple(checks), facts("/nonexistent"))
        needed = short.startswith(("v9/", "guest_memfd/")) and status[short] == PASS
        needed = needed and short != "v9/syscall"  # which the file has shown
        if verdict in USABLE and not needed:
            assert (found.verdict, found.exit_status) == (verdict, 0), short
        elif found.verdict not in USABLE:  # the other file may be usable as well
            assert (found.verdict, found.exit_status) == ("could not probe", 3), short
            assert found.meaning == "it: so (raise it)"


def test_first_line_and_exit_status_agree() -> None:
    """The verdict decides the exit status, in every combination of what was found and ran out."""
    names = [f"v9/{step}" for step in ("capability", "file", "default/slot", "default/conversion")]
    names += [f"guest_memfd/default/{step}" for step in ("slot", "conversion", "in_place")]
    names += ["vm/default"]
    outcomes = ((PASS, ""), (FAIL, ""), (SKIP, "ENOMEM"))
    expected = dict.fromkeys(VERDICTS, 1)
    expected |= {**dict.fromkeys(USABLE, 0), "could not probe": 3}
    host = facts("/nonexistent")
    seen = set()
    for outcome in itertools.product(outcomes, repeat=len(names)):
        checks = [
            a_check(name, status, tried="it", shortage=shortage)
            for name, (status, shortage) in zip(names, outcome, strict=True)
        ]
        found = Report((*checks, a_check("guest_memfd/default/file", PASS)), host)
        verdict = found.verdict
        assert found.exit_status == expected[verdict]
        if any(shortage for _, shortage in outcome):
            assert verdict in (*USABLE, "could not probe")
        seen.add(verdict)
    assert len(seen) > 4


@pytest.mark.parametrize("verdict", VERDICTS)
def test_meaning(verdict: str) -> None:
    """Each verdict has a sentence of its own."""
    status = next(case[3] for case in RECORDED if case[1] == verdict)
    found = a_report(status, host={})
    assert found.meaning[-1] == "." or verdict == "could not probe"
    others = {
        a_report(case[3], host={}).meaning for case in RECORDED if case[1] not in (verdict, "")
    }
    assert found.meaning not in others


def test_a_probe_without_a_vm_has_a_meaning() -> None:
    assert a_report({"kvm/device": PASS}, host={}).meaning == "The probe made no VM."


def test_notes_on_two_answers() -> None:
    """Where the device and a VM differ, once for all VM types with the same answer."""
    attributes = "KVM_CAP_MEMORY_ATTRIBUTES"
    found = Report(
        (
            a_check("guest_memfd/default/file", PASS, (Asked("KVM_CAP_GUEST_MEMFD", 1, 1),)),
            a_check("guest_memfd/default/conversion", FAIL, (Asked(attributes, 0, 8),)),
            a_check("guest_memfd/sev/conversion", FAIL, (Asked(attributes, 0, 8),)),
            a_check("guest_memfd/snp/conversion", PASS, (Asked(attributes, 8, 8),)),
            a_check("kvm/vm_types", PASS, (Asked("KVM_CAP_VM_TYPES", 1),)),
        ),
        facts("/nonexistent"),
    )
    note = (
        "the device reports KVM_CAP_MEMORY_ATTRIBUTES = 8, but a VM of type default or sev"
        " reports 0: ask the VM"
    )
    assert found.notes == (note,)
    assert found.to_json()["notes"] == [note]
    text = report.text(found)
    assert text.splitlines()[2] == f"note: {note}"
    assert "KVM_CAP_MEMORY_ATTRIBUTES = 0, but 8 on the device" in text
    assert "KVM_CAP_GUEST_MEMFD = 1; so" in text


def test_every_verdict_is_recorded() -> None:
    assert {case[1] for case in RECORDED} == set(VERDICTS)


def test_usable_needs_each_step() -> None:
    """Of all 3^4 outcomes of v9's steps exactly one is usable; every combination has a verdict."""
    steps = ("v9/capability", "v9/file", "v9/default/slot", "v9/default/conversion")
    usable = []
    for outcome in itertools.product((PASS, FAIL, SKIP), repeat=len(steps)):
        found = a_report(VM_MADE | dict(zip(steps, outcome, strict=True)), host={})
        assert found.verdict in VERDICTS
        assert (found.exit_status == 0) == (found.verdict == "v9 usable")
        if found.exit_status == 0:
            usable.append(outcome)
    assert usable == [(PASS,) * len(steps)]


@pytest.fixture
def recorded() -> Report:
    """The report of mainline 6.18 without hardware for private memory."""
    return Report(
        (
            a_check("kvm/device", PASS, (), "open /dev/kvm", "API version 12"),
            a_check("kvm/vm_types", PASS, (Asked("KVM_CAP_VM_TYPES", 1),), "", "default"),
            a_check("vm/default", PASS, (), "KVM_CREATE_VM(0)", "made"),
            a_check("vm/snp", SKIP, (), "", "not offered: kvm_amd.sev_snp is N", "firmware: RMP"),
            a_check("v9/syscall", FAIL, (), "memfd_restricted(0xffffffff)", "EBADF", "patch it"),
            a_check("guest_memfd/default/file", PASS, (), "KVM_CREATE_GUEST_MEMFD", "made"),
            a_check("guest_memfd/default/slot", PASS, (), "KVM_SET_…_REGION2", "bound", "unseen"),
        ),
        {**facts("/nonexistent"), "memory_slots": 32764, "nesting": ["svm"]},
        {
            "processes": [
                {"pid": 7, "name": "q\x1b[2Jü", "user": "me", "devices": 1, "vms": 1, "vcpus": 4}
            ],
            "unknown": 3,
        },
    )


def test_round_trip(recorded: Report) -> None:
    document = json.loads(json.dumps(recorded.to_json()))
    assert Report.from_json(document) == recorded
    assert document["verdict"] == "guest_memfd shared only"
    assert document["exit_status"] == 1
    document["schema_version"] = 1
    with pytest.raises(ValueError, match="schema version 1, not 2"):
        Report.from_json(document)


def test_what_is_no_document(recorded: Report) -> None:
    """ValueError names the part that is missing or of the wrong type."""
    good = json.loads(json.dumps(recorded.to_json()))
    check, fact = good["checks"][1], {**good["host"]}
    del fact["kernel"]
    Report.from_json(good)
    for bad, why in (
        (None, "not a document of"),
        ([], "not a document of"),
        ({}, "not a document of"),
        (good | {"checks": 1}, "not a document of"),
        (good | {"holders": {"processes": []}}, "not a document of"),
        (good | {"host": fact}, "the host's facts have no kernel"),
        (good | {"checks": ["x"]}, "not a check of"),
        (good | {"checks": [check | {"tried": None}]}, "not a check of"),
        (good | {"checks": [check | {"shortage": 1}]}, "not a check of"),
        (good | {"checks": [check | {"asked": [{"value": 1}]}]}, "not a capability and its value"),
    ):
        with pytest.raises(ValueError, match=why):
            Report.from_json(bad)


@pytest.mark.parametrize(
    ("check", "name"),
    [
        (Check(Group.KVM, Step.DEVICE, PASS), "kvm/device"),
        (Check(Group.VM, Step.CREATE, PASS, "type_7"), "vm/type_7"),
        (Check(Group.V9, Step.SYSCALL, FAIL), "v9/syscall"),
        (Check(Group.GUEST_MEMFD, Step.PRE_FAULT, SKIP, "snp"), "guest_memfd/snp/pre_fault"),
    ],
)
def test_a_name_is_made_of_fields(check: Check, name: str) -> None:
    """In documents a check has a name; every name of the schema can be read back."""
    assert check.name == name
    assert re.fullmatch(SCHEMA["$defs"]["check"]["properties"]["name"]["pattern"], name)
    assert Check.from_json(check.to_json()) == check


def test_a_name_that_is_unknown() -> None:
    for name in ("kvm/nonesuch", "v11/file", "guest_memfd/default/nonesuch"):
        with pytest.raises(ValueError, match=r"is not a valid (Step|Group)"):
            a_check(name, PASS)


def test_the_schema_has_every_group() -> None:
    pattern = SCHEMA["$defs"]["check"]["properties"]["name"]["pattern"]
    for group in Group:
        assert re.fullmatch(pattern, Check(group, Step.FILE, PASS, "default").name), group


def test_schema(recorded: Report) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert tuple(SCHEMA["properties"]["verdict"]["enum"]) == VERDICTS
    validator = jsonschema.Draft202012Validator(SCHEMA)
    document = recorded.to_json()
    assert list(validator.iter_errors(document)) == []
    change: dict[str, Any]
    for change in (
        {"verdict": "perhaps"},
        {"meaning": ""},
        {"notes": "none"},
        {"checks": [{**document["checks"][0], "shortage": "EPERM"}]},
        {"exit_status": 2},
        {"checks": []},
        {"more": 1},
        {"checks": [{**document["checks"][0], "status": "OK"}]},
        {"checks": [{**document["checks"][0], "name": "kvm"}]},
        {"host": {**document["host"], "seccomp": "2"}},
        {"host": {}},
    ):
        assert not validator.is_valid({**document, **change}), change


def test_text(recorded: Report) -> None:
    plain = report.text(recorded)
    lines = plain.splitlines()
    assert lines[0] == "guest_memfd shared only"
    assert lines[1] == recorded.meaning
    assert plain.isascii()
    assert "\x1b" not in plain
    assert "  [ PASS ] VM types        KVM_CAP_VM_TYPES = 1; default" in lines
    assert "  [ FAIL ] system call 451 memfd_restricted(0xffffffff): EBADF" in lines
    assert "  default VM" in lines
    assert "    [ PASS ] file          KVM_CREATE_GUEST_MEMFD: made" in lines
    hints = [line.strip() for line in lines if "hint:" in line]
    assert hints == ["hint: firmware: RMP", "hint: patch it"]  # none for checks that passed
    holder = next(line for line in lines if line.startswith("  users of the device"))
    assert holder.endswith(r"q\x1b[2J\xfc (7, me): descriptors of 1 devices, 1 VMs, 4 vCPUs")
    assert lines[-1].endswith("3 more processes can't be inspected by this user")


def test_coloured_text_is_the_plain_one(recorded: Report) -> None:
    coloured = report.text(recorded, colour=True)
    assert "\x1b[32m[ PASS ]\x1b[0m" in coloured
    assert "\x1b[31m[ FAIL ]\x1b[0m" in coloured
    assert "\x1b[33m[ SKIP ]\x1b[0m" in coloured
    for code in (0, 1, 2, 31, 32, 33):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == report.text(recorded)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "unknown"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 52, "4096 TiB"),
    ],
)
def test_sizes(count: int | None, shown: str) -> None:
    assert format_size(count) == shown
