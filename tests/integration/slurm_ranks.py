"""Runs ranks that the stand-in for SLURM has started, in forks of this process: slurm_ranks.py SCRIPT STARTS.json.

Each start has the variables of a rank and its arguments. Exits with the highest status.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from mmdistill.distributed import launch


def _run(script: str, start: dict[str, object]) -> None:
    """Become the rank. The name of the first host is not one of this machine."""
    variables = {name: str(value) for name, value in start.items() if name.startswith("SLURM_")}
    os.environ.update(variables, MASTER_ADDR="127.0.0.1")
    launch._PARENT = os.getppid()
    sys.argv = [script, *start["arguments"]]  # type: ignore[misc]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    pids = []
    for entry in json.loads(Path(sys.argv[2]).read_text()):
        pids.append(os.fork())
        if pids[-1] == 0:
            _run(sys.argv[1], entry)
            sys.exit(0)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
