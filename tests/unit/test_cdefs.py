"""The ABI as kvmpriv declares it, against literals, a C compiler, the system's headers and BTF."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest

from conftest import ROOT
from kvmpriv import declare, uapi
from kvmpriv.cdefs import enums, named
from kvmpriv.cdefs.exit_reason import ExitReason
from private.support.requirements import missing

from . import abi, layouts

#: Header -> its namespace, and the literals of its structs.
NAMESPACES: dict[str, tuple[ModuleType, dict[str, layouts.Layout]]] = {
    path.stem: (getattr(uapi, path.stem), getattr(layouts, path.stem.upper(), {}))
    for path in sorted((ROOT / "cdefs").glob("*.h"))
}

#: Fields that a newer kernel has under another name.
RENAMED = {
    "kvm_run": {
        "immediate_exit",  # commit 4b23e0c199b2 ("KVM: Ensure new code that references
        # immediate_exit gets extra scrutiny"): immediate_exit__unsafe, in the kernel only
        "hypercall.longmode",  # commit e65733b5c59a ("KVM: x86: Redefine 'longmode' as a flag for
        "hypercall.pad",  # KVM_EXIT_HYPERCALL"): the two are flags now
    },
}


def constants(namespace: ModuleType) -> dict[str, int]:
    return {name: value for name, value in vars(namespace).items() if isinstance(value, int)}


@pytest.fixture(params=NAMESPACES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_struct_has_its_literal_layout(name: str) -> None:
    namespace, literal = NAMESPACES[name]
    ours = abi.layouts(namespace.ffi)
    if namespace is not uapi.kvm:
        ours = {struct: layout for struct, layout in ours.items() if struct not in layouts.KVM}
    assert ours == literal


def test_a_compiler_reads_our_headers_alike(name: str, tmp_path: Path) -> None:
    namespace, literal = NAMESPACES[name]
    ours = constants(namespace)
    # What is defined by <linux/…> already would hide ours; the compiler would say so.
    structs, values = abi.ask_compiler([f'"{ROOT / "cdefs" / name}.h"'], literal, ours, tmp_path)
    assert structs == literal
    assert values == ours


def test_the_system_headers_agree(tmp_path: Path) -> None:
    structs, values = abi.ask_compiler(
        ["<linux/kvm.h>", "<linux/kvm_para.h>"], layouts.KVM, constants(uapi.kvm), tmp_path
    )
    assert structs == layouts.KVM
    assert len(values) > 150, "the system's headers know most of the shared core"
    assert values == {key: constants(uapi.kvm)[key] for key in values}


def test_the_running_kernel_agrees() -> None:
    if not abi.VMLINUX_BTF.exists():
        missing("btf", f"the running kernel has no {abi.VMLINUX_BTF}")
    try:
        btf = abi.Btf()
    except FileNotFoundError as error:
        missing("btf", str(error))
    compared = 0
    for namespace, literal in NAMESPACES.values():
        if namespace in (uapi.restrictedmem, uapi.restrictedmem_v10, uapi.unmerged):
            continue  # a mainline kernel may use their names for something else
        for struct, (size, fields) in literal.items():
            theirs = btf.layout(struct)
            if theirs is None:
                continue
            compared += 1
            known = {field: at for field, at in fields.items() if field in theirs[1]}
            if struct != "kvm_stats_desc":  # newer kernels give name[] its length, inside only
                assert theirs[0] == size, struct
            assert known == {field: theirs[1][field] for field in known}, struct
            assert fields.keys() - known.keys() <= RENAMED.get(struct, set()), struct
    if compared == 0:
        missing("btf", "the running kernel's BTF has no struct of KVM's (KVM is a module?)")
    assert compared > 10


# The numbers in which the ABIs differ, as literals: nothing computes them here.
@pytest.mark.parametrize(
    ("namespace", "constant", "value"),
    [
        (uapi.kvm, "KVM_SET_USER_MEMORY_REGION", 0x4020AE46),
        (uapi.kvm, "KVM_MEMORY_ENCRYPT_REG_REGION", 0x8010AEBB),
        (uapi.kvm, "KVM_MEMORY_ENCRYPT_UNREG_REGION", 0x8010AEBC),
        (uapi.kvm, "KVM_RUN", 0xAE80),
        (uapi.kvm, "KVM_CHECK_EXTENSION", 0xAE03),
        (uapi.kvm, "KVM_CAP_EXIT_HYPERCALL", 201),
        (uapi.kvm, "KVM_HC_MAP_GPA_RANGE", 12),
        (uapi.kvm, "KVM_MAP_GPA_RANGE_ENCRYPTED", 16),
        (uapi.kvm, "KVM_EXIT_HYPERCALL", 3),
        (uapi.kvm, "KVM_MEM_LOG_DIRTY_PAGES", 1),
        (uapi.kvm, "KVM_MEM_READONLY", 2),
        (uapi.restrictedmem, "__NR_memfd_restricted", 451),
        (uapi.restrictedmem, "RESTRICTEDMEM_MAGIC", 0x5245534D),
        (uapi.restrictedmem, "KVM_CAP_PRIVATE_MEM", 224),
        (uapi.restrictedmem, "KVM_MEM_PRIVATE", 4),
        (uapi.restrictedmem, "KVM_EXIT_MEMORY_FAULT", 38),
        (uapi.restrictedmem, "KVM_MEMORY_EXIT_FLAG_PRIVATE", 1),
        (uapi.restrictedmem_v10, "KVM_CAP_MEMORY_ATTRIBUTES", 225),
        (uapi.restrictedmem_v10, "KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES", 0x8008AED2),
        (uapi.restrictedmem_v10, "KVM_SET_MEMORY_ATTRIBUTES", 0xC020AED3),
        (uapi.restrictedmem_v10, "KVM_MEMORY_ATTRIBUTE_PRIVATE", 8),
        (uapi.guest_memfd, "KVM_CREATE_GUEST_MEMFD", 0xC040AED4),
        (uapi.guest_memfd, "KVM_SET_USER_MEMORY_REGION2", 0x40A0AE49),
        (uapi.guest_memfd, "KVM_SET_MEMORY_ATTRIBUTES", 0x4020AED2),
        (uapi.guest_memfd, "KVM_SET_MEMORY_ATTRIBUTES2", 0xC080AED2),
        (uapi.guest_memfd, "KVM_SET_MEMORY_ATTRIBUTES2_V1", 0xC080AED6),
        (uapi.guest_memfd, "GUEST_MEMFD_MAGIC", 0x474D454D),
        (uapi.guest_memfd, "GUEST_MEMFD_FLAG_NO_DIRECT_MAP", 4),
        (uapi.guest_memfd, "KVM_MEM_USERFAULT", 8),
        (uapi.unmerged, "GUEST_MEMFD_FLAG_HUGETLB", 4),
        (uapi.unmerged, "GUEST_MEMFD_FLAG_HUGE_PAGES", 4),
        (uapi.unmerged, "GUEST_MEMFD_FLAG_WRITE", 8),
        (uapi.unmerged, "FIRECRACKER_FLAG_NO_DIRECT_MAP", 2),
        (uapi.unmerged, "KVM_MEMORY_EXIT_FLAG_USERFAULT", 16),
        (uapi.unmerged, "KVM_MEMORY_EXIT_FLAG_APF", 32),
        (uapi.unmerged, "KVM_CAP_USERFAULT", 245),
        (uapi.unmerged, "KVM_CAP_ASYNC_PF_USERFAULT", 246),
        (uapi.unmerged, "KVM_CAP_ASYNC_PF_USERFAULT_EVENTFD", 247),
        (uapi.unmerged, "IN_PLACE_V1_CAP", 246),
        (uapi.unmerged, "IN_PLACE_V2_CAP_FIRST", 248),
        (uapi.unmerged, "IN_PLACE_V8_CAP_LAST", 251),
        (uapi.unmerged, "KVM_ASYNC_PF_NR", 0xD6),
        (uapi.guest_memfd, "KVM_PRE_FAULT_MEMORY", 0xC040AED5),
        (uapi.guest_memfd, "KVM_MEM_GUEST_MEMFD", 4),
        (uapi.guest_memfd, "KVM_CAP_USER_MEMORY2", 231),
        (uapi.guest_memfd, "KVM_CAP_MEMORY_FAULT_INFO", 232),
        (uapi.guest_memfd, "KVM_CAP_MEMORY_ATTRIBUTES", 233),
        (uapi.guest_memfd, "KVM_CAP_GUEST_MEMFD", 234),
        (uapi.guest_memfd, "KVM_CAP_VM_TYPES", 235),
        (uapi.guest_memfd, "KVM_CAP_PRE_FAULT_MEMORY", 236),
        (uapi.guest_memfd, "KVM_CAP_GUEST_MEMFD_FLAGS", 244),
        (uapi.guest_memfd, "KVM_MEMORY_ATTRIBUTE_PRIVATE", 8),
        (uapi.guest_memfd, "GUEST_MEMFD_FLAG_MMAP", 1),
        (uapi.guest_memfd, "GUEST_MEMFD_FLAG_INIT_SHARED", 2),
        (uapi.guest_memfd, "KVM_EXIT_MEMORY_FAULT", 39),
        (uapi.guest_memfd, "KVM_MEMORY_EXIT_FLAG_PRIVATE", 8),
        (uapi.guest_memfd, "KVM_X86_SW_PROTECTED_VM", 1),
    ],
)
def test_number(namespace: ModuleType, constant: str, value: int) -> None:
    assert getattr(namespace, constant) == value


def test_memory_fault_is_kvm_runs_union() -> None:
    run = layouts.KVM["kvm_run"]
    assert run[1]["hw.hardware_exit_reason"] == 32
    assert run[1]["hypercall.ret"] == 88
    assert run[0] == 2352


def test_the_generated_modules_are_current() -> None:
    for script in ("cdefs.py", "guests.py"):
        check = subprocess.run(
            [sys.executable, ROOT / "scripts/generate" / script, "--check"],
            capture_output=True,
            text=True,
        )
        assert check.returncode == 0, check.stderr


def test_declare_reads_our_own_headers_alike(name: str) -> None:
    """declare() of a whole header gives what was generated from it."""
    text = (ROOT / "cdefs" / f"{name}.h").read_text()
    declared = declare(text)
    namespace, literal = NAMESPACES[name]
    assert declared.constants == constants(namespace)
    assert {key: abi.layouts(declared.ffi)[key] for key in literal} == literal


def fields_of(kind: Any) -> set[str]:
    """The fields of a cffi struct, those of parts without a name included."""
    return {
        inner
        for name, field in kind.fields
        for inner in ([name] if name else fields_of(field.type))
    }


def test_every_struct_has_a_protocol_with_its_fields(name: str) -> None:
    namespace, literal = NAMESPACES[name]
    protocols = importlib.import_module(f"kvmpriv.cdefs.{name}_structs")
    for struct in literal:
        known = set(get_type_hints(vars(protocols)[struct]))
        assert known == fields_of(namespace.ffi.typeof(f"struct {struct}")), struct


def test_every_enum_member_is_a_constant_of_a_header() -> None:
    values: dict[str, set[int]] = {}
    for namespace, _ in NAMESPACES.values():
        for constant, value in constants(namespace).items():
            values.setdefault(constant, set()).add(value)
    for kind in (ExitReason, *(getattr(enums, name) for name in enums.__all__)):
        for member in kind.__members__.values():
            if issubclass(kind, named.NamedInt):
                assert member in values[str(member)], member
            else:
                assert member in values[f"KVM_MEM_{member.name}"], member
    shown = {str(reason) for reason in ExitReason}
    every = {key for key in values if key.startswith("KVM_EXIT_")}
    assert shown == {key for key in every if not key.startswith("KVM_EXIT_IO_")}
