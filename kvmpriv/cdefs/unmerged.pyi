# Generated from cdefs/unmerged.h by `make cdefs`: edit the header instead.
# mypy: disable-error-code="overload-overlap"

from typing import Final, Literal, Protocol, overload

from .cffi_types import Cdata, CType, Ffi
from .unmerged_structs import kvm_userspace_memory_region2

class _Ffi(Ffi, Protocol):
    @overload
    def new(self, cdecl: Literal["struct kvm_userspace_memory_region2 *"], init: object = ..., /) -> kvm_userspace_memory_region2: ...
    @overload
    def new(self, cdecl: str | CType, init: object = ..., /) -> Cdata: ...

ffi: Final[_Ffi]

GUEST_MEMFD_FLAG_HUGETLB: Final[int] = 4
GUEST_MEMFD_FLAG_HUGE_PAGES: Final[int] = 4
GUEST_MEMFD_FLAG_WRITE: Final[int] = 8
FIRECRACKER_FLAG_NO_DIRECT_MAP: Final[int] = 2
KVM_MEMORY_EXIT_FLAG_USERFAULT: Final[int] = 16
KVM_MEMORY_EXIT_FLAG_APF: Final[int] = 32
KVM_CAP_USERFAULT: Final[int] = 245
KVM_CAP_ASYNC_PF_USERFAULT: Final[int] = 246
KVM_CAP_ASYNC_PF_USERFAULT_EVENTFD: Final[int] = 247
IN_PLACE_V1_CAP: Final[int] = 246
IN_PLACE_V2_CAP_FIRST: Final[int] = 248
IN_PLACE_V8_CAP_LAST: Final[int] = 251
KVM_ASYNC_PF_NR: Final[int] = 214

REQUESTS: Final[dict[int, str]]
