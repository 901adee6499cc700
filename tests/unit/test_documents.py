"""The documents: links between them lead to files, and the files that they name exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

LISTED = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True
).stdout.split()
DOCUMENTS = LISTED or ["README.md"]  # an exported tree has no index


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_to_files(name: str) -> None:
    document = ROOT / name
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


# The change log names paths that no longer exist.
@pytest.mark.parametrize("name", [name for name in DOCUMENTS if "CHANGELOG" not in name])
def test_paths_in_code_exist(name: str) -> None:
    """A path from the root of the repository, written as code, exists, or is made by a build."""
    named = re.findall(r"`((?:scripts|tests|cdefs|kvmpriv)/[\w./-]+)`", (ROOT / name).read_text())
    absent = {path for path in named if "NAME" not in path and not Path(ROOT, path).exists()}
    assert absent <= {"kvmpriv/cdefs/include/", "kvmpriv/_suite"}
