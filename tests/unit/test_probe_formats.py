"""The formats of ``kvmpriv probe``, read by the parsers of their consumers or by their rules."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvmpriv.probe
from kvmpriv import __version__, cli
from kvmpriv.commands import probe as command
from kvmpriv.probe import VERDICTS, Asked, Report, formats, profiles, report
from kvmpriv.probe.host import facts
from kvmpriv.probe.records import FAIL, PASS, SKIP

from .test_probe_records import RECORDED, a_check

if TYPE_CHECKING:
    from prometheus_client import Metric

SCHEMA = json.loads((Path(kvmpriv.probe.__file__).parent / "schema.json").read_text())
HOSTS = {name: (verdict, status, checks) for name, verdict, status, checks in RECORDED}
#: What may break a format: quotes, backslashes, ends of lines, control and other characters.
ODD = 'a"b\\c\nd\te\x1b[2Jfüg\u2028h#i=j{k}l,m n'


def recorded(name: str, **facts_: Any) -> Report:
    checks = HOSTS[name][2]
    host: Any = {**facts("/nonexistent"), **facts_}
    return Report(tuple(a_check(check, status) for check, status in checks.items()), host)


def everything() -> Report:
    """A host of which everything is known, with odd names wherever the host chooses them."""
    host: Any = {
        **facts("/nonexistent"),
        "kernel": ODD,
        "backend": {"kvm_amd": "module", ODD: "built in"},
        "parameters": {"kvm_amd.sev": ODD, ODD: "Y"},
        "cpu_flags": ["svm", "sev"],
        "apparmor": ODD,
        "nesting": ["svm"],
        "vcpus": {"recommended": 8, "max": 1024, "max_id": 4096},
        "memory_slots": 32764,
    }
    checks = (
        a_check("kvm/device", PASS, (), f"open {ODD}"),
        a_check("kvm/vm_types", PASS, (Asked("KVM_CAP_VM_TYPES", 1 << 31),), "", ODD),
        a_check("vm/default", PASS, (), "KVM_CREATE_VM(0)", "made"),
        a_check("vm/type_9", FAIL, (), "KVM_CREATE_VM(9)", "EINVAL", ODD),
        a_check("v10/default/capability", FAIL, (Asked("KVM_CAP_MEMORY_ATTRIBUTES", 0),)),
        a_check("guest_memfd/default/file", SKIP),
        a_check(
            "guest_memfd/default/conversion", PASS, (Asked("KVM_CAP_MEMORY_ATTRIBUTES", 8, 12),)
        ),
    )
    process: Any = {"pid": 7, "name": ODD, "user": "me", "devices": 1, "vms": 1, "vcpus": 4}
    return Report(checks, host, {"processes": [process], "unknown": 3})


def with_profiles(found: Report) -> Report:
    """The report, and what follows from it for every profile of kvmpriv."""
    judged = (profiles.judge(each, found) for each in profiles.read_folder(profiles.BUILT_IN))
    return found._replace(profiles=tuple(judged))


REPORTS = {name: recorded(name) for name in HOSTS} | {"everything": everything()}
REPORTS |= {f"{name}, profiles": with_profiles(found) for name, found in REPORTS.items()}


@pytest.fixture(params=list(REPORTS))
def found(request: pytest.FixtureRequest) -> Report:
    return REPORTS[request.param]


def test_the_reports_have_every_verdict_of_a_profile() -> None:
    verdicts = {one.verdict for found in REPORTS.values() for one in found.profiles or ()}
    assert verdicts == {profiles.USABLE, profiles.NOT_USABLE, profiles.COULD_NOT_PROBE}


def test_every_format_has_a_function() -> None:
    assert list(command.FORMATS) == ["text", *formats.FORMATS]


def test_formats_are_ascii(found: Report) -> None:
    """Standard output may have any encoding, and the consumers expect UTF-8."""
    for name, written in formats.FORMATS.items():
        text = written(found)
        assert text.isascii(), name
        assert text.endswith("\n"), name
        assert not re.search(r"[^ -~\n]", text), name


def test_json(found: Report) -> None:
    """Profiles follow from the checks, and are not read back."""
    assert Report.from_json(json.loads(formats.json_text(found))) == found._replace(profiles=None)


# -- Prometheus ------------------------------------------------------------------------------------


def metrics(text: str) -> dict[str, Metric]:
    """The metrics by name, as Prometheus' own client parses them."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a metric is there twice"
    return {family.name: family for family in families}


def samples(families: dict[str, Metric], name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """The values of a metric by its labels; all of these labels, and no others, must be there."""
    values = {}
    for sample in families[name].samples:
        assert sample.name == name
        assert list(sample.labels) == list(labels)
        assert tuple(sample.labels.values()) not in values, "a sample is there twice"
        values[tuple(sample.labels.values())] = sample.value
    return values


def test_prometheus_has_the_records(found: Report) -> None:
    families = metrics(formats.prometheus(found))
    assert samples(families, "kvmpriv_build_info", "version") == {(__version__,): 1}
    able = found.verdict_status != 3
    assert samples(families, "kvmpriv_probe_success") == {(): able}
    assert ("kvmpriv_private_memory_usable" in families) == able
    if able:
        usable = samples(families, "kvmpriv_private_memory_usable")
        assert usable == {(): found.verdict_status == 0}
    verdicts = samples(families, "kvmpriv_probe_verdict", "verdict")
    assert verdicts == {(verdict,): verdict == found.verdict for verdict in VERDICTS}
    judged = {one.profile.name: one.verdict for one in found.profiles or ()}
    unknown = profiles.COULD_NOT_PROBE
    known = {(name,): end == profiles.USABLE for name, end in judged.items() if end != unknown}
    assert ("kvmpriv_profile_usable" in families) == bool(known)
    if known:
        assert samples(families, "kvmpriv_profile_usable", "profile") == known
    assert samples(families, "kvmpriv_probe_check_status", "check", "status") == {
        (check.name, status.lower()): check.status == status
        for check in found.checks
        for status in (PASS, FAIL, SKIP)
    }


def test_prometheus_escapes_what_the_host_chooses() -> None:
    """A value comes back as the text output would print it: printable ASCII."""
    families = metrics(formats.prometheus(REPORTS["everything"]))
    odd = 'a"b\\c\\nd\\te\\x1b[2Jf\\xfcg\\u2028h#i=j{k}l,m n'
    labels = ("kernel", "backend", "nesting", "cpu_flags", "selinux", "apparmor")
    assert samples(families, "kvmpriv_host_info", *labels) == {
        (odd, f"kvm_amd,{odd}", "svm", "svm,sev", "", odd): 1
    }
    assert samples(families, "kvmpriv_module_parameter_info", "parameter", "value") == {
        ("kvm_amd.sev", odd): 1,
        (odd, "Y"): 1,
    }
    attributes = "KVM_CAP_MEMORY_ATTRIBUTES"
    assert samples(families, "kvmpriv_capability", "check", "capability", "asked") == {
        ("kvm/vm_types", "KVM_CAP_VM_TYPES", "device"): 1 << 31,
        ("v10/default/capability", attributes, "vm"): 0,
        ("guest_memfd/default/conversion", attributes, "vm"): 8,
        ("guest_memfd/default/conversion", attributes, "device"): 12,
    }
    for name, value in (
        ("vm_vcpus_recommended", 8),
        ("vm_vcpus_max", 1024),
        ("vm_memory_slots_max", 32764),
        ("device_users", 1),
        ("device_users_unknown", 3),
    ):
        assert samples(families, f"kvmpriv_{name}") == {(): value}


def test_prometheus_follows_the_naming_rules(found: Report) -> None:
    """What `promtool check metrics` reports, and the rules of Prometheus' page on names."""
    text = formats.prometheus(found)
    lines = text.splitlines()
    names = [line.split()[2] for line in lines if line.startswith("# HELP ")]
    assert names == [line.split()[2] for line in lines if line.startswith("# TYPE ")]
    for name, family in metrics(text).items():
        assert (name in names, family.type) == (True, "gauge")
        assert re.fullmatch(r"kvmpriv(_[a-z]+)+", name)
        words = set(name.split("_"))
        assert not words & {"gauge", "counter", "total", "sum", "count", "bucket", "created"}
        assert not words & {"ms", "kb", "mb", "gb", "kib", "mib", "gib", "minutes", "percent"}
        if name.endswith("_info"):
            assert {sample.value for sample in family.samples} == {1}
        assert re.fullmatch(r"[A-Z1].*\.", family.documentation), "a sentence"


# -- node-feature-discovery ------------------------------------------------------------------------


def feature_file(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Features and labels of a feature file; anything that is not exactly right is an error.

    The rules: node-feature-discovery, docs/usage/customization-guide.md, "Local feature source";
    source/local/local.go (64 KiB, lines, directives); the syntax of names and values of labels:
    Kubernetes, "Labels and Selectors", "Syntax and character set".
    """
    assert len(text.encode()) <= 65536
    features: dict[str, str] = {}
    labels: dict[str, str] = {}
    no_label = False
    for line in text.split("\n")[:-1]:
        assert line
        assert line == line.strip()
        if line.startswith("#"):
            assert line == "# +no-label"
            no_label = True
            continue
        name, equals, value = line.partition("=")
        assert equals
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name)
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value)
        assert name not in features
        features[name] = value
        if not no_label:
            labels[name] = value
        no_label = False
    assert not no_label
    return features, labels


def test_the_reader_of_feature_files_is_strict() -> None:
    assert feature_file("a=b\n# +no-label\nc=d\n") == ({"a": "b", "c": "d"}, {"a": "b"})
    for bad in ("a\n", "a=\n", "a b=c\n", "a=b c\n", "-a=b\n", "a=b.\n", "a=b\na=c\n", "x/a=b\n"):
        with pytest.raises(AssertionError):
            feature_file(bad)
    for bad in ("#\n", "# +no-label\n", "\n", f"{'a' * 64}=b\n", f"a={'b' * 64}\n", " a=b\n"):
        with pytest.raises(AssertionError):
            feature_file(bad)


def test_nfd(found: Report) -> None:
    features, labels = feature_file(formats.nfd(found))
    usable = {0: "true", 1: "false", 3: "unknown"}[found.verdict_status]
    assert labels == {
        "kvmpriv-private-memory": usable,
        "kvmpriv-verdict": found.verdict.replace(" ", "-"),
        **{
            f"kvmpriv-profile.{one.profile.name}": one.verdict.replace(" ", "-")
            for one in found.profiles or ()
        },
    }
    assert {name: value for name, value in features.items() if name not in labels} == {
        f"kvmpriv-check.{check.name.replace('/', '.')}": check.status.lower()
        for check in found.checks
    }


# -- Ansible ---------------------------------------------------------------------------------------


def test_ansible(found: Report) -> None:
    """The fact is what its schema describes, and has all of the document of --json."""
    fact = json.loads(formats.ansible(found))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA).evolve(schema=SCHEMA["$defs"]["fact"])
    assert list(validator.iter_errors(fact)) == []
    assert fact["private_memory"] == {0: True, 1: False, 3: None}[found.verdict_status]
    document: Any = found.to_json()
    checks = [{"name": name, **check} for name, check in fact["checks"].items()]
    judged = fact["profiles"] and [{"name": n, **one} for n, one in fact["profiles"].items()]
    shown = {name: part for name, part in fact.items() if name != "private_memory"}
    assert {**shown, "checks": checks, "profiles": judged} == document
    change: dict[str, Any]
    for change in ({"checks": []}, {"private_memory": "yes"}, {"more": 1}, {"schema_version": 0}):
        assert not validator.is_valid({**fact, **change}), change


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Report:
    """The report that the command gets."""
    made = REPORTS["mainline 6.18, default VM"]
    monkeypatch.setattr(command, "probe", lambda *_, **__: made)
    return made


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, output, error output."""
    return cli.main(["probe", *map(str, arguments)]), *capsys.readouterr()


@pytest.mark.parametrize("name", command.FORMATS)
def test_format_and_output(
    name: str, probed: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has what standard output would have had, and the exit status is the same."""
    expected = report.text(probed) if name == "text" else formats.FORMATS[name](probed)
    assert run(capsys, "--format", name) == (1, expected, "")
    out = tmp_path / "out"
    out.write_text("the old one")
    out.chmod(0o604)
    assert run(capsys, "--format", name, "--output", out) == (1, "", "")
    assert out.read_text() == expected
    assert stat.S_IMODE(out.stat().st_mode) == 0o604
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_short_forms(probed: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--json") == (1, formats.json_text(probed), "")
    out = tmp_path / "out"
    assert run(capsys, "-q", "--output", out) == (1, "", "")
    assert out.read_text() == f"{probed.verdict}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--format"], "expected one argument"),
        (["--format", "xml"], "invalid choice: 'xml'"),
        (["--format", "nfd", "--json"], "not allowed with"),
        (["--format", "nfd", "-q"], "not allowed with"),
        (["--output", ""], "the name of a file is empty"),
    ],
)
def test_wrong_usage(
    arguments: list[str], expected: str, probed: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, errors = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert expected in errors
    assert probed.exit_status == 1


@pytest.mark.parametrize("kind", ["folder", "no folder", "file as a folder", "loop", "full"])
def test_output_that_can_not_be_written(
    kind: str,
    probed: Report,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sentence and exit status 3; what is there stays.  The twin: `test_format_and_output`."""
    file, folder, loop = tmp_path / "file", tmp_path / "folder", tmp_path / "loop"
    file.write_text("the old one")
    folder.mkdir()
    loop.symlink_to(loop)
    path, words = {
        "folder": (folder, "Is a directory"),
        "no folder": (folder / "no" / "out", "No such file or directory"),
        "file as a folder": (file / "out", "Not a directory"),
        "loop": (loop, "Too many levels of symbolic links"),
        "full": (file, "No space left on device"),
    }[kind]
    if kind == "full":

        def fsync(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
    status, out, errors = run(capsys, "--format", "prometheus", "--output", path)
    assert (status, out) == (3, "")
    assert errors == f"kvmpriv probe: {path}: {words}\n"
    assert file.read_text() == "the old one"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder", "loop"]
    assert list(folder.iterdir()) == []
    assert probed.exit_status == 1


def test_output_through_links_and_pipes(
    probed: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, target, pipe = tmp_path / "link", tmp_path / "target", tmp_path / "pipe"
    link.symlink_to(target)
    assert run(capsys, "--format", "nfd", "--output", link)[0] == 1
    assert link.is_symlink()
    assert target.read_text() == formats.nfd(probed)
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    assert run(capsys, "--format", "nfd", "--output", pipe)[0] == 1
    reader.join(10)
    assert got == [formats.nfd(probed)]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_output_over_the_program(
    probed: Report,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fact script is a link to the program: the fact must not be written through it."""
    program, link = tmp_path / "kvmpriv", tmp_path / "kvmpriv.fact"
    program.write_text("#!")
    link.symlink_to(program)
    monkeypatch.setattr("sys.argv", [str(program)])
    status, out, errors = run(capsys, "--format", "ansible", "--output", link)
    assert (status, out) == (2, "")
    assert errors == f"kvmpriv probe: --output {link} is the program itself\n"
    assert program.read_text() == "#!"
    assert probed.exit_status == 1


def test_a_host_that_could_not_be_probed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written all the same: a fleet sees that the probe failed."""
    device = tmp_path / "kvm"
    out = tmp_path / "out"
    arguments = ("--device", device, "--format", "prometheus", "--output", out)
    status, _, errors = run(capsys, *arguments)
    assert status == 3
    assert errors.startswith("kvmpriv probe: could not probe: open ")
    assert samples(metrics(out.read_text()), "kvmpriv_probe_success") == {(): 0}


def test_a_fact_script(
    probed: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, and only without arguments; Ansible reads the output of status 0 only."""
    monkeypatch.setattr(cli, "_prepare_output", lambda: None)
    monkeypatch.setattr("sys.argv", ["/etc/ansible/facts.d/kvmpriv.fact"])
    assert (cli.main(), *capsys.readouterr()) == (0, formats.ansible(probed), "")
    monkeypatch.setattr("sys.argv", ["/etc/ansible/facts.d/kvmpriv.fact", "probe", "-q"])
    assert (cli.main(), *capsys.readouterr()) == (1, f"{probed.verdict}\n", "")
    monkeypatch.setattr("sys.argv", ["/usr/bin/kvmpriv"])
    assert cli.main() == 2
    assert "usage: kvmpriv" in capsys.readouterr().err
