"""A VM with private memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..vm import Vm

if TYPE_CHECKING:
    from ..exits import MemoryFaultExit
    from ..memory import HostMemory
    from .abi import PrivateAbi
    from .backing import PrivateFile, PrivateSlot

__all__ = ["PrivateVm"]


class PrivateVm(Vm):
    """A VM whose private memory is that of `abi`; made by :func:`kvmpriv.private.create_vm`."""

    def __init__(self, abi: PrivateAbi, fd: int, vcpu_mmap_size: int) -> None:
        self.abi = abi
        #: How many conversions have been made by `convert`, in whole or in part.
        self.conversions = 0
        #: vcpu_id -> the last fault, `conversions` when it was served, how often it has come since.
        self.last_faults: dict[int, tuple[MemoryFaultExit, int, int]] = {}
        super().__init__(fd, vcpu_mmap_size, abi.fault_layout)

    def add_private_memory(
        self,
        guest_phys_addr: int,
        size: int,
        *,
        private: bool = True,
        file: PrivateFile | None = None,
        offset: int = 0,
        memory: HostMemory | None = None,
        memory_offset: int = 0,
        slot: int | None = None,
        flags: int = 0,
    ) -> PrivateSlot:
        """Add memory that can be private; all of it is `private`, or shared, at first.

        A file and memory that are not given are made, and closed when the slot ends.  The other
        parameters are those of :meth:`PrivateAbi.bind`.  OSError: what the kernel refuses; nothing
        is left behind then.
        """
        made: list[PrivateFile | HostMemory] = []
        try:
            if file is None:
                file = self.abi.create_file(self, offset + size)
                made.append(file)
            if memory is None:
                memory = self.abi.create_memory(file, offset, size)
                memory_offset = 0
                made.append(memory)
            with self.slots_lock:
                new = self.abi.bind(
                    self,
                    guest_phys_addr,
                    size,
                    file,
                    offset,
                    memory=memory,
                    memory_offset=memory_offset,
                    slot=slot,
                    flags=flags,
                )
                new.own(made)
        except BaseException:
            for thing in made:
                thing.close()
            raise
        try:
            new.convert(private=private, keep=True)
        except BaseException:
            new.delete()
            raise
        return new
