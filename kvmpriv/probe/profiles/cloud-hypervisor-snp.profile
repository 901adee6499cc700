# --platform sev_snp=on, with an IGVM file.
summary = cloud-hypervisor's SEV-SNP guests: --platform sev_snp=on
source = cloud-hypervisor/cloud-hypervisor | pull request 7942, "Add KVM SEV-SNP to Cloud Hypervisor" | main | 2026-04-01
source = cloud-hypervisor/cloud-hypervisor | issue 6680, KVM_SET_USER_MEMORY_REGION2 and KVM_CREATE_GUEST_MEMFD | main | 2024-08-20
types = snp
require = guest_memfd/VM/file | cloud-hypervisor makes a guest_memfd for each memory region
require = guest_memfd/VM/slot | each region is bound with KVM_SET_USER_MEMORY_REGION2
require = guest_memfd/VM/conversion | pages become private by KVM_SET_MEMORY_ATTRIBUTES
require = guest_memfd/VM/hypercall | the guest asks for conversions by KVM_HC_MAP_GPA_RANGE
