"""A virtual machine: its memory slots, its vCPUs, its interrupt controllers."""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from .base import KvmFd
from .cdefs import kvm as kvm_h
from .errors import ArgumentError, ClosedError
from .fd import Structs, check_range, new_struct
from .libc import ioctl as _ioctl
from .memory import PAGE_SIZE, HostMemory
from .slots import Lifeline, Slot, without
from .wakeup import SignalsBlocked

if TYPE_CHECKING:
    from _thread import RLock

    from .cdefs.cffi_types import Cdata
    from .cdefs.kvm_structs import kvm_clock_data
    from .faults import FaultLayout
    from .routing import IrqchipRoute, MsiRoute
    from .slots import Held
    from .vcpu import Vcpu

__all__ = ["Vm"]

_ffi = kvm_h.ffi
_CHECK_EXTENSION = kvm_h.KVM_CHECK_EXTENSION
_SET_REGION = kvm_h.KVM_SET_USER_MEMORY_REGION
_REGIONS = Structs(_ffi.typeof("struct kvm_userspace_memory_region *"))
_SlotT = TypeVar("_SlotT", bound=Slot)


def _region(slot: Slot) -> tuple[int, ...]:
    """The fields of struct kvm_userspace_memory_region."""
    return (slot.slot, slot.flags, slot.guest_phys_addr, slot.memory_size, slot.userspace_addr)


class Vm(KvmFd):
    """A virtual machine; made by :meth:`Kvm.create_vm`.

    The methods named after an ioctl are that ioctl (Documentation/virt/kvm/api.rst), and raise
    OSError with the errno that it fails with.  ArgumentError is raised for a value that does not
    fit its field, ClosedError after close.

    `slots` maps slot numbers to the slots that were set through methods; those set by
    :meth:`ioctl` are not in it.  For the layers above that set slots by ioctls of their own there
    are :meth:`set_slot` and `slots_lock`.
    """

    _what = "VM"

    def __init__(
        self, fd: int, vcpu_mmap_size: int, fault_layout: FaultLayout | None = None
    ) -> None:
        self._vcpu_mmap_size = vcpu_mmap_size
        self._lifeline = Lifeline(fault_layout)
        self._slot_limit = 0  # slots an address space can have; asked when a number is chosen
        #: Held while slots are set; hold it to look at `slots` more than once.  Re-entrant.
        self.slots_lock: RLock = self._lifeline.lock
        #: slot number -> the slot
        self.slots: dict[int, Slot] = self._lifeline.slots
        super().__init__(fd)

    def close(self) -> None:
        """Close the VM's descriptor.  Its vCPUs and their memory live until they are closed too."""
        with SignalsBlocked(), self._lifeline.lock:
            if not self.closed:
                super().close()
                self._lifeline.leave()

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION for this VM.

        Returns 0 if `cap` is not supported; otherwise a positive int whose meaning depends on the
        capability.
        """
        result: int = _ioctl(self._fd, _CHECK_EXTENSION, cap)
        # The check costs time, and only a number that ctypes has cut to 64 bits needs it.
        if result <= 0 or cap > 0x3FFFFFFF or cap < 0:
            check_range("cap", cap, 1 << 64)
            if result < 0:
                raise self._error(_CHECK_EXTENSION, cap)
        return result

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """KVM_CREATE_VCPU.  `vcpu_id` is also the local APIC's number.

        OSError: EEXIST for an id in use, EINVAL for one from KVM_CAP_MAX_VCPU_ID on.
        """
        from .vcpu import Vcpu  # a probe without vCPUs needs none of its imports

        check_range("vcpu_id", vcpu_id, 1 << 32)  # kernels before 6.12 take its low 32 bits
        with SignalsBlocked():
            fd = self.ioctl(kvm_h.KVM_CREATE_VCPU, vcpu_id)
            return Vcpu(fd, self._vcpu_mmap_size, self._lifeline, vcpu_id)

    # -- memory --------------------------------------------------------------------------------

    def map(
        self,
        memory: HostMemory,
        guest_phys_addr: int,
        *,
        size: int | None = None,
        offset: int = 0,
        flags: int = 0,
        slot: int | None = None,
    ) -> Slot:
        """Give the guest `size` bytes of `memory` from `offset` at `guest_phys_addr`.

        All in bytes, page aligned; `size` None means up to the end of `memory`.  `slot` None means
        the lowest free number.  The mapping lives as long as the slot does.  ArgumentError when the
        range is not inside `memory`, ClosedError when `memory` is closed, OSError (ENOSPC) when
        every slot is in use, and those of :meth:`set_user_memory_region`.
        """
        size = memory.size - offset if size is None else size
        if offset < 0 or size <= 0 or offset + size > memory.size:
            raise ArgumentError(
                f"{size:#x} bytes at {offset:#x} are not inside host memory of {memory.size:#x}"
            )
        userspace_addr = memory.userspace_addr + offset
        new = Slot(self, slot, guest_phys_addr, size, flags, (memory,), userspace_addr)
        self.set_slot(new, _SET_REGION, _REGIONS, _region)
        return new

    def set_user_memory_region(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION, with addresses that the caller keeps valid.

        All in bytes, page aligned; `memory_size` 0 deletes the slot; `flags` of ``KVM_MEM_*``.
        OSError: EINVAL (alignment, flags, slot number, a change that is not allowed), EEXIST
        (overlaps another slot).
        """
        old = self.slots.get(slot)  # one that is only changed goes on using what it has
        held = old.held if old and memory_size else ()
        new = Slot(self, slot, guest_phys_addr, memory_size, flags, held, userspace_addr)
        self.set_slot(new, _SET_REGION, _REGIONS, _region)

    def set_slot(
        self,
        slot: _SlotT,
        request: int,
        structs: Structs,
        fields: Callable[[_SlotT], tuple[object, ...]],
    ) -> None:
        """Set, change or delete a slot by any ABI's ioctl.  For the layers that have such ABIs.

        `request` takes a struct of the pool `structs` with the values `fields(slot)`.  A slot made
        without a number gets the lowest free one first, safe against other threads and against
        signal handlers.  A slot of 0 bytes deletes the one with its number.

        Once the kernel has agreed, the slot is the VM's and keeps alive what it holds.  If a signal
        handler raises during the ioctl, it is not known whether the kernel has agreed: the VM then
        keeps the slot, and all that the old and the new one use.

        OSError as the ioctl fails, and ENOSPC when every number is in use.
        """
        own, slot.held = slot.held, ()
        choose = slot.unnumbered
        if not slot.memory_size and not choose:
            self._delete_by_number(slot, request, structs, fields)
            return
        slots = self.slots
        old: Slot | None = None
        carried: tuple[Held, ...] = ()  # held by `old` until now
        with self.slots_lock:
            try:
                if choose:
                    self._choose_number(slot)
                region = structs.take(fields(slot))
                if not choose and slot.slot in slots:
                    old = slots[slot.slot]
                    carried = slot.held = old.held
                    old.held = ()
                for thing in without(own, carried) if carried else own:
                    thing.hold()
                    slot.held += (thing,)
                slots[slot.slot] = slot
            except BaseException:
                self._undo(slot, old, carried)
                raise
            if _ioctl(self._fd, request, region.address) < 0:
                error = self._region_error(request, region.fields, slot)
                self._undo(slot, old, carried)
                raise error
            structs.give_back(region)
            left = without(carried, own) if carried else ()
            if left and slot.held:
                slot.held = own
                for thing in left:
                    thing.release()

    def _choose_number(self, slot: Slot) -> None:
        """Put `slot` into `slots` under the lowest free number."""
        slots, number = self.slots, 0
        limit = self._slot_limit
        if not limit:
            limit = self._slot_limit = self.check_extension(kvm_h.KVM_CAP_NR_MEMSLOTS)
        while True:
            while number in slots:
                number += 1
            if number >= limit:
                raise _no_free_slot(limit)
            slot.slot, slot.unnumbered = number, False
            # One call, hence atomic: a signal handler may have taken the number meanwhile.
            if slots.setdefault(number, slot) is slot:
                return

    def _undo(self, slot: Slot, old: Slot | None, carried: tuple[Held, ...]) -> None:
        """The kernel has not got `slot`: as before."""
        held, slot.held = slot.held, ()
        if self.slots.get(slot.slot) is slot:
            if old is None:
                del self.slots[slot.slot]
            else:
                self.slots[slot.slot] = old
        if held:  # else a signal handler has deleted the slot
            if old is not None:
                old.held = carried
            for thing in held[len(carried) :]:
                thing.release()

    def _delete_by_number(
        self,
        slot: _SlotT,
        request: int,
        structs: Structs,
        fields: Callable[[_SlotT], tuple[object, ...]],
    ) -> None:
        region = structs.take(fields(slot))
        with self.slots_lock:
            old = self.slots.get(slot.slot)
            if _ioctl(self._fd, request, region.address) < 0:
                raise self._region_error(request, region.fields, slot)
            structs.give_back(region)
            if old is not None:
                self._forget(old)

    def delete_slot(self, slot: Slot) -> None:
        """What :meth:`Slot.delete` does: KVM_SET_USER_MEMORY_REGION of 0 bytes.

        Nothing happens when the VM does not have this very slot.
        """
        slots, number = self.slots, slot.slot
        with self.slots_lock:
            region = _REGIONS.take((number, 0, 0, 0, 0))
            # No call between the look and the ioctl, hence no signal handler that changes slots.
            if number in slots and slots[number] is slot:
                if _ioctl(self._fd, _SET_REGION, region.address) < 0:
                    error = self._region_error(_SET_REGION, region.fields, slot)
                    # EINVAL: the kernel has no such slot; an interrupted call may have deleted it.
                    if not isinstance(error, OSError) or error.errno != _errno.EINVAL:
                        raise error
                self._forget(slot)
            _REGIONS.give_back(region)

    def _forget(self, slot: Slot) -> None:
        """The kernel has deleted `slot`."""
        slot.release()
        slots, number = self.slots, slot.slot
        if number in slots and slots[number] is slot:
            del slots[number]

    def free_slot(self, address_space: int = 0) -> int:
        """The lowest slot number that is not in use at this moment.

        `address_space` is 0, or 1 for system management mode (KVM_CAP_MULTI_ADDRESS_SPACE).
        OSError (ENOSPC) when there is none.  :meth:`map` chooses its number by itself, safe
        against other threads.
        """
        check_range("address_space", address_space, 1 << 16)
        first = number = address_space << 16
        limit = self.check_extension(kvm_h.KVM_CAP_NR_MEMSLOTS)
        with self.slots_lock:
            while number in self.slots:
                number += 1
        if number - first >= limit:
            raise _no_free_slot(limit)
        return number

    def _region_error(self, request: int, region: Cdata, slot: Slot) -> OSError | ClosedError:
        error = self._error(request, region)
        if not isinstance(error, OSError):
            return error
        hint = ""
        if error.errno == _errno.EEXIST:
            for other in self.slots.values():
                if (
                    other.slot != slot.slot
                    and other.slot >> 16 == slot.slot >> 16
                    and other.guest_phys_addr < slot.end
                    and slot.guest_phys_addr < other.end
                ):
                    hint = f": {slot!r} overlaps {other!r}"
                    break
        elif error.errno == _errno.EINVAL:
            for name in ("guest_phys_addr", "memory_size"):
                if getattr(slot, name) % PAGE_SIZE:
                    hint = f": {name} {getattr(slot, name):#x} is not page aligned"
        return OSError(error.errno, f"{error.strerror}{hint}")

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG: one bit a page, the first page in bit 0 of byte 0; then clears it.

        ArgumentError when `slots` has no slot with this number, OSError (ENOENT) when it is set
        without KVM_MEM_LOG_DIRTY_PAGES.
        """
        if slot not in self.slots:
            numbers = ", ".join(map(str, sorted(self.slots))) or "none"
            raise ArgumentError(f"no slot {slot} in this VM (slots: {numbers})")
        size = self.slots[slot].memory_size // PAGE_SIZE
        bitmap = _ffi.new("unsigned char[]", (size + 63) // 64 * 8)
        log = new_struct("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": bitmap})
        self.ioctl(kvm_h.KVM_GET_DIRTY_LOG, log)
        return bytes(_ffi.buffer(bitmap))

    # -- interrupts, timers and time -----------------------------------------------------------

    def set_tss_addr(self, address: int) -> None:
        """KVM_SET_TSS_ADDR: where KVM on Intel may use three pages to emulate real mode.

        A guest physical address below 4 GiB, not in a slot.  OSError (EINVAL) above 4 GiB.
        """
        check_range("address", address, 1 << 64)
        self.ioctl(kvm_h.KVM_SET_TSS_ADDR, address)

    def set_identity_map_addr(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: where KVM on Intel may use one page for a page table.

        A guest physical address below 4 GiB, not in a slot; 0 means the default, 0xfffbc000.
        OSError (EINVAL) when the VM has a vCPU.
        """
        check_range("address", address, 1 << 64)
        self.ioctl(kvm_h.KVM_SET_IDENTITY_MAP_ADDR, _ffi.new("__u64 *", address))

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: two PICs, an IOAPIC, and a local APIC for each later vCPU.

        OSError: EEXIST when there is one, EINVAL when the VM has a vCPU already.
        """
        self.ioctl(kvm_h.KVM_CREATE_IRQCHIP)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2: an i8254; `flags` of ``KVM_PIT_*``.

        OSError: ENOENT without an in-kernel irqchip, EEXIST when there is one.
        """
        self.ioctl(kvm_h.KVM_CREATE_PIT2, new_struct("struct kvm_pit_config *", {"flags": flags}))

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE: set input `irq` (0 to 23) of the in-kernel irqchip to `level` (1 or 0).

        OSError (ENXIO) without an in-kernel irqchip.
        """
        self.ioctl(
            kvm_h.KVM_IRQ_LINE, new_struct("struct kvm_irq_level *", {"irq": irq, "level": level})
        )

    def set_gsi_routing(self, routes: Iterable[MsiRoute | IrqchipRoute]) -> None:
        """KVM_SET_GSI_ROUTING: replace the routing table.

        An interrupt number (GSI) that no route names reaches nothing.  OSError (EINVAL) for a GSI
        or a pin out of range, or for flags that KVM does not know.
        """
        from .routing import routing_table

        self.ioctl(kvm_h.KVM_SET_GSI_ROUTING, routing_table(routes))

    def irqfd(self, fd: int, gsi: int, *, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD: an eventfd that raises `gsi` when it is written to.

        `flags` of ``KVM_IRQFD_FLAG_*``.  OSError: EBADF or EINVAL for a descriptor that is no
        eventfd, EBUSY when it has a GSI already.
        """
        fields = {"fd": fd, "gsi": gsi, "flags": flags, "resamplefd": resamplefd}
        self.ioctl(kvm_h.KVM_IRQFD, new_struct("struct kvm_irqfd *", fields))

    def ioeventfd(
        self, fd: int, addr: int, length: int, *, datamatch: int = 0, flags: int = 0
    ) -> None:
        """KVM_IOEVENTFD: an eventfd that a guest's write to `addr` signals, without an exit.

        `addr` is a guest physical address, or a port with KVM_IOEVENTFD_FLAG_PIO; `length` 1, 2, 4
        or 8 bytes, or 0 for any.  `datamatch` is the only value that counts if
        KVM_IOEVENTFD_FLAG_DATAMATCH is in `flags`.  OSError: EEXIST when there is one, ENOENT when
        the one to be deassigned does not exist.
        """
        fields = {"fd": fd, "addr": addr, "len": length, "datamatch": datamatch, "flags": flags}
        self.ioctl(kvm_h.KVM_IOEVENTFD, new_struct("struct kvm_ioeventfd *", fields))

    def signal_msi(self, address: int, data: int) -> int:
        """KVM_SIGNAL_MSI: deliver a message signalled interrupt.

        `address` of 64 bits (0xfee00000 and the destination), `data` of 32 (the vector in its low
        byte).  Returns a positive number when it was delivered, 0 when the guest blocked it.
        OSError (EINVAL) without an in-kernel irqchip.
        """
        check_range("address", address, 1 << 64)
        fields = {"address_lo": address & 0xFFFFFFFF, "address_hi": address >> 32, "data": data}
        return self.ioctl(kvm_h.KVM_SIGNAL_MSI, new_struct("struct kvm_msi *", fields))

    def get_clock(self) -> kvm_clock_data:
        """KVM_GET_CLOCK: the guest's kvmclock; `clock` in nanoseconds."""
        clock = _ffi.new("struct kvm_clock_data *")
        self.ioctl(kvm_h.KVM_GET_CLOCK, clock)
        return clock

    def set_clock(self, clock: kvm_clock_data) -> None:
        """KVM_SET_CLOCK.  ArgumentError for another struct, OSError (EINVAL) for unknown flags."""
        self._set(kvm_h.KVM_SET_CLOCK, "struct kvm_clock_data *", clock)


def _no_free_slot(limit: int) -> OSError:
    return OSError(_errno.ENOSPC, f"all {limit} memory slots are in use (KVM_CAP_NR_MEMSLOTS)")
