"""KVM's counters of a VM or a vCPU (api.rst, "KVM_GET_STATS_FD")."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from .cdefs import kvm as kvm_h
from .fd import Fd

__all__ = ["StatsDesc", "StatsFd"]

_ffi = kvm_h.ffi

_UNITS = {
    kvm_h.KVM_STATS_UNIT_NONE: "",
    kvm_h.KVM_STATS_UNIT_BYTES: "bytes",
    kvm_h.KVM_STATS_UNIT_SECONDS: "seconds",
    kvm_h.KVM_STATS_UNIT_CYCLES: "cycles",
    kvm_h.KVM_STATS_UNIT_BOOLEAN: "boolean",
}
_TYPES = {
    kvm_h.KVM_STATS_TYPE_CUMULATIVE: "cumulative",
    kvm_h.KVM_STATS_TYPE_INSTANT: "instant",
    kvm_h.KVM_STATS_TYPE_PEAK: "peak",
    kvm_h.KVM_STATS_TYPE_LINEAR_HIST: "linear histogram",
    kvm_h.KVM_STATS_TYPE_LOG_HIST: "logarithmic histogram",
}


class StatsDesc(NamedTuple):
    """Describes one counter.  A value counts `unit` times `base` to the power of `exponent`.

    `type` is "cumulative", "instant", "peak", "linear histogram" or "logarithmic histogram"; `size`
    how many values of 64 bits it has, more than 1 for a histogram; `offset` where they are, in
    bytes from the start of the data; `bucket_size` the width of a linear histogram's buckets.
    """

    name: str
    type: str
    unit: str
    base: int
    exponent: int
    size: int
    offset: int
    bucket_size: int


class StatsFd(Fd):
    """The counters of a VM or a vCPU, which :meth:`read` reads without another KVM call.

    `id` is KVM's name for the VM or the vCPU; `descriptors` maps names to descriptions, in KVM's
    order.  The descriptor keeps the kernel's VM alive.
    """

    _what = "statistics fd"

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        try:
            self._read_descriptors()
        except BaseException:
            self.close()
            raise

    def _read_descriptors(self) -> None:
        header = _ffi.new("struct kvm_stats_header *")
        _ffi.buffer(header)[:] = self._pread(_ffi.sizeof("struct kvm_stats_header"), 0)
        self.id: str = self._pread(header.name_size, header.id_offset).split(b"\0")[0].decode()
        each = _ffi.sizeof("struct kvm_stats_desc") + header.name_size
        raw = self._pread(each * header.num_desc, header.desc_offset)
        self._data_offset = header.data_offset
        self.descriptors: dict[str, StatsDesc] = {}
        keep = _ffi.from_buffer("char[]", raw)
        for number in range(header.num_desc):
            desc = _ffi.cast("struct kvm_stats_desc *", keep + number * each)
            name = _ffi.string(desc.name, header.name_size)
            pow2 = desc.flags & kvm_h.KVM_STATS_BASE_MASK == kvm_h.KVM_STATS_BASE_POW2
            self.descriptors[name.decode()] = StatsDesc(
                name.decode(),
                _TYPES.get(desc.flags & kvm_h.KVM_STATS_TYPE_MASK, "unknown"),
                _UNITS.get(desc.flags & kvm_h.KVM_STATS_UNIT_MASK, "unknown"),
                2 if pow2 else 10,
                desc.exponent,
                desc.size,
                desc.offset,
                desc.bucket_size,
            )
        self._size = max((d.offset + 8 * d.size for d in self.descriptors.values()), default=0)

    def _pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"statistics fd: {len(data)} of {size} bytes at {offset:#x}")
        return data

    def _values(self) -> Iterator[tuple[StatsDesc, list[int]]]:
        data = memoryview(self._pread(self._size, self._data_offset))
        for desc in self.descriptors.values():
            yield desc, data[desc.offset : desc.offset + 8 * desc.size].cast("Q").tolist()

    def read(self) -> dict[str, int]:
        """The counters now, without histograms: name -> value."""
        return {desc.name: values[0] for desc, values in self._values() if desc.size == 1}

    def read_histograms(self) -> dict[str, list[int]]:
        """The histograms now: name -> how often each bucket was hit."""
        return {desc.name: values for desc, values in self._values() if desc.size > 1}
