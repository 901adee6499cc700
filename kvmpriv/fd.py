"""An owned file descriptor, and the one place where an ioctl is issued and its failure told."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from .cdefs import kvm as kvm_h
from .libc import ioctl as _ioctl
from .libc import last_errno, os_error, set_errno

__all__ = [
    "REQUEST_NAMES",
    "Fd",
    "Struct",
    "Structs",
    "describe",
    "new_struct",
    "register_requests",
]

#: ioctl number -> name, for messages: those of kvm.h, and what :func:`register_requests` added.
REQUEST_NAMES: dict[int, str] = dict(kvm_h.REQUESTS)

_ffi = kvm_h.ffi  # any FFI can cast any pointer
_UINTPTR = _ffi.typeof("uintptr_t")
#: What a pointer's type points to, in bytes.
_sizes: dict[Any, int] = {}
_Self = TypeVar("_Self", bound="Fd")


def register_requests(names: Mapping[int, str]) -> None:
    """Make messages name more ioctls.  A number that has a name already gets the new one."""
    REQUEST_NAMES.update(names)


def _show(value: Any) -> str:
    if isinstance(value, int):
        return hex(value) if value > 9 else str(value)
    return "…"


def describe(argument: Any) -> str:
    """An ioctl's argument for a message: a number, or a struct's fields that are not 0."""
    if isinstance(argument, int):
        return _show(argument)
    kind = _ffi.typeof(argument)
    if kind.kind != "pointer" or kind.item.kind != "struct":
        return str(kind.cname)
    shown = []
    for name, _ in kind.item.fields or ():
        try:
            value = getattr(argument, name)
        except (AttributeError, TypeError):  # an anonymous union
            continue
        if isinstance(value, int):
            if value:
                shown.append(f"{name}={_show(value)}")
        elif isinstance(value, _ffi.CData) and _ffi.typeof(value).kind == "struct":
            shown.append(f"{name}=({describe(_ffi.addressof(value))})")
    return ", ".join(shown) or "all 0"


def new_struct(pointer: Any, values: tuple[Any, ...] | dict[str, Any]) -> Any:
    """A struct of this pointer's type (any FFI's).  ValueError names a value that does not fit."""
    try:
        return _ffi.new(pointer, values)
    except OverflowError:
        raise _misfit(pointer, values) from None


def _misfit(pointer: Any, values: tuple[Any, ...] | dict[str, Any]) -> ValueError:
    struct = pointer.item
    fields = dict(struct.fields)
    named = values if isinstance(values, dict) else dict(zip(fields, values, strict=False))
    for name, value in named.items():
        try:
            _ffi.new(pointer, {name: value})
        except OverflowError as error:
            if isinstance(value, tuple):
                return _misfit(_ffi.typeof(f"{fields[name].type.cname} *"), value)
            return ValueError(f"{struct.cname}: {name} can't be {value:#x} ({error})")
    return ValueError(f"{struct.cname} can't have {values}")


class Struct(NamedTuple):
    """A struct for an ioctl, and its address."""

    fields: Any
    address: int


class Structs:
    """Structs of one type that are used again: making one takes longer than filling it.

    Who takes one has it alone, among threads and signal handlers too, filled with `values`, and
    gives it back; one that never comes back is made anew.  Padding is 0 as long as nobody sets it.
    ValueError as :func:`new_struct`.
    """

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        self._free: list[Struct] = []
        self.give_back = self._free.append

    def take(self, values: tuple[Any, ...]) -> Struct:
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
    """A file descriptor with one owner.

    A context manager; `close` may be called twice; after it every use is a ValueError.  The
    descriptor is close-on-exec.
    """

    #: What an error calls it.
    _what = "fd"

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor's number.  ValueError when closed."""
        if self._fd < 0:
            raise self._closed_error()
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Give the descriptor back to the system.  What KVM still needs lives on in KVM."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def ioctl(self, request: int, argument: Any = 0) -> int:
        """Issue an ioctl and return its result, 0 or more.

        `argument` is an int, or a cffi pointer to a struct (any FFI's).  Raises OSError, with the
        ioctl's name and its argument in the message; ValueError for a struct that is smaller
        than the request says (the kernel would write beyond it).
        """
        address = self._address(request, argument)
        before = last_errno()
        result: int = _ioctl(self._fd, request, address)
        if result < 0:
            error = self._error(request, argument)
            set_errno(before)  # we may be in a signal handler, between a call and its errno
            raise error
        return result

    def ioctl_errno(self, request: int, argument: Any = 0) -> int:
        """The same, for those who test refusals: 0 for success, else the errno.

        A result other than 0 (a new fd, a count) is lost: use :meth:`ioctl` where it matters.
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
    def _address(request: int, argument: Any) -> int:
        if isinstance(argument, int):
            return argument & 0xFFFFFFFFFFFFFFFF
        kind = _ffi.typeof(argument)
        size = request >> 16 & 0x3FFF  # _IOC_SIZE
        given = _sizes.get(kind)
        if given is None:
            if kind.kind == "pointer" and kind.item.kind != "void":
                given = _sizes[kind] = _ffi.sizeof(kind.item)
            elif kind.kind == "array":
                given = _ffi.sizeof(argument)
            else:
                given = size
        if given < size:
            name = REQUEST_NAMES.get(request, hex(request))
            raise ValueError(f"{name} takes {size} bytes, {kind.cname} has {given}")
        return int(_ffi.cast(_UINTPTR, argument))

    def _error(self, request: int, argument: Any = 0) -> OSError | ValueError:
        """The exception for the ioctl that has just failed."""
        errno = last_errno()
        if errno == _errno.EBADF and self._fd < 0:
            return self._closed_error()
        name = REQUEST_NAMES.get(request, hex(request))
        return os_error(errno, f"{name}({describe(argument)})")

    def _closed_error(self) -> ValueError:
        return ValueError(f"{self._what} is closed")

    def __enter__(self: _Self) -> _Self:
        if self.closed:
            raise self._closed_error()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # An object forgotten is no leak; one that __init__ never finished has no _fd.
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        state = "CLOSED" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {state}>"
