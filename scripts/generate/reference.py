"""Write the API reference from the docstrings, by pdoc, into build/docs; a warning is an error."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pdoc

import kvmpriv

TARGET = Path(__file__).resolve().parents[2] / "build" / "docs"
#: The command line has manual pages, and the C declarations are documented by the kernel.
WITHOUT = ("kvmpriv.__main__", "kvmpriv.cdefs", "kvmpriv.cli", "kvmpriv.commands")


def load() -> None:
    """Import all modules, and tell pdoc of them and of the names that are loaded on demand."""
    found = [module.name for module in pkgutil.walk_packages(kvmpriv.__path__, "kvmpriv.")]
    for name in ["kvmpriv", *(name for name in found if not name.startswith(WITHOUT))]:
        module: Any = importlib.import_module(name)
        for lazy in getattr(module, "__all__", ()):
            vars(module).setdefault(lazy, getattr(module, lazy))
        parent, _, child = name.rpartition(".")
        shown = getattr(sys.modules.get(parent), "__all__", None)
        if shown is not None and child not in shown:  # pdoc takes `__all__` for submodules, too
            shown.append(child)


def main() -> None:
    warnings.simplefilter("error")
    # The constructor that NamedTuple makes has no module whose names pdoc could look up.
    warnings.filterwarnings("ignore", r"Error parsing type annotation .* for .*\.__init__\.")
    # Nor do the keys of a TypedDict that is exported from another module than its own.
    warnings.filterwarnings("ignore", r"Cannot determine where .* is taken from")
    load()
    version = f"kvmpriv {kvmpriv.__version__}"
    pdoc.render.configure(docformat="restructuredtext", footer_text=version)
    pdoc.pdoc("kvmpriv", output_directory=TARGET)
    print(TARGET / "index.html")


if __name__ == "__main__":
    main()
