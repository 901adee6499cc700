"""Run the model of private memory against a kernel for as long as you like.

    [HOURS=1] [STEPS=N] [SEED=N] [ARTIFACTS=DIR] scripts/soak NAME [OPTION of scripts/vm]...

HOURS      the longest time, such as 0.1
STEPS      end after so many steps; the run fails if there is no time for them
SEED       the first seed, to repeat a run
ARTIFACTS  the folder for the scripts that reproduce failures
"""

from __future__ import annotations

import os
from pathlib import Path

from . import suite
from .errors import Status, say
from .paths import cache_root

#: Seconds beyond the time limit, to end a round and to shrink a failure.
MORE = 1800


def _expressions(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The expressions of pytest's option -k among `arguments`, each in brackets; and the rest.

    pytest takes the last -k alone, and it would be the caller's: then other tests run.
    """
    found, rest = [], []
    words = iter(arguments)
    for word in words:
        if word.startswith("-k"):
            found.append(f"({word.removeprefix('-k').removeprefix('=') or next(words, '')})")
        else:
            rest.append(word)
    return found, rest


def main(arguments: list[str]) -> int:
    """The command scripts/soak."""
    run = suite.parse("soak", __doc__, arguments)
    hours = os.environ.get("HOURS") or "1"
    try:
        seconds = int(float(hours) * 3600)
    except (ValueError, OverflowError):  # OverflowError: infinite
        seconds = 0
    if seconds <= 0:
        say(f"soak: HOURS must be a number above 0, not {hours!r}")
        return Status.USAGE
    artifacts = Path(os.environ.get("ARTIFACTS") or cache_root().parent / "soak").absolute()
    artifacts.mkdir(parents=True, exist_ok=True)
    environment = {
        "KVMPRIV_MODEL_SECONDS": str(seconds),
        "KVMPRIV_MODEL_STEPS": os.environ.get("STEPS", ""),
        "KVMPRIV_MODEL_SEED": os.environ.get("SEED", ""),
        "KVMPRIV_ARTIFACTS": str(artifacts),
    }
    given, others = _expressions(run.tests)
    chosen = " and ".join(filter(None, ("does_what_the_model_says", run.abi, *given)))
    run = run._replace(tests=["tests/private/test_model.py", "-k", chosen, *others])
    return suite.start(run, seconds + MORE, ["--output-dir", str(artifacts)], environment)
