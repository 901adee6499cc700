# OpenVMM's KVM backend with SNP isolation, Linux direct boot.
summary = OpenVMM's SEV-SNP guests on KVM
source = microsoft/openvmm | vmm_core/virt_kvm/src/memory.rs, pull request 3970 | main | 2026-07-20
types = snp
require = guest_memfd/VM/file | OpenVMM requires KVM_CAP_GUEST_MEMFD, and makes a file for private memory
require = guest_memfd/VM/slot | OpenVMM requires KVM_CAP_USER_MEMORY2, and binds the file beside the shared memory
require = guest_memfd/VM/conversion | OpenVMM requires KVM_CAP_MEMORY_ATTRIBUTES with PRIVATE on the VM
require = guest_memfd/VM/hypercall | OpenVMM converts pages when the guest calls KVM_HC_MAP_GPA_RANGE
require = guest_memfd/VM/punch_hole | OpenVMM frees the page that a conversion left behind
wish = guest_memfd/VM/in_place | OpenVMM plans to convert within one file
