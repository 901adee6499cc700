"""Linux trees of a developer: what state they are in, and a copy that is compiled again and again.

A bisection builds neighbours, of which most objects are the same.  So a tree under git is copied
only once; later its changed files alone are copied, and make compiles what depends on them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

from .errors import say
from .locks import if_free

KEEP = 2  # copies in the cache, of some GiB each


def _git(tree: Path, *arguments: str) -> bytes | None:
    """What git prints; None if this is no work tree that git reads, or if there is no git."""
    command = ["git", "-C", str(tree), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def is_git(tree: Path) -> bool:
    """Whether `tree` is the top of a work tree of git with a commit."""
    return (tree / ".git").exists() and _git(tree, "rev-parse", "--verify", "HEAD") is not None


def state(tree: Path) -> bytes | None:
    """The contents of a tree under git in a few bytes; None if git does not know them all.

    Two checkouts of one commit have the same state, whatever their times and places are.
    """
    changed = _git(tree, "status", "--porcelain", "--untracked-files=all") if is_git(tree) else None
    return _git(tree, "rev-parse", "HEAD^{tree}") if changed == b"" else None


def files(tree: Path) -> dict[str, tuple[int, int, int]]:
    """The files of a tree under git that it does not ignore: mode, size and time of each."""
    listed = _git(tree, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or b""
    found = {}
    for name in map(os.fsdecode, listed.split(b"\0")):
        try:
            status = (tree / name).lstat()
        except OSError:  # deleted, and git is not told yet
            continue
        if name and not stat.S_ISDIR(status.st_mode):  # a submodule
            found[name] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def synchronize(tree: Path, copy: Path, record: Path) -> None:
    """Make `copy` like `tree`; `record` is a file that tells what `copy` was made from.

    A copied file gets the present time, whatever its time in `tree` is, so that make compares it
    with the objects as it should.
    """
    try:
        before = {name: tuple(entry) for name, entry in json.loads(record.read_text()).items()}
    except (OSError, ValueError):  # never made, or not to the end
        before = {}
        shutil.rmtree(copy, ignore_errors=True)
    # After an interruption here the next call begins anew.
    record.unlink(missing_ok=True)
    now = files(tree)
    for name in before.keys() - now.keys():
        (copy / name).unlink(missing_ok=True)
    changed = [name for name, entry in now.items() if before.get(name) != entry]
    for name in changed:
        source, target = tree / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        else:
            shutil.copyfile(source, target)
            shutil.copymode(source, target)
    record.write_text(json.dumps(now))
    say(f"copied {len(changed)} of {len(now)} files of {tree}")


def place(cache: Path, tree: Path, variant: str) -> Path:
    """The folder in the cache for the copy of `tree`; older copies are removed."""
    digest = hashlib.sha256(f"{tree}\0{variant}".encode()).hexdigest()[:12]
    chosen = cache / "trees" / digest
    chosen.mkdir(parents=True, exist_ok=True)
    os.utime(chosen)
    copies = [path for path in chosen.parent.iterdir() if path.is_dir()]
    for old in sorted(copies, key=lambda path: path.stat().st_mtime)[:-KEEP]:
        with if_free(old.with_suffix(".lock")) as free:
            if free:
                shutil.rmtree(old, ignore_errors=True)
    return chosen
