"""`kvmpriv trace`: recordings written, read, counted and drawn."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmpriv import trace
from private.support.requirements import missing

RANGES = [
    {"gpa": 0, "size": 128 << 20, "kind": "shared", "purpose": "kernel <and> rings"},
    {"gpa": 4 << 30, "size": 384 << 20, "kind": "private", "purpose": "applications"},
]
ABOUT: Any = {
    "kvmpriv_trace": 1,
    "what": "Linux 6.1 & more",
    "cpus": 2,
    "ranges": RANGES,
    "private_abi": "restrictedmem",
}


def sample(at: float, shared: int, private: int) -> dict[str, Any]:
    memory = [{"resident": shared, "private": 0}, {"resident": 0, "private": private}]
    return {"t": at, "memory": memory, "rss": shared + (50 << 20), "cpu": [at / 2, 0.25]}


EVENTS: list[Any] = [
    sample(0.0, 0, 0),
    *({"t": 0.1 + n / 100, "cpu": 0, "exit": "KVM_EXIT_IO", "port": 0x3F8} for n in range(5)),
    {"t": 0.2, "cpu": 1, "exit": "KVM_EXIT_MMIO", "gpa": 0xD0000000, "write": True},
    {"t": 0.3, "cpu": 1, "exit": "KVM_EXIT_HYPERCALL"},
    {"t": 0.3, "cpu": 1, "convert": "shared", "gpa": 4 << 30, "size": 2 << 20, "by": "hypercall"},
    {"t": 0.4, "cpu": 0, "convert": "private", "gpa": 4 << 30, "size": 1 << 20, "by": "fault"},
    sample(1.0, 64 << 20, 300 << 20),
    {"t": 2.0, "end": "off", "status": 7, "why": "turned off"},
]


def lines(*entries: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.trace"
    path.write_bytes(lines(ABOUT, *EVENTS))
    return path


def kvmpriv(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpriv", "trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_summary(path: Path) -> None:
    done = kvmpriv(path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        """\
Linux 6.1 & more: 2 vCPUs, 512 MiB of RAM, private by restrictedmem
after 2.000 s: turned off (exit status 7)
The host could read 0 of the 300 MiB that the guest kept private

exits to user space: 7, 4/s
          5  KVM_EXIT_IO  (COM1: 5)
          1  KVM_EXIT_MMIO  (0xd0000000: 1)
          1  KVM_EXIT_HYPERCALL

conversions: 2
          1  to private, by fault: 1 MiB
          1  to shared, by hypercall: 2 MiB

memory, at the end
  0x0…0x8000000  shared (kernel <and> rings): 64 MiB visible to the host, at least 0 B private
  0x100000000…0x118000000  private (applications): 0 B visible to the host, at least 300 MiB private
process: at most 114 MiB resident; CPU seconds of each vCPU: 0.50, 0.25
"""
    )


SCHEMA = json.loads((Path(trace.__file__).parent / "schema.json").read_text())


def test_json(path: Path, tmp_path: Path) -> None:
    """One document of the same facts as the text, with or without a page."""
    page = tmp_path / "page.html"
    done = kvmpriv(path, "--json", "--page", page)
    assert (done.returncode, done.stderr) == (0, "")
    assert page.read_text().startswith("<!doctype html>")
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert found["schema_version"] == 1
    assert (found["seconds"], found["end"], found["cut_off"]) == (2.0, EVENTS[-1], False)
    assert found["exits"][0] == {"exit": "KVM_EXIT_IO", "count": 5, "places": {"COM1": 5}}
    assert found["conversions"] == [
        {"to": "private", "by": "fault", "count": 1, "size": 1 << 20},
        {"to": "shared", "by": "hypercall", "count": 1, "size": 2 << 20},
    ]
    assert found["memory"][1] == {**RANGES[1], "resident": 0, "private": 300 << 20}
    assert found["process"] == {"rss_max": 114 << 20, "cpu": [0.5, 0.25], "others": None}


@pytest.mark.parametrize("count", range(len(EVENTS)))
def test_json_of_part_of_a_run(path: Path, count: int) -> None:
    about = {**ABOUT, "cmdline": "quiet", "date": "2026-01-31T12:00:00Z"}
    path.write_bytes(lines(about, *EVENTS[:count], {"t": 9, "mark": "m"}) + b"{")
    found = trace.document(trace.read(path))
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert (found["end"], found["cut_off"], found["cmdline"]) == (None, True, "quiet")
    assert found["marks"] == [{"t": 9, "mark": "m"}]


def test_one_vcpu_is_not_plural(path: Path) -> None:
    path.write_bytes(lines({**ABOUT, "cpus": 1}, *EVENTS))
    assert kvmpriv(path).stdout.startswith("Linux 6.1 & more: 1 vCPU, 512 MiB of RAM")


PATH, LINE, BAR = "path", "polyline", "rect"


def labels(chart: str) -> list[tuple[str, str]]:
    """The labels at the ends of lines: the value, and the text below it."""
    return re.findall(r'<b title="[^"]*">([^<]*)</b> <span title="[^"]*">([^<]*)</span>', chart)


def ticks(chart: str) -> list[str]:
    """The texts of the axes, without those beside lanes."""
    found = re.findall(r'<span style="(?:top|left):[^"]*">([^<]*)</span>', chart)
    return [text for text in found if not text.startswith("to ")]


def drawings(page: str) -> list[ElementTree.Element]:
    """The pictures of the page; each must be well-formed."""
    found = [part[: part.index("</svg>") + 6] for part in page.split("<svg")[1:]]
    return [ElementTree.fromstring("<svg" + part) for part in found]


def test_page(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = kvmpriv(path, "--page", out)
    assert (done.returncode, done.stderr) == (0, "")
    page = out.read_text()
    assert "kernel &lt;and&gt; rings" in page
    assert "<and>" not in page
    assert "http" not in page, "it needs nothing else"
    assert "<h1>The host could read 0 of the 300 MiB that the guest kept private</h1>" in page
    assert "After 2.00 s: turned off (exit status 7)." in page
    assert "<title>Linux 6.1 &amp; more – kvmpriv trace</title>" in page
    charts = page.split('<div class="chart">')[1:]
    memory, conversions, exits, cpu, resident = charts
    lanes, plot, *_ = drawings(memory)
    assert [lane.get("d") for lane in lanes.iter(PATH)] == ["M200 3v14", "M150 23v14"]
    lines = [line.get("points", "") for line in plot.iter(LINE)]
    assert lines[0] == "0,240 500,0", "half of the time, and all there is: 300 MiB"
    assert labels(memory) == [
        ("300 MiB private", "applications"),
        ("64 MiB host-readable", "kernel &lt;and&gt; rings"),
        ("0 B host-readable", "applications"),
    ]
    assert ticks(memory) == [
        "0",
        "100 MiB",
        "200 MiB",
        "300 MiB",
        "0",
        "0.5 s",
        "1 s",
        "1.5 s",
        "2 s",
    ]
    marks = [
        (mark.get("class"), mark.get("x"), mark.get("y"))
        for mark in drawings(conversions)[0].iter(BAR)
    ]
    assert marks == [("to-shared", "148", "117.0"), ("to-private", "196", "117.0")]
    assert re.findall(
        r'<div class="head"><span title="([^"]*)">[^<]*</span><span>([^<]*)', exits
    ) == [
        ("COM1", "5 exits"),
        ("other addresses", "1 exit"),
        ("hypercalls", "1 exit"),
    ]
    bars = [bar for row in drawings(exits) for bar in row.iter(BAR)]
    assert len(bars) == 5
    assert labels(cpu) == [("0.50 s", "vCPUs"), ("0.00 s", "other threads")]
    assert labels(resident)[0] == ("114 MiB", "in all")


def test_a_page_with_devices_and_marks(path: Path, tmp_path: Path) -> None:
    """What newer recordings have: the machine's devices, its command line, the date and marks."""
    devices = [
        {"name": "console <1>", "port": 0x3F8, "size": 8},
        {"name": "virtio-blk", "gpa": 0xD0000000, "size": 0x200},
    ]
    about = {**ABOUT, "devices": devices, "cmdline": "quiet <x>", "date": "2026-01-31T12:00:00Z"}
    extra = [
        {"t": 0.5, "cpu": 0, "exit": "KVM_EXIT_IO", "port": port} for port in (0xCF8, 0x3FF, 7)
    ]
    mark = {"t": 1.5, "mark": "ready <now>"}
    path.write_bytes(lines(about, *EVENTS[:-1], *extra, mark, EVENTS[-1]))
    out = tmp_path / "page.html"
    done = kvmpriv(path, "--page", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  8  KVM_EXIT_IO  (console <1>: 6, PCI (no device): 1, port 0x7: 1)" in (done.stdout)
    assert "  1  KVM_EXIT_MMIO  (virtio-blk: 1)" in done.stdout
    assert "\nat 1.500 s: ready <now>\n" in done.stdout
    page = out.read_text()
    assert "2026-01-31 12:00:00 UTC" in page
    assert "<code>quiet &lt;x&gt;</code>" in page
    assert set(re.findall(r'<i style="left:[^"]*" title="([^"]*)"', page)) == {
        "console is used",
        "ready &lt;now&gt;",
        "end: off",
    }
    heads = re.findall(r'<div class="head"><span title="([^"]*)"', page)
    assert heads[0] == "console &lt;1&gt;"
    assert {"virtio-blk", "PCI (no device)", "other ports", "hypercalls"} < {*heads}


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ([(30, 0), (0, 200)], "The host could read 0 of the 200 MiB that the guest kept private"),
        ([(30, 0), (4, 200)], "The host could read 4 MiB where the guest kept 200 MiB private"),
        ([(30, 0), (0, 0)], "The guest used no private memory"),
        ([], "This recording has no samples of the guest's memory"),
    ],
)
def test_headline(path: Path, memory: list[tuple[int, int]], words: str) -> None:
    """It counts the most that any sample shows: at the end the guest may have given all back."""
    uses = [{"resident": host << 20, "private": own << 20} for host, own in memory]
    nothing = [{"resident": 0, "private": 0}] * 2
    some = [{**EVENTS[0], "memory": each} for each in (uses, nothing) if uses]
    path.write_bytes(lines(ABOUT, *some))
    recording = trace.read(path)
    assert trace.headline(recording, trace.summarize(recording)) == words


def test_headline_of_an_ordinary_guest(path: Path) -> None:
    about = {**ABOUT, "ranges": [{**RANGES[0], "purpose": "RAM"}], "private_abi": None}
    path.write_bytes(lines(about, {**EVENTS[0], "memory": [{"resident": 26 << 20, "private": 0}]}))
    assert "\nThe host could read all 26 MiB that the guest used\n" in kvmpriv(path).stdout


def test_a_page_that_cannot_be_written_loses_nothing(path: Path, tmp_path: Path) -> None:
    done = kvmpriv(path, "--page", tmp_path / "no" / "page.html")
    assert done.returncode == 3
    assert done.stderr.endswith("page.html: No such file or directory\n")
    assert done.stdout.startswith("Linux 6.1")
    assert [each.name for each in tmp_path.iterdir()] == ["run.trace"]


def test_a_page_over_one_that_is_there(path: Path, tmp_path: Path) -> None:
    """The file keeps its mode, and nothing is left beside it."""
    out = tmp_path / "page.html"
    out.write_text("the old one")
    out.chmod(0o640)
    assert kvmpriv(path, "--page", out).returncode == 0
    assert out.read_text().startswith("<!doctype html>")
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert sorted(each.name for each in tmp_path.iterdir()) == ["page.html", "run.trace"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_page_through_a_link(path: Path, tmp_path: Path, exists: bool) -> None:
    """The page is what the link points to; the link stays."""
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "page.html", tmp_path / "link.html"
    if exists:
        target.write_text("the old one")
    link.symlink_to(target)
    assert kvmpriv(path, "--page", link).returncode == 0
    assert link.is_symlink()
    assert target.read_text().startswith("<!doctype html>")
    assert [each.name for each in target.parent.iterdir()] == ["page.html"]


def test_a_page_to_a_pipe(path: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    assert kvmpriv(path, "--page", pipe).returncode == 0
    reader.join(10)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert got[0].startswith("<!doctype html>")


def test_a_page_to_a_device(path: Path, tmp_path: Path) -> None:
    """A device node is not replaced; the test makes its own, as root could replace /dev/null."""
    node = tmp_path / "null"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        node.open("w").close()
    except PermissionError as error:
        missing("root", f"a device node can't be made and used: {error}")
    assert kvmpriv(path, "--page", node).returncode == 0
    assert stat.S_ISCHR(node.lstat().st_mode)


@pytest.mark.parametrize("exists", [False, True])
def test_a_page_whose_name_is_too_long_for_a_second_one(
    path: Path, tmp_path: Path, exists: bool
) -> None:
    """255 bytes are a file's longest name: no longer name can be made from it."""
    page = tmp_path / ("p" * 250 + ".html")
    if exists:
        page.write_text("old")
    assert kvmpriv(path, "--page", page).returncode == 0
    assert page.read_text().startswith("<!doctype html>")
    assert list(tmp_path.glob("p*")) == [page]


def test_a_page_to_standard_output(path: Path, tmp_path: Path) -> None:
    """After the summary, whatever kind of file it is.

    By a link of the test's own, as /dev/stdout is one: were the link replaced, no other process
    would notice.
    """
    link = tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")
    done = kvmpriv(path, "--page", link)
    assert done.returncode == 0
    assert done.stdout.startswith("Linux 6.1")
    assert done.stdout.index("<!doctype html>") > done.stdout.index("0.25\n")
    out = tmp_path / "page"
    with out.open("w") as file:
        command = [sys.executable, "-m", "kvmpriv", "trace", str(path), "--page", str(link)]
        assert subprocess.run(command, stdout=file).returncode == 0
    assert link.is_symlink()
    written = out.read_text()
    assert written.startswith("Linux 6.1")
    assert written.index("<!doctype html>") > written.index("0.25\n")


def test_a_page_over_its_own_recording(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    hard = tmp_path / "hard"
    hard.hardlink_to(path)
    before = path.read_bytes()
    for page in (path, link, hard):
        done = kvmpriv(path, "--page", page)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"kvmpriv trace: --page {page} is the recording itself\n"
        assert path.read_bytes() == before


def test_a_page_in_a_folder_that_can_not_be_written_to(path: Path, tmp_path: Path) -> None:
    """An existing file is written in place."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        missing("setpriv", "root may write everywhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    page = folder / "page.html"
    page.write_text("the old one")
    page.chmod(0o666)
    folder.chmod(0o555)
    command = [sys.executable, "-m", "kvmpriv", "trace", str(path), "--page", str(page)]
    if os.geteuid() == 0:
        rights = ("--bounding-set=-all,+dac_read_search", "--inh-caps=-all")
        command = ["setpriv", *rights, *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert page.read_text().startswith("<!doctype html>")


EXIT = {"t": 0.5, "cpu": 0, "exit": "KVM_EXIT_IO"}
CONVERSION = EVENTS[9]


@pytest.mark.parametrize(
    "event",
    [
        {**EXIT, "port": "x"},
        {**EXIT, "port": 1.5},
        {**EXIT, "port": []},
        {**EXIT, "port": True},
        {**EXIT, "port": -1},
        {**EXIT, "gpa": "0x1000"},
        {**EXIT, "gpa": 1 << 64},
        {**EXIT, "write": 2},
        {**EXIT, "t": float("nan")},
        {**EXIT, "t": float("inf")},
        {**EXIT, "t": -1.0},
        {**EXIT, "t": 10**400},
        {**EXIT, "cpu": -1},
        {**CONVERSION, "gpa": -4096},
        {**CONVERSION, "size": 1 << 70},
        {**CONVERSION, "convert": "sideways"},
        {**EVENTS[0], "rss": -1},
        {**EVENTS[0], "cpu": [float("nan"), 0.0]},
        {**EVENTS[0], "cpu": ["much"]},
        {**EVENTS[0], "memory": [{"resident": 0, "private": 1 << 64}] * 2},
        {**EVENTS[-1], "status": "7"},
        {**EVENTS[-1], "status": 10**400},
    ],
)
def test_a_damaged_event(path: Path, tmp_path: Path, event: dict[str, Any]) -> None:
    path.write_bytes(lines(ABOUT, EVENTS[0], event))
    done = kvmpriv(path, "--page", tmp_path / "page.html")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"kvmpriv trace: {path}: line 3: not an event: ")
    assert len(done.stderr.splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["run.trace"]


@pytest.mark.parametrize(
    "change",
    [
        {"ranges": [{**RANGES[0], "gpa": -1}]},
        {"ranges": [{**RANGES[0], "size": 1 << 64}]},
        {"cpus": 0},
        {"cpus": 10**400},
        {"private_abi": 7},
        {"what": None},
        {"cmdline": 7},
        {"date": None},
        {"devices": {}},
        {"devices": [{"name": "console", "size": 8}]},
        {"devices": [{"name": "console", "size": 8, "port": 0x10000}]},
        {"devices": [{"name": "console", "size": 8, "port": 0, "gpa": 0}]},
        {"devices": [{"name": "console", "port": 0x3F8}]},
        {"devices": [{"size": 8, "port": 0x3F8}]},
    ],
)
def test_a_damaged_first_line(path: Path, change: dict[str, Any]) -> None:
    path.write_bytes(lines({**ABOUT, **change}))
    done = kvmpriv(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "line 1: it does not describe a run" in done.stderr


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"t": 1e999}', b'{"t": NaN}', b"1" * 5000])
def test_json_that_is_none(path: Path, line: bytes) -> None:
    path.write_bytes(lines(ABOUT) + line + b"\n")
    done = kvmpriv(path)
    assert done.returncode == 2
    assert "line 2: not an event: " in done.stderr
    assert "Traceback" not in done.stderr


def test_escape_sequences_do_not_reach_the_terminal(path: Path, tmp_path: Path) -> None:
    """Escape sequences and undecodable bytes of a recording are escaped: they come from a guest."""
    evil = "\x1b[5m\x9b2J\ud800\u202e"
    about = {
        **ABOUT,
        "what": evil,
        "private_abi": evil,
        "ranges": [{**part, "kind": "private", "purpose": evil} for part in RANGES],
    }
    events = [
        EVENTS[0],
        {**EXIT, "exit": evil, "port": 7},
        {**CONVERSION, "by": evil},
        {**EVENTS[-1], "why": f"two\nlines {evil}"},
    ]
    path.write_bytes(lines(about, *events))
    page = tmp_path / "page.html"
    done = kvmpriv(path, "--page", page)
    assert (done.returncode, done.stderr) == (0, "")
    for text in (done.stdout, page.read_text()):
        assert not set(evil) & set("\x1b\x9b\u202e") & set(text)
        assert r"\x1b[5m\x9b2J\ud800\u202e" in text
    assert "two\nlines" in done.stdout


@given(st.binary(max_size=300), st.integers(0, 2000))
def test_any_damage_is_refused_or_shown(data: bytes, at: int) -> None:
    whole = lines(ABOUT, *EVENTS)
    damaged = whole[:at] + data + whole[at + len(data) :]
    with tempfile.NamedTemporaryFile() as file:
        file.write(damaged)
        file.flush()
        try:
            recording = trace.read(Path(file.name))
        except trace.TraceError:
            return
    for line in (*trace.text(recording), *trace.page(recording)):
        line.encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"#!/bin/sh\n", "not a recording of `kvmpriv boot --trace`"),
        (b"\x7fELF\x02\x01", "not a recording"),
        (b'{"a": 1}\n', "not a recording"),
        (
            lines({**ABOUT, "kvmpriv_trace": 2}),
            "a recording of version 2; this kvmpriv reads version 1",
        ),
        (lines({**ABOUT, "ranges": 3}), "line 1: it does not describe a run"),
        (lines(ABOUT, {"t": 1.0}), "line 2: not an event: "),
        (lines(ABOUT, EVENTS[0], {"exit": "x", "cpu": 0}), "line 3: not an event: "),
        (lines(ABOUT, {**EVENTS[0], "memory": []}), "line 2: not an event: "),
        (lines(ABOUT) + b"\xff\n", "line 2: not an event: "),
    ],
)
def test_what_is_no_recording(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    done = kvmpriv(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.startswith(f"kvmpriv trace: {path}: ")
    assert "Traceback" not in done.stderr


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = kvmpriv(tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr == f"kvmpriv trace: {tmp_path / 'none'}: No such file or directory\n"


def test_a_run_that_was_cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])
    done = kvmpriv(path)
    assert done.returncode == 0
    assert "after 1.000 s the recording ends, before the end of the guest" in done.stdout
    assert done.stderr == "kvmpriv trace: the last line is incomplete and was left out\n"


def test_messages_that_cannot_be_written(path: Path) -> None:
    """Where standard error can't be written, the summary and the exit status are the same."""
    path.write_bytes(path.read_bytes()[:-10])
    whole = kvmpriv(path)
    for redirection in ("2>/dev/full", "2>&-"):
        command = f'exec "$0" -m kvmpriv trace "$1" {redirection}'
        arguments = ["sh", "-c", command, sys.executable, str(path)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, whole.stdout, "")


def test_what_a_recorder_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    recorder = trace.Recorder(path.open("w"), {k: v for k, v in ABOUT.items() if k[0] != "k"})
    for event in EVENTS:
        recorder.event(**{name: value for name, value in event.items() if name != "t"})
    recorder.close()
    recording = trace.read(path)
    assert recorder.error is None
    assert recording.about == ABOUT
    assert [{**event, "t": 0} for event in recording.events] == [{**e, "t": 0} for e in EVENTS]
    times = [event["t"] for event in recording.events]
    assert times == sorted(times)
    assert not recording.cut_off


def test_a_full_disk_ends_the_recording_and_no_more() -> None:
    file = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115  # the recorder closes it
    recorder = trace.Recorder(file, ABOUT)
    recorder.event(end="off", status=0, why="turned off")
    recorder.close()
    assert recorder.error is not None
    assert recorder.error.strerror == "No space left on device"


@example([{"t": 0.1, "cpu": 0, "exit": "KVM_EXIT_IO", "port": 0x3F8}], [2e-311] + [0.0] * 19)
@given(
    st.lists(st.sampled_from([*EVENTS, {"t": 0, "mark": "m"}])),
    st.lists(st.floats(0, 1e6), min_size=20),
)
def test_any_recording_can_be_drawn(events: list[Any], times: list[float]) -> None:
    chosen: list[Any] = [{**event, "t": at} for event, at in zip(events, times, strict=False)]
    recording = trace.Recording(ABOUT, chosen, cut_off=False)
    assert list(trace.text(recording))
    page = io.StringIO()
    page.writelines(trace.page(recording))
    for drawing in drawings(page.getvalue()):
        assert "nan" not in ElementTree.tostring(drawing, "unicode")
