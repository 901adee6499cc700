# libkrun-sev and libkrun-tdx.
summary = libkrun's confidential guests on SEV-SNP or TDX: libkrun-sev, libkrun-tdx
source = libkrun/libkrun | src/vmm/src/linux/vstate.rs, pull request 296 | main | 2025-04-02
types = snp, tdx
require = guest_memfd/VM/file | libkrun makes a guest_memfd, with flags 0
require = guest_memfd/VM/slot | guest memory is bound with KVM_SET_USER_MEMORY_REGION2
require = guest_memfd/VM/conversion | libkrun answers the exit KVM_EXIT_MEMORY_FAULT by KVM_SET_MEMORY_ATTRIBUTES
require = guest_memfd/VM/hypercall | the guest asks for conversions by KVM_HC_MAP_GPA_RANGE
