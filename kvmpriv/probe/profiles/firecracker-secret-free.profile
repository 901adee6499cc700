# Firecracker's guests whose memory is not in the host kernel's direct map.
summary = Firecracker's secret-free guests: memory in a guest_memfd that is not in the kernel's direct map
source = firecracker-microvm/firecracker | src/vmm/src/vstate/vm.rs | commit 01c02c59e8c1 | 2026-11-27
source = linux-kvm | Direct Map Removal Support for guest_memfd | 20260317141031.514-1-kalyazin@amazon.com | 2026-03-17
types = default
require = guest_memfd/VM/file | Firecracker makes a guest_memfd for the guest's memory
require = guest_memfd/VM/init_shared | Firecracker maps the file, loads the kernel into it and binds it to slots
require = guest_memfd/VM/no_direct_map | the host kernel must have no mapping of the memory; without this flag Linux 6.18 and newer take Firecracker's flags 0x3 as MMAP and INIT_SHARED, and the memory stays in the direct map
wish = guest_memfd/VM/userfault | restoring a snapshot page by page needs it
