"""Commands of the project as a user starts them: real processes, their output kept."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

Script = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture `script`
ROOT = Path(__file__).resolve().parents[1]
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
TIMEOUT = 1400.0  # seconds until a command counts as hung: one of dozens of runs, on a machine that has other work


def environment(*, gpus: bool = False, **more: str) -> dict[str, str]:
    """What a user's shell gives: one thread, 160 columns, no place among other ranks, and no GPU unless asked for."""
    own = {name: value for name, value in os.environ.items() if name not in PLACE}
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {**own, **hidden, "OMP_NUM_THREADS": "1", "COLUMNS": "160", **more}


def run_python(
    *arguments: object,
    expect: int = 0,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    gpus: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """``python arguments...`` in `environment`; fails with the end of its output unless its status is `expect`."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(gpus=gpus, **(env or {})),
    )
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done
