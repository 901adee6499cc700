"""The cache of built kernels: found by their key, built under a lock, swept when there are many."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import sources
from .errors import Refused, Status, say
from .locks import if_free, locked
from .packages import DEB_TOOLS, TOOLS, ensure
from .paths import cache_root
from .recipe import MODULES_GIB, PLAIN_GIB, Plan, make_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

KEEP = 4  # kernels of a name; the older ones are from before a patch was edited


def name_of(plan: Plan) -> str:
    """What the folders of a plan's kernels are called, before the key.

    Kernels of a developer's own trees have names of their own: a bisection builds many of them, and
    must not remove those of Debian's sources.
    """
    return f"{plan.variant}-tree" if plan.source else plan.variant


def sweep(cache: Path, kind: str) -> None:
    """Remove the folders of interrupted builds, and all but the newest kernels of this name."""
    for scratch in cache.glob("*.building"):
        with if_free(scratch.with_suffix(".lock")) as free:
            if free:
                say(f"removing the folder of an interrupted build: {scratch}")
                shutil.rmtree(scratch, ignore_errors=True)
    done = [path for path in cache.glob(f"{kind}.*") if (path / "bzImage").exists()]
    done.sort(key=lambda path: path.stat().st_mtime)
    for old in done[: -KEEP or None]:
        shutil.rmtree(old, ignore_errors=True)
        old.with_suffix(old.suffix + ".lock").unlink(missing_ok=True)


def check_space(cache: Path, plan: Plan) -> None:
    """Refused, unless the file system of the cache has room for the build."""
    need = MODULES_GIB if plan.config else PLAIN_GIB * (1.5 if plan.debug else 1)
    free = shutil.disk_usage(cache).free / 2**30
    if free < need:
        raise Refused(
            Status.SPACE,
            f"no space: a build needs {need:.1f} GiB in {cache}, which has {free:.1f}. "
            "Free some, or set KVMPRIV_CACHE to another folder.",
        )


def with_source(plan: Plan, look: bool = False) -> Plan:
    """The plan with the place of Debian's source, which is fetched if need be."""
    if plan.source or plan.tarball:
        return plan
    return dataclasses.replace(plan, tarball=sources.find(plan.kernel, look))


def find_or_build(
    plan: Plan, make: Callable[[Plan, Path, Path], None] = make_kernel, look: bool = False
) -> Path:
    """The entry of the cache for `plan`; if there is none, `make` makes it.

    With `look` a newer source of Debian's is looked for (see sources.find).
    """
    cache = cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    needs = TOOLS | (DEB_TOOLS if plan.deb else {})
    if "CC" in os.environ:
        needs = {what: package for what, package in needs.items() if what != "gcc"}
        needs[os.environ["CC"].split()[0]] = os.environ["CC"].split()[0]
    ensure(needs)
    plan = with_source(plan, look)
    name = f"{name_of(plan)}.{plan.key()}"
    entry, scratch = cache / name, cache / f"{name}.building"
    if (entry / "bzImage").exists():
        os.utime(entry)
        return entry
    with locked(cache / f"{name}.lock"):
        if (entry / "bzImage").exists():  # built while we waited
            return entry
        # We have the lock, so a folder that exists is from an interrupted build.
        shutil.rmtree(scratch, ignore_errors=True)
        sweep(cache, name_of(plan))
        check_space(cache, plan)
        out = scratch / "out"
        out.mkdir(parents=True)
        started, cpu = time.monotonic(), children_seconds()
        log = cache / f"{plan.variant}.failed.log"
        try:
            plan = snapshot(plan, scratch / "inputs")
            make(plan, scratch, out)
            record = {
                "variant": plan.variant,
                "release": (out / "release").read_text().strip(),
                "patches": [patch.name for patch in plan.patches()],
                "cpu_seconds": round(children_seconds() - cpu),
                "wall_seconds": round(time.monotonic() - started),
            }
            (out / "build.json").write_text(json.dumps(record, indent=1) + "\n")
            out.rename(entry)
        except Refused as refused:
            shutil.copyfile(out / "build.log", log) if (out / "build.log").exists() else None
            raise Refused(refused.code, f"{refused}\nThe whole log: {log}") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        say(
            f"built {record['release']} in {record['wall_seconds']} s, "
            f"{record['cpu_seconds']} s of processor time"
        )
    return entry


def snapshot(plan: Plan, folder: Path) -> Plan:
    """The plan with a copy of the data, which may be edited during the build."""
    shutil.copytree(plan.data, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    copied = dataclasses.replace(plan, data=folder)
    if copied.key() != plan.key():
        raise Refused(Status.PATCH, f"{plan.data} was edited just now: call again")
    return copied


def children_seconds() -> float:
    """Processor time of all ended children, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
