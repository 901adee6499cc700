"""Profiles: what their files may be, and their verdicts on recorded hosts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from kvmpriv.probe import Check, Group, Report, Step, formats, profiles, report
from kvmpriv.probe.host import facts
from kvmpriv.probe.records import FAIL, PASS, SKIP

RECORDED = Path(__file__).parent / "recorded"
HOSTS = ("host", "guest_memfd", "restrictedmem")
NAMES = profiles.available(profiles.BUILT_IN)


def recorded(name: str) -> Report:
    """A real host.  Each file says how it was made."""
    file = json.loads((RECORDED / f"{name}.json").read_text())
    assert file["made"]
    return Report.from_json(file["document"])


def judged(profile: str, host: Report) -> profiles.Judgement:
    (found,) = profiles.find([profile])
    return profiles.judge(found, host)


def unmet(judgement: profiles.Judgement) -> set[str]:
    return {one.finding for one in judgement.needs if one.status != PASS and not one.need.wish}


# -- verdicts ----------------------------------------------------------------------------------

NO_SNP, NO_TDX = {"vm/snp"}, {"vm/tdx"}
GMEM = "guest_memfd/default/"
V9 = {"v9/syscall", "v9/capability", "v9/file", "v9/default/slot", "v9/default/conversion"}

#: profile -> on each host: the verdict, and which needs decided it.
VERDICTS: dict[str, dict[str, tuple[str, set[str]]]] = {
    "firecracker-secret-free": {
        "host": ("not usable", {GMEM + "no_direct_map"}),
        "guest_memfd": ("not usable", {GMEM + "no_direct_map", GMEM + "init_shared"}),
        "restrictedmem": (
            "not usable",
            {GMEM + "file", GMEM + "no_direct_map", GMEM + "init_shared"},
        ),
    },
    "qemu-guest-memfd": {
        "host": ("usable", set()),
        "guest_memfd": ("not usable", {GMEM + "init_shared"}),
        "restrictedmem": ("not usable", {GMEM + "file", GMEM + "init_shared"}),
    },
    "qemu-in-place": dict.fromkeys(HOSTS, ("not usable", NO_SNP | NO_TDX)),
    "cloud-hypervisor-snp": dict.fromkeys(HOSTS, ("not usable", NO_SNP)),
    "libkrun-tee": dict.fromkeys(HOSTS, ("not usable", NO_SNP | NO_TDX)),
    "openvmm": dict.fromkeys(HOSTS, ("not usable", NO_SNP)),
    "v9": {
        "host": ("not usable", V9),
        "guest_memfd": ("not usable", V9),
        "restrictedmem": ("usable", set()),
    },
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("profile", NAMES)
def test_verdict_on_a_recorded_host(profile: str, host: str) -> None:
    found = judged(profile, recorded(host))
    assert (found.verdict, unmet(found)) == VERDICTS[profile][host]
    assert found.exit_status == (0 if found.verdict == "usable" else 1)
    for one in found.needs:
        assert one.check is not None
        assert one.check.name == one.finding
        assert one.need.why


def test_every_profile_has_a_verdict() -> None:
    assert set(NAMES) == set(VERDICTS)


def as_if(changes: dict[str, str], vm_type: str = "default") -> Report:
    """The recorded host with other answers; what its default VM can do, `vm_type` can."""
    found = recorded("host")
    checks = []
    for check in found.checks:
        if check.vm_type == vm_type != "default":
            continue
        renamed = check._replace(vm_type=vm_type) if check.vm_type == "default" else check
        checks.append(renamed._replace(status=changes.get(renamed.name, check.status)))
    return Report(tuple(checks), found.host)


def converts(vm_type: str) -> dict[str, str]:
    return {f"guest_memfd/{vm_type}/conversion": PASS}


@pytest.mark.parametrize("name", ["cloud-hypervisor-snp", "openvmm", "libkrun-tee"])
def test_a_host_with_snp(name: str) -> None:
    """All that is needed is there, and then one answer after the other is no."""
    found = judged(name, as_if(converts("snp"), "snp"))
    assert (found.verdict, found.vm_type) == ("usable", "snp")
    for one in found.needs:
        lacking = as_if(converts("snp") | {one.finding: FAIL}, "snp")
        verdict = "usable" if one.need.wish else "not usable"
        assert judged(name, lacking).verdict == verdict, one.finding


def test_v9() -> None:
    """All of v9 is there, and then one answer after the other is no."""
    assert judged("v9", as_if(dict.fromkeys(V9, PASS))).verdict == "usable"
    for finding in V9:
        lacking = as_if(dict.fromkeys(V9, PASS) | {finding: FAIL})
        found = judged("v9", lacking)
        assert (found.verdict, unmet(found)) == ("not usable", {finding})


def test_the_second_vm_type_is_enough() -> None:
    found = judged("libkrun-tee", as_if(converts("tdx"), "tdx"))
    assert (found.verdict, found.vm_type) == ("usable", "tdx")


def test_kernels_that_are_not_released() -> None:
    """In-place conversion on SNP, and no direct map on default VMs."""
    there = {"guest_memfd/snp/in_place": PASS}
    assert judged("qemu-in-place", as_if({}, "snp")).verdict == "not usable"
    assert judged("qemu-in-place", as_if(there, "snp")).verdict == "usable"
    there = {GMEM + "no_direct_map": PASS}
    found = judged("firecracker-secret-free", as_if(there))
    assert found.verdict == "usable"
    wish = next(one for one in found.needs if one.need.wish)
    assert (wish.finding, wish.status) == (GMEM + "userfault", FAIL)


def test_a_shortage_is_not_known() -> None:
    """A need that met a shortage decides nothing, unless another need is refused."""
    host = recorded("host")

    def short(*names: str, refused: str = "") -> Report:
        checks = [
            check._replace(status=SKIP, shortage="EMFILE")
            if check.name in names
            else check._replace(status=FAIL)
            if check.name == refused
            else check
            for check in host.checks
        ]
        return Report(tuple(checks), host.host)

    found = judged("qemu-guest-memfd", short(GMEM + "init_shared"))
    assert (found.verdict, found.exit_status) == ("could not probe", 3)
    assert unmet(found) == {GMEM + "init_shared"}
    found = judged("qemu-guest-memfd", short(GMEM + "init_shared", refused=GMEM + "file"))
    assert found.verdict == "not usable"
    assert judged("qemu-guest-memfd", short(GMEM + "punch_hole")).verdict == "usable"
    assert judged("qemu-guest-memfd", short(GMEM + "pre_fault")).verdict == "usable"


def test_a_probe_that_ended_early() -> None:
    """What is missing is not known; without any VM nothing is."""
    vm = Check(Group.VM, Step.CREATE, PASS, "default")
    ended = Check(Group.KVM, Step.IOCTL, SKIP, shortage="RLIMIT_CPU", tried="the rest")
    early = Report((vm, ended), facts("/nonexistent"))
    assert judged("qemu-guest-memfd", early).verdict == "could not probe"
    assert judged("openvmm", early).verdict == "could not probe"
    none = Report((Check(Group.KVM, Step.DEVICE, FAIL),), facts("/nonexistent"))
    for name in NAMES:
        found = judged(name, none)
        assert (found.verdict, found.needs) == ("could not probe", ())


def test_text_and_document() -> None:
    """The same verdicts, needs and exit status; the exit status is that of the worst."""
    host = recorded("host")
    wanted = tuple(profiles.judge(one, host) for one in profiles.find(["v9", "qemu-guest-memfd"]))
    assert host._replace(profiles=wanted).exit_status == 1
    assert host._replace(profiles=wanted[1:]).exit_status == 0
    assert host.exit_status == 1
    unknown = wanted[0]._replace(verdict="could not probe")
    assert host._replace(profiles=(*wanted, unknown)).exit_status == 3
    found = host._replace(profiles=wanted)
    text = report.profiles_text(found)
    document = found.to_json()["profiles"]
    assert document is not None
    assert [one["verdict"] for one in document] == ["not usable", "usable"]
    for one in document:
        assert f"{one['name']}: {one['verdict']}" in text.splitlines()
        for need in one["needs"]:
            assert f"  [ {need['status']} ] {need['finding']}: " in text
            assert (need["why"] in text) == (need["status"] != PASS)
    assert "hint: needs a kernel with the v9 patches" in text
    assert Report.from_json(found.to_json()) == host
    coloured = report.profiles_text(found, colour=True)
    assert re.sub("\x1b\\[[0-9]*m", "", coloured) == text


def test_formats_for_fleets() -> None:
    """The profiles are told there too, and the host's own verdict does not change."""
    host = recorded("host")
    wanted = tuple(profiles.judge(one, host) for one in profiles.find(["v9", "qemu-guest-memfd"]))
    unknown = wanted[0]._replace(
        profile=wanted[0].profile._replace(name="x"), verdict="could not probe"
    )
    found = host._replace(profiles=(*wanted, unknown))
    metrics = formats.prometheus(found).splitlines()
    told = [line for line in metrics if line.startswith("kvmpriv_profile_usable{")]
    assert told == [
        'kvmpriv_profile_usable{profile="v9"} 0',
        'kvmpriv_profile_usable{profile="qemu-guest-memfd"} 1',
    ]
    assert "kvmpriv_probe_success 1" in metrics
    assert "kvmpriv_private_memory_usable 0" in metrics
    features = formats.nfd(found).splitlines()
    assert "kvmpriv-profile.v9=not-usable" in features
    assert "kvmpriv-profile.qemu-guest-memfd=usable" in features
    assert "kvmpriv-profile.x=could-not-probe" in features
    assert (found.verdict_status, found.exit_status) == (1, 3)
    without = formats.prometheus(host)
    assert "kvmpriv_profile" not in without


def test_text_of_what_was_not_probed() -> None:
    none = Report((Check(Group.KVM, Step.DEVICE, FAIL, tried="open it"),), facts("/nonexistent"))
    found = none._replace(profiles=(judged("v9", none),))
    assert report.profiles_text(found).splitlines()[::2] == ["v9: could not probe", "  open it: "]
    vm = Check(Group.VM, Step.CREATE, PASS, "default")
    ended = Check(Group.KVM, Step.IOCTL, SKIP, shortage="RLIMIT_CPU", tried="the rest")
    early = Report((vm, ended), facts("/nonexistent"))
    text = report.profiles_text(early._replace(profiles=(judged("qemu-guest-memfd", early),)))
    assert "guest_memfd/default/file: not tried, as the probe ended before" in text


# -- files -------------------------------------------------------------------------------------

GOOD = b"""\
# What my VMM needs.
summary = memory that can be mapped

source = me/vmm | src/memory.c | 1.0 | 2026-11-27
types = default, snp
require = guest_memfd/VM/file | it makes a file
wish = guest_memfd/VM/punch_hole | a balloon needs it
"""


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.profile").write_bytes(GOOD)
    (tmp_path / "README").write_bytes(b"\xff")  # is not read
    (mine,) = profiles.find(["mine", "mine"], str(tmp_path))
    assert mine == profiles.Profile(
        "mine",
        "memory that can be mapped",
        (("me/vmm", "src/memory.c", "1.0", "2026-11-27"),),
        ("default", "snp"),
        (
            profiles.Need("guest_memfd/VM/file", "it makes a file"),
            profiles.Need("guest_memfd/VM/punch_hole", "a balloon needs it", wish=True),
        ),
    )
    assert profiles.judge(mine, recorded("host")).verdict == "usable"
    assert [one.name for one in profiles.find(["v9", "mine"], str(tmp_path))] == ["v9", "mine"]
    with pytest.raises(KeyError, match="other"):
        profiles.find(["other"], str(tmp_path))


#: What replaces a line of GOOD, the line that the message names, and the message.
BROKEN = (
    (b"summary = memory", b"sumary = memory", 2, "unknown key 'sumary': the keys are summary, "),
    (b"summary = memory that can be mapped", b"summary =", 2, "'summary' has no value"),
    (b"summary = memory", b"memory", 2, "write KEY = VALUE, not 'memory that can be mapped'"),
    (b"mapped\n", b"mapped\nsummary = x\n", 3, "'summary' is given again; it is in line 2"),
    (b"types = default, snp", b"types = any\ntypes = snp", 6, "'types' is given again; it is in l"),
    (
        b"default, snp",
        b"default, SNP",
        5,
        "unknown VM type 'SNP': any, or of default, sw_protected",
    ),
    (b"default, snp", b"any, snp", 5, "unknown VM type 'any': any, or of"),
    (b"default, snp", b"default,", 5, "unknown VM type ''"),
    (b" | 1.0", b"", 4, "a source is PROJECT | FILE | VERSION | DATE, not 'me/vmm | src/memory.c"),
    (b"| 1.0 |", b"| |", 4, "a source is PROJECT | FILE | VERSION | DATE"),
    (b"2026-11-27", b"27.11.2026", 4, "the date '27.11.2026' must be YYYY-MM-DD"),
    (b"2026-11-27", b"2026-1-27", 4, "the date '2026-1-27' must be YYYY-MM-DD"),
    (
        b"/VM/file",
        b"/VM/fiel",
        6,
        "has the name 'guest_memfd/VM/fiel'; did you mean 'guest_memfd/VM",
    ),
    (b"/VM/file", b"/default/file", 6, "no check of the probe has the name 'guest_memfd/default/f"),
    (b"guest_memfd/VM/file", b"x", 6, "no check of the probe has the name 'x'"),
    (b" | it makes a file", b"", 6, "write FINDING | REASON, not 'guest_memfd/VM/file'"),
    (b"it makes a file", b"", 6, "write FINDING | REASON"),
    (b"punch_hole", b"file", 7, "'guest_memfd/VM/file' is given again"),
    (b"mapped", b"mapp\xe9d", 2, "byte 34 is not UTF-8"),
    (b"mapped", b"\x1b[2J", 2, "a control character in "),
    (b"mapped", b"a\0b", 2, "a control character in "),
    (b"summary = memory that can be mapped\n", b"", 7, "the file ends without 'summary'"),
    (b"types = default, snp\n", b"", 7, "the file ends without 'types'"),
    (b"source", b"#", 8, "the file ends without 'source'"),
    (b"require", b"wish", 8, "the file ends without 'require'"),
    (GOOD, b"", 1, "the file ends without 'summary'"),
    (GOOD, b"#" * 65537, 1, "a profile may have 65536 bytes, this one has more"),
)


@pytest.mark.parametrize(("old", "new", "line", "message"), BROKEN)
def test_a_broken_profile(tmp_path: Path, old: bytes, new: bytes, line: int, message: str) -> None:
    """One error, with the file and the line."""
    path = tmp_path / "mine.profile"
    assert old in GOOD
    path.write_bytes(GOOD.replace(old, new))
    with pytest.raises(profiles.ProfileError) as error:
        profiles.read_folder(str(tmp_path))
    assert str(error.value).startswith(f"{path}:{line}: "), str(error.value)
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_random_bytes() -> None:
    """Nothing but ProfileError, and always with a line of the file."""
    import random

    chance = random.Random(21)
    refused = 0
    for _ in range(2000):
        data = bytearray(GOOD)
        for _ in range(chance.randrange(1, 8)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        try:
            profiles.parse(bytes(data), "folder/mine.profile")
        except profiles.ProfileError as error:
            refused += 1
            match = re.match(r"folder/mine\.profile:(\d+): .", str(error))
            assert match is not None
            assert 1 <= int(match[1]) <= data.count(b"\n") + 1
    assert refused > 1000


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "nothing", "loop"])
def test_what_is_not_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine.profile"
    expected = "not a regular file"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":  # without a writer: opening it must not wait
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "nothing":
        path.symlink_to(tmp_path / "nothing")
        expected = "No such file or directory"
    else:
        path.symlink_to(path)
        expected = "Too many levels of symbolic links"
    with pytest.raises(profiles.ProfileError) as error:
        profiles.read_folder(str(tmp_path))
    assert str(error.value) == f"{path}: {expected}"


def test_what_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(profiles.ProfileError, match="No such file or directory: give a folder"):
        profiles.read_folder(str(file))
    file.touch()
    with pytest.raises(profiles.ProfileError, match="Not a directory: give a folder"):
        profiles.read_folder(str(file))
    with pytest.raises(profiles.ProfileError, match=r"there is no file NAME\.profile"):
        profiles.read_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["v9", "Mine", "a b", "ü"])
def test_names(tmp_path: Path, name: str) -> None:
    """A name that is taken, or that can't be given to --for."""
    path = tmp_path / f"{name}.profile"
    path.write_bytes(GOOD)
    with pytest.raises(profiles.ProfileError) as error:
        profiles.find(["v9"], str(tmp_path))
    assert str(error.value).startswith(f"{path}:1: ")
    assert ("comes with kvmpriv" in str(error.value)) == (name == "v9")


# -- what comes with kvmpriv -------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_built_in(name: str) -> None:
    """Each has sources, an own sentence, and needs that are about VMs of its types."""
    (profile,) = profiles.find([name])
    assert profile.name == name
    assert len(profile.summary) > 30
    assert len(profile.needs) > 1
    assert all(len(need.why) > 10 for need in profile.needs)


def test_the_findings_are_those_of_the_probe() -> None:
    """A profile can require everything that recorded hosts have, and nothing else."""
    found = {
        "vm/VM" if check.group is Group.VM else check.name.replace(f"/{check.vm_type}/", "/VM/")
        for name in HOSTS
        for check in recorded(name).checks
    }
    assert found == profiles.FINDINGS


def test_the_vm_types_are_those_of_the_probe() -> None:
    from kvmpriv.probe.checks import VM_TYPES

    assert tuple(VM_TYPES.values()) == profiles.VM_TYPES


def test_help_lists_them(capsys: Any) -> None:
    from kvmpriv.cli import main

    assert main(["probe", "--for", "help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == NAMES
    assert main(["probe", "--for", "nonesuch"]) == 2
    assert "there is no profile 'nonesuch': cloud-hypervisor-snp, " in capsys.readouterr().err
