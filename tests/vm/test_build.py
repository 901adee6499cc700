"""scripts/kernel/build on a small imitation of a kernel tree, so that every path takes seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kbuild import trees
from kbuild.errors import Refused
from kbuild.locks import locked
from kbuild.packages import DEB_TOOLS, TOOLS, absent, ensure
from kbuild.recipe import Plan, options, unmet
from kbuild.store import KEEP, find_or_build, name_of, sweep
from private.support.requirements import missing

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

Build = Callable[..., subprocess.CompletedProcess[str]]

MAKEFILE = """\
mrproper:
allnoconfig:
\tgrep -v DROPPED $(KCONFIG_ALLCONFIG) > .config
olddefconfig:
bindeb-pkg:
	echo packaged > ../linux-image-6.1.0-fake_1_amd64.deb
bzImage:
\t@if [ -e slow ]; then echo compiling; sleep 60; fi
\t@if grep -q broken body; then echo "body:1: error: it is broken"; exit 1; fi
\tmkdir -p arch/x86/boot include/config
\tcp body arch/x86/boot/bzImage; cp body vmlinux; cp body System.map
\techo 6.1.0-fake > include/config/kernel.release
headers_install:
\tmkdir -p $(INSTALL_HDR_PATH)/include
"""
PATCH = """\
--- a/body
+++ b/body
@@ -1,3 +1,3 @@
 one
-two
+TWO
 three
@@ -8,3 +8,3 @@
 eight
-nine
+NINE
 ten
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with a Kbuild and a Makefile that has the targets which a build calls."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "Kbuild").touch()
    (tree / "Makefile").write_text(MAKEFILE)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    (tree / "body").write_text("\n".join(words) + "\n")
    return tree


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A copy of the scripts with a series of one patch; its folder of data."""
    if lacking := absent(TOOLS):
        missing("build-tools", f"no {', '.join(lacking)}")
    everything = tmp_path / "scripts"
    ignored = shutil.ignore_patterns("restrictedmem", "breaks", "__pycache__")
    shutil.copytree(SCRIPTS, everything, ignore=ignored)
    copy = everything / "kernel"
    for folder in ("abi", "fixes"):
        (copy / "restrictedmem" / folder).mkdir(parents=True)
    (copy / "restrictedmem" / "abi" / "0001-shout.patch").write_text(PATCH)
    return copy


@pytest.fixture
def build(scripts: Path, tree: Path, tmp_path: Path) -> Build:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(scripts, tree, *arguments),
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def command(scripts: Path, tree: Path, *arguments: str) -> list[str]:
    words = arguments or ("restrictedmem",)
    return [str(scripts / "build"), *words, "--source", str(tree)]


def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"KVMPRIV_CACHE": str(tmp_path / "cache")}


def image_of(result: subprocess.CompletedProcess[str]) -> Path:
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])


def test_build_publishes_and_finds_again(build: Build, tmp_path: Path) -> None:
    first = build()
    image = image_of(first)
    assert first.stdout == f"{image}\n"
    assert "TWO" in image.read_text()  # the patch is in it
    assert {path.name for path in image.parent.iterdir()} == {
        *("bzImage", "vmlinux", "System.map", "config", "headers", "release"),
        *("build.log", "build.json"),
    }
    record = json.loads((image.parent / "build.json").read_text())
    assert record["patches"] == ["0001-shout.patch"]
    assert 'CONFIG_LOCALVERSION="-restrictedmem"' in (image.parent / "config").read_text()
    made = image.stat().st_mtime_ns
    second = build()
    assert image_of(second) == image
    assert image.stat().st_mtime_ns == made
    assert second.stderr == ""
    assert not list((tmp_path / "cache").glob("*.building"))


def test_edited_patch_and_edited_tree_build_anew(build: Build, scripts: Path, tree: Path) -> None:
    first = image_of(build())
    patch = scripts / "restrictedmem" / "abi" / "0001-shout.patch"
    patch.write_text(PATCH.replace("+NINE", "+NeuN"))
    second = image_of(build())
    assert second != first
    assert "NeuN" in second.read_text()
    with (tree / "body").open("a") as body:
        body.write("eleven\n")
    third = image_of(build())
    assert third not in (first, second)
    assert "eleven" in third.read_text()


def test_patch_that_no_longer_applies_names_patch_and_hunk(build: Build, tree: Path) -> None:
    body = tree / "body"
    body.write_text(body.read_text().replace("nine", "9"))
    result = build()
    assert result.returncode == 4
    assert "abi/0001-shout.patch does not apply" in result.stderr
    assert "hunk #2 of body (line 8)" in result.stderr
    assert "hunk #1" not in result.stderr
    assert "+NINE" in result.stderr  # the hunk itself is shown
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_literal_leaves_out_the_fixes(build: Build, scripts: Path) -> None:
    fix = PATCH.replace("two", "TWO").replace("+TWO", "+2").split("@@ -8")[0]
    (scripts / "restrictedmem" / "fixes" / "0001-fix.patch").write_text(fix)
    fixed = image_of(build())
    literal = image_of(build("restrictedmem", "--literal"))
    assert fixed.read_text().split()[1] == "2"
    assert literal.read_text().split()[1] == "TWO"
    assert literal.parent.name.startswith("restrictedmem-literal-tree.")


def test_option_that_did_not_survive_is_an_error(build: Build, scripts: Path) -> None:
    with (scripts / "configs" / "base.config").open("a") as config:
        config.write("CONFIG_DROPPED=y\n")
    result = build()
    assert result.returncode == 5
    assert "CONFIG_DROPPED=y (the source has no such option)" in result.stderr


def test_config_of_ones_own_is_completed_and_packaged(
    build: Build, scripts: Path, tmp_path: Path
) -> None:
    try:
        ensure(DEB_TOOLS)
    except Refused as refused:
        missing("build-tools", str(refused))
    own = tmp_path / "own.config"
    own.write_text(
        'CONFIG_OWN=m\n# CONFIG_RESTRICTEDMEM is not set\nCONFIG_SYSTEM_TRUSTED_KEYS="a"\n'
    )
    result = build("restrictedmem", "--config", str(own), "--deb")
    image = image_of(result)
    made = (image.parent / "config").read_text()
    assert options(made)["CONFIG_OWN"] == "m"
    assert made.count("CONFIG_RESTRICTEDMEM") == 1
    assert options(made)["CONFIG_RESTRICTEDMEM"] == "y"
    assert options(made)["CONFIG_SYSTEM_TRUSTED_KEYS"] == '""'
    assert "CONFIG_KVM_AMD" not in made  # nothing of our small config
    package = image.parent / "linux-image-6.1.0-fake_1_amd64.deb"
    assert package.read_text() == "packaged\n"
    assert f"apt-get install {package}" in result.stderr
    assert "untried" in result.stderr


def test_compile_error_is_shown_and_nothing_is_cached(build: Build, tree: Path) -> None:
    with (tree / "body").open("a") as body:
        body.write("broken\n")
    result = build()
    assert result.returncode == 6
    assert "it is broken" in result.stderr
    assert result.stderr.count("\n") < 12
    (log,) = (line for line in result.stderr.splitlines() if line.startswith("The whole log: "))
    assert "it is broken" in Path(log.removeprefix("The whole log: ")).read_text()
    assert build().returncode == 6


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_next_call_recovers_from_a_cut_off_build(
    build: Build, scripts: Path, tree: Path, tmp_path: Path, how: signal.Signals
) -> None:
    (tree / "slow").touch()
    with subprocess.Popen(
        command(scripts, tree), env=environment(tmp_path), stderr=subprocess.PIPE, text=True
    ) as first:
        assert first.stderr
        wait_for(first.stderr, "compiling")
        scratch = list((tmp_path / "cache").glob("*.building"))
        assert len(scratch) == 1
        first.send_signal(how)
        assert first.wait(10) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    (tree / "slow").unlink()
    assert "TWO" in image_of(build()).read_text()
    assert not list((tmp_path / "cache").glob("*.building"))


def test_patch_edited_during_a_build_does_not_get_into_it(
    build: Build, scripts: Path, tree: Path, tmp_path: Path
) -> None:
    makefile = tree / "Makefile"
    makefile.write_text(makefile.read_text().replace("sleep 60", "sleep 2"))
    (tree / "slow").touch()
    with subprocess.Popen(
        command(scripts, tree),
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        wait_for(first.stderr, "compiling")
        (scripts / "restrictedmem" / "abi" / "0002-late.patch").write_text("")
        out, _ = first.communicate(timeout=30)
    record = json.loads((Path(out.strip()).parent / "build.json").read_text())
    assert record["patches"] == ["0001-shout.patch"]
    (scripts / "restrictedmem" / "abi" / "0002-late.patch").unlink()
    assert image_of(build()) == Path(out.strip())


def test_second_of_two_builds_waits_and_says_so(scripts: Path, tree: Path, tmp_path: Path) -> None:
    makefile = tree / "Makefile"
    makefile.write_text(makefile.read_text().replace("sleep 60", "sleep 3"))
    (tree / "slow").touch()
    start = {"env": environment(tmp_path), "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command(scripts, tree), **start, **pipes)  # type: ignore[call-overload]
    wait_for(first.stderr, "compiling")
    second = subprocess.Popen(command(scripts, tree), **start, **pipes)  # type: ignore[call-overload]
    out1, _ = first.communicate(timeout=30)
    out2, err2 = second.communicate(timeout=30)
    assert (first.returncode, second.returncode) == (0, 0)
    assert out1 == out2
    assert f"waiting: process {first.pid} is building" in err2
    assert "compiling" not in err2


def wait_for(stream: object, word: str) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if word in stream.readline():  # type: ignore[attr-defined]
            return
    raise AssertionError(f"never said {word!r}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "unknown kernel 'bogus': there are restrictedmem"),
        (["guest_memfd", "--literal"], "guest_memfd has none"),
        (["guest_memfd", "--config", "/nonexistent"], "/nonexistent does not exist"),
        ([], "required: NAME"),
    ],
)
def test_usage(arguments: list[str], words: str) -> None:
    result = subprocess.run(
        [str(SCRIPTS / "kernel/build"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr


def test_source_that_is_no_tree(build: Build, tree: Path) -> None:
    (tree / "Kbuild").unlink()
    result = build()
    assert result.returncode == 3
    assert "is not a Linux source tree" in result.stderr


def test_without_tools_what_is_missing_is_listed(tmp_path: Path, tree: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = subprocess.run(
        [sys.executable, SCRIPTS / "launch.py", "kbuild.build", "guest_memfd", "--source", tree],
        env={"PATH": str(empty), "KVMPRIV_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "missing: " in result.stderr
    assert "gcc" in result.stderr
    assert "apt-get install" in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tree: Path) -> None:
    monkeypatch.setenv("KVMPRIV_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**30))
    with pytest.raises(Refused, match=r"needs 3\.5 GiB in .*, which has 1\.0") as refused:
        find_or_build(Plan("guest_memfd", source=tree))
    assert refused.value.code == 7


def test_a_bisection_leaves_the_kernels_of_debian(tmp_path: Path, tree: Path) -> None:
    """Of a developer's trees the newest kernels are kept, and all those of other names."""
    own, debian = name_of(Plan("guest_memfd", source=tree)), name_of(Plan("guest_memfd"))
    names = [f"{debian}.0", *(f"{own}.{number}" for number in range(KEEP + 2)), f"{debian}-6.12.0"]
    for seconds, name in enumerate(names):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "bzImage").touch()
        os.utime(folder, (seconds, seconds))
    for kind in (debian, own):
        sweep(tmp_path, kind)
    assert sorted(path.name for path in tmp_path.iterdir() if path != tree) == sorted(
        [names[0], *names[3:]]
    )


def test_key_follows_what_decides(
    scripts: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(**more: bool) -> str:
        return Plan("restrictedmem", source=tree, data=scripts, **more).key()  # type: ignore[arg-type]

    seen = [key()]
    assert key() == seen[0]
    seen += [key(debug=True), key(literal=True)]
    with (scripts / "configs" / "base.config").open("a") as config:
        config.write("CONFIG_MORE=y\n")
    seen.append(key())
    (scripts / "restrictedmem" / "fixes" / "0001-x.patch").write_text("")
    seen.append(key())
    compiler = scripts / "other-cc"
    compiler.write_text("#!/bin/sh\necho other 1.0\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    seen.append(key())
    assert len(set(seen)) == len(seen) == 6


def test_options_that_were_not_met() -> None:
    """An option that Kconfig dropped or changed is named, whatever is asked for."""
    asked = "CONFIG_A=y\nCONFIG_B=n\n# CONFIG_C is not set\nCONFIG_D=17\n# words\n"
    values = {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_C": "n", "CONFIG_D": "17"}
    assert options(asked) == values
    assert unmet(asked, values) == []
    assert unmet(asked, {"CONFIG_A": "y", "CONFIG_D": "17"}) == []
    assert unmet(asked, {"CONFIG_A": "m", "CONFIG_C": "y"}) == [
        "CONFIG_A=y (now m)",
        "CONFIG_C=n (now y)",
        "CONFIG_D=17 (now n)",
    ]


@pytest.mark.parametrize(
    ("mark", "made", "exists", "named"),
    [
        ("", {}, False, "CONFIG_NEW=y (the source has no such option)"),
        ("", {}, True, "CONFIG_NEW=y (now n)"),
        (" # if it exists", {}, False, ""),
        (" # if it exists", {}, True, "CONFIG_NEW=y (now n)"),
        (" # if it exists", {"CONFIG_NEW": "m"}, True, "CONFIG_NEW=y (now m)"),
        (" # or CONFIG_OLD=y", {"CONFIG_OLD": "y"}, True, ""),
        (" # or CONFIG_OLD=y", {"CONFIG_OLD": "m"}, True, "CONFIG_NEW=y (now n)"),
        (" # or CONFIG_OLD=y", {}, False, "CONFIG_NEW=y (the source has no such option)"),
    ],
)
def test_options_of_other_releases(
    mark: str, made: dict[str, str], exists: bool, named: str
) -> None:
    """A mark excuses what another release does not have, and nothing that this one has."""
    asked = f"CONFIG_NEW=y{mark}\n"
    assert options(asked) == {"CONFIG_NEW": "y"}
    assert unmet(asked, made, lambda option: exists) == [named] * bool(named)


def test_marks_do_not_reach_kconfig(build: Build, scripts: Path) -> None:
    """A marked option that the source does not have is no error; one that it drops is one."""
    config = scripts / "configs" / "base.config"
    text = config.read_text()
    config.write_text(text + "CONFIG_DROPPED=y # if it exists\nCONFIG_TAKEN=y # if it exists\n")
    made = (image_of(build()).parent / "config").read_text()
    assert "CONFIG_TAKEN=y\n" in made
    assert "#" not in made.partition("CONFIG_TAKEN")[2].splitlines()[0]


def test_a_marked_option_that_the_source_has(build: Build, scripts: Path, tree: Path) -> None:
    """The mark is no excuse in a source that defines the option."""
    (tree / "Kconfig.more").write_text("config DROPPED\n\tbool\n")
    with (scripts / "configs" / "base.config").open("a") as config:
        config.write("CONFIG_DROPPED=y # if it exists\n")
    result = build()
    assert result.returncode == 5
    assert "CONFIG_DROPPED=y (now n)" in result.stderr


def test_a_release_that_the_configs_do_not_know(build: Build, scripts: Path, tree: Path) -> None:
    """It is said, and beside a lost option also what to do."""
    makefile = tree / "Makefile"
    makefile.write_text("VERSION = 9\nPATCHLEVEL = 4\n" + makefile.read_text())
    known = build()
    image_of(known)
    assert "this source is Linux 9.4, and scripts/kernel/configs was tried with 6.1" in known.stderr
    with (scripts / "configs" / "base.config").open("a") as config:
        config.write("CONFIG_DROPPED=y\n")
    result = build()
    assert result.returncode == 5
    assert "CONFIG_DROPPED=y (the source has no such option)" in result.stderr
    assert "Linux 9.4" in result.stderr
    assert "mark those of some releases with '# if it exists'" in result.stderr


def test_a_default_of_kvm_that_the_config_loses(
    build: Build, tree: Path, scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that the configs do not name, and that Kconfig would turn on, is named.

    A caller's own series may add one; for Debian's source the configs must name it.
    """
    makefile = tree / "Makefile"
    text = makefile.read_text().replace(
        "olddefconfig:\n",
        "olddefconfig:\n\tgrep -q CONFIG_KVM_CLOCKS $(KCONFIG_CONFIG) "
        "|| echo CONFIG_KVM_CLOCKS=y >> $(KCONFIG_CONFIG)\n",
    )
    text = text.replace(
        "> .config\n", "> .config; echo '# CONFIG_KVM_CLOCKS is not set' >> .config\n"
    )
    makefile.write_text("KCONFIG_CONFIG ?= .config\n" + text)
    result = build()
    image_of(result)
    assert "that the config leaves out: CONFIG_KVM_CLOCKS=y" in result.stderr
    tarball = tmp_path / "linux-source-6.1.tar.xz"
    subprocess.run(["tar", "-cJf", tarball, "-C", tmp_path, "tree"], check=True)
    monkeypatch.setenv("KVMPRIV_CACHE", str(tmp_path / "cache"))
    plan = Plan("restrictedmem", data=scripts, tarball=tarball)
    with pytest.raises(Refused, match="that the config leaves out: CONFIG_KVM_CLOCKS=y") as refused:
        find_or_build(plan)
    assert refused.value.code == 5
    with (scripts / "configs/base.config").open("a") as config:
        config.write("CONFIG_KVM_CLOCKS=n\n")
    assert "TWO" in (find_or_build(plan) / "bzImage").read_text()


@pytest.fixture
def repository(tree: Path, scripts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree under git, in a commit; make copies `body` only if it is newer than the image."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "nobody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "nobody@example.org")
    makefile = tree / "Makefile"
    text = makefile.read_text().replace("bzImage:\n", "bzImage: vmlinux\n")
    text = text.replace("cp body vmlinux;", "").replace("cp body arch", "cp vmlinux arch")
    makefile.write_text(f"{text}vmlinux: body\n\tcp body vmlinux\n")
    (tree / ".gitignore").write_text("*.o\n")
    git(tree, "init", "-q")
    commit(tree, "first")
    return tree


def git(tree: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", tree, *arguments], check=True, capture_output=True)
    return done.stdout.decode().strip()


def commit(tree: Path, subject: str) -> None:
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", subject)


def test_a_tree_under_git_is_built_from_what_has_changed(
    build: Build, repository: Path, tmp_path: Path
) -> None:
    """The copy of the tree is kept: the next build copies and compiles what has changed."""
    body = repository / "body"
    (repository / "left.o").touch()
    first = build("guest_memfd")
    assert "copied 4 of 4 files" in first.stderr
    (copy,) = (tmp_path / "cache/trees").glob("*/linux")
    assert not (copy / "left.o").exists()
    body.write_text(body.read_text() + "eleven\n")
    commit(repository, "second")
    second = build("guest_memfd")
    assert "copied 1 of 4 files" in second.stderr
    assert "eleven" in image_of(second).read_text()
    # A commit that was built is found, whenever and wherever it was checked out.
    git(repository, "checkout", "-q", "HEAD~")
    again = build("guest_memfd")
    assert (image_of(again), again.stderr) == (image_of(first), "")
    assert "eleven" not in image_of(again).read_text()


def test_a_file_that_became_older_is_compiled(build: Build, repository: Path) -> None:
    """Times of a tree may go back; its copy's do not, so make sees each change."""
    body = repository / "body"
    image_of(build("guest_memfd"))
    body.write_text("an older state\n")
    os.utime(body, (0, 0))
    assert image_of(build("guest_memfd")).read_text() == "an older state\n"


def test_files_that_come_and_go(build: Build, repository: Path, tmp_path: Path) -> None:
    """The copy has what the tree has: also what git does not know yet, and nothing more."""
    (repository / "untracked").touch()
    (repository / "link").symlink_to("body")
    (repository / "folder").mkdir()
    (repository / "folder/file").touch()
    (repository / "prefix").symlink_to("folder")
    image_of(build("guest_memfd"))
    (copy,) = (tmp_path / "cache/trees").glob("*/linux")
    assert (copy / "untracked").is_file()
    assert (copy / "link").is_symlink()
    assert (copy / "prefix/file").is_file()
    (repository / "untracked").unlink()
    (repository / "link").unlink()
    (repository / "link").write_text("a file now\n")
    image_of(build("guest_memfd"))
    assert not (copy / "untracked").exists()
    assert not (copy / "link").is_symlink()
    assert (copy / "body").is_file()


def test_a_copy_that_was_interrupted_is_made_anew(
    build: Build, repository: Path, tmp_path: Path
) -> None:
    """Without the record of what was copied nothing of the copy is trusted."""
    image_of(build("guest_memfd"))
    (copy,) = (tmp_path / "cache/trees").glob("*/linux")
    (copy.parent / "copied").unlink()
    (copy / "body").write_text("of another tree\n")
    (repository / "body").write_text("new\n")
    result = build("guest_memfd")
    assert "copied 4 of 4 files" in result.stderr
    assert image_of(result).read_text() == "new\n"


def test_old_copies_are_removed(tmp_path: Path) -> None:
    """The cache keeps the newest copies; one that is being built is left alone."""
    places = []
    for number in range(trees.KEEP + 1):
        places.append(trees.place(tmp_path, Path(f"/tree{number}"), "guest_memfd"))
        os.utime(places[-1], (number, number))
    assert [path.exists() for path in places] == [False] + [True] * trees.KEEP
    with locked(places[1].with_suffix(".lock")):
        trees.place(tmp_path, Path("/another"), "guest_memfd")
    assert places[1].exists()
    assert trees.place(tmp_path, Path("/another"), "guest_memfd-debug") not in places
    assert not places[1].exists()
