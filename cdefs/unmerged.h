/*
 * Numbers that patched kernels use and that mainline does not have, or has for
 * something else.  One number may be here under several names: each of them is
 * the number's meaning in some tree.  So none of these can be relied on without
 * knowing the tree; `kvmpriv probe` names them where it finds a number in use.
 */
#pragma once

#include "kvm.h"

/* Flags of KVM_CREATE_GUEST_MEMFD; Linux 7.3 refuses all above 1<<1. */
#define GUEST_MEMFD_FLAG_HUGETLB	(1ULL << 2)
#define GUEST_MEMFD_FLAG_HUGE_PAGES	(1ULL << 2)	/* huge_page_size_log2 in reserved[0] */
#define GUEST_MEMFD_FLAG_WRITE		(1ULL << 3)	/* write(2) fills whole pages */
/* Firecracker's secret-free tree, src/vmm/src/vstate/vm.rs; mainline: INIT_SHARED. */
#define FIRECRACKER_FLAG_NO_DIRECT_MAP	(1ULL << 1)

/* Flags of the exit KVM_EXIT_MEMORY_FAULT. */
#define KVM_MEMORY_EXIT_FLAG_USERFAULT	(1ULL << 4)
#define KVM_MEMORY_EXIT_FLAG_APF	(1ULL << 5)

/* With KVM_MEM_USERFAULT: a bitmap where mainline's struct has padding. */
struct kvm_userspace_memory_region2 {
	__u32 slot;
	__u32 flags;
	__u64 guest_phys_addr;
	__u64 memory_size;
	__u64 userspace_addr;
	__u64 guest_memfd_offset;
	__u32 guest_memfd;
	__u32 pad1;
	__u64 userfault_bitmap;
	__u64 pad2[13];
};

/* Capabilities.  Mainline 7.3 has 245 to 251 for arm, s390 and ppc: on x86 they read 0. */
#define KVM_CAP_USERFAULT			245
#define KVM_CAP_ASYNC_PF_USERFAULT		246
#define KVM_CAP_ASYNC_PF_USERFAULT_EVENTFD	247
/* KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES, which moved with each posting of its series. */
#define IN_PLACE_V1_CAP				246
#define IN_PLACE_V2_CAP_FIRST			248
#define IN_PLACE_V8_CAP_LAST			251

/* The ioctl's number alone; the first posting of conversion in place has the same. */
#define KVM_ASYNC_PF_NR		0xd6
