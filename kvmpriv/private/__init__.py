"""Private memory: guest memory that the host can't read.

    with Kvm() as kvm, kvmpriv.private.create_vm(kvm) as vm:
        slot = vm.add_private_memory(0x1_0000_0000, 16 << 20)
        slot.convert(private=False)

Each ABI is an object, a :class:`PrivateAbi`: v9's restrictedmem, mainline's guest_memfd and its
successor, conversion in place, are here; others can be registered.  Their modules also have the
ioctls themselves.  Lower layers don't know the ABIs; they are passed what they need (for example
the exit layout).

README.md in this directory explains the terms, and how to add an ABI.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ..errors import ArgumentError
from ..faults import FaultLayout, register_fault_layout
from ..fd import Structs
from . import guest_memfd, guest_memfd_in_place, restrictedmem
from .abi import PrivateAbi, Traits
from .backing import PrivateFile, PrivateSlot
from .conversion import ConversionError, NotFreedError
from .guest_memfd import GuestMemfdAbi
from .guest_memfd_in_place import GuestMemfdInPlaceAbi
from .restrictedmem import RestrictedMemAbi
from .vm import PrivateVm

if TYPE_CHECKING:
    from ..kvm import Kvm
    from .serve import serve_conversion

__all__ = [
    "ABIS",
    "ConversionError",
    "FaultLayout",
    "GuestMemfdAbi",
    "GuestMemfdInPlaceAbi",
    "NotFreedError",
    "PrivateAbi",
    "PrivateFile",
    "PrivateSlot",
    "PrivateVm",
    "RestrictedMemAbi",
    "Structs",
    "Traits",
    "choose",
    "create_vm",
    "guest_memfd",
    "guest_memfd_in_place",
    "register",
    "restrictedmem",
    "serve_conversion",
]

#: Errnos of a process or a host that has run out of something, which say nothing about the kernel.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

#: Name -> ABI, in the order in which :func:`choose` tries them.
ABIS: dict[str, PrivateAbi] = {}


def register(abi: PrivateAbi) -> None:
    """Add an ABI to ABIS, the last to be tried.  ArgumentError if its name is taken."""
    if abi.name in ABIS:
        raise ArgumentError(
            f"a private memory ABI is already called {abi.name!r}: {ABIS[abi.name]!r}"
        )
    register_fault_layout(abi.fault_layout)
    ABIS[abi.name] = abi


register(RestrictedMemAbi())
register(GuestMemfdAbi())
register(GuestMemfdInPlaceAbi())


def choose(kvm: Kvm, name: str | None = None) -> PrivateAbi:
    """The first ABI with which this machine has private memory; each is tried, none inferred.

    `name`, a key of ABIS, allows only that one.  ArgumentError for an unknown name.  OSError
    (EOPNOTSUPP) if guests can't have private memory here, with what each ABI was refused; EMFILE,
    ENFILE or ENOMEM if that could not be tried.
    """
    if name is not None and name not in ABIS:
        raise ArgumentError(f"unknown private memory ABI {name!r}: known are {', '.join(ABIS)}")
    refused = []
    for abi in [ABIS[name]] if name else ABIS.values():
        try:
            abi.try_out(kvm)
        except OSError as error:
            if error.errno in _SHORTAGES:
                raise
            refused.append(f"{abi.name}: {error.strerror}")
        else:
            return abi
    raise OSError(errno.EOPNOTSUPP, f"no private memory here: {'; '.join(refused)}")


def create_vm(kvm: Kvm, abi: PrivateAbi | str | None = None) -> PrivateVm:
    """Make a VM with private memory by `abi`, or a name; by the one that works if None is given.

    OSError, ArgumentError: see :func:`choose` and :meth:`PrivateAbi.create_vm`.
    """
    if not isinstance(abi, PrivateAbi):
        abi = choose(kvm, abi)
    return abi.create_vm(kvm)


if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> object:
        if name == "serve_conversion":
            from .serve import serve_conversion

            return serve_conversion
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
