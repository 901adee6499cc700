"""Run a command of the package kbuild: python3 launch.py MODULE [ARGUMENT...].

The launchers call it (scripts/vm, scripts/kernel/build, ...).  Python puts the folder of this file
on its path, so that the package is found wherever the caller is.
"""

import importlib
import sys

if __name__ == "__main__":
    module = importlib.import_module(f"kbuild.{sys.argv[1]}")
    sys.exit(module.main(sys.argv[2:]))
