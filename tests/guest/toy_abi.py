"""An ABI from outside: conversion in place, with a kernel's part played in Python.

The files are guest_memfd files that can be mapped, which a default VM takes since Linux 6.18.  That
a page is private is noted in the file object and has no effect.  It stands for the next ABI of
guest_memfd: the state belongs to the file, a page has one backing, and a conversion stops at a page
that is in use.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmpriv import private, uapi
from kvmpriv.private.guest_memfd import GuestMemfd

if TYPE_CHECKING:
    from kvmpriv.private import PrivateFile, PrivateVm

PAGE = 4096
FLAGS = uapi.guest_memfd.GUEST_MEMFD_FLAG_MMAP | uapi.guest_memfd.GUEST_MEMFD_FLAG_INIT_SHARED


class ToyFile(GuestMemfd):
    """`private`: the offsets of the private pages; `pinned`: those that can't be converted."""

    def __init__(self, vm: PrivateVm, size: int) -> None:
        self.private: set[int] = set()
        self.pinned: set[int] = set()
        super().__init__(vm, size, FLAGS)


class ToyAbi(private.GuestMemfdAbi):
    def __init__(self, name: str = "toy") -> None:
        super().__init__(name, vm_type=uapi.guest_memfd.KVM_X86_DEFAULT_VM, file_flags=FLAGS)
        self.traits = self.traits._replace(converts="file", access_follows_state=False)

    def create_file(self, vm: PrivateVm, size: int) -> ToyFile:
        return ToyFile(vm, size)

    def convert_file(self, file: PrivateFile, offset: int, size: int, *, private: bool) -> None:
        assert isinstance(file, ToyFile)
        pages = range(offset, offset + size, PAGE)
        for page in pages:
            if page in file.pinned:
                raise in_use(page)
        (file.private.update if private else file.private.difference_update)(pages)


def in_use(offset: int) -> private.ConversionError:
    return private.ConversionError(errno.EAGAIN, f"page {offset:#x} is in use", offset=offset)
