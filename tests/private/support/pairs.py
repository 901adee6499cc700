"""What can happen to guest memory, as works that two threads can repeat against each other."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from kvmpriv import HostMemory, Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.guest.puppet import GuestExit, Puppet
from kvmpriv.private.guest_memfd import GuestMemfd

from .mappings import INIT_SHARED, MADV, MMAP, Mapping
from .slot_requests import GuestMemfdSlots
from .syscalls import GIB, HOLE, KEEP_SIZE, PAGE, address_of, answer, call, errno_of, fallocate

SIZE, OFFSET = 16 * PAGE, 32 * PAGE
GPA, MOVED, SPARE, OTHER = (number * GIB for number in (4, 5, 6, 7))


class UnexpectedAnswerError(AssertionError):
    """A call in a race returned an errno that no order of the two works explains."""


class Arena:
    """A VM with a slot of a file at GPA, an ordinary slot that moves, and a guest that runs."""

    def __init__(self, stack: ExitStack, kvm: Kvm, vm_type: int) -> None:
        self.kvm, self.vm_type = kvm, vm_type
        self.over = threading.Event()
        self._numbers = itertools.count()
        #: What KVM_PRE_FAULT_MEMORY has answered.
        self.filled: set[str] = set()
        self.vm = stack.enter_context(kvm.create_vm(vm_type))
        self.flags = self.vm.check_extension(gm.KVM_CAP_GUEST_MEMFD_FLAGS)
        self.maps = self.flags & (MMAP | INIT_SHARED) == MMAP | INIT_SHARED
        self.converts = bool(self.vm.check_extension(gm.KVM_CAP_MEMORY_ATTRIBUTES))
        if not self.maps:
            self.flags = 0
        self.file = stack.enter_context(GuestMemfd(self.vm, 256 * PAGE, self.flags))
        if self.maps:
            self.memory = HostMemory(SIZE, fd=self.file.fileno(), offset=OFFSET)
        else:
            self.memory = HostMemory(SIZE)
        stack.enter_context(self.memory)
        self.slots = GuestMemfdSlots(self.vm, self.file, self.memory.userspace_addr)
        self.plain = stack.enter_context(HostMemory(SIZE))
        self.guest = stack.enter_context(Puppet(self.vm, cpuid=kvm.get_supported_cpuid()))
        self.guest.serve = lambda _cpu, _exit: not self.over.is_set()
        self.vcpu = stack.enter_context(self.vm.create_vcpu(1))
        self.expect(self.slots.set())
        self.expect(self._ordinary(GPA + GIB))
        if self.maps:
            self.mapping = stack.enter_context(Mapping(self.file.fileno(), SIZE, OFFSET))
        self.works: dict[str, Callable[[], None]] = {
            "rebind": self._rebind,
            "move": self._move,
            "hole": lambda: fallocate(self.file, HOLE, OFFSET, SIZE // 2),
            "allocate": lambda: fallocate(self.file, KEEP_SIZE, OFFSET, SIZE),
            "guest": self._guest,
            "close file": self._close_file,
            "close VM": self._close_vm,
            "exec": self._exec,
            "fork": self._fork,
        }
        if self.vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
            self.works["pre-fault"] = self._pre_fault
        if self.converts:
            self.works["convert"] = self._convert
        if self.maps:
            self.works["host"] = lambda: self.mapping.write(PAGE // 2, b"h" * (SIZE - PAGE))
            self.works["munmap"] = self._munmap
            self.works["madvise"] = self._madvise
            self.works["mbind"] = self._mbind

    def expect(self, said: str, also: Iterable[str] = ()) -> None:
        """UnexpectedAnswerError for any answer but success and those that a race explains."""
        if said != "ok" and said not in also:
            raise UnexpectedAnswerError(said)

    def _rebind(self) -> None:
        self.expect(self.slots.delete(), ("EINVAL",))  # another thread has deleted it
        self.expect(self.slots.set(), ("EINVAL", "EEXIST"))  # or has made it again

    def _ordinary(self, gpa: int) -> str:
        return self.slots.set(
            slot=5, flags=0, guest_phys_addr=gpa, userspace_addr=self.plain.userspace_addr
        )

    def _move(self) -> None:
        for gpa in (SPARE, MOVED):
            self.expect(self._ordinary(gpa))

    def _convert(self) -> None:
        for value in (gm.KVM_MEMORY_ATTRIBUTE_PRIVATE, 0):
            struct = gm.ffi.new("struct kvm_memory_attributes *", (GPA, SIZE // 2, value, 0))
            self.expect(errno_of(self.vm.ioctl_errno(gm.KVM_SET_MEMORY_ATTRIBUTES, struct)))

    def _pre_fault(self) -> None:
        struct = gm.ffi.new("struct kvm_pre_fault_memory *", {"gpa": GPA, "size": SIZE})
        said = errno_of(self.vcpu.ioctl_errno(gm.KVM_PRE_FAULT_MEMORY, struct))
        self.filled.add(said)
        self.expect(said, ("EINTR", "ENOENT", "EAGAIN", "EFAULT"))

    def _guest(self) -> None:
        try:
            self.guest.touch(GPA, PAGE, SIZE // PAGE, byte=1)
        except GuestExit:
            if not self.over.is_set():
                raise
            self.guest.reset()

    def _close_file(self) -> None:
        with GuestMemfd(self.vm, SIZE, self.flags) as file:
            number = 10 + next(self._numbers) % 1000
            where = {"slot": number, "guest_phys_addr": OTHER + number * SIZE}
            fd = {"guest_memfd": file.fileno(), "guest_memfd_offset": 0}
            self.expect(self.slots.set(**where, **fd))
            fallocate(file, KEEP_SIZE, 0, SIZE)
        self.expect(self.slots.delete(**where))

    def _close_vm(self) -> None:
        with (
            self.kvm.create_vm(self.vm_type) as vm,
            GuestMemfd(vm, 64 * PAGE, self.flags) as file,
        ):
            fallocate(file, KEEP_SIZE, OFFSET, SIZE)
            self.expect(GuestMemfdSlots(vm, file, self.memory.userspace_addr).set())

    def _exec(self) -> None:
        fd = os.dup(self.file.fileno())
        try:
            os.set_inheritable(fd, True)
            pid = os.posix_spawn("/bin/true", ["true"], {})
            os.waitpid(pid, 0)
        finally:
            os.close(fd)

    def _fork(self) -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    def _munmap(self) -> None:
        with Mapping(self.file.fileno(), SIZE, OFFSET) as own:
            own.write(0, b"m" * SIZE)

    def _madvise(self) -> None:
        for name in ("DONTNEED", "POPULATE_WRITE"):
            self.expect(self.mapping.advise(MADV[name]))

    def _mbind(self) -> None:
        bind, default, mask = 2, 0, k.ffi.new("__u64[1]", (1,))
        for mode, address in ((bind, address_of(mask)), (default, 0)):
            said = answer(
                lambda m=mode, a=address: call("mbind", self.mapping.address, SIZE, m, a, 64, 0)
            )
            self.expect(said, ("ENOSYS",))

    def settles(self) -> None:
        """Slot, file and guest work as ever: what is written is there, and a hole takes it."""
        self.over.clear()
        self.guest.serve = None
        try:
            if self.converts:
                # MMIO that KVM remembers ends by an access to shared memory: see the known defect
                # stale-mmio, which is not tested here.
                self.guest.touch(GPA, PAGE, SIZE // PAGE)
                struct = gm.ffi.new("struct kvm_memory_attributes *", (GPA, SIZE, 8, 0))
                self.vm.ioctl(gm.KVM_SET_MEMORY_ATTRIBUTES, struct)
            self.guest.fill(GPA, 0x5A, SIZE)
            if self.maps:
                assert self.mapping.read(0, SIZE) == b"\x5a" * SIZE
            fallocate(self.file, HOLE, OFFSET + PAGE, PAGE)
            assert self.guest.span(GPA + PAGE, 0, PAGE) == PAGE
            assert self.guest.span(GPA + 2 * PAGE, 0x5A, PAGE) == PAGE
            if self.maps:
                assert self.mapping.read(PAGE, PAGE) == bytes(PAGE)
        finally:
            self.guest.serve = lambda _cpu, _exit: not self.over.is_set()
            if self.converts:
                struct = gm.ffi.new("struct kvm_memory_attributes *", (GPA, SIZE, 0, 0))
                self.vm.ioctl(gm.KVM_SET_MEMORY_ATTRIBUTES, struct)
