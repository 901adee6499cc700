"""The model of private memory: its own logic."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from private.support.model import (
    MODELS,
    PAGE,
    READONLY,
    Bytes,
    GuestMemfdModel,
    Model,
    RestrictedMemModel,
    pieces,
)
from private.support.model_driver import differ, shown, sparse
from private.support.model_search import _literal

GPA, OFFSET, MEMORY, FILE_SIZE = 64 * PAGE, 8 * PAGE, 0, 1 << 20
GOOD: dict[str, Any] = {
    "slot": 0, "gpa": GPA, "size": 4 * PAGE, "file": 0, "offset": OFFSET, "memory": MEMORY,
    "flags": 0, "raw": False,
}  # fmt: skip


def v9_fault(page: int, private: bool) -> tuple[object, ...]:
    return ("fault", 38, 0, GPA + page * PAGE, PAGE, int(private))


def gm_fault(page: int, private: bool) -> tuple[object, ...]:
    return ("fault", 39, 14, GPA + page * PAGE, PAGE, 8 * private)


@pytest.fixture(params=["restrictedmem", "guest_memfd"])
def model(request: pytest.FixtureRequest) -> Model:
    """A slot of four private pages."""
    made = MODELS[request.param](file_size=FILE_SIZE)
    assert made.do("bind", **GOOD) == "ok"
    assert made.convert(GPA, 4 * PAGE, private=True, keep=True) == "ok"
    return made


@given(st.integers(0, 3 * PAGE), st.integers(0, 3 * PAGE))
def test_pieces_are_the_range_page_by_page(at: int, size: int) -> None:
    found = list(pieces(at, size))
    assert sum(part for _, part in found) == size
    assert all(part and start // PAGE == (start + part - 1) // PAGE for start, part in found)
    assert [start for start, _ in found] == [at, *[a + b for a, b in found]][: len(found)]


def test_bytes() -> None:
    some = Bytes()
    some.write(PAGE - 2, b"abcd")
    assert some.read(PAGE - 3, 6) == b"\0abcd\0"
    some.clear(PAGE, PAGE)
    assert some.read(PAGE - 3, 6) == b"\0ab\0\0\0"


def test_two_memories(model: Model) -> None:
    assert model.write(0, GPA, b"private") == "ok"
    assert model.look(MEMORY, 7) == bytes(7)
    model.convert(GPA, PAGE, private=False, keep=True)
    assert model.read(0, GPA, 7) == bytes(7)
    model.poke(MEMORY, b"shared")
    assert model.read(1, GPA, 6) == b"shared"
    model.convert(GPA, PAGE, private=True, keep=True)
    assert model.read(0, GPA, 7) == b"private"


def test_a_tidy_conversion_frees_what_no_other_slot_has(model: Model) -> None:
    model.write(0, GPA, b"private")
    model.convert(GPA, PAGE, private=False, keep=False)
    model.poke(MEMORY, b"shared")
    model.convert(GPA, PAGE, private=True, keep=False)
    assert model.read(0, GPA, 7) == model.look(MEMORY, 7) == bytes(7)
    model.poke(MEMORY, b"shared")
    other = {**GOOD, "slot": 1, "gpa": 2 * GPA, "offset": OFFSET + 64 * PAGE}
    assert model.bind(**other) == "ok"
    model.convert(GPA, PAGE, private=True, keep=False)
    assert model.look(MEMORY, 6) == b"shared", "the other slot has it"


def test_a_write_goes_on_where_it_stopped() -> None:
    model = RestrictedMemModel(file_size=FILE_SIZE)
    model.bind(**GOOD)
    model.want(0, GPA + PAGE, PAGE, private=False)
    assert model.write(0, GPA + PAGE - 8, b"12345678abcdefgh") == v9_fault(1, private=False)
    assert model.resume(0) == v9_fault(1, private=False)
    assert model.read(1, GPA + PAGE - 8, 8) == b"12345678", "the part before it is written"
    model.convert(GPA + PAGE, PAGE, private=False, keep=True)
    assert model.resume(0) == "ok"
    assert model.look(MEMORY + PAGE, 8) == b"abcdefgh"
    assert model.resume(0) == "nothing to resume"


def test_a_load_of_two_pages_is_done_or_not() -> None:
    model = RestrictedMemModel(file_size=FILE_SIZE)
    model.bind(**GOOD)
    model.want(0, GPA + PAGE, PAGE, private=False)
    assert model.store(0, GPA + PAGE - 4, 8, 1 << 63 | 1) == v9_fault(1, private=False)
    assert model.read(1, GPA + PAGE - 4, 4) == bytes(4)


def test_where_the_guest_stops(model: Model) -> None:
    fault = v9_fault if isinstance(model, RestrictedMemModel) else gm_fault
    assert model.load(0, 2 * GPA, 4) == ("mmio", False, 2 * GPA, 4, b"")
    assert model.resume(0) == 0
    assert model.store(0, 2 * GPA, 2, 0x102) == ("mmio", True, 2 * GPA, 2, b"\2\1")
    model.delete(0)
    if isinstance(model, RestrictedMemModel):
        assert model.load(0, GPA, 1) == ("mmio", False, GPA, 1, b"")
    else:
        assert model.load(0, GPA, 1) == fault(0, private=True), "private, and no slot for it"
    assert model.bind(**{**GOOD, "memory": None}) == "ok"
    assert model.load(0, GPA, 1) == 0
    model.convert(GPA, PAGE, private=False, keep=True)
    assert model.load(0, GPA, 1) == "EFAULT"


def test_closing_the_file_of_a_slot(model: Model) -> None:
    """A slot keeps its file open; a slot of the raw layer does so on v9 only."""
    model.write(0, GPA, b"private")
    model.close_file(0)
    assert model.read(0, GPA, 7) == b"private"
    assert model.bind(**{**GOOD, "slot": 1, "gpa": 2 * GPA}) == "closed"
    assert model.punch(0, 0, PAGE) == "closed"
    assert model.punch_slot(0, GPA, PAGE) == "ok"
    assert model.read(0, GPA, 7) == bytes(7)
    model.delete(0)
    model.new_file(0)
    model.bind(**{**GOOD, "raw": True})
    model.close_file(0)
    assert model.load(0, GPA, 1) == (
        0 if isinstance(model, RestrictedMemModel) else gm_fault(0, private=True)
    )


def test_read_only() -> None:
    model = RestrictedMemModel(file_size=FILE_SIZE)
    model.bind(**{**GOOD, "flags": READONLY})
    assert model.load(0, GPA, 1) == 0
    assert model.store(0, GPA, 1, 5) == v9_fault(0, private=True)
    model.convert(GPA, PAGE, private=False, keep=True)
    assert model.store(0, GPA, 1, 5) == ("mmio", True, GPA, 1, b"\5")
    assert GuestMemfdModel(file_size=FILE_SIZE).bind(**{**GOOD, "flags": READONLY}) == "EINVAL"


@pytest.mark.parametrize(
    ("changes", "v9", "gm"),
    [
        ({"slot": 1}, "EEXIST", "EEXIST"),
        ({"slot": 1, "file": "none"}, "EEXIST", "EEXIST"),
        ({"gpa": 2 * GPA}, "EINVAL", "EINVAL"),
        ({"slot": 1, "gpa": 2 * GPA}, "ok", "EINVAL"),
        ({"slot": 1, "gpa": 2 * GPA, "offset": FILE_SIZE - PAGE}, "ok", "EINVAL"),
        ({"slot": 1, "gpa": 2 * GPA, "file": 1}, "ok", "ok"),
        ({"slot": 1, "gpa": 2 * GPA, "file": "none"}, "EINVAL", "EBADF"),
        ({"slot": 1, "gpa": 2 * GPA, "file": "pipe"}, "EINVAL", "EINVAL"),
        ({"slot": 1, "gpa": 2 * GPA, "file": 1, "flags": 1}, "ok", "EINVAL"),
        ({"slot": 1, "gpa": 2 * GPA + 1, "file": 1}, "EINVAL", "EINVAL"),
        ({"slot": 1, "gpa": 2 * GPA, "file": 1, "memory": 8}, "EINVAL", "EINVAL"),
    ],
)
def test_bind(model: Model, changes: dict[str, Any], v9: str, gm: str) -> None:
    assert model.bind(**{**GOOD, **changes}) == (
        v9 if isinstance(model, RestrictedMemModel) else gm
    )


def test_what_it_does_not_define(model: Model) -> None:
    outside = {"cpu": 0, "gpa": 2 * GPA}
    assert model.ends_in_mmio("load", **outside, size=8)
    assert not model.is_split("load", **outside, size=8)
    assert model.is_split("load", cpu=0, gpa=GPA + PAGE - 1, size=2)
    assert model.is_split("increment", **outside, times=1)
    assert not model.ends_in_mmio("read", cpu=0, gpa=GPA, size=4 * PAGE)
    assert not model.ends_in_mmio("delete", slot=0)
    model.load(0, 2 * GPA, 8)
    assert model.ends_in_mmio("resume", cpu=0)
    assert not model.is_split("resume", cpu=0)


@given(
    st.lists(
        st.tuples(st.integers(0, 8000), st.integers(0, 255), st.sampled_from([1, 3, 40, 300])),
        max_size=6,
    )
)
def test_bytes_in_a_script_are_those_bytes(parts: list[tuple[int, int, int]]) -> None:
    data = bytearray(9000)
    for at, byte, count in parts:
        data[at : at + count] = bytes([byte]) * count
    assert eval(_literal(bytes(data)), {"sparse": sparse}) == data


def test_what_a_script_says() -> None:
    assert shown("load", {"cpu": 1, "gpa": 4096}) == "load(cpu=1, gpa=0x1000)"
    assert differ(b"abc", b"abd") == "at byte 0x2 of 0x3: expected 63, got 64"
    assert differ("ok", "EINVAL") == "expected 'ok', got 'EINVAL'"
    assert eval(_literal(("fault", 38, 0, 1 << 32, 4096, True))) == (
        "fault", 38, 0, 1 << 32, 4096, True,
    )  # fmt: skip


def test_a_file_that_guest_and_host_share() -> None:
    """Each reads what the other has written, and a hole takes it from both."""
    model = MODELS["guest_memfd_shared"](file_size=FILE_SIZE)
    assert model.do("bind", **GOOD) == "ok"
    assert model.do("store", cpu=0, gpa=GPA + 8, size=8, value=1) == "ok"
    assert model.do("see", file=0, offset=OFFSET + 8, size=1) == b"\1"
    assert model.do("put", file=0, offset=OFFSET + 8, data=b"\2") == "ok"
    assert model.do("load", cpu=1, gpa=GPA + 8, size=8) == 2
    assert model.do("punch", file=0, offset=OFFSET, size=PAGE) == "ok"
    assert model.do("load", cpu=1, gpa=GPA + 8, size=8) == 0
    assert model.do("see", file=0, offset=OFFSET + 8, size=1) == b"\0"
