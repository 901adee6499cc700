"""Searches with Hypothesis for steps after which the kernel and the model differ.

A failure is shrunk to few steps, and they are written as a script that needs only kvmpriv.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from . import model_driver
from .model import MODELS, PAGE, Model
from .model_driver import FILE_SIZE, MEMORY_SIZE, Driver, abi_of, differ, shown

#: Guest memory: 16 pages across the 4 GiB boundary, and a large page with its neighbours.
SMALL, SMALL_PAGES = (4 << 30) - 6 * PAGE, 16
LARGE, LARGE_PAGES = (4 << 30) + (4 << 20), 512
#: A range with both, and what is around them.
ALL, ALL_SIZE = (4 << 30) - (1 << 20), 8 << 20
SLOTS = 4

#: Examples of a round, which has one VM.
EXAMPLES = 10
#: The least numbers of a search, however long they take.
EXAMPLES_MIN, STEPS_MIN = 3, 100
FEWEST_SECONDS = 300

Step = tuple[str, dict[str, Any]]
#: Steps that were taken: (expected outcome, name, arguments).
Steps = list[tuple[Any, str, dict[str, Any]]]


# -- what Hypothesis draws -------------------------------------------------------------------------


def in_file(gpa: int) -> int:
    """The file offset for a guest physical address; it allows large pages."""
    return 2 << 30 | (gpa - SMALL if gpa < LARGE - (1 << 20) else (2 << 20) + gpa - LARGE)


def in_memory(gpa: int) -> int:
    """The offset in host memory for a guest physical address."""
    return (1 << 20) + gpa - SMALL if gpa < LARGE - (1 << 20) else (4 << 20) + gpa - LARGE


_SMALL_RANGES = [
    (SMALL + first * PAGE, count * PAGE)
    for count in (1, 2, 3, 6)
    for first in range(SMALL_PAGES + 1 - count)
]
_LARGE_RANGES = [
    (LARGE + first * PAGE, count * PAGE)
    for first, count in (
        (0, 1), (0, 512), (511, 1), (100, 8), (-1, 2), (256, 256), (-1, 514), (510, 4),
    )
]  # fmt: skip
_RANGES = _SMALL_RANGES + _LARGE_RANGES * 3 + [(ALL, ALL_SIZE)] * 3
_PAGES = [*range(SMALL, SMALL + SMALL_PAGES * PAGE, PAGE)] + [
    LARGE + page * PAGE for page in (0, 1, 99, 100, 255, 256, 511, 512, -1)
]

ranges = st.sampled_from(_RANGES)
slot_ranges = st.sampled_from(
    [(SMALL, 4 * PAGE), (SMALL + 4 * PAGE, 4 * PAGE), (SMALL + 9 * PAGE, 6 * PAGE)]
    + [one for one in _SMALL_RANGES if one[1] > PAGE]
    + [(LARGE, 512 * PAGE)] * 3
    + [(LARGE - PAGE, 514 * PAGE), (LARGE + 256 * PAGE, 256 * PAGE)]
    + [(LARGE, 2 * PAGE), (LARGE + 100 * PAGE, 8 * PAGE)]
)
file_ranges = ranges.map(
    lambda one: (0, FILE_SIZE) if one[0] == ALL else (in_file(one[0]), one[1])
) | st.sampled_from(
    [(0, PAGE), (0, FILE_SIZE), (FILE_SIZE, PAGE), (FILE_SIZE - PAGE, 2 * PAGE), (2 << 30, PAGE)]
)
memory_ranges = ranges.map(
    lambda one: (0, MEMORY_SIZE) if one[0] == ALL else (in_memory(one[0]), one[1])
)
pages = st.sampled_from(_PAGES)
words = st.builds(lambda page, word: page + 8 * word, pages, st.sampled_from([0, 1, 300, 511]))
bytes_ = st.integers(1, 255)
cpus = st.integers(0, 1)
slots = st.integers(0, SLOTS - 1)
files = st.integers(0, 1)
sizes = st.sampled_from([8, 1, 2, 4])
#: Whether an access keeps its drawn address, even if no slot has it.
astray = st.sampled_from([False, False, False, True])
#: The error that is added to an argument; mostly 0.
wrong = st.sampled_from([0] * 15 + [1, 8, 2048, PAGE - 1])


def content(token: int, size: int) -> bytes:
    """Bytes that are not zero and that differ by their origin."""
    return bytes((token + 7 * at) % 255 + 1 for at in range(size))


def step(name: str, make: Callable[..., dict[str, Any]], *drawn: Any) -> st.SearchStrategy[Step]:
    return st.tuples(*drawn).map(lambda values: (name, make(*values)))


def bind(
    slot: int,
    where: tuple[int, int],
    file: int | str,
    shift: int | None,
    memory: int | None,
    flags: int,
    raw: bool,
    error: tuple[str, int] | None,
) -> dict[str, Any]:
    gpa, size = where
    arguments: dict[str, Any] = {
        "slot": slot,
        "gpa": gpa,
        "size": size,
        "file": file,
        "offset": FILE_SIZE - PAGE if shift is None else in_file(gpa) + shift * PAGE,
        "memory": None if memory is None else in_memory(gpa) + memory * PAGE,
        "flags": flags,
        "raw": raw or not isinstance(file, int),
    }
    if error and arguments[error[0]] is not None:
        arguments[error[0]] += error[1]
    return arguments


def _range(where: tuple[int, int], off_gpa: int, off_size: int) -> dict[str, Any]:
    return {"gpa": where[0] + off_gpa, "size": where[1] + off_size}


def _in(where: tuple[int, int], off: int) -> dict[str, Any]:
    return {"offset": where[0] + off, "size": where[1]}


binds = step(
    "bind",
    bind,
    slots,
    slot_ranges,
    st.sampled_from([0, 0, 0, 0, 1, 1, 1, "none", "pipe"]),
    st.sampled_from([0, 0, 0, 0, 1, 3, -2, None]),
    st.sampled_from([0, 0, 0, 0, 1, None]),
    st.sampled_from([0] * 8 + [1, 2, 3, 8]),
    st.sampled_from([False, False, False, True]),
    st.sampled_from(
        [None] * 12 + [("gpa", 1), ("size", 8), ("offset", 2048), ("memory", PAGE - 1)]
    ),
)

_GUEST: list[st.SearchStrategy[Step]] = [
    step(
        "load",
        lambda cpu, gpa, back, size, astray: {
            "cpu": cpu, "gpa": gpa - back, "size": size, "astray": astray,
        },
        cpus, words, st.sampled_from([0, 0, 0, 3]), sizes, astray,
    ),
    step(
        "store",
        lambda cpu, gpa, back, size, token, astray: {
            "cpu": cpu, "gpa": gpa - back, "size": size,
            "value": int.from_bytes(content(token, size), "little"), "astray": astray,
        },
        cpus, words, st.sampled_from([0, 0, 0, 3]), sizes, bytes_, astray,
    ),
    step(
        "write",
        lambda cpu, gpa, token, size: {"cpu": cpu, "gpa": gpa, "data": content(token, size)},
        cpus, words, bytes_, st.sampled_from([5, 8, 24, 1]),
    ),
    step(
        "read",
        lambda cpu, gpa, size: {"cpu": cpu, "gpa": gpa, "size": size},
        cpus, words, st.sampled_from([16, 5, PAGE, 3 * PAGE]),
    ),
    step(
        "fill",
        lambda cpu, where, byte: {"cpu": cpu, "gpa": where[0], "byte": byte, "size": where[1]},
        cpus, ranges.filter(lambda one: one[0] != ALL), bytes_,
    ),
    step(
        "span",
        lambda cpu, gpa, byte, size: {"cpu": cpu, "gpa": gpa, "byte": byte, "size": size},
        cpus, words, st.integers(0, 3), st.sampled_from([8, PAGE, 2 * PAGE]),
    ),
    step(
        "increment",
        lambda cpu, gpa, times: {"cpu": cpu, "gpa": gpa, "times": times},
        cpus, words, st.integers(1, 300),
    ),
]  # fmt: skip

_CONVERSIONS: list[st.SearchStrategy[Step]] = [
    step(
        "convert",
        lambda where, private, keep, off_gpa, off_size: {
            **_range(where, off_gpa, off_size), "private": private, "keep": keep,
        },
        ranges, st.booleans(), st.booleans(), wrong, wrong,
    ),
    step(
        "ask",
        lambda cpu, where, private, off: {
            "cpu": cpu, "gpa": where[0] + off, "size": where[1], "private": private,
        },
        cpus, ranges, st.booleans(), wrong,
    ),
]  # fmt: skip

_FILES: list[st.SearchStrategy[Step]] = [
    step("punch", lambda file, where, off: {"file": file, **_in(where, off)},
         files, file_ranges, wrong),
    step("punch_slot", lambda slot, where: {"slot": slot, **_range(where, 0, 0)}, slots, ranges),
    step("allocate", lambda file, where, off: {"file": file, **_in(where, off)},
         files, file_ranges.filter(lambda one: one[1] <= ALL_SIZE), wrong),
]  # fmt: skip

_HOST: list[st.SearchStrategy[Step]] = [
    step("poke", lambda gpa, token, size: {"offset": in_memory(gpa), "data": content(token, size)},
         words, bytes_, st.sampled_from([8, 5, 24])),
    step("look", lambda gpa: {"offset": in_memory(gpa), "size": 16}, words),
    step("forget", lambda where: _in(where, 0), memory_ranges),
    step("advise", lambda where, huge: {**_in(where, 0), "huge": huge},
         memory_ranges, st.booleans()),
]  # fmt: skip

#: Mostly none, because it takes long.  Dropping caches would drop the machine's own programs, which
#: are on a slow file system.
_SHAKES = ["nothing"] * 15 + ["compact_memory"]
_RARE: list[st.SearchStrategy[Step]] = [
    step("new_file", lambda number: {"number": number}, files),
    step("close_file", lambda number: {"number": number}, files),
    step("refused", lambda file, call: {"file": file, "call": call}, files,
         st.sampled_from(["ftruncate", "punch, not keeping the size", "collapse", "read"])),
    step("reset", lambda cpu: {"cpu": cpu}, cpus),
    step("shake", lambda what: {"what": what}, st.sampled_from(_SHAKES)),
]  # fmt: skip

_RESUME = step("resume", lambda cpu: {"cpu": cpu}, cpus)
_WANT = step(
    "want",
    lambda cpu, where, private, off: {
        "cpu": cpu, "gpa": where[0] + off, "size": where[1], "private": private,
    },
    cpus, ranges, st.sampled_from([None, False, True]), wrong,
)  # fmt: skip
_POPULATE = step(
    "populate",
    lambda cpu, where: {"cpu": cpu, **_range(where, 0, 0)},
    cpus, ranges.filter(lambda one: one[0] != ALL),
)  # fmt: skip


#: Pages of a file that are put into pipes, and where the host reads and writes by a mapping.
_file_words = words.map(in_file)
#: Few, so that conversions meet them.
_few_words = st.sampled_from(_PAGES[:4]).map(in_file)
_FILE_CONVERSIONS: list[st.SearchStrategy[Step]] = [
    step(
        "convert_file",
        lambda file, where, private, off, off_size: {
            "file": file,
            "offset": where[0] + off,
            "size": where[1] + off_size,
            "private": private,
        },
        files,
        file_ranges,
        st.booleans(),
        wrong,
        wrong,
    ),
    step(
        "convert_file",
        lambda file, pages, private: {
            "file": file,
            "offset": in_file(SMALL),
            "size": pages * PAGE,
            "private": private,
        },
        files,
        st.integers(1, 6),
        st.sampled_from([True, True, False]),
    ),
]

_MAPPED: list[st.SearchStrategy[Step]] = [
    step("see", lambda file, offset, size: {"file": file, "offset": offset, "size": size},
         files, _file_words, st.sampled_from([16, 1, PAGE, 3 * PAGE])),
    step("put", lambda file, offset, token: {
             "file": file, "offset": offset, "data": content(token, 8),
         }, files, _file_words, bytes_),
    step("pin", lambda number, file, offset: {
             "number": number, "file": file, "offset": offset // PAGE * PAGE,
         }, st.integers(0, 1), files, _few_words),
    step("unpin", lambda number: {"number": number}, st.integers(0, 1)),
]  # fmt: skip


def any_step(abi: str) -> st.SearchStrategy[Step]:
    """Any step that the ABI supports."""
    traits, model = abi_of(abi).traits, MODELS[abi]
    weighted = [
        (4, _GUEST),
        (4 * model.can_convert, _CONVERSIONS),
        (2, _FILES),
        (2, _HOST),
        (8, [binds]),
        (3, [step("delete", lambda slot: {"slot": slot}, slots)]),
        (4, [_RESUME]),
        (1, _RARE),
        (5 * (not traits.access_follows_state), [_WANT]),
        (3 * model.can_populate, [_POPULATE]),
        (4 * (traits.converts == "file"), _FILE_CONVERSIONS),
        (4 * (traits.backings == 1), _MAPPED),
    ]
    # An index, as one_of() takes a strategy that it is given several times only once.
    kinds = [kind for weight, some in weighted for kind in some * weight]
    return st.integers(0, len(kinds) - 1).flatmap(kinds.__getitem__)


def _bound(slot: int, gpa: int, pages: int, file: int) -> Step:
    return ("bind", bind(slot, (gpa, pages * PAGE), file, 0, 0, 0, False, None))


#: The slots at the start: none; adjacent ones; a large one beside them.
LAYOUTS: list[list[Step]] = [
    [],
    [_bound(0, SMALL, 6, 0), _bound(1, SMALL + 6 * PAGE, 4, 0), _bound(2, SMALL + 12 * PAGE, 4, 1)],
    [_bound(0, LARGE, 512, 0), _bound(1, SMALL, 8, 0)],
    [_bound(0, LARGE - PAGE, 514, 1)],
]


def examples(abi: str) -> st.SearchStrategy[list[Step]]:
    # Lists of lists are long on average, and still shrink to very few steps.
    many = st.lists(st.lists(any_step(abi), min_size=4, max_size=24), max_size=20)
    return st.builds(
        lambda layout, some: [*layout, *(one for few in some for one in few)],
        st.sampled_from(LAYOUTS[:1] + LAYOUTS[1:2] * 6 + LAYOUTS[2:]),
        many,
    )


# -- model and kernel ------------------------------------------------------------------------------


class MismatchError(AssertionError):
    """The kernel and the model differ."""


@dataclass
class Machine:
    """The model and the kernel, which take the same steps."""

    abi: str
    model_class: type[Model]
    #: The steps since the VM was made.
    done: Steps = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.model_class(file_size=FILE_SIZE)
        self.driver = Driver(self.abi)
        self.uses_large = False

    def do(self, name: str, **arguments: Any) -> Any:
        """Take a step on both; MismatchError if their outcomes differ."""
        if name == "bind":
            self.uses_large |= arguments["gpa"] > LARGE - (1 << 20)
        elif name == "poke":
            self.uses_large |= arguments["offset"] > in_memory(LARGE) - (1 << 20)
        expected = self.model.do(name, **arguments)
        self.done.append((expected, name, arguments))
        try:
            got = self.driver.do(name, **arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, no step raises
            got = repr(error)
        if got != expected:
            raise MismatchError(f"{shown(name, arguments)}\n  {differ(expected, got)}")
        return got

    def take(self, name: str, arguments: dict[str, Any]) -> None:
        """Take a drawn step; one that would miss every slot is changed to hit one."""
        arguments = dict(arguments)
        astray = arguments.pop("astray", False)
        if name == "punch_slot" or (not astray and self.model.ends_in_mmio(name, **arguments)):
            self._aim(name, arguments)
        if self.undefined(name, arguments):
            if name == "resume" or self.model.is_void(name, **arguments):
                name, arguments = "reset", {"cpu": arguments["cpu"]}
            else:
                name, arguments = "load", {k: arguments[k] for k in ("cpu", "gpa")} | {"size": 1}
        self.do(name, **arguments)

    def failing(self, steps: Steps) -> Steps:
        """The steps up to the one that fails; empty if none fails."""
        self.done = []
        try:
            for _, name, arguments in steps:
                if self.undefined(name, arguments):
                    return []
                self.do(name, **arguments)
        except MismatchError:
            return self.done
        return []

    def close(self) -> None:
        self.driver.close()

    def undefined(self, name: str, arguments: dict[str, Any]) -> bool:
        """Whether the model does not define the outcome of this step."""
        model = self.model
        split = model.ends_in_mmio(name, **arguments) and model.is_split(name, **arguments)
        return split or model.is_void(name, **arguments)

    def _aim(self, name: str, arguments: dict[str, Any]) -> None:
        """Change the address of an access so that it hits a slot."""
        slots = list(self.model.slots.values())
        if "gpa" not in arguments or not slots:
            return
        slot = slots[arguments["gpa"] // PAGE % len(slots)]
        if name == "punch_slot":
            slot = self.model.slots.get(arguments["slot"], slot)
        gpa = arguments["gpa"] = slot.gpa + arguments["gpa"] % min(slot.size, 4 * PAGE)
        if "data" in arguments:
            arguments["data"] = arguments["data"][: slot.end - gpa]
        elif name in ("load", "store") and gpa + arguments["size"] > slot.end:
            arguments["gpa"] = slot.end - arguments["size"]
        elif "size" in arguments:
            arguments["size"] = min(arguments["size"], slot.end - gpa)

    def begin(self) -> None:
        """Start an example: no slot, no content, the default state."""
        self.uses_large = False
        self.unbind()
        if self.maps_files:
            self.unpin()
        else:
            default = self.model.traits.default_private
            self.do("convert", gpa=ALL, size=ALL_SIZE, private=default, keep=True)
        for number in range(len(self.model.files)):
            self.do("new_file", number=number)
        self.do("forget", offset=0, size=MEMORY_SIZE)
        self.do("advise", offset=0, size=MEMORY_SIZE, huge=True)
        for cpu in range(len(self.model.stopped)):
            self.do("reset", cpu=cpu)

    def unbind(self) -> None:
        if not self.model.traits.access_follows_state:
            self.do("want", cpu=0, gpa=ALL, size=ALL_SIZE, private=None)
        for slot in list(self.model.slots):
            self.do("delete", slot=slot)

    @property
    def maps_files(self) -> bool:
        """Whether the host has mappings of the files."""
        return self.model.traits.backings == 1

    def unpin(self) -> None:
        for number in (0, 1):
            self.do("unpin", number=number)

    def _sweep_files(self) -> None:
        """Compare each file: what the host can read as it is, then what guest and host find.

        Of the pages of a private run, which the host can read one by one only, it tries the ends.
        """
        self.unpin()
        wanted = [number for number, file in enumerate(self.model.files) if file.wanted]
        for number in wanted:
            for at, size, private in self._kinds(number):
                for page in sorted({at, at + size - PAGE}) if private else ():
                    self.do("see", file=number, offset=page, size=1)
                if not private:
                    self.do("see", file=number, offset=at, size=size)
        if self.model.can_convert:
            for number in wanted:
                self.do("convert_file", file=number, offset=0, size=FILE_SIZE, private=True)
            self.look()
        for number in wanted:
            if self.model.can_convert:
                self.do("convert_file", file=number, offset=0, size=FILE_SIZE, private=False)
            for gpa, size in self.areas():
                self.do("see", file=number, offset=in_file(gpa), size=size)

    def _kinds(self, number: int) -> Iterator[tuple[int, int, bool]]:
        """The runs (offset, size, whether it is private) of what is used of a file."""
        kinds = self.model.files[number].private
        for gpa, size in self.areas():
            first, end = in_file(gpa) // PAGE, (in_file(gpa) + size) // PAGE
            for private, run in itertools.groupby(range(first, end), kinds.__getitem__):
                some = list(run)
                yield some[0] * PAGE, len(some) * PAGE, bool(private)

    def sweep(self) -> None:
        """Compare every page on both sides: as it is, then private, then shared."""
        self.look()
        if self.maps_files:
            self._sweep_files()
            return
        if not self.model.traits.access_follows_state:
            self.do("want", cpu=1, gpa=ALL, size=ALL_SIZE, private=None)
        for private in (True, False):
            self.do("convert", gpa=ALL, size=ALL_SIZE, private=private, keep=True)
            self.look()
        for gpa, size in self.areas():
            self.do("look", offset=in_memory(gpa), size=size)
        # And the parts of the files that no slot has.
        self.unbind()
        self.do("convert", gpa=ALL, size=ALL_SIZE, private=True, keep=True)
        for number, file in enumerate(self.model.files):
            if file.wanted:  # also where the file should be empty: holes are checked by that
                for gpa, size in self.areas()[: None if file.content.pages else 1]:
                    self.do("bind", **bind(0, (gpa, size), number, 0, None, 0, False, None))
                    self.do("read", cpu=number, gpa=gpa, size=size)
                    self.do("delete", slot=0)

    def areas(self) -> list[tuple[int, int]]:
        """The areas used since begin(): the large one takes longer than all the rest."""
        small, large = (SMALL, SMALL_PAGES * PAGE), (LARGE - PAGE, (LARGE_PAGES + 2) * PAGE)
        return [small, large] if self.uses_large else [small]

    def look(self) -> None:
        """Have the guest read all that it can, and access both ends of what it can't."""
        for cpu, slot in enumerate(self.model.slots.values()):
            for gpa, size, stops in self._runs(slot.gpa, slot.end):
                if stops:
                    for at in sorted({gpa, gpa + size - PAGE}):
                        self.do("load", cpu=cpu % 2, gpa=at, size=1)
                else:
                    self.do("read", cpu=cpu % 2, gpa=gpa, size=size)

    def _runs(self, gpa: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Ranges (gpa, size, whether an access stops the guest) from `gpa` to `end`."""
        start, stopping = gpa, False
        for at in range(gpa, end, PAGE):
            stops = self.model.stops(at, write=False) is not None
            if stops != stopping:
                if at > start:
                    yield start, at - start, stopping
                start, stopping = at, stops
        yield start, end - start, stopping


@dataclass
class Report:
    """The result of a search."""

    #: The seed of the last round, which repeats a failure.
    seed: int
    steps: int = 0
    examples: int = 0
    seconds: float = 0
    failure: str = ""
    #: The steps of the failure, shrunk, from how many, and the script made of them.  They have
    #: failed in a new VM, or are all that was done in the one in which it was seen.
    failed: Steps = field(default_factory=list)
    shrunk_from: int = 0
    script: Path | None = None


def search(
    abi: str,
    *,
    seed: int,
    steps: int | None = None,
    seconds: float | None = None,
    artifacts: Path,
    shrink_seconds: float = 60,
    shrink_tries: int | None = None,
    model_class: type[Model] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Search for a mismatch until `steps` are taken or `seconds` have passed.

    A search has rounds, each with its own VM and seed: round N does what a search with `seed` + N
    does first.  Time also ends a round, but not before EXAMPLES_MIN and STEPS_MIN.
    """
    report = Report(seed)
    model_class = model_class or MODELS[abi]
    started = time.monotonic()
    ends = float("inf") if seconds is None else started + seconds
    number = 0
    while not report.failure:
        report.seconds = time.monotonic() - started
        if steps is not None and report.steps >= steps:
            break
        if number and started + report.seconds >= ends:
            break
        report.seed = seed + number
        failed, whole = _round(abi, report, model_class, shrink_seconds, ends)
        if failed:
            report.shrunk_from = len(failed)
            report.script = write_script(artifacts, abi, whole, f"{report.seed}-whole")
            tell(f"{report.failure}\n  after {len(whole)} steps, {report.script}; shrinking it now")
            report.failed = fewest(abi, failed, model_class, shrink_tries)
            if report.failed != whole:
                report.script = write_script(artifacts, abi, report.failed, str(report.seed))
        number += 1
        report.seconds = time.monotonic() - started
        tell(
            f"{report.steps} steps, {report.examples} examples, "
            f"{report.steps / report.seconds:.1f} steps/s"
        )
    return report


def _round(
    abi: str,
    report: Report,
    model_class: type[Model],
    shrink_seconds: float,
    ends: float,
) -> tuple[Steps, Steps]:
    """Run examples in one VM; the shrunk steps of one that failed, and all steps of that VM.

    After a failure each example has its own VM, so that its steps fail alone or are not the cause.
    """
    machine: Machine | None = None
    failed: Steps = []
    whole: Steps = []  # of the VM that failed first, whose earlier steps may be needed
    known: set[str] = set()
    deadline = float("inf")

    @hypothesis.seed(report.seed)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] * (shrink_seconds > 0))],
    )
    @hypothesis.given(examples(abi))
    def agree(some: list[Step]) -> None:
        nonlocal machine, deadline, whole
        if time.monotonic() > deadline and repr(some) not in known:
            return  # end of shrinking: untried examples count as not smaller
        enough = report.examples >= EXAMPLES_MIN and report.steps >= STEPS_MIN
        if enough and not whole and time.monotonic() > ends:
            return
        if machine is not None and whole:
            used, machine = machine, None
            used.close()
        if machine is None:
            machine = Machine(abi, model_class)
        first = 0
        try:
            if machine.done:
                machine.begin()
            first = len(machine.done)
            for one in some:
                machine.take(*one)
                report.steps += 1
            report.examples += 1
            machine.sweep()
        except BaseException:
            # The failure may have changed anything in that VM.
            deadline = min(deadline, time.monotonic() + shrink_seconds)
            known.add(repr(some))
            failed[:] = machine.done[first:]
            whole = whole or machine.done
            broken, machine = machine, None
            broken.close()
            raise

    try:
        agree()
    except MismatchError as mismatch:
        report.failure = f"seed {report.seed}: {mismatch}"
    except hypothesis.errors.FlakyFailure as flaky:
        report.failure = f"seed {report.seed}, but not each time: {flaky.exceptions[0]}"
        failed = whole
    finally:
        if machine is not None:
            machine.close()
    return failed, whole


def fewest(abi: str, steps: Steps, model_class: type[Model], tries: int | None = None) -> Steps:
    """Leave out the steps that the failure does not need, within `tries` or FEWEST_SECONDS.

    A failure that needs many earlier steps, or that does not come each time, would take hours.

    Hypothesis shrinks what it has drawn; this shrinks the steps that were taken, of which a drawn
    step has several.  Each try has a new VM, so that the remaining steps fail alone.
    """
    deadline = time.monotonic() + FEWEST_SECONDS
    size = len(steps) // 2
    while size:
        at = len(steps) - 1 - size
        while at > -size:
            if tries == 0 or time.monotonic() > deadline:
                return steps
            tries = None if tries is None else tries - 1
            machine = Machine(abi, model_class)
            try:
                steps = machine.failing(steps[: max(at, 0)] + steps[at + size :]) or steps
            finally:
                machine.close()
            at -= size
        size //= 2
    return steps


# -- the script ------------------------------------------------------------------------------------


def write_script(folder: Path, abi: str, steps: Steps, which: str) -> Path:
    """Write steps as a script that needs only kvmpriv; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"replay-{abi}-{which}.py"
    driver = Path(model_driver.__file__).read_text(encoding="utf-8")
    _, _, driver = driver.partition('"""\n')  # its docstring speaks of itself
    lines = [
        "#!/usr/bin/env python3",
        f'"""Private memory by {abi}: steps whose outcomes differed from the model.',
        "",
        "Needs kvmpriv and nothing else.  Exit status: 1 it is not as it should be, 0 it is,",
        "77 it can't be tried here.  The steps are at the end.",
        '"""',
        driver,
        "",
        'if __name__ == "__main__":',
        "    steps: list[tuple[Any, str, dict[str, Any]]] = []",
        "",
        "    def expect(outcome: Any, name: str, **arguments: Any) -> None:",
        "        steps.append((outcome, name, arguments))",
        "",
    ]
    for expected, name, arguments in steps:
        words = ["".join((key, "=", _literal(value))) for key, value in arguments.items()]
        lines.append(f"    expect({', '.join([_literal(expected), repr(name), *words])})")
    lines.append(f"    sys.exit(replay({abi!r}, steps))")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def _literal(value: Any) -> str:
    """A value as source: addresses in hexadecimal, long bytes by their parts that are not zero."""
    if isinstance(value, bool) or not isinstance(value, int | tuple | bytes):
        return repr(value)
    if isinstance(value, int):
        return str(value) if -10 < value < 10 else hex(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))},)"
    if len(value) <= 64:
        return repr(value)
    parts = []
    for match in re.finditer(rb"([^\0])\1{31,}|(?:([^\0])(?!\2{31}))+", value, re.DOTALL):
        data = match[0]
        alike = len(data) > 32 and data.count(data[:1]) == len(data)
        what = f"({data[0]}, {len(data):#x})" if alike else repr(data)
        parts.append(f"({match.start():#x}, {what})")
    return f"sparse({', '.join([hex(len(value)), *parts])})"
