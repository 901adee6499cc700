"""The breaks of scripts/kernel/mutate: one line of the mended series each, made wrong.

A break replaces text that occurs exactly once in its file: what stands between « and », all of it
where there are no such marks.  Text that ends with a semicolon or a brace is a statement (replaced
by nothing, by a statement or by several), any other an expression.  `pauses` are for races: a
statement beside the broken one that waits, so that a window of microseconds can be met in bounded
time.  `tests` are tried before the rest of the suite; they are below tests/private.

What cannot be here, since nobody could see the difference:
* the copy's memset alone: uncopied bytes are read only for KVM_MEM_PRIVATE, and the recheck sees
  to it that they were copied then (`copy.recheck` is caught by what they would do);
* KVM_MEM_PRIVATE asked for beside the offset's checks: an ordinary slot's offset is not copied, 0;
* the wrap of guest_phys_addr + memory_size, and the second look at the slot's number: what gets by
  is refused a few lines on with the same EINVAL, by the largest gfn and by the first look;
* fget() for O_PATH: such a file has no operations, so that it is no restrictedmem file either;
* `end <= base` as `<`, and `first >= last` as `>`: an empty range is zapped instead of none;
* both wish bits stored instead of none: every reader takes them for none;
* clearing __GFP_MOVABLE: with the migration refused it is but where pages come from;
* a hole that begins only after its pages are freed: it shows in memory that is somebody else's;
* mend/0019, a hole refilled while it is punched: it costs time, which no test may measure;
* mend/0020 for slots that are deleted: it takes a VM that needs its first shadow page just then;
* a poisoned page: none of the kernels built here can be told to poison a page that is not mapped;
* storing attributes that fails half-way: it takes an allocation that fails (the debug kernel's
  fault injection), and since mend/0016 there is one step, which cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

RMEM = "mm/restrictedmem.c"
MIGRATE = "mm/migrate.c"
PRIVATE = "virt/kvm/private_mem.c"
KVM = "virt/kvm/kvm_main.c"
HOST = "include/linux/kvm_host.h"
MMU = "arch/x86/kvm/mmu/mmu.c"
TDP = "arch/x86/kvm/mmu/tdp_mmu.c"
X86 = "arch/x86/kvm/x86.c"

FILE = "test_restrictedmem_file.py"
SLOTS = "test_restrictedmem_slots.py"
CONVERT = "test_restrictedmem_convert.py"
LIVES = "test_restrictedmem_lifetimes.py"
MAPS = "test_restrictedmem_mappings.py"
DEFECTS = "test_defects.py"
VEHICLE = "test_restrictedmem_vehicle.py"
GUESTS = "test_guests.py"
RACES = "test_races.py"

#: The other MMU, with its reverse maps.
SHADOW = "kvm.tdp_mmu=0"


@dataclass(frozen=True)
class Edit:
    """A piece of text in a file, and what stands there instead."""

    file: str
    text: str
    broken: str


@dataclass(frozen=True)
class Break:
    """One break: its name, what it stands for, the line, and who should notice."""

    name: str
    rule: str
    line: Edit
    tests: tuple[str, ...]
    append: str = ""
    pauses: tuple[Edit, ...] = ()

    @property
    def edits(self) -> tuple[Edit, ...]:
        return (self.line, *self.pauses)


BREAKS: list[Break] = []


def _add(
    name: str,
    rule: str,
    file: str,
    text: str,
    broken: str,
    *tests: str,
    append: str = "",
    pauses: tuple[Edit, ...] = (),
) -> None:
    BREAKS.append(Break(name, rule, Edit(file, text, broken), tests, append, pauses))


def _unmarked(text: str, part: str) -> str:
    """The text with other marks: around `part`."""
    return text.replace("«", "").replace("»", "").replace(part, f"«{part}»")


# Whether what is to be set overlaps another slot, asked where it is not yet time to.
_OVERLAPS = (
    "kvm_check_memslot_overlap(__kvm_memslots(kvm, mem->slot >> 16), (u16)mem->slot, "
    "mem->guest_phys_addr >> PAGE_SHIFT, (mem->guest_phys_addr + mem->memory_size) >> PAGE_SHIFT)"
)

# -- memfd_restricted(2) --------------------------------------------------------------------------

_add(
    "syscall.flags", "memfd_restricted: flags other than 0 are EINVAL",
    RMEM, "if («flags»)\n\t\treturn -EINVAL;", "0",
    f"{FILE}::test_flags",
)  # fmt: skip
_add(
    "syscall.flags-high", "memfd_restricted: each of 32 flags",
    RMEM, "if («flags»)\n\t\treturn -EINVAL;", "flags & 0xffff",
    f"{FILE}::test_flags",
)  # fmt: skip
_add(
    "syscall.flags-width", "memfd_restricted: only 32 bits of the flags count",
    RMEM, "if («flags»)\n\t\treturn -EINVAL;", "current_pt_regs()->di",
    f"{FILE}::test_only_32_bits_of_the_flags_count",
)  # fmt: skip
_add(
    "syscall.order-emfile", "memfd_restricted: EINVAL before EMFILE",
    RMEM, "«if (flags)\n\t\treturn -EINVAL;»\n\n\tfd = get",
    "fd = get_unused_fd_flags(0);"
    "if (fd < 0) return fd; put_unused_fd(fd); if (flags) return -EINVAL;",
    f"{FILE}::test_flags_come_before_emfile",
)  # fmt: skip
_add(
    "syscall.order-enfile", "memfd_restricted: EINVAL before ENFILE",
    RMEM, "«if (flags)\n\t\treturn -EINVAL;»\n\n\tfd = get",
    "file = restrictedmem_file_create();"
    "if (IS_ERR(file)) return PTR_ERR(file); fput(file); if (flags) return -EINVAL;",
    f"{FILE}::test_flags_come_before_enfile",
)  # fmt: skip
_add(
    "syscall.cloexec", "memfd_restricted: the fd is not close-on-exec",
    RMEM, "get_unused_fd_flags(«0»)", "O_CLOEXEC",
    f"{FILE}::test_not_close_on_exec",
)  # fmt: skip
_add(
    "file.status-flags", "the file: F_GETFL 0x8002",
    RMEM, "O_RDWR | O_LARGEFILE", "O_RDWR",
    f"{FILE}::test_identity",
)  # fmt: skip
_add(
    "file.magic", "the file: RESTRICTEDMEM_MAGIC",
    RMEM, "init_pseudo(fc, «RESTRICTEDMEM_MAGIC»)", "TMPFS_MAGIC",
    f"{FILE}::test_identity",
)  # fmt: skip
_add(
    "file.name", "the file: readlink says /restrictedmem",
    RMEM, 'restrictedmem_mnt, «"restrictedmem"»', '"memfd:restrictedmem"',
    f"{FILE}::test_identity",
)  # fmt: skip
_add(
    "file.positioned", "the file: pread, pwrite, lseek are ESPIPE",
    RMEM, "«fd_install(fd, file);»", "file->f_mode |= OPEN_FMODE(O_RDWR) | FMODE_LSEEK | "
    "FMODE_PREAD | FMODE_PWRITE; fd_install(fd, file);",
    f"{FILE}::test_operation",
)  # fmt: skip
_add(
    "file.hidden", "the file: no read, no write, no mmap: the hidden file stays hidden",
    RMEM, "fd_install(fd, «file»);", "get_file(to_restrictedmem(file)->backing)",
    f"{FILE}::test_operation",
)  # fmt: skip
_add(
    "file.noexec", "the file: PROT_EXEC is EPERM, fexecve EACCES",
    RMEM, "restrictedmem_mnt->mnt_flags |= MNT_NOEXEC;", "",
    f"{FILE}::test_operation",
)  # fmt: skip

# -- the size -------------------------------------------------------------------------------------

_add(
    "size.once", "ftruncate: the size is set once",
    RMEM, "if («i_size_read(inode)»)", "0",
    f"{FILE}::test_the_size_is_set_once",
)  # fmt: skip
_add(
    "size.once-same", "ftruncate: EPERM even to the same size",
    RMEM, "if («i_size_read(inode)»)",
    "i_size_read(inode) && i_size_read(inode) != attr->ia_size",
    f"{FILE}::test_the_size_is_set_once",
)  # fmt: skip
_add(
    "size.once-zero", "ftruncate: EPERM also to 0",
    RMEM, "if («i_size_read(inode)»)", "i_size_read(inode) && attr->ia_size",
    f"{FILE}::test_the_size_is_set_once",
)  # fmt: skip
_add(
    "size.order", "ftruncate: EPERM before EINVAL",
    RMEM, "if («i_size_read(inode)»)", "i_size_read(inode) && PAGE_ALIGNED(attr->ia_size)",
    f"{FILE}::test_the_size_is_set_once",
)  # fmt: skip
_add(
    "size.aligned", "ftruncate: page aligned",
    RMEM, "!PAGE_ALIGNED(attr->ia_size)", "0",
    f"{FILE}::test_the_size_is_page_aligned",
)  # fmt: skip
_add(
    "size.notify", "mend/0009: a file emptied by ftruncate(0) is a hole of all of it",
    RMEM, "truncate = «(attr->ia_valid & ATTR_SIZE) && !attr->ia_size»;", "false",
    f"{MAPS}::test_a_file_emptied_by_its_size",
)  # fmt: skip
_add(
    "size.notify-start", "mend/0009: its begin",
    RMEM, "restrictedmem_invalidate_start(rm, 0, ULONG_MAX);", "",
    f"{MAPS}::test_a_file_emptied_by_its_size",
)  # fmt: skip
_add(
    "size.notify-end", "mend/0009: its end",
    RMEM, "restrictedmem_invalidate_end(rm, 0, ULONG_MAX);", "",
    f"{MAPS}::test_a_file_emptied_by_its_size",
)  # fmt: skip

# -- fallocate ------------------------------------------------------------------------------------

_add(
    "fallocate.hole-offset", "PUNCH_HOLE: the offset is page aligned",
    RMEM, "if («!PAGE_ALIGNED(offset)» || !PAGE_ALIGNED(len))", "0",
    f"{FILE}::test_holes_are_page_aligned",
)  # fmt: skip
_add(
    "fallocate.hole-length", "PUNCH_HOLE: the length is page aligned",
    RMEM, "if (!PAGE_ALIGNED(offset) || «!PAGE_ALIGNED(len)»)", "0",
    f"{FILE}::test_holes_are_page_aligned",
)  # fmt: skip
_ALLOCATED = "return rm->backing->f_op->fallocate(rm->backing, mode, offset, len);"
_ALLOCATE = "know. */\n\treturn rm->backing->f_op->fallocate(rm->backing, «mode», offset, len);"
_add(
    "fallocate.grows", "fallocate 0: grows the file",
    RMEM, _ALLOCATE, "mode | FALLOC_FL_KEEP_SIZE",
    f"{FILE}::test_allocation_sets_the_size",
)  # fmt: skip
_add(
    "fallocate.keep-size", "fallocate KEEP_SIZE: keeps the size",
    RMEM, _ALLOCATE, "mode & ~FALLOC_FL_KEEP_SIZE",
    f"{FILE}::test_allocation_that_keeps_the_size",
)  # fmt: skip
_add(
    "fallocate.modes", "fallocate: other modes are EOPNOTSUPP",
    RMEM, _ALLOCATE, "mode & FALLOC_FL_KEEP_SIZE",
    f"{FILE}::test_other_modes",
)  # fmt: skip
_add(
    "fallocate.allocates", "fallocate: allocates",
    RMEM, _unmarked(_ALLOCATE, _ALLOCATED), "return 0;",
    f"{FILE}::test_allocation_sets_the_size", f"{FILE}::test_pages",
)  # fmt: skip
_add(
    "fallocate.unaligned", "fallocate 0: alignment not checked",
    RMEM, "if («mode & FALLOC_FL_PUNCH_HOLE»)",
    "mode & FALLOC_FL_PUNCH_HOLE || !PAGE_ALIGNED(offset | len)",
    f"{FILE}::test_allocation_sets_the_size",
)  # fmt: skip

# -- the pages ------------------------------------------------------------------------------------

_add(
    "pages.unevictable", "the pages are unevictable",
    RMEM, "mapping_set_unevictable(mapping);", "",
    f"{FILE}::test_pages",
)  # fmt: skip
_add(
    "pages.freed", "the last close frees the file",
    RMEM, "fput(rm->backing);", "",
    f"{FILE}::test_pages",
)  # fmt: skip
_add(
    "pages.stat", "defect 9, mend/0001: fstat asks shmem for shmem's own file",
    RMEM, "getattr(mnt_userns, «&rm->backing->f_path», stat", "path",
    f"{FILE}::test_stat",
)  # fmt: skip
_add(
    "pages.stat-inode", "mend/0001: the inode number is the shell's",
    RMEM, "stat->ino = shell->i_ino;", "",
    f"{MAPS}::test_the_file_that_stat_tells_of",
)  # fmt: skip
_add(
    "pages.stat-device", "mend/0001: the device is the shell's",
    RMEM, "stat->dev = shell->i_sb->s_dev;", "",
    f"{MAPS}::test_the_file_that_stat_tells_of",
)  # fmt: skip
_add(
    "pages.zeroed", "defect 11, mend/0005: fresh pages are zeroed",
    RMEM, "clear_highpage(folio_page(folio, i));", "",
    f"{GUESTS}::test_fresh_private_pages_are_zero",
)  # fmt: skip
_add(
    "pages.zeroed-once", "mend/0005: and only fresh ones",
    RMEM, "if («!folio_test_uptodate(folio)»)", "true",
    f"{GUESTS}::test_private_and_shared_are_two_memories",
)  # fmt: skip
_add(
    "pages.zeroed-all", "mend/0005: all pages of a large folio",
    RMEM, "i < «folio_nr_pages(folio)»; i++", "1",
    f"{MAPS}::test_fresh_large_pages_are_zero",
)  # fmt: skip
_add(
    "pages.migration", "defect 9, mend/0006: pages are not migrated",
    RMEM, "mapping_set_unmovable(mapping);", "",
    f"{DEFECTS}::test_known_defect[pages-migrate]",
)  # fmt: skip
_add(
    "pages.migration-refused", "mend/0006: migration heeds it",
    MIGRATE, "else if («mapping_unmovable(mapping)»)", "0",
    f"{DEFECTS}::test_known_defect[pages-migrate]",
)  # fmt: skip
_add(
    "pages.dirty", "mend/0007: pages handed out are dirty, dropping caches frees none",
    RMEM, "folio_mark_dirty(folio);", "",
    f"{DEFECTS}::test_known_defect[drop-caches]",
)  # fmt: skip
_add(
    "pages.beyond-size", "mend/0008: a large folio that is split loses nothing beyond the size",
    RMEM, "«restrictedmem_keep_beyond_size(backing);»\n\n\tmutex_init", "",
    f"{MAPS}::test_a_hole_in_a_large_page",
)  # fmt: skip
_add(
    "pages.beyond-size-again", "mend/0008, 0009: nor after ftruncate(0)",
    RMEM, "restrictedmem_keep_beyond_size(rm->backing);", "",
    f"{MAPS}::test_a_hole_in_a_large_page",
)  # fmt: skip

# -- capability, hook, vehicle --------------------------------------------------------------------

_CAP = "case KVM_CAP_PRIVATE_MEM:\n#endif\n\t\t«return 1;»"
_add(
    "cap.absent", "KVM_CAP_PRIVATE_MEM is 1",
    KVM, _CAP, "return arg != KVM_CAP_PRIVATE_MEM;",
    f"{SLOTS}::test_capability",
)  # fmt: skip
_add(
    "cap.hook", "KVM_CAP_PRIVATE_MEM is 1 also where the hook says no",
    KVM, _CAP, "return arg != KVM_CAP_PRIVATE_MEM || !kvm || kvm_arch_has_private_mem(kvm);",
    f"{SLOTS}::test_capability",
)  # fmt: skip
_add(
    "hook.slot", "hook off: KVM_MEM_PRIVATE is EINVAL",
    KVM, "if («kvm_arch_has_private_mem(kvm)»)\n\t\tvalid_flags |=", "true",
    f"{VEHICLE}::test_the_parameter",
)  # fmt: skip
_add(
    "hook.slot-on", "hook on: KVM_MEM_PRIVATE is known",
    KVM, "if («kvm_arch_has_private_mem(kvm)»)\n\t\tvalid_flags |=", "false",
    f"{SLOTS}::test_capability",
)  # fmt: skip
_add(
    "hook.convert", "hook off: conversion is ENOTTY",
    KVM, "if («!kvm_arch_has_private_mem(kvm)») {", "false",
    f"{CONVERT}::test_where_private_is_refused",
)  # fmt: skip
_add(
    "hook.convert-on", "hook on: conversion is not SEV's",
    KVM, "if («!kvm_arch_has_private_mem(kvm)») {", "true",
    f"{CONVERT}::test_without_a_slot",
)  # fmt: skip
_add(
    "hook.wishes", "hook off: the wish bits reach no code",
    X86, "if («vcpu->kvm->arch.private_mem_testing» &&", "true",
    f"{GUESTS}::test_no_private_memory_where_the_hook_says_no",
)  # fmt: skip
_add(
    "vehicle.parameter", "the vehicle: kvm.private_mem_testing=0 turns it off",
    X86, "«READ_ONCE(private_mem_testing)» &&", "true",
    f"{VEHICLE}::test_the_parameter",
)  # fmt: skip
_add(
    "vehicle.when", "the vehicle: the parameter is read when a VM is made",
    X86, "return «kvm->arch.private_mem_testing»;", "READ_ONCE(private_mem_testing)",
    f"{VEHICLE}::test_the_parameter",
)  # fmt: skip
_add(
    "vehicle.default", "the vehicle: on by default",
    X86, "«READ_ONCE(private_mem_testing)» &&", "false",
    f"{SLOTS}::test_capability",
)  # fmt: skip

# -- check 1: the copy ----------------------------------------------------------------------------

_add(
    "copy.flags-efault", "check 1: flags that can't be read are EFAULT",
    KVM, "if (get_user(flags, &region->flags))\n\t\t«return -EFAULT;»", "return -EINVAL;",
    f"{SLOTS}::test_copied",
)  # fmt: skip
_add(
    "copy.flags-alone", "check 1: the flags are read alone, before anything else",
    KVM, "«get_user(flags, &region->flags)»",
    "(copy_from_user(mem, argp, size) ?: (flags = mem->region.flags, 0))",
    f"{SLOTS}::test_flags_that_change",
)  # fmt: skip
_add(
    "copy.160", "check 1: 160 bytes for KVM_MEM_PRIVATE",
    KVM, "if («flags & KVM_MEM_PRIVATE»)\n\t\tsize = sizeof(*mem);", "0",
    f"{SLOTS}::test_copied",
)  # fmt: skip
_add(
    "copy.160-all", "check 1: all 160 of them",
    KVM, "size = «sizeof(*mem)»;",
    "offsetofend(struct kvm_userspace_memory_region_ext, restricted_fd)",
    f"{SLOTS}::test_copied",
)  # fmt: skip
_add(
    "copy.32", "check 1: else 32, a caller of the old struct has no more",
    KVM, "if («flags & KVM_MEM_PRIVATE»)\n\t\tsize = sizeof(*mem);", "1",
    f"{SLOTS}::test_copied",
)  # fmt: skip
_add(
    "copy.efault", "check 1: a copy that fails is EFAULT",
    KVM, "if (copy_from_user(mem, argp, size))\n\t\t«return -EFAULT;»", "return -EINVAL;",
    f"{SLOTS}::test_copied",
)  # fmt: skip
_RECHECK = "if («(mem->region.flags ^ flags) & KVM_MEM_PRIVATE»)\n\t\treturn -EINVAL;"
_add(
    "copy.recheck", "check 1: PRIVATE flipped between the looks is EINVAL; uncopied bytes are 0",
    KVM, _RECHECK, "0",
    f"{SLOTS}::test_flags_that_change",
)  # fmt: skip
_add(
    "copy.recheck-gained", "check 1: also when it was set",
    KVM, _RECHECK, "flags & ~mem->region.flags & KVM_MEM_PRIVATE",
    f"{SLOTS}::test_flags_that_change",
)  # fmt: skip
_add(
    "copy.recheck-lost", "check 1: also when it was cleared",
    KVM, _RECHECK, "mem->region.flags & ~flags & KVM_MEM_PRIVATE",
    f"{SLOTS}::test_flags_that_change",
)  # fmt: skip
_add(
    "copy.recheck-others", "check 1: other flags may change",
    KVM, _RECHECK, "mem->region.flags != flags",
    f"{SLOTS}::test_flags_that_change",
)  # fmt: skip
_add(
    "copy.recheck-errno", "check 1: EINVAL, not EFAULT",
    KVM, _RECHECK.replace("«", "").replace("»", "").replace("return -EINVAL;", "«return -EINVAL;»"),
    "return -EFAULT;",
    f"{SLOTS}::test_flags_that_change",
)  # fmt: skip
_add(
    "order.efault", "order: EFAULT before everything, also with the hook off",
    KVM, "r = kvm_copy_memory_region(«&mem», argp);",
    "({ u32 seen; memset(&mem, 0, sizeof(mem)); "
    "if (!kvm_arch_has_private_mem(kvm) && "
    "!get_user(seen, (u32 __user *)argp + 1) && (seen & KVM_MEM_PRIVATE)) return -EINVAL; &mem; })",
    f"{SLOTS}::test_efault_comes_first",
)  # fmt: skip

# -- checks 2 to 5 --------------------------------------------------------------------------------

_FLAGS = "if («mem->flags & ~valid_flags»)"
_add(
    "check2.unknown", "check 2: unknown flags are EINVAL",
    KVM, _FLAGS, "0",
    f"{SLOTS}::test_unknown_flags",
)  # fmt: skip
_add(
    "check2.high", "check 2: each of them",
    KVM, _FLAGS, "mem->flags & ~valid_flags & 0xffff",
    f"{SLOTS}::test_unknown_flags",
)  # fmt: skip
_add(
    "check2.readonly", "check 2: KVM_MEM_READONLY may stand beside PRIVATE",
    KVM, _FLAGS, "(mem->flags & ~valid_flags) || "
    "!(~mem->flags & (KVM_MEM_PRIVATE | KVM_MEM_READONLY))",
    f"{SLOTS}::test_flags_beside_private",
)  # fmt: skip
_add(
    "check2.dirty-log", "check 2: KVM_MEM_LOG_DIRTY_PAGES may stand beside PRIVATE",
    KVM, _FLAGS, "(mem->flags & ~valid_flags) || "
    "!(~mem->flags & (KVM_MEM_PRIVATE | KVM_MEM_LOG_DIRTY_PAGES))",
    f"{SLOTS}::test_flags_beside_private",
)  # fmt: skip
_SIZE = "if («(mem->memory_size & (PAGE_SIZE - 1))» ||"
_GPA = "if («mem->guest_phys_addr & (PAGE_SIZE - 1)»)"
_HVA = "if («(mem->userspace_addr & (PAGE_SIZE - 1))» ||"
_RANGE = "«!access_ok((void __user *)(unsigned long)mem->userspace_addr,\n\t\t\tmem->memory_size)»"
_OFFSET = "«!PAGE_ALIGNED(ext->restricted_offset)»"
_WRAP = "«ext->restricted_offset + mem->memory_size < ext->restricted_offset»"
_COUNT = "if («(mem->memory_size >> PAGE_SHIFT) > KVM_MEM_MAX_NR_PAGES»)"
_add(
    "check3.size", "check 3: memory_size is page aligned",
    KVM, _SIZE, "0",
    f"{SLOTS}::test_alignment",
)  # fmt: skip
_add(
    "check3.gpa", "check 3: guest_phys_addr is page aligned",
    KVM, _GPA, "0",
    f"{SLOTS}::test_alignment",
)  # fmt: skip
_add(
    "check3.userspace-addr", "check 3: userspace_addr is page aligned",
    KVM, _HVA, "0",
    f"{SLOTS}::test_alignment",
)  # fmt: skip
_add(
    "check3.user-range", "check 3: userspace_addr is a user range",
    KVM, _RANGE, "0",
    f"{SLOTS}::test_userspace_addr_in_user_space",
)  # fmt: skip
_add(
    "check4.offset", "check 4: restricted_offset is page aligned",
    KVM, _OFFSET, "0",
    f"{SLOTS}::test_offset_alignment",
)  # fmt: skip
_add(
    "check4.wrap", "check 4: restricted_offset + memory_size does not wrap",
    KVM, _WRAP, "0",
    f"{SLOTS}::test_offset_that_wraps",
)  # fmt: skip
_add(
    "check4.wrap-exact", "check 4: a sum of exactly 2^64 is EINVAL",
    KVM, _WRAP, "mem->memory_size && "
    "ext->restricted_offset + mem->memory_size - 1 < ext->restricted_offset",
    f"{SLOTS}::test_offset_that_wraps",
)  # fmt: skip
_add(
    "check5.number", "check 5: the slot's number",
    KVM, "if («(u16)mem->region.slot >= KVM_USER_MEM_SLOTS»)",
    "(u16)mem->region.slot > KVM_USER_MEM_SLOTS",
    f"{SLOTS}::test_slot_numbers",
)  # fmt: skip
_add(
    "check5.address-space", "check 5: the address space",
    KVM, "if («as_id >= KVM_ADDRESS_SPACE_NUM» || id >= KVM_MEM_SLOTS_NUM)\n"
    "\t\treturn -EINVAL;\n\tif (mem->guest_phys_addr +", "as_id > KVM_ADDRESS_SPACE_NUM",
    f"{SLOTS}::test_address_spaces",
)  # fmt: skip
_add(
    "check5.pages", "check 5: at most 2^31 - 1 pages",
    KVM, _COUNT, "0",
    f"{SLOTS}::test_too_many_pages",
)  # fmt: skip
_add(
    "check5.pages-exact", "check 5: 2^31 - 1 pages are fine",
    KVM, _COUNT, "(mem->memory_size >> PAGE_SHIFT) >= KVM_MEM_MAX_NR_PAGES",
    f"{SLOTS}::test_too_many_pages",
)  # fmt: skip

# -- check 6: deletion ----------------------------------------------------------------------------

_CHECK_FLAGS = "r = «check_memory_region_flags(kvm, mem)»;"
for _name, _what, _text in (
    ("size-0-flags", "flags", _CHECK_FLAGS),
    ("size-0-gpa", "guest_phys_addr", _GPA),
    ("size-0-userspace-addr", "userspace_addr", _HVA),
    ("size-0-user-range", "the user range", _RANGE),
    ("size-0-offset", "restricted_offset", _OFFSET),
):
    _check = _text[_text.index("«") + 1 : _text.index("»")]
    _add(
        f"check6.{_name}", f"check 6: deletion comes after the check of {_what}",
        KVM, _text, f"(mem->memory_size ? ({_check}) : 0)",
        f"{SLOTS}::test_checks_before_deletion",
    )  # fmt: skip
_MISSING = "if (!mem->memory_size) {\n\t\tif («!old || !old->npages»)\n\t\t\treturn -EINVAL;"
_add(
    "check6.missing", "check 6: deleting a slot that is not there is EINVAL",
    KVM, _MISSING.replace("«", "").replace("»", "").replace("return -EINVAL;", "«return -EINVAL;»"),
    "return 0;",
    f"{SLOTS}::test_deletion",
)  # fmt: skip
_add(
    "check6.fd", "check 6: the fd is not looked at",
    KVM, _MISSING, "!old || !old->npages || (mem->flags & KVM_MEM_PRIVATE && "
    "ext->restricted_fd == ~0u)",
    f"{SLOTS}::test_not_looked_at_by_deletion",
)  # fmt: skip
_add(
    "check6.addresses", "check 6: aligned addresses are not looked at",
    KVM, _MISSING, "!old || !old->npages || mem->guest_phys_addr >> PAGE_SHIFT != old->base_gfn",
    f"{SLOTS}::test_not_looked_at_by_deletion",
)  # fmt: skip

# -- check 7: immutable ---------------------------------------------------------------------------

_IMMUTABLE = "if («(mem->flags | old->flags) & KVM_MEM_PRIVATE»)"
_add(
    "check7.private", "check 7: a private slot can't be set anew",
    KVM, _IMMUTABLE, "0",
    f"{SLOTS}::test_private_slots_do_not_change",
)  # fmt: skip
_add(
    "check7.becomes-private", "check 7: PRIVATE in the new flags of an ordinary slot",
    KVM, _IMMUTABLE, "old->flags & KVM_MEM_PRIVATE",
    f"{SLOTS}::test_ordinary_slots_do_not_become_private",
)  # fmt: skip
_add(
    "check7.becomes-ordinary", "defect 5, mend/0012: a private slot set without PRIVATE",
    KVM, _IMMUTABLE, "mem->flags & KVM_MEM_PRIVATE",
    f"{SLOTS}::test_private_slots_do_not_become_ordinary",
)  # fmt: skip
_add(
    "order.immutable-overlap", "order: check 7 before EEXIST",
    KVM, _IMMUTABLE, f"((mem->flags | old->flags) & KVM_MEM_PRIVATE) && !{_OVERLAPS}",
    f"{SLOTS}::test_immutable_comes_before_eexist",
)  # fmt: skip

# -- check 8: overlap -----------------------------------------------------------------------------

_OVERLAP = "    «kvm_check_memslot_overlap(slots, id, base_gfn, base_gfn + npages)»)"
_add(
    "check8.overlap", "check 8: overlap is EEXIST",
    KVM, _OVERLAP, "0",
    f"{SLOTS}::test_overlap",
)  # fmt: skip
for _name, _first, _last in (
    ("first-page", "base_gfn + 1", "base_gfn + npages"),
    ("last-page", "base_gfn", "base_gfn + npages - 1"),
    ("page-before", "base_gfn - 1", "base_gfn + npages"),
    ("page-behind", "base_gfn", "base_gfn + npages + 1"),
):
    _add(
        f"check8.{_name}", f"check 8: overlap by exactly its pages ({_name})",
        KVM, _OVERLAP, f"kvm_check_memslot_overlap(slots, id, {_first}, {_last})",
        f"{SLOTS}::test_overlap",
    )  # fmt: skip
_add(
    "check8.errno", "check 8: EEXIST",
    KVM, "base_gfn + npages))\n\t\t«return -EEXIST;»", "return -EINVAL;",
    f"{SLOTS}::test_overlap",
)  # fmt: skip
_add(
    "check8.address-space", "check 8: only within an address space",
    KVM, _OVERLAP, "kvm_check_memslot_overlap(slots, id, base_gfn, base_gfn + npages) || "
    "kvm_check_memslot_overlap(__kvm_memslots(kvm, !as_id), id, base_gfn, base_gfn + npages)",
    f"{SLOTS}::test_no_overlap_between_address_spaces",
)  # fmt: skip
for _name, _text in (
    ("flags", _CHECK_FLAGS),
    ("size", _SIZE),
    ("gpa", _GPA),
    ("userspace-addr", _HVA),
    ("user-range", _RANGE),
    ("offset", _OFFSET),
    ("wrap", _WRAP),
    ("pages", _COUNT),
):
    _check = _text[_text.index("«") + 1 : _text.index("»")]
    _add(
        f"order.{_name}-overlap", f"order: EINVAL for {_name} before EEXIST",
        KVM, _text, f"({_OVERLAPS} ? 0 : ({_check}))",
        f"{SLOTS}::test_einval_comes_before_eexist",
    )  # fmt: skip
_add(
    "order.number-overlap", "order: EINVAL for the slot's number before EEXIST",
    KVM, "if ((u16)mem->region.slot >= KVM_USER_MEM_SLOTS)\n\t\t«return -EINVAL;»",
    f"{{ struct kvm_userspace_memory_region *m = &mem->region; "
    f"return {_OVERLAPS.replace('mem->', 'm->')} ? -EEXIST : -EINVAL; }}",
    f"{SLOTS}::test_bad_number_comes_before_eexist",
)  # fmt: skip

# -- check 9: the file ----------------------------------------------------------------------------

_add(
    "check9.closed", "check 9: an fd that is not open is EINVAL, not EBADF",
    PRIVATE, "if (!file)\n\t\t«return -EINVAL;»", "return -EBADF;",
    f"{SLOTS}::test_other_files",
)  # fmt: skip
_add(
    "check9.kind", "check 9: another kind of file is EINVAL",
    PRIVATE, "if («!file_is_restrictedmem(file)»)", "0",
    f"{SLOTS}::test_other_files",
)  # fmt: skip
_add(
    "check9.kind-errno", "check 9: EINVAL, not EBADF",
    PRIVATE, "fput(file);\n\t\t«return -EINVAL;»", "return -EBADF;",
    f"{SLOTS}::test_other_files",
)  # fmt: skip
_add(
    "check9.reference", "check 9: a file that is refused is let go of",
    PRIVATE, "«fput(file);»\n\t\treturn -EINVAL;", "",
    f"{MAPS}::test_a_file_that_is_refused_is_let_go_of",
)  # fmt: skip
_add(
    "order.overlap-file", "order: EEXIST before a bad fd",
    KVM, "base_gfn + npages))\n\t\t«return -EEXIST;»",
    "{ struct file *f = mem->flags & KVM_MEM_PRIVATE ? fget(ext->restricted_fd) : NULL; "
    "bool bad = mem->flags & KVM_MEM_PRIVATE && (!f || !file_is_restrictedmem(f)); "
    "if (f) fput(f); return bad ? -EINVAL : -EEXIST; }",
    f"{SLOTS}::test_eexist_comes_before_the_file",
)  # fmt: skip
_add(
    "unchecked.file-size", "not checked: offset + size against the file's size",
    PRIVATE, "if («!file_is_restrictedmem(file)»)",
    "!file_is_restrictedmem(file) || mem->restricted_offset == 1ULL << 40",
    f"{SLOTS}::test_the_file_size_is_not_checked",
)  # fmt: skip
_add(
    "unchecked.padding", "not checked: pad1, pad2",
    PRIVATE, "if («!file_is_restrictedmem(file)»)", "!file_is_restrictedmem(file) || mem->pad1",
    f"{SLOTS}::test_padding_is_not_checked",
)  # fmt: skip

# -- check 10: references, the notifier -----------------------------------------------------------

_add(
    "slot.reference", "check 10: the slot counts its file",
    PRIVATE, "slot->restricted_file = «file»;", "({ fput(file); file; })",
    f"{LIVES}::test_file_closed_before_the_slot",
)  # fmt: skip
_add(
    "slot.drops", "check 10: deleting the slot drops the file",
    KVM, "if («slot->flags & KVM_MEM_PRIVATE»)\n\t\tkvm_private_mem_unbind(slot);", "0",
    f"{LIVES}::test_file_closed_before_the_slot",
)  # fmt: skip
_add(
    "slot.vm", "check 10: the slot does not count its VM",
    PRIVATE, "slot->kvm = kvm;", "slot->kvm = kvm; kvm_get_kvm(kvm);",
    f"{LIVES}::test_vm_closed_with_slots",
)  # fmt: skip
_add(
    "slot.listens", "check 10: the notifier is registered",
    PRIVATE, "restrictedmem_register_notifier(slot->restricted_file,\n"
    "\t\t\t\t\t&slot->restricted_notifier);", "INIT_LIST_HEAD(&slot->restricted_notifier.list);",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "slot.unlistens", "check 10: deleting the slot unregisters it",
    KVM, "if («old->flags & KVM_MEM_PRIVATE»)\n\t\tkvm_private_mem_unlisten(old);", "0",
    f"{LIVES}::test_made_and_deleted",
)  # fmt: skip
_add(
    "slot.vm-unlistens", "check 10: and so does the VM's end",
    KVM, "if («slot->flags & KVM_MEM_PRIVATE»)\n\t\t\t\tkvm_private_mem_unlisten(slot);", "0",
    f"{LIVES}::test_vm_closed_before_the_file",
)  # fmt: skip
_add(
    "slot.failure-drops", "check 10: a slot that can't be prepared drops the file",
    KVM, "out_unbind:\n\tif («mem->flags & KVM_MEM_PRIVATE»)", "0",
    f"{SLOTS}::test_failures_leak_nothing",
)  # fmt: skip
_add(
    "slot.failure-unlistens", "check 10: and is not registered",
    KVM, "if (r)\n\t\t«return r;»\n\n\t/*\n\t * Only now", "{ if (change == KVM_MR_CREATE && "
    "(new->flags & KVM_MEM_PRIVATE)) kvm_private_mem_listen(new); return r; }",
    f"{SLOTS}::test_failures_leak_nothing",
)  # fmt: skip
_add(
    "slot.stops-late", "mend/0020: the VM's end stops listening before its MMU goes",
    KVM, "«kvm_unlisten_memslots(kvm);\n\tkvm_arch_destroy_vm(kvm);»",
    "kvm_arch_destroy_vm(kvm); msleep(20); kvm_unlisten_memslots(kvm);",
    f"{RACES}::test_vms_closed_during_holes[restrictedmem]",
    pauses=(
        # Where the walk may give mmu_lock away: it holds the root that the VM's end has to free.
        Edit(
            TDP, "«flush = tdp_mmu_zap_leafs(kvm, root, range->start, range->end,\n"
            "\t\t\t\t\t  range->may_block, flush);»",
            "tdp_mmu_zap_leafs(kvm, root, range->start, range->end, true, flush); "
            "kvm_flush_remote_tlbs(kvm); flush = false; "
            "write_unlock(&kvm->mmu_lock); msleep(5); write_lock(&kvm->mmu_lock);",
        ),
    ),
)  # fmt: skip

# -- where in the file ----------------------------------------------------------------------------

_PGOFF = "slot->restricted_pgoff = «mem->restricted_offset >> PAGE_SHIFT»;"
_add(
    "offset.ignored", "faults are served at restricted_offset",
    PRIVATE, _PGOFF, "0",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "offset.by-one", "faults are served at restricted_offset, exactly",
    PRIVATE, _PGOFF, "(mem->restricted_offset >> PAGE_SHIFT) + 1",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "offset.bytes", "defect 7: restricted_offset in pages, not bytes",
    PRIVATE, _PGOFF, "mem->restricted_offset",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_PAGE = "«slot->restricted_pgoff +\n\t\t\t\t   fault->gfn - slot->base_gfn»"
_add(
    "offset.fault", "faults are served at restricted_offset + (gpa - base): the offset",
    MMU, _PAGE, "fault->gfn - slot->base_gfn",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "offset.base", "faults are served at restricted_offset + (gpa - base): the base",
    MMU, _PAGE, "slot->restricted_pgoff + fault->gfn",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "offset.fault-by-one", "faults are served at restricted_offset + (gpa - base), exactly",
    MMU, _PAGE, "slot->restricted_pgoff + fault->gfn - slot->base_gfn + 1",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip

# -- faults ---------------------------------------------------------------------------------------

_add(
    "fault.default", "a gfn is private at first",
    HOST, "return «!kvm_gfn_ranges_get(&kvm->shared_gfns, gfn)»;",
    "kvm_gfn_ranges_get(&kvm->shared_gfns, gfn)",
    f"{GUESTS}::test_private_and_shared_are_two_memories",
)  # fmt: skip
_FROM_FILE = "if («fault->is_private»)\n\t\treturn kvm_faultin_pfn_private(vcpu, fault);"
_add(
    "fault.private-from-file", "private faults are served from the file",
    MMU, _FROM_FILE, "0",
    f"{GUESTS}::test_private_and_shared_are_two_memories",
)  # fmt: skip
_add(
    "fault.shared-from-memory", "shared faults are served from userspace_addr",
    MMU, _FROM_FILE, "kvm_slot_can_be_private(slot)",
    f"{GUESTS}::test_private_and_shared_are_two_memories",
)  # fmt: skip
_MISMATCH = "if («kvm_slot_can_be_private(slot) && fault->is_private != gfn_is_private»)"
_add(
    "fault.exits", "an access of the other kind exits",
    MMU, _MISMATCH, "0",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "fault.exits-private", "a private access to shared memory exits",
    MMU, _MISMATCH, "kvm_slot_can_be_private(slot) && !fault->is_private && gfn_is_private",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "fault.exits-shared", "a shared access to private memory exits",
    MMU, _MISMATCH, "kvm_slot_can_be_private(slot) && fault->is_private && !gfn_is_private",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "fault.plain-slot", "a plain slot ignores the state",
    MMU, _MISMATCH, "slot && fault->is_private != kvm_gfn_is_private(vcpu->kvm, fault->gfn)",
    f"{GUESTS}::test_a_plain_slot_ignores_the_state",
)  # fmt: skip
_add(
    "fault.no-file", "defect 4, mend/0013: no private page from a slot without a file",
    MMU, "if («!kvm_slot_can_be_private(fault->slot)»)\n\t\treturn false;", "0",
    f"{VEHICLE}::test_wishes_where_there_is_no_choice",
)  # fmt: skip
_add(
    "fault.reason", "the fault exit: reason 38",
    MMU, "run->exit_reason = «KVM_EXIT_MEMORY_FAULT»;", "39",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "fault.flag", "the fault exit: bit 0 = the guest wanted it private",
    MMU, "fault->is_private ? «KVM_MEMORY_EXIT_FLAG_PRIVATE» : 0", "8",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "fault.flag-inverted", "the fault exit: and not the VM's state",
    MMU, "run->memory.flags = «fault->is_private» ?", "!fault->is_private",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "fault.padding", "the fault exit: padding 0",
    MMU, "run->memory.padding = 0;", "",
    f"{VEHICLE}::test_the_exits_padding",
)  # fmt: skip
_add(
    "fault.gpa", "the fault exit: gpa, page aligned",
    MMU, "run->memory.gpa = «gfn_to_gpa(fault->gfn)»;", "fault->addr",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "fault.size", "the fault exit: size 4096",
    MMU, "run->memory.size = «PAGE_SIZE»;", "PMD_SIZE",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "fault.return", "the fault exit: KVM_RUN returns 0",
    MMU, "if (r == RET_PF_USER)\n\t\t«return 0;»", "return -EFAULT;",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "fault.no-page", "defect 6, mend/0014: KVM_RUN fails for a page that can't be had",
    MMU, "if (r)\n\t\t«return r;»\n\n\tfault->pfn = page_to_pfn(page);", "return RET_PF_RETRY;",
    f"{GUESTS}::test_a_page_that_can_not_be_had",
)  # fmt: skip
_add(
    "fault.no-page-errno", "mend/0014: with the file's errno",
    MMU, "if (r)\n\t\t«return r;»\n\n\tfault->pfn = page_to_pfn(page);", "return -EFAULT;",
    f"{GUESTS}::test_a_page_that_can_not_be_had",
)  # fmt: skip
_READONLY = "if («fault->is_private && fault->write &&\n\t    (slot->flags & KVM_MEM_READONLY)»)"
_add(
    "readonly.exit", "defect 12, mend/0018: a write to read-only private memory exits",
    MMU, _READONLY, "0",
    f"{GUESTS}::test_a_write_to_read_only_private_memory",
)  # fmt: skip
_add(
    "readonly.data", "mend/0018: and the exit does not carry what was to be written",
    MMU, "KVM_MEM_READONLY))\n\t\t«return kvm_mmu_exit_memory_fault(vcpu, fault);»",
    "return RET_PF_EMULATE;",
    f"{VEHICLE}::test_a_read_only_slot_keeps_the_secret",
)  # fmt: skip
_add(
    "readonly.mapping", "private pages of a KVM_MEM_READONLY slot are mapped read-only",
    MMU, "fault->map_writable = «!(slot->flags & KVM_MEM_READONLY)»;", "true",
    f"{GUESTS}::test_a_write_to_read_only_private_memory",
)  # fmt: skip
_add(
    "dirty-log.private", "dirty logging logs private writes",
    KVM, "if («memslot && kvm_slot_dirty_track_enabled(memslot)») {",
    "memslot && kvm_slot_dirty_track_enabled(memslot) && !kvm_slot_can_be_private(memslot)",
    f"{GUESTS}::test_dirty_logging",
)  # fmt: skip
_add(
    "fault.prefetch", "shared pages are not prefetched in place of private ones",
    MMU, "if («kvm_slot_can_be_private(slot)»)\n\t\treturn NULL;\n\n\treturn slot;", "0",
    f"{MAPS}::test_neighbours_of_a_fault",
    append=SHADOW,
)  # fmt: skip

# -- wishes, hypercalls ---------------------------------------------------------------------------

_add(
    "wish.private", "the guest's wish: private",
    MMU, "case KVM_MAP_GPA_RANGE_WANT_PRIVATE:\n\t\treturn «true»;", "gfn_is_private",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "wish.shared", "the guest's wish: shared",
    MMU, "case KVM_MAP_GPA_RANGE_WANT_SHARED:\n\t\treturn «false»;", "gfn_is_private",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "wish.default", "the guest's wish: none at first, it gets what is there",
    MMU, "#endif\n\treturn «gfn_is_private»;\n}", "true",
    f"{GUESTS}::test_private_and_shared_are_two_memories",
)  # fmt: skip
_add(
    "wish.unset", "the guest's wish: both bits unset it",
    X86, "if (wants == KVM_MAP_GPA_RANGE_WANT_MASK)\n\t\t«wants = 0;»",
    "wants = KVM_MAP_GPA_RANGE_WANT_PRIVATE;",
    f"{GUESTS}::test_a_guest_that_wants_the_other_kind_exits",
)  # fmt: skip
_add(
    "wish.zap", "the guest's wish: what is mapped faults again",
    X86, "can't exit. */\n\t«kvm_zap_gfn_range(kvm, start, end);»", "",
    f"{GUESTS}::test_implicit_conversion_by_a_server",
)  # fmt: skip
_add(
    "wish.aligned", "a wish's hypercall: an unaligned gpa is -EINVAL",
    X86, "if («!PAGE_ALIGNED(gpa)» || end <= start)", "0",
    f"{GUESTS}::test_the_hypercalls_errors",
)  # fmt: skip
_add(
    "wish.empty", "a wish's hypercall: 0 pages are -EINVAL",
    X86, "if (!PAGE_ALIGNED(gpa) || «end <= start»)", "end < start",
    f"{GUESTS}::test_the_hypercalls_errors",
)  # fmt: skip
_add(
    "wish.wrap", "a wish's hypercall: a wrap of gfn + pages is -EINVAL",
    X86, "if (!PAGE_ALIGNED(gpa) || «end <= start»)", "end == start",
    f"{GUESTS}::test_the_hypercalls_errors",
)  # fmt: skip
_add(
    "wish.wrap-bytes", "a wish's hypercall: a wrap of the address is fine",
    X86, "if (!PAGE_ALIGNED(gpa) || «end <= start»)",
    "end <= start || gpa + (npages << PAGE_SHIFT) < gpa",
    f"{GUESTS}::test_the_hypercalls_errors",
)  # fmt: skip
_HYPERCALL = "if (!PAGE_ALIGNED(gpa) || !npages ||\n\t\t    gpa_to_gfn(gpa) + npages <= "
_add(
    "hypercall.enosys", "KVM_HC_MAP_GPA_RANGE: -1000 when it is not enabled",
    X86, "if (!(«vcpu->kvm->arch.hypercall_exit_enabled» & (1 << KVM_HC_MAP_GPA_RANGE)))", "~0",
    f"{GUESTS}::test_the_hypercalls_errors",
)  # fmt: skip
_add(
    "hypercall.aligned", "KVM_HC_MAP_GPA_RANGE: an unaligned gpa is -EINVAL",
    X86, _HYPERCALL.replace("!PAGE_ALIGNED(gpa)", "«!PAGE_ALIGNED(gpa)»"), "0",
    f"{VEHICLE}::test_the_errors_of_an_enabled_hypercall",
)  # fmt: skip
_add(
    "hypercall.empty", "KVM_HC_MAP_GPA_RANGE: 0 pages are -EINVAL",
    X86, "«!npages ||\n\t\t    gpa_to_gfn(gpa) + npages <= gpa_to_gfn(gpa)») {",
    "gpa_to_gfn(gpa) + npages < gpa_to_gfn(gpa)",
    f"{VEHICLE}::test_the_errors_of_an_enabled_hypercall",
)  # fmt: skip
_add(
    "hypercall.wrap", "KVM_HC_MAP_GPA_RANGE: a wrap of gfn + pages is -EINVAL",
    X86, "!npages ||\n\t\t    «gpa_to_gfn(gpa) + npages <= gpa_to_gfn(gpa)») {", "0",
    f"{VEHICLE}::test_the_errors_of_an_enabled_hypercall",
)  # fmt: skip

# -- conversion -----------------------------------------------------------------------------------

_CONVERT = "region->addr + region->size <= region->addr"
_add(
    "convert.address", "conversion: gpa is page aligned",
    PRIVATE, "if («!PAGE_ALIGNED(region->addr)» ||", "0",
    f"{CONVERT}::test_alignment",
)  # fmt: skip
_add(
    "convert.size", "conversion: size is page aligned",
    PRIVATE, "|| «!PAGE_ALIGNED(region->size)» ||", "0",
    f"{CONVERT}::test_alignment",
)  # fmt: skip
_add(
    "convert.empty", "conversion: size 0 is EINVAL",
    PRIVATE, _CONVERT, "region->addr + region->size < region->addr",
    f"{CONVERT}::test_size_0",
)  # fmt: skip
_add(
    "convert.wrap", "conversion: a wrap is EINVAL",
    PRIVATE, _CONVERT, "!region->size",
    f"{CONVERT}::test_wrap",
)  # fmt: skip
_add(
    "convert.last-page", "conversion: gpa + size = 2^64 is EINVAL",
    PRIVATE, _CONVERT, "!region->size || region->addr + region->size - 1 < region->addr",
    f"{CONVERT}::test_wrap",
)  # fmt: skip
_add(
    "convert.pointer", "conversion: a bad pointer is EFAULT",
    KVM, "if (copy_from_user(&region, argp, sizeof(region)))\n\t\t\t«goto out;»",
    "{ r = -EINVAL; goto out; }",
    f"{CONVERT}::test_bad_pointers",
)  # fmt: skip
_add(
    "convert.no-slot", "conversion: no memslot is needed",
    PRIVATE, _CONVERT, f"{_CONVERT} || !gfn_to_memslot(kvm, start)",
    f"{CONVERT}::test_without_a_slot",
)  # fmt: skip
_add(
    "convert.direction", "conversion: REG to private, UNREG to shared",
    KVM, "ioctl == KVM_MEMORY_ENCRYPT_REG_REGION", "ioctl != KVM_MEMORY_ENCRYPT_REG_REGION",
    f"{GUESTS}::test_private_and_shared_are_two_memories",
)  # fmt: skip
_SET = "r = kvm_gfn_ranges_set(&kvm->shared_gfns, «start, end», !private);"
_ZAP = "retry after this. */\n\tkvm_zap_gfn_range(kvm, «start, end»);"


_add(
    "convert.zap", "conversion zaps the mappings of the range",
    MMU, _unmarked(_ZAP, "kvm_zap_gfn_range(kvm, start, end);"), "",
    f"{GUESTS}::test_private_and_shared_are_two_memories",
)  # fmt: skip
_add(
    "convert.zap-first", "conversion zaps its first page",
    MMU, _unmarked(_ZAP, "start"), "start + (end - start > 1)",
    f"{GUESTS}::test_conversion_of_parts_of_a_large_range",
)  # fmt: skip
_add(
    "convert.zap-last", "conversion zaps its last page",
    MMU, _unmarked(_ZAP, "end"), "end - (end - start > 1)",
    f"{GUESTS}::test_conversion_of_parts_of_a_large_range",
)  # fmt: skip
_add(
    "convert.first", "conversion changes its first page",
    PRIVATE, _unmarked(_SET, "start"), "start + (end - start > 1)",
    f"{GUESTS}::test_conversion_of_parts_of_a_large_range",
)  # fmt: skip
_add(
    "convert.last", "conversion changes its last page",
    PRIVATE, _unmarked(_SET, "end"), "end - (end - start > 1)",
    f"{GUESTS}::test_conversion_of_parts_of_a_large_range",
)  # fmt: skip
_add(
    "convert.page-before", "conversion leaves the page before alone",
    PRIVATE, _unmarked(_SET, "start"), "start - !!start",
    f"{GUESTS}::test_conversion_of_parts_of_a_large_range",
)  # fmt: skip
_add(
    "convert.page-behind", "conversion leaves the page behind alone",
    PRIVATE, _unmarked(_SET, "end"), "end + 1",
    f"{GUESTS}::test_conversion_of_parts_of_a_large_range",
)  # fmt: skip
_add(
    "convert.joined-before", "ranges are joined with neighbours that are alike only (before)",
    PRIVATE, "if («mas_walk(&mas) == entry»)\n\t\t\tfirst =", "(mas_walk(&mas), true)",
    f"{GUESTS}::test_conversion_of_parts_of_a_large_range",
)  # fmt: skip
_add(
    "convert.joined-behind", "ranges are joined with neighbours that are alike only (behind)",
    PRIVATE, "if («mas_walk(&mas) == entry»)\n\t\t\tlast =", "(mas_walk(&mas), true)",
    f"{GUESTS}::test_conversion_of_parts_of_a_large_range",
)  # fmt: skip
_add(
    "convert.by-page", "defects 3, 14, mend/0016: a conversion is one step, however large",
    PRIVATE, _unmarked(_SET, _SET.replace("«", "").replace("»", "")),
    "for (r = 0; !r && start < end; start++) "
    "r = signal_pending(current) ? -EINTR : "
    "kvm_gfn_ranges_set(&kvm->shared_gfns, start, start + 1, !private); start = 0;",
    f"{CONVERT}::test_huge_ranges",
)  # fmt: skip
_add(
    "state.deletion", "the state survives the slot's deletion",
    KVM, "if («old->flags & KVM_MEM_PRIVATE»)\n\t\tkvm_private_mem_unlisten(old);",
    "(old->flags & KVM_MEM_PRIVATE) && (kvm_gfn_ranges_set(&kvm->shared_gfns, old->base_gfn, "
    "old->base_gfn + old->npages, 0), true)",
    f"{GUESTS}::test_the_state_survives_the_slot",
)  # fmt: skip
_add(
    "state.creation", "the state survives the slot's making anew",
    KVM, "if («change == KVM_MR_CREATE && (new->flags & KVM_MEM_PRIVATE)»)",
    "change == KVM_MR_CREATE && (new->flags & KVM_MEM_PRIVATE) && (kvm_gfn_ranges_set("
    "&kvm->shared_gfns, new->base_gfn, new->base_gfn + new->npages, 0), true)",
    f"{GUESTS}::test_the_state_survives_the_slot",
)  # fmt: skip

# -- the notifier ---------------------------------------------------------------------------------

_add(
    "hole.start-bytes", "defect 1, mend/0002: a hole's start in pages",
    RMEM, "start = «offset >> PAGE_SHIFT»;", "offset",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "hole.end-bytes", "defect 1, mend/0002: a hole's end in pages",
    RMEM, "end = «(offset + len) >> PAGE_SHIFT»;", "offset + len",
    f"{MAPS}::test_a_hole_unmaps_just_its_pages",
)  # fmt: skip
_add(
    "hole.allocation", "defect 2, mend/0003: allocation zaps nothing",
    RMEM, _unmarked(_ALLOCATE, _ALLOCATED),
    "return PAGE_ALIGNED(offset | len) ? restrictedmem_punch_hole(file, mode, offset, len) : "
    "rm->backing->f_op->fallocate(rm->backing, mode, offset, len);",
    f"{DEFECTS}::test_known_defect[allocation-notified]",
)  # fmt: skip
_add(
    "hole.lock", "defect 10, mend/0004: no slot comes or goes between begin and end",
    RMEM, "«ret = rm->backing->f_op->fallocate(rm->backing, mode, offset, len);»",
    "mutex_unlock(&rm->lock); "
    "ret = rm->backing->f_op->fallocate(rm->backing, mode, offset, len); mutex_lock(&rm->lock);",
    f"{LIVES}::test_slots_against_holes",
)  # fmt: skip
_add(
    "hole.begin", "a hole begins before it is made",
    RMEM, "«restrictedmem_invalidate_start(rm, start, end);»", "",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "hole.end", "a hole that began ends",
    RMEM, "«restrictedmem_invalidate_end(rm, start, end);»", "",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "hole.every-slot", "every notifier of the file is told",
    RMEM, "notifier->ops->invalidate_start(notifier, start, end);",
    "{ notifier->ops->invalidate_start(notifier, start, end); break; }",
    f"{GUESTS}::test_two_slots_of_one_file",
)  # fmt: skip

_FIRST = "first = «start > base ? start - base : 0»;"
_LAST = "last = «min(end - base, slot->npages)»;"
_add(
    "range.first-underflow", "arithmetic: a hole that begins before the binding",
    PRIVATE, _FIRST, "start - base",
    f"{GUESTS}::test_holes_beside_the_binding",
)  # fmt: skip
_add(
    "range.first-late", "arithmetic: the first page",
    PRIVATE, _FIRST, "(start > base ? start - base : 0) + 1",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "range.first-early", "arithmetic: the page before the first",
    PRIVATE, _FIRST, "start > base ? start - base - 1 : 0",
    f"{MAPS}::test_a_hole_unmaps_just_its_pages",
)  # fmt: skip
_add(
    "range.ends-before", "defect 8, mend/0010: a hole that ends before the binding begins",
    PRIVATE, "if («end <= base»)\n\t\treturn false;", "0",
    f"{MAPS}::test_a_hole_unmaps_just_its_pages",
)  # fmt: skip
_add(
    "range.last-early", "arithmetic: the last page",
    PRIVATE, _LAST, "min(end - base, slot->npages) - 1",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "range.last-late", "arithmetic: the page behind the last",
    PRIVATE, _LAST, "min(end - base + 1, slot->npages)",
    f"{MAPS}::test_a_hole_unmaps_just_its_pages",
)  # fmt: skip
_add(
    "range.last-beyond", "arithmetic: a hole that ends behind the binding",
    PRIVATE, _LAST, "end - base",
    f"{MAPS}::test_a_hole_unmaps_just_its_pages",
)  # fmt: skip
_add(
    "range.slot-base", "arithmetic: gfns are the slot's",
    PRIVATE, ".start = «slot->base_gfn + first»,", "first",
    f"{MAPS}::test_a_hole_unmaps_just_its_pages",
)  # fmt: skip
_add(
    "zap.begin", "begin: the count is raised",
    PRIVATE, "kvm_mmu_invalidate_begin(kvm);", "",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "zap.end", "end: the count is lowered",
    PRIVATE, "kvm_mmu_invalidate_end(kvm);", "",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "zap.unmap", "begin: the pages are unmapped",
    PRIVATE, "if («kvm_unmap_gfn_range(kvm, &range)»)", "0",
    f"{GUESTS}::test_a_hole_takes_just_its_pages",
)  # fmt: skip
_add(
    "flush.hole", "begin: TLBs are flushed",
    PRIVATE, "kvm_flush_remote_tlbs(kvm);", "",
    f"{MAPS}::test_a_guest_that_runs_sees_it_at_once",
)  # fmt: skip
_add(
    "flush.conversion", "conversion flushes TLBs",
    MMU, "flush);\n\n\tif («flush»)\n\t\tkvm_flush_remote_tlbs_with_address(kvm, gfn_start,", "0",
    f"{MAPS}::test_a_guest_that_runs_sees_it_at_once",
)  # fmt: skip
_HOLE_PAUSE = (
    Edit(
        RMEM, "«ret = rm->backing->f_op->fallocate(rm->backing, mode, offset, len);»",
        "msleep(5); ret = rm->backing->f_op->fallocate(rm->backing, mode, offset, len);",
    ),
)  # fmt: skip
_FAULT_PAUSE = (
    Edit(
        MMU, "«fault->pfn = page_to_pfn(page);»\n\tfault->map_writable",
        "fault->pfn = page_to_pfn(page); usleep_range(2000, 4000);",
    ),
)  # fmt: skip
_add(
    "retry.range", "faults in the range retry between begin and end",
    PRIVATE, "«kvm_mmu_invalidate_range_add(kvm, round_down(range.start, folio_pages),\n"
    "\t\t\t\t     round_up(range.end, folio_pages));»", "",
    f"{MAPS}::test_reads_against_holes",
    pauses=_HOLE_PAUSE,
)  # fmt: skip
_add(
    "retry.asked", "a fault asks under mmu_lock whether it raced with an invalidation",
    MMU, "«mmu_invalidate_retry_gfn(vcpu->kvm, fault->mmu_seq, fault->gfn)»;", "0",
    f"{MAPS}::test_reads_against_holes",
    pauses=_FAULT_PAUSE,
)  # fmt: skip
_add(
    "retry.count", "a fault retries while an invalidation is under way",
    HOST, "if (unlikely(«kvm->mmu_invalidate_in_progress») &&\n\t    gfn >= kvm->", "0",
    f"{MAPS}::test_reads_against_holes",
    pauses=(*_HOLE_PAUSE, *_FAULT_PAUSE),
)  # fmt: skip
_add(
    "retry.sequence", "a fault retries when an invalidation came and went",
    HOST, "gfn < kvm->mmu_invalidate_range_end)\n\t\treturn 1;\n"
    "\tif («kvm->mmu_invalidate_seq != mmu_seq»)", "0",
    f"{MAPS}::test_reads_against_holes",
    pauses=_FAULT_PAUSE,
)  # fmt: skip
_add(
    "retry.sequence-raised", "an invalidation's end changes the sequence number",
    KVM, "kvm->mmu_invalidate_seq++;", "",
    f"{MAPS}::test_reads_against_holes",
    pauses=_FAULT_PAUSE,
)  # fmt: skip
_add(
    "retry.conversion", "faults that race with a conversion retry",
    MMU, "kvm_mmu_invalidate_range_add(kvm, gfn_start, gfn_end);\n\n\tflush = "
    "«kvm_rmap_zap_gfn_range(kvm, gfn_start, gfn_end)»;",
    "(kvm->mmu_invalidate_seq--, kvm_rmap_zap_gfn_range(kvm, gfn_start, gfn_end))",
    f"{MAPS}::test_reads_against_conversions",
    pauses=_FAULT_PAUSE,
)  # fmt: skip
_add(
    "retry.shared", "faults on shared memory race with the host's own changes, by gfn",
    KVM, "«kvm_mmu_invalidate_range_add(kvm, range->start, range->end);»\n\treturn", "",
    f"{MAPS}::test_reads_against_the_hosts_own_holes",
    pauses=(
        Edit(
            KVM, "«__kvm_handle_hva_range(kvm, &hva_range);»\n\n\treturn 0;\n}\n\nvoid kvm_mmu_inv",
            "__kvm_handle_hva_range(kvm, &hva_range); msleep(5);",
        ),
    ),
)  # fmt: skip

# -- large pages ----------------------------------------------------------------------------------

_ORDER = "«(1ULL << order) >= KVM_PAGES_PER_HPAGE(level + 1)» &&"
_add(
    "large.order", "large mappings only where the file's page is large",
    MMU, _ORDER, "true",
    f"{MAPS}::test_large_mappings",
)  # fmt: skip
_add(
    "large.never", "a large page of the file is mapped large",
    MMU, _ORDER, "false",
    f"{MAPS}::test_large_mappings",
)  # fmt: skip
_add(
    "large.alike", "large mappings only where gpa and page lie alike",
    MMU, "«!((fault->gfn ^ fault->pfn) & (KVM_PAGES_PER_HPAGE(level + 1) - 1))»)", "true",
    f"{MAPS}::test_large_pages_that_lie_otherwise",
)  # fmt: skip
_add(
    "large.host-level", "a private mapping's size is not userspace_addr's",
    MMU, "if («is_private»)\n\t\treturn max_level;", "0",
    f"{MAPS}::test_large_mappings",
)  # fmt: skip
_MIXED = "if («!kvm_gfn_ranges_uniform(&kvm->shared_gfns, start, end)»)"
_add(
    "large.mixed", "defect 13, mend/0017: large mappings only where the range is of one kind",
    MMU, _MIXED, "0",
    f"{MAPS}::test_parts_of_a_large_page",
)  # fmt: skip
_add(
    "large.head", "defect 13, mend/0017: looking at the head is not enough",
    MMU, _MIXED, "!kvm_gfn_ranges_uniform(&kvm->shared_gfns, start, start + 1)",
    f"{MAPS}::test_parts_of_a_large_page",
)  # fmt: skip
_add(
    "large.tail", "mend/0017: looking at all but the last page is not enough",
    MMU, _MIXED, "!kvm_gfn_ranges_uniform(&kvm->shared_gfns, start, end - 1)",
    f"{MAPS}::test_parts_of_a_large_page",
)  # fmt: skip
_add(
    "large.behind-head", "mend/0017: looking at all but the first page is not enough",
    MMU, _MIXED, "!kvm_gfn_ranges_uniform(&kvm->shared_gfns, start + 1, end)",
    f"{MAPS}::test_parts_of_a_large_page",
)  # fmt: skip
_add(
    "large.always-small", "mend/0017: a conversion beside it does not make a page small",
    MMU, _MIXED, "!mtree_empty(&kvm->shared_gfns.tree)",
    f"{MAPS}::test_parts_of_a_large_page",
)  # fmt: skip
_add(
    "large.wishes", "large mappings only where the guest's wish is one",
    MMU, "if («!kvm_gfn_ranges_uniform(&kvm->arch.guest_wants, start, end)»)", "0",
    f"{MAPS}::test_wishes_for_parts_of_a_large_page",
)  # fmt: skip
for _name, _bound, _broken in (
    ("before", "round_down(range.start, folio_pages)", "range.start"),
    ("behind", "round_up(range.end, folio_pages)", "range.end"),
):
    _add(
        f"large.{_name}-hole", f"mend/0011: faults {_name} a hole retry: it splits the page",
        PRIVATE, f"«{_bound}»", _broken,
        f"{MAPS}::test_reads_beside_holes_in_a_large_page",
        pauses=_HOLE_PAUSE,
    )  # fmt: skip
