"""Hydra sweeps (`-m`): a failing job does not end the others, and a folder of jobs becomes a table. Imports no torch.

Each job's folder holds what Hydra writes (``.hydra/overrides.yaml``), the run's own ``metrics.csv`` or
``fewshot.json``, and after a failure ``failed.json``.
"""

import csv
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

FAILED = "failed.json"
FAILED_EXIT_CODE = 1  # of a sweep with at least one failed job

_failed: list[Path] = []  # of the sweep that this process led, filled by `FailedJobs`


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
        own = type(error).__module__.startswith("mmdistill.")
        line = explain(error) if own else f"{type(error).__name__}: {error}"
        trace = "" if own else traceback.format_exc()
        run_dir.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"error": line, "traceback": trace}, indent=1, ensure_ascii=False) + "\n")
        print(f"{trace}mmdistill: job {run_dir.name} failed, the sweep goes on: {line}", file=sys.stderr, flush=True)
        return None
    return objective(run_dir)


class FailedJobs(Callback):
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


def objective(run_dir: Path) -> float:
    """What a run is judged by, from its files: few-shot accuracy (larger is better), else its last epoch's loss.

    Raises:
        ValueError: the run left neither.
    """
    accuracy = run_dir / "fewshot.json"
    if accuracy.is_file():
        return float(json.loads(accuracy.read_text())["top1_action_ensemble"])
    last = last_metrics(run_dir / "metrics.csv")
    for name in ("loss", "train_loss"):
        if name in last:
            return last[name]
    raise ValueError(f"{run_dir} has no fewshot.json and no loss in metrics.csv")


def last_metrics(path: Path) -> dict[str, float]:
    """The last number in each column of a metrics.csv; empty where there is no file."""
    last: dict[str, float] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    try:
                        last[name] = float(value)
                    except (TypeError, ValueError):
                        continue  # an empty cell: Lightning writes each metric into a row of its own
    return last


# Summary -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobRow:
    """One line of the table: a job, or one few-shot setting of a job.

    Attributes:
        job: folder name.
        overrides: key to value, as text.
        metric: name of the number that is drawn; empty for a failed job.
        values: all numbers by name.
        error: first line of the failure; empty if there was none.
    """

    job: str
    overrides: dict[str, str]
    metric: str = ""
    values: dict[str, float] = field(default_factory=dict)
    error: str = ""


def read_sweep(folder: Path) -> list[JobRow]:
    """The jobs of a multirun folder, in the order of their numbers.

    Raises:
        ValueError: there is no job in it.
    """
    jobs = sorted((p.parents[1] for p in folder.rglob(".hydra/overrides.yaml")), key=_job_order)
    if not jobs:
        raise ValueError(f"{folder} holds no job with .hydra/overrides.yaml; give the folder that `-m` wrote")
    return [row for job in jobs for row in _job_rows(job, job.relative_to(folder).as_posix())]


def _job_order(job: Path) -> tuple[int, str]:
    number = job.name.rpartition("_")[2]
    return (int(number) if number.isdigit() else sys.maxsize, str(job))


def _job_rows(job: Path, name: str) -> list[JobRow]:
    overrides = _overrides(job / ".hydra" / "overrides.yaml")
    if (job / FAILED).is_file():
        return [JobRow(name, overrides, error=json.loads((job / FAILED).read_text())["error"].splitlines()[0])]
    if (job / "fewshot.json").is_file():
        return _fewshot_rows(json.loads((job / "fewshot.json").read_text()), name, overrides)
    last = last_metrics(job / "metrics.csv")
    for metric in ("loss", "train_loss"):
        if metric in last:
            return [JobRow(name, overrides, metric, last)]
    return [JobRow(name, overrides, error="unfinished: neither fewshot.json nor a loss in metrics.csv")]


def _fewshot_rows(report: dict[str, Any], name: str, overrides: dict[str, str]) -> list[JobRow]:
    """One row per setting; a list of `k_shot`, `n_way` or `head` in one job becomes a column like a swept key."""
    rows = []
    settings = report["settings"]
    varied = [k for k in ("n_way", "k_shot", "head") if len({str(s[k]) for s in settings}) > 1]
    keys = {"n_way": "data_module.n_way", "k_shot": "data_module.k_shot", "head": "head"}
    for setting in settings:
        scored = setting["rows"].get(report["network"]) or next(iter(setting["rows"].values()))
        values = {k: float(v) for k, v in scored.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        own = {**overrides, **{keys[k]: str(setting[k]) for k in varied}}
        rows.append(JobRow(name, own, "top1_action_ensemble", values))
    return rows


def _overrides(path: Path) -> dict[str, str]:
    pairs = (str(text).partition("=") for text in OmegaConf.load(path))
    return {key.lstrip("+"): value for key, _, value in pairs}


def swept_keys(rows: Sequence[JobRow]) -> list[str]:
    """Keys whose value differs between the jobs."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    return [key for key in keys if len({row.overrides.get(key) for row in rows}) > 1]


def write_table(rows: Sequence[JobRow], path: Path) -> None:
    """``sweep.csv``: job, the swept keys, all numbers, the error."""
    keys = swept_keys(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *keys, *names, "error"])
        for row in rows:
            numbers = [row.values.get(name, "") for name in names]
            writer.writerow([row.job, *(row.overrides.get(key, "") for key in keys), *numbers, row.error])
