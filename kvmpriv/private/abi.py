"""The base class of the ABIs: what they have in common, and the traits in which they differ."""

from __future__ import annotations

import errno as _errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..errors import ArgumentError
from ..libc import os_error
from ..memory import PAGE_SIZE, HostMemory
from .backing import PrivateSlot
from .conversion import ConversionError, covered, free_unused, in_slots
from .vm import PrivateVm

if TYPE_CHECKING:
    from ..faults import FaultLayout
    from ..kvm import Kvm
    from ..vcpu import Vcpu
    from .backing import PrivateFile

__all__ = ["PrivateAbi", "Traits"]


class Traits(NamedTuple):
    """How an ABI differs from the others, for code that has to do different things."""

    #: Whether a page of a new slot is private until it is converted.
    default_private: bool
    #: True if a guest can't choose how it accesses a page (software-protected VMs): a fault then
    #: means that another thread converted the page, and the guest only has to be re-entered.
    access_follows_state: bool
    #: How many pages stand behind one gfn.  2: one in the file, while it is private, and one in
    #: host memory, while it is shared.  1: the page in the file, private or shared.
    backings: Literal[1, 2]
    #: What is converted: guest physical addresses of the VM, with or without a slot, all or
    #: nothing; or offsets of the file, where a conversion may stop part-way.
    converts: Literal["vm", "file"]


class PrivateAbi(ABC):
    """One way in which a kernel offers private memory.

    Addresses, offsets and sizes are in bytes and page aligned.  What the kernel refuses is an
    OSError with its errno.  README.md in this directory describes how to add an ABI.
    """

    #: The name by which :func:`choose` finds it.
    name: str
    traits: Traits
    #: How exits of its VMs report a fault.
    fault_layout: FaultLayout
    #: The type of its VMs, for KVM_CREATE_VM.
    vm_type = 0
    #: The flag of a slot that has a file.
    slot_flag: int

    # -- what each ABI defines -----------------------------------------------------------------

    @abstractmethod
    def create_file(self, vm: PrivateVm, size: int) -> PrivateFile:
        """Make a file of `size` bytes for private pages.

        OSError: ENOSYS, ENOTTY, EINVAL where the kernel does not have this ABI.
        """

    @abstractmethod
    def set_slot(self, slot: PrivateSlot) -> None:
        """Issue the ioctl that makes this slot, by :meth:`Vm.set_slot`."""

    def convert_vm(self, vm: PrivateVm, gpa: int, size: int, *, private: bool) -> None:
        """Issue the ioctl that converts a range of the VM, for ``converts == "vm"``."""
        raise self._must_define("convert_vm", "vm")

    def convert_file(self, file: PrivateFile, offset: int, size: int, *, private: bool) -> None:
        """Issue the ioctl that converts a range of a file, for ``converts == "file"``.

        Raises ConversionError, with `offset`, if the kernel says where it stopped.  If it has
        converted a part of the range, `converted` is that part's size.
        """
        raise self._must_define("convert_file", "file")

    def populate(self, vcpu: Vcpu, gpa: int, size: int) -> None:
        """Map a range before the guest touches it.  EOPNOTSUPP, ENOTTY if the kernel can't."""
        raise os_error(_errno.EOPNOTSUPP, f"{self.name} can't map pages before they are touched")

    # -- what all have -------------------------------------------------------------------------

    def create_vm(self, kvm: Kvm) -> PrivateVm:
        """Make a VM of the type that can have private memory.  OSError: EINVAL if there is none."""
        return kvm.create_vm_as(lambda fd, size: PrivateVm(self, fd, size), self.vm_type)

    def create_memory(self, file: PrivateFile, offset: int, size: int) -> HostMemory:
        """Make memory for the shared pages of a slot: a mapping of `file` if that has them too."""
        if self.traits.backings == 1:
            return HostMemory(size, fd=file.fileno(), offset=offset)
        return HostMemory(size, reserve=False)

    def bind(
        self,
        vm: PrivateVm,
        guest_phys_addr: int,
        memory_size: int,
        file: PrivateFile,
        offset: int = 0,
        *,
        memory: HostMemory | None = None,
        memory_offset: int = 0,
        slot: int | None = None,
        flags: int = 0,
    ) -> PrivateSlot:
        """Make a slot: private pages from `file` at `offset`, shared ones from `memory`.

        The slot keeps both alive, closed or not; its number is the lowest free one if none is
        given.  `flags` of ``KVM_MEM_*`` are set beside the ABI's own.  ArgumentError if the range
        is empty or not inside `memory`, or the VM is one of another ABI; ClosedError if the file
        is closed.
        """
        if memory_size <= 0:  # for KVM, a slot of size 0 is one to delete
            raise ArgumentError(f"memory_size must be above 0, not {memory_size:#x}")
        if vm.abi is not self:
            raise ArgumentError(f"{vm!r} was made for {vm.abi!r}, not for {self!r}")
        new = PrivateSlot(
            vm,
            slot,
            guest_phys_addr,
            memory_size,
            flags | self.slot_flag,
            file,
            offset,
            memory,
            memory_offset,
        )
        self.set_slot(new)
        return new

    def convert(
        self, vm: PrivateVm, gpa: int, size: int, *, private: bool, keep: bool = False
    ) -> None:
        """Make a range private, or shared.

        An ABI that converts VMs needs no slots, and converts all of the range or nothing.  One that
        converts files needs private slots that cover the range (else OSError, ENOENT), and raises
        ConversionError for a conversion that stopped part-way.

        With two backings, the pages that the guest can't reach any more are freed afterwards, so
        that no page is kept twice: after a conversion there and back the guest finds zeros.  A page
        is not freed if any slot of this process has it at another address, private or shared.
        Slots of other processes, and slots that were made with the file's number, are not known:
        their pages are freed.  `keep=True` frees nothing.  NotFreedError (an OSError): the range is
        converted, but pages could not be freed.
        """
        with vm.slots_lock:
            if self.traits.converts == "vm":
                self.convert_vm(vm, gpa, size, private=private)
                vm.conversions += 1
            else:
                self._convert_files(vm, gpa, size, private=private)
            if self.traits.backings == 2 and not keep:
                free_unused(vm, gpa, size, private=private)

    def _convert_files(self, vm: PrivateVm, gpa: int, size: int, *, private: bool) -> None:
        if size <= 0 or not covered(vm, gpa, size):
            raise OSError(
                _errno.ENOENT if size > 0 else _errno.EINVAL,
                f"{self.name}: {size:#x} bytes at {gpa:#x} are not covered by private slots",
            )
        for slot, start, part in in_slots(vm, gpa, size):
            offset = slot.offset + start - slot.guest_phys_addr
            try:
                self.convert_file(slot.file, offset, part, private=private)
            except OSError as error:
                stopped = error
                if not isinstance(stopped, ConversionError):
                    if start == gpa:
                        raise
                    # Slots before this one are converted, which the caller must get to know.
                    what = error.strerror or str(error)
                    stopped = ConversionError(error.errno or _errno.EIO, what, offset=offset)
                stopped.gpa = slot.guest_phys_addr + stopped.offset - slot.offset
                stopped.converted += start - gpa
                vm.conversions += stopped.converted > 0
                raise stopped from None
            vm.conversions += 1

    def _must_define(self, method: str, converts: str) -> TypeError:
        return TypeError(
            f"{self!r} does not define {method}(); an ABI with the trait converts={converts!r} must"
        )

    def try_out(self, kvm: Kvm) -> None:
        """Make a VM, a file and a slot, and convert it.  OSError: what the kernel refused."""
        with self.create_vm(kvm) as vm:
            vm.add_private_memory(0, PAGE_SIZE)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"
