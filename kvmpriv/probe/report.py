"""The text of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..terminal import BOLD, DIM, GREEN, RED, YELLOW, format_size, painter, plain
from .records import FAIL, PASS, SKIP, Group, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .documents import Holders, HostFacts
    from .records import Asked, Check, Report

__all__ = ["profiles_text", "text"]

#: VM types that are not written as KVM's names in lower case.
_VM_TITLES = {
    "sev": "SEV",
    "sev_es": "SEV-ES",
    "snp": "SEV-SNP",
    "tdx": "TDX",
    "sw_protected": "sw-protected",
}
_GROUP_TITLES = {
    Group.KVM: "KVM",
    Group.VM: "VM types",
    Group.V9: "v9: memfd_restricted, KVM_MEM_PRIVATE",
    Group.V10: "v10: memory attributes on memfd_restricted",
    Group.GUEST_MEMFD: "guest_memfd: mainline",
    Group.TREE: "Kernel tree: PASS is what mainline has, FAIL a patched kernel",
}
#: Steps that are not written as their names.
_STEP_TITLES = {
    Step.VM_TYPES: "VM types",
    Step.ENCRYPTION: "SEV switched on",
    Step.SYSCALL: "system call 451",
    Step.INIT_SHARED: "shared file",
    Step.NO_DIRECT_MAP: "no direct map",
    Step.PUNCH_HOLE: "hole",
    Step.IN_PLACE: "in place",
    Step.PRE_FAULT: "pre-fault",
    Step.CREATE_FLAGS: "create flags",
}
_COLOURS = {PASS: GREEN, FAIL: RED, SKIP: YELLOW}
_HOLDER = "{name} ({pid}, {user}): descriptors of {devices} devices, {vms} VMs, {vcpus} vCPUs"
_STEP = 17  # the longest title's width


def text(report: Report, *, colour: bool = False) -> str:
    """The verdict, the tree of checks, facts about the host; a line each, ASCII alone."""
    paint = painter(colour)
    lines = [paint(BOLD, report.verdict), plain(report.meaning)]
    lines += [paint(YELLOW, f"note: {plain(note)}") for note in report.notes]
    group: Group | None = None
    vm_type = ""
    for check in report.checks:
        if check.group is not group:
            group, vm_type = check.group, ""
            lines += ["", paint(BOLD, _GROUP_TITLES[group])]
        indent, title = "  ", _STEP_TITLES.get(check.step, check.step.value)
        shown = _VM_TITLES.get(check.vm_type, check.vm_type)
        if group is Group.VM:
            title = shown
        elif shown:
            if check.vm_type != vm_type:
                vm_type = check.vm_type
                lines.append(f"{indent}{shown} VM")
            indent = "    "
        badge = paint(_COLOURS[check.status], f"[ {check.status} ]")
        lines.append(f"{indent}{badge} {title:{_STEP - len(indent)}} {plain(_finding(check))}")
        if check.hint and check.status != PASS:
            pad = " " * (len("  [ PASS ] ") + _STEP - 1)
            lines.append(paint(DIM, f"{pad}hint: {plain(check.hint)}"))
    lines += ["", paint(BOLD, "Host")]
    lines += [f"  {name:{_STEP + 7}} {plain(value)}" for name, value in _facts(report)]
    return "\n".join(lines) + "\n"


def profiles_text(report: Report, *, colour: bool = False) -> str:
    """The verdict of each profile, and what it needs and does not find."""
    paint = painter(colour)
    lines = []
    for judgement in report.profiles or ():
        lines += [
            paint(BOLD, f"{judgement.profile.name}: {judgement.verdict}"),
            f"  {plain(judgement.profile.summary)}",
        ]
        if not judgement.needs:
            lines.append(f"  {plain(report.meaning)}")
        for need, finding, status, check in judgement.needs:
            found = _finding(check) if check else "not tried, as the probe ended before"
            what = "without it" if need.wish else "needed"
            lines.append(f"  {paint(_COLOURS[status], f'[ {status} ]')} {finding}: {plain(found)}")
            if status != PASS:
                lines.append(paint(DIM, f"           {what}: {plain(need.why)}"))
                if check and check.hint:
                    lines.append(paint(DIM, f"           hint: {plain(check.hint)}"))
        lines.append("")
    lines += [paint(YELLOW, f"note: {plain(note)}") for note in report.notes]
    return "\n".join(lines).rstrip("\n") + "\n"


def _finding(check: Check) -> str:
    asked = ", ".join(map(_asked, check.asked))
    tried = f"{check.tried}: {check.result}" if check.tried else check.result
    return "; ".join(part for part in (asked, tried) if part)


def _asked(asked: Asked) -> str:
    answer = f"{asked.capability} = {_number(asked.value)}"
    if asked.device is None or asked.device == asked.value:
        return answer
    return f"{answer}, but {_number(asked.device)} on the device"


def _number(value: int) -> str:
    return str(value) if value < 10 else hex(value)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    host = report.host
    unknown = "unknown"
    yield "kernel", host["kernel"]
    backend = ", ".join(f"{name} ({how})" for name, how in host["backend"].items())
    yield "KVM backend", backend or ("not found" if host["kvm_loaded"] else "KVM is not loaded")
    if host["parameters"]:
        yield "module parameters", " ".join(f"{n}={v}" for n, v in host["parameters"].items())
    nesting = host["nesting"]
    yield (
        "KVM offers nesting",
        unknown if nesting is None else ", ".join(nesting).upper() or "no (neither SVM nor VMX)",
    )
    vcpus = host["vcpus"]
    yield (
        "vCPUs of a VM",
        "{max} at most, {recommended} recommended, ids below {max_id}".format(**vcpus)
        if vcpus
        else unknown,
    )
    yield "memory slots of a VM", str(host["memory_slots"] or unknown)
    memory = host["memory"]
    total, free = format_size(memory["total"]), format_size(memory["free"])
    yield "memory", f"{total}, {free} free, {format_size(memory['available'])} available"
    yield "huge pages", ", ".join(_hugepages(host)) or "none"
    yield (
        "CPU flags",
        f"{' '.join(host['cpu_flags']) or 'none of svm, vmx, SEV, TDX'} (for information only)",
    )
    yield (
        "/dev/sev",
        {None: "absent", True: "there", False: "there, not permitted"}[host["dev_sev"]],
    )
    confined = [f"{name} {host[name]}" for name in ("selinux", "apparmor") if host[name]]
    if host["seccomp"]:
        confined.append(f"seccomp mode {host['seccomp']}")
    yield "confinement", ", ".join(confined) or "none found (seccomp, SELinux, AppArmor)"
    if report.holders is not None:
        yield from _holders(report.holders)


def _hugepages(host: HostFacts) -> Iterator[str]:
    for pool in host["hugepages"]:
        yield f"{format_size(pool['size'])}: {pool['free']} of {pool['total']} free"
    if host["transparent_hugepages"]:
        yield f"transparent: {host['transparent_hugepages']}"


def _holders(holders: Holders) -> Iterator[tuple[str, str]]:
    label = "users of the device"
    for process in holders["processes"]:
        yield label, _HOLDER.format(**process)
        label = ""
    if not holders["processes"]:
        yield label, "no other process, as far as this user can see"
        label = ""
    if holders["unknown"]:
        yield label, f"{holders['unknown']} more processes can't be inspected by this user"
