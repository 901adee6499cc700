# kvmpriv itself, and QEMU with the series' own patches.
summary = private memory by memfd_restricted(2), as v9 of its series has it
source = linux-kvm | KVM: mm: fd-based approach for supporting KVM, 20221025151344.3784230-1-chao.p.peng@linux.intel.com | v9 | 2022-10-25
types = any
require = v9/syscall | system call 451 must be memfd_restricted
require = v9/capability | the device must report KVM_CAP_PRIVATE_MEM
require = v9/file | memfd_restricted makes the file for private memory
require = v9/VM/slot | KVM_MEM_PRIVATE binds the file; the architecture's hook must allow it
require = v9/VM/conversion | KVM_MEMORY_ENCRYPT_REG_REGION and UNREG_REGION convert
