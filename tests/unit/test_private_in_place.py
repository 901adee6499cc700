"""Conversion in place without a kernel that has it: the ioctl's part is played in Python."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmpriv import ArgumentError, HostMemory, Kvm, private, uapi
from kvmpriv.private import ConversionError, GuestMemfdInPlaceAbi, PrivateFile, guest_memfd_in_place
from kvmpriv.private.guest_memfd_in_place import (
    ask_set_memory_attributes2,
    set_memory_attributes2,
)

PAGE = 4096
PRIVATE = uapi.guest_memfd.KVM_MEMORY_ATTRIBUTE_PRIVATE
MMAP = uapi.guest_memfd.GUEST_MEMFD_FLAG_MMAP


class PlayedFile(PrivateFile):
    """A file whose ioctl answers with `answers` in turn: an errno, or one with an offset."""

    def __init__(self, *answers: int | tuple[int, int], reserved: int = 0) -> None:
        self.answers, self.reserved = list(answers), reserved
        self.asked: list[tuple[int, ...]] = []
        super().__init__(os.memfd_create("played", os.MFD_CLOEXEC))

    def _answer(self, request: int, argument: Any) -> int:
        assert request == uapi.guest_memfd.KVM_SET_MEMORY_ATTRIBUTES2
        fields = (argument.offset, argument.size, argument.attributes, argument.flags)
        assert not any((argument.error_offset, *argument.reserved))
        self.asked.append(fields)
        answer = self.answers.pop(0)
        if isinstance(answer, tuple):
            answer, argument.error_offset = answer
        argument.reserved[10] = self.reserved
        return answer

    def ioctl_errno(self, request: int, argument: Any = 0) -> int:
        return self._answer(request, argument)

    def ioctl(self, request: int, argument: Any = 0) -> int:
        if answer := self._answer(request, argument):
            raise OSError(answer, "KVM_SET_MEMORY_ATTRIBUTES2(…)")
        return 0


@contextmanager
def played(*answers: int | tuple[int, int], reserved: int = 0) -> Iterator[PlayedFile]:
    with PlayedFile(*answers, reserved=reserved) as file:
        yield file
        assert not file.answers, "every answer was wanted"


def test_asking_has_no_effect() -> None:
    """By a flag that does not exist; whatever is no guest_memfd is ENOTTY."""
    with played(errno.EINVAL, errno.ENOTTY, 0) as file:
        answers = [ask_set_memory_attributes2(file) for _ in range(3)]
        assert answers == [errno.EINVAL, errno.ENOTTY, 0]
        assert set(file.asked) == {(0, PAGE, 0, 1 << 63)}
    with PrivateFile(os.memfd_create("no guest_memfd", os.MFD_CLOEXEC)) as other:
        assert ask_set_memory_attributes2(other) == errno.ENOTTY


def test_a_page_in_the_way() -> None:
    with played((errno.EAGAIN, 5 * PAGE), (errno.ENOMEM, PAGE)) as file:
        with pytest.raises(ConversionError, match=r"0x7000 bytes at 0x1000 .*: offset 0x5000"):
            set_memory_attributes2(file, PAGE, 7 * PAGE, PRIVATE)
        with pytest.raises(ConversionError, match="no memory") as stopped:
            set_memory_attributes2(file, PAGE, 7 * PAGE, 0)
        assert file.asked == [(PAGE, 7 * PAGE, PRIVATE, 0), (PAGE, 7 * PAGE, 0, 0)]
    assert (stopped.value.errno, stopped.value.offset) == (errno.ENOMEM, PAGE)
    assert stopped.value.converted == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTTY, errno.EFAULT])
def test_a_refusal_is_no_stop(number: int) -> None:
    """What is wrong with the call is the kernel's own error: no page was in the way."""
    with played((number, 5 * PAGE)) as file, pytest.raises(OSError, match="ATTRIBUTES2") as refused:
        set_memory_attributes2(file, 0, PAGE, PRIVATE)
    assert refused.value.errno == number
    assert not isinstance(refused.value, ConversionError)


def test_a_kernel_that_uses_reserved_words() -> None:
    with played(0, reserved=1) as file, pytest.warns(RuntimeWarning, match="newer than this"):
        set_memory_attributes2(file, 0, PAGE, PRIVATE)
    with played(0) as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        set_memory_attributes2(file, 0, PAGE, PRIVATE)


def test_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGAIN is tried again until the time is over, and nothing else is."""
    now = [100.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)
    )
    monkeypatch.setattr(guest_memfd_in_place, "time", clock)
    busy = (errno.EAGAIN, 0)
    patient = GuestMemfdInPlaceAbi("patient", patience=0.0025)
    with played(busy, busy, 0) as file:
        patient.convert_file(file, 0, PAGE, private=True)
    assert now[0] == pytest.approx(100.002)
    with played(busy, busy, busy, busy) as file, pytest.raises(ConversionError):
        patient.convert_file(file, 0, PAGE, private=True)
    for abi in (patient, GuestMemfdInPlaceAbi("none", patience=0)):
        with played((errno.ENOMEM, 0)) as file, pytest.raises(ConversionError):
            abi.convert_file(file, 0, PAGE, private=False)
    with played(busy) as file, pytest.raises(ConversionError):
        GuestMemfdInPlaceAbi("none", patience=0).convert_file(file, 0, PAGE, private=True)
    with pytest.raises(ArgumentError, match="patience must be 0 or more seconds, not -1"):
        GuestMemfdInPlaceAbi(patience=-1)
    assert time.monotonic() != now[0], "the clock of this test is its own"


def test_traits() -> None:
    """The file's flags decide how its pages begin; there is one backing in any case."""
    abi = private.ABIS["guest_memfd_in_place"]
    assert abi.traits == (False, True, 1, "file")
    hidden = GuestMemfdInPlaceAbi("hidden", file_flags=0)
    assert hidden.traits == (True, True, 1, "file")
    snp = GuestMemfdInPlaceAbi("snp", vm_type=uapi.guest_memfd.KVM_X86_SNP_VM, file_flags=MMAP)
    assert snp.traits == (True, False, 1, "file")
    assert abi.fault_layout._replace(abi="guest_memfd") == private.ABIS["guest_memfd"].fault_layout


@pytest.mark.parametrize(
    ("answer", "message", "number"),
    [
        (errno.ENOTTY, "needs kvm.gmem_in_place_conversion=1", errno.ENOTTY),
        (0, "takes a flag that this kvmpriv does not know", errno.EPROTO),
        (errno.EPERM, "Operation not permitted", errno.EPERM),
    ],
)
def test_an_answer_that_is_not_this_abis(
    monkeypatch: pytest.MonkeyPatch, answer: int, message: str, number: int
) -> None:
    class Played(GuestMemfdInPlaceAbi):
        def create_vm(self, kvm: Kvm) -> Any:
            return PrivateFile(os.memfd_create("vm", os.MFD_CLOEXEC))

    file = PlayedFile(answer)
    monkeypatch.setattr(guest_memfd_in_place, "GuestMemfd", lambda *_: file)
    with pytest.raises(OSError, match=message) as refused:
        Played("played").try_out(cast("Kvm", None))
    assert refused.value.errno == number
    assert file.closed


# -- memory that this process can't access ---------------------------------------------------------


@pytest.fixture
def cut() -> Iterator[HostMemory]:
    """A mapping of four pages, of which the file has the first two: beyond them is SIGBUS."""
    fd = os.memfd_create("cut", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * PAGE)
    with HostMemory(4 * PAGE, fd=fd) as memory:
        os.ftruncate(fd, 2 * PAGE)
        os.close(fd)
        yield memory


def test_a_page_of_a_file_that_cannot_be_accessed(cut: HostMemory) -> None:
    """An OSError where a load would end this process; with the page's offset."""
    what = r"^.Errno 14. the page at {:#x} of <HostMemory 0x4000 .*> is private, or beyond"
    for offset, size, page in (
        (2 * PAGE, 1, 2 * PAGE),
        (3 * PAGE + 5, 8, 3 * PAGE),
        (2 * PAGE - 3, 8, 2 * PAGE),
        (0, 4 * PAGE, 2 * PAGE),
    ):
        with pytest.raises(OSError, match=what.format(page)) as refused:
            cut.read(offset, size)
        assert refused.value.errno == errno.EFAULT
        with pytest.raises(OSError, match=what.format(page)):
            cut.write(offset, b"x" * size)
    assert cut.read(2 * PAGE - 3, 3) == b"xxx", "what is before the page is written"
    cut.write(0, bytearray(b"whole") + bytes(2 * PAGE - 5))
    assert cut.read(0, 2 * PAGE) == b"whole" + bytes(2 * PAGE - 5)
    assert cut.read(4 * PAGE, 0) == b""
    for offset, size in ((-1, 1), (4 * PAGE, 1), (0, 4 * PAGE + 1)):
        with pytest.raises(ArgumentError, match="not inside host memory"):
            cut.read(offset, size)
        with pytest.raises(ArgumentError, match="not inside host memory"):
            cut.write(offset, b"x" * size)


def test_what_is_found_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the pieces in which it is read, and only where all of it can be read."""
    monkeypatch.setattr("kvmpriv.memory._CHUNK", 2 * PAGE)
    fd = os.memfd_create("found", os.MFD_CLOEXEC)
    os.ftruncate(fd, 6 * PAGE)
    with HostMemory(6 * PAGE, fd=fd) as memory, HostMemory(6 * PAGE) as same:
        for at in (0, 100, 2 * PAGE - 3, 3 * PAGE - 1, 4 * PAGE, 6 * PAGE - 6):
            for one in (memory, same):
                one.write(at, b"needle")
        for data in (b"needle", b"n", b"e\0", b"ee", b"not there", b"", bytes(3 * PAGE)):
            for start in (0, 1, PAGE, 2 * PAGE - 3, 2 * PAGE - 2, 4 * PAGE, 6 * PAGE - 5):
                assert memory.find(data, start) == same.find(data, start), (data, start)
        os.ftruncate(fd, 4 * PAGE + 6)
        memory.write(4 * PAGE, b"n" * PAGE)
        os.ftruncate(fd, 4 * PAGE)
        assert memory.find(b"needle", 3 * PAGE) == -1
        memory.write(4 * PAGE - 3, b"nee")
        assert memory.find(b"needle", 3 * PAGE) == -1
        assert memory.find(b"nee", 3 * PAGE) == 4 * PAGE - 3
    os.close(fd)
    with pytest.raises(ValueError, match="closed"):
        memory.find(b"x")
