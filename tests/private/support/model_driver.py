"""Takes the steps of the model on the running kernel, with kvmpriv and no test framework.

The text of this module is the first part of every script that replays a failure; the steps and a
call of :func:`replay` follow it there.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvmpriv import HostMemory, Kvm, libc, private
from kvmpriv.cdefs import guest_memfd as guest_memfd_h
from kvmpriv.cdefs import kvm as k
from kvmpriv.cdefs import restrictedmem as rm
from kvmpriv.exits import MemoryFaultExit, MmioExit
from kvmpriv.guest.puppet import GuestCrash, GuestExit, Puppet, PuppetCpu
from kvmpriv.private import ConversionError, guest_memfd, restrictedmem
from kvmpriv.private.guest_memfd_in_place import set_memory_attributes2

PAGE, MIB = 4096, 1 << 20
#: Host memory begins at a multiple of 2 MiB; a file is as large as the largest offset.
MEMORY_SIZE, FILE_SIZE = 8 * MIB, (2 << 30) + 8 * MIB
#: The number of the puppet's own slot, which no step uses.
HOME_SLOT = 9
#: Seconds of CPU time for a step: a vCPU that makes no progress uses them up.
PATIENCE = 60

_SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
#: An ordinary VM whose memory is in files that guest and host share: nothing is converted.
SHARED = private.GuestMemfdAbi(
    "guest_memfd_shared",
    vm_type=guest_memfd_h.KVM_X86_DEFAULT_VM,
    file_flags=guest_memfd_h.GUEST_MEMFD_FLAG_MMAP | guest_memfd_h.GUEST_MEMFD_FLAG_INIT_SHARED,
)
_VMSPLICE = 278


def abi_of(name: str) -> private.PrivateAbi:
    """SHARED, or the ABI that kvmpriv has by that name."""
    return SHARED if name == SHARED.name else private.ABIS[name]


class Stuck(BaseException):
    """A step exceeded PATIENCE."""


class Driver:
    """A VM with vCPUs, two files and host memory, and a method for each step."""

    def __init__(self, abi: str, *, cpus: int = 2) -> None:
        with ExitStack() as stack:
            kvm = stack.enter_context(Kvm())
            self.abi = abi_of(abi)
            #: Settings of the system, which must be restored in any case.
            self.settings = stack.enter_context(ExitStack())
            self.settings.enter_context(_large_pages())
            self.vm = stack.enter_context(self.abi.create_vm(kvm))
            self.memory = stack.enter_context(HostMemory(MEMORY_SIZE + 2 * MIB))
            self.base = -self.memory.userspace_addr % (2 * MIB)
            self.memory.madvise(mmap.MADV_HUGEPAGE)
            self.guest = stack.enter_context(
                Puppet(
                    self.vm,
                    cpus=cpus,
                    slot=HOME_SLOT,
                    cpuid=kvm.get_supported_cpuid(),
                )
            )
            #: vCPU -> the fault that counts instead of its last exit.
            self._found: dict[int, MemoryFaultExit] = {}
            for number, cpu in enumerate(self.guest.cpus):
                cpu.serve = self._server(number, cpu.serve)
            self.files: list[private.PrivateFile] = []
            #: With one backing: a mapping of each file, which lives as long as the descriptor.
            self.maps: list[HostMemory] = []
            #: Number -> the read end of the pipe that has a page.
            self.pipes: dict[int, int] = {}
            stack.callback(self._close_files)
            for _ in range(2):
                self.files.append(self.abi.create_file(self.vm, FILE_SIZE))
                if self.abi.traits.backings == 1:
                    self.maps.append(self.abi.create_memory(self.files[-1], 0, FILE_SIZE))
            #: vCPU in the middle of a step -> the step's name, and whether MMIO stopped it.
            self.stopped: dict[int, tuple[str, bool]] = {}
            read_end, write_end = os.pipe()
            stack.callback(os.close, read_end)
            stack.callback(os.close, write_end)
            self._others = {"none": -1, "pipe": read_end}
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close the VM and all that is in it."""
        self._stack.close()

    def _close_files(self) -> None:
        for number in list(self.pipes):
            self.unpin(number)
        for some in (self.maps, self.files):
            for one in some:
                one.close()

    def _server(
        self, number: int, known: Callable[[PuppetCpu, Any], bool] | None
    ) -> Callable[[PuppetCpu, Any], bool]:
        """A `serve` that also serves slots of the raw call, which kvmpriv does not know.

        Where 6.12 has cached that a gfn has no memory (see serve_conversion), a private access is
        reported as a shared one.  Pre-faulting makes KVM look again; the fault that it reports
        then, for example for a closed file, is the one that counts.
        """

        def serve(cpu: PuppetCpu, exit_: Any) -> bool:
            if known is not None and known(cpu, exit_):
                return True
            if not isinstance(exit_, MemoryFaultExit) or exit_.private or not exit_.errno:
                return False
            try:
                self.populate(number, exit_.gpa, exit_.size)
            except OSError:
                found = cpu.vcpu.exit()
                if isinstance(found, MemoryFaultExit) and found.private:
                    self._found[number] = found
                return False
            return True

        return serve

    def do(self, name: str, **arguments: Any) -> Any:
        """Take a step; returns its outcome."""
        try:
            with _patience():
                outcome = getattr(self, name)(**arguments)
        except GuestExit as stopped:
            self._stop(name, arguments["cpu"], mmio=isinstance(stopped.exit, MmioExit))
            return self._exit(self._found.pop(arguments["cpu"], stopped.exit))
        except GuestCrash as crash:
            return ("crash", str(crash))
        except Stuck as stuck:
            where = traceback.extract_tb(stuck.__traceback__)
            return ("stuck", [f"{frame.name}:{frame.lineno}" for frame in where][-4:])
        except OSError as error:
            if "KVM_RUN" in str(error):
                self._stop(name, arguments["cpu"], mmio=False)
            if error.errno == errno.EOPNOTSUPP:
                return "EOPNOTSUPP"  # Python calls it by its other name
            return errno.errorcode.get(error.errno or 0, str(error))
        except ValueError as error:
            if "closed" in str(error):
                return "closed"
            raise
        return "ok" if outcome is None else outcome

    def _stop(self, name: str, cpu: int, *, mmio: bool) -> None:
        if name == "resume":
            name, _ = self.stopped[cpu]
        self.stopped[cpu] = name, mmio

    @staticmethod
    def _exit(exit_: Any) -> Any:
        if isinstance(exit_, MemoryFaultExit):
            if exit_.errno == errno.EFAULT and not exit_.private:
                return "EFAULT"  # no memory at userspace_addr: some kernels describe it, 6.12 not
            return ("fault", exit_.reason, exit_.errno, exit_.gpa, exit_.size, exit_.flags)
        if isinstance(exit_, MmioExit):
            return ("mmio", exit_.is_write, exit_.phys_addr, exit_.size, exit_.data)
        return ("exit", str(exit_))

    # -- the host ----------------------------------------------------------------------------------

    def new_file(self, number: int) -> None:
        self.close_file(number)
        self.files[number] = self.abi.create_file(self.vm, FILE_SIZE)
        if self.maps:
            self.maps[number] = self.abi.create_memory(self.files[number], 0, FILE_SIZE)

    def close_file(self, number: int) -> None:
        if self.maps:
            self.maps[number].close()
        self.files[number].close()

    def convert_file(self, file: int, offset: int, size: int, private: bool) -> Any:
        attributes = guest_memfd_h.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        self.files[file].fileno()
        try:
            set_memory_attributes2(self.files[file], offset, size, attributes)
        except ConversionError as error:
            return (errno.errorcode.get(error.errno or 0, str(error)), error.offset)
        return None

    def pin(self, number: int, file: int, offset: int) -> None:
        self.unpin(number)
        self.files[file].fileno()
        read_end, write_end = os.pipe()
        try:
            vector = k.ffi.new("__u64[2]", (self.maps[file].userspace_addr + offset, PAGE))
            where = int(k.ffi.cast("uintptr_t", vector))
            if (done := libc.syscall(_VMSPLICE, write_end, where, 1, 0)) < 0:
                raise libc.os_error(-done, "vmsplice")
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self.pipes[number] = read_end

    def unpin(self, number: int) -> None:
        if number in self.pipes:
            os.close(self.pipes.pop(number))

    def see(self, file: int, offset: int, size: int) -> bytes:
        return self.maps[file].read(offset, size)

    def put(self, file: int, offset: int, data: bytes) -> None:
        self.maps[file].write(offset, data)

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
    ) -> None:
        if isinstance(file, int) and not raw:
            self.abi.bind(
                self.vm,
                gpa,
                size,
                self.files[file],
                offset,
                memory=None if memory is None else self.memory,
                memory_offset=0 if memory is None else self.base + memory,
                slot=slot,
                flags=flags,
            )
            return
        fd = self.files[file].fileno() if isinstance(file, int) else self._others[file]
        # The raw call, which takes a descriptor by its number.
        set_slot: Callable[..., object] = (
            restrictedmem.set_user_memory_region_ext
            if self.abi.name == "restrictedmem"
            else guest_memfd.set_user_memory_region2
        )
        set_slot(
            self.vm,
            slot,
            gpa,
            size,
            None if memory is None else self.memory,
            fd,
            offset,
            memory_offset=0 if memory is None else self.base + memory,
            flags=flags | self.abi.slot_flag,
        )

    def delete(self, slot: int) -> None:
        if slot in self.vm.slots:
            self.vm.slots[slot].delete()
        else:
            self.vm.set_user_memory_region(slot, 0, 0, 0)

    def convert(self, gpa: int, size: int, private: bool, keep: bool) -> None:
        self.abi.convert(self.vm, gpa, size, private=private, keep=keep)

    def punch(self, file: int, offset: int, size: int) -> None:
        self.files[file].punch_hole(offset, size)

    def allocate(self, file: int, offset: int, size: int) -> None:
        self.files[file].allocate(offset, size)

    def punch_slot(self, slot: int, gpa: int, size: int) -> Any:
        found = self.vm.slots.get(slot)
        if not isinstance(found, private.PrivateSlot):
            return "not inside"
        try:
            found.punch_hole(gpa, size)
        except ValueError:
            return "not inside"
        return None

    def refused(self, file: int, call: str) -> Any:
        fd = self.files[file].fileno()
        if call == "ftruncate":
            os.ftruncate(fd, FILE_SIZE)
        elif call == "punch, not keeping the size":
            self.files[file].fallocate(2, 0, PAGE)
        elif call == "collapse":
            self.files[file].fallocate(8, 0, PAGE)
        else:
            os.read(fd, 1)
        return "done"

    def look(self, offset: int, size: int) -> bytes:
        return self.memory.read(self.base + offset, size)

    def poke(self, offset: int, data: bytes) -> None:
        self.memory.write(self.base + offset, data)

    def forget(self, offset: int, size: int) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED, self.base + offset, size)

    def advise(self, offset: int, size: int, huge: bool) -> None:
        advice = mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE
        self.memory.madvise(advice, self.base + offset, size)

    def shake(self, what: str) -> None:
        """Only root can; it changes nothing that guest or host see."""
        if what != "nothing":
            with contextlib.suppress(OSError):
                Path("/proc/sys/vm", what).write_text("1")

    # -- the guest ---------------------------------------------------------------------------------

    def _cpu(self, number: int) -> PuppetCpu:
        """A vCPU, made ready for a command."""
        cpu = self.guest.cpus[number]
        if number in self.stopped:
            _, mmio = self.stopped.pop(number)
            if mmio:  # one load or store, which is over when it is answered
                cpu.resume()
            else:
                cpu.reset()
        return cpu

    def want(self, cpu: int, gpa: int, size: int, private: bool | None) -> Any:
        bits = {
            True: rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE,
            False: rm.KVM_MAP_GPA_RANGE_WANT_SHARED,
            None: rm.KVM_MAP_GPA_RANGE_WANT_PRIVATE | rm.KVM_MAP_GPA_RANGE_WANT_SHARED,
        }[private]
        answer = self._cpu(cpu).hypercall(k.KVM_HC_MAP_GPA_RANGE, gpa, size // PAGE, bits)
        return errno.errorcode.get(-answer, answer) if answer else None

    def ask(self, cpu: int, gpa: int, size: int, private: bool) -> None:
        self._cpu(cpu).convert(gpa, size, private=private)

    def populate(self, cpu: int, gpa: int, size: int) -> None:
        self.abi.populate(self.guest.cpus[cpu].vcpu, gpa, size)

    def load(self, cpu: int, gpa: int, size: int) -> int:
        return self._cpu(cpu).load(gpa, size)

    def store(self, cpu: int, gpa: int, size: int, value: int) -> None:
        self._cpu(cpu).store(gpa, size, value)

    def increment(self, cpu: int, gpa: int, times: int) -> int:
        return self._cpu(cpu).increment(gpa, times)

    def read(self, cpu: int, gpa: int, size: int) -> bytes:
        return self._cpu(cpu).read(gpa, size)

    def write(self, cpu: int, gpa: int, data: bytes) -> None:
        self._cpu(cpu).write(gpa, data)

    def fill(self, cpu: int, gpa: int, byte: int, size: int) -> None:
        self._cpu(cpu).fill(gpa, byte, size)

    def span(self, cpu: int, gpa: int, byte: int, size: int) -> int:
        return self._cpu(cpu).span(gpa, byte, size)

    def resume(self, cpu: int) -> Any:
        if cpu not in self.stopped:
            return "nothing to resume"
        chosen = self.guest.cpus[cpu]
        chosen.vcpu.kvm_run.mmio.data = bytes(8)  # type: ignore[assignment]  # the answer to a read
        outcome = chosen.resume()
        name, _ = self.stopped.pop(cpu)
        return None if name in ("store", "write", "fill") else outcome

    def reset(self, cpu: int) -> None:
        self._cpu(cpu)


@contextmanager
def _large_pages() -> Iterator[None]:
    """Let shmem, and so v9's files, have large pages, if this user may set that."""
    try:
        before = _SHMEM.read_text().partition("[")[2].partition("]")[0]
        _SHMEM.write_text("always")
    except OSError:
        yield
        return
    try:
        yield
    finally:
        _SHMEM.write_text(before)


@contextmanager
def _patience() -> Iterator[None]:
    """Raise Stuck in the body after PATIENCE seconds of CPU time.

    Real time is limited by the test's own timeout.
    """

    def tired(*_: object) -> None:
        raise Stuck

    before = signal.signal(signal.SIGPROF, tired)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def shown(name: str, arguments: dict[str, Any]) -> str:
    """A step as text."""
    words = [
        f"{key}={value:#x}"
        if isinstance(value, int) and value not in (True, False) and value > 9
        else f"{key}={value!r}"
        for key, value in arguments.items()
    ]
    return f"{name}({', '.join(words)})"


def differ(expected: Any, got: Any) -> str:
    """The difference between two outcomes, as text."""
    if isinstance(expected, bytes) and isinstance(got, bytes) and len(expected) == len(got):
        at = next(n for n, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b)
        end = at + 24
        return (
            f"at byte {at:#x} of {len(expected):#x}: "
            f"expected {expected[at:end].hex(' ')}, got {got[at:end].hex(' ')}"
        )
    return f"expected {_brief(expected)}, got {_brief(got)}"


def _brief(outcome: Any) -> str:
    text = repr(outcome)
    return text if len(text) < 400 else f"{text[:400]}… ({len(text)} characters)"


def sparse(size: int, *parts: tuple[int, bytes | tuple[int, int]]) -> bytes:
    """`size` bytes: zeros but for `parts`, each (where, bytes) or (where, (byte, how many))."""
    data = bytearray(size)
    for at, what in parts:
        piece = what if isinstance(what, bytes) else bytes(what[:1]) * what[1]
        data[at : at + len(piece)] = piece
    return bytes(data)


def replay(abi: str, steps: list[tuple[Any, str, dict[str, Any]]]) -> int:
    """Take steps (expected outcome, name, arguments); 0: all as expected, 1: not, 77: can't run."""
    try:
        driver = Driver(abi)
    except OSError as error:
        print(f"this kernel can't run the steps: {error}", file=sys.stderr)
        return 77
    for number, (expected, name, arguments) in enumerate(steps, 1):
        got = driver.do(name, **arguments)
        same = got == expected
        print(f"{number:4} {'ok      ' if same else 'MISMATCH'} {shown(name, arguments)}")
        if not same:
            print(f"     {differ(expected, got)}", flush=True)
            driver.settings.close()
            os._exit(1)  # a vCPU may be stuck, and the kernel's memory not what it was
    driver.close()
    return 0
