/*
 * What v10 of the memfd_restricted series changed: LKML, 2 December 2022,
 * 20221202061347.1070246-1-chao.p.peng@linux.intel.com.  The system call, the
 * slot flag and the slot's structure are those of v9.
 */
#pragma once

#include "kvm.h"

#define KVM_CAP_MEMORY_ATTRIBUTES	225
#define KVM_MEMORY_ATTRIBUTE_PRIVATE	(1ULL << 3)

struct kvm_memory_attributes {
	__u64 address;
	__u64 size;
	__u64 attributes;
	__u64 flags;
};

#define KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES _IOR(KVMIO, 0xd2, __u64)
#define KVM_SET_MEMORY_ATTRIBUTES	_IOWR(KVMIO, 0xd3, struct kvm_memory_attributes)
