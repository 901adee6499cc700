"""The streams by which the agent of a guest may come, and its choice."""

from __future__ import annotations

from collections.abc import Callable

from kvmpriv.guest.linux.streams import Streams


class Wire:
    """A stream, what was sent to it, and how its other end calls."""

    def __init__(self, received: Callable[[bytes], object], ended: Callable[[], object]) -> None:
        self.sent: list[bytes] = []
        self.take, self.end = received, ended

    def send(self, data: bytes) -> None:
        self.sent.append(data)


class Chosen:
    """Two streams, and what came out."""

    def __init__(self) -> None:
        self.log: list[object] = []
        self.streams = Streams(
            self.log.append,
            lambda: self.log.append("end"),
            lambda name: self.log.append(("came", name)),
        )
        self.first = self.streams.add("first", Wire)
        self.second = self.streams.add("second", Wire)


def test_the_first_bytes_choose() -> None:
    one = Chosen()
    assert one.streams.chosen is None
    one.streams.send(b"1")
    one.streams.send(b"2")
    assert one.first.sent == one.second.sent == []
    one.second.take(b"hello")
    assert one.streams.chosen == "second"
    assert one.log == [("came", "second"), b"hello"]
    one.streams.send(b"3")
    assert (one.first.sent, one.second.sent) == ([], [b"1", b"2", b"3"])
    one.first.take(b"another program")
    one.first.end()
    assert one.log == [("came", "second"), b"hello"], "the other stream is not the agent's"
    one.second.take(b"more")
    one.second.end()
    assert one.log[2:] == [b"more", "end"]


def test_an_agent_that_ends_before_it_speaks() -> None:
    one = Chosen()
    one.first.end()
    assert one.log == ["end"]
