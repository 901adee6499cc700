"""A virtual machine: its memory slots, its vCPUs, its interrupt controllers."""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING, Any

from .cdefs import kvm as kvm_h
from .fd import Fd, Struct, Structs
from .libc import ioctl as _ioctl
from .memory import PAGE_SIZE, HostMemory
from .slots import Held, Lifeline, Slot, without
from .vcpu import Vcpu, enable_cap
from .wakeup import SignalsBlocked

if TYPE_CHECKING:
    from .faults import FaultLayout
    from .stats import StatsFd

__all__ = ["Vm"]

_ffi = kvm_h.ffi
_REGIONS = Structs(_ffi.typeof("struct kvm_userspace_memory_region *"))


class Vm(Fd):
    """A virtual machine; made by :meth:`Kvm.create_vm`."""

    _what = "VM"

    def __init__(
        self, fd: int, vcpu_mmap_size: int, fault_layout: FaultLayout | None = None
    ) -> None:
        self._vcpu_mmap_size = vcpu_mmap_size
        self._lifeline = Lifeline()
        self._lifeline.fault_layout = fault_layout
        self._pid = os.getpid()
        #: Held while slots are set; whoever relies on `slots` for more than one look holds it.
        self.slots_lock = self._lifeline.lock
        #: slot number -> the slot; those set through the raw layer are not here
        self.slots = self._lifeline.slots
        super().__init__(fd)

    def close(self) -> None:
        """Close the VM's fd.  Its vCPUs and their memory live until they are closed too."""
        with SignalsBlocked(), self._lifeline.lock:
            if not self.closed:
                super().close()
                self._lifeline.leave()

    def _error(self, request: int, argument: Any = 0) -> OSError | ValueError:
        error = super()._error(request, argument)
        if isinstance(error, OSError) and error.errno == _errno.EIO and os.getpid() != self._pid:
            return OSError(error.errno, f"{error.strerror} (the VM belongs to process {self._pid})")
        return error

    def check_extension(self, cap: int) -> int:
        """What this VM can do, as an int: 0 no, 1 yes, or more than that says the capability."""
        result: int = _ioctl(self._fd, kvm_h.KVM_CHECK_EXTENSION, cap)
        if result < 0:
            raise self._error(kvm_h.KVM_CHECK_EXTENSION, cap)
        return result

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP; up to four arguments of 64 bits."""
        enable_cap(self, cap, args, flags)

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """KVM_CREATE_VCPU.

        OSError: EEXIST for an id in use, EINVAL for one beyond KVM_CAP_MAX_VCPU_ID.
        """
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

        The slot number is the lowest free one if none is given.  The mapping lives as long as the
        slot does.  Raises what :meth:`set_user_memory_region` raises; ValueError when the range
        is not inside `memory`, OSError (ENOSPC) when every slot is in use.
        """
        size = memory.size - offset if size is None else size
        if offset < 0 or size <= 0 or offset + size > memory.size:
            raise ValueError(
                f"{size:#x} bytes at {offset:#x} are not inside host memory of {memory.size:#x}"
            )
        new = Slot(
            self,
            self.free_slot() if slot is None else slot,
            guest_phys_addr,
            size,
            flags,
            (memory,),
            memory.userspace_addr + offset,
        )
        self._set_region(new)
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

        All in bytes, page aligned; memory_size 0 deletes the slot.  OSError: EINVAL (alignment,
        flags, slot number, a change that is not allowed), EEXIST (overlaps another slot).
        """
        old = self.slots.get(slot)  # one that is only changed goes on using what it has
        held = old.held if old and memory_size else ()
        new = Slot(self, slot, guest_phys_addr, memory_size, flags, held, userspace_addr)
        self._set_region(new)

    def _set_region(self, slot: Slot) -> None:
        where = (slot.guest_phys_addr, slot.memory_size, slot.userspace_addr)
        region = _REGIONS.take((slot.slot, slot.flags, *where))
        self.set_region(kvm_h.KVM_SET_USER_MEMORY_REGION, region, slot)
        _REGIONS.give_back(region)

    def set_region(self, request: int, region: Struct, slot: Slot) -> None:
        """Set or delete a slot by any generation's request and struct.

        `slot` describes what `region` says; once the kernel has agreed it is the VM's, and keeps
        what it holds alive.  While it is not known whether the kernel has agreed (Ctrl-C in the
        midst of it), what either slot uses is kept.
        """
        number = slot.slot
        own = new = slot.held
        left: tuple[Held, ...] = ()
        with self.slots_lock:
            old = self.slots.get(number)
            if not slot.memory_size:
                if _ioctl(self._fd, request, region.address) < 0:
                    raise self._region_error(request, region, slot)
                if old is not None:
                    self.forget_slot(old)
                return
            if old is not None:
                new, left = without(own, old.held), without(old.held, own)
                slot.held = (*own, *left)
            for thing in new:
                thing.hold()
            self.slots[number] = slot
            if _ioctl(self._fd, request, region.address) < 0:
                error = self._region_error(request, region, slot)
                slot.held = own
                if old is None:
                    del self.slots[number]
                else:
                    self.slots[number] = old
                for thing in new:
                    thing.release()
                raise error
            if left:
                slot.held = own
                for thing in left:
                    thing.release()

    def delete_slot(self, slot: Slot) -> None:
        """KVM_SET_USER_MEMORY_REGION of 0 bytes, for a slot of `slots`."""
        request, number = kvm_h.KVM_SET_USER_MEMORY_REGION, slot.slot
        region = _REGIONS.take((number, 0, 0, 0, 0))
        with self.slots_lock:
            if _ioctl(self._fd, request, region.address) < 0:
                raise self._region_error(request, region, slot)
            _REGIONS.give_back(region)
            if self.slots.pop(number, None) is slot:
                for thing in slot.held:
                    thing.release()

    def forget_slot(self, slot: Slot) -> None:
        """The kernel does not have `slot` (any more): give up what it holds."""
        with self.slots_lock:
            if self.slots.get(slot.slot) is slot:
                del self.slots[slot.slot]
                for thing in slot.held:
                    thing.release()

    def free_slot(self, address_space: int = 0) -> int:
        """The lowest slot number that is not in use.  OSError (ENOSPC) when there is none."""
        number = address_space << 16
        limit = number + self.check_extension(kvm_h.KVM_CAP_NR_MEMSLOTS)
        while number in self.slots:
            number += 1
        if number >= limit:
            raise OSError(
                _errno.ENOSPC,
                f"all {len(self.slots)} memory slots are in use (KVM_CAP_NR_MEMSLOTS)",
            )
        return number

    def _region_error(self, request: int, region: Struct, slot: Slot) -> OSError | ValueError:
        error = self._error(request, region.fields)
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
        """One bit a page, first page in bit 0 of byte 0; a slot with KVM_MEM_LOG_DIRTY_PAGES."""
        if slot not in self.slots:
            raise ValueError(f"slot {slot} is none of this VM's: {sorted(self.slots)}")
        size = self.slots[slot].memory_size // PAGE_SIZE
        bitmap = _ffi.new("unsigned char[]", (size + 63) // 64 * 8)
        self.ioctl(
            kvm_h.KVM_GET_DIRTY_LOG,
            _ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": bitmap}),
        )
        return bytes(_ffi.buffer(bitmap))

    # -- interrupts, timers and time -----------------------------------------------------------

    def set_tss_addr(self, address: int) -> None:
        """Where Intel's real mode emulation may have three pages; below 4 GiB."""
        self.ioctl(kvm_h.KVM_SET_TSS_ADDR, address)

    def set_identity_map_addr(self, address: int) -> None:
        """Where Intel's real mode emulation may have one more page; below 4 GiB."""
        self.ioctl(kvm_h.KVM_SET_IDENTITY_MAP_ADDR, _ffi.new("__u64 *", address))

    def create_irqchip(self) -> None:
        """Two PICs, an IOAPIC, and a local APIC for each vCPU made afterwards, in the kernel."""
        self.ioctl(kvm_h.KVM_CREATE_IRQCHIP)

    def create_pit2(self, flags: int = 0) -> None:
        """An i8254 in the kernel; needs the irqchip."""
        self.ioctl(kvm_h.KVM_CREATE_PIT2, _ffi.new("struct kvm_pit_config *", {"flags": flags}))

    def irq_line(self, irq: int, level: int) -> None:
        """Raise (1) or lower (0) an input of the in-kernel irqchip."""
        self.ioctl(
            kvm_h.KVM_IRQ_LINE, _ffi.new("struct kvm_irq_level *", {"irq": irq, "level": level})
        )

    def set_gsi_routing(self, entries: list[dict[str, Any]]) -> None:
        """Replace the routing table; each entry a dict of struct kvm_irq_routing_entry."""
        routing = _ffi.new("struct kvm_irq_routing *", {"nr": len(entries), "entries": entries})
        self.ioctl(kvm_h.KVM_SET_GSI_ROUTING, routing)

    def irqfd(self, fd: int, gsi: int, *, flags: int = 0, resamplefd: int = 0) -> None:
        """An eventfd that raises `gsi` when written to."""
        self.ioctl(
            kvm_h.KVM_IRQFD,
            _ffi.new(
                "struct kvm_irqfd *",
                {"fd": fd, "gsi": gsi, "flags": flags, "resamplefd": resamplefd},
            ),
        )

    def ioeventfd(
        self, fd: int, addr: int, length: int, *, datamatch: int = 0, flags: int = 0
    ) -> None:
        """An eventfd that a guest's write to `addr` signals, without an exit."""
        self.ioctl(
            kvm_h.KVM_IOEVENTFD,
            _ffi.new(
                "struct kvm_ioeventfd *",
                {"fd": fd, "addr": addr, "len": length, "datamatch": datamatch, "flags": flags},
            ),
        )

    def signal_msi(self, address: int, data: int) -> int:
        """Deliver a message signalled interrupt; more than 0 when it was delivered."""
        message = _ffi.new("struct kvm_msi *")
        message.address_lo, message.address_hi = address & 0xFFFFFFFF, address >> 32
        message.data = data
        return self.ioctl(kvm_h.KVM_SIGNAL_MSI, message)

    def get_clock(self) -> Any:
        clock = _ffi.new("struct kvm_clock_data *")
        self.ioctl(kvm_h.KVM_GET_CLOCK, clock)
        return clock

    def set_clock(self, clock: Any) -> None:
        self.ioctl(kvm_h.KVM_SET_CLOCK, clock)

    def get_stats_fd(self) -> StatsFd:
        """The VM's counters."""
        from .stats import StatsFd

        with SignalsBlocked():
            return StatsFd(self.ioctl(kvm_h.KVM_GET_STATS_FD))
