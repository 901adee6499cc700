"""The public names: what __all__ promises exists, dir() lists it, start-up does not load it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PUBLIC = ["kvmpriv", "kvmpriv.guest", "kvmpriv.private", "kvmpriv.uapi"]


@pytest.mark.parametrize("module", PUBLIC)
def test_dir_lists_what_all_does_and_every_name_exists(module: str) -> None:
    names = importlib.import_module(module)
    assert sorted(dir(names)) == sorted(names.__all__)
    for name in names.__all__:
        assert getattr(names, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = names.Nothing


def test_import_loads_neither_exits_nor_what_only_type_checkers_need() -> None:
    program = "import sys, kvmpriv; {}; print(*sys.modules)"

    def modules(use: str) -> list[str]:
        python = [sys.executable, "-c", program.format(use)]
        return subprocess.run(python, check=True, capture_output=True, text=True).stdout.split()

    assert "kvmpriv.cdefs.kvm" not in modules("pass")
    loaded = modules("kvmpriv.Kvm, kvmpriv.private")
    assert "kvmpriv.cdefs.kvm" in loaded
    unwanted = {"kvmpriv.exits", "kvmpriv.cdecl", "kvmpriv.guest", "kvmpriv.uapi", "cffi"}
    assert not unwanted & set(loaded)
    unwanted_ends = ("_structs", "cffi_types", "enums", "exit_reason")
    assert not [name for name in loaded if name.endswith(unwanted_ends)]


def test_submodules_are_attributes_without_an_import_of_their_own() -> None:
    program = "import kvmpriv; print(kvmpriv.guest.Machine.__name__, kvmpriv.uapi.kvm.KVM_RUN)"
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert shown.stdout == b"Machine 44672\n"
