"""Large pages: shmem that has them, and guests that have them mapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .accounting import meminfo
from .requirements import missing
from .rig import Rig
from .settings import write_setting

SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


@contextmanager
def huge_pages() -> Iterator[None]:
    """Shmem files get large pages inside, if the system has free ones."""
    try:
        before = Path(SHMEM_ENABLED).read_text().split("[")[1].split("]")[0]
    except OSError as error:
        missing("huge-pages", str(error))
    write_setting(SHMEM_ENABLED, "always", "huge-pages")
    try:
        yield
    finally:
        Path(SHMEM_ENABLED).write_text(before)


def need_large_pages(rig: Rig) -> None:
    """Skip the test if the guest has no large page mapped."""
    if not rig.mapped()[1]:
        missing("huge-pages", "shmem_enabled=always, and the guest has no large page mapped")


def shmem_huge_pages() -> int:
    """How many bytes of all files in memory are large pages."""
    return meminfo("ShmemHugePages")
