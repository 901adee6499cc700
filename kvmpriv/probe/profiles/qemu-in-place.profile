# Confidential guests whose pages are converted within one guest_memfd.
summary = QEMU's confidential guests with in-place conversion: private and shared pages in one guest_memfd
source = qemu/qemu | docs, Guest memfd: "In-place conversion" | master | 2026-11-27
source = linux-kvm | guest_memfd: In-place conversion support | v13 | 2026-09-10
types = snp, tdx
require = guest_memfd/VM/file | QEMU makes a guest_memfd for each memory backend
require = guest_memfd/VM/init_shared | the file is mapped and begins shared
require = guest_memfd/VM/in_place | QEMU converts pages by KVM_SET_MEMORY_ATTRIBUTES2 on the file
require = guest_memfd/VM/hypercall | the guest asks for conversions by KVM_HC_MAP_GPA_RANGE
