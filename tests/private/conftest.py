"""Marks, hooks and fixtures of the tests of private memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

import kvmpriv
from kvmpriv import HostMemory, Kvm, Vm, private
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.private import PrivateVm
from kvmpriv.private.guest_memfd import GuestMemfd
from kvmpriv.private.restrictedmem import RestrictedMem
from kvmpriv.selftest.kernel_log import TAINT, KernelLog

from .support import fixtures
from .support.arch_hook import HOOK, hook
from .support.behaviour import behaviour_of
from .support.defect_detectors import detect
from .support.defects import DEFECTS, known_defect
from .support.kernels import (
    FIXED,
    KERNEL,
    VM_TYPES,
    MakeVm,
    accepts_private_slots,
    can_convert,
    require_guest_memfd,
    require_private_slots,
    require_v9,
    takes_guest_memfd,
)
from .support.requirements import check_required, missing
from .support.rig import MakeRig, Rig
from .support.slot_requests import GuestMemfdSlots, RestrictedSlots
from .support.syscalls import PAGE

KERNEL_LOG = KernelLog()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--dangerous",
        action="store_true",
        help="also run tests that crash or hang a kernel with the defect that they meet",
    )


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "rule(*ids): the rules of the kernel's ABI that the test checks",
        "known_defect(*names): on a kernel with one of these defects the test fails as that",
        "dangerous(why, safe=()): runs with --dangerous, on fixed kernels and on those in `safe`",
        "converts: is not run for types of VMs that can't convert, if another type can",
    ):
        config.addinivalue_line("markers", line)
    check_required()
    if not config.pluginmanager.is_registered(fixtures):  # the checkout's conftest did it already
        config.pluginmanager.register(fixtures)


def pytest_report_header() -> list[str]:
    return [note] if (note := KERNEL_LOG.unseen()) else []


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before the fixtures do: then all tests that lack the same are skipped with the same words.
    wants, params = getattr(item, "fixturenames", ()), _params(item)
    if "v9" in wants or "restrictedmem" in (params.get("make_rig"), params.get("abi")):
        require_v9()
    if "guest_memfd_kvm" in wants:
        require_guest_memfd()
    mark = item.get_closest_marker("dangerous")
    safe = FIXED or (mark and KERNEL in mark.kwargs.get("safe", ()))
    if mark and not safe and not item.config.getoption("dangerous", default=False):
        missing("dangerous", f"{mark.args[0]} (--dangerous runs it)")


def _params(item: pytest.Item) -> dict[str, object]:
    """The parameters of a test, by name."""
    return cast("pytest.Function", item).callspec.params if hasattr(item, "callspec") else {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out tests that have no meaning for a parameter.

    They are about two memories for ABIs that have one, or convert memory of VMs that can't.
    """
    converting = {number for number in VM_TYPES.values() if can_convert(number)}

    def has_meaning(item: pytest.Item) -> bool:
        converts = "attributes_vm" in getattr(item, "fixturenames", ())
        if (converts or item.get_closest_marker("converts")) and converting:
            return _params(item).get("vm_type") in converting
        if item.get_closest_marker("two_backings") is None:
            return True
        return private.ABIS[str(_params(item)["make_rig"])].traits.backings == 2

    items[:] = filter(has_meaning, items)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    names = [name for mark in pyfuncitem.iter_markers("known_defect") for name in mark.args]
    if not names or FIXED or not accepts_private_slots():
        return
    for name in names:
        if why := DEFECTS[name].dangerous:
            if not pyfuncitem.config.getoption("dangerous", default=False):
                missing("dangerous", f"known defect {name}: {why} (--dangerous runs it)")
            continue
        try:
            seen = detect(name)
        except pytest.skip.Exception:  # the detector lacks something, and so does the defect
            continue
        if seen:
            known_defect(name, seen)


@pytest.fixture(autouse=True)
def untainted() -> Iterator[None]:
    """Fail the test during which the kernel reported a WARN, a BUG or a sanitizer's finding.

    A taint is set once for each kind of report; the log has all of them.
    """
    before = TAINT.read_bytes()
    KERNEL_LOG.mark()
    yield
    complaints = KERNEL_LOG.complaints()
    assert not complaints, f"the kernel complained: {complaints[0]}"
    assert TAINT.read_bytes() == before, "the kernel complained: see its log"


# -- v9 ------------------------------------------------------------------------------------------


@pytest.fixture
def v9() -> None:
    """The running kernel has memfd_restricted(2)."""
    require_v9()


@pytest.fixture
def file(v9: None) -> Iterator[RestrictedMem]:
    """A restrictedmem file without a size."""
    with RestrictedMem() as made:
        yield made


@pytest.fixture
def make_private_vm(v9: None, kvm: Kvm) -> Iterator[MakeVm]:
    """Make VMs that accept KVM_MEM_PRIVATE."""
    with ExitStack() as stack:

        def make() -> PrivateVm:
            with hook(on=True):
                return stack.enter_context(private.ABIS["restrictedmem"].create_vm(kvm))

        require_private_slots(kvm)
        yield make


@pytest.fixture
def private_vm(make_private_vm: MakeVm) -> PrivateVm:
    """A VM that accepts KVM_MEM_PRIVATE."""
    return make_private_vm()


@pytest.fixture
def refusing_vm(v9: None, kvm: Kvm) -> Iterator[Vm]:
    """A VM that the arch hook refuses, on a kernel that has v9."""
    with hook(on=False), kvm.create_vm() as vm, RestrictedMem() as file:
        if RestrictedSlots(vm, file, 0).set() == "ok":
            assert not HOOK.exists(), f"{HOOK.name} is off, and the VM accepts KVM_MEM_PRIVATE"
            missing("refusing-vm", f"this kernel has no {HOOK.name}")
        yield vm


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    """Host memory of 1 MiB."""
    with HostMemory(256 * PAGE) as made:
        yield made


@pytest.fixture
def slots(private_vm: Vm, file: RestrictedMem, memory: HostMemory) -> RestrictedSlots:
    """Slot requests to a VM that accepts KVM_MEM_PRIVATE."""
    return RestrictedSlots(private_vm, file, memory.userspace_addr)


@pytest.fixture
def refused_slots(refusing_vm: Vm, file: RestrictedMem, memory: HostMemory) -> RestrictedSlots:
    """Slot requests to a VM that the arch hook refuses."""
    return RestrictedSlots(refusing_vm, file, memory.userspace_addr)


# -- by any ABI ------------------------------------------------------------------------------------


@pytest.fixture(params=list(private.ABIS))
def make_rig(request: pytest.FixtureRequest, kvm: Kvm) -> Iterator[MakeRig]:
    """Make rigs, by each ABI that the kernel has; `kind`: a subclass of Rig."""
    abi = private.ABIS[request.param]
    behaviour_of(abi).require(kvm)
    with ExitStack() as stack:

        def make(kind: type[Rig] = Rig, **how: Any) -> Rig:
            with hook(on=True):
                vm = stack.enter_context(abi.create_vm(kvm))
            return kind(stack, vm, kvm, **how)

        yield cast("MakeRig", make)


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    """A rig of one vCPU."""
    return make_rig()


# -- guest_memfd ---------------------------------------------------------------------------------


@pytest.fixture
def guest_memfd_kvm(kvm: Kvm) -> Kvm:
    """A KVM in which some type of VM takes guest_memfd slots."""
    require_guest_memfd()
    return kvm


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by the VM types that can be made, or that take guest_memfd slots."""
    if "vm_type" in metafunc.fixturenames:
        least = 0 if "gm_vm" not in metafunc.fixturenames else 1
        types = {name: n for name, n in VM_TYPES.items() if takes_guest_memfd(n) >= least}
        # If there is none, require_guest_memfd skips the test.
        metafunc.parametrize("vm_type", types.values() or [0], ids=types or ["none"])


@pytest.fixture
def any_vm(vm_type: int, guest_memfd_kvm: Kvm) -> Iterator[Vm]:
    """A VM of each type, on a KVM that has guest_memfd."""
    with guest_memfd_kvm.create_vm(vm_type) as vm:
        yield vm


@pytest.fixture
def gm_vm(any_vm: Vm) -> Vm:
    """A VM of each type that takes guest_memfd slots."""
    return any_vm


@pytest.fixture
def gm_file(gm_vm: Vm) -> Iterator[GuestMemfd]:
    """A guest_memfd file of 1 MiB."""
    with GuestMemfd(gm_vm, 256 * PAGE) as made:
        yield made


@pytest.fixture
def gm_slots(gm_vm: Vm, gm_file: GuestMemfd, memory: HostMemory) -> GuestMemfdSlots:
    """Slot requests to a VM that takes guest_memfd slots."""
    return GuestMemfdSlots(gm_vm, gm_file, memory.userspace_addr)


@pytest.fixture
def attributes_vm(gm_vm: Vm) -> Vm:
    """A VM of each type whose memory can be private."""
    if not gm_vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES) & gm.KVM_MEMORY_ATTRIBUTE_PRIVATE:
        missing("private-attribute", "KVM_CAP_MEMORY_ATTRIBUTES lacks PRIVATE for this VM type")
    return gm_vm


@pytest.fixture
def gm_vcpu(gm_vm: Vm) -> Iterator[kvmpriv.Vcpu]:
    """A vCPU that never runs, on a kernel with KVM_PRE_FAULT_MEMORY."""
    if not gm_vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
        missing("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0")
    with gm_vm.create_vcpu() as vcpu:
        yield vcpu
