"""The kernel's numbers, for programs: ``uapi.kvm.KVM_EXIT_IO``.

Six namespaces, one per header in ``cdefs/``: ``kvm`` (what all private-memory ABIs share),
``restrictedmem`` (v9), ``restrictedmem_v10`` (what v10 changed), ``guest_memfd`` (mainline),
``unmerged`` (numbers of patched kernels, which may be something else in another kernel) and
``vhost`` (virtio devices in the host's kernel).
Two of them may give one name different values, so they are never merged.  Each has the header's
constants as plain ints, ``REQUESTS`` (ioctl number -> name) and ``ffi``, the cffi object that
makes the header's structs: ``uapi.kvm.ffi.new("struct kvm_regs *")``.

A namespace is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cdefs import guest_memfd, kvm, restrictedmem, restrictedmem_v10, unmerged, vhost

__all__ = ["guest_memfd", "kvm", "restrictedmem", "restrictedmem_v10", "unmerged", "vhost"]

if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f".cdefs.{name}", __package__)
        globals()[name] = module
        return module


def __dir__() -> list[str]:
    return sorted(__all__)
