"""An owned file descriptor, and the one place where an ioctl is issued and its error is raised."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from .cdefs import kvm as kvm_h
from .errors import ArgumentError, ClosedError
from .libc import ioctl as _ioctl
from .libc import last_errno, os_error, set_errno

if TYPE_CHECKING:
    from .cdefs.cffi_types import Cdata, CType

__all__ = [
    "REQUEST_NAMES",
    "Fd",
    "Struct",
    "Structs",
    "check_range",
    "describe",
    "new_struct",
    "register_requests",
    "unowned",
]

#: Descriptors that no Fd has yet: who made one closes it if no Fd takes it.
unowned: set[int] = set()

#: ioctl number -> name, for messages: those of kvm.h, and what :func:`register_requests` added.
REQUEST_NAMES: dict[int, str] = dict(kvm_h.REQUESTS)

_ffi = kvm_h.ffi  # any FFI can cast any pointer
_UINTPTR = _ffi.typeof("uintptr_t")
#: A pointer's type -> the size of what it points to, in bytes.
_sizes: dict[CType, int] = {}
_Self = TypeVar("_Self", bound="Fd")


def register_requests(names: Mapping[int, str]) -> None:
    """Make messages name more ioctls.  A number that has a name already gets the new one."""
    REQUEST_NAMES.update(names)


def check_range(name: str, value: int, end: int, start: int = 0) -> None:
    """ArgumentError unless start <= value < end; the message calls the value `name`."""
    if not start <= value < end:
        raise ArgumentError(f"{name} must be {start:#x} to {end - 1:#x}, not {value:#x}")


def _show(value: object) -> str:
    if isinstance(value, int):
        return f"{value:#x}" if value > 9 or value < 0 else str(value)
    return repr(value)


def _show_field(struct: str, name: str, value: int) -> str:
    """A field's value; by its name in the kernel's headers for a capability and a slot's flags."""
    is_cap = struct == "struct kvm_enable_cap" and name == "cap"
    if is_cap or (struct.startswith("struct kvm_userspace_memory_region") and name == "flags"):
        from .cdefs.enums import Cap, MemFlag  # an error, at most: they take 2 ms

        return str(Cap(value) if is_cap else MemFlag(value))
    return _show(value)


_ALL_ZERO = "all 0"
#: The type of a pointer to memory that it owns, which therefore is there.
_OWNER = type(_ffi.new("char *"))


def _copied(pointer: object, kind: CType) -> object | None:
    """A copy of what `pointer` points to; None if that can't be read.

    The kernel reads it: here, a wrong address would be the end of the process.
    """
    address, size = int(_ffi.cast(_UINTPTR, pointer)), _ffi.sizeof(kind.item)
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:  # noqa: PTH123
            data = os.pread(memory.fileno(), size, address)
    except (OSError, OverflowError):
        return None
    if len(data) < size:
        return None
    copy = _ffi.new(kind)
    _ffi.memmove(copy, data, size)
    return copy


def describe(argument: object) -> str:
    """Text for an ioctl's argument: a number, or those fields of a struct that are not 0.

    ``describe(vcpu.get_regs())`` is, for example, ``rip=0xfff0, rflags=2, rdx=0x600``.
    """
    if isinstance(argument, int):
        return _show(argument)
    kind = _ffi.typeof(argument)
    if kind.kind != "pointer" or kind.item.kind not in ("struct", "primitive"):
        return kind.cname
    if type(argument) is not _OWNER:
        copy = _copied(argument, kind)
        if copy is None:
            return _show_pointer(argument)
        argument = copy
    if kind.item.kind == "primitive":
        return _show(argument[0])  # type: ignore[index]  # a pointer
    shown = []
    for name, _ in kind.item.fields or ():
        try:
            value = getattr(argument, name)
        except (AttributeError, TypeError):  # an anonymous union
            continue
        if isinstance(value, int):
            if value:
                shown.append(f"{name}={_show_field(kind.item.cname, name, value)}")
        elif isinstance(value, _ffi.CData) and _ffi.typeof(value).kind == "struct":
            inner = describe(_ffi.addressof(value))
            if inner != _ALL_ZERO:
                shown.append(f"{name}=({inner})")
    return ", ".join(shown) or _ALL_ZERO


def new_struct(pointer: CType | str, values: tuple[object, ...] | Mapping[str, object]) -> Cdata:
    """Make a struct of this pointer type with these fields.

    The type is a string for the structs of ``cdefs/kvm.h``, else what an FFI's ``typeof`` returns.
    ArgumentError names the field that a value does not fit.
    """
    try:
        return _ffi.new(pointer, values)
    except (OverflowError, IndexError):
        kind = _ffi.typeof(pointer) if isinstance(pointer, str) else pointer
        raise _misfit(kind, values) from None


def _misfit(pointer: CType, values: tuple[object, ...] | Mapping[str, object]) -> ArgumentError:
    struct = pointer.item
    fields = dict(struct.fields or ())
    named = dict(values) if isinstance(values, Mapping) else dict(zip(fields, values, strict=False))
    for name, value in named.items():
        try:
            _ffi.new(pointer, {name: value})
        except (OverflowError, IndexError) as error:
            # A field of an anonymous union is not in `fields`.
            kind, wrong = (fields[name].type if name in fields else struct), value
            if kind.kind == "array" and isinstance(value, (list, tuple)):
                kind, wrong = kind.item, _first_misfit(kind.item, value)
            if kind.kind in ("struct", "union") and isinstance(wrong, (tuple, dict)):
                return _misfit(_ffi.typeof(f"{kind.cname} *"), wrong)
            return ArgumentError(f"{struct.cname}: {name} can't be {_show(wrong)} ({error})")
    return ArgumentError(f"{struct.cname} can't have {values}")


def _first_misfit(item: CType, values: Sequence[object]) -> object:
    """The first of an array's values that does not fit, or all of them when there are too many."""
    for value in values:
        try:
            _ffi.new(f"{item.cname} *", value)
        except (OverflowError, IndexError):
            return value
    return values


class Struct:
    """A struct for an ioctl, and its address."""

    __slots__ = ("address", "fields")

    fields: Cdata
    address: int

    def __init__(self, fields: Cdata, address: int) -> None:
        self.fields = fields
        self.address = address


class Structs:
    """A pool of structs of one type: making a struct takes longer than filling one.

    :meth:`take` returns a struct, filled with `values`, for the caller's exclusive use, safe
    against threads and signal handlers; the caller returns it with `give_back`.  A struct that is
    not returned is replaced by a new one.  Padding is 0 unless a caller sets it.
    """

    def __init__(self, pointer: CType) -> None:
        self._pointer = pointer
        self._free: list[Struct] = []
        #: Return a struct to the pool; the caller does not use it any more.
        self.give_back: Callable[[Struct], None] = self._free.append

    def take(self, values: tuple[object, ...]) -> Struct:
        """A struct with these fields.  ArgumentError as :func:`new_struct`."""
        try:
            struct = self._free.pop()
            struct.fields[0] = values
        except IndexError:
            fields = new_struct(self._pointer, values)
            return Struct(fields, int(_ffi.cast(_UINTPTR, fields)))
        except OverflowError:
            raise _misfit(self._pointer, values) from None
        return struct


class Fd:
    """A file descriptor with one owner, close-on-exec.

    A context manager.  `close` may be called twice; every use after it raises ClosedError.
    """

    #: The object's name in errors.
    _what = "fd"

    def __init__(self, fd: int) -> None:
        self._fd = fd
        unowned.discard(fd)

    def fileno(self) -> int:
        """The descriptor's number.  ClosedError after close."""
        if self._fd < 0:
            raise self._closed_error()
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._fd < 0

    def close(self) -> None:
        """Give the descriptor back to the system.  What KVM still needs lives on in KVM."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def ioctl(self, request: int, argument: object = 0) -> int:
        """Issue an ioctl and return its result, 0 or more.

        `argument` is an int of 64 bits, or a cffi pointer to a struct (of any FFI).  Raises OSError
        with the ioctl's name and its argument in the message; ArgumentError for a number that does
        not fit, and for a struct of another size than the request's: the kernel would read or
        write beyond a smaller one, and take a larger one for what it is not.  A struct that begins
        with the request's own (``kvm_userspace_memory_region_ext``) extends it and is accepted.
        """
        address = self._address(request, argument)
        before = last_errno()
        result: int = _ioctl(self._fd, request, address)
        if result < 0:
            error = self._error(request, argument)
            set_errno(before)  # we may be in a signal handler, between a call and its errno
            raise error
        return result

    def ioctl_errno(self, request: int, argument: object = 0) -> int:
        """As :meth:`ioctl`, for tests of refusals: returns 0 for success, else the errno.

        A result other than 0 (a new descriptor, a count) is lost: use :meth:`ioctl` for those.
        """
        address = self._address(request, argument)
        before = last_errno()
        if _ioctl(self._fd, request, address) >= 0:
            return 0
        errno = last_errno()
        set_errno(before)
        if errno == _errno.EBADF and self._fd < 0:
            raise self._closed_error()
        return errno

    @staticmethod
    def _address(request: int, argument: object) -> int:
        if isinstance(argument, int):
            if argument >> 64 or request >> 32:
                _check_number(request, argument)
            return argument
        kind = _ffi.typeof(argument)
        given = _sizes.get(kind)
        # All bits but _IOC_DIR's: _IOC_SIZE, and those that a request does not have.
        if given != request >> 16 & ~0xC000:
            _check_struct(request, argument, kind)
        return int(_ffi.cast(_UINTPTR, argument))

    def _error(self, request: int, argument: object = 0) -> OSError | ClosedError:
        """The exception for the ioctl that has just failed."""
        errno = last_errno()
        if errno == _errno.EBADF and self._fd < 0:
            return self._closed_error()
        shown = _show_pointer(argument) if errno == _errno.EFAULT else describe(argument)
        return os_error(errno, f"{_name(request)}({shown})")

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"{self._what} is closed")

    def __enter__(self: _Self) -> _Self:
        if self.closed:
            raise self._closed_error()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # An object that is forgotten leaks nothing; one that __init__ did not finish has no _fd.
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        state = "CLOSED" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {state}>"


def _show_pointer(argument: object) -> str:
    """An argument that the kernel could not read or write: to look into it might be a crash."""
    if isinstance(argument, int):
        return _show(argument)
    return f"{_ffi.typeof(argument).cname} at {int(_ffi.cast(_UINTPTR, argument)):#x}"


def _name(request: int) -> str:
    return REQUEST_NAMES.get(request, hex(request))


def _check_number(request: int, argument: int) -> None:
    """ArgumentError for a request or an argument that would be another number in the kernel."""
    check_range("request", request, 1 << 32)
    if not 0 <= argument < 1 << 64:
        raise ArgumentError(f"{_name(request)} takes a number of 64 bits, not {argument:#x}")


def _check_struct(request: int, argument: object, kind: CType) -> None:
    """ArgumentError when `argument` is not what `request` takes."""
    check_range("request", request, 1 << 32)
    size = request >> 16 & 0x3FFF
    if kind.kind == "array":  # raw bytes, for structs that the caller has laid out
        given = _ffi.sizeof(argument)
        fits = given >= size
    elif kind.kind != "pointer" or kind.item.kind == "void":
        return
    else:
        item = kind.item
        given = _sizes[kind] = _ffi.sizeof(item)
        fits = size in (given, 0) or (given > size and _extends(item, size))
    if not fits:
        raise ArgumentError(f"{_name(request)} takes {size} bytes, {kind.cname} has {given}")


def _extends(struct: CType, size: int) -> bool:
    """Whether the first member of `struct` is a struct of `size` bytes."""
    if struct.kind != "struct" or not struct.fields:
        return False
    first = struct.fields[0][1].type
    return bool(first.kind == "struct" and _ffi.sizeof(first) == size)
