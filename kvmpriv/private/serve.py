"""Serving a guest that asks for conversions; loaded when first used, as it needs the exits."""

from __future__ import annotations

import errno as _errno
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from ..cdefs import kvm as kvm_h
from ..exits import HypercallExit, MemoryFaultExit
from ..memory import PAGE_SIZE
from .conversion import ConversionError, NotFreedError, covered

if TYPE_CHECKING:
    from ..vcpu import Vcpu
    from .vm import PrivateVm

__all__ = ["serve_conversion"]

#: How often the same fault may come back: the page may have been converted by other means.
_PATIENCE = 8


def serve_conversion(vm: PrivateVm, vcpu: Vcpu, exit_: object) -> bool:
    """Convert memory if the guest asks for it by this exit; True if KVM_RUN may be called again.

    A guest asks by KVM_HC_MAP_GPA_RANGE, for which the VM must have KVM_CAP_EXIT_HYPERCALL enabled,
    or by an access of the other kind, which is KVM_EXIT_MEMORY_FAULT.  The hypercall returns 0 or a
    negative errno to the guest: -EINVAL for a range that private slots don't cover, and -EAGAIN
    where a conversion stopped part-way, whatever part of the range is converted then.

    Returns False for any other exit; for a fault outside private slots; and for a fault that comes
    back again and again without a conversion: the state of the page is not its cause.

    RuntimeWarning if pages could not be freed (:class:`NotFreedError`).  The guest has its answer
    by then: its memory is converted.
    """
    if isinstance(exit_, MemoryFaultExit):
        return _serve_fault(vm, vcpu, exit_)
    if not isinstance(exit_, HypercallExit) or exit_.nr != kvm_h.KVM_HC_MAP_GPA_RANGE:
        return False
    gpa, pages, attributes = exit_.args[:3]
    size = pages * PAGE_SIZE
    not_freed: NotFreedError | None = None
    errno = _errno.EINVAL
    if covered(vm, gpa, size):
        private = bool(attributes & kvm_h.KVM_MAP_GPA_RANGE_ENCRYPTED)
        errno = 0
        try:
            vm.abi.convert(vm, gpa, size, private=private)
        except NotFreedError as error:
            not_freed = error
        except OSError as error:
            errno = error.errno or _errno.EIO
    vcpu.kvm_run.hypercall.ret = -errno & 0xFFFF_FFFF_FFFF_FFFF
    _warn(not_freed)
    return True


def _serve_fault(vm: PrivateVm, vcpu: Vcpu, fault: MemoryFaultExit) -> bool:
    if not covered(vm, fault.gpa, fault.size):
        return False
    last, conversions, times = vm.last_faults.get(vcpu.vcpu_id, (None, 0, 0))
    times = times + 1 if last == fault and conversions == vm.conversions else 1
    if times > _PATIENCE:
        return False
    not_freed: NotFreedError | None = None
    if not vm.abi.traits.access_follows_state:
        try:
            vm.abi.convert(vm, fault.gpa, fault.size, private=fault.private)
        except NotFreedError as error:
            not_freed = error
        except ConversionError as error:
            if error.errno != _errno.EAGAIN:  # else the guest tries again, and so do we
                raise
    elif times > 1:
        # Linux 6.12 (kvm_mmu_page_fault) caches that a gfn has no slot, and takes each access to
        # it for a shared one, also once there is a slot.  Mapping the page ends that.
        with suppress(OSError):
            vm.abi.populate(vcpu, fault.gpa, fault.size)
    vm.last_faults[vcpu.vcpu_id] = fault, vm.conversions, times
    _warn(not_freed)
    return True


def _warn(not_freed: NotFreedError | None) -> None:
    """Called last: with warnings turned into errors, the exit is served all the same."""
    if not_freed is not None:
        warnings.warn(str(not_freed.strerror), RuntimeWarning, stacklevel=3)
