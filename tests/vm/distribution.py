"""Debian as a guest: runs in a VM, as test_distribution.py starts it.

    pytest tests/vm/distribution.py --linux-kernel FOLDER/vmlinuz

FOLDER has what scripts/distribution makes: root.img, into which the guests write, and initrd.img.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmpriv.guest.linux import GuestDied, LinuxGuest, ProtocolError, load_linux
from kvmpriv.guest.linux.disk import Block, Entropy
from kvmpriv.guest.linux.modules import DRIVERS

MIB = 1 << 20
MEMORY = 768 * MIB
#: A quarter of it is for the kernel and for its initrd, which it can't have in the private part.
PRIVATE_MEMORY = 1536 * MIB
#: Seconds in which Debian boots, and in which it shuts down, in an emulation of an emulation.
BOOTS, ENDS = 500, 240
ROOT = "root=/dev/vda rw"
# The guest puts the text together, so that the host never had it.
PROGRAM = r"""
text="only the guest"" knows this. "
while [ ${#text} -lt 200000 ]; do text="$text$text"; done
echo ${#text}
read -r line
"""
SECRET = b"only the guest knows this. " * 64


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    """Where Debian is."""
    return Path(request.config.getoption("--linux-kernel")).parent


def debian(folder: Path, **options: Any) -> LinuxGuest:
    return LinuxGuest(
        folder / "vmlinuz",
        initrd=folder / "initrd.img",
        memory=PRIVATE_MEMORY if "private" in options else MEMORY,
        cmdline=f"quiet {ROOT}",
        devices=[Entropy(), Block(folder / "root.img")],
        timeout=BOOTS,
        **options,
    )


def timed(what: str, call: Callable[[], Any]) -> Any:
    began = time.monotonic()
    result = call()
    print(f"{what}: {time.monotonic() - began:.1f} s")
    return result


def test_shared(folder: Path, tmp_path: Path) -> None:
    """Commands, files and a terminal in Debian's root file system; poweroff ends it with 0."""
    guest = debian(folder)
    try:
        timed("ready", guest.start)
        # Ready is: the root file system is Debian's, whatever has been started already.
        assert b"ID=debian\n" in guest.get("/etc/os-release")
        assert guest.run("mountpoint /").returncode == 0
        assert guest.run("cat /proc/1/comm", text=True).stdout == "systemd\n"
        wait = ["systemctl", "is-system-running", "--wait"]
        done = timed("multi-user", lambda: guest.run(wait, text=True, timeout=BOOTS))
        failed = guest.run("systemctl --failed; systemctl list-jobs", text=True).stdout
        assert (done.returncode, done.stdout) == (0, "running\n"), failed
        assert guest.run(["systemctl", "is-active", "multi-user.target"]).stdout == b"active\n"

        done = guest.run("cat; echo err >&2; exit 3", input="in", text=True)
        assert (done.returncode, done.stdout, done.stderr) == (3, "in", "err\n")
        assert guest.run("kill -9 $$").returncode == -signal.SIGKILL
        assert guest.run(["dpkg", "--print-architecture"]).stdout == b"amd64\n"
        assert guest.run("df --output=source / | tail -1").stdout.strip() in (
            b"/dev/vda",
            b"/dev/root",
        )
        with pytest.raises(subprocess.TimeoutExpired):
            guest.run(["sleep", "1000"], timeout=3)
        data = random.Random(7).randbytes(3 * MIB + 5)
        guest.put(data, "/root/data", mode=0o700)
        assert guest.get("/root/data") == data
        guest.get("/etc/dpkg", tmp_path / "dpkg")
        assert (tmp_path / "dpkg/origins/debian").is_file()
        with pytest.raises(ProtocolError, match="that leads to b'/lib/systemd/system/"):
            guest.get("/etc/systemd", tmp_path / "systemd")
        assert not (tmp_path / "systemd").exists()
        with guest.popen(["/bin/bash"], terminal=(30, 90)) as bash:
            bash.stdin.write(b"stty size; tty; exit 4\n")
            bash.stdin.flush()
            shown = bash.stdout.read()
            assert bash.wait(60) == 4
        assert b"30 90\r\n" in shown, shown
        assert b"/dev/pts/" in shown, shown
        power_off(guest)
        assert is_clean(folder)
    finally:
        print(guest.console.decode(errors="replace")[-3000:])
        guest.close()


def power_off(guest: LinuxGuest) -> None:
    """Debian's own way to turn itself off; the machine is off then, and the status is 0."""
    assert guest.run(["poweroff"], timeout=ENDS).returncode == 0
    outcome = timed("poweroff", lambda: guest.wait(ENDS))
    assert outcome is not None, "it is still on"
    assert (outcome.how, outcome.status) == ("off", 0)
    with pytest.raises(GuestDied):
        guest.run("true")


def is_clean(folder: Path) -> bool:
    """Whether the file system was unmounted, which systemd does after its services have ended."""
    program = shutil.which("dumpe2fs", path="/usr/sbin:/sbin:/usr/bin") or "dumpe2fs"
    command = [program, "-h", str(folder / "root.img")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "has_journal" in shown
    return "needs_recovery" not in shown


def dump(folder: Path, path: str, to: Path) -> None:
    """Copy a file out of the disk's file system, which need not be mounted for it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    program = shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin") or "debugfs"
    command = [program, "-R", f"dump {path} {to}", str(folder / "root.img")]
    subprocess.run(command, check=True, capture_output=True)
    assert to.stat().st_size > 0, path


def test_stock_kernel(folder: Path) -> None:
    """Debian's kernel without an initrd: its drivers come from this machine's /lib/modules."""
    release = load_linux((folder / "vmlinuz").read_bytes()).version
    here = Path("/lib/modules") / release
    there = f"/usr/lib/modules/{release}"
    if not here.exists():  # this VM's root file system can be written, and is thrown away
        dump(folder, f"{there}/modules.dep", here / "modules.dep")
        for line in (here / "modules.dep").read_text().splitlines():
            path, _, needs = line.partition(":")
            if Path(path).name.partition(".")[0].replace("-", "_") in DRIVERS:
                for name in (path, *needs.split()):
                    dump(folder, f"{there}/{name}", here / name)
    guest = LinuxGuest(folder / "vmlinuz", memory=256 * MIB, devices=[Entropy()], timeout=BOOTS)
    with guest:
        assert guest.run(["uname", "-r"], text=True).stdout == f"{release}\n"
        assert b"virtio_console" in guest.get("/proc/modules")
        assert guest.get("/sys/class/misc/hw_random/rng_current") == b"virtio_rng.0\n"
    shutil.rmtree(here)
    with pytest.raises(GuestDied, match="the agent finds no port: this kernel needs") as died:
        LinuxGuest(folder / "vmlinuz", memory=256 * MIB, timeout=BOOTS).start()
    assert died.value.outcome.how == "off"


def test_private(folder: Path) -> None:
    """The same disk again, in private memory: what a program there has, the host can't read."""
    guest = debian(folder, private=True)
    try:
        timed("ready", guest.start)
        assert guest.machine.abi is not None
        assert b"ID=debian\n" in guest.get("/etc/os-release")
        with guest.popen(["/bin/bash", "-c", PROGRAM], text=True) as program:
            assert int(program.stdout.readline()) >= 200_000
            *_, last = guest.machine.usage()  # the search makes all that it reads resident
            secret = guest.machine.search(SECRET)
            shown = guest.machine.search(ROOT.encode())
            used = movable_use(guest)
            program.stdin.write("\n")
            program.stdin.close()
            assert program.wait(60) == 0
        assert secret == []
        assert shown != [], "the search finds nothing at all"
        assert last.range.kind == "private"
        assert last.resident < MIB
        # KVM's statistics are of all memory, and its shared quarter is larger than what they have.
        assert 16 * MIB < used < last.range.size
        outcome = timed("shutdown", lambda: guest.shutdown(ENDS))
        assert (outcome.how, outcome.status) == ("off", 0)
        assert is_clean(folder)
    finally:
        print(guest.console.decode(errors="replace")[-3000:])
        guest.close()


def movable_use(guest: LinuxGuest) -> int:
    """The bytes that the guest's kernel uses of the zone for applications, which is private."""
    zones = guest.run(["cat", "/proc/zoneinfo"], text=True).stdout
    zone = re.split(r"zone +Movable", zones)[1]
    free, managed = (int(re.findall(rf"{name} +(\d+)", zone)[0]) for name in ("free", "managed"))
    return (managed - free) * 4096


def test_console(folder: Path) -> None:
    """`kvmpriv boot` without an agent: the console asks for a login; poweroff ends it with 0."""
    command = [sys.executable, "-m", "kvmpriv", "boot", "--kernel", f"{folder}/vmlinuz"]
    command += ["--initrd", f"{folder}/initrd.img", "--disk", f"{folder}/root.img"]
    command += ["--append", f"quiet {ROOT}", "--memory", "768M", "--timeout", str(BOOTS + ENDS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as boot:
        assert boot.stdin is not None
        assert boot.stdout is not None
        shown = b""
        for wanted, typed in ((rb"login: ", b"root\n"), (rb"root@\S+# ", b"poweroff\n")):
            while not re.search(wanted, shown):
                data = os.read(boot.stdout.fileno(), 4096)
                assert data, shown[-3000:]
                shown += data
            boot.stdin.write(typed)
            boot.stdin.flush()
            shown = b""
        status = boot.wait(ENDS)
    assert status == 0
