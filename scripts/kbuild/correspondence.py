"""Which tests of ours check what a case of the kernel's C selftests checks.

A case is a test function of the C program, by its name; ours are ids below tests/private, one
without brackets for all its variants.
"""

from __future__ import annotations

from typing import NamedTuple

RULES, LIFETIMES = "test_guest_memfd_rules.py", "test_guest_memfd_lifetimes.py"
PEERS, SLOTS = "test_peers_guest_memfd.py", "test_peers_slots.py"
CONVERSIONS, GUESTS = "test_peers_conversions.py", "test_guests.py"


class Run(NamedTuple):
    """One run of a C program, and what corresponds to each case of it."""

    program: str
    cases: dict[str, tuple[str, ...]]
    arguments: str = ""
    pinned: bool = False

    @property
    def title(self) -> str:
        return f"{self.program} {self.arguments}".rstrip()


def operations(*names: str) -> tuple[str, ...]:
    return tuple(f"{RULES}::test_operation[sw_protected-{name}]" for name in names)


def conversions(cpus: int, slots: int) -> Run:
    """private_mem_conversions_test, whose cases are its guest's, driven by two host functions."""
    where = f"{cpus} vCPUs {slots} slots"
    explicit = tuple(
        f"{CONVERSIONS}::test_explicit_conversion[guest_memfd-{how}-{where}]"
        for how in ("on demand", "fallocate")
    )
    holes = tuple(
        f"{CONVERSIONS}::test_holes[guest_memfd-{how}-{where}]"
        for how in ("only the hole faulted in", "all of it")
    )
    return Run(
        "private_mem_conversions_test",
        {
            "guest_test_explicit_conversion": explicit,
            "guest_test_punch_hole": holes,
            "__test_mem_conversions": (*explicit, *holes),
            # Beside running the guests: to allocate and punch after the VM is gone.
            "test_mem_conversions": (f"{LIFETIMES}::test_vm_closed_before_the_file[sw_protected]",),
        },
        f"-n {cpus} -m {slots}",
    )


RUNS = (
    Run(
        "guest_memfd_test",
        {
            "test_file_read_write": operations("read", "write", "pread", "pwrite"),
            "test_mmap": operations("mmap.shared", "mmap.shared.read", "mmap.none"),
            "test_file_size": (f"{PEERS}::test_stat",),
            "test_fallocate": (
                f"{RULES}::test_modes",
                f"{RULES}::test_fallocate_alignment",
                f"{RULES}::test_beyond_the_end",
            ),
            "test_invalid_punch_hole": (f"{RULES}::test_fallocate_alignment",),
            "test_create_guest_memfd_invalid": (
                f"{RULES}::test_size",
                f"{RULES}::test_every_size_within_a_page",
                f"{RULES}::test_flags",
            ),
            "test_create_guest_memfd_multiple": (f"{RULES}::test_two_files_differ",),
        },
    ),
    Run(
        "set_memory_region_test",
        {
            "test_zero_memory_regions": (f"{SLOTS}::test_no_slot_at_all",),
            "test_invalid_memory_region_flags": (
                f"{RULES}::test_unknown_flags",
                f"{RULES}::test_the_old_ioctl",
                f"{RULES}::test_flags_beside_guest_memfd",
                "test_restrictedmem_slots.py::test_unknown_flags",
            ),
            "test_add_max_memory_regions": (f"{SLOTS}::test_as_many_slots_as_there_can_be",),
            "test_invalid_guest_memfd": (
                f"{RULES}::test_other_files",
                f"{RULES}::test_another_vms_file",
                f"{RULES}::test_every_offset_within_a_page",
            ),
            "test_add_private_memory_region": (
                f"{RULES}::test_which_vms_take_slots",
                f"{LIFETIMES}::test_file_closed_before_the_slot",
                f"{LIFETIMES}::test_vm_closed_with_slots",
            ),
            "test_add_overlapping_private_memory_regions": (
                f"{RULES}::test_guest_overlap",
                f"{RULES}::test_file_overlap",
                f"{RULES}::test_order_around_eexist",
            ),
            "test_move_memory_region": (f"{SLOTS}::test_a_slot_moved_in_use",),
            "test_delete_memory_region": (f"{SLOTS}::test_a_slot_deleted_in_use",),
        },
        pinned=True,
    ),
    conversions(1, 1),
    conversions(2, 1),
    conversions(2, 2),
    Run(
        "private_mem_kvm_exits_test",
        {
            "test_private_access_memslot_deleted": (
                f"{SLOTS}::test_a_private_slot_deleted_in_use[guest_memfd]",
            ),
            "test_private_access_memslot_not_private": (
                f"{GUESTS}::test_private_memory_without_a_slot_for_it[guest_memfd]",
            ),
        },
    ),
    Run(
        "pre_fault_memory_test",
        {
            "test_pre_fault_memory": (f"{PEERS}::test_what_was_filled_ahead_is_read",),
            "__test_pre_fault_memory": (
                f"{PEERS}::test_what_was_filled_ahead_is_read",
                f"{RULES}::test_pre_fault_without_a_slot",
            ),
        },
    ),
)

#: The message of a C program that skips -> what our tests report as missing then.
SAME_REASON = {
    r"KVM_CAP_GUEST_MEMFD|KVM_X86_SW_PROTECTED_VM|KVM_MEM_GUEST_MEMFD": ("guest_memfd",),
    r"KVM_CAP_USER_MEMORY2|vm_type": ("guest_memfd",),
    r"KVM_CAP_PRE_FAULT_MEMORY": ("pre-fault", "guest_memfd"),
}
