"""Commands of the project as a user starts them: real processes whose output is returned."""

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.fork_server import ForkServer

Script = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture `script`
ROOT = Path(__file__).resolve().parents[1]
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DS_ACCELERATOR",
)
TIMEOUT = 2800.0  # seconds until a command counts as hung, also on a busy machine


def environment(*, gpus: bool = False, **more: str) -> dict[str, str]:
    """Environment of a user's shell: one thread, 160 columns, no rank; GPUs are hidden unless `gpus`."""
    own = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {**own, **hidden, "OMP_NUM_THREADS": "1", "COLUMNS": "160", **more}


def run_python(
    *arguments: object,
    expect: int = 0,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    gpus: bool = False,
    fresh: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """``python arguments...`` in `environment`; fails with the end of its output unless its status is `expect`.

    The command runs in a fork of the session's server, or with `fresh` in an interpreter of its own: where imports are
    what is tested, or the environment must be there before them.
    """
    argv, own = list(map(str, arguments)), environment(gpus=gpus, **(env or {}))
    if fresh or gpus or argv[0] == "-c":
        done = subprocess.run(
            [sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, env=own
        )
    else:
        done = _server().run(argv, cwd=cwd, env=own, timeout=TIMEOUT)
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


_servers: list[ForkServer] = []


def _server() -> ForkServer:
    """The server of this test process, started on first use."""
    if not _servers:
        _servers.append(ForkServer(ROOT, environment()))
        atexit.register(_servers[0].close)
    return _servers[0]
