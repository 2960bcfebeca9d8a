"""Metric loggers: ``logger=tensorboard``, ``csv``, ``wandb``, ``mlflow``, or a list of them.

Each is a class with three methods. W&B and MLflow are optional packages; they are imported only if configured.
"""

import csv
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmdistill.files import atomic_write_bytes

IDS_FILE = "trackers.json"  # run ids by tracker
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """What a run resumes from.

    Attributes:
        checkpoint: its path.
        step: optimizer steps done.
    """

    checkpoint: Path
    step: int

    @property
    def run_dir(self) -> Path:
        """The folder of the run that wrote the checkpoint, the parent of ``checkpoints/NAME``."""
        return self.checkpoint.absolute().parent.parent


class Tracker(Protocol):
    """Receives metrics and images while a run lasts."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics after `step` optimizer steps."""

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log an image after `step` optimizer steps: uint8 (height, width, 3)."""

    def close(self) -> None:
        """Flush and close at the end of the run."""


class TensorBoard:
    """Curves and images under ``tensorboard/``.

    A run that was killed repeats the steps after its last checkpoint. TensorBoard then hides the older points of these
    steps.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume: ResumePoint | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = resume.step + 1 if resume else None
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """One image."""
        self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Write buffered events and close the file."""
        self.writer.close()


class Csv:
    """``metrics.csv``, to which a resumed run appends. Older rows have empty cells in a new column.

    A run that was killed repeats the steps after its last checkpoint. The new rows of these steps replace the older
    ones.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume: ResumePoint | None) -> None:
        self.path = run_dir / "metrics.csv"

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        row = {"step": step, **values}
        rows: list[dict[str, Any]] = []
        columns = list(row)
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                columns, rows = list(reader.fieldnames or []), list(reader)
        new_columns = [name for name in row if name not in columns]
        num_rows = len(rows)
        rows = [r for r in rows if not _is_superseded(r, step, values)]
        rewrite = bool(new_columns) or len(rows) < num_rows or not self.path.exists()
        with self.path.open("w" if rewrite else "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*columns, *new_columns], restval="")
            if rewrite:
                writer.writeheader()
                writer.writerows(rows)
            writer.writerow(row)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Ignored."""

    def close(self) -> None:
        """Nothing to do: each row is written at once."""


def copy_metrics_history(resume: ResumePoint, run_dir: Path) -> int:
    """Copy the rows of ``metrics.csv`` up to the resumed step from the run that wrote the checkpoint into `run_dir`.

    Nothing is copied if both are the same run, if that run has no rows, or if `run_dir` has a ``metrics.csv``.

    Returns:
        The number of copied rows.
    """
    old, new = resume.run_dir / "metrics.csv", run_dir.absolute() / "metrics.csv"
    if new.exists() or not old.is_file():
        return 0
    with old.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if row.get("step", "").isdecimal() and int(row["step"]) <= resume.step]
    if rows:
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(reader.fieldnames or []), restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return len(rows)


def _is_superseded(row: Mapping[str, Any], step: int, values: Mapping[str, float]) -> bool:
    """Whether a stored row is of a later step, or of this step with the same metrics."""
    stored_step = int(row["step"])
    return stored_step > step or (stored_step == step and all(row.get(name) not in (None, "") for name in values))


def _load_run_id(tracker: str, run_dir: Path, resume: ResumePoint | None) -> tuple[str | None, bool]:
    """The tracker's id of the run that wrote the checkpoint, and whether this run is in the same folder."""
    if resume is None:
        return None, False
    path = resume.run_dir / IDS_FILE
    ids = json.loads(path.read_text()) if path.is_file() else {}
    return ids.get(tracker), resume.run_dir == run_dir.absolute()


def _save_run_id(tracker: str, run_dir: Path, run_id: str) -> None:
    path = run_dir / IDS_FILE
    ids = json.loads(path.read_text()) if path.is_file() else {}
    atomic_write_bytes(path, json.dumps({**ids, tracker: run_id}, indent=1).encode() + b"\n")


class Wandb:
    """A Weights & Biases run named after the run folder; its files are in ``wandb/``.

    A run that resumes in its folder keeps its W&B id; W&B ignores steps that it already has. Offline, a second folder
    with the same id is written, for ``wandb sync --append``. A run that resumes in another folder is a new W&B run,
    whose config entry ``continues`` is the id of the earlier one.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume: ResumePoint | None) -> None:
        import wandb

        earlier_id, is_same_run = _load_run_id("wandb", run_dir, resume)
        kwargs: dict[str, Any] = {"config": dict(config)}
        if earlier_id and is_same_run:
            kwargs |= {"id": earlier_id, "resume": "allow", "allow_val_change": True}
        elif earlier_id:
            kwargs["config"]["continues"] = earlier_id
        self.run = wandb.init(project="mmdistill", name=run_dir.name, dir=str(run_dir), **kwargs)
        _save_run_id("wandb", run_dir, self.run.id)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        self.run.log(dict(values), step=step)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """One image."""
        import wandb

        self.run.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Upload the rest and finish the run."""
        self.run.finish()


class MLflow:
    """An MLflow run at ``MLFLOW_TRACKING_URI``; without it in ``mlflow.db`` and ``mlruns/`` of the run folder.

    MLflow 3 does not accept a plain folder, which older releases wrote to. A run that resumes in its folder reopens its
    MLflow run; in another folder it is a new one, whose tag ``continues`` is the id of the earlier one.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume: ResumePoint | None) -> None:
        import mlflow

        self.mlflow = mlflow
        self.uses_run_dir = "MLFLOW_TRACKING_URI" not in os.environ
        if self.uses_run_dir:
            mlflow.set_tracking_uri(f"sqlite:///{(run_dir / 'mlflow.db').absolute()}")
            if mlflow.get_experiment_by_name("mmdistill") is None:
                mlflow.create_experiment("mmdistill", artifact_location=(run_dir / "mlruns").absolute().as_uri())
        mlflow.set_experiment("mmdistill")
        earlier_id, is_same_run = _load_run_id("mlflow", run_dir, resume)
        if not (earlier_id and is_same_run and self._resume_run(earlier_id, _flatten(config))):
            run = mlflow.start_run(run_name=run_dir.name)
            mlflow.log_params(_flatten(config))
            if earlier_id:
                mlflow.set_tag("continues", earlier_id)
            _save_run_id("mlflow", run_dir, run.info.run_id)

    def _resume_run(self, run_id: str, params: Mapping[str, str]) -> bool:
        """Reopen a run; False if the server does not have it. MLflow keeps params, so changed values become tags."""
        try:
            stored = self.mlflow.get_run(run_id).data.params
            self.mlflow.start_run(run_id=run_id)
        except self.mlflow.MlflowException as error:
            log.warning("cannot resume MLflow run %s; a new run is created: %s", run_id, error)
            return False
        self.mlflow.log_params({key: value for key, value in params.items() if key not in stored})
        changed = {f"resumed.{key}": value for key, value in params.items() if stored.get(key, value) != value}
        self.mlflow.set_tags(changed)
        return True

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        self.mlflow.log_metrics({k: float(v) for k, v in values.items()}, step=step)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """One image artifact."""
        self.mlflow.log_image(image, f"{name}-{step}.png")

    def close(self) -> None:
        """End the run and reset the tracking URI that MLflow put into the environment, for the next job of a sweep."""
        self.mlflow.end_run()
        if self.uses_run_dir:
            self.mlflow.set_tracking_uri(None)
            os.environ.pop("MLFLOW_TRACKING_URI", None)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"trainer": {"lr": 1}}`` -> ``{"trainer.lr": "1"}``, values cut at 500 characters, which is MLflow's limit."""
    out: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = str(value)[:500]
    return out


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], ResumePoint | None], Tracker]] = {
    "tensorboard": TensorBoard, "csv": Csv, "wandb": Wandb, "mlflow": MLflow,
}  # fmt: skip


def open_trackers(
    names: Sequence[str], run_dir: Path, config: Mapping[str, Any], resume: ResumePoint | None = None
) -> list[Tracker]:
    """The trackers of one run.

    Args:
        names: keys of `TRACKERS`; add an entry there for a further tracker.
        run_dir: the run's folder, where files are written.
        config: the resolved config as builtin containers.
        resume: the checkpoint that the run resumes from.
    """
    return [TRACKERS[name](run_dir, config, resume) for name in names]
