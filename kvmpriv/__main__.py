"""``python -m kvmpriv``, and the console script."""

import gc
import os
import sys
from contextlib import suppress

gc.disable()  # what start-up makes stays: to look through it again and again is 4 ms for nothing

from .cli import main  # noqa: E402


def run() -> None:
    """Run the command line and end the process."""
    gc.freeze()
    gc.enable()
    status = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):  # a full disk is no reason for another status
                stream.flush()
    os._exit(status)  # all is closed and written; to take the interpreter apart is 4 ms more


if __name__ == "__main__":
    run()
