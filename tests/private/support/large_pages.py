"""Large pages: shmem that has them, and guests that have them mapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .requirements import missing
from .rig import Rig
from .settings import write_setting


@contextmanager
def huge_pages() -> Iterator[None]:
    """Shmem files get large pages inside, if the system has free ones."""
    setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    try:
        before = Path(setting).read_text().split("[")[1].split("]")[0]
    except OSError as error:
        missing("huge-pages", str(error))
    write_setting(setting, "always", "huge-pages")
    try:
        yield
    finally:
        Path(setting).write_text(before)


def need_large_pages(rig: Rig) -> None:
    """Skip the test if the guest has no large page mapped."""
    if not rig.mapped()[1]:
        missing("huge-pages", "shmem_enabled=always, and the guest has no large page mapped")
