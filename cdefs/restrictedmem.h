/*
 * The v9 private memory ABI: LKML, 25 October 2022,
 * 20221025151344.3784230-1-chao.p.peng@linux.intel.com.  Names that a later
 * generation reuses have other values there; hence a namespace of their own.
 */
#pragma once

#include "kvm.h"

/* The system call that makes the file; 451 is cachestat(2) in mainline. */
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
 * KVM_HC_MAP_GPA_RANGE where CONFIG_KVM_PRIVATE_MEM_TESTING lets any VM have private memory: how
 * the guest is going to access a range.  Both: as whatever it is.
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
