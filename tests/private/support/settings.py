"""Settings of the system."""

from __future__ import annotations

from pathlib import Path

from .requirements import missing


def write_setting(path: str, value: str, name: str) -> None:
    """Write a setting of the system; skip the test for lack of `name` if that fails."""
    try:
        Path(path).write_text(value)
    except OSError as error:
        missing(name, str(error))
