"""Runs in a VM: boots Linux for each job in a file, and writes the results to another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main(folder: Path) -> None:
    results = {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        command = [sys.executable, "-m", "kvmpriv", "boot", *job["arguments"]]
        done = subprocess.run(command, input=job["stdin"].encode(), capture_output=True)
        results[name] = {
            "status": done.returncode,
            "stdout": done.stdout.decode(errors="replace"),
            "stderr": done.stderr.decode(errors="replace"),
        }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
