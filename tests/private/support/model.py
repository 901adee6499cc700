"""What guest and host must see: private memory as a small object in Python.

Each method is one step, with the name and arguments of a method of :class:`model_driver.Driver`,
which takes the step on a real kernel.  Both return the outcome, to be compared: "ok" or an errno's
name, the bytes or the number that was read, the exit that stopped the guest.  All addresses and
sizes are in bytes.

:class:`Model` follows the traits of an ABI; a subclass has what only its ABI does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from .model_driver import SHARED, abi_of

PAGE = 4096
LOG_DIRTY_PAGES, READONLY = 1, 2
EFAULT = 14

#: "ok", an errno's name, what was read, or a tuple for the exit that stopped the guest.
Outcome = Any
#: A command of the guest: yields the exits that stop it, returns what it has read.
Command = Generator[Outcome, None, Outcome]


#: No access.
NONE = (0, 0, False, False)


class Bytes:
    """Memory that is zero until it is written."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def read(self, at: int, size: int) -> bytes:
        if (inside := at % PAGE) + size <= PAGE:  # most reads: they need no loop
            page = self.pages.get(at // PAGE)
            return bytes(size) if page is None else bytes(page[inside : inside + size])
        found = bytearray(size)
        for start, part in pieces(at, size):
            if page := self.pages.get(start // PAGE):
                found[start - at : start - at + part] = page[start % PAGE :][:part]
        return bytes(found)

    def write(self, at: int, data: bytes) -> None:
        for start, part in pieces(at, len(data)):
            page = self.pages.setdefault(start // PAGE, bytearray(PAGE))
            page[start % PAGE : start % PAGE + part] = data[start - at : start - at + part]

    def clear(self, at: int, size: int) -> None:
        """Make whole pages zero."""
        for page in [one for one in self.pages if at <= one * PAGE < at + size]:
            del self.pages[page]


@dataclass(eq=False)
class File:
    content: Bytes = field(default_factory=Bytes)
    #: The descriptor has not been closed.
    wanted: bool = True
    #: Where files are converted: for each page 1 if it is private.
    private: bytearray = field(default_factory=bytearray)


@dataclass(eq=False)
class Slot:
    gpa: int
    size: int
    file: File
    offset: int
    #: The offset of the shared side in host memory; None: there is none.
    memory: int | None
    flags: int
    #: Made by the raw ioctl: it keeps no file open, and kvmpriv does not know what it uses.
    raw: bool

    @property
    def end(self) -> int:
        return self.gpa + self.size

    def has(self, gpa: int) -> bool:
        return self.gpa <= gpa < self.end

    def in_file(self, gpa: int) -> int:
        return self.offset + gpa - self.gpa

    def in_memory(self, gpa: int) -> int:
        assert self.memory is not None
        return self.memory + gpa - self.gpa


@dataclass
class Stopped:
    """A vCPU in the middle of a command."""

    command: Command
    gpa: int
    size: int
    write: bool
    #: The command accesses memory by many instructions.
    string: bool


class Model:
    """A VM with two files, host memory and vCPUs, by the ABI that a subclass names.

    What the base class says is true of files that belong to a VM and whose slots end with them.
    """

    #: The ABI's name in kvmpriv.private.
    name: str
    #: The errno of a file range that another slot has; it differs by kernel.
    file_overlap = "EINVAL"
    #: The errno of a slot whose descriptor is not open.
    not_open = "EBADF"
    #: The slot flags that may be set beside the ABI's own.
    slot_flags = 0
    #: The errno of ftruncate(2) once the file has a size.
    truncated = "EINVAL"
    #: Whether the guest can have pages mapped before it touches them.
    can_populate = True
    #: Whether pages can be private.
    can_convert = True

    def __init__(self, *, file_size: int, files: int = 2, cpus: int = 2) -> None:
        abi = abi_of(self.name)
        self.traits, self.fault_layout = abi.traits, abi.fault_layout
        self.file_size = file_size
        self.files = [File() for _ in range(files)]
        self.slots: dict[int, Slot] = {}
        self.memory = Bytes()
        #: The pages of guest physical memory that differ from the default state.
        self.converted: set[int] = set()
        #: Where the guest chooses: how it said it will access a page.
        self.wishes: dict[int, bool] = {}
        self.stopped: list[Stopped | None] = [None] * cpus

    def do(self, name: str, **arguments: Any) -> Outcome:
        """Take a step."""
        return getattr(self, name)(**arguments)

    # -- what is where -----------------------------------------------------------------------------

    def is_private(self, gpa: int) -> bool:
        return (gpa // PAGE in self.converted) != self.traits.default_private

    def slot_at(self, gpa: int) -> Slot | None:
        for slot in self.slots.values():  # a loop takes half the time of next()
            if slot.has(gpa):
                return slot
        return None

    def is_alive(self, file: File) -> bool:
        """Whether a descriptor of the file is open."""
        return file.wanted or any(
            slot.file is file and not slot.raw for slot in self.slots.values()
        )

    def stops(self, gpa: int, *, write: bool) -> Outcome:
        """Why an access to a page stops the guest; None if it does not."""
        slot, private = self.slot_at(gpa), self.is_private(gpa)
        if slot is None:
            return self._fault(gpa, private=True) if private else "mmio"
        if private:
            return None if self.is_alive(slot.file) else self._fault(gpa, private=True)
        return None if slot.memory is not None else "EFAULT"

    def _fault(self, gpa: int, *, private: bool) -> Outcome:
        layout = self.fault_layout
        error = EFAULT if EFAULT in layout.errnos else 0
        flags = layout.private_flag if private else 0
        return ("fault", layout.reason, error, gpa // PAGE * PAGE, PAGE, flags)

    def _place(self, gpa: int) -> tuple[Bytes, int]:
        """The memory, and the offset in it, that an access of the guest reaches."""
        slot = self.slot_at(gpa)
        assert slot is not None
        if self.is_private(gpa):
            return slot.file.content, slot.in_file(gpa)
        return self.memory, slot.in_memory(gpa)

    def _get(self, gpa: int, size: int) -> bytes:
        found = []
        for at, part in pieces(gpa, size):
            where, offset = self._place(at)
            found.append(where.read(offset, part))
        return b"".join(found)

    def _put(self, gpa: int, data: bytes) -> None:
        for at, part in pieces(gpa, len(data)):
            where, offset = self._place(at)
            where.write(offset, data[at - gpa : at - gpa + part])

    # -- the host ----------------------------------------------------------------------------------

    def new_file(self, number: int) -> Outcome:
        """Close a file and make a new one in its place."""
        self.files[number].wanted = False
        self.files[number] = File()
        return "ok"

    def close_file(self, number: int) -> Outcome:
        self.files[number].wanted = False
        return "ok"

    def bind(
        self,
        slot: int,
        gpa: int,
        size: int,
        file: int | str,
        offset: int,
        memory: int | None,
        flags: int,
        raw: bool,
    ) -> Outcome:
        """Make a slot; `file` may be a descriptor of something else: "none", "pipe"."""
        chosen = self.files[file] if isinstance(file, int) else None
        if chosen and not chosen.wanted:
            return "closed"
        if flags & ~self.slot_flags:
            return "EINVAL"
        if (gpa | size | offset | (memory or 0)) % PAGE or slot in self.slots:
            return "EINVAL"
        if any(one.gpa < gpa + size and gpa < one.end for one in self.slots.values()):
            return "EEXIST"
        if chosen is None:
            return self.not_open if file == "none" else "EINVAL"
        new = Slot(gpa, size, chosen, offset, memory, flags, raw)
        refusal = self._refusal(new)
        if refusal is None:
            self.slots[slot] = new
        return refusal or "ok"

    def _refusal(self, new: Slot) -> str | None:
        """The errno with which the file refuses a slot, or None."""
        if new.offset + new.size > self.file_size:
            return "EINVAL"
        for one in self.slots.values():
            apart = one.offset + one.size <= new.offset or new.offset + new.size <= one.offset
            if one.file is new.file and not apart:
                return self.file_overlap
        return None

    def delete(self, slot: int) -> Outcome:
        return "ok" if self.slots.pop(slot, None) else "EINVAL"

    def convert(self, gpa: int, size: int, private: bool, keep: bool) -> Outcome:
        if size == 0 or (gpa | size) % PAGE or gpa + size >= 1 << 64:
            return "EINVAL"
        pages = range(gpa // PAGE, (gpa + size) // PAGE)
        default = private == self.traits.default_private
        (self.converted.difference_update if default else self.converted.update)(pages)
        if not keep:
            for slot in self.slots.values():
                for at in range(max(gpa, slot.gpa), min(gpa + size, slot.end), PAGE):
                    self._discard(slot, at, pages, private=not private)
        return "ok"

    def _discard(self, slot: Slot, gpa: int, pages: range, *, private: bool) -> None:
        """Free the page that the guest can't reach any more here, unless another slot has it.

        A slot that kvmpriv made does not have it where that slot is converted, too.
        """
        if slot.raw:
            return

        def has(one: Slot, at: int) -> bool:
            there = one.gpa + at
            return 0 <= at < one.size and (one.raw or there // PAGE not in pages)

        others = [one for one in self.slots.values() if one is not slot]
        if private:
            at = slot.in_file(gpa)
            used = any(
                one.file is slot.file and not one.raw and has(one, at - one.offset)
                for one in others
            )
            if not used:
                slot.file.content.clear(at, PAGE)
        elif slot.memory is not None:
            at = slot.in_memory(gpa)
            used = any(one.memory is not None and has(one, at - one.memory) for one in others)
            if not used:
                self.memory.clear(at, PAGE)

    def punch(self, file: int, offset: int, size: int) -> Outcome:
        chosen = self.files[file]
        if not chosen.wanted:
            return "closed"
        if size == 0 or (offset | size) % PAGE:
            return "EINVAL"
        chosen.content.clear(offset, size)
        return "ok"

    def allocate(self, file: int, offset: int, size: int) -> Outcome:
        """Allocation changes nothing that guest or host can see."""
        if not self.files[file].wanted:
            return "closed"
        return "EINVAL" if size == 0 or not self._can_allocate(offset, size) else "ok"

    def _can_allocate(self, offset: int, size: int) -> bool:
        return (offset | size) % PAGE == 0 and offset + size <= self.file_size

    def punch_slot(self, slot: int, gpa: int, size: int) -> Outcome:
        """A hole through a slot, which works when the file is closed, too."""
        found = self.slots.get(slot)
        if found is None or found.raw or not (found.gpa <= gpa and gpa + size <= found.end):
            return "not inside"
        found.file.content.clear(found.in_file(gpa), size)
        return "ok"

    def refused(self, file: int, call: str) -> Outcome:
        """Calls that have no effect but their errno."""
        if not self.files[file].wanted:
            return "closed"
        return {
            "ftruncate": self.truncated,
            "punch, not keeping the size": "EOPNOTSUPP",
            "collapse": "EOPNOTSUPP",
            "read": "EINVAL",
        }[call]

    def look(self, offset: int, size: int) -> Outcome:
        """What the host reads."""
        return self.memory.read(offset, size)

    def poke(self, offset: int, data: bytes) -> Outcome:
        """The host writes."""
        self.memory.write(offset, data)
        return "ok"

    def forget(self, offset: int, size: int) -> Outcome:
        """madvise(MADV_DONTNEED)."""
        self.memory.clear(offset, size)
        return "ok"

    def advise(self, offset: int, size: int, huge: bool) -> Outcome:
        """madvise(MADV_HUGEPAGE or MADV_NOHUGEPAGE)."""
        return "ok"

    def shake(self, what: str) -> Outcome:
        """The host's kernel frees or moves what it can."""
        return "ok"

    # -- the guest ---------------------------------------------------------------------------------

    def want(self, cpu: int, gpa: int, size: int, private: bool | None) -> Outcome:
        """Where the guest chooses: it says how it will access a range (None: by its state)."""
        self.stopped[cpu] = None
        if gpa % PAGE or size == 0:
            return "EINVAL"
        for page in range(gpa // PAGE, (gpa + size) // PAGE):
            if private is None:
                self.wishes.pop(page, None)
            else:
                self.wishes[page] = private
        return "ok"

    def ask(self, cpu: int, gpa: int, size: int, private: bool) -> Outcome:
        """Ask for a conversion; granted for private-capable slots, and tidy."""
        self.stopped[cpu] = None
        if gpa % PAGE or size == 0:
            return "EINVAL"
        slots = [self.slot_at(at) for at in range(gpa, gpa + size, PAGE)]
        if any(slot is None or slot.raw for slot in slots):
            return "EINVAL"
        return self.convert(gpa, size, private, keep=False)

    def populate(self, cpu: int, gpa: int, size: int) -> Outcome:
        """Map pages before they are touched."""
        for at in range(gpa, gpa + size, PAGE):
            stop = self.stops(at, write=False)
            if stop is not None:
                return "ENOENT" if stop == "mmio" else "EFAULT"
        return "ok"

    def load(self, cpu: int, gpa: int, size: int) -> Outcome:
        """One instruction; at most one of its pages may be MMIO, and then all of it."""

        def command() -> Command:
            if self.stops(gpa, write=False) == "mmio":
                yield ("mmio", False, gpa, size, b"")
                return 0
            yield from self._reach(gpa, size, write=False)
            return int.from_bytes(self._get(gpa, size), "little")

        return self._start(cpu, Stopped(command(), gpa, size, write=False, string=False))

    def store(self, cpu: int, gpa: int, size: int, value: int) -> Outcome:
        data = value.to_bytes(size, "little")

        def command() -> Command:
            if self.stops(gpa, write=True) == "mmio":
                yield ("mmio", True, gpa, size, data)
                return "ok"
            yield from self._reach(gpa, size, write=True)
            self._put(gpa, data)
            return "ok"

        return self._start(cpu, Stopped(command(), gpa, size, write=True, string=False))

    def increment(self, cpu: int, gpa: int, times: int) -> Outcome:
        """Read, then write by compare and swap; 8 bytes of one page."""

        def command() -> Command:
            yield from self._reach(gpa, 8, write=True)
            value = int.from_bytes(self._get(gpa, 8), "little") + times & (1 << 64) - 1
            self._put(gpa, value.to_bytes(8, "little"))
            return value

        return self._start(cpu, Stopped(command(), gpa, 8, write=True, string=True))

    def read(self, cpu: int, gpa: int, size: int) -> Outcome:
        def command() -> Command:
            found = []
            for at, part in pieces(gpa, size):
                yield from self._reach(at, part, write=False)
                found.append(self._get(at, part))
            return b"".join(found)

        return self._start(cpu, Stopped(command(), gpa, size, write=False, string=True))

    def write(self, cpu: int, gpa: int, data: bytes) -> Outcome:
        """In words of 8 bytes, `gpa` a multiple of that: no word is in two pages."""

        def command() -> Command:
            for at, part in pieces(gpa, len(data)):
                yield from self._reach(at, part, write=True)
                self._put(at, data[at - gpa : at - gpa + part])
            return "ok"

        return self._start(cpu, Stopped(command(), gpa, len(data), write=True, string=True))

    def fill(self, cpu: int, gpa: int, byte: int, size: int) -> Outcome:
        def command() -> Command:
            for at, part in pieces(gpa, size):
                yield from self._reach(at, part, write=True)
                self._put(at, bytes([byte]) * part)
            return "ok"

        return self._start(cpu, Stopped(command(), gpa, size, write=True, string=True))

    def span(self, cpu: int, gpa: int, byte: int, size: int) -> Outcome:
        """The number of bytes from `gpa` on that are `byte`, up to `size`."""

        def command() -> Command:
            for at, part in pieces(gpa, size):
                yield from self._reach(at, part, write=False)
                found = self._get(at, part)
                same = part - len(found.lstrip(bytes([byte])))
                if same < part:
                    return at - gpa + same
            return size

        return self._start(cpu, Stopped(command(), gpa, size, write=False, string=True))

    def resume(self, cpu: int) -> Outcome:
        """Go on with what was stopped."""
        stopped = self.stopped[cpu]
        return "nothing to resume" if stopped is None else self._start(cpu, stopped)

    def reset(self, cpu: int) -> Outcome:
        self.stopped[cpu] = None
        return "ok"

    def _start(self, cpu: int, guest: Stopped) -> Outcome:
        try:
            outcome = next(guest.command)
        except StopIteration as end:
            self.stopped[cpu] = None
            return end.value
        self.stopped[cpu] = guest
        return outcome

    def _reach(self, gpa: int, size: int, *, write: bool) -> Generator[Outcome, None, None]:
        """Yield why the guest stops, until it does not."""
        while True:
            for at, _ in pieces(gpa, size):
                if (stop := self.stops(at, write=write)) is not None:
                    yield stop
                    break
            else:
                return

    # -- what is not defined -----------------------------------------------------------------------

    def ends_in_mmio(self, name: str, **arguments: Any) -> bool:
        """The guest would access MMIO."""
        gpa, size, write, _ = self._access(name, **arguments)
        return any(self.stops(at, write=write) == "mmio" for at, _ in pieces(gpa, size))

    def is_void(self, name: str, **arguments: Any) -> bool:
        """The guest would access as private a page that no slot has.

        That is a fault, unless KVM has cached that there is no slot: a conversion drops what KVM
        has cached of slots only.
        """
        gpa, size, _, _ = self._access(name, **arguments)
        return any(self.slot_at(at) is None and self.is_private(at) for at, _ in pieces(gpa, size))

    def is_split(self, name: str, **arguments: Any) -> bool:
        """The step is more than one access to one page.

        How KVM divides such MMIO is not a rule of private memory.
        """
        gpa, size, _, string = self._access(name, **arguments)
        return string or gpa % PAGE + size > PAGE

    def _access(self, name: str, **arguments: Any) -> tuple[int, int, bool, bool]:
        """What a step accesses: gpa, size, whether it writes, whether by many instructions."""
        if name == "resume":
            stopped = self.stopped[arguments["cpu"]]
            return (stopped.gpa, stopped.size, stopped.write, stopped.string) if stopped else NONE
        if name in ("load", "store"):
            return arguments["gpa"], arguments["size"], name == "store", False
        if name in ("read", "span"):
            return arguments["gpa"], arguments["size"], False, True
        if name in ("write", "fill", "increment"):
            size = 8 if name == "increment" else arguments.get("size") or len(arguments["data"])
            return arguments["gpa"], size, True, True
        return NONE


class GuestMemfdModel(Model):
    """guest_memfd in a VM whose accesses follow the state."""

    name = "guest_memfd"


class MappedModel(GuestMemfdModel):
    """Files that have each page once, and the state of their pages.

    The host has a mapping of each file until it closes the file, and puts pages of it into pipes.
    """

    def __init__(self, *, file_size: int, files: int = 2, cpus: int = 2) -> None:
        super().__init__(file_size=file_size, files=files, cpus=cpus)
        self.files = [self._file() for _ in self.files]
        #: What is in each pipe: the file that has the page, and the page's number.
        self.pins: dict[int, tuple[File, int]] = {}

    def _file(self) -> File:
        return File(private=bytearray(self.file_size // PAGE))

    def new_file(self, number: int) -> Outcome:
        self.files[number].wanted = False
        self.files[number] = self._file()
        return "ok"

    def is_private(self, gpa: int) -> bool:
        slot = self.slot_at(gpa)
        return slot is not None and bool(slot.file.private[slot.in_file(gpa) // PAGE])

    def stops(self, gpa: int, *, write: bool) -> Outcome:
        slot = self.slot_at(gpa)
        if slot is None:
            return "mmio"
        return None if self.is_alive(slot.file) else "EFAULT"

    def is_void(self, name: str, **arguments: Any) -> bool:
        return False

    def _place(self, gpa: int) -> tuple[Bytes, int]:
        slot = self.slot_at(gpa)
        assert slot is not None
        return slot.file.content, slot.in_file(gpa)

    def punch(self, file: int, offset: int, size: int) -> Outcome:
        said = super().punch(file, offset, size)
        if said == "ok":
            self._let_go(self.files[file], offset, size)
        return said

    def punch_slot(self, slot: int, gpa: int, size: int) -> Outcome:
        said = super().punch_slot(slot, gpa, size)
        if said == "ok":
            found = self.slots[slot]
            self._let_go(found.file, found.in_file(gpa), size)
        return said

    def _let_go(self, file: File, offset: int, size: int) -> None:
        """The file has no page there any more: what is in a pipe is another one."""
        for number, (one, page) in list(self.pins.items()):
            if one is file and offset <= page * PAGE < offset + size:
                del self.pins[number]

    def pin(self, number: int, file: int, offset: int) -> Outcome:
        """Put a page into a pipe, instead of what is in it."""
        self.pins.pop(number, None)
        chosen, page = self.files[file], offset // PAGE
        if not chosen.wanted:
            return "closed"
        if chosen.private[page]:
            return "EFAULT"
        self.pins[number] = chosen, page
        return "ok"

    def unpin(self, number: int) -> Outcome:
        self.pins.pop(number, None)
        return "ok"

    def see(self, file: int, offset: int, size: int) -> Outcome:
        """What the host reads in the mapping of a file."""
        chosen = self.files[file]
        if not chosen.wanted:
            return "closed"
        if any(chosen.private[offset // PAGE : -(-(offset + size) // PAGE)]):
            return "EFAULT"
        return chosen.content.read(offset, size)

    def put(self, file: int, offset: int, data: bytes) -> Outcome:
        """The host writes to one page of the mapping of a file."""
        chosen = self.files[file]
        if not chosen.wanted:
            return "closed"
        if chosen.private[offset // PAGE]:
            return "EFAULT"
        chosen.content.write(offset, data)
        return "ok"


class SharedModel(MappedModel):
    """guest_memfd in an ordinary VM: all pages are shared."""

    name = SHARED.name
    can_convert = False


class InPlaceModel(MappedModel):
    """Conversion in place.  A page that the host has put into a pipe can't become private."""

    name = "guest_memfd_in_place"

    def convert(self, gpa: int, size: int, private: bool, keep: bool) -> Outcome:
        """Slot by slot; the parts before one that is refused are converted."""
        parts, at = [], gpa
        known = [slot for slot in self.slots.values() if not slot.raw]
        for slot in sorted(known, key=lambda one: one.gpa):
            start, end = max(gpa, slot.gpa), min(gpa + size, slot.end)
            if start < end and start == at:
                parts.append((slot, start, end - start))
                at = end
        if size <= 0 or at < gpa + size:
            return "ENOENT" if size > 0 else "EINVAL"
        for slot, start, part in parts:
            said = self._convert(slot.file, slot.in_file(start), part, private=private)
            if said != "ok":
                return said if isinstance(said, str) else said[0]
        return "ok"

    def convert_file(self, file: int, offset: int, size: int, private: bool) -> Outcome:
        """The ioctl itself; EAGAIN with the offset of the page in use."""
        if not self.files[file].wanted:
            return "closed"
        return self._convert(self.files[file], offset, size, private=private)

    def _convert(self, file: File, offset: int, size: int, *, private: bool) -> Outcome:
        if size == 0 or (offset | size) % PAGE or offset + size > self.file_size:
            return "EINVAL"
        first, end = offset // PAGE, (offset + size) // PAGE
        used = [page for one, page in self.pins.values() if one is file and first <= page < end]
        if private and used:
            return ("EAGAIN", min(used) * PAGE)
        file.private[first:end] = bytes([private]) * (end - first)
        return "ok"


class RestrictedMemModel(Model):
    """v9 with its test vehicle: the guest chooses how it accesses a page."""

    name = "restrictedmem"
    not_open = "EINVAL"
    slot_flags = LOG_DIRTY_PAGES | READONLY
    truncated = "EPERM"
    can_populate = False

    def stops(self, gpa: int, *, write: bool) -> Outcome:
        slot, private = self.slot_at(gpa), self.is_private(gpa)
        if slot is None:
            return "mmio"
        wanted = self.wishes.get(gpa // PAGE, private)
        if wanted != private:
            return self._fault(gpa, private=wanted)
        read_only = write and slot.flags & READONLY
        if private:
            return self._fault(gpa, private=True) if read_only else None  # no MMIO: it has the data
        if read_only:
            return "mmio"  # also where the slot has no memory
        return None if slot.memory is not None else "EFAULT"

    def _refusal(self, new: Slot) -> str | None:
        return None

    def _can_allocate(self, offset: int, size: int) -> bool:
        return True

    def is_void(self, name: str, **arguments: Any) -> bool:
        return False


#: The model of each ABI that has one.
MODELS: dict[str, type[Model]] = {
    one.name: one for one in (RestrictedMemModel, GuestMemfdModel, SharedModel, InPlaceModel)
}


def pieces(at: int, size: int) -> Iterator[tuple[int, int]]:
    """Divide a range at page boundaries: (start, size) of each piece."""
    end = at + size
    while at < end:
        part = min(PAGE - at % PAGE, end - at)
        yield at, part
        at += part
