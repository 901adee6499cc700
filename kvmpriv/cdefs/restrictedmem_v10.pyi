# Generated from cdefs/restrictedmem_v10.h by `make cdefs`: edit the header instead.
# mypy: disable-error-code="overload-overlap"

from typing import Final, Literal, Protocol, overload

from .cffi_types import Cdata, CType, Ffi
from .restrictedmem_v10_structs import kvm_memory_attributes

class _Ffi(Ffi, Protocol):
    @overload
    def new(self, cdecl: Literal["struct kvm_memory_attributes *"], init: object = ..., /) -> kvm_memory_attributes: ...
    @overload
    def new(self, cdecl: str | CType, init: object = ..., /) -> Cdata: ...

ffi: Final[_Ffi]

KVM_CAP_MEMORY_ATTRIBUTES: Final[int] = 225
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final[int] = 8
KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES: Final[int] = 0x8008aed2
KVM_SET_MEMORY_ATTRIBUTES: Final[int] = 0xc020aed3

REQUESTS: Final[dict[int, str]]
