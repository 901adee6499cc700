"""``kvmpriv probe`` on the real machine: its output, its exit status, and what goes wrong."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pty
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import kvmpriv
from conftest import ROOT
from kvmpriv.cdefs import kvm as cdefs
from kvmpriv.private.restrictedmem import ask_memfd_restricted
from kvmpriv.probe import VERDICTS, Report, probe, profiles
from kvmpriv.probe.records import FAIL, PASS, SKIP
from private.support.leaks import open_fds
from private.support.requirements import missing

SCHEMA = json.loads((ROOT / "kvmpriv/probe/schema.json").read_text())
NOBODY = 65534


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **options.pop("environment", {})}
    return subprocess.run(
        [sys.executable, "-m", "kvmpriv", "probe", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        **options,
    )


def run_as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same without root's rights.

    All is imported before, as root's Python may not be readable to others.
    """
    code = (
        "import grp, json, os, pathlib, shutil, sys, kvmpriv.probe.profiles, psutil;"
        "from kvmpriv.cli import main;"
        f"os.geteuid() or (os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY}));"
        f"sys.exit(main({['probe', *arguments]!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def status_of(found: Report) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


def result_of(found: Report, name: str) -> str:
    return next(check.result for check in found.checks if check.name == name)


def of_json(process: subprocess.CompletedProcess[str]) -> Report:
    document = json.loads(process.stdout)
    jsonschema.validate(document, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert document["exit_status"] == process.returncode
    return Report.from_json(document)


# -- what it says ------------------------------------------------------------------------------


def test_text_and_status(kvm: kvmpriv.Kvm) -> None:
    process = run()
    lines = process.stdout.splitlines()
    assert lines[0] in VERDICTS
    assert process.returncode == (0 if lines[0] in ("v9 usable", "guest_memfd private") else 1)
    assert process.stderr == ""
    assert "  [ PASS ] device          open /dev/kvm: API version 12" in lines
    assert "  [ PASS ] default         KVM_CREATE_VM(0): made" in lines
    slots = kvm.check_extension(cdefs.KVM_CAP_NR_MEMSLOTS)
    assert f"  memory slots of a VM     {slots}" in lines
    assert "\x1b" not in process.stdout


def test_json_is_the_text(kvm: kvmpriv.Kvm) -> None:
    found = of_json(run("--json"))
    assert found.holders is None
    assert found.host["vcpus"] is not None
    assert found.host["vcpus"]["max"] == kvm.check_extension(cdefs.KVM_CAP_MAX_VCPUS)
    text = run().stdout.splitlines()
    assert text[0] == found.verdict
    badges = [line.split("]")[0].split("[")[1].strip() for line in text if " ]" in line]
    assert badges == [check.status for check in found.checks]


def test_quiet(kvm: kvmpriv.Kvm) -> None:
    process = run("-q")
    assert process.stdout.strip() in VERDICTS
    assert process.stdout.count("\n") == 1
    assert process.returncode == run().returncode


def test_usage() -> None:
    for arguments in (["--json", "-q"], ["--no-such-option"], ["--device"]):
        process = run(*arguments)
        assert process.returncode == 2, arguments
        assert process.stdout == ""
        assert process.stderr.startswith("usage: ")


def test_findings_agree_with_kvm(kvm: kvmpriv.Kvm) -> None:
    """Each finding agrees with the same call made here."""
    found = probe()
    status = status_of(found)
    with kvm.create_vm() as vm:
        try:
            with kvmpriv.private.guest_memfd.GuestMemfd(vm, 4096):
                expected = PASS
        except OSError:
            expected = FAIL
        assert status["guest_memfd/default/file"] == expected
        converted = _errno(
            lambda: kvmpriv.private.guest_memfd.set_memory_attributes(vm, 0x100000, 4096, 8)
        )
        if expected == PASS:
            assert status["guest_memfd/default/conversion"] == (FAIL if converted else PASS)
            if converted:
                name = errno.errorcode[converted]
                assert result_of(found, "guest_memfd/default/conversion") == name
    answer = ask_memfd_restricted()
    undecided = found.host["seccomp"] and answer not in (errno.EINVAL, errno.EBADF)
    expected = PASS if answer == errno.EINVAL else SKIP if undecided else FAIL
    assert status["v9/syscall"] == expected
    if status["v9/syscall"] == FAIL:
        assert status["v9/file"] == status["v9/default/slot"] == SKIP


def _errno(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


# -- profiles ----------------------------------------------------------------------------------

ALL_PROFILES = ",".join(profiles.available(profiles.BUILT_IN))


def test_profiles(kvm: kvmpriv.Kvm) -> None:
    """Text, -q, the document and the exit status agree; --for may be given again."""
    first, _, rest = ALL_PROFILES.partition(",")
    documents = run("--json", "--for", first, "--for", rest)
    found = of_json(documents)
    judged = json.loads(documents.stdout)["profiles"]
    lines = [f"{one['name']}: {one['verdict']}" for one in judged]
    assert [one["name"] for one in judged] == ALL_PROFILES.split(",")
    quiet = run("-q", "--for", ALL_PROFILES)
    assert quiet.stdout.splitlines() == lines
    text = run("--for", ALL_PROFILES)
    assert [line for line in text.stdout.splitlines() if line in lines] == lines
    assert quiet.returncode == text.returncode == documents.returncode == 1
    assert text.stderr == ""
    for one in judged:  # each alone has its own exit status
        assert run("-q", "--for", one["name"]).returncode == (one["verdict"] != "usable")
    status = status_of(found)
    for need in (need for one in judged for need in one["needs"]):
        assert (need["status"] == PASS) == (status[need["finding"]] == PASS)


def test_profile_of_ones_own(kvm: kvmpriv.Kvm, tmp_path: Path) -> None:
    path = tmp_path / "mine.profile"
    good = "summary = a VM\nsource = me | x | 1 | 2026-11-27\ntypes = default\nrequire = {} | why\n"
    path.write_text(good.format("kvm/device"))
    process = run("-q", "--for", "mine", "--profiles", str(tmp_path))
    assert (process.returncode, process.stdout) == (0, "mine: usable\n")
    listed = run("--for", "help", "--profiles", str(tmp_path))
    assert (listed.returncode, listed.stdout.splitlines()[-2:]) == (0, ["mine", "    a VM"])
    assert run("--profiles", str(tmp_path)).stdout == listed.stdout
    path.write_text(good.format("kvm/devise"))
    process = run("--json", "--for", "mine", "--profiles", str(tmp_path))
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == (
        f"kvmpriv probe: {path}:4: no check of the probe has the name 'kvm/devise';"
        " did you mean 'kvm/device'?\n"
    )
    process = run("--for", "nonesuch")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("kvmpriv probe: there is no profile 'nonesuch': cloud-")


def test_profiles_of_a_starved_probe(kvm: kvmpriv.Kvm) -> None:
    process = run("-q", "--for", "v9", "--device", "/nonexistent")
    assert (process.returncode, process.stdout) == (3, "v9: could not probe\n")
    assert process.stderr.startswith("kvmpriv probe: could not probe: open /nonexistent: ENOENT")
    filtered = seccomp(_SYS_IOCTL, _ERRNO | errno.EMFILE, cdefs.KVM_CREATE_VM)
    process = run("--json", "--for", ALL_PROFILES, preexec_fn=filtered)
    assert {one["verdict"] for one in json.loads(process.stdout)["profiles"]} == {"could not probe"}
    assert of_json(process).exit_status == process.returncode == 3


def test_profiles_as_nobody() -> None:
    """Nothing raises, whether this user may open the device or not."""
    process = run_as_nobody("-q", "--for", ALL_PROFILES)
    assert process.returncode in (1, 3)
    assert "Traceback" not in process.stderr
    assert len(process.stdout.splitlines()) == ALL_PROFILES.count(",") + 1


# -- terminals and locales ---------------------------------------------------------------------


def on_a_terminal(**environment: str) -> str:
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as reader:  # noqa: PTH123  # a descriptor, not a path
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmpriv", "probe"],
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, **environment},
        )
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # EIO: the other end is closed
            while chunk := reader.read(4096):
                shown += chunk
        process.wait()
    return shown.decode("ascii")


def test_colour_on_a_terminal_alone() -> None:
    coloured = on_a_terminal(TERM="xterm")
    assert "\x1b[3" in coloured
    assert "\x1b[" not in on_a_terminal(TERM="xterm", NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal(TERM="dumb")
    assert "\x1b[3" in on_a_terminal(TERM="xterm", NO_COLOR="")  # no-color.org: empty is unset


def test_no_locale() -> None:
    process = run(
        "--device",
        "/nonexistent/kvm-ü",
        environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert process.returncode == 3
    assert "Traceback" not in process.stderr
    assert process.stdout.isascii()


# -- what is missing ---------------------------------------------------------------------------


def could_not_probe(
    process: subprocess.CompletedProcess[str], *words: str, facts: bool = True
) -> Report:
    assert process.returncode == 3
    assert process.stderr.startswith("kvmpriv probe: could not probe: ")
    assert process.stderr.count("\n") == 1
    for word in words:
        assert word in process.stderr
    found = of_json(process)
    assert found.verdict == "could not probe"
    assert found.host["kernel"]
    assert found.host["vcpus"] is None or not facts  # as KVM could not be asked
    return found


def test_no_device_node(tmp_path: Path) -> None:
    found = could_not_probe(run("--json", "--device", str(tmp_path / "kvm")), "ENOENT")
    assert status_of(found)["kvm/device"] == FAIL


def test_no_stderr(tmp_path: Path) -> None:
    process = run("-q", "--device", str(tmp_path / "kvm"), preexec_fn=lambda: os.close(2))
    assert (process.returncode, process.stdout) == (3, "could not probe\n")


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "{folder}/file"])
def test_device_that_is_not_kvm(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    device = path.format(folder=tmp_path)
    found = could_not_probe(run("--json", "--device", device), "ENOTTY", "not KVM")
    assert status_of(found)["kvm/device"] == FAIL


def test_device_that_is_a_folder(tmp_path: Path) -> None:
    found = could_not_probe(run("--json", "--device", str(tmp_path)), "EISDIR", "not KVM")
    assert status_of(found)["kvm/device"] == FAIL


def test_not_permitted() -> None:
    """A user who is not in the node's group gets the right hint."""
    node = Path("/dev/kvm")
    open_to_us = os.geteuid() != 0 and os.access(node, os.R_OK | os.W_OK)
    if open_to_us or not node.exists() or node.stat().st_mode & stat.S_IWOTH:
        node = Path("/etc/shadow")  # any that this user may not open
    process = run_as_nobody("--json", "--device", str(node))
    assert status_of(could_not_probe(process, "EACCES", "usermod -aG"))["kvm/device"] == FAIL


# -- seccomp -----------------------------------------------------------------------------------

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LD_W_ABS, _JEQ_K, _RET_K = 0x20, 0x15, 0x06
_SYS_IOCTL = 16


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


def seccomp(number: int, action: int, argument: int | None = None) -> Callable[[], None]:
    """For preexec_fn: `action` for system call `number`, with `argument` as its second if given.

    Offsets 0 and 24 of struct seccomp_data: nr, and the low half of args[1].
    """
    instructions = [(_LD_W_ABS, 0, 0, 0), (_JEQ_K, 0, 1, number), (_RET_K, 0, 0, action)]
    if argument is not None:
        instructions[1:2] = [
            (_JEQ_K, 0, 3, number),
            (_LD_W_ABS, 0, 0, 24),
            (_JEQ_K, 0, 1, argument),
        ]
    instructions.append((_RET_K, 0, 0, _ALLOW))
    array = (_Instruction * len(instructions))(*(_Instruction(*each) for each in instructions))
    program = _Program(len(instructions), array)
    libc = ctypes.CDLL(None, use_errno=True)

    def install() -> None:
        assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        assert libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0

    return install


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        (_ERRNO | errno.EPERM, "EPERM"),
        (_ERRNO | errno.ENOSYS, "ENOSYS"),
        (_KILL_PROCESS, "killed by SIGSYS"),
    ],
)
def test_filter_that_hides_the_system_call(kvm: kvmpriv.Kvm, action: int, answer: str) -> None:
    """The system call is undecided, not absent; the probe survives a filter that kills."""
    found = of_json(run("--json", preexec_fn=seccomp(451, action)))
    assert found.host["seccomp"] == 2
    check = next(check for check in found.checks if check.name == "v9/syscall")
    assert (check.status, check.result) == (SKIP, f"{answer}, undecided")
    assert "seccomp" in check.hint
    assert status_of(found)["v9/file"] == SKIP
    assert status_of(found)["vm/default"] == PASS  # the rest is probed all the same


def test_filter_that_lets_the_system_call_pass(kvm: kvmpriv.Kvm) -> None:
    """The twin: without a filter the child gets the kernel's answer."""
    found = of_json(run("--json", preexec_fn=seccomp(452, _KILL_PROCESS)))
    assert found.host["seccomp"] == 2
    answer = result_of(probe(), "v9/syscall")
    undecided = answer == "ENOSYS"
    assert result_of(found, "v9/syscall") == (f"{answer}, undecided" if undecided else answer)
    decided = status_of(probe())["v9/syscall"]
    assert status_of(found)["v9/syscall"] == (SKIP if undecided else decided)


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (cdefs.KVM_GET_API_VERSION, "kvm/device"),
        (cdefs.KVM_CREATE_VM, "vm/default"),
        (cdefs.KVM_CHECK_EXTENSION, "kvm/ioctl"),
    ],
)
def test_filter_that_refuses_an_ioctl(kvm: kvmpriv.Kvm, request_: int, name: str) -> None:
    process = run("--json", preexec_fn=seccomp(_SYS_IOCTL, _ERRNO | errno.EPERM, request_))
    assert process.returncode == 3
    assert process.stderr.startswith("kvmpriv probe: could not probe: ")
    check = next(check for check in of_json(process).checks if check.name == name)
    assert (check.status, check.result) == (FAIL, "EPERM")
    assert "seccomp" in check.hint


def test_ignored_sigchld(kvm: kvmpriv.Kvm) -> None:
    """If the parent process ignores SIGCHLD, only the child's answer is lost."""

    def prepare() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        seccomp(452, _KILL_PROCESS)()

    found = of_json(run("--json", preexec_fn=prepare))
    assert result_of(found, "v9/syscall") == "ECHILD, undecided"
    assert status_of(found)["vm/default"] == PASS


# -- what it leaves behind ---------------------------------------------------------------------


def test_nothing_is_left_open(kvm: kvmpriv.Kvm, no_leak: Callable[[], None]) -> None:
    for _ in range(3):
        assert probe().checks
    probe("/dev/null")
    probe("/nonexistent")


def test_descriptors_that_run_out(kvm: kvmpriv.Kvm, no_leak: Callable[[], None]) -> None:
    """Each step lacks a descriptor once: no exception, and nothing is left open."""
    probe()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = os.dup(0)  # the lowest that is free
    os.close(first)
    refused = set()
    try:
        for more in range(8):
            resource.setrlimit(resource.RLIMIT_NOFILE, (first + more, hard))
            found = probe()
            refused |= {check.name for check in found.checks if check.shortage == "EMFILE"}
            assert found.verdict != "none"
            assert (found.exit_status == 3) == (found.verdict == "could not probe")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {"kvm/device", "vm/default"} <= refused
    if status_of(found)["guest_memfd/default/file"] == PASS:
        assert "guest_memfd/default/file" in refused


def limited(which: int, limit: int) -> Callable[[], None]:
    """For preexec_fn."""
    return lambda: resource.setrlimit(which, (limit, limit))


def test_starvation_table(kvm: kvmpriv.Kvm) -> None:
    """Every number of descriptors, from that with which Python starts to that which is enough.

    The first line, -q, the document and the exit status agree, and a shortage is never a verdict
    about KVM.
    """
    enough = run("--json")
    verdict, table = of_json(enough).verdict, {}
    for limit in range(3, 32):
        starved = limited(resource.RLIMIT_NOFILE, limit)
        python = [sys.executable, "-c", "import argparse, ctypes, json, mmap, signal"]
        if subprocess.run(python, preexec_fn=starved, capture_output=True).returncode:
            continue
        answers = [run(*form, preexec_fn=starved) for form in ((), ("-q",), ("--json",))]
        found = of_json(answers[2])
        assert {answer.returncode for answer in answers} == {found.exit_status}, limit
        for answer in answers[:2]:
            assert answer.stdout.splitlines()[0] == found.verdict, limit
        if found.exit_status == 3:
            assert found.verdict == "could not probe"
            for answer in answers:
                assert f"this process may have {limit} files open (RLIMIT_NOFILE)" in answer.stderr
        else:
            assert (found.verdict, answers[0].stderr) == (verdict, "")
        assert all(check.status == SKIP for check in found.checks if check.shortage)
        table[limit] = found.verdict
        if not any(check.shortage for check in found.checks):
            break
    verdicts = list(table.values())
    assert (verdicts[0], verdicts[-1]) == ("could not probe", verdict)
    assert len(table) > 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("request_", [cdefs.KVM_CREATE_VM, cdefs.KVM_CHECK_EXTENSION])
def test_kvm_that_lacks_something(kvm: kvmpriv.Kvm, request_: int, number: int) -> None:
    """KVM itself returns the error: a filter does so here."""
    filtered = seccomp(_SYS_IOCTL, _ERRNO | number, request_)
    process = run("--json", preexec_fn=filtered)
    name = errno.errorcode[number]
    assert name in {check.shortage for check in could_not_probe(process, name, facts=False).checks}
    assert run("-q", preexec_fn=filtered).stdout == "could not probe\n"


def test_no_memory(kvm: kvmpriv.Kvm) -> None:
    """Less and less address space: the right verdict, or exit status 3 with a reason.

    Limits in KiB.  A process may also fail to load kvmpriv, with Python's exit status.
    """
    verdict = probe().verdict
    reached = 0
    for limit in (*range(40 << 10, 20 << 10, -1024), *range(20 << 10, 0, -64)):
        process = run("-q", preexec_fn=limited(resource.RLIMIT_AS, limit << 10))
        if process.returncode == 3:
            assert process.stdout in ("could not probe\n", ""), limit
            assert "memory" in process.stderr, limit
        elif "Traceback" not in process.stderr:
            assert process.stdout == f"{verdict}\n", limit
            reached += 1
        else:
            assert process.stdout == "", limit
            break
    assert reached


def test_no_more_memory_once_loaded(kvm: kvmpriv.Kvm) -> None:
    """Exit status 3 with a reason; the twin may have 64 MiB more than it has, and succeeds."""
    code = (
        "import contextlib, io, resource, sys; from kvmpriv.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['probe', '-q'])\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = held + int(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(main(['probe', '-q']))"
    )

    def with_more(size: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(size)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    refused, twin = with_more(0), with_more(64 << 20)
    assert refused.returncode == 3
    assert refused.stdout in ("could not probe\n", "")  # KVM lacked memory, or the interpreter
    assert "memory" in refused.stderr
    assert "ulimit -v" in refused.stderr
    assert twin.stdout == f"{probe().verdict}\n"
    assert (twin.returncode, twin.stderr) == (run("-q").returncode, "")


@pytest.mark.parametrize("hard", [1, 2])
def test_no_cpu_time(kvm: kvmpriv.Kvm, hard: int) -> None:
    """The limit is 1 s, and half of it is used before: `ulimit -t 1`, and a lower soft limit."""
    code = (
        "import json, resource, sys, time; from kvmpriv.cli import main;"
        "import kvmpriv.commands.probe; kvmpriv.commands.probe._TO_PRINT = 0.6;"
        f"resource.setrlimit(resource.RLIMIT_CPU, (1, {hard}))\n"
        "while time.process_time() < 0.5: pass\n"
        "sys.exit(main(['probe', *sys.argv[1:]]))"
    )
    for form in ("-q", "--json"):
        process = subprocess.run(
            [sys.executable, "-c", code, form], capture_output=True, text=True, cwd=ROOT
        )
        assert process.returncode == 3
        assert "this process may use 1 s of CPU time (RLIMIT_CPU)" in process.stderr
        if form == "-q":
            assert process.stdout == "could not probe\n"
        else:
            assert of_json(process).verdict == "could not probe"


def test_enough_cpu_time(kvm: kvmpriv.Kvm) -> None:
    process = run("-q", preexec_fn=limited(resource.RLIMIT_CPU, 60))
    assert process.stdout == f"{probe().verdict}\n"


def test_resident_memory() -> None:
    """Under 40 MiB.  Not ru_maxrss: after fork and exec that begins with the parent's."""
    code = (
        "from kvmpriv.cli import main; main(['probe', '-q']);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])  # KiB"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 0 < int(process.stdout.split()[-1]) < 40 * 1024


def test_heavy_modules_stay_out() -> None:
    code = (
        "import sys; from kvmpriv.cli import main; main(['probe', '-q']);"
        "heavy = {'json', 'psutil', 'subprocess', 'dataclasses', 'cffi', 'pycparser', 'tempfile'};"
        "heavy |= {'kvmpriv.probe.profiles', 'kvmpriv.cdefs.enums', 'kvmpriv.cdefs.unmerged'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout.splitlines()[-1] == "[]"


# -- the formats of fleets ---------------------------------------------------------------------


def test_ansible_reads_the_fact(kvm: kvmpriv.Kvm, tmp_path: Path) -> None:
    """As a link that Ansible executes, whatever the verdict is, and as a file that --output wrote.

    tests/unit/test_probe_formats.py has the other formats.
    """
    programs = Path(sys.executable).parent
    if not (programs / "ansible").exists():
        missing("ansible", f"there is no {programs / 'ansible'}: pip install ansible-core")
    facts = tmp_path / "facts.d"
    facts.mkdir()
    (facts / "kvmpriv.fact").symlink_to(programs / "kvmpriv")
    written = facts / "written.fact"
    status = run("--format", "ansible", "--output", str(written)).returncode
    arguments = ["-m", "setup", "-a", f"fact_path={facts} gather_subset=!all,!min,local"]
    process = subprocess.run(
        [programs / "ansible", "localhost", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "HOME": str(tmp_path),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false",
            "ANSIBLE_NOCOLOR": "1",
            "LC_ALL": "C.UTF-8",
        },
    )
    assert process.returncode == 0, process.stderr
    _, _, document = process.stdout.partition(" => ")
    local = json.loads(document)["ansible_facts"]["ansible_local"]
    expected = probe()
    for fact in (local["kvmpriv"], local["written"]):
        assert fact["exit_status"] == status
        assert fact["private_memory"] == (status == 0)
        assert fact["verdict"] == expected.verdict
        checks = {name: check["status"] for name, check in fact["checks"].items()}
        assert checks == status_of(expected)
    assert local["kvmpriv"]["checks"]["kvm/device"]["result"] == "API version 12"


def test_a_full_disk_loses_nothing(kvm: kvmpriv.Kvm, tmp_path: Path) -> None:
    """A limit of the file's size stands for a disk that is full."""
    out = tmp_path / "kvmpriv.prom"
    out.write_text("the old one")
    arguments = ("--format", "prometheus", "--output", str(out))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # noqa: E731
    process = run(*arguments, preexec_fn=limit)
    assert (process.returncode, process.stdout) == (3, "")
    assert process.stderr == f"kvmpriv probe: {out}: File too large\n"
    assert out.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [out]
    run(*arguments)
    assert out.read_text().startswith("# HELP kvmpriv_")


# -- users of the device -----------------------------------------------------------------------


def own_counts() -> dict[str, int]:
    """What `--verbose` counts, for this process: other tests may have left something open."""
    links = list(open_fds().values())
    vcpus = sum(link.startswith("anon_inode:kvm-vcpu:") for link in links)
    devices, vms = links.count("/dev/kvm"), links.count("anon_inode:kvm-vm")
    return {"devices": devices, "vms": vms, "vcpus": vcpus}


def test_holders(kvm: kvmpriv.Kvm) -> None:
    """This process has KVM, a VM and two vCPUs open while another probes; others may, too."""

    def mine() -> dict[str, object]:
        found = of_json(run("--json", "--verbose"))
        assert found.holders is not None
        (holder,) = [p for p in found.holders["processes"] if p["pid"] == os.getpid()]
        return {**holder}

    before = own_counts()
    with kvm.create_vm() as vm, vm.create_vcpu(0), vm.create_vcpu(1):
        counts = own_counts()
        assert counts["vms"] == before["vms"] + 1
        assert counts["vcpus"] >= before["vcpus"] + 2
        holder = mine()
        assert holder.items() >= counts.items()
        text = run("--verbose").stdout
        shown = "descriptors of {devices} devices, {vms} VMs, {vcpus} vCPUs".format(**counts)
        assert f"({os.getpid()}, {holder['user']}): {shown}" in text
    assert own_counts() == before
    assert mine().items() >= before.items()


def test_holders_that_may_not_be_read() -> None:
    if os.geteuid() != 0:
        missing("root", "only root can be another user")
    found = of_json(run_as_nobody("--json", "--verbose"))
    assert found.holders is not None
    assert found.holders["unknown"] >= 1
    assert os.getpid() not in {p["pid"] for p in found.holders["processes"]}
