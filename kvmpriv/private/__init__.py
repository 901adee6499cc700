"""Private memory by two ABIs, a module each: v9's restrictedmem, mainline's guest_memfd.

Both are a :class:`PrivateAbi`, and each has its own calls beside.  No room below knows which
generation it speaks to; what it needs of one is handed down.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from . import guest_memfd, restrictedmem
from .backing import NotFreedError, PrivateFile, PrivateSlot

if TYPE_CHECKING:
    from ..kvm import Kvm
    from .protocol import PrivateAbi, serve_conversion

__all__ = [
    "ABIS",
    "NotFreedError",
    "PrivateAbi",
    "PrivateFile",
    "PrivateSlot",
    "choose",
    "guest_memfd",
    "restrictedmem",
    "serve_conversion",
]

#: By name; the order is the one in which they are tried.
ABIS: dict[str, PrivateAbi] = {
    restrictedmem.NAME: restrictedmem,
    guest_memfd.NAME: guest_memfd,
}


def choose(kvm: Kvm, name: str | None = None) -> PrivateAbi:
    """The ABI by which this machine has private memory: tried out, not inferred.

    `name` (of ABIS) asks for one.  ValueError for an unknown name; OSError, EOPNOTSUPP, when no
    guest can have private memory here: the message says what each ABI was refused.
    """
    from .protocol import try_out

    if name is not None and name not in ABIS:
        raise ValueError(f"no private memory ABI is called {name!r}; there are {', '.join(ABIS)}")
    refused = []
    for abi in [ABIS[name]] if name else ABIS.values():
        try:
            try_out(abi, kvm)
        except OSError as error:
            refused.append(f"{abi.NAME}: {error.strerror}")
        else:
            return abi
    raise OSError(errno.EOPNOTSUPP, f"no private memory here: {'; '.join(refused)}")


def __getattr__(name: str) -> Any:
    # Loaded when asked for: they need the exits, which most programs never look at.
    if name in ("PrivateAbi", "serve_conversion"):
        from . import protocol

        return getattr(protocol, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
