"""Hydra sweeps (`-m`): a failing job does not end the others, and a folder of jobs becomes a table. Imports no torch.

Each job's folder holds what Hydra writes (``.hydra/overrides.yaml``), the run's own ``metrics.csv`` or
``fewshot.json``, and after a failure ``failed.json``.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from mmdistill.errors import MMDistillError
from mmdistill.workflows.sweep_results import FAILED, objective

FAILED_EXIT_CODE = 1  # of a sweep with at least one failed job

_failed: list[Path] = []  # of the sweep that this process led, filled by `SweepFailureCallback`


def run_job(job: Callable[[], None], run_dir: Path, explain: Callable[[Exception], str]) -> float | None:
    """One job of a sweep; an exception is written to ``failed.json`` of its folder and said, and the sweep goes on.

    In a world of several processes it is raised: a rank that went on alone would wait for the others for ever. A
    `SystemExit` (a stop by a signal) ends the sweep too.

    Returns:
        `objective` of the job; None after a failure, which Optuna counts as a failed trial.
    """
    record = run_dir / FAILED
    record.unlink(missing_ok=True)  # of an earlier sweep into this folder
    try:
        job()
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise
        own = isinstance(error, MMDistillError)
        line = explain(error) if own else f"{type(error).__name__}: {error}"
        trace = "" if own else traceback.format_exc()
        run_dir.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"error": line, "traceback": trace}, indent=1, ensure_ascii=False) + "\n")
        print(f"{trace}mmdistill: job {run_dir.name} failed, the sweep goes on: {line}", file=sys.stderr, flush=True)
        return None
    return objective(run_dir)


class SweepFailureCallback(Callback):
    """Hydra's callback (``hydra.callbacks`` in the top-level configs): counts the failed jobs when the sweep is over.

    Jobs may have run in other processes (joblib, submitit), so it looks at their folders.
    """

    def __init__(self) -> None:
        self._began = 0.0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Records older than this are of another sweep."""
        self._began = time.time()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """See `exit_if_failed`."""
        records = sorted(Path(str(config.hydra.sweep.dir)).rglob(FAILED))
        _failed.extend(r for r in records if r.stat().st_mtime >= self._began - 1)


def exit_if_failed() -> None:
    """End with `FAILED_EXIT_CODE` and a list of the failed jobs, if there are any."""
    if _failed:
        lines = [f"  {record.parent}: {json.loads(record.read_text())['error']}" for record in _failed]
        print(f"mmdistill: error: {len(_failed)} jobs of the sweep failed:\n" + "\n".join(lines), file=sys.stderr)
        raise SystemExit(FAILED_EXIT_CODE)


# Summary -------------------------------------------------------------------------------------------------------------
