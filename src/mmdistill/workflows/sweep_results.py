"""Read the results of a Hydra sweep: one row per job, or per few-shot setting of a job."""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmdistill.errors import InputError, format_count

FAILED = "failed.json"  # record of a failed job in its folder


@dataclass(frozen=True)
class JobRow:
    """One row of the table: a job, or one few-shot setting of a job.

    Attributes:
        job: folder of the job, relative to the folder of the sweep.
        overrides: key -> value, as text.
        metric: name of the plotted value; empty for a failed job.
        values: all numeric results by name.
        error: first line of the error message; empty without an error.
    """

    job: str
    overrides: dict[str, str]
    metric: str = ""
    values: dict[str, float] = field(default_factory=dict)
    error: str = ""


def read_sweep(folder: Path) -> list[JobRow]:
    """Read the jobs of a sweep folder, in the order of their numbers. Raises `InputError` if there is none."""
    runs = sorted((p.parents[1] for p in folder.rglob(".hydra/overrides.yaml")), key=_job_order)
    if not runs:
        raise InputError(f"{folder} contains no job with .hydra/overrides.yaml; give the folder that `-m` wrote")
    jobs = [run for run in runs if not _is_single_run(run)]
    if not jobs:
        count = format_count(len(runs), "run")
        raise InputError(f"{folder} contains {count} without -m, and no sweep; give the folder that `-m` wrote")
    return [row for job in jobs for row in _job_rows(job, job.relative_to(folder).as_posix())]


def _is_single_run(run: Path) -> bool:
    """Whether Hydra's settings of a run state that it is no job of a sweep."""
    path = run / ".hydra" / "hydra.yaml"
    return path.is_file() and yaml.safe_load(path.read_bytes())["hydra"].get("mode") == "RUN"


def next_job_number(folder: Path) -> int:
    """The lowest number that is above those of all jobs in a sweep folder; 0 without a job."""
    numbers = [_job_order(path.parents[1])[0] for path in folder.rglob(".hydra/overrides.yaml")]
    return max((number + 1 for number in numbers if number < sys.maxsize), default=0)


def _job_order(job: Path) -> tuple[int, str]:
    number = job.name.rpartition("_")[2]
    return (int(number) if number.isdigit() else sys.maxsize, str(job))


def _job_rows(job: Path, name: str) -> list[JobRow]:
    overrides = _overrides(job / ".hydra" / "overrides.yaml")
    if (job / FAILED).is_file():
        return [JobRow(name, overrides, error=json.loads((job / FAILED).read_bytes())["error"].splitlines()[0])]
    if (job / "fewshot.json").is_file():
        return _fewshot_rows(json.loads((job / "fewshot.json").read_bytes()), name, overrides)
    last = last_metrics(job / "metrics.csv")
    for metric in ("loss", "train_loss"):
        if metric in last:
            return [JobRow(name, overrides, metric, last)]
    return [JobRow(name, overrides, error="unfinished: neither fewshot.json nor a loss in metrics.csv")]


def _fewshot_rows(report: dict[str, Any], name: str, overrides: dict[str, str]) -> list[JobRow]:
    """One row per few-shot setting. A list of `k_shot`, `n_way` or `classifier` values counts as a swept key."""
    rows = []
    settings = report["settings"]
    varied = [k for k in ("n_way", "k_shot", "classifier") if len({str(s[k]) for s in settings}) > 1]
    keys = {"n_way": "data_module.n_way", "k_shot": "data_module.k_shot", "classifier": "classifier"}
    for setting in settings:
        scored = setting["rows"].get(report["network"]) or next(iter(setting["rows"].values()))
        values = {k: float(v) for k, v in scored.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        own = {**overrides, **{keys[k]: str(setting[k]) for k in varied}}
        rows.append(JobRow(name, own, "top1_action_ensemble", values))
    return rows


def _overrides(path: Path) -> dict[str, str]:
    pairs = (str(text).partition("=") for text in yaml.safe_load(path.read_bytes()))
    found = {key.lstrip("+"): value for key, _, value in pairs}
    found.pop("resume", None)  # tells how the job was started, not what it computes
    return found


def swept_keys(rows: Sequence[JobRow]) -> list[str]:
    """The keys whose value differs between jobs."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    return [key for key in keys if len({row.overrides.get(key) for row in rows}) > 1]


def write_table(rows: Sequence[JobRow], path: Path) -> None:
    """Write ``sweep.csv`` with the columns job, swept keys, results, error."""
    keys = swept_keys(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *keys, *names, "error"])
        for row in rows:
            numbers = [row.values.get(name, "") for name in names]
            writer.writerow([row.job, *(row.overrides.get(key, "") for key in keys), *numbers, row.error])


def objective(run_dir: Path) -> float:
    """Objective of a run for a sweeper: few-shot accuracy (maximize), else the loss of the last epoch (minimize).

    Raises `ValueError` if the run folder has neither.
    """
    accuracy = run_dir / "fewshot.json"
    if accuracy.is_file():
        return float(json.loads(accuracy.read_bytes())["top1_action_ensemble"])
    last = last_metrics(run_dir / "metrics.csv")
    for name in ("loss", "train_loss"):
        if name in last:
            return last[name]
    raise ValueError(f"{run_dir} has no fewshot.json and no loss in metrics.csv")


def last_metrics(path: Path) -> dict[str, float]:
    """Last number of each column of a metrics.csv; empty if the file does not exist."""
    last: dict[str, float] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    try:
                        last[name] = float(value)
                    except (TypeError, ValueError):
                        continue  # empty cell: Lightning writes each metric in its own row
    return last
