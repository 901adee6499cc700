"""Where kernel sources come from, with an apt-get, apt-cache and dpkg that do as the test wants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kbuild import sources
from kbuild.errors import Refused, Status
from kbuild.kernels import Kernel

NEWEST = Kernel("newest", "guest_memfd", suite="some-backports")
FIXED = Kernel("fixed", "guest_memfd", "6.12")
PROGRAMS = {
    "apt-get": """
        case "$*" in
        *indextargets*) cat "$FAKE/targets" ;;
        *update*) cat "$FAKE/update"; exit "$(cat "$FAKE/update.status")" ;;
        *download*)
            cat "$FAKE/download"
            for word; do what=$word; done
            echo deb >"${what%=*}_all.deb"
            status=$(cat "$FAKE/download.status")
            [ "$status" = 0 ] || rm -f ./*.deb
            exit "$status" ;;
        esac""",
    "apt-cache": """
        case "$*" in
        *pkgnames*) cat "$FAKE/names" ;;
        *show*) for word; do what=$word; done; echo "Package: $what"; cat "$FAKE/version" ;;
        esac""",
    "dpkg": """
        cat "$FAKE/dpkg" >&2
        name=$(basename "$2"); name=${name%%_*}
        mkdir -p "$3/usr/src"
        [ -s "$FAKE/dpkg" ] && exit 2
        echo source >"$3/usr/src/$name.tar.xz" """,
}
SAID = {
    "targets": "http://other.test/nodistro\tnodistro\tmain\n"
    "http://mirror.test/debian/\tbookworm\tmain\n"
    "http://security.test/\tbookworm-security\tmain\n",
    "update": "Hit:1 http://mirror.test/debian some-backports InRelease\n",
    "update.status": "0",
    "download": "",
    "download.status": "0",
    "names": "linux-source-7.3\nlinux-source-7.10\nlinux-source-7.2\nlinux-source-rt-9.1\n"
    "linux-source-6.12\nlinux-source\n",
    "version": "Version: 1.0-1~bpo1\nSHA256: 0\n",
    "dpkg": "",
}


class Fake:
    """The programs of apt: what they print and return, and how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, **said: str) -> None:
        """Change what a program prints or returns; `_` in a name is for a dot."""
        for name, text in said.items():
            (self.folder / name.replace("_", ".")).write_text(text)

    def calls(self) -> list[str]:
        """The calls so far; they are forgotten then."""
        log = self.folder / "calls"
        found = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return found


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A mirror with 7.2, 7.3 and 7.10."""
    programs, said = tmp_path / "bin", tmp_path / "said"
    programs.mkdir()
    said.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"$FAKE/calls"\n{text}\n')
        (programs / name).chmod(0o755)
    for name, text in SAID.items():
        (said / name).write_text(text)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("FAKE", str(said))
    monkeypatch.setenv("KVMPRIV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "INSTALLED", tmp_path / "src")
    monkeypatch.setattr(sources, "codename_of_system", lambda: "bookworm")
    (tmp_path / "cache").mkdir()
    return Fake(said)


def age() -> None:
    """Have the record of NEWEST be older than a day."""
    record = sources._record(NEWEST)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"asked": 0.0}))


def refused(kernel: Kernel) -> tuple[int, str]:
    """How the search for a source fails."""
    with pytest.raises(Refused) as error:
        sources.find(kernel, look=True)
    assert [*sources._folder().glob("fetch-*")] == []
    return error.value.code, str(error.value)


def test_the_newest_release_is_taken(apt: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """Releases are compared by number: 7.10 is newer than 7.3."""
    tarball = sources.find(NEWEST)
    assert tarball.name == "linux-source-7.10.tar.xz"
    assert tarball.parent.name == "linux-source-7.10_1.0-1~bpo1"
    assert tarball.read_text() == "source\n"
    assert "fetching linux-source-7.10 1.0-1~bpo1" in capsys.readouterr().err
    apt.calls()
    assert sources.find(NEWEST) == sources.find(NEWEST, look=True) == tarball
    assert apt.calls() == []


def test_apt_reads_and_writes_in_the_cache_alone(apt: Fake) -> None:
    """The lists, the cache and the status are ours; the mirror is the system's."""
    sources.find(NEWEST)
    folder = sources._folder() / "apt/some-backports"
    config = (folder / "apt.conf").read_text()
    for name, place in (("State::Lists", "lists"), ("State::status", "status"), ("Cache", "cache")):
        assert f'Dir::{name} "{folder}/{place}";' in config
    assert f'Dir::Etc::SourceList "{folder}/sources.list";' in config
    assert 'Dir::Etc::SourceParts "/dev/null";' in config
    assert "#clear APT::Update::Post-Invoke-Success;" in config
    assert (folder / "sources.list").read_text() == (
        f"deb [signed-by={sources.KEYS}] http://mirror.test/debian some-backports main\n"
    )
    changing = [call for call in apt.calls() if "update" in call or "download" in call]
    assert len(changing) == 2
    assert all(f"-c {folder}/apt.conf" in call for call in changing)


def test_a_release_of_the_system(apt: Fake) -> None:
    """A fixed release comes from all of the system's suites; what is installed needs no apt."""
    tarball = sources.find(FIXED)
    assert tarball.name == "linux-source-6.12.tar.xz"
    assert "SourceList" not in (sources._folder() / "apt/system/apt.conf").read_text()
    age_of_fixed = sources._record(FIXED)
    age_of_fixed.write_text(json.dumps(json.loads(age_of_fixed.read_text()) | {"asked": 0.0}))
    apt.calls()
    assert sources.find(FIXED, look=True) == tarball
    sources.INSTALLED.mkdir()
    installed = sources.INSTALLED / "linux-source-6.12.tar.xz"
    installed.touch()
    assert sources.find(FIXED, look=True) == installed
    assert apt.calls() == []


def test_a_release_of_another_suite(apt: Fake) -> None:
    """It stays that release, though the suite has newer ones."""
    kernel = Kernel("older", "guest_memfd", "7.3", suite="some-backports")
    tarball = sources.find(kernel)
    assert tarball.name == "linux-source-7.3.tar.xz"
    assert sources.find(NEWEST).name == "linux-source-7.10.tar.xz"
    apt.calls()
    assert sources.find(kernel, look=True) == tarball
    assert apt.calls() == []
    apt.set(names="linux-source-7.10\n")
    shutil.rmtree(tarball.parent)
    assert "some-backports has no such package" in refused(kernel)[1]


def test_a_newer_release_is_taken_by_build_alone(
    apt: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    """scripts/vm goes on with the source that it knows; `build` looks once a day, and says so."""
    old = sources.find(NEWEST)
    age()
    apt.calls()
    assert sources.find(NEWEST) == old
    assert apt.calls() == []
    assert sources.find(NEWEST, look=True) == old
    assert not any("download" in call for call in apt.calls())
    assert sources.find(NEWEST, look=True) == old
    assert apt.calls() == []
    age()
    apt.set(names="linux-source-8.0\nlinux-source-7.10\n")
    capsys.readouterr()
    new = sources.find(NEWEST, look=True)
    assert new.name == "linux-source-8.0.tar.xz"
    assert (
        "some-backports has linux-source-8.0 1.0-1~bpo1 now, instead of linux-source-7.10 "
        "1.0-1~bpo1: newest is built from it"
    ) in capsys.readouterr().err
    assert not old.exists()


def test_a_source_of_two_kernels(apt: Fake) -> None:
    """The old source stays as long as another kernel is built from it."""
    other = Kernel("other", "guest_memfd", "7.10", suite="some-backports")
    old = sources.find(NEWEST)
    assert sources.find(other) == old
    age()
    apt.set(names="linux-source-8.0\n")
    assert sources.find(NEWEST, look=True) != old
    assert sources.find(other) == old
    assert old.exists()


def test_a_new_version_of_the_same_release(apt: Fake) -> None:
    """It is another source, so the kernel is built again."""
    old = sources.find(NEWEST)
    age()
    apt.set(version="Version: 1.0-2~bpo1\n")
    new = sources.find(NEWEST, look=True)
    assert new.name == old.name
    assert new != old


DOWN = (
    "Err:1 http://mirror.test/debian some-backports InRelease\n  Could not resolve 'mirror.test'\n"
)


def test_offline(apt: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """A mirror that can't be reached is said; the source in the cache is used."""
    tarball = sources.find(NEWEST)
    apt.set(update=DOWN)
    assert sources.find(NEWEST, look=True) == tarball
    assert capsys.readouterr().err.count("\n") == 1  # that it was fetched
    age()
    assert sources.find(NEWEST, look=True) == tarball
    words = capsys.readouterr().err
    assert "the network or the package mirror could not be reached" in words
    assert "The source in the cache is used: linux-source-7.10 1.0-1~bpo1" in words


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ({"update": DOWN}, 3, "could not look for a linux-source-N: the network or the package"),
        (
            {"update": "E: The repository 'x Release' does not have a Release file.\n",
             "update_status": "100"},
            3,
            "http://mirror.test/debian some-backports: there is no such suite",
        ),
        ({"names": "linux-source-rt-9.1\n"}, 3, "some-backports has no such package"),
        (
            {"update": "W: GPG error: x InRelease: NO_PUBKEY 1\n", "update_status": "100"},
            3,
            "the signature of the mirror cannot be checked with the installed keys",
        ),
        (
            {"update": "E: Write error - write (28: No space left on device)\n",
             "update_status": "100"},
            7,
            "there is no space left",
        ),
        (
            {"download": "E: Failed to fetch x  Hash Sum mismatch\n", "download_status": "100"},
            3,
            "could not fetch linux-source-7.10=1.0-1~bpo1: the download was cut off or is damaged",
        ),
        (
            {"download": "E: You do not have enough free space in x\n", "download_status": "100"},
            7,
            "there is no space left",
        ),
        ({"dpkg": "dpkg-deb: error: unexpected end of file\n"}, 3, "could not unpack"),
        ({"dpkg": "dpkg-deb: error: No space left on device\n"}, 7, "there is no space left"),
        ({"targets": "http://other.test/n\tnodistro\tmain\n"}, 3, "name no mirror of Debian"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(apt: Fake, said: dict[str, str], code: int, words: str) -> None:
    """Each failure is a sentence with what to do instead; the next call succeeds."""
    apt.set(**said)
    got, text = refused(NEWEST)
    assert got == code
    assert words in text
    assert "scripts/kernel/build NAME --source TREE" in text
    apt.set(**{name.replace(".", "_"): text for name, text in SAID.items()})
    assert sources.find(NEWEST).read_text() == "source\n"


def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on Debian, what is in the cache is used; else a tree must be given."""
    monkeypatch.setenv("KVMPRIV_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    code, text = refused(NEWEST)
    assert code == Status.NO_SOURCE
    assert "this machine has no apt-get" in text
    assert "--source TREE" in text


def test_a_record_that_is_cut_off(apt: Fake) -> None:
    """It is as if there were none; so is one whose tarball somebody removed."""
    tarball = sources.find(NEWEST)
    sources._record(NEWEST).write_text('{"package": "linux-so')
    assert sources.find(NEWEST) == tarball
    shutil.rmtree(tarball.parent)
    assert sources.find(NEWEST) == tarball
    assert sum("download" in call for call in apt.calls()) == 3


def test_the_release_in_a_name() -> None:
    """A release is compared as numbers."""
    assert sources.release_of("linux-source-7.10") > sources.release_of("linux-source-7.9")
