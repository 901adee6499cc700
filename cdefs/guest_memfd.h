/*
 * Mainline's private memory ABI, guest_memfd: Linux 6.8 (commit a7800aa80ea4),
 * and its additions up to 6.18 (commit 44c6cb9fe988); what is newer, or not
 * merged, says so.
 */
#pragma once

#include "kvm.h"

#define KVM_CAP_USER_MEMORY2		231
#define KVM_CAP_MEMORY_FAULT_INFO	232
#define KVM_CAP_MEMORY_ATTRIBUTES	233
#define KVM_CAP_GUEST_MEMFD		234
#define KVM_CAP_VM_TYPES		235
#define KVM_CAP_PRE_FAULT_MEMORY	236
#define KVM_CAP_GUEST_MEMFD_FLAGS	244

#define KVM_X86_DEFAULT_VM		0
#define KVM_X86_SW_PROTECTED_VM		1
#define KVM_X86_SEV_VM			2
#define KVM_X86_SEV_ES_VM		3
#define KVM_X86_SNP_VM			4
#define KVM_X86_TDX_VM			5

#define KVM_MEM_GUEST_MEMFD		(1UL << 2)

/* Not merged: a bitmap of pages whose faults exit; its address is in pad2[0] of the region. */
#define KVM_MEM_USERFAULT		(1UL << 3)

struct kvm_userspace_memory_region2 {
	__u32 slot;
	__u32 flags;
	__u64 guest_phys_addr;
	__u64 memory_size;
	__u64 userspace_addr;
	__u64 guest_memfd_offset;
	__u32 guest_memfd;
	__u32 pad1;
	__u64 pad2[14];
};

#define KVM_MEMORY_ATTRIBUTE_PRIVATE	(1ULL << 3)

struct kvm_memory_attributes {
	__u64 address;
	__u64 size;
	__u64 attributes;
	__u64 flags;
};

#define GUEST_MEMFD_FLAG_MMAP		(1ULL << 0)
#define GUEST_MEMFD_FLAG_INIT_SHARED	(1ULL << 1)

/*
 * Not merged: a file whose pages are not in the kernel's direct map.  v12 of
 * "Direct Map Removal Support for guest_memfd", 2026.  Other trees have other
 * flags at this number: unmerged.h.
 */
#define GUEST_MEMFD_FLAG_NO_DIRECT_MAP	(1ULL << 2)

/* fstatfs(2)'s f_type of a file: Linux 7.3 has the first, 6.8 to 6.18 the second. */
#define GUEST_MEMFD_MAGIC		0x474d454d
#define ANON_INODE_FS_MAGIC		0x09041934	/* <linux/magic.h> */

struct kvm_create_guest_memfd {
	__u64 size;
	__u64 flags;
	__u64 reserved[6];
};

/*
 * Conversion in place, of the file and not of the VM: "guest_memfd: In-place
 * conversion support", v13 of 10 September 2026, applied after Linux 7.3.
 */
struct kvm_memory_attributes2 {
	union {
		__u64 address;
		__u64 offset;
	};
	__u64 size;
	__u64 attributes;
	__u64 flags;
	__u64 error_offset;
	__u64 reserved[11];
};

struct kvm_pre_fault_memory {
	__u64 gpa;
	__u64 size;
	__u64 flags;
	__u64 padding[5];
};

#define EHWPOISON			133	/* <asm-generic/errno.h> */
#define KVM_EXIT_MEMORY_FAULT		39
#define KVM_MEMORY_EXIT_FLAG_PRIVATE	(1ULL << 3)

/* kvm_run's union member "memory_fault", 32 bytes into kvm_run. */
struct kvm_run_memory_fault {
	__u64 flags;
	__u64 gpa;
	__u64 size;
};

#define KVM_SET_USER_MEMORY_REGION2	_IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#define KVM_SET_MEMORY_ATTRIBUTES	_IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
/* An ioctl of a guest_memfd. */
#define KVM_SET_MEMORY_ATTRIBUTES2	_IOWR(KVMIO, 0xd2, struct kvm_memory_attributes2)
/* Its number in the first posting of its series, where 0xd6 is not KVM_ASYNC_PF. */
#define KVM_SET_MEMORY_ATTRIBUTES2_V1	_IOWR(KVMIO, 0xd6, struct kvm_memory_attributes2)
#define KVM_CREATE_GUEST_MEMFD		_IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#define KVM_PRE_FAULT_MEMORY		_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)
