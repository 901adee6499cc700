"""What an agent may send, and what it must not: this side against a hostile guest, without a VM."""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpriv.guest.linux import ProtocolError
from kvmpriv.guest.linux.archive import Contents, Tree, Unpacker, pack_bytes, pack_path
from kvmpriv.guest.linux.process import exchange
from kvmpriv.guest.linux.protocol import (
    OUTPUT_WINDOW,
    PAYLOAD_MAX,
    STDIN_WINDOW,
    VERSION,
    Channel,
    Decoder,
    Frame,
    Kind,
    Link,
    What,
    encode,
    start_payload,
)

HELLO = Frame(Kind.HELLO, 0, struct.pack("<8sII", b"kvmpriv\0", VERSION, 0))


class Wire:
    """A link whose agent is the test; it keeps what the link has sent."""

    def __init__(self, *, greeted: bool = True) -> None:
        self.sent: list[tuple[int, int, int, bytes]] = []
        self.link = Link(self._send)
        if greeted:
            self.say(HELLO)
            assert self.link.ready

    def _send(self, data: bytes) -> None:
        kind, stream, zero, channel, size = struct.unpack_from("<BBHII", data)
        assert (zero, size) == (0, len(data) - 12)
        self.sent.append((kind, stream, channel, data[12:]))

    def say(self, *frames: Frame) -> None:
        self.link.received(b"".join(map(encode, frames)))

    def open(self) -> Channel:
        channel = self.link.open(start_payload(What.COMMAND, [b"true"]))
        self.say(Frame(Kind.STARTED, channel.number, b"\x07\0\0\0"))
        return channel

    def broken(self) -> str:
        """What broke the protocol; "" if nothing has."""
        try:
            self.link.check()
        except ProtocolError as error:
            return str(error)
        return ""


def exited(channel: Channel, status: int) -> tuple[Frame, ...]:
    number = channel.number
    return (
        Frame(Kind.END, number, stream=1),
        Frame(Kind.END, number, stream=2),
        Frame(Kind.EXITED, number, struct.pack("<i", status)),
    )


def test_a_good_agent() -> None:
    wire = Wire()
    channel = wire.open()
    assert channel.pid == 7
    assert wire.sent[0][:3] == (Kind.START, 0, 1)
    wire.say(Frame(Kind.DATA, 1, b"out", 1), Frame(Kind.DATA, 1, b"err", 2), *exited(channel, -9))
    assert (channel.read(1, 2), channel.read(1, 9), channel.read(1, 9)) == (b"ou", b"t", b"")
    assert channel.read(2, 100) == b"err"
    assert channel.wait_for_exit() == -9
    assert wire.broken() == ""
    wire.say(Frame(Kind.DATA, 1, b"late", 1))
    assert wire.broken() == "", "a frame of a channel that has ended is dropped"
    wire.say(Frame(Kind.DATA, 2, b"early", 1))
    assert wire.broken() == "the agent sent a frame of channel 2, which there is not"


DATA = encode(Frame(Kind.DATA, 1, b"x", 1))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x07" + DATA[1:], "kind 7"),
        (b"\xff" * 12, "kind 255"),
        (DATA[:1] + b"\3" + DATA[2:], "the bytes 3, 0"),
        (DATA[:2] + b"\1" + DATA[3:], "the bytes 1, 1"),
        (DATA[:8] + struct.pack("<I", PAYLOAD_MAX + 1), "DATA of 65537 bytes"),
        (DATA[:8] + b"\xff\xff\xff\xff", "DATA of 4294967295 bytes"),
        (DATA[:8] + b"\0\0\0\0", "DATA of 0 bytes"),
        (encode(Frame(Kind.EXITED, 1, b"123")), "EXITED of 3 bytes"),
        (encode(Frame(Kind.EXITED, 1, struct.pack("<i", 256))), "the exit status 256"),
        (encode(Frame(Kind.EXITED, 1, struct.pack("<i", -65))), "the exit status -65"),
        (encode(Frame(Kind.EXITED, 1, bytes(4))) * 2, "a second exit status"),
        (encode(Frame(Kind.STARTED, 1, bytes(4))), "started a command twice"),
        (encode(Frame(Kind.FAILED, 1, bytes(8))), "started a command twice"),
        (encode(Frame(Kind.END, 1, stream=1)) * 2, "more after the end"),
        (encode(Frame(Kind.END, 1, stream=1)) + DATA, "more after the end"),
        (encode(Frame(Kind.DATA, 1, b"x", 0)), "data on a standard input"),
        (encode(Frame(Kind.CREDIT, 1, b"\1\0\0\0")), "a credit of 1 bytes"),
        (encode(Frame(Kind.CREDIT, 1, b"\xff\xff\xff\xff")), "a credit of"),
        (encode(HELLO), "HELLO instead of a first HELLO"),
    ],
)
def test_a_frame_that_breaks_the_protocol(data: bytes, why: str) -> None:
    """It ends the connection, for those who wait, too; nothing later is taken."""
    wire = Wire()
    channel = wire.open()
    wire.link.received(data)
    assert why in wire.broken()
    with pytest.raises(ProtocolError):
        channel.read(2, 1)
    with pytest.raises(ProtocolError):
        wire.link.open(b"")
    count = len(wire.sent)
    wire.say(Frame(Kind.DATA, 1, b"x", 2))
    channel.signal(9)
    assert len(wire.sent) == count
    with pytest.raises(ProtocolError):
        channel.read(2, 1)


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (struct.pack("<8sII", b"kvmpriv\0", 2, 0), "version 2"),
        (struct.pack("<8sII", b"KVMPRIV\0", VERSION, 0), "version"),
    ],
)
def test_another_agent(hello: bytes, why: str) -> None:
    wire = Wire(greeted=False)
    assert not wire.link.wait_until_ready(0.01)
    wire.say(Frame(Kind.HELLO, 0, hello))
    assert why in wire.broken()
    with pytest.raises(ProtocolError):
        wire.link.wait_until_ready(1)
    early = Wire(greeted=False)
    early.say(Frame(Kind.END, 1, stream=1))
    assert "END instead of a first HELLO" in early.broken()


def test_a_start_that_failed_with_no_errno() -> None:
    for error in (0, 4096, 0xFFFFFFFF):
        wire = Wire()
        wire.link.open(b"")
        wire.say(Frame(Kind.FAILED, 1, struct.pack("<II", 2, error)))
        assert "errno" in wire.broken()


def test_no_more_is_kept_than_the_window() -> None:
    wire = Wire()
    channel = wire.open()
    piece = Frame(Kind.DATA, 1, bytes(PAYLOAD_MAX), 1)
    wire.say(*[piece] * (OUTPUT_WINDOW // PAYLOAD_MAX))
    assert wire.broken() == ""
    assert len(channel.read(1, OUTPUT_WINDOW)) == OUTPUT_WINDOW
    credit = [payload for kind, _, _, payload in wire.sent if kind == Kind.CREDIT]
    assert sum(struct.unpack("<I", one)[0] for one in credit) == OUTPUT_WINDOW
    wire.say(*[piece] * (OUTPUT_WINDOW // PAYLOAD_MAX), Frame(Kind.DATA, 1, b"x", 1))
    assert "more than it was allowed" in wire.broken()
    assert len(channel.available(1)) == OUTPUT_WINDOW, "what came before can be read"


def test_this_side_keeps_the_window_too() -> None:
    wire = Wire()
    channel = wire.open()
    sent = 0
    while done := channel.write_some(memoryview(bytes(1 << 20))[sent:]):
        sent += done
    assert sent == STDIN_WINDOW
    wire.say(Frame(Kind.CREDIT, 1, struct.pack("<I", 5)))
    assert channel.write_some(memoryview(bytes(100))) == 5
    wire.say(Frame(Kind.END, 1, stream=0))
    with pytest.raises(BrokenPipeError):
        channel.write_some(memoryview(b"x"))


def test_a_stream_that_nobody_reads() -> None:
    wire = Wire()
    channel = wire.open()
    channel.drop(1)
    assert wire.sent[-1][:2] == (Kind.CLOSE, 1)
    wire.say(Frame(Kind.DATA, 1, bytes(1000), 1))
    assert channel.available(1) == b""
    channel.close()
    assert wire.sent[-1][:2] == (Kind.CLOSE, 0)
    wire.say(Frame(Kind.DATA, 1, bytes(1000), 2))
    assert wire.broken() == ""


def test_those_who_wait_are_woken() -> None:
    wire = Wire()
    channel = wire.open()
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(channel.read(1, 10)))
    thread.start()
    wire.say(Frame(Kind.DATA, 1, b"now", 1))
    thread.join(10)
    assert found == [b"now"]
    with pytest.raises(TimeoutError):
        channel.read(1, 1, 0.0)
    assert not channel.wait_for_any(0.0, input_too=False)
    assert channel.wait_for_any(0.0, input_too=True)
    assert channel.wait_for_exit(0.0) is None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_in_any_pieces(data: st.DataObject) -> None:
    """Whatever an agent sends ends in frames or in ProtocolError, and keeps memory bounded."""
    good = st.builds(
        lambda kind, channel, payload, stream: encode(Frame(kind, channel, payload, stream)),
        st.sampled_from(list(Kind)),
        st.integers(0, 3),
        st.binary(max_size=40) | st.just(struct.pack("<i", -9)),
        st.integers(0, 3),
    )
    stream = b"".join(data.draw(st.lists(good | st.binary(max_size=30), max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    wire = Wire()
    channels = [wire.open(), wire.open()]
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        wire.link.received(stream[start:end])
    for channel in channels:
        for number in (1, 2):
            assert len(channel.available(number)) <= OUTPUT_WINDOW
    whole = Decoder()
    try:
        frames = list(whole.feed(stream))
    except ProtocolError:
        assert wire.broken()
    else:
        assert all(len(frame.payload) <= PAYLOAD_MAX for frame in frames)


# -- files -----------------------------------------------------------------------------------------


def record(kind: str, name: bytes = b"", data: bytes = b"", mode: int = 0o755) -> bytes:
    return struct.pack("<BBHIQ", ord(kind), 0, len(name), mode, len(data)) + name + data


FILE = record("f") + record("c", data=b"contents") + record("e")
LAST = record("z")


def unpack(stream: bytes, target: Path, limit: int = 1 << 20) -> None:
    with Tree(target) as tree:
        unpacker = Unpacker(tree, limit)
        for at in range(0, len(stream), 7):
            unpacker.feed(stream[at : at + 7])
        assert unpacker.done
        tree.commit()


def a_file(name: bytes) -> bytes:
    return record("f", name, mode=0o600) + record("c", data=b"x") + record("e")


BAD_NAMES = (
    *(b"..", b".", b"/etc/passwd", b"../x", b"a/../../x", b"a//b", b"a/", b"/", b"a\0b", b""),
    *(b"x" * 256, b"a/" * 250 + b"x", b"nowhere/x"),
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_out(tmp_path: Path, name: bytes) -> None:
    for kind in ("f", "d", "l"):
        stream = record("d") + record("d", b"a") + record(kind, name, b"x" if kind == "l" else b"")
        with pytest.raises(ProtocolError):
            unpack(stream + (record("e") if kind == "f" else b"") + LAST, tmp_path / "to")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("at", "target"),
    [
        (b"l", b"/etc"),
        (b"l", b".."),
        (b"l", b"../x"),
        (b"a/l", b"../.."),
        (b"a/l", b"../../x"),
        (b"l", b"a/../.."),
        (b"l", b"a/.."),
        (b"l", b""),
        (b"l", b"x\0y"),
    ],
)
def test_a_link_that_leads_out(tmp_path: Path, at: bytes, target: bytes) -> None:
    stream = record("d") + record("d", b"a") + record("l", at, target) + LAST
    with pytest.raises(ProtocolError, match="symbolic link"):
        unpack(stream, tmp_path / "to")
    assert list(tmp_path.iterdir()) == []
    inside = record("d") + record("d", b"a") + record("l", b"a/l", b"../b/c") + LAST
    unpack(inside, tmp_path / "to")
    assert os.readlink(tmp_path / "to/a/l") == "../b/c"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """A link that stays inside, and then a file below its name."""
    stream = record("d") + record("d", b"a") + record("l", b"l", b"a")
    for more in (a_file(b"l/x"), a_file(b"l"), record("d", b"l"), record("l", b"l", b"a")):
        with pytest.raises((ProtocolError, FileExistsError)):
            unpack(stream + more + LAST, tmp_path / "to")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stream",
    [
        LAST,
        record("q"),
        record("c", data=b"x"),
        record("e"),
        record("f", b"named") + LAST,
        record("f") + record("d", b"x"),
        FILE + a_file(b"second") + LAST,
        FILE + FILE,
        FILE + LAST + FILE,
        record("l", b"", b"x"),
        record("!", b"/x", b"123"),
        record("!", b"/x", struct.pack("<II", 0, 0)),
        record("!", b"/x", struct.pack("<II", 4096, 0)),
        record("d") + record("d", b"a") + a_file(b"b") + a_file(b"a/x"),
        b"f\1" + bytes(14),
        struct.pack("<BBHIQ", ord("f"), 0, 5000, 0, 0),
        struct.pack("<BBHIQ", ord("c"), 0, 0, 0, 1 << 40),
    ],
)
def test_a_stream_that_breaks_the_rules(tmp_path: Path, stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(stream, tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


def test_permissions_but_no_setuid(tmp_path: Path) -> None:
    stream = record("d", mode=0o6700) + record("d", b"a", mode=0o500)
    stream += record("f", b"a/f", mode=0o6555) + record("e") + LAST
    unpack(stream, tmp_path / "to")
    modes = [stat.S_IMODE((tmp_path / at).stat().st_mode) for at in ("to", "to/a", "to/a/f")]
    assert modes == [0o700, 0o500, 0o555]
    (tmp_path / "to/a").chmod(0o700)


def test_errors_of_the_agent_and_the_limit(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as refused:
        unpack(record("!", b"/a\xff", struct.pack("<II", errno.EACCES, 0)), tmp_path / "to")
    assert os.fsencode(refused.value.filename) == b"/a\xff"
    with pytest.raises(OSError, match="the limit of 20 bytes") as big:
        unpack(FILE + LAST, tmp_path / "to", limit=20)
    assert big.value.errno == errno.EFBIG
    answer = Unpacker.answer()
    answer.feed(LAST)
    assert answer.done
    for kind in ("f", "d", "c"):
        with pytest.raises(ProtocolError):
            Unpacker.answer().feed(record(kind))


def test_an_old_file_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    for cut in range(1, len(FILE + LAST), 5):
        with pytest.raises((ProtocolError, AssertionError)):
            unpack((FILE + LAST)[:-cut], target)
        assert target.read_text() == "old"
    unpack(FILE + LAST, target)
    assert target.read_text() == "contents"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_packed_is_what_is_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(bytes(range(256)) * 1000)
    (source / "link").symlink_to("file")
    unpack(b"".join(pack_path(source)), tmp_path / "to")
    assert (tmp_path / "to/file").read_bytes() == (source / "file").read_bytes()
    assert os.readlink(tmp_path / "to/link") == "file"
    contents = Contents()
    Unpacker(contents, 1 << 20).feed(b"".join(pack_bytes(b"abc" * 50_000, 0o600)))
    assert contents.data == b"abc" * 50_000


RECORDS = st.builds(
    record,
    st.sampled_from("fdcel!zq"),
    st.sampled_from([b"", b"a", b"a/b", b"..", b"/x", b"a/../x", b"l", b"l/x"])
    | st.binary(max_size=9),
    st.sampled_from([b"", b"a", b"..", b"/etc", b"../a"]) | st.binary(max_size=9),
    st.integers(0, 0xFFFFFFFF),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(RECORDS | st.binary(max_size=20), max_size=10), st.booleans())
def test_any_records(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], top: bool
) -> None:
    """Nothing appears outside the target, whatever comes, and a refused stream leaves nothing."""
    place = tmp_path_factory.mktemp("any")
    try:
        unpack((record("d") if top else b"") + b"".join(records), place / "to")
    except (ProtocolError, OSError, AssertionError):
        assert list(place.iterdir()) == []
    else:
        assert list(place.iterdir()) == [place / "to"]
        for path in (place / "to").rglob("*"):
            assert path.resolve().is_relative_to(place / "to") or not path.exists()
    for folder in [place, *place.rglob("*")]:
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o700)


def test_an_exchange_with_an_agent_that_stops_in_the_middle() -> None:
    wire = Wire()
    channel = wire.open()

    def fed(call: Callable[[], object]) -> None:
        with pytest.raises(ConnectionResetError):
            call()

    wire.say(Frame(Kind.DATA, 1, b"some", 1))
    taken: list[bytes] = []
    assert not exchange(channel, [b"in"], 0.0, lambda stream, data: taken.append(data))
    assert taken == [b"some"]
    assert [kind for kind, *_ in wire.sent[-2:]] == [Kind.DATA, Kind.END]
    wire.link.fail(ConnectionResetError)
    fed(lambda: exchange(channel, [], None, lambda stream, data: None))
    fed(lambda: channel.wait_for_exit(None))
    fed(lambda: channel.write(memoryview(b"x")))
    wire.link.power_off()
