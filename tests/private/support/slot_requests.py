"""Slot requests that differ from a good one in the fields that a test names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvmpriv import HostMemory, Vm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm

from .syscalls import GIB, PAGE, PROT_NONE, address_of, call, errno_of

if TYPE_CHECKING:
    from kvmpriv.fd import Fd


class Slots(ABC):
    """Requests for memory slots that differ from a good one in the named fields."""

    good: dict[str, int]
    #: The name of the file offset in `good`.
    offset_field: str

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.asked = 0

    @abstractmethod
    def struct(self, **changes: int) -> Any:
        """The struct for the good slot with `changes`."""

    request: int = k.KVM_SET_USER_MEMORY_REGION

    def set(self, **changes: int) -> str:
        """The kernel's answer to the good slot with `changes`."""
        self.asked += 1
        struct = self.struct(**changes)  # passed by address: a test may use another request
        return errno_of(self.vm.ioctl_errno(self.request, address_of(struct)))

    def set_at(self, address: int) -> str:
        """The kernel's answer to the struct at an address."""
        self.asked += 1
        return errno_of(self.vm.ioctl_errno(self.request, address))

    def delete(self, **changes: int) -> str:
        """The kernel's answer to the deletion of the good slot."""
        return self.set(**{"memory_size": 0, **changes})

    def refuses(self, expected: str, twin: dict[str, int] | None = None, /, **changes: int) -> None:
        """The good slot with `changes` is refused; its twin without them succeeds."""
        assert self.set(**changes) == expected, changes
        self.accepts(**(twin or {}))

    def accepts(self, **changes: int) -> None:
        """The good slot with `changes` can be made; it is deleted again."""
        with self.held(**changes):
            pass

    @contextmanager
    def held(self, **changes: int) -> Iterator[None]:
        """The good slot with `changes` exists inside."""
        assert self.set(**changes) == "ok", changes
        yield
        same = {name: value for name, value in changes.items() if name in ("slot", "flags")}
        assert self.delete(**same) == "ok", changes


class RestrictedSlots(Slots):
    """v9: KVM_SET_USER_MEMORY_REGION with struct kvm_userspace_memory_region_ext."""

    offset_field = "restricted_offset"

    def __init__(self, vm: Vm, file: Fd | int, userspace_addr: int) -> None:
        super().__init__(vm)
        self.good = {
            "slot": 3,
            "flags": rm.KVM_MEM_PRIVATE,
            "guest_phys_addr": 4 * GIB,
            "memory_size": 16 * PAGE,
            "userspace_addr": userspace_addr,
            "restricted_offset": 32 * PAGE,
            "restricted_fd": file if isinstance(file, int) else file.fileno(),
        }

    def struct(self, **changes: int) -> Any:
        struct = rm.ffi.new("struct kvm_userspace_memory_region_ext *")
        for name, value in {**self.good, **changes}.items():
            if name == "pad2":
                for at in range(14):
                    struct.pad2[at] = value
            elif name.startswith(("restricted_", "pad")):
                setattr(struct, name, value)
            else:
                setattr(struct.region, name, value)
        return struct


class GuestMemfdSlots(Slots):
    """Mainline: KVM_SET_USER_MEMORY_REGION2 with struct kvm_userspace_memory_region2."""

    offset_field = "guest_memfd_offset"

    request = gm.KVM_SET_USER_MEMORY_REGION2

    def __init__(self, vm: Vm, file: Fd | int, userspace_addr: int) -> None:
        super().__init__(vm)
        self.good = {
            "slot": 3,
            "flags": gm.KVM_MEM_GUEST_MEMFD,
            "guest_phys_addr": 4 * GIB,
            "memory_size": 16 * PAGE,
            "userspace_addr": userspace_addr,
            "guest_memfd_offset": 32 * PAGE,
            "guest_memfd": file if isinstance(file, int) else file.fileno(),
        }

    def struct(self, **changes: int) -> Any:
        struct = gm.ffi.new("struct kvm_userspace_memory_region2 *")
        for name, value in {**self.good, **changes}.items():
            if name == "pad2":
                for at in range(14):
                    struct.pad2[at] = value
            else:
                setattr(struct, name, value)
        return struct


#: The errno for a range of a guest_memfd file that another slot has: each kernel has one of them,
#: EEXIST since commit 7ea987a90585.
FILE_OVERLAP = frozenset({"EINVAL", "EEXIST"})


class Edge:
    """A page before one that can't be read, for structs that end where memory ends."""

    def __init__(self) -> None:
        self.memory = HostMemory(2 * PAGE)
        call("mprotect", self.memory.userspace_addr + PAGE, PAGE, PROT_NONE)

    def put(self, struct: Any, readable: int) -> int:
        """Put the first `readable` bytes right before the edge; returns the struct's address."""
        data = bytes(k.ffi.buffer(struct))[:readable]
        self.memory.write(PAGE - readable, data)
        return self.memory.userspace_addr + PAGE - readable

    def close(self) -> None:
        self.memory.close()
