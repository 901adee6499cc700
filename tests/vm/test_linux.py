"""`kvmpriv boot` in the kernels of scripts/kernel: each boots itself."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from kvmpriv import trace
from kvmpriv.guest.linux import initrd
from unit.test_linux_image import bzimage
from vm.test_kernels import SCRIPTS, image

HIGH = 4 << 30
#: A kernel that asks KVM_HC_MAP_GPA_RANGE for 16 shared pages at 4 GiB, then at 1 MiB; it ends with
#: the sum of the answers.
ASKS = bytes.fromhex(
    "b80c000000 48bb0000000001000000 b910000000 31d2 0f01d9"  # vmmcall(12, 4 GiB, 16, 0)
    "4989c0 b80c000000 bb00001000 0f01d9"  # and 1 MiB
    "4c01c0 66baf400 ee f4"
)
#: Reads its disk and writes into it, to and beyond its end, and looks for entropy.
DISK_SIZE = (4 << 20) + 3 * 512
WRITTEN_AT, WRITTEN = (4 << 20) - 5, b"by the guest"
DISK = f"""\
echo read $(md5sum </dev/vda) >/dev/ttyS1
printf '{WRITTEN.decode()}' | dd of=/dev/vda bs=1 seek={WRITTEN_AT} && sync
yes | dd of=/dev/vda bs=512 seek={DISK_SIZE // 512 - 1} 2>&1 | grep -o 'No space.*' >/dev/ttyS1
sync
cat /sys/class/misc/hw_random/rng_current >/dev/ttyS1
for turn in 1 2; do dd if=/dev/hwrng bs=64 count=1 | md5sum >/dev/ttyS1; done
poweroff -f"""

DISKS = {"disk": ["--cpus", "2"], "private-disk": ["--private"]}


@dataclass
class Boot:
    """The result of one boot."""

    status: int
    stdout: str
    stderr: str

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.stdout))


class Jobs:
    """Guests to boot, all in one VM."""

    def __init__(self, folder: Path, kernel: Path) -> None:
        self._folder = folder
        self._kernel = kernel
        self._jobs: dict[str, Any] = {}

    def add(
        self,
        name: str,
        script: str,
        *options: str,
        vmlinux: bool = False,
        code: bytes = b"",
        stdin: str = "",
    ) -> None:
        path = self._folder / f"{name}.cpio"
        path.write_bytes(initrd.busybox(script))
        kernel = self._kernel.with_name("vmlinux") if vmlinux else self._kernel
        if code:
            kernel = self._folder / name
            kernel.write_bytes(bzimage(bytes(0x200) + code))
        more = ["--initrd", str(path), "--timeout", "240", "--memory", "256M", *options]
        self._jobs[name] = {"arguments": ["--kernel", str(kernel), *more], "stdin": stdin}

    def run(self, name: str) -> dict[str, Boot]:
        (self._folder / "jobs.json").write_text(json.dumps(self._jobs))
        command: list[str | Path] = [SCRIPTS / "vm", name, "-q", "--timeout", "900"]
        command += ["--output-dir", self._folder, "--", sys.executable]
        done = subprocess.run(
            [*command, ROOT / "tests/vm/boot_jobs.py", self._folder],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        results = json.loads((self._folder / "results.json").read_text())
        return {name: Boot(**result) for name, result in results.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boot")


#: The tests of one kernel's boots run in one process: they share the VM.
KERNELS = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"boots in {name}"))
    for name in ("restrictedmem", "guest_memfd")
]


@pytest.fixture(scope="module", params=KERNELS)
def boots(request: pytest.FixtureRequest, folder: Path) -> Any:
    jobs = Jobs(folder, image(request.param))
    jobs.add(
        "two",
        "read line </dev/console; echo got $line; echo cpus $(nproc) >/dev/ttyS1\n"
        "echo line $line >/dev/ttyS1; cat /proc/interrupts\n"
        "echo exit 7 >/dev/ttyS1; poweroff -f",
        *("--cpus", "2", "--json", "--append", "quiet"),
        *("--trace", str(folder / "two.trace")),
        stdin="from outside\n",
    )
    for kind, options in DISKS.items():
        disk = folder / f"{kind}.disk"
        disk.write_bytes(random.Random(5).randbytes(DISK_SIZE))
        jobs.add(kind, DISK, "--json", "--append", "quiet", "--disk", str(disk), *options)
    jobs.add("vmlinux", "echo here; reboot -f", "--append", "quiet", vmlinux=True)
    jobs.add("panic", "exit 3", "--append", "quiet")
    jobs.add("triple", "reboot -f", "--append", "quiet reboot=t")
    jobs.add("hang", "echo hanging; sleep 1000", "--append", "quiet", "--timeout", "35")
    trace_to = ("--trace", str(folder / "asks.trace"))
    jobs.add("asks", "", "--private", "--json", *trace_to, code=ASKS)
    return jobs.run(request.param)


pytestmark = pytest.mark.timeout(1000)


def test_two_vcpus_a_console_and_a_status(boots: dict[str, Boot]) -> None:
    boot = boots["two"]
    assert boot.status == 7, boot.stderr
    assert boot.report["said"] == ["cpus 2", "line from outside"]
    assert boot.report["outcome"] == {"how": "off", "status": 7, "why": "turned itself off"}
    assert boot.report["kernel"]["kind"] == "bzImage"
    (memory,) = boot.report["memory"]
    assert 16 << 20 < memory.pop("resident") <= 256 << 20
    assert memory == {
        "gpa": 0,
        "size": 256 << 20,
        "kind": "shared",
        "purpose": "RAM",
        "backing": "anonymous memory",
        "share": 1.0,
        "private": 0,
    }
    cost = boot.report["cost"]
    assert all(seconds > 0.05 for seconds in cost["cpu"])
    assert cost["rss"] > cost["shared"] > 0
    assert "got from outside" in boot.stderr  # with --json that is where the console goes
    timer = next(line for line in boot.stderr.splitlines() if line.lstrip().startswith("LOC:"))
    assert all(int(count) > 0 for count in timer.split()[1:3])


def test_a_recording(boots: dict[str, Boot], folder: Path) -> None:
    """The recording has every exit of both vCPUs, and samples of growing memory."""
    recording = trace.read(folder / "two.trace")
    assert not recording.cut_off
    found = trace.summarize(recording)
    counts = [sum(1 for e in recording.events if "exit" in e and e["cpu"] == n) for n in range(2)]
    assert counts == boots["two"].report["cost"]["exits"]
    assert sum(counts) > 500
    assert found.exits["KVM_EXIT_IO"] > 300
    held = [sample["memory"][0]["resident"] for sample in found.samples]
    assert len(held) > 4
    assert held[0] < held[-1]
    assert found.end is not None
    assert (found.end["end"], found.end["status"]) == ("off", 7)
    assert "The guest converted no memory." in "".join(trace.page(recording))


@pytest.mark.parametrize("kind", DISKS)
def test_a_disk_and_entropy(boots: dict[str, Boot], folder: Path, kind: str) -> None:
    boot = boots[kind]
    assert boot.status == 0, boot.stderr
    before = bytearray(random.Random(5).randbytes(DISK_SIZE))
    read, full, source, *random_sums = boot.report["said"]
    assert read.split() == ["read", hashlib.md5(before).hexdigest(), "-"]
    assert full == "No space left on device"
    before[WRITTEN_AT : WRITTEN_AT + len(WRITTEN)] = WRITTEN
    before[-512:] = b"y\n" * 256
    assert (folder / f"{kind}.disk").read_bytes() == before
    assert source == "virtio_rng.0"
    assert len(set(random_sums)) == 2
    assert hashlib.md5(b"").hexdigest() not in "".join(random_sums)
    *_, last = memory = boot.report["memory"]
    if kind == "private-disk":
        assert [part["kind"] for part in memory] == ["shared", "private"]
        assert 1 << 20 < last["private"] <= last["size"]  # what the programs had
        assert last["resident"] < 1 << 20
    else:
        assert [(part["kind"], part["private"]) for part in memory] == [("shared", 0)]


def test_a_vmlinux_that_resets(boots: dict[str, Boot]) -> None:
    boot = boots["vmlinux"]
    assert boot.status == 0, boot.stderr
    assert "here\r\n" in boot.stdout
    assert boot.stderr == ""


def test_a_guest_that_converts(boots: dict[str, Boot], folder: Path) -> None:
    """The guest can convert its private memory; a conversion outside private slots is refused."""
    boot = boots["asks"]
    assert boot.status == -errno.EINVAL & 0xFF, boot.stderr
    recording = trace.read(folder / "asks.trace")
    found = trace.summarize(recording)
    assert found.exits["KVM_EXIT_HYPERCALL"] == 2
    (converted,) = found.conversions
    assert {**converted, "t": 0} == {
        "t": 0,
        "cpu": 0,
        "convert": "shared",
        "gpa": HIGH,
        "size": 16 * 4096,
        "by": "hypercall",
    }
    assert "to shared, by hypercall: 64 KiB" in "\n".join(trace.text(recording))
    assert "conversions by address" in "".join(trace.page(recording))


def test_a_panic(boots: dict[str, Boot]) -> None:
    boot = boots["panic"]
    assert boot.status == 126
    assert boot.stderr.startswith(
        "kvmpriv boot: the guest's kernel panicked: Kernel panic - not syncing: "
        "Attempted to kill init! exitcode=0x00000300"
    )
    assert "Kernel panic" in boot.stdout


def test_a_triple_fault(boots: dict[str, Boot]) -> None:
    boot = boots["triple"]
    assert boot.status == 125
    assert "kvmpriv boot: the guest crashed: vCPU 0: triple fault" in boot.stderr
    assert "rip" in boot.stderr


def test_out_of_time(boots: dict[str, Boot]) -> None:
    boot = boots["hang"]
    assert boot.status == 124
    assert boot.stderr == "kvmpriv boot: the guest was ended: the time limit is reached\n"
    assert "hanging" in boot.stdout


def in_vm(
    name: str,
    folder: Path,
    *command: object,
    options: tuple[str, ...] = (),
    seconds: int = 900,
) -> subprocess.CompletedProcess[str]:
    vm: list[str | Path] = [SCRIPTS / "vm", name, "-q", "--timeout", str(seconds), *options]
    vm += ["--output-dir", folder, "--", sys.executable, *map(str, command)]
    return subprocess.run(vm, capture_output=True, text=True, cwd=ROOT)


def hide_a_marker(name: str, abi: str, folder: Path, *options: str) -> None:
    """A program fills the movable RAM with a marker, and the host finds it nowhere."""
    example = SCRIPTS / "examples/linux_private.py"
    done = in_vm(name, folder, example, image(name), abi, options=options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["abi"] == abi
    assert result["found"]["open"]
    assert result["found"]["secret"] == []
    shared, hidden = result["ranges"]
    assert (shared["kind"], hidden["kind"]) == ("shared", "private")
    assert hidden["gpa"] == HIGH
    assert hidden["resident"] < 1 << 20
    everything = shared["size"] + hidden["size"]
    assert result["filled"] > 0.6 * everything
    assert result["private"] > 0.9 * result["movable"]


@pytest.mark.parametrize("name", ["restrictedmem", "guest_memfd"])
def test_a_marker_in_private_memory(name: str, tmp_path: Path) -> None:
    """What a guest's programs have in private memory the host does not find."""
    hide_a_marker(name, name, tmp_path)


NETWORK = """\
ifconfig eth0 10.88.0.2 netmask 255.255.255.0 up
ping -c 2 10.88.0.1 >/dev/null && echo pong >/dev/ttyS1
nc 10.88.0.1 7000 </dev/null >/tmp/f
nc 10.88.0.1 7000 </tmp/f
echo exit 5 >/dev/ttyS1
poweroff -f"""


@pytest.mark.parametrize(
    ("name", "kind"),
    [("restrictedmem", "private"), ("guest_memfd", "private"), ("guest_memfd", "")],
)
def test_a_network(name: str, kind: str, tmp_path: Path) -> None:
    """Ping works, and TCP in both directions loses and changes no byte."""
    (tmp_path / "net.cpio").write_bytes(initrd.busybox(NETWORK))
    done = in_vm(name, tmp_path, ROOT / "tests/vm/boot_net.py", tmp_path, image(name), kind)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "net.json").read_text())
    assert result["said"] == ["pong"]
    assert (result["outcome"]["how"], result["outcome"]["status"]) == ("off", 5)
    assert (result["size"], result["same"]) == (4 << 20, True)
    assert result["words"] == []
    # Cut into packets by the host's kernel, not by the guest's, whose card's are of 1514 bytes; how
    # long the guest makes them goes by how fast it finds the way.
    assert result["bytes_up"] > 4 << 20
    assert result["bytes_up"] / result["packets_up"] > 1514


#: The driver is bound again between the two turns: it resets the device and sets up new rings.
VHOST = """\
transfer() {
ifconfig eth0 10.88.0.2 netmask 255.255.255.0 up
nc 10.88.0.1 7000 </dev/null >/tmp/f
nc 10.88.0.1 7000 </tmp/f
}
cd /sys/bus/virtio/drivers/virtio_net
for device in virtio*; do :; done
transfer
echo $device >unbind
echo $device >bind
transfer
cat $device/features >/dev/ttyS1
echo exit 5 >/dev/ttyS1
poweroff -f"""
F_MRG_RXBUF, F_GUEST_TSO4, F_EVENT_INDEX = 15, 7, 29


@pytest.mark.parametrize(("name", "kind"), [("restrictedmem", "private"), ("guest_memfd", "")])
def test_vhost(name: str, kind: str, tmp_path: Path) -> None:
    """The kernel moves the packets if it can; the guest sees no difference if it can't."""
    (tmp_path / "vhost.cpio").write_bytes(initrd.busybox(VHOST))
    done = in_vm(name, tmp_path, ROOT / "tests/vm/boot_vhost.py", tmp_path, image(name), kind)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "vhost.json").read_text())
    for way, result in found.items():
        (features,) = result["said"]
        accepted = {bit for bit, value in enumerate(features) if value == "1"}
        assert {F_MRG_RXBUF, F_GUEST_TSO4, F_EVENT_INDEX} <= accepted, way
        assert (result["outcome"]["how"], result["outcome"]["status"]) == ("off", 5), way
        assert result["same"] == [True, True], way
        assert result["still"], "packets moved while the guest was paused"
        assert result["threads_left"] == [], way
        assert result["fds_left"] == 0, way
        assert not result["engaged_in_pause"], way
        assert not result["after_run"], way
    kernel, process, refused = (found[way] for way in ("kernel", "process", "refused"))
    assert kernel["engaged"]
    assert len(kernel["threads"]) == 1
    assert kernel["status"] == 1, "as a driver reads it when the kernel has raised the interrupt"
    assert kernel["words"] == []
    assert "virtio-net (vhost)" in kernel["devices"]
    assert not process["engaged"]
    assert process["threads"] == []
    assert process["words"] == []
    assert "virtio-net" in process["devices"]
    assert not refused["engaged"]
    words = (
        "virtio-net (vhost): vhost can't be used: VHOST_NET_SET_BACKEND: Operation not permitted;"
        " this process serves its queues"
    )
    assert refused["words"] == [words] * 2, "each time that the driver starts"
    assert words in refused["marks"]
