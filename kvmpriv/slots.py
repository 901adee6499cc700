"""Memory slots: what a slot is, what it keeps alive, and the slots of every VM of this process."""

from __future__ import annotations

import errno as _errno
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from .faults import FaultLayout
    from .vm import Vm

__all__ = ["Held", "Lifeline", "Slot", "slots_alive"]


class Held(Protocol):
    """What a slot keeps alive: host memory, a private file."""

    def hold(self) -> None: ...
    def release(self) -> None: ...


def without(things: tuple[Held, ...], others: tuple[Held, ...]) -> tuple[Held, ...]:
    return tuple(thing for thing in things if thing not in others)


#: Of all VMs: whoever frees memory looks for others that use it.
_living: WeakSet[Lifeline] = WeakSet()


class Lifeline:
    """Keeps what the slots use until the VM and the last of its vCPUs are closed.

    A VM's fd may be closed while a vCPU runs on: the kernel's VM goes with the last of its fds,
    and so does what we hold for it.
    """

    def __init__(self) -> None:
        #: Re-entrant: a signal handler may come in the middle and use the VM itself.
        self.lock = threading.RLock()
        #: slot number -> the slot, which has been told to hold what it uses
        self.slots: dict[int, Slot] = {}
        #: How this VM's exits report a memory fault; None if no ABI of private memory made it.
        self.fault_layout: FaultLayout | None = None
        self._users = 1
        _living.add(self)

    def join(self) -> None:
        with self.lock:
            self._users += 1

    def leave(self) -> None:
        with self.lock:
            self._users -= 1
            if self._users == 0:
                _living.discard(self)
                for slot in self.slots.values():
                    held, slot.held = slot.held, ()
                    for thing in held:
                        thing.release()


def slots_alive() -> Iterator[Slot]:
    """The slots of every VM of this process, as far as they were set through an object."""
    while True:
        try:
            lifelines = list(_living)
        except RuntimeError:  # another thread has made a VM
            continue
        for lifeline in lifelines:
            yield from list(lifeline.slots.values())
        return


class Slot:
    """A memory slot of a VM; :meth:`delete` takes it away.

    `slot` is KVM's number for it (address space in bits 16 to 31); `guest_phys_addr` and
    `memory_size` in bytes; `held` what it keeps alive; `userspace_addr` where its memory is in this
    process, or 0.
    """

    def __init__(
        self,
        vm: Vm,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        flags: int = 0,
        held: tuple[Held, ...] = (),
        userspace_addr: int = 0,
    ) -> None:
        self.vm = vm
        self.slot = slot
        self.guest_phys_addr = guest_phys_addr
        self.memory_size = memory_size
        self.flags = flags
        self.held = held
        self.userspace_addr = userspace_addr

    @property
    def deleted(self) -> bool:
        """Whether the VM has no such slot any more, or another one by its number."""
        return self.vm.slots.get(self.slot) is not self

    @property
    def end(self) -> int:
        """The first guest physical address behind the slot."""
        return self.guest_phys_addr + self.memory_size

    def delete(self) -> None:
        """Take the slot away from the guest.  Nothing happens when it is gone already."""
        if not self.deleted:
            try:
                self.vm.delete_slot(self)
            except OSError as error:
                # EINVAL: the kernel has no such slot; an interrupted call may have deleted it.
                if error.errno != _errno.EINVAL:
                    raise
                self.vm.forget_slot(self)

    def __repr__(self) -> str:
        return (
            f"<Slot {self.slot}{' DELETED' if self.deleted else ''}: "
            f"{self.guest_phys_addr:#x}…{self.end:#x}"
            f"{f' flags {self.flags:#x}' if self.flags else ''}>"
        )
