"""Put back the bugs that guest_memfd has had, one at a time, and run the tests for them.

The bugs are the patches in scripts/kernel/*/past; the header of each names the commit and the
release that fixed the bug.  They are in the image of scripts/kernel/mutate, and are tried as its
breaks are.  The output is a table: each bug and its commit, with the rule and the test that caught
it, or with the reason why no test can see it in a VM.

NAME is the name of a bug, or a pattern such as 'slot.*'.
"""

from __future__ import annotations

from . import mutate


def main(arguments: list[str]) -> int:
    """The command scripts/kernel/history."""
    return mutate.run("history", __doc__, lambda kernel: kernel.past, arguments)
