"""Memory slots: what a slot is, what it keeps alive, and the slots of every VM of this process.

A slot uses host memory, and a private one a file too.  Their owner may close them while slots use
them: each counts its slots (:class:`Held`), and ends when it is closed and no slot is left.
"""

from __future__ import annotations

from _thread import RLock  # threading's own; to import threading is a fiftieth of a probe
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from .errors import ClosedError

if TYPE_CHECKING:
    from .faults import FaultLayout
    from .vm import Vm

__all__ = ["Held", "HeldBySlots", "Lifeline", "Slot", "slots_alive", "without"]


class Held(Protocol):
    """What a slot keeps alive: host memory, a private file.  Only a VM's slots call these."""

    def hold(self) -> None:
        """A slot begins to use it.  ClosedError when its owner has closed it."""

    def release(self) -> None:
        """A slot that held it has ended."""


class HeldBySlots(ABC):
    """Something that ends when its owner has closed it and no slot uses it any more.

    :meth:`hold` and :meth:`release` may be called from any thread, :meth:`close` too: each counts
    by one operation on a list, and looks at the other's result afterwards.
    """

    def __init__(self) -> None:
        self._open = True
        self._users: list[None] = []  # one entry a slot

    def hold(self) -> None:
        """A slot begins to use it.  ClosedError when its owner has closed it."""
        self._users.append(None)
        if not self._open:
            self.release()
            raise self._closed_error()

    def release(self) -> None:
        """A slot that held it has ended."""
        self._users.pop()
        if not self._open and not self._users:
            self._end()

    def close(self) -> None:
        """End the owner's use; may be called twice.  What slots use lives on until they end."""
        self._open = False
        if not self._users:
            self._end()

    @abstractmethod
    def _end(self) -> None:
        """Give it back to the system.  May be called twice."""

    @abstractmethod
    def _closed_error(self) -> ClosedError:
        """Make the error for a use after its owner has closed it."""


def without(things: tuple[Held, ...], others: tuple[Held, ...]) -> tuple[Held, ...]:
    """The `things` that are not among `others`."""
    return tuple(thing for thing in things if thing not in others)


#: The lifelines of all VMs: before memory is freed, its other users are looked for here.
_living: WeakSet[Lifeline] = WeakSet()


class Lifeline:
    """Keeps what the slots use until the VM and the last of its vCPUs are closed.

    The kernel's VM lives as long as any of these descriptors, so a vCPU may run on after its VM is
    closed, and needs the memory.
    """

    def __init__(self, fault_layout: FaultLayout | None = None) -> None:
        #: How this VM's exits report a memory fault; None if no ABI of private memory made it.
        self.fault_layout = fault_layout
        #: Re-entrant: a signal handler may interrupt the holder and use the VM itself.
        self.lock: RLock = RLock()
        #: slot number -> the slot, which holds what it uses
        self.slots: dict[int, Slot] = {}
        self._users = 1
        _living.add(self)

    def join(self) -> None:
        """A vCPU has been made."""
        with self.lock:
            self._users += 1

    def leave(self) -> None:
        """The VM or a vCPU has been closed; the last one releases everything."""
        with self.lock:
            self._users -= 1
            if self._users == 0:
                _living.discard(self)
                for slot in self.slots.values():
                    slot.release()


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
    """A memory slot of a VM; :meth:`delete` removes it.

    `slot` is KVM's number for it (address space in bits 16 to 31), or None to let the VM choose;
    `guest_phys_addr` and `memory_size` in bytes; `flags` of ``KVM_MEM_*``; `held` what the slot
    keeps alive; `userspace_addr` where its memory is in this process, or 0.
    """

    def __init__(
        self,
        vm: Vm,
        slot: int | None,
        guest_phys_addr: int,
        memory_size: int,
        flags: int = 0,
        held: tuple[Held, ...] = (),
        userspace_addr: int = 0,
    ) -> None:
        self.vm = vm
        self.slot: int = -1 if slot is None else slot
        #: Whether the VM is to choose the number; `slot` is -1 until then.
        self.unnumbered: bool = slot is None
        self.guest_phys_addr = guest_phys_addr
        self.memory_size = memory_size
        self.flags = flags
        self.held: tuple[Held, ...] = held
        self.userspace_addr = userspace_addr

    @property
    def deleted(self) -> bool:
        """Whether the VM has no such slot any more, or another one with its number."""
        return self.vm.slots.get(self.slot) is not self

    @property
    def end(self) -> int:
        """The first guest physical address behind the slot."""
        return self.guest_phys_addr + self.memory_size

    def delete(self) -> None:
        """Remove the slot from the guest; nothing happens if it is gone already.

        OSError from KVM_SET_USER_MEMORY_REGION, ClosedError when the VM is closed.
        """
        self.vm.delete_slot(self)

    def release(self) -> None:
        """Release what the slot holds, once.  For the VM: the kernel does not have the slot."""
        held, self.held = self.held, ()  # no call: no signal handler can come in between
        for thing in held:
            thing.release()

    def __repr__(self) -> str:
        from .cdefs.enums import MemFlag

        return (
            f"<Slot {self.slot}{' DELETED' if self.deleted else ''}: "
            f"{self.guest_phys_addr:#x}…{self.end:#x}"
            f"{f' flags {MemFlag(self.flags)}' if self.flags else ''}>"
        )
