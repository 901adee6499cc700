"""``kvmpriv run`` passes on the guest's output and exit status; every mistake has a message."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmpriv import HostMemory, Kvm
from kvmpriv.guest import GuestCrash, GuestTimeout, ImageError, Machine, Mode, load_flat
from private.support.requirements import missing

MIB = 1 << 20
RUN = (sys.executable, "-m", "kvmpriv", "run")
HALT = b"\xf4"

pytestmark = pytest.mark.usefixtures("kvm")


def run(
    *arguments: str | Path, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [*RUN, *arguments], env=environment, **{"capture_output": True, "text": True, **options}
    )


def write(path: Path, code: str | bytes) -> Path:
    path.write_bytes(bytes.fromhex(code) if isinstance(code, str) else code)
    return path


def test_the_ready_guest() -> None:
    done = run("--hello", "--memory", "8M", "--", "first", "second and last")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Hello from a guest in long mode with 8 MiB of memory"
    assert lines[1].startswith("CPUID says the hypervisor is ")
    assert lines[2:] == ["argument: first", "argument: second and last"]
    assert done.stderr == ""


@pytest.mark.parametrize("status", [0, 1, 7, 255])
@pytest.mark.parametrize("mode", ["long", "real"])
def test_the_guests_status_is_ours(tmp_path: Path, mode: str, status: int) -> None:
    image = write(tmp_path / "image", bytes((0xB0, status, 0xE6, 0xF4)))  # mov; out %al, $0xf4
    assert run("--mode", mode, image).returncode == status


def test_hlt_ends_it_with_status_0(tmp_path: Path) -> None:
    assert run(write(tmp_path / "image", HALT)).returncode == 0


def test_output_is_passed_on_as_it_is(tmp_path: Path) -> None:
    """All 256 bytes arrive unchanged by rep outsb; the line status register reads as ready."""
    every = bytes(range(256))
    code = bytes.fromhex(
        "66ba fd03  ec  24 20  74 fb"  # 1: in $0x3fd, %al; and $0x20, %al; jz 1b
        "488d 35 0c000000  b9 00010000  66ba f803"  # lea behind the code; mov $256; mov $0x3f8
        "f3 6e  f4"  # rep outsb; hlt
    )
    image = write(tmp_path / "image", code + every)
    done = subprocess.run([*RUN, image], capture_output=True)
    assert done.stdout == every
    assert done.returncode == 0


def test_other_ports_are_an_empty_bus(tmp_path: Path) -> None:
    image = write(tmp_path / "image", "e710 e410 e6f4")  # out %eax, $0x10; in $0x10, %al; exit
    assert run(image).returncode == 255


def test_elf(tmp_path: Path) -> None:
    source = tmp_path / "guest.c"
    source.write_text(
        """
        static void out(unsigned short port, unsigned char value)
        { __asm__ volatile ("outb %0, %1" : : "a"(value), "Nd"(port)); }
        static int zero, one = 1;
        void _start(int argc, char **argv)
        {
                for (int i = 0; i < argc; i++)
                        for (char *c = argv[i]; *c; c++)
                                out(0x3f8, *c);
                out(0xf4, argv[argc] ? 99 : argc + zero + one);
        }
        """
    )
    program = tmp_path / "guest"
    flags = ("-O1", "-nostdlib", "-static", "-no-pie", "-ffreestanding", "-mno-red-zone")
    subprocess.run(["cc", *flags, "-o", program, source], check=True)
    done = run(program, "--", "one ", "two")
    assert (done.stdout, done.returncode, done.stderr) == ("one two", 3, "")
    subprocess.run(["cc", *flags, "-Wl,-Ttext=0x40000000", "-o", program, source], check=True)
    done = run(program)
    assert done.returncode == 2
    assert "the image needs 0x4" in done.stderr


def test_arguments_in_real_mode(tmp_path: Path) -> None:
    # mov $0x3f8, %dx; 1: lodsb; test %al, %al; jz 2f; out; jmp 1b; 2: mov %di, %ax; exit
    image = write(tmp_path / "image", "baf803 ac 84c0 7403 ee ebf8 89f8 e6f4")
    done = run("--mode", "real", image, "--", "first", "b", "c")
    assert (done.stdout, done.returncode) == ("first", 3)


# -- crashes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("0f0b", "exception 6 (#UD invalid opcode) at rip 0x100000"),
        ("31c9 f7f1", "exception 0 (#DE divide error) at rip 0x100002"),
        ("cc", "exception 3 (#BP breakpoint) at rip 0x100001"),
        ("48b80000000000010000 8b00", "exception 14 (#PF page fault), error code 0x0, address"),
        ("66b8ff00 8ed8", "exception 13 (#GP general protection), error code 0xfc"),
        ("cd80", "exception 128 (no handler for this interrupt)"),
        ("31e4 0f0b", "exception 6 (#UD invalid opcode) at rip 0x100002"),
        ("48c7c000000070 8b00", "KVM_EXIT_MMIO: read 4 bytes at 0x70000000"),
        ("6a006a00 0f011c24 0f0b", "triple fault (KVM_EXIT_SHUTDOWN)"),
    ],
)
def test_a_crash_says_why(tmp_path: Path, code: str, why: str) -> None:
    done = run(write(tmp_path / "image", code))
    assert done.returncode == 125
    assert done.stdout == ""
    assert done.stderr.startswith("kvmpriv run: the guest crashed: ")
    if code.startswith("c") and "EMULATION, instruction c" in done.stderr:
        missing("software-interrupts", "this KVM emulates guests, and knows no int instruction")
    assert why in done.stderr
    if "SHUTDOWN" not in why:  # AMD resets the registers then
        assert re.search(r"rip 0000000000100\w{3} ", done.stderr)
        at = re.search(r"code at (0x\w+): ((?:\w\w ?)+)", done.stderr)
        assert at is not None
        shown = bytes.fromhex(at[2])
        assert shown.startswith(bytes.fromhex(code)[int(at[1], 0) - 0x100000 :][:2])


def test_a_crash_in_real_mode(tmp_path: Path) -> None:
    done = run("--mode", "real", write(tmp_path / "image", "90 0f0b"))
    assert done.returncode == 125
    assert "exception 6 (#UD invalid opcode) at rip 0x1001" in done.stderr
    assert "code at 0x1001: 0f 0b" in done.stderr
    done = run("--mode", "real", write(tmp_path / "image", "cd10"))
    assert "exception 16" in done.stderr, "there is no BIOS to call"


def test_output_comes_before_the_crash(tmp_path: Path) -> None:
    image = write(tmp_path / "image", "66baf803 b041 ee 0f0b")
    done = run(image, stderr=subprocess.STDOUT, capture_output=False, stdout=subprocess.PIPE)
    assert done.stdout.startswith("Akvmpriv run: the guest crashed")


def test_timeout(tmp_path: Path) -> None:
    done = run("--timeout", "0.3", write(tmp_path / "image", "ebfe"))
    assert done.returncode == 124
    assert "the guest was still running after 0.3 s at rip 0x100000" in done.stderr


def test_ctrl_c(tmp_path: Path) -> None:
    image = write(tmp_path / "image", "66baf803 b00a ee ebfe")  # a newline, then spin
    with subprocess.Popen([*RUN, image], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as guest:
        assert guest.stdout is not None
        assert guest.stdout.read(1) == b"\n"
        guest.send_signal(signal.SIGINT)
        _, errors = guest.communicate(timeout=10)
    assert guest.returncode == 128 + signal.SIGINT
    assert errors == b""


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name an IMAGE to run"),
        (("--memory", "0", "{image}"), "the size must be more than 0"),
        (("--memory", "4097", "{image}"), "4097 is not a multiple of 4096"),
        (("--memory", "1000T", "{image}"), "1000T is more than this host has"),
        (("--memory", "much", "{image}"), "'much' is not a size"),
        (("--memory", "-4096", "{image}"), "argument --memory"),
        (("--memory", "4K", "{image}"), "are too few for long mode"),
        (("--memory", "1M", "{image}"), "the image needs 0x100000…0x100001"),
        (("--memory", "32K", "--mode", "real", "{image}"), "at least 64 KiB"),
        (("--load", "0xfffff000", "{image}"), "the image needs 0xfffff000"),
        (("--load", "0x800", "--mode", "real", "{image}"), "only 0x1000…"),
        (("--load", "0x10000", "--mode", "real", "{image}"), "above real mode's first 64 KiB"),
        (("--entry", "0x200000", "{image}"), "entry 0x200000 is outside the image"),
        (("--load", "here", "{image}"), "'here' is not a number"),
        (("--timeout", "0", "{image}"), "'0' is not a number of seconds"),
        (("--timeout", "nan", "{image}"), "'nan' is not a number of seconds"),
        (("--mode", "vm86", "{image}"), "invalid choice: 'vm86'"),
        (("{folder}/nothing",), "nothing: No such file or directory"),
        (("{folder}",), "Is a directory"),
        (("",), "kvmpriv run: argument IMAGE: the name of a file is empty"),
        (("/dev/zero",), "not a regular file"),
        (("{empty}",), "the image is empty"),
        (("{huge}",), "bytes do not fit into 0x1000000 bytes of memory"),
        (("{truncated}",), "truncated: 20 bytes do not hold an ELF header"),
        (("{arm}",), "an ELF file for 64-bit Arm"),
        (("{image}", "--", "x" * 70_000), "the arguments take 70001 bytes"),
        (("--hello", "--mode", "real"), "made for long mode"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: Sequence[str], says: str) -> None:
    files = {
        "folder": tmp_path,
        "image": write(tmp_path / "image", HALT),
        "empty": write(tmp_path / "empty", b""),
        "huge": tmp_path / "huge",
        "truncated": write(tmp_path / "truncated", b"\x7fELF\x02\x01\x01" + bytes(13)),
        "arm": write(
            tmp_path / "arm", b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xb7\0" + bytes(44)
        ),
    }
    with files["huge"].open("wb") as file:
        file.truncate(1 << 40)
    done = run(*(argument.format(**files) for argument in arguments))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_unreadable_image(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        missing("root", "another user's rights can only be had by root")
    image = write(tmp_path / "image", HALT)
    image.chmod(0)
    # The interpreter may live where only root may look: change after it has started.
    program = (
        "import gettext, locale, os, shutil, sys; import kvmpriv.commands.run, kvmpriv.cli as cli;"
        "os.seteuid(65534); sys.exit(cli.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "run", image], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_image_that_never_comes(tmp_path: Path) -> None:
    """The time limit covers a pipe that no process opens for writing."""
    image = tmp_path / "image"
    os.mkfifo(image)
    started = time.monotonic()
    done = run("--timeout", "0.5", image)
    assert (done.returncode, done.stdout) == (124, "")
    assert done.stderr == f"kvmpriv run: {image}: not read to its end after 0.5 s\n"
    assert time.monotonic() - started < 20


def test_no_space_for_the_output() -> None:
    with Path("/dev/full").open("wb") as full:
        done = run("--hello", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert done.stderr == "kvmpriv: standard output: No space left on device\n"


def test_closed_stdout() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *RUN, "--hello"], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stderr == "kvmpriv: standard output is closed\n"


def test_a_reader_that_has_read_enough(tmp_path: Path) -> None:
    image = write(tmp_path / "image", "66baf803 b00a ee ebfd")  # newlines for ever
    with subprocess.Popen([*RUN, image], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as guest:
        assert guest.stdout is not None
        assert guest.stderr is not None
        assert guest.stdout.read(3) == b"\n\n\n"
        guest.stdout.close()
        assert guest.stderr.read() == b""
        assert guest.wait(10) == 128 + signal.SIGPIPE


def test_no_locale(tmp_path: Path) -> None:
    image = write(tmp_path / "image", HALT)
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run("--memory", "1M", image, env=environment)
    assert done.returncode == 2
    assert r"0x100000\u20260x100001" in done.stderr, "what it can't show, it escapes"


# -- the same from Python ------------------------------------------------------------------------


def test_machine(kvm: Kvm, no_leak: object) -> None:
    printed = bytearray()
    image = load_flat(bytes.fromhex("66baf803 b048 ee b069 ee b005 e6f4"))
    with Machine(kvm, image, 4 * MIB, output=printed.extend) as machine:
        assert machine.run() == 5
        assert machine.memory.size == 4 * MIB
    assert bytes(printed) == b"Hi"
    with (
        Machine(kvm, load_flat(b"\x0f\x0b"), 4 * MIB) as machine,
        pytest.raises(GuestCrash) as crash,
    ):
        machine.run()
    assert crash.value.why == "exception 6 (#UD invalid opcode)"
    with Machine(kvm, load_flat(b"\xeb\xfe"), 4 * MIB) as machine, pytest.raises(GuestTimeout):
        machine.run(0.05)


def test_a_machine_that_can_not_be_made_leaves_nothing(kvm: Kvm, no_leak: object) -> None:
    for image, size in (
        (load_flat(HALT), MIB),
        (load_flat(HALT, Mode.REAL), 0x8000),
        (load_flat(HALT, load=1 << 40), 4 * MIB),
    ):
        with pytest.raises(ImageError):
            Machine(kvm, image, size)
    with pytest.raises(ValueError, match="memory size"):
        Machine(kvm, load_flat(HALT), 4095)
    with pytest.raises(ImageError, match="zero byte"):
        Machine(kvm, load_flat(HALT), 4 * MIB, arguments=(b"a\0b",))


def test_memory_above_4_gib(kvm: Kvm) -> None:
    """Boot structures and page tables work for a large guest; only touched memory is used."""
    # mov $0x120000000, %rax; movb $9, (%rax); mov (%rax), %al; out %al, $0xf4
    image = load_flat(bytes.fromhex("48b80000002001000000 c60009 8a00 e6f4"))
    try:
        HostMemory(5 << 30).close()
    except OSError as error:
        missing("memory", f"5 GiB can't be promised: {error}")
    with Machine(kvm, image, 5 << 30) as machine:
        assert machine.run(30) == 9
        assert machine.memory.read(0x120000000, 1) == b"\x09"
