"""What is asked of KVM and tried on it.

Everything is made for the purpose and closed again.  Nothing runs in a guest, at most one page is
converted, and no restrictedmem file is ever given to stat(2): an unknown kernel may not survive it.
"""

from __future__ import annotations

import errno as _errno
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from ..cdefs import guest_memfd as guest_memfd_h
from ..cdefs import kvm as kvm_h
from ..cdefs import restrictedmem as restrictedmem_h
from ..cdefs import restrictedmem_v10 as restrictedmem_v10_h
from ..fd import new_struct
from ..kvm import Kvm
from ..libc import fstatfs_type
from ..memory import PAGE_SIZE, HostMemory
from ..private import guest_memfd, guest_memfd_in_place, restrictedmem
from . import host as _host
from .records import FAIL, PASS, SKIP, Asked, Check, Group, Step

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from ..cdefs.cffi_types import Cdata
    from ..fd import Fd
    from ..vm import Vm
    from .documents import HostFacts

__all__ = ["VM_TYPES", "run"]

VM_TYPES = {
    guest_memfd_h.KVM_X86_DEFAULT_VM: "default",
    guest_memfd_h.KVM_X86_SW_PROTECTED_VM: "sw_protected",
    guest_memfd_h.KVM_X86_SEV_VM: "sev",
    guest_memfd_h.KVM_X86_SEV_ES_VM: "sev_es",
    guest_memfd_h.KVM_X86_SNP_VM: "snp",
    guest_memfd_h.KVM_X86_TDX_VM: "tdx",
}

# The slot lies away from 0 in the guest and in the file: a mistake of either shows.
_GPA = 0x100000
_OFFSET = PAGE_SIZE
_SIZE = 2 * PAGE_SIZE
_ELSEWHERE, _FURTHER = 2 * _GPA, 3 * _GPA  # for more slots; the VM's end deletes them, faster

#: What is tried with a guest_memfd, besides binding it.
_WITH_A_FILE = (
    Step.CONVERSION,
    Step.MMAP,
    Step.INIT_SHARED,
    Step.NO_DIRECT_MAP,
    Step.PUNCH_HOLE,
    Step.IN_PLACE,
    Step.USERFAULT,
    Step.HYPERCALL,
    Step.PRE_FAULT,
)
_MAPPABLE = guest_memfd_h.GUEST_MEMFD_FLAG_MMAP
_SHARED = _MAPPABLE | guest_memfd_h.GUEST_MEMFD_FLAG_INIT_SHARED
#: Above all that Linux 7.3 has for any architecture.
_NEW_CAPABILITIES = range(252, 268)
_REGION = guest_memfd_h.ffi.typeof("struct kvm_userspace_memory_region2 *")
_ATTRIBUTES2 = guest_memfd_h.ffi.typeof("struct kvm_memory_attributes2 *")

#: Errors that tell of this process or of the host, and not of KVM.
SHORTAGES = (_errno.EMFILE, _errno.ENFILE, _errno.ENOMEM)

_V9_KERNEL = "needs a kernel with the v9 patches (CONFIG_RESTRICTEDMEM)"


def _name(errno: int | None) -> str:
    return _errno.errorcode.get(errno, f"errno {errno}") if errno else "0"


class _OutOfTimeError(Exception):
    """`out_of_time` has returned true."""


class _Recorder:
    """Adds checks of one group, in one type of VM, to those of the whole probe."""

    def __init__(
        self,
        host: HostFacts,
        checks: list[Check],
        out_of_time: Callable[[], object],
        group: Group,
        vm_type: str = "",
        system: Kvm | None = None,
    ) -> None:
        self.host = host
        self.checks = checks
        self.out_of_time = out_of_time
        self.group = group
        self.vm_type = vm_type
        self.system = system

    def within(self, group: Group, vm_type: str = "") -> _Recorder:
        """A recorder of another group or VM type, for the same probe."""
        return _Recorder(self.host, self.checks, self.out_of_time, group, vm_type, self.system)

    def ask(self, fd: Kvm | Vm, module: ModuleType, *capabilities: str) -> tuple[Asked, ...]:
        """Ask `fd` for capabilities; if it is a VM, ask the device as well."""
        system = None if fd is self.system else self.system
        asked = []
        for name in capabilities:
            number = getattr(module, name)
            device = system.check_extension(number) if system else None
            asked.append(Asked(name, fd.check_extension(number), device))
        return tuple(asked)

    def add(
        self,
        step: Step,
        status: str,
        result: str,
        *asked: Asked,
        tried: str = "",
        hint: str = "",
        shortage: str = "",
    ) -> Check:
        found = Check(self.group, step, status, self.vm_type, asked, tried, result, hint, shortage)
        self.checks.append(found)
        if self.out_of_time():
            raise _OutOfTimeError
        return found

    def failed(
        self, step: Step, error: OSError, *asked: Asked, tried: str, hint: str = ""
    ) -> Check:
        """A call failed: KVM refused it, or something ran out, which leaves the step undecided."""
        name = _name(error.errno)
        if error.errno in SHORTAGES:
            return self.short(step, name, *asked, tried=tried)
        hint = _host.refusal_hint(error.errno, self.host, tried.partition("(")[0]) or hint
        return self.add(step, FAIL, name, *asked, tried=tried, hint=hint)

    def short(self, step: Step, shortage: str, *asked: Asked, tried: str) -> Check:
        hint = _host.shortage_hint(shortage, self.host)
        result = f"{shortage}, undecided"
        return self.add(step, SKIP, result, *asked, tried=tried, hint=hint, shortage=shortage)

    def skip(self, step: Step, why: str, after: Check | None = None) -> None:
        """Not tried; undecided as well if that is because something ran out in `after`."""
        self.add(step, SKIP, why, shortage=after.shortage if after else "")

    def passed(self, step: Step) -> bool:
        wanted = (self.group, step, PASS, self.vm_type)
        return any(check[:4] == wanted for check in self.checks)


def run(
    device: str, host: HostFacts, out_of_time: Callable[[], object] = bool
) -> tuple[Check, ...]:
    """Probe KVM at `device`; adds to `host` what KVM says of itself.

    `out_of_time` is called after each step; the probe ends as soon as it returns true.
    """
    out = _Recorder(host, [], out_of_time, Group.KVM)
    try:
        _check_syscall(out.within(Group.V9))
        _check_device(out, device)
    except _OutOfTimeError:
        out.out_of_time = bool
        out.short(Step.IOCTL, "RLIMIT_CPU", tried="the rest of the probe")
    except MemoryError:
        out.short(Step.IOCTL, "ENOMEM", tried="allocate memory in this process")
    groups = list(Group)
    return tuple(sorted(out.checks, key=lambda check: groups.index(check.group)))


def _check_device(out: _Recorder, device: str) -> None:
    tried = f"open {device}"
    try:
        system = Kvm(device)
    except OSError as error:
        if error.errno in SHORTAGES:
            opened = out.failed(Step.DEVICE, error, tried=tried)
        else:
            hint = _host.device_hint(device, error.errno, out.host)
            opened = out.add(Step.DEVICE, FAIL, _name(error.errno), tried=tried, hint=hint)
        for group, step, vm_type in (
            (Group.VM, Step.CREATE, "default"),
            (Group.V9, Step.CAPABILITY, ""),
            (Group.V10, Step.CAPABILITY, "default"),
            (Group.GUEST_MEMFD, Step.FILE, "default"),
        ):
            out.within(group, vm_type).skip(step, "KVM could not be asked", opened)
        return
    with system:
        out.system = system
        out.add(Step.DEVICE, PASS, f"API version {system.get_api_version()}", tried=tried)
        try:
            _host.add_kvm_facts(out.host, system)
            _check_system(out, system)
        except OSError as error:  # nothing above makes KVM refuse what it always does
            out.failed(Step.IOCTL, error, tried=error.strerror or "")


def _check_system(out: _Recorder, system: Kvm) -> None:
    (private_mem,) = out.ask(system, restrictedmem_h, "KVM_CAP_PRIVATE_MEM")
    out.within(Group.V9).add(
        Step.CAPABILITY,
        PASS if private_mem.value else FAIL,
        "advertised" if private_mem.value else "not advertised",
        private_mem,
    )
    (types,) = out.ask(system, guest_memfd_h, "KVM_CAP_VM_TYPES")
    offered = types.value or 1 << guest_memfd_h.KVM_X86_DEFAULT_VM  # before there were types
    numbers = [bit for bit in range(32) if offered >> bit & 1]
    out.add(
        Step.VM_TYPES,
        PASS if types.value else FAIL,
        ", ".join(map(_type_name, numbers)) if types.value else "not listed, so default alone",
        types,
    )
    with ExitStack() as stack:
        file = _check_v9_file(out.within(Group.V9), stack)
        for number in numbers:
            vm_type, tried = _type_name(number), f"KVM_CREATE_VM({number})"
            made = out.within(Group.VM, vm_type)
            try:
                vm = system.create_vm(number)
            except OSError as error:
                made.failed(Step.CREATE, error, tried=tried)
                continue
            with vm:
                made.add(Step.CREATE, PASS, "made", tried=tried)
                if number == guest_memfd_h.KVM_X86_DEFAULT_VM:
                    _check_encryption(out, vm)
                    _check_v10(out.within(Group.V10, vm_type), vm)
                    _check_new_capabilities(out.within(Group.TREE), vm)
                _check_v9_slot(out.within(Group.V9, vm_type), vm, file)
                _check_guest_memfd(out.within(Group.GUEST_MEMFD, vm_type), vm)
    for number, vm_type in VM_TYPES.items():
        if number not in numbers:
            reason, hint = _host.why_not_offered(vm_type, out.host)
            why = f"not offered: {reason}"
            out.within(Group.VM, vm_type).add(Step.CREATE, SKIP, why, hint=hint)


def _type_name(number: int) -> str:
    return VM_TYPES.get(number, f"type_{number}")


def _check_encryption(out: _Recorder, vm: Vm) -> None:
    """Documentation/virt/kvm/x86/amd-memory-encryption.rst: a null pointer asks whether SEV is on.

    So it is told also where it is no VM type yet.
    """
    tried = "KVM_MEMORY_ENCRYPT_OP(NULL)"
    try:
        vm.ioctl(kvm_h.KVM_MEMORY_ENCRYPT_OP, 0)
    except OSError as error:
        out.failed(Step.ENCRYPTION, error, tried=tried)
    else:
        out.add(Step.ENCRYPTION, PASS, "SEV is on", tried=tried)


# -- v9 ----------------------------------------------------------------------------------------


def _check_syscall(out: _Recorder) -> None:
    """Ask what system call 451 is, without any effect, and in a child where a filter may kill."""
    step, tried = Step.SYSCALL, "memfd_restricted(0xffffffff)"
    filtered = out.host["seccomp"] != 0
    try:
        errno = _ask_in_child() if filtered else restrictedmem.ask_memfd_restricted()
    except OSError as error:  # no child could be made
        out.short(step, _name(error.errno), tried="fork()")
        return
    if errno == _errno.EINVAL:
        out.add(step, PASS, "EINVAL, as it must", tried=tried)
    elif errno == _errno.EBADF:
        out.add(step, FAIL, "EBADF, so 451 is cachestat(2)", tried=tried, hint=_V9_KERNEL)
    elif filtered or errno in (_errno.EPERM, _errno.EACCES):
        from signal import Signals

        answer = f"killed by {Signals(-errno).name}" if errno < 0 else _name(errno)
        hint = _host.refusal_hint(_errno.EPERM, out.host, "system call 451")
        out.add(step, SKIP, f"{answer}, undecided", tried=tried, hint=hint)
    else:
        out.add(step, FAIL, _name(errno) if errno else "0", tried=tried, hint=_V9_KERNEL)


def _ask_in_child() -> int:
    """The errno, or minus the signal that a filter killed the child with.

    OSError if no child could be made: EAGAIN, ENOMEM.
    """
    pid = os.fork()
    if pid == 0:
        errno = _errno.EPERM
        try:
            with suppress(ImportError, OSError, ValueError):
                import resource  # may need a descriptor

                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # leaves nothing behind
            errno = restrictedmem.ask_memfd_restricted()
        finally:
            os._exit(errno)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except OSError as error:  # SIGCHLD is ignored, and the child's status is lost
        return error.errno or _errno.EPERM


def _check_v9_file(out: _Recorder, stack: ExitStack) -> restrictedmem.RestrictedMem | None:
    step, tried = Step.FILE, "memfd_restricted(0)"
    syscall = next(check for check in out.checks if check.step is Step.SYSCALL)
    if syscall.status != PASS:
        why = "system call 451 is not memfd_restricted, or its answer is unknown"
        out.skip(step, why, syscall)
        return None
    try:
        file = stack.enter_context(restrictedmem.RestrictedMem())
        file.ftruncate(_OFFSET + _SIZE)
    except OSError as error:
        out.failed(step, error, tried=tried)
        return None
    out.add(step, PASS, "made, f_type RESTRICTEDMEM_MAGIC", tried=tried)
    return file


def _check_v9_slot(out: _Recorder, vm: Vm, file: restrictedmem.RestrictedMem | None) -> None:
    # Without both, bit 2 and REG_REGION are another generation's, or SEV's with a host address.
    if file is None or not out.within(Group.V9).passed(Step.CAPABILITY):
        why, after = "KVM_CAP_PRIVATE_MEM is 0", None
        if file is None:
            why = "there is no v9 file"
            after = next(c for c in out.checks if c.group is Group.V9 and c.step is Step.FILE)
        if out.vm_type == VM_TYPES[guest_memfd_h.KVM_X86_DEFAULT_VM]:  # once is enough
            out.skip(Step.SLOT, why, after)
            out.skip(Step.CONVERSION, why, after)
        return
    asked = out.ask(vm, restrictedmem_h, "KVM_CAP_PRIVATE_MEM")
    tried = f"KVM_SET_USER_MEMORY_REGION(KVM_MEM_PRIVATE, offset {_OFFSET:#x})"
    with HostMemory(_SIZE) as memory:
        try:
            slot = restrictedmem.set_user_memory_region_ext(
                vm, 0, _GPA, _SIZE, memory, file, _OFFSET
            )
        except OSError as error:
            hint = (
                "the architecture's hook refuses private memory to this VM: v9 needs TDX or SNP, "
                "or the module parameter kvm.private_mem_testing of this project's kernel"
            )
            bound = out.failed(Step.SLOT, error, *asked, tried=tried, hint=hint)
            out.skip(Step.CONVERSION, "there is no private slot", bound)
            return
        out.add(Step.SLOT, PASS, "bound", *asked, tried=tried)
        try:
            tried = "KVM_MEMORY_ENCRYPT_UNREG_REGION(1 page)"  # a gfn begins private
            restrictedmem.memory_encrypt_unreg_region(vm, _GPA, PAGE_SIZE)
            tried = "KVM_MEMORY_ENCRYPT_REG_REGION(1 page)"
            restrictedmem.memory_encrypt_reg_region(vm, _GPA, PAGE_SIZE)
            tried = "delete the slot"
            slot.delete()
        except OSError as error:
            out.failed(Step.CONVERSION, error, tried=tried)
        else:
            tried = "KVM_MEMORY_ENCRYPT_{UNREG,REG}_REGION(1 page)"
            out.add(Step.CONVERSION, PASS, "to shared and back, slot deleted", tried=tried)


def _check_v10(out: _Recorder, vm: Vm) -> None:
    asked = out.ask(vm, restrictedmem_v10_h, "KVM_CAP_MEMORY_ATTRIBUTES")
    out.add(
        Step.CAPABILITY,
        PASS if asked[0].value else FAIL,
        "advertised" if asked[0].value else "not advertised",
        *asked,
    )
    attributes = restrictedmem_v10_h.ffi.new("__u64 *")
    tried = "KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES"
    try:
        vm.ioctl(restrictedmem_v10_h.KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES, attributes)
    except OSError as error:
        out.failed(Step.ATTRIBUTES, error, tried=tried)
    else:
        supported = f"{attributes[0]:#x}"
        out.add(Step.ATTRIBUTES, PASS, supported, tried=tried)


# -- mainline ----------------------------------------------------------------------------------


def _check_guest_memfd(out: _Recorder, vm: Vm) -> None:
    asked = out.ask(vm, guest_memfd_h, "KVM_CAP_GUEST_MEMFD")
    tried = f"KVM_CREATE_GUEST_MEMFD({_OFFSET + _SIZE:#x} bytes)"
    try:
        file = guest_memfd.GuestMemfd(vm, _OFFSET + _SIZE)
    except OSError as error:
        hint = "needs Linux 6.8 with CONFIG_KVM_SW_PROTECTED_VM, SNP or TDX, or 6.18"
        made = out.failed(Step.FILE, error, *asked, tried=tried, hint=hint)
        for step in (Step.SLOT, *_WITH_A_FILE):
            out.skip(step, "there is no guest_memfd file", made)
        return
    with file, HostMemory(_SIZE) as memory:
        out.add(Step.FILE, PASS, "made", *asked, tried=tried)
        tree = out.within(Group.TREE)
        if not any(check.step is Step.INODE for check in out.checks):  # once is enough
            _check_inode(tree, file)
            _check_create_flags(tree, vm)
        asked = out.ask(vm, guest_memfd_h, "KVM_CAP_USER_MEMORY2")
        tried = f"KVM_SET_USER_MEMORY_REGION2(offset {_OFFSET:#x})"
        try:
            guest_memfd.set_user_memory_region2(vm, 0, _GPA, _SIZE, memory, file, _OFFSET)
        except OSError as error:
            hint = "this VM type supports no guest_memfd slots before Linux 6.18"
            out.failed(Step.SLOT, error, *asked, tried=tried, hint=hint)
        else:
            out.add(Step.SLOT, PASS, "bound", *asked, tried=tried)
        _check_attributes(out, vm)
        _check_mmap(out, vm)
        _check_no_direct_map(out, vm)
        _check_punch_hole(out, file)
        _check_in_place(out, vm, file)
        _check_userfault(out, vm, memory)
        _check_hypercall(out, vm)
        _check_pre_fault(out, vm)


def _check_attributes(out: _Recorder, vm: Vm) -> None:
    asked = out.ask(vm, guest_memfd_h, "KVM_CAP_MEMORY_ATTRIBUTES")
    tried = "KVM_SET_MEMORY_ATTRIBUTES(PRIVATE, 1 page)"
    try:
        guest_memfd.set_memory_attributes(
            vm, _GPA, PAGE_SIZE, guest_memfd_h.KVM_MEMORY_ATTRIBUTE_PRIVATE
        )
        tried = "KVM_SET_MEMORY_ATTRIBUTES(0, 1 page)"
        guest_memfd.set_memory_attributes(vm, _GPA, PAGE_SIZE, 0)
    except OSError as error:
        hint = "no private memory in this VM type: sw_protected, snp and tdx VMs have it"
        if out.host["parameters"].get("kvm.gmem_in_place_conversion") == "Y":
            hint = "kvm.gmem_in_place_conversion is on: not the VM is converted but the file"
        out.failed(Step.CONVERSION, error, *asked, tried=tried, hint=hint)
    else:
        tried = "KVM_SET_MEMORY_ATTRIBUTES(1 page)"
        out.add(Step.CONVERSION, PASS, "to private and back", *asked, tried=tried)


def _check_mmap(out: _Recorder, vm: Vm) -> None:
    asked = out.ask(vm, guest_memfd_h, "KVM_CAP_GUEST_MEMFD_FLAGS")
    tried = f"mmap of a file with flags {_MAPPABLE:#x}"
    hint = "needs Linux 6.18; from there on the VM's KVM_CAP_GUEST_MEMFD_FLAGS lists the flag"
    try:
        with (
            guest_memfd.GuestMemfd(vm, PAGE_SIZE, _MAPPABLE) as file,
            HostMemory(PAGE_SIZE, fd=file.fileno()),  # touching it would be SIGBUS
        ):
            out.add(Step.MMAP, PASS, "mapped", *asked, tried=tried)
    except OSError as error:
        out.failed(Step.MMAP, error, *asked, tried=tried, hint=hint)
    tried = f"a slot of a mapped file with flags {_SHARED:#x}"
    try:
        with (
            guest_memfd.GuestMemfd(vm, PAGE_SIZE, _SHARED) as file,
            HostMemory(PAGE_SIZE, fd=file.fileno()) as memory,
        ):
            memory.write(0, b"kvm")
            same = memory.read(0, 3) == b"kvm"
            guest_memfd.set_user_memory_region2(vm, 2, _ELSEWHERE, PAGE_SIZE, memory, file)
    except OSError as error:
        out.failed(Step.INIT_SHARED, error, *asked, tried=tried, hint=hint)
        return
    result = "written, read and bound" if same else "read other bytes than were written"
    if not asked[0].value & guest_memfd_h.GUEST_MEMFD_FLAG_INIT_SHARED:
        result += ", but the VM does not list 1<<1: in Firecracker's tree it is NO_DIRECT_MAP"
    out.add(Step.INIT_SHARED, PASS if same else FAIL, result, *asked, tried=tried)


def _check_no_direct_map(out: _Recorder, vm: Vm) -> None:
    flags = guest_memfd_h.GUEST_MEMFD_FLAG_NO_DIRECT_MAP
    if out.passed(Step.INIT_SHARED):
        flags |= _SHARED
    tried = f"KVM_CREATE_GUEST_MEMFD(flags {flags:#x})"
    try:
        guest_memfd.GuestMemfd(vm, PAGE_SIZE, flags).close()
    except OSError as error:
        hint = "not in mainline: needs a kernel with GUEST_MEMFD_FLAG_NO_DIRECT_MAP"
        out.failed(Step.NO_DIRECT_MAP, error, tried=tried, hint=hint)
    else:
        result = "made; 1<<2 is NO_DIRECT_MAP, or HUGETLB or HUGE_PAGES in other trees"
        out.add(Step.NO_DIRECT_MAP, PASS, result, tried=tried)


def _check_punch_hole(out: _Recorder, file: guest_memfd.GuestMemfd) -> None:
    tried = "fallocate(FALLOC_FL_PUNCH_HOLE, 1 page)"
    try:
        file.punch_hole(_OFFSET, PAGE_SIZE)
    except OSError as error:
        out.failed(Step.PUNCH_HOLE, error, tried=tried)
    else:
        out.add(Step.PUNCH_HOLE, PASS, "freed", tried=tried)


def _try(fd: Fd, request: int, argument: Cdata) -> None:
    """As `Fd.ioctl`, whose error has a message that takes milliseconds to make."""
    if errno := fd.ioctl_errno(request, argument):
        raise OSError(errno, os.strerror(errno))


def _check_in_place(out: _Recorder, vm: Vm, file: guest_memfd.GuestMemfd) -> None:
    """The ioctl looks at its flags before all else, so a bad flag asks whether it is there."""
    request, step = guest_memfd_h.KVM_SET_MEMORY_ATTRIBUTES2, Step.IN_PLACE
    private = guest_memfd_h.KVM_MEMORY_ATTRIBUTE_PRIVATE
    values = {"offset": _OFFSET, "size": PAGE_SIZE}  # attributes 0: shared
    asked = _ask_in_place(out, vm)
    tried = "KVM_SET_MEMORY_ATTRIBUTES2(flags 1<<63)"
    answer = guest_memfd_in_place.ask_set_memory_attributes2(file)
    if answer == 0:
        result = "accepted a flag that does not exist: the kernel is newer than this kvmpriv"
        out.add(step, FAIL, result, *asked, tried=tried)
        return
    if answer != _errno.EINVAL:
        hint = _host.in_place_hint(out.host)
        if answer == _errno.ENOTTY and _has_first_posting(file):
            hint = "this kernel has the first posting of conversion in place, with another ioctl"
        elif answer == _errno.ENOTTY and asked:
            hint += "; the capabilities' numbers mean something else here, or it is off"
        error = OSError(answer, os.strerror(answer))
        out.failed(step, error, *asked, tried=tried, hint=hint)
        return
    tried = "KVM_SET_MEMORY_ATTRIBUTES2(0, 1 page)"  # a page of this file begins private
    argument = new_struct(_ATTRIBUTES2, values)
    try:
        _try(file, request, argument)
        tried = "KVM_SET_MEMORY_ATTRIBUTES2(PRIVATE, 1 page)"
        _try(file, request, new_struct(_ATTRIBUTES2, values | {"attributes": private}))
    except OSError as error:
        if error.errno == _errno.EAGAIN:  # no shortage of this process
            hint = "something else uses the page: probe again"
            out.add(step, FAIL, "EAGAIN", *asked, tried=tried, hint=hint)
            return
        hint = "the ioctl is there, but this VM type has no private memory"
        out.failed(step, error, *asked, tried=tried, hint=hint)
        return
    tried = "KVM_SET_MEMORY_ATTRIBUTES2(1 page)"
    result = "to shared and to private"
    if any(argument.reserved):
        result += "; it wrote to reserved words: the kernel is newer than this kvmpriv"
    out.add(step, PASS, result, *asked, tried=tried)


def _ask_in_place(out: _Recorder, vm: Vm) -> tuple[Asked, ...]:
    """The capabilities beyond mainline's last that report a value.

    The one of conversion in place is among them where it has that; its number moved with each
    posting, so that no verdict follows from it.
    """
    asked = []
    for number in _NEW_CAPABILITIES:
        value = vm.check_extension(number)
        device = out.system.check_extension(number) if out.system else None
        if value or device:
            asked.append(Asked(f"capability {number}", value, device))
    return tuple(asked)


def _has_first_posting(file: guest_memfd.GuestMemfd) -> bool:
    """Whether the ioctl has the number of the series' first posting: the struct is as large."""
    first = guest_memfd_h.KVM_SET_MEMORY_ATTRIBUTES2_V1
    values = {"size": PAGE_SIZE, "flags": 1 << 63}
    return file.ioctl_errno(first, new_struct(_ATTRIBUTES2, values)) == _errno.EINVAL


def _check_userfault(out: _Recorder, vm: Vm, memory: HostMemory) -> None:
    bitmap = guest_memfd_h.ffi.new("__u64 *")  # all 0: no page's fault exits
    values = {
        "slot": 1,
        "flags": guest_memfd_h.KVM_MEM_USERFAULT,
        "guest_phys_addr": _FURTHER,
        "memory_size": PAGE_SIZE,
        "userspace_addr": memory.userspace_addr,
        "pad2": [int(guest_memfd_h.ffi.cast("uintptr_t", bitmap))],
    }
    tried = "KVM_SET_USER_MEMORY_REGION2(KVM_MEM_USERFAULT)"
    request = guest_memfd_h.KVM_SET_USER_MEMORY_REGION2
    try:
        _try(vm, request, new_struct(_REGION, values))
        _try(vm, request, new_struct(_REGION, {"slot": 1}))  # size 0 deletes it
    except OSError as error:
        hint = "not in mainline: needs a kernel with KVM_MEM_USERFAULT"
        out.failed(Step.USERFAULT, error, tried=tried, hint=hint)
    else:
        result = "bound; slot flag 1<<3 is KVM_MEM_USERFAULT in the trees that are known"
        out.add(Step.USERFAULT, PASS, result, tried=tried)


def _check_hypercall(out: _Recorder, vm: Vm) -> None:
    asked = out.ask(vm, kvm_h, "KVM_CAP_EXIT_HYPERCALL")
    tried = "KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL, KVM_HC_MAP_GPA_RANGE)"
    try:
        vm.enable_cap(kvm_h.KVM_CAP_EXIT_HYPERCALL, 1 << kvm_h.KVM_HC_MAP_GPA_RANGE)
    except OSError as error:
        out.failed(Step.HYPERCALL, error, *asked, tried=tried)
    else:
        out.add(Step.HYPERCALL, PASS, "enabled", *asked, tried=tried)


# -- patched kernels ---------------------------------------------------------------------------


def _check_inode(out: _Recorder, file: guest_memfd.GuestMemfd) -> None:
    tried = "fstatfs(2) and readlink(2) of a guest_memfd"
    magic, link = _inode(file.fileno())
    what = f"f_type {magic:#x}, {link}"
    if (magic, link) == (guest_memfd_h.GUEST_MEMFD_MAGIC, "/[kvm-gmem] (deleted)"):
        out.add(Step.INODE, PASS, f"{what}: a file system of its own, as in Linux 7.3", tried=tried)
    elif (magic, link) == (guest_memfd_h.ANON_INODE_FS_MAGIC, "anon_inode:[kvm-gmem]"):
        out.add(Step.INODE, PASS, f"{what}: as in Linux 6.8 to 6.18", tried=tried)
    else:
        out.add(Step.INODE, FAIL, f"{what}: neither Linux 6.8 to 6.18 nor 7.3", tried=tried)


def _inode(fd: int) -> tuple[int, str]:
    """The file system's magic number and the name of a file."""
    try:
        return fstatfs_type(fd), os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        return fstatfs_type(fd), _name(error.errno)


def _check_create_flags(out: _Recorder, vm: Vm) -> None:
    """Flags that no mainline kernel up to 7.3 knows; 1<<2 is a check of each VM type."""
    step, tried, accepted = Step.CREATE_FLAGS, "KVM_CREATE_GUEST_MEMFD(flags {})", []
    bits = (3, 4)
    for bit in bits:
        try:
            guest_memfd.GuestMemfd(vm, PAGE_SIZE, 1 << bit).close()
        except OSError as error:
            if error.errno != _errno.EINVAL:
                out.failed(step, error, tried=tried.format(f"1<<{bit}"))
                return
        else:
            accepted.append(bit)
    tried = tried.format(" and ".join(f"1<<{bit}" for bit in bits))
    if accepted:
        found = ", ".join(map(_flag_name, accepted))
        out.add(step, FAIL, f"accepted {found}", tried=tried)
    else:
        out.add(step, PASS, "EINVAL, as it must", tried=tried)


def _flag_name(bit: int) -> str:
    from ..cdefs import unmerged as unmerged_h

    names = _names(unmerged_h, "GUEST_MEMFD_FLAG_", 1 << bit)
    return f"1<<{bit} ({names or 'unknown'})"


def _check_new_capabilities(out: _Recorder, vm: Vm) -> None:
    """The seven numbers after guest_memfd's last are other architectures' in mainline."""
    first = guest_memfd_h.KVM_CAP_GUEST_MEMFD_FLAGS + 1
    tried = f"KVM_CHECK_EXTENSION({first} to {first + 6})"
    answers = {number: vm.check_extension(number) for number in range(first, first + 7)}
    if found := [_capability_name(*answer) for answer in answers.items() if answer[1]]:
        out.add(Step.CAPABILITIES, FAIL, ", ".join(found), tried=tried)
    else:
        out.add(Step.CAPABILITIES, PASS, "all 0, as on x86 in mainline", tried=tried)


def _capability_name(number: int, value: int) -> str:
    from ..cdefs import unmerged as unmerged_h

    names = [name] if (name := _names(unmerged_h, "KVM_CAP_", number)) else []
    last = unmerged_h.IN_PLACE_V8_CAP_LAST
    if number == unmerged_h.IN_PLACE_V1_CAP:
        names.append("in-place conversion v1")
    elif unmerged_h.IN_PLACE_V2_CAP_FIRST <= number <= last:
        names.append("in-place conversion v2 to v8, or arm CCA")
    return f"{number} = {value} ({' or '.join(names) or 'unknown'} in patched kernels)"


def _names(module: ModuleType, prefix: str, value: int) -> str:
    """The constants with this value whose names begin so."""
    found = [name for name, number in vars(module).items() if number == value]
    return " or ".join(name.removeprefix(prefix) for name in found if name.startswith(prefix))


def _check_pre_fault(out: _Recorder, vm: Vm) -> None:
    step = Step.PRE_FAULT
    asked = out.ask(vm, guest_memfd_h, "KVM_CAP_PRE_FAULT_MEMORY")
    if not asked[0].value:
        out.add(step, SKIP, "not offered", *asked)
    elif not out.passed(Step.SLOT):
        out.add(step, SKIP, "there is no guest_memfd slot", *asked)
    elif out.vm_type in ("default", "sw_protected"):
        tried = "KVM_PRE_FAULT_MEMORY(1 page)"
        try:
            with vm.create_vcpu() as vcpu:
                left = guest_memfd.pre_fault_memory(vcpu, _GPA, PAGE_SIZE)
        except OSError as error:
            out.failed(step, error, *asked, tried=tried)
        else:
            result = f"{left:#x} bytes left" if left else "filled"
            out.add(step, FAIL if left else PASS, result, *asked, tried=tried)
    else:
        out.add(step, SKIP, "a vCPU of this VM type needs a launch sequence first", *asked)
