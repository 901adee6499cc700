"""One protocol over both ABIs, and which of them this machine has.

    abi = private.choose(kvm)
    with abi.create_vm(kvm) as vm, abi.create_file(vm, size) as file, HostMemory(size) as memory:
        slot = abi.bind(vm, gpa, size, file, memory=memory)
        abi.convert(vm, gpa, size, private=True)

A VMM's loop gives its exits to :func:`serve_conversion`.
"""

from __future__ import annotations

import errno as _errno
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from ..cdefs import kvm as kvm_h
from ..exits import HypercallExit, MemoryFaultExit
from ..memory import PAGE_SIZE
from .backing import NotFreedError, PrivateSlot, conversions

if TYPE_CHECKING:
    from ..faults import FaultLayout
    from ..kvm import Kvm
    from ..memory import HostMemory
    from ..vcpu import Vcpu
    from ..vm import Vm
    from .backing import PrivateFile

__all__ = ["PrivateAbi", "serve_conversion", "try_out"]


class PrivateAbi(Protocol):
    """What :mod:`restrictedmem` and :mod:`guest_memfd` have in common; each says how it differs.

    Addresses, offsets and sizes are in bytes and page aligned.  What the kernel refuses is an
    OSError with its errno.
    """

    @property
    def NAME(self) -> str: ...

    @property
    def DEFAULT_PRIVATE(self) -> bool:
        """What a gfn of a private-capable slot is until it is converted."""

    @property
    def ACCESS_FOLLOWS_STATE(self) -> bool:
        """If guests of :meth:`create_vm` never want the other kind; what a fault means then."""

    @property
    def FAULT_LAYOUT(self) -> FaultLayout:
        """How KVM_EXIT_MEMORY_FAULT comes; Vcpu.exit() decodes either to MemoryFaultExit."""

    def create_vm(self, kvm: Kvm) -> Vm:
        """Make a VM of the kind that can have private memory."""

    def create_file(self, vm: Vm, size: int) -> PrivateFile:
        """Make a file for private pages.  ENOSYS, ENOTTY, EINVAL where the kernel has no such."""

    def bind(
        self,
        vm: Vm,
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
        given.  ValueError when the range is not inside `memory` or the file is closed.
        """

    def convert(self, vm: Vm, gpa: int, size: int, *, private: bool, keep: bool = False) -> None:
        """Make a range private, or shared; no slot needs to be there.

        All or nothing.  What the guest can't reach any more is then freed, so that no page is
        held twice: converting there and back finds zeros.  Pages that any slot of this process has
        at another address stay, whatever that address is converted to; but not those of another
        process's slots, nor of slots that were given the file by its number.
        `keep=True` frees nothing.  NotFreedError (an OSError): it is converted all the same.
        """

    def populate(self, vcpu: Vcpu, gpa: int, size: int) -> None:
        """Map a range ahead of the guest.  EOPNOTSUPP, ENOTTY where the kernel can not."""


def try_out(abi: PrivateAbi, kvm: Kvm) -> None:
    """Make a VM, a file and a slot, and convert it.  OSError: what the kernel refused, and how."""
    with abi.create_vm(kvm) as vm, abi.create_file(vm, PAGE_SIZE) as file:
        abi.bind(vm, 0, PAGE_SIZE, file)
        abi.convert(vm, 0, PAGE_SIZE, private=True)


def serve_conversion(abi: PrivateAbi, vm: Vm, vcpu: Vcpu, exit_: Any) -> bool:
    """Convert memory as the guest asks for it; True if `exit_` was that, and KVM_RUN may go on.

    By KVM_HC_MAP_GPA_RANGE (the VM has KVM_CAP_EXIT_HYPERCALL enabled for it; the guest gets 0 or
    a negative errno as its answer), or by an access of the other kind (KVM_EXIT_MEMORY_FAULT).  A
    guest converts no memory but that of private-capable slots: -EINVAL, and False.  False, too, for
    a fault that comes back although nobody else has converted anything: it is not the state of the
    page that keeps it from the guest.  A RuntimeWarning tells of pages that could not be freed
    (:class:`NotFreedError`): the guest has its answer, which is that memory was converted.
    """
    not_freed: NotFreedError | None = None
    if isinstance(exit_, MemoryFaultExit):
        if not _all_private_capable(vm, exit_.gpa, exit_.size):
            return False
        times = _how_often(vm, vcpu, exit_)
        if times > _PATIENCE:
            return False
        if not abi.ACCESS_FOLLOWS_STATE:
            try:
                abi.convert(vm, exit_.gpa, exit_.size, private=exit_.private)
            except NotFreedError as error:
                not_freed = error
        elif times > 1:
            # KVM (6.12, kvm_mmu_page_fault) takes an access for a shared one where it remembers
            # that there was no memory once, and says so for ever: until the page is mapped ahead.
            with suppress(OSError):
                abi.populate(vcpu, exit_.gpa, exit_.size)
        _last_faults[vcpu] = exit_, conversions.get(vm, 0), times
        _warn(not_freed)
        return True
    if not isinstance(exit_, HypercallExit) or exit_.nr != kvm_h.KVM_HC_MAP_GPA_RANGE:
        return False
    gpa, pages, attributes = exit_.args[:3]
    size = pages * PAGE_SIZE
    errno = _errno.EINVAL
    if _all_private_capable(vm, gpa, size):
        private = bool(attributes & kvm_h.KVM_MAP_GPA_RANGE_ENCRYPTED)
        errno = 0
        try:
            abi.convert(vm, gpa, size, private=private)
        except NotFreedError as error:
            not_freed = error
        except OSError as error:
            errno = error.errno or _errno.EIO
    vcpu.kvm_run.hypercall.ret = -errno & 0xFFFF_FFFF_FFFF_FFFF
    _warn(not_freed)
    return True


def _warn(not_freed: NotFreedError | None) -> None:
    """Last of all: who makes errors of warnings finds the exit served."""
    if not_freed is not None:
        warnings.warn(str(not_freed.strerror), RuntimeWarning, stacklevel=3)


#: vCPU -> its last fault, how many conversions there had been when it was served, and how often it
#: has come since.
_last_faults: WeakKeyDictionary[Vcpu, tuple[MemoryFaultExit, int, int]] = WeakKeyDictionary()
#: So often a fault may come back: there may have been a conversion by other means.
_PATIENCE = 8


def _how_often(vm: Vm, vcpu: Vcpu, fault: MemoryFaultExit) -> int:
    last, then, times = _last_faults.get(vcpu, (None, 0, 0))
    return times + 1 if last == fault and then == conversions.get(vm, 0) else 1


def _all_private_capable(vm: Vm, gpa: int, size: int) -> bool:
    end = gpa + size
    with vm.slots_lock:
        slots = [slot for slot in vm.slots.values() if isinstance(slot, PrivateSlot)]
    for slot in sorted(slots, key=lambda one: one.guest_phys_addr):
        if slot.guest_phys_addr <= gpa < slot.end:
            gpa = slot.end
    return gpa >= end
