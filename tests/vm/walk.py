"""The steps of scripts/kernel/restrictedmem/witness.c, made by the binding; prints the same lines.

It runs inside the VM; test_kernels.py compares the two outputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any

from kvmpriv import HostMemory, Kvm, Vm, libc
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.guest.puppet import GuestExit, Puppet
from kvmpriv.private import restrictedmem
from kvmpriv.private.restrictedmem import RestrictedMem

PAGE, BASE = 4096, 0x40000000
SIZE, OFFSET = 16 * PAGE, 4 * PAGE
WANT_PRIVATE, WANT_SHARED = (
    rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE,
    rm.KVM_MAP_GPA_RANGE_WANT_SHARED,
)


def say(name: str, value: int) -> None:
    print(name, int(value))


def errno_of(call: Callable[[], Any]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def layout() -> None:
    say("nr.memfd_restricted", vars(rm)["__NR_memfd_restricted"])
    say("magic", rm.RESTRICTEDMEM_MAGIC)
    for name in ("KVM_MEM_PRIVATE", "KVM_CAP_PRIVATE_MEM", "KVM_EXIT_MEMORY_FAULT"):
        say(name, getattr(rm, name))
    say("KVM_MEMORY_EXIT_FLAG_PRIVATE", rm.KVM_MEMORY_EXIT_FLAG_PRIVATE)
    for name in ("SET_USER_MEMORY_REGION", "MEMORY_ENCRYPT_REG_REGION"):
        say(f"KVM_{name}", getattr(k, f"KVM_{name}"))
    say("KVM_MEMORY_ENCRYPT_UNREG_REGION", k.KVM_MEMORY_ENCRYPT_UNREG_REGION)
    ext = "struct kvm_userspace_memory_region_ext"
    say("sizeof.ext", rm.ffi.sizeof(ext))
    for field in ("region", "restricted_offset", "restricted_fd", "pad1", "pad2"):
        say(f"offsetof.ext.{field}", rm.ffi.offsetof(ext, field))
    union = k.ffi.offsetof("struct kvm_run", "hw")
    for field in ("flags", "padding", "gpa", "size"):
        offset = rm.ffi.offsetof("struct kvm_run_memory_fault", field)
        say(f"offsetof.run.memory.{field}", union + offset)


def make_file() -> RestrictedMem:
    say("fd.bad_flags", restrictedmem.ask_memfd_restricted())
    file = RestrictedMem()
    fd = file.fileno()
    say("fd.f_type", libc.fstatfs_type(fd))
    say("fd.getfl", fcntl.fcntl(fd, fcntl.F_GETFL))
    # RestrictedMem has set it already; the kernel's own fd comes without.
    os.set_inheritable(fd, True)
    say("fd.getfd", fcntl.fcntl(fd, fcntl.F_GETFD))
    os.set_inheritable(fd, False)
    say("fd.read", errno_of(lambda: os.read(fd, 1)))
    say("fd.write", errno_of(lambda: os.write(fd, b"\0")))
    say("fd.pread", errno_of(lambda: os.pread(fd, 1, 0)))
    say("fd.lseek", errno_of(lambda: os.lseek(fd, 0, os.SEEK_END)))
    # Python's own mmap asks fstat first, and refuses by itself.
    c_mmap = ctypes.CDLL(None, use_errno=True).mmap
    c_mmap.restype, c_mmap.argtypes = ctypes.c_void_p, (ctypes.c_long,) * 6
    failed = c_mmap(0, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0) == ctypes.c_void_p(-1).value
    say("fd.mmap", ctypes.get_errno() if failed else 0)
    say("fd.ftruncate.unaligned", errno_of(lambda: file.ftruncate(PAGE + 1)))
    say("fd.ftruncate", errno_of(lambda: file.ftruncate(OFFSET + SIZE)))
    say("fd.ftruncate.again", errno_of(lambda: file.ftruncate(OFFSET + SIZE)))
    keep = libc.FALLOC_FL_KEEP_SIZE
    say("fd.fallocate", errno_of(lambda: file.fallocate(keep, OFFSET, PAGE)))
    say("fd.hole.unaligned", errno_of(lambda: file.punch_hole(OFFSET + 1, PAGE)))
    say("fd.hole.beyond", errno_of(lambda: file.punch_hole(1 << 32, PAGE)))
    return file


class Walk:
    """The steps that need a VM."""

    def __init__(self, vm: Vm, guest: Puppet, file: RestrictedMem, shared: HostMemory) -> None:
        self.vm, self.guest, self.file, self.shared = vm, guest, file, shared

    def slot(self, number: int, flags: int, gpa: int, size: int, fd: int, offset: int) -> int:
        # Another fd than ours goes as a number.
        return errno_of(
            lambda: restrictedmem.set_user_memory_region_ext(
                self.vm, number, gpa, size, self.shared if size else None, fd, offset, flags=flags
            )
        )

    def convert(self, gpa: int, size: int, *, private: bool) -> int:
        call = (
            restrictedmem.memory_encrypt_reg_region
            if private
            else restrictedmem.memory_encrypt_unreg_region
        )
        return errno_of(lambda: call(self.vm, gpa & (1 << 64) - 1, size))

    def peek(self, gpa: int) -> int:
        return self.guest.load(gpa, 4)

    def poke(self, gpa: int, value: int) -> int:
        """Run the guest until it halts, as the C program does."""
        return self._run(lambda: self.guest.store(gpa, 4, value))

    def _run(self, call: Callable[[], Any]) -> int:
        try:
            call()
        except GuestExit as stopped:
            return int(stopped.exit.reason)
        return k.KVM_EXIT_HLT

    def wish(self, gpa: int, pages: int, bits: int) -> int:
        return self.guest.hypercall(k.KVM_HC_MAP_GPA_RANGE, gpa, pages, bits)

    def say_fault(self, when: str, call: Callable[[], Any]) -> None:
        say(f"{when}.exit", self._run(call))
        page = self.guest.vcpu.kvm_run
        fault = rm.ffi.cast("struct kvm_run_memory_fault *", k.ffi.addressof(page.hw))
        for field in ("flags", "padding", "gpa", "size"):
            say(f"{when}.{field}", getattr(fault, field))

    def bind(self, other_fd: int) -> bool:
        private, fd = rm.KVM_MEM_PRIVATE, self.file.fileno()
        error = self.slot(1, private, BASE, SIZE, fd, OFFSET)
        say("slot.bind", error)
        if error:
            return False
        say("slot.again", self.slot(1, private, BASE, SIZE, fd, OFFSET))
        say("slot.overlap", self.slot(2, private, BASE, SIZE, fd, OFFSET))
        say("slot.overlap_and_bad_fd", self.slot(2, private, BASE, SIZE, -1, OFFSET))
        say("slot.bad_fd", self.slot(2, private, 2 * BASE, SIZE, -1, OFFSET))
        say("slot.other_fd", self.slot(2, private, 2 * BASE, SIZE, other_fd, OFFSET))
        say("slot.unaligned_offset", self.slot(2, private, 2 * BASE, SIZE, fd, OFFSET + 1))
        say("slot.offset_wraps", self.slot(2, private, 2 * BASE, SIZE, fd, (1 << 64) - SIZE))
        say("slot.unknown_flag", self.slot(2, private | 8, 2 * BASE, SIZE, fd, OFFSET))
        say("slot.gpa_too_high", self.slot(2, private, 1 << 52, SIZE, fd, OFFSET))
        say("slot.delete_none", self.slot(2, private, 0, 0, 0, 0))
        say("slot.delete", self.slot(1, private, 0, 0, 0, 0))
        say("slot.bind_again", self.slot(1, private, BASE, SIZE, fd, OFFSET))
        return True

    def walk(self) -> None:
        host = self.shared.view().cast("I")
        say("private.write.exit", self.poke(BASE, 0x1234))
        say("private.read", self.peek(BASE))
        say("private.shared_bytes", host[0])

        say("convert.size_0", self.convert(BASE, 0, private=False))
        say("convert.unaligned", self.convert(BASE + 1, PAGE, private=False))
        say("convert.wraps", self.convert(-PAGE, PAGE, private=False))
        say("convert.to_shared", self.convert(BASE, PAGE, private=False))
        say("shared.read", self.peek(BASE))
        say("shared.write.exit", self.poke(BASE, 0x5678))
        say("shared.host_sees", host[0])
        say("convert.to_private", self.convert(BASE, PAGE, private=True))
        say("private.read_again", self.peek(BASE))

        say("wish.unaligned", self.wish(BASE + 1, 1, WANT_SHARED))
        say("wish.no_pages", self.wish(BASE, 0, WANT_SHARED))
        say("wish.shared", self.wish(BASE, 1, WANT_SHARED))
        self.say_fault("fault.shared", lambda: self.guest.load(BASE + 8, 4))
        self.say_fault("fault.unconverted", self.guest.resume)
        say("fault.convert", self.convert(BASE, PAGE, private=False))
        say("fault.then.exit", self._run(self.guest.resume))
        say("wish.private", self.wish(BASE, 1, WANT_PRIVATE))
        self.say_fault("fault.private", lambda: self.guest.store(BASE + 8, 4, 0x9ABC))
        say("fault.private.host_sees", host[2])
        say("fault.convert_back", self.convert(BASE, PAGE, private=True))
        say("fault.then.exit_again", self._run(self.guest.resume))
        say("fault.then.read", self.peek(BASE + 8))
        say("wish.unset", self.wish(BASE, 1, WANT_PRIVATE | WANT_SHARED))

        say("hole.neighbour.write.exit", self.poke(BASE + PAGE, 0xDEF0))
        say("hole.punch", errno_of(lambda: self.file.punch_hole(OFFSET, PAGE)))
        say("hole.read", self.peek(BASE))
        say("hole.neighbour.read", self.peek(BASE + PAGE))

        say("slot.delete_used", self.slot(1, rm.KVM_MEM_PRIVATE, 0, 0, 0, 0))
        say("deleted.read.exit", self._run(lambda: self.guest.load(BASE, 4)))
        host.release()


def main() -> None:
    layout()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(make_file())
        kvm = stack.enter_context(Kvm())
        vm = stack.enter_context(kvm.create_vm())
        say("cap.system", kvm.check_extension(rm.KVM_CAP_PRIVATE_MEM))
        say("cap.vm", vm.check_extension(rm.KVM_CAP_PRIVATE_MEM))
        shared = stack.enter_context(HostMemory(SIZE))
        shared.write(0, b"\x5a" * SIZE)
        guest = stack.enter_context(Puppet(vm, slot=0, cpuid=kvm.get_supported_cpuid()))
        walk = Walk(vm, guest, file, shared)
        if walk.bind(kvm.fileno()):
            walk.walk()
        else:
            say("convert.refused", walk.convert(BASE, PAGE, private=True))
    say("done", 1)


if __name__ == "__main__":
    main()
