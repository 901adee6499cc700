# Generated from cdefs/restrictedmem.h by `make cdefs`: edit the header instead.
# mypy: disable-error-code="overload-overlap"

from typing import Final, Literal, Protocol, overload

from .cffi_types import Cdata, CType, Ffi
from .restrictedmem_structs import kvm_run_memory_fault, kvm_userspace_memory_region_ext

class _Ffi(Ffi, Protocol):
    @overload
    def new(self, cdecl: Literal["struct kvm_run_memory_fault *"], init: object = ..., /) -> kvm_run_memory_fault: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_userspace_memory_region_ext *"], init: object = ..., /) -> kvm_userspace_memory_region_ext: ...
    @overload
    def new(self, cdecl: str | CType, init: object = ..., /) -> Cdata: ...

ffi: Final[_Ffi]

__NR_memfd_restricted: Final[int] = 0x1c3
RESTRICTEDMEM_MAGIC: Final[int] = 0x5245534d
KVM_CAP_PRIVATE_MEM: Final[int] = 224
KVM_MEM_PRIVATE: Final[int] = 4
KVM_MAP_GPA_RANGE_WANT_PRIVATE: Final[int] = 0x100
KVM_MAP_GPA_RANGE_WANT_SHARED: Final[int] = 0x200
KVM_EXIT_MEMORY_FAULT: Final[int] = 38
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final[int] = 1

REQUESTS: Final[dict[int, str]]
