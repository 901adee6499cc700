/*
 * The v9 private memory ABI: LKML, 25 October 2022,
 * 20221025151344.3784230-1-chao.p.peng@linux.intel.com.  Later ABIs reuse some
 * of its names with other values; hence a namespace of its own.
 */
#pragma once

#include "kvm.h"

/* The system call that creates the file; 451 is cachestat(2) in mainline. */
#define __NR_memfd_restricted	451
#define RESTRICTEDMEM_MAGIC	0x5245534d	/* statfs.f_type */

#define KVM_CAP_PRIVATE_MEM	224
#define KVM_MEM_PRIVATE		(1UL << 2)

/* Passed to KVM_SET_USER_MEMORY_REGION, whose number still encodes 32 bytes. */
struct kvm_userspace_memory_region_ext {
	struct kvm_userspace_memory_region region;
	__u64 restricted_offset;
	__u32 restricted_fd;
	__u32 pad1;
	__u64 pad2[14];
};

/*
 * Attributes of KVM_HC_MAP_GPA_RANGE, with CONFIG_KVM_PRIVATE_MEM_TESTING, which lets any VM have
 * private memory.  They tell KVM how the guest is going to access the range.  With both of them
 * the guest's access follows the state of each page.
 */
#define KVM_MAP_GPA_RANGE_WANT_PRIVATE	(1 << 8)
#define KVM_MAP_GPA_RANGE_WANT_SHARED	(1 << 9)

#define KVM_EXIT_MEMORY_FAULT		38
#define KVM_MEMORY_EXIT_FLAG_PRIVATE	(1 << 0)

/* kvm_run's union member "memory_fault", 32 bytes into kvm_run. */
struct kvm_run_memory_fault {
	__u32 flags;
	__u32 padding;
	__u64 gpa;
	__u64 size;
};
