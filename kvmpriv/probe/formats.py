"""A report in the formats that programs read: JSON, Prometheus, node-feature-discovery, Ansible."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

from ..exit_status import ExitStatus
from ..terminal import plain
from .records import FAIL, PASS, SKIP, VERDICTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .records import Report

__all__ = ["FORMATS", "ansible", "json_text", "nfd", "prometheus"]


def json_text(report: Report) -> str:
    """The document that ``schema.json`` describes."""
    return f"{json.dumps(report.to_json(), indent=2)}\n"


def _usable(report: Report) -> bool | None:
    """Whether the host has usable private memory; None if that could not be found out."""
    if report.verdict_status == ExitStatus.UNABLE:
        return None
    return report.verdict_status == ExitStatus.OK


# -- Prometheus ------------------------------------------------------------------------------------


class _Metric(NamedTuple):
    """A gauge: its samples are pairs of labels and a value."""

    name: str
    about: str
    samples: list[tuple[dict[str, str], int]]


def prometheus(report: Report) -> str:
    """Metrics in Prometheus' text format 0.0.4, for node_exporter's textfile collector.

    https://prometheus.io/docs/instrumenting/exposition_formats/ describes the format, and
    https://prometheus.io/docs/practices/naming/ the names.  Every metric is a gauge; what has more
    than two states has a sample for each, and the sample of the present state is 1.
    """
    lines = []
    for name, about, samples in _metrics(report):
        if samples:
            lines += [f"# HELP {name} {about}", f"# TYPE {name} gauge"]
        for labels, value in samples:
            inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
            lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """A label's value.  ASCII alone: the encoding of standard output may have no more."""
    return plain(text).replace("\\", "\\\\").replace('"', '\\"')


def _metrics(report: Report) -> Iterator[_Metric]:
    from .. import __version__

    host, usable = report.host, _usable(report)
    yield _Metric(
        "kvmpriv_build_info", "The kvmpriv that probed this host.", [({"version": __version__}, 1)]
    )
    about = {
        "kernel": host["kernel"],
        "backend": ",".join(host["backend"]),
        "nesting": ",".join(host["nesting"] or ()),
        "cpu_flags": ",".join(host["cpu_flags"]),
        "selinux": host["selinux"] or "",
        "apparmor": host["apparmor"] or "",
    }
    yield _Metric("kvmpriv_host_info", "The kernel and the CPU of this host.", [(about, 1)])
    yield _Metric(
        "kvmpriv_module_parameter_info",
        "The value of a parameter of KVM's modules.",
        [({"parameter": name, "value": value}, 1) for name, value in host["parameters"].items()],
    )
    yield _Metric(
        "kvmpriv_probe_success",
        "1 if this host could be probed, 0 if not.",
        [({}, int(usable is not None))],
    )
    yield _Metric(
        "kvmpriv_private_memory_usable",
        "1 if a guest can have private memory, 0 if not; absent if it could not be probed.",
        [] if usable is None else [({}, int(usable))],
    )
    yield _Metric(
        "kvmpriv_probe_verdict",
        "The verdict of the probe: 1 for the one that applies.",
        [({"verdict": each}, int(each == report.verdict)) for each in VERDICTS],
    )
    yield _Metric(
        "kvmpriv_profile_usable",
        "1 if a profile of --for is usable, 0 if not; absent if that could not be found out.",
        [
            ({"profile": one.profile.name}, int(one.exit_status == ExitStatus.OK))
            for one in report.profiles or ()
            if one.exit_status != ExitStatus.UNABLE
        ],
    )
    yield _Metric(
        "kvmpriv_probe_check_status",
        "How a check ended: 1 for the status that applies.",
        [
            ({"check": check.name, "status": each.lower()}, int(each == check.status))
            for check in report.checks
            for each in (PASS, FAIL, SKIP)
        ],
    )
    yield _Metric(
        "kvmpriv_capability",
        "What KVM_CHECK_EXTENSION returned for a capability, when the device or a VM was asked.",
        [
            ({"check": check.name, "capability": asked.capability, "asked": whom}, value)
            for check in report.checks
            for asked in check.asked
            for whom, value in (
                ("vm" if check.vm_type else "device", asked.value),
                ("device", asked.device),
            )
            if value is not None
        ],
    )
    vcpus, slots, users = host["vcpus"], host["memory_slots"], report.holders
    yield _Metric(
        "kvmpriv_vm_vcpus_recommended",
        "The number of vCPUs of a VM that KVM recommends as a limit.",
        [] if vcpus is None else [({}, vcpus["recommended"])],
    )
    yield _Metric(
        "kvmpriv_vm_vcpus_max",
        "The largest number of vCPUs of a VM.",
        [] if vcpus is None else [({}, vcpus["max"])],
    )
    yield _Metric(
        "kvmpriv_vm_memory_slots_max",
        "The largest number of memory slots of a VM.",
        [] if slots is None else [({}, slots)],
    )
    yield _Metric(
        "kvmpriv_device_users",
        "The number of other processes that have the device, a VM or a vCPU open.",
        [] if users is None else [({}, len(users["processes"]))],
    )
    yield _Metric(
        "kvmpriv_device_users_unknown",
        "The number of processes that could not be inspected.",
        [] if users is None else [({}, users["unknown"])],
    )


# -- node-feature-discovery ------------------------------------------------------------------------

#: What may be in a label's value or in the name of a label: Kubernetes, "Labels and Selectors",
#: "Syntax and character set".  The first and the last character must be a letter or a digit.
_NO_LABEL = re.compile(r"[^A-Za-z0-9._-]")
_LABEL_LENGTH = 63


def nfd(report: Report) -> str:
    """A feature file for the local source of Kubernetes' node-feature-discovery.

    Its customization guide describes the format, under "Local feature source": a feature a line,
    and ``# +no-label`` before one that becomes no label of the node; rules can match on it.
    """
    usable = {None: "unknown", True: "true", False: "false"}[_usable(report)]
    lines = [
        f"kvmpriv-private-memory={usable}",
        f"kvmpriv-verdict={_label(report.verdict)}",
    ]
    for one in report.profiles or ():
        name = _label(f"kvmpriv-profile.{one.profile.name}")
        lines.append(f"{name}={_label(one.verdict)}")
    for check in report.checks:
        name = _label(f"kvmpriv-check.{check.name.replace('/', '.')}")
        lines += ["# +no-label", f"{name}={check.status.lower()}"]
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return _NO_LABEL.sub("-", text)[:_LABEL_LENGTH].strip("._-")


# -- Ansible ---------------------------------------------------------------------------------------


def ansible(report: Report) -> str:
    """A local fact of Ansible: JSON that the module ``setup`` makes ``ansible_local.kvmpriv`` of.

    It is the document of ``--json``, but the checks and the profiles are mappings by name, and
    `private_memory` tells whether private memory is usable, null if that could not be found out.
    """
    document = report.to_json()
    checks = {
        check["name"]: {key: value for key, value in check.items() if key != "name"}
        for check in document["checks"]
    }
    profiles = document["profiles"] and {
        profile["name"]: {key: value for key, value in profile.items() if key != "name"}
        for profile in document["profiles"]
    }
    changes = {"private_memory": _usable(report), "checks": checks, "profiles": profiles}
    fact = {**document, **changes}
    return f"{json.dumps(fact, indent=2)}\n"


#: The formats by the names that ``--format`` takes; report.text() is another one.
FORMATS = {"json": json_text, "prometheus": prometheus, "nfd": nfd, "ansible": ansible}
