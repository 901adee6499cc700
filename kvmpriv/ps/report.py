"""The text of a snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..processes import DEVICE, RESTRICTEDMEM, VCPU, VM
from ..terminal import BOLD, DIM, YELLOW, format_size, painter, plain
from .records import Holder, OpenFile, Snapshot, VirtualMachine, total

__all__ = ["text"]

Row = Sequence[str]
#: In a table: not known.
_UNKNOWN = "?"


def text(found: Snapshot, *, colour: bool = False, width: int | None = None) -> str:
    """The tables, what keeps a VM alive, the sums and what could not be seen.  ASCII alone.

    A row of a table is cut to `width` columns; the sentences are not.
    """
    paint = painter(colour)
    lines: list[str] = []
    for header, rows in (_processes(found), _machines(found), _private(found)):
        if rows:
            first, *others = _align([header, *rows], width)
            lines += [paint(BOLD, first), *others, ""]
    if not found.processes:
        lines += ["no process has KVM or private memory open, as far as this user can see", ""]
    left = [*_left_behind(found)]
    lines += [paint(YELLOW, line) for line in left] + [""] * bool(left)
    lines += [_total(found)]
    lines += [paint(DIM, f"note: {note}") for note in _notes(found)]
    return "\n".join(lines) + "\n"


def _align(rows: Sequence[Row], width: int | None) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(map(str.ljust, row, widths)).rstrip()
        yield line if width is None or len(line) <= width else f"{line[: max(width - 2, 0)]}.."


def _name(found: Snapshot, pid: int) -> str:
    """``PID (name)``."""
    return next(
        (f"{pid} ({plain(each.about.name)})" for each in found.processes if each.pid == pid),
        str(pid),
    )


def _size(count: int | None) -> str:
    return _UNKNOWN if count is None else format_size(count)


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3,7``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _held_by(holders: Iterable[Holder]) -> str:
    """``4711:3-5,map 4712:7``."""
    by_pid: dict[int, list[int | None]] = {}
    for holder in holders:
        by_pid.setdefault(holder.pid, []).append(holder.fd)
    return " ".join(
        f"{pid}:"
        + ",".join(
            filter(None, [_ranges(fd for fd in fds if fd is not None), "map" * (None in fds)])
        )
        for pid, fds in sorted(by_pid.items())
    )


def _processes(found: Snapshot) -> tuple[Row, list[Row]]:
    header = ("PID", "USER", "NAME", "KVM", "VMS", "VCPUS", "FILES", "PRIVATE", "MAPPED")
    rows: list[Row] = []
    for process in found.processes:
        files = [*found.of(process.pid)]
        kinds = [file.kind for file in files]
        private = [file for file in files if file.kind.private]
        rows.append(
            (
                str(process.pid),
                plain(process.about.user),
                plain(process.about.name),
                *(str(kinds.count(kind)) for kind in (DEVICE, VM, VCPU)),
                str(len(private)),
                _size(total(file.size for file in private)),
                _size(sum(file.mapped for file in private)),
            )
        )
    return header, rows


def _machines(found: Snapshot) -> tuple[Row, list[Row]]:
    header = ("VM", "MADE BY", "VCPUS", "IN GUEST", "HELD BY (PID:DESCRIPTORS)")
    return header, [
        (
            str(vm.number),
            _creator(found, vm),
            _ranges(vm.vcpus) or "-",
            _size(vm.mapped),
            _held_by(holder for _, holder in vm.pins) or _UNKNOWN,
        )
        for vm in found.vms
    ]


def _creator(found: Snapshot, vm: VirtualMachine) -> str:
    if vm.creator is None:
        return _UNKNOWN
    if vm.creator.name is None:
        return f"{vm.creator.pid} (ended)"
    return f"{vm.creator.pid} ({plain(vm.creator.name)})"


def _private(found: Snapshot) -> tuple[Row, list[Row]]:
    header = ("FILE", "KIND", "VM", "SIZE", "MAPPED", "ALLOCATED", "HELD BY (PID:DESCRIPTORS)")
    return header, [
        (
            str(file.number),
            file.kind.title,
            str(vm.number) if (vm := found.vm_of(file)) else _UNKNOWN,
            _size(file.size),
            _size(file.mapped),
            _size(file.allocated),
            _held_by(file.holders),
        )
        for file in found.private
    ]


def _reference(file: OpenFile, fds: Sequence[int | None]) -> str:
    """``fd 7 (guest_memfd, 2 MiB)``."""
    title = file.kind.title + (f" {file.vcpu}" if file.kind is VCPU else "")
    size = f", {format_size(file.size)}" if file.size is not None else ""
    numbers = [str(fd) for fd in fds if fd is not None]
    words = [f"fd {number}" for number in numbers] + ["a mapping"] * (None in fds)
    return f"{' and '.join(words)} ({title}{size})"


def _references(found: Snapshot, pins: Iterable[tuple[OpenFile, Holder]]) -> str:
    """All references, by process: ``fd 7 (guest_memfd, 2 MiB) of pid 4711 (sleep)``."""
    by_pid: dict[int, dict[OpenFile, list[int | None]]] = {}
    for file, holder in pins:
        by_pid.setdefault(holder.pid, {}).setdefault(file, []).append(holder.fd)
    return "; ".join(
        f"{', '.join(_reference(file, fds) for file, fds in files.items())} "
        f"of pid {_name(found, pid)}"
        for pid, files in sorted(by_pid.items())
    )


def _left_behind(found: Snapshot) -> Iterator[str]:
    for vm in found.vms:
        by = _references(found, vm.pins)
        creator = vm.creator
        probably = "is probably" if vm.by_elimination else "is"
        if creator is None:
            if vm.left_behind:
                yield f"VM {vm.number}, which no process in sight has open, is kept alive by {by}"
        elif not vm.pins:
            state = ", which has ended," if creator.ended else ""
            yield f"VM {vm.number} of pid {creator.pid}{state} is kept alive by nothing in sight"
        elif vm.left_behind:
            state = "which has ended" if creator.ended else "which has closed it"
            yield (f"VM {vm.number} of pid {creator.pid}, {state}, {probably} kept alive by {by}")
        elif creator.ended is None:
            yield (
                f"VM {vm.number} of task {creator.pid}, which has ended (a thread of one of these "
                f"processes, or their parent), {probably} kept alive by {by}"
            )
        elif vm.others:
            yield (
                f"VM {vm.number} of pid {_name(found, creator.pid)} stays alive after that process "
                f"ends, as long as another one has {_references(found, vm.others)}"
            )
    if any(vm.creator for vm in found.vms):
        return
    for vm in found.vms:
        pids = {holder.pid for _, holder in vm.pins}
        if len(pids) > 1 and not vm.left_behind:
            yield (
                f"VM {vm.number} stays alive as long as one of {len(pids)} processes has it: "
                f"{_references(found, vm.pins)}"
            )


def _total(found: Snapshot) -> str:
    totals = found.totals
    files = f"{totals['files']} file{'s' * (totals['files'] != 1)} of private memory"
    return (
        f"{files}: size {_size(totals['size'])}, mapped {_size(totals['mapped'])}, "
        f"allocated {_size(totals['allocated'])}; "
        f"Unevictable of this host: {_size(totals['unevictable'])}"
    )


def _notes(found: Snapshot) -> Iterator[str]:
    limits = found.limits
    as_root = "" if limits.root else ": run it as root"
    if not found.device:
        yield "/dev/kvm does not exist here: KVM is not loaded, or has no device node"
    if limits.unreadable:
        many = "es" * (limits.unreadable != 1)
        yield (
            f"{limits.unreadable} process{many} may have more, but can't be inspected by this user"
            + as_root
        )
    if limits.hidden:
        yield "/proc hides the processes of other users (hidepid)" + as_root
    if limits.namespace:
        yield "this is a PID namespace: processes outside it are not shown"
    if not limits.identified:
        yield (
            "kcmp(2) is not supported or not permitted: two descriptors of one VM are shown as two "
            "VMs"
        )
    if limits.statistics != "read":
        why = {
            "not mounted": "debugfs is not mounted (mount -t debugfs debugfs /sys/kernel/debug)",
            "not permitted": "/sys/kernel/debug/kvm can be read by root only",
        }
        reason = why.get(limits.statistics, "they name processes of the first PID namespace")
        yield f"who made a VM is not known, nor what it maps: {reason}"
    if any(file.kind is RESTRICTEDMEM and file.size is None for file in found.files):
        yield (
            "the sizes of memfd_restricted files were not read, since that crashes a kernel "
            "without the fixes: --stat-restricted"
        )
