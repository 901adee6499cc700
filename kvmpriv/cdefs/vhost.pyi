# Generated from cdefs/vhost.h by `make cdefs`: edit the header instead.
# mypy: disable-error-code="overload-overlap"

from typing import Final, Literal, Protocol, overload

from .cffi_types import Cdata, CType, Ffi
from .vhost_structs import vhost_memory, vhost_memory_region, vhost_vring_addr, vhost_vring_file, vhost_vring_state

class _Ffi(Ffi, Protocol):
    @overload
    def new(self, cdecl: Literal["struct vhost_memory *"], init: object = ..., /) -> vhost_memory: ...
    @overload
    def new(self, cdecl: Literal["struct vhost_memory_region *"], init: object = ..., /) -> vhost_memory_region: ...
    @overload
    def new(self, cdecl: Literal["struct vhost_vring_addr *"], init: object = ..., /) -> vhost_vring_addr: ...
    @overload
    def new(self, cdecl: Literal["struct vhost_vring_file *"], init: object = ..., /) -> vhost_vring_file: ...
    @overload
    def new(self, cdecl: Literal["struct vhost_vring_state *"], init: object = ..., /) -> vhost_vring_state: ...
    @overload
    def new(self, cdecl: str | CType, init: object = ..., /) -> Cdata: ...

ffi: Final[_Ffi]

VHOST_VIRTIO: Final[int] = 175
VHOST_GET_FEATURES: Final[int] = 0x8008af00
VHOST_SET_FEATURES: Final[int] = 0x4008af00
VHOST_SET_OWNER: Final[int] = 0xaf01
VHOST_SET_MEM_TABLE: Final[int] = 0x4008af03
VHOST_SET_VRING_NUM: Final[int] = 0x4008af10
VHOST_SET_VRING_ADDR: Final[int] = 0x4028af11
VHOST_SET_VRING_BASE: Final[int] = 0x4008af12
VHOST_GET_VRING_BASE: Final[int] = 0xc008af12
VHOST_SET_VRING_KICK: Final[int] = 0x4008af20
VHOST_SET_VRING_CALL: Final[int] = 0x4008af21
VHOST_SET_VRING_ERR: Final[int] = 0x4008af22
VHOST_NET_SET_BACKEND: Final[int] = 0x4008af30
VHOST_VSOCK_SET_GUEST_CID: Final[int] = 0x4008af60
VHOST_VSOCK_SET_RUNNING: Final[int] = 0x4004af61
VHOST_F_LOG_ALL: Final[int] = 26
VHOST_NET_F_VIRTIO_NET_HDR: Final[int] = 27

REQUESTS: Final[dict[int, str]]
