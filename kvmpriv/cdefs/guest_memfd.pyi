# Generated from cdefs/guest_memfd.h by `make cdefs`: edit the header instead.
# mypy: disable-error-code="overload-overlap"

from typing import Final, Literal, Protocol, overload

from .cffi_types import Cdata, CType, Ffi
from .guest_memfd_structs import kvm_create_guest_memfd, kvm_memory_attributes, kvm_memory_attributes2, kvm_pre_fault_memory, kvm_run_memory_fault, kvm_userspace_memory_region2

class _Ffi(Ffi, Protocol):
    @overload
    def new(self, cdecl: Literal["struct kvm_create_guest_memfd *"], init: object = ..., /) -> kvm_create_guest_memfd: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_memory_attributes *"], init: object = ..., /) -> kvm_memory_attributes: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_memory_attributes2 *"], init: object = ..., /) -> kvm_memory_attributes2: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_pre_fault_memory *"], init: object = ..., /) -> kvm_pre_fault_memory: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_run_memory_fault *"], init: object = ..., /) -> kvm_run_memory_fault: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_userspace_memory_region2 *"], init: object = ..., /) -> kvm_userspace_memory_region2: ...
    @overload
    def new(self, cdecl: str | CType, init: object = ..., /) -> Cdata: ...

ffi: Final[_Ffi]

KVM_CAP_USER_MEMORY2: Final[int] = 231
KVM_CAP_MEMORY_FAULT_INFO: Final[int] = 232
KVM_CAP_MEMORY_ATTRIBUTES: Final[int] = 233
KVM_CAP_GUEST_MEMFD: Final[int] = 234
KVM_CAP_VM_TYPES: Final[int] = 235
KVM_CAP_PRE_FAULT_MEMORY: Final[int] = 236
KVM_CAP_GUEST_MEMFD_FLAGS: Final[int] = 244
KVM_X86_DEFAULT_VM: Final[int] = 0
KVM_X86_SW_PROTECTED_VM: Final[int] = 1
KVM_X86_SEV_VM: Final[int] = 2
KVM_X86_SEV_ES_VM: Final[int] = 3
KVM_X86_SNP_VM: Final[int] = 4
KVM_X86_TDX_VM: Final[int] = 5
KVM_MEM_GUEST_MEMFD: Final[int] = 4
KVM_MEM_USERFAULT: Final[int] = 8
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final[int] = 8
GUEST_MEMFD_FLAG_MMAP: Final[int] = 1
GUEST_MEMFD_FLAG_INIT_SHARED: Final[int] = 2
GUEST_MEMFD_FLAG_NO_DIRECT_MAP: Final[int] = 4
GUEST_MEMFD_MAGIC: Final[int] = 0x474d454d
ANON_INODE_FS_MAGIC: Final[int] = 0x9041934
EHWPOISON: Final[int] = 133
KVM_EXIT_MEMORY_FAULT: Final[int] = 39
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final[int] = 8
KVM_SET_USER_MEMORY_REGION2: Final[int] = 0x40a0ae49
KVM_SET_MEMORY_ATTRIBUTES: Final[int] = 0x4020aed2
KVM_SET_MEMORY_ATTRIBUTES2: Final[int] = 0xc080aed2
KVM_SET_MEMORY_ATTRIBUTES2_V1: Final[int] = 0xc080aed6
KVM_CREATE_GUEST_MEMFD: Final[int] = 0xc040aed4
KVM_PRE_FAULT_MEMORY: Final[int] = 0xc040aed5

REQUESTS: Final[dict[int, str]]
