"""Commands of the project as a user starts them: real processes, their output kept."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(
    *arguments: object, expect: int = 0, cwd: Path = ROOT, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """``python arguments...`` with one thread; fails with the end of its output unless its status is `expect`."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done
