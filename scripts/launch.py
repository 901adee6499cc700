"""Run a module of the packages beside this file: python3 launch.py MODULE [ARGUMENT...].

The launchers (scripts/vm, scripts/kernel/build and others) call it.  Python puts the folder of the
file that it runs on its path, so the packages are found whatever the caller's folder is.
"""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
