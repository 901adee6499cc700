"""The probe on simulated kernels: what it calls, and what it concludes.

The binding's functions are replaced by ones that answer as such a kernel, and record the calls.
"""

from __future__ import annotations

import copy
import errno
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kvmpriv import libc
from kvmpriv.cdefs import guest_memfd as gmem
from kvmpriv.cdefs import restrictedmem as v9
from kvmpriv.cdefs import restrictedmem_v10 as v10
from kvmpriv.private import guest_memfd, restrictedmem
from kvmpriv.probe import Check, Report, checks, host
from kvmpriv.probe.records import FAIL, PASS, SKIP

inode = checks._inode  # the simulated kernels replace it
FACTS = host.facts("/nonexistent")
FACTS["seccomp"] = 0


class Kernel:
    """A simulated kernel and the calls made on it; also stands for its /dev/kvm and for each VM."""

    def __init__(
        self,
        syscall: int = errno.ENOSYS,
        capabilities: dict[int, int] | None = None,
        refusals: dict[str, int] | None = None,
        ioctls: Iterable[int] = (),
        device: dict[int, int] | None = None,
        flags: int = 3,
        inode: tuple[int, str] = (gmem.ANON_INODE_FS_MAGIC, "anon_inode:[kvm-gmem]"),
        in_place: tuple[int, int] = (errno.ENOTTY, errno.ENOTTY),
        other_ioctls: dict[int, int] | None = None,
        reserved: int = 0,
    ) -> None:
        self.syscall = syscall
        self.capabilities = capabilities or {}
        self.refusals = refusals or {}
        self.ioctls = ioctls
        self.device = device
        self.flags = flags  # of KVM_CREATE_GUEST_MEMFD, those that are accepted
        self.inode = inode
        self.in_place = in_place  # the errno for a bad flag, and for a conversion
        self.other_ioctls = other_ioctls or {}  # of a guest_memfd: request -> errno
        self.reserved = reserved  # what a conversion writes to a reserved word
        self.calls: list[tuple[Any, ...]] = []

    def call(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name in self.refusals:
            raise OSError(self.refusals[name], "refused")

    def called(self) -> set[str]:
        return {name for name, *_ in self.calls}

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append(("close",))

    def get_api_version(self) -> int:
        return 12

    def get_supported_cpuid(self) -> list[Any]:
        return []

    def check_extension(self, cap: int) -> int:
        return self.capabilities.get(cap, 0)

    def create_vm(self, vm_type: int) -> Kernel:
        self.call("create_vm", vm_type)
        return self

    def create_vcpu(self) -> Kernel:
        self.call("create_vcpu")
        return self

    def enable_cap(self, cap: int, *arguments: int) -> None:
        self.call("enable_cap", cap, *arguments)

    def ioctl_errno(self, request: int, argument: Any) -> int:
        return 0 if request in self.ioctls else errno.ENOTTY

    def ioctl(self, request: int, argument: Any) -> int:
        if request not in self.ioctls:
            raise OSError(errno.ENOTTY, "no such ioctl")
        return 0

    # what stands for files and slots
    def ftruncate(self, size: int) -> None:
        self.call("ftruncate", size)

    def fileno(self) -> int:
        raise AssertionError("the probe must not use a file's number here")

    def delete(self) -> None:
        self.call("delete")


class GuestFile:
    """A guest_memfd of a simulated kernel; what is mapped is a memfd."""

    def __init__(self, kernel: Kernel, size: int, flags: int = 0) -> None:
        if flags & ~kernel.flags:
            raise OSError(errno.EINVAL, "no such flag")
        kernel.call("guest_memfd", size, flags)
        self.kernel = kernel
        self.fd = os.memfd_create("guest_memfd")
        os.ftruncate(self.fd, size)

    def __enter__(self) -> GuestFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.kernel.calls.append(("close",))
        os.close(self.fd)

    def fileno(self) -> int:
        return self.fd

    def punch_hole(self, *arguments: int) -> None:
        self.kernel.call("punch_hole", *arguments)

    def ioctl_errno(self, request: int, argument: Any) -> int:
        if request != gmem.KVM_SET_MEMORY_ATTRIBUTES2:
            return self.kernel.other_ioctls.get(request, errno.ENOTTY)
        if number := self.kernel.in_place[argument.flags == 0]:
            return number
        argument.reserved[2] = self.kernel.reserved
        fields = (argument.offset, argument.size, argument.attributes, argument.flags)
        self.kernel.call("attributes2", *fields)
        return 0


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Probe a kernel."""

    def run(kernel: Kernel, out_of_time: Callable[[], object] = bool) -> Report:
        device = copy.copy(kernel)  # what opens /dev/kvm; the VMs are the kernel itself
        if kernel.device is not None:
            device.capabilities = kernel.device
        device.create_vm = kernel.create_vm  # type: ignore[method-assign]

        def opened(path: str) -> Kernel:
            kernel.call("open")
            return device

        def standing_for(name: str, *arguments: Any) -> Kernel:
            kernel.call(name, *arguments)
            return kernel

        def ask() -> int:
            kernel.calls.append(("ask",))
            return kernel.syscall

        def pre_fault(vcpu: Kernel, gpa: int, size: int) -> int:
            kernel.call("pre_fault", gpa, size)
            return 0

        replaced: dict[Any, dict[str, Any]] = {
            checks: {"Kvm": opened, "_inode": lambda fd: kernel.inode},
            restrictedmem: {
                "ask_memfd_restricted": ask,
                "RestrictedMem": lambda: standing_for("memfd_restricted"),
                "set_user_memory_region_ext": lambda vm, *a: standing_for("private slot", *a),
                "memory_encrypt_reg_region": lambda vm, *a: kernel.call("REG", *a),
                "memory_encrypt_unreg_region": lambda vm, *a: kernel.call("UNREG", *a),
            },
            guest_memfd: {
                "GuestMemfd": lambda vm, *a: GuestFile(kernel, *a),
                "set_user_memory_region2": lambda vm, *a: standing_for("slot2", *a),
                "set_memory_attributes": lambda vm, *a: kernel.call("attributes", *a),
                "pre_fault_memory": pre_fault,
            },
        }
        for module, names in replaced.items():
            for name, value in names.items():
                monkeypatch.setattr(module, name, value)
        facts = FACTS.copy()
        return Report(checks.run("/dev/kvm", facts, out_of_time), facts)

    return run


NO_MAINLINE = {"guest_memfd": errno.ENOTTY, "attributes": errno.ENOTTY}


def status_of(found: Report) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


def test_v9_usable(probed: Any) -> None:
    kernel = Kernel(errno.EINVAL, {v9.KVM_CAP_PRIVATE_MEM: 1}, NO_MAINLINE)
    found = probed(kernel)
    assert (found.verdict, found.exit_status) == ("v9 usable", 0)
    calls = [call for call in kernel.calls if call[0] in ("private slot", "REG", "UNREG", "delete")]
    assert [call[0] for call in calls] == ["private slot", "UNREG", "REG", "delete"]
    slot, gpa, size, _, file, offset = calls[0][1:]
    assert (slot, file) == (0, kernel)
    assert offset > 0  # mistakes of unit show only away from 0
    assert offset % 4096 == 0
    # One page inside the slot, the same there and back.
    assert calls[1][1:] == calls[2][1:] == (gpa, 4096)
    assert size >= 4096
    assert kernel.calls.count(("close",)) == 3  # the file, the VM, the device


def test_v9_refused(probed: Any) -> None:
    refusals = NO_MAINLINE | {"private slot": errno.EINVAL}
    kernel = Kernel(errno.EINVAL, {v9.KVM_CAP_PRIVATE_MEM: 1}, refusals)
    found = probed(kernel)
    assert (found.verdict, found.exit_status) == ("v9 advertised but refused", 1)
    assert not {"REG", "UNREG"} & kernel.called()
    check = next(check for check in found.checks if check.name == "v9/default/slot")
    assert (check.status, check.result) == (FAIL, "EINVAL")
    assert "hook" in check.hint


@pytest.mark.parametrize("step", ["REG", "UNREG", "delete"])
def test_v9_that_does_not_convert(probed: Any, step: str) -> None:
    kernel = Kernel(errno.EINVAL, {v9.KVM_CAP_PRIVATE_MEM: 1}, NO_MAINLINE | {step: errno.ENOTTY})
    found = probed(kernel)
    assert found.verdict == "v9 advertised but refused"
    check = next(check for check in found.checks if check.name == "v9/default/conversion")
    assert (check.status, check.result) == (FAIL, "ENOTTY")
    assert step in check.tried


@pytest.mark.parametrize("capability", [0, 1])
def test_v10(probed: Any, capability: int) -> None:
    kernel = Kernel(
        errno.EINVAL,
        {v10.KVM_CAP_MEMORY_ATTRIBUTES: capability},
        NO_MAINLINE,
        ioctls=[v10.KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES],
    )
    found = probed(kernel)
    assert (found.verdict, found.exit_status) == ("v10 recognised", 1)
    # REG_REGION has its SEV meaning in v10: the address would be the host's.
    assert not {"private slot", "REG", "UNREG"} & kernel.called()


@pytest.mark.parametrize("answer", [errno.EBADF, errno.ENOSYS, 0])
def test_nothing_of_v9_is_called_on_another_kernel(probed: Any, answer: int) -> None:
    """Nothing of v9 is called, even if the number of its capability returns something."""
    kernel = Kernel(answer, {v9.KVM_CAP_PRIVATE_MEM: 1}, NO_MAINLINE)
    found = probed(kernel)
    assert "ask" in kernel.called()
    assert not {"memfd_restricted", "private slot", "REG", "UNREG"} & kernel.called()
    assert status_of(found)["v9/syscall"] == FAIL
    assert status_of(found)["v9/file"] == SKIP
    assert found.exit_status == 1


def test_mainline_vm_types(probed: Any) -> None:
    """Each listed VM type is made and tried, also one with an unknown number."""
    types = 1 << gmem.KVM_X86_SW_PROTECTED_VM | 1 << gmem.KVM_X86_SNP_VM | 1 << 9 | 1
    capabilities = {gmem.KVM_CAP_VM_TYPES: types, gmem.KVM_CAP_PRE_FAULT_MEMORY: 1}
    kernel = Kernel(errno.EBADF, capabilities)
    found = probed(kernel)
    status = status_of(found)
    assert [call[1] for call in kernel.calls if call[0] == "create_vm"] == [0, 1, 4, 9]
    for vm_type in ("default", "sw_protected", "snp", "type_9"):
        assert status[f"guest_memfd/{vm_type}/conversion"] == PASS
    assert (found.verdict, found.exit_status) == ("guest_memfd private", 0)
    for vm_type in ("sev", "sev_es", "tdx"):
        assert status[f"vm/{vm_type}"] == SKIP
    # A vCPU is made only where that needs no launch.
    assert [call[0] for call in kernel.calls].count("create_vcpu") == 2
    assert (status["guest_memfd/default/pre_fault"], status["guest_memfd/snp/pre_fault"]) == (
        PASS,
        SKIP,
    )
    attributes = [call[1:] for call in kernel.calls if call[0] == "attributes"]
    assert attributes[:2] == [(0x100000, 4096, 8), (0x100000, 4096, 0)]
    slots = [call for call in kernel.calls if call[:2] == ("slot2", 0)]
    assert len(slots) == 4
    assert all(call[6] == 4096 for call in slots)  # guest_memfd_offset


def test_vm_type_that_can_not_be_made(probed: Any) -> None:
    capabilities = {gmem.KVM_CAP_VM_TYPES: 1}
    found = probed(Kernel(capabilities=capabilities, refusals={"create_vm": errno.EBUSY}))
    assert (found.verdict, found.exit_status) == ("could not probe", 3)
    check = next(check for check in found.checks if check.name == "vm/default")
    assert (check.status, check.result) == (FAIL, "EBUSY")
    assert "another hypervisor" in check.hint


def test_the_question_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """System call 451 gets flags that no kernel accepts, and all six arguments are set."""
    asked: list[tuple[int, ...]] = []

    def syscall(*arguments: int) -> int:
        asked.append(arguments)
        return -1

    monkeypatch.setattr(libc, "_syscall", syscall)
    restrictedmem.ask_memfd_restricted()
    assert asked == [(451, 0xFFFFFFFF, 0, 0, 0, 0, 0)]


# -- what runs out -----------------------------------------------------------------------------

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
#: A kernel with everything of v9, and one with everything of mainline.
EVERYTHING = (
    (errno.EINVAL, {v9.KVM_CAP_PRIVATE_MEM: 1}, NO_MAINLINE),
    (
        errno.EBADF,
        {gmem.KVM_CAP_VM_TYPES: 3, gmem.KVM_CAP_PRE_FAULT_MEMORY: 1},
        dict[str, int](),
    ),
)


def calls_of(kernel: Kernel, probed: Any) -> list[str]:
    probed(kernel)
    return sorted(kernel.called() - {"ask", "close"} - set(kernel.refusals))


@pytest.mark.parametrize("number", SHORTAGES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_call_that_lacks_something(probed: Any, which: int, number: int) -> None:
    """Each call in turn meets a shortage: it is told as one, never as what KVM can not do."""
    syscall, capabilities, refusals = EVERYTHING[which]
    calls = calls_of(Kernel(syscall, capabilities, refusals), probed)
    assert len(calls) > 5
    for call in calls:
        found = probed(Kernel(syscall, capabilities, refusals | {call: number}))
        name = errno.errorcode[number]
        short = [check for check in found.checks if check.shortage]
        assert short, call
        for check in short:
            assert (check.status, check.shortage) == (SKIP, name), call
        met = next(check for check in short if check.tried)
        assert met.result == f"{name}, undecided"
        assert met.hint
        assert not any(check.status == FAIL and check.result == name for check in found.checks)
        if found.exit_status == 0:
            assert found.verdict == ("v9 usable", "guest_memfd private")[which]
            later = ("create_vcpu", "pre_fault", "punch_hole", "enable_cap")
            assert call in later, call
        else:
            assert (found.verdict, found.exit_status) == ("could not probe", 3), call
            assert found.meaning.startswith(f"{met.tried}: {name}, undecided ("), call


def test_what_follows_a_shortage_is_undecided_too(probed: Any) -> None:
    found = probed(Kernel(errno.EINVAL, {}, {"memfd_restricted": errno.EMFILE}))
    short = {check.name for check in found.checks if check.shortage}
    assert short == {"v9/file", "v9/default/slot", "v9/default/conversion"}
    found = probed(Kernel(errno.EBADF, {}, {"guest_memfd": errno.ENFILE}))
    short = {check.name for check in found.checks if check.shortage}
    assert {"guest_memfd/default/slot", "guest_memfd/default/conversion"} <= short


def test_no_memory_for_python(probed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """MemoryError anywhere in the probe."""

    def fails(*_: object) -> None:
        raise MemoryError

    kernel = Kernel(errno.EBADF)
    monkeypatch.setattr(kernel, "create_vm", fails)
    found = probed(kernel)
    assert (found.verdict, found.exit_status) == ("could not probe", 3)
    assert found.meaning.startswith("allocate memory in this process: ENOMEM, undecided (")
    assert kernel.calls.count(("close",)) == 1


def test_no_child(probed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a filter is active the system call is made in a child; none can be made."""

    def fork() -> int:
        raise OSError(errno.EAGAIN, "no process")

    monkeypatch.setitem(FACTS, "seccomp", 2)
    monkeypatch.setattr(os, "fork", fork)
    found = probed(Kernel(refusals=NO_MAINLINE))
    check = next(check for check in found.checks if check.name == "v9/syscall")
    assert (check.status, check.shortage, check.tried) == (SKIP, "EAGAIN", "fork()")
    assert "ulimit -u" in check.hint
    assert found.verdict == "could not probe"


def test_no_cpu_time(probed: Any) -> None:
    """Time ends after each number of steps in turn."""
    capabilities = {gmem.KVM_CAP_VM_TYPES: 3}
    steps = len(probed(Kernel(errno.EBADF, capabilities)).checks)
    verdicts = []
    for enough in range(steps + 1):
        counter = itertools.count()
        kernel = Kernel(errno.EBADF, capabilities)
        found = probed(kernel, lambda counter=counter, enough=enough: next(counter) >= enough)
        verdicts.append(found.verdict)
        if enough < steps:
            check = next(check for check in found.checks if check.shortage)
            assert (check.name, check.shortage) == ("kvm/ioctl", "RLIMIT_CPU")
            assert "ulimit -t" in check.hint
        # Whatever was made has been closed.
        made = sum(name in ("open", "create_vm", "guest_memfd") for name, *_ in kernel.calls)
        assert kernel.calls.count(("close",)) == made, enough
    assert (verdicts[0], verdicts[-1]) == ("could not probe", "guest_memfd private")
    assert set(verdicts) == {verdicts[0], verdicts[-1]}


def test_the_device_and_the_vm(probed: Any) -> None:
    """Both are asked, and the check has both answers."""
    attributes = gmem.KVM_CAP_MEMORY_ATTRIBUTES
    found = probed(Kernel(errno.EBADF, {attributes: 0}, device={attributes: 8}))
    asked = next(c.asked for c in found.checks if c.name == "guest_memfd/default/conversion")
    assert asked == (("KVM_CAP_MEMORY_ATTRIBUTES", 0, 8),)
    assert len(found.notes) == 1
    types = next(c.asked for c in found.checks if c.name == "kvm/vm_types")
    assert types == (("KVM_CAP_VM_TYPES", 0, None),)


# -- what VMMs ask for, and patched kernels ----------------------------------------------------


def check_of(found: Report, name: str) -> Check:
    return next(check for check in found.checks if check.name == name)


def test_a_mapped_file(probed: Any) -> None:
    """MMAP alone is mapped, and not touched; with INIT_SHARED the page is used, and bound."""
    listed = {gmem.KVM_CAP_GUEST_MEMFD_FLAGS: 3}
    kernel = Kernel(errno.EBADF, listed)
    found = probed(kernel)
    assert check_of(found, "guest_memfd/default/mmap").result == "mapped"
    shared = check_of(found, "guest_memfd/default/init_shared")
    assert (shared.status, shared.result) == (PASS, "written, read and bound")
    assert any(call[:2] == ("slot2", 2) for call in kernel.calls)
    found = probed(Kernel(errno.EBADF, listed, flags=1))
    shared = check_of(found, "guest_memfd/default/init_shared")
    assert (shared.status, shared.result) == (FAIL, "EINVAL")
    assert check_of(found, "guest_memfd/default/mmap").status == PASS
    found = probed(Kernel(errno.EBADF, flags=0))
    assert check_of(found, "guest_memfd/default/mmap").status == FAIL
    # Firecracker's tree: the flag is accepted, the capability does not list it.
    found = probed(Kernel(errno.EBADF))
    assert "in Firecracker's tree" in check_of(found, "guest_memfd/default/init_shared").result


def test_no_direct_map(probed: Any) -> None:
    assert check_of(probed(Kernel(errno.EBADF)), "guest_memfd/default/no_direct_map")[2] == FAIL
    check = check_of(probed(Kernel(errno.EBADF, flags=7)), "guest_memfd/default/no_direct_map")
    assert (check.status, check.tried) == (PASS, "KVM_CREATE_GUEST_MEMFD(flags 0x7)")
    assert "HUGETLB or HUGE_PAGES" in check.result
    check = check_of(probed(Kernel(errno.EBADF, flags=4)), "guest_memfd/default/no_direct_map")
    assert (check.status, check.tried) == (PASS, "KVM_CREATE_GUEST_MEMFD(flags 0x4)")


@pytest.mark.parametrize(
    ("in_place", "status", "result"),
    [
        ((errno.ENOTTY, 0), FAIL, "ENOTTY"),
        ((errno.EINVAL, errno.EINVAL), FAIL, "EINVAL"),
        ((errno.EINVAL, 0), PASS, "to shared and to private"),
        (
            (0, 0),
            FAIL,
            "accepted a flag that does not exist: the kernel is newer than this kvmpriv",
        ),
        ((errno.EINVAL, errno.EAGAIN), FAIL, "EAGAIN"),
        ((errno.ENOMEM, 0), SKIP, "ENOMEM, undecided"),
        ((errno.EINVAL, errno.ENOMEM), SKIP, "ENOMEM, undecided"),
    ],
)
def test_in_place(probed: Any, in_place: tuple[int, int], status: str, result: str) -> None:
    kernel = Kernel(errno.EBADF, in_place=in_place)
    check = check_of(probed(kernel), "guest_memfd/default/in_place")
    assert (check.status, check.result) == (status, result)
    converted = [call[1:] for call in kernel.calls if call[0] == "attributes2"]
    if status == PASS:
        assert converted == [(4096, 4096, 0, 0), (4096, 4096, 8, 0)]
    if in_place == (errno.EINVAL, errno.EINVAL):
        assert "no private memory" in check.hint
    if in_place == (errno.EINVAL, errno.EAGAIN):
        assert "probe again" in check.hint


def test_in_place_where_vms_are_not_converted(probed: Any) -> None:
    """The verdict of its own; the number of its capability is shown, and decides none."""
    refused = {"attributes": errno.ENOTTY}
    types = {gmem.KVM_CAP_VM_TYPES: 3}
    found = probed(Kernel(errno.EBADF, types, refused, in_place=(errno.EINVAL, 0)))
    assert (found.verdict, found.exit_status) == ("guest_memfd in place", 0)
    assert check_of(found, "guest_memfd/sw_protected/in_place").asked == ()
    for answer, verdict in ((errno.EINVAL, "in place"), (errno.ENOTTY, "shared only")):
        kernel = Kernel(errno.EBADF, types | {252: 8}, refused, in_place=(answer, 0))
        found = probed(kernel)
        assert found.verdict == f"guest_memfd {verdict}"
        check = check_of(found, "guest_memfd/sw_protected/in_place")
        assert check.asked == (("capability 252", 8, 8),)
        assert ("something else" in check.hint) == (answer == errno.ENOTTY)
    found = probed(Kernel(errno.EBADF, types, in_place=(errno.EINVAL, 0)))
    assert found.verdict == "guest_memfd private", "a kernel that converts both has the older one"


def test_in_place_by_what_is_newer_or_older(probed: Any) -> None:
    """A kernel that uses reserved words, and the first posting, whose ioctl has another number."""
    kernel = Kernel(errno.EBADF, in_place=(errno.EINVAL, 0), reserved=7)
    check = check_of(probed(kernel), "guest_memfd/default/in_place")
    assert check.status == PASS
    assert check.result.endswith("reserved words: the kernel is newer than this kvmpriv")
    kernel = Kernel(errno.EBADF, other_ioctls={0xC080AED6: errno.EINVAL})
    check = check_of(probed(kernel), "guest_memfd/default/in_place")
    assert (check.status, check.result) == (FAIL, "ENOTTY")
    assert "first posting" in check.hint


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (None, "no release up to Linux 7.3 has"),
        ("N", "is N: boot with kvm.gmem_in_place_conversion=1"),
        ("Y", "is Y: boot with"),
    ],
)
def test_the_parameter_of_in_place(
    probed: Any, monkeypatch: pytest.MonkeyPatch, parameter: str | None, words: str
) -> None:
    """The hint follows from the parameter, and where it is off a note says so; no verdict does."""
    if parameter:
        name = "kvm.gmem_in_place_conversion"
        monkeypatch.setitem(FACTS, "parameters", {name: parameter})
    found = probed(Kernel(errno.EBADF, refusals={"attributes": errno.ENOTTY}))
    assert found.verdict == "guest_memfd shared only"
    assert words in check_of(found, "guest_memfd/default/in_place").hint
    assert any("switched off" in note for note in found.notes) == (parameter == "N")
    hint = check_of(found, "guest_memfd/default/conversion").hint
    assert ("not the VM is converted but the file" in hint) == (parameter == "Y")


def test_hole_and_hypercall(probed: Any) -> None:
    kernel = Kernel(errno.EBADF)
    found = probed(kernel)
    assert check_of(found, "guest_memfd/default/punch_hole").status == PASS
    assert check_of(found, "guest_memfd/default/hypercall").status == PASS
    assert ("enable_cap", 201, 1 << 12) in kernel.calls
    assert ("punch_hole", 4096, 4096) in kernel.calls
    refusals = {"punch_hole": errno.EOPNOTSUPP, "enable_cap": errno.EINVAL}
    found = probed(Kernel(errno.EBADF, refusals=refusals))
    assert check_of(found, "guest_memfd/default/punch_hole").status == FAIL
    assert check_of(found, "guest_memfd/default/hypercall").status == FAIL


def test_userfault(probed: Any) -> None:
    found = probed(Kernel(errno.EBADF))
    assert check_of(found, "guest_memfd/default/userfault").status == FAIL
    found = probed(Kernel(errno.EBADF, ioctls=[gmem.KVM_SET_USER_MEMORY_REGION2]))
    assert check_of(found, "guest_memfd/default/userfault").status == PASS


@pytest.mark.parametrize(
    ("inode", "status", "words"),
    [
        ((0x09041934, "anon_inode:[kvm-gmem]"), PASS, "6.8 to 6.18"),
        ((0x474D454D, "/[kvm-gmem] (deleted)"), PASS, "Linux 7.3"),
        ((0x474D454D, "anon_inode:[kvm-gmem]"), FAIL, "neither"),
        ((-1, "ENOENT"), FAIL, "neither"),
    ],
)
def test_inode(probed: Any, inode: tuple[int, str], status: str, words: str) -> None:
    """A file of its own for each VM type; the inode is looked at once."""
    types = {gmem.KVM_CAP_VM_TYPES: 3}
    found = probed(Kernel(errno.EBADF, types, inode=inode))
    assert [check.status for check in found.checks if check.name == "tree/inode"] == [status]
    assert words in check_of(found, "tree/inode").result
    assert any("this kernel is patched" in note for note in found.notes) == (status == FAIL)


def test_create_flags_of_other_trees(probed: Any) -> None:
    assert check_of(probed(Kernel(errno.EBADF)), "tree/create_flags").status == PASS
    found = probed(Kernel(errno.EBADF, flags=3 | 1 << 3 | 1 << 4))
    check = check_of(found, "tree/create_flags")
    assert (check.status, check.result) == (FAIL, "accepted 1<<3 (WRITE), 1<<4 (unknown)")
    assert any("1<<3 (WRITE)" in note for note in found.notes)
    refused = {"guest_memfd": errno.ENOTTY}
    names = {check.name for check in probed(Kernel(errno.EBADF, refusals=refused)).checks}
    assert "tree/create_flags" not in names


def test_capabilities_of_other_trees(probed: Any) -> None:
    assert check_of(probed(Kernel(errno.EBADF)), "tree/capabilities").status == PASS
    found = probed(Kernel(errno.EBADF, {245: 1, 246: 2, 249: 8}))
    check = check_of(found, "tree/capabilities")
    assert check.status == FAIL
    assert check.result.split(", 2")[0] == "245 = 1 (USERFAULT in patched kernels)"
    assert "246 = 2 (ASYNC_PF_USERFAULT or in-place conversion v1 in" in check.result
    assert "249 = 8 (in-place conversion v2 to v8, or arm CCA in" in check.result
    assert len(found.notes) == 1


def test_inode_of_a_real_file(tmp_path: Path) -> None:
    """`_inode` itself, which the simulated kernels replace."""
    with (tmp_path / "file").open("wb") as file:
        magic, link = inode(file.fileno())
        assert link == str(tmp_path / "file")
        assert magic > 0
    assert inode(1 << 20) == (-errno.EBADF, "ENOENT")
