"""HostMemory.find in a mapped file, some of whose pages this process can't read."""

from __future__ import annotations

import ctypes
import os
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmpriv import HostMemory

PAGE, PAGES = 4096, 700  # more than find reads at a time
SIZE = PAGES * PAGE
NEEDLE = b"needle"

_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

pages = st.integers(0, PAGES - 1)
#: Offsets at, before and behind the boundary of a page, where the needle crosses it.
places = st.builds(lambda page, by: page * PAGE + by, pages, st.integers(-6, 6)).filter(
    lambda at: 0 <= at <= SIZE - len(NEEDLE)
)


def expected(closed: set[int], at: list[int], start: int) -> int:
    """The first place whose pages can all be read."""
    for place in sorted(at):
        last = place + len(NEEDLE) - 1
        if place >= start and not {place // PAGE, last // PAGE} & closed:
            return place
    return -1


@settings(max_examples=100, deadline=None)
@given(
    closed=st.lists(st.tuples(pages, st.integers(1, 300)), max_size=5),
    at=st.lists(places, min_size=1, max_size=4),
    start=st.one_of(st.just(0), places),
)
@example(closed=[(0, PAGES)], at=[5], start=0)
@example(closed=[(0, 1)], at=[2 * PAGE - 5], start=0)
@example(closed=[], at=[256 * PAGE - 5], start=0)
@example(closed=[(3, 1)], at=[600 * PAGE], start=0)
@example(closed=[(0, 1), (300, 1)], at=[3 * PAGE - 3, 7 * PAGE - 1, 300 * PAGE - 3], start=0)
def test_the_pages_that_can_be_read(
    closed: list[tuple[int, int]], at: list[int], start: int
) -> None:
    """find returns the first place of which this process can read all bytes."""
    fd = os.memfd_create("find")
    try:
        os.truncate(fd, SIZE)
        for place in at:
            os.pwrite(fd, NEEDLE, place)
        without: set[int] = set()
        with HostMemory(SIZE, fd=fd) as memory:
            for first, count in closed:
                end = min(first + count, PAGES)
                if first > 0 and end < PAGES:  # halves of it on both sides are no needle
                    os.pwrite(fd, NEEDLE[:3], first * PAGE - 3)
                    os.pwrite(fd, NEEDLE[3:], end * PAGE)
                without.update(range(first, end))
                size = (end - first) * PAGE
                assert _mprotect(memory.userspace_addr + first * PAGE, size, 0) == 0
            content = os.pread(fd, SIZE, 0)
            there = [found.start() for found in re.finditer(NEEDLE, content)]
            assert memory.find(NEEDLE, start) == expected(without, there, start)
    finally:
        os.close(fd)
