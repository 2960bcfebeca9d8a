"""Metric loggers: ``logger=tensorboard``, ``csv``, ``wandb``, ``mlflow``, or a list of them.

TensorBoard, W&B and MLflow are Lightning's loggers behind one interface, `Tracker`. W&B and MLflow are optional
packages; they are imported only if configured.
"""

import csv
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdistill.files import atomic_open, atomic_write_bytes

IDS_FILE = "trackers.json"  # run ids by tracker
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from, and the number of optimizer steps done in it."""

    checkpoint: Path
    step: int

    @property
    def run_dir(self) -> Path:
        """The folder of the run that wrote the checkpoint, the parent of ``checkpoints/NAME``."""
        return self.checkpoint.absolute().parent.parent


@dataclass(frozen=True)
class Tracker:
    """Receives metrics and images while a run lasts.

    Attributes:
        log_metrics: logs (step, {name: value}) after `step` optimizer steps.
        log_image: logs (step, name, image) after `step` optimizer steps; the image is uint8 (height, width, 3).
        close: flushes and closes at the end of the run.
        logger: the object that does it.
    """

    log_metrics: Callable[[int, Mapping[str, float]], None]
    log_image: Callable[[int, str, np.ndarray], None]
    close: Callable[[], None]
    logger: Any


def open_tensorboard(run_dir: Path, config: Mapping[str, Any], resume: ResumePoint | None) -> Tracker:
    """Curves and images under ``tensorboard/``.

    A run that was killed repeats the steps after its last checkpoint. TensorBoard then hides the older points of these
    steps.
    """
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    purge_step = resume.step + 1 if resume else None
    logger = TensorBoardLogger(run_dir, name="", version="tensorboard", purge_step=purge_step)
    return Tracker(
        lambda step, values: logger.log_metrics(values, step),
        lambda step, name, image: logger.experiment.add_image(name, image, step, dataformats="HWC"),
        lambda: logger.finalize("success"),
        logger,
    )


class Csv:
    """``metrics.csv``, which a resumed run continues. Older rows have empty cells in a new column.

    A run that was killed repeats the steps after its last checkpoint. The new rows of these steps replace the older
    ones. A run that resumes in another folder, without this file, copies the rows up to its step: `num_copied` rows.
    """

    def __init__(self, run_dir: Path, resume: ResumePoint | None) -> None:
        self.path, self.num_copied = run_dir / "metrics.csv", 0
        self._last_step = math.inf  # of the rows that this process has written; inf: none yet
        if resume and not self.path.exists():
            rows = _read_rows(resume.run_dir / "metrics.csv")
            rows = [row for row in rows if str(row.get("step")).isdecimal() and int(row["step"]) <= resume.step]
            self._write(rows)
            self.num_copied = len(rows)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row. It replaces those of later steps, and of this step with the same metrics."""

        def is_kept(row: Mapping[str, Any]) -> bool:
            has_same_metrics = all(row.get(name) not in (None, "") for name in values)
            return int(row["step"]) < step or (int(row["step"]) == step and not has_same_metrics)

        row = {"step": step, **values}
        is_next, self._last_step = step > self._last_step, step
        if not is_next or not self._append(row):
            self._write([*filter(is_kept, _read_rows(self.path)), row])

    def _append(self, row: Mapping[str, Any]) -> bool:
        """Write the row after the older ones, which are copied and not parsed. False if the file lacks its columns."""
        columns = _read_columns(self.path)
        if not row.keys() <= set(columns):
            return False
        with atomic_open(self.path) as file:
            with self.path.open("rb") as old:
                shutil.copyfileobj(old, file)
            file.write(_format_rows([row], columns))
        return True

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row if name))
            header = dict(zip(columns, columns, strict=True))
            atomic_write_bytes(self.path, _format_rows([header, *rows], columns))


def _format_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """Lines of a CSV file, without a header."""
    file = io.StringIO(newline="")
    csv.DictWriter(file, columns, restval="", extrasaction="ignore").writerows(rows)
    return file.getvalue().encode()


def _read_columns(path: Path) -> list[str]:
    """The header of a CSV file; empty if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file; empty if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def open_csv(run_dir: Path, config: Mapping[str, Any], resume: ResumePoint | None) -> Tracker:
    """Metrics in `Csv`; images are ignored."""
    table = Csv(run_dir, resume)
    return Tracker(table.log_metrics, lambda step, name, image: None, lambda: None, table)


def _load_run_id(tracker: str, run_dir: Path, resume: ResumePoint | None) -> tuple[str | None, str | None]:
    """The tracker's id of the run that wrote the checkpoint: (of the same run, of an earlier run in another folder)."""
    path = resume.run_dir / IDS_FILE if resume else None
    run_id = json.loads(path.read_bytes()).get(tracker) if path and path.is_file() else None
    is_same_run = resume is not None and resume.run_dir == run_dir.absolute()
    return (run_id, None) if is_same_run else (None, run_id)


def _save_run_id(tracker: str, run_dir: Path, run_id: str | None) -> None:
    path = run_dir / IDS_FILE
    ids = json.loads(path.read_bytes()) if path.is_file() else {}
    atomic_write_bytes(path, json.dumps({**ids, tracker: run_id}, indent=1).encode() + b"\n")


def open_wandb(run_dir: Path, config: Mapping[str, Any], resume: ResumePoint | None) -> Tracker:
    """A Weights & Biases run named after the run folder; its files are in ``wandb/``.

    A run that resumes in its folder keeps its W&B id; W&B ignores steps that it already has. Offline, a second folder
    with the same id is written, for ``wandb sync --append``. A run that resumes in another folder is a new W&B run,
    whose config entry ``continues`` is the id of the earlier one.
    """
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    own_id, earlier_id = _load_run_id("wandb", run_dir, resume)
    options: dict[str, Any] = {"id": own_id, "allow_val_change": True} if own_id else {}
    options["config"] = {**config, "continues": earlier_id} if earlier_id else dict(config)
    logger = WandbLogger(project="mmdistill", name=run_dir.name, save_dir=str(run_dir), **options)
    run = logger.experiment
    _save_run_id("wandb", run_dir, run.id)

    def log_values(step: int, values: Mapping[str, Any]) -> None:
        # `WandbLogger.log_metrics` does not pass the step, by which W&B recognizes repeated steps
        run.log({**values, "trainer/global_step": step}, step=step)

    return Tracker(
        log_values, lambda step, name, image: log_values(step, {name: wandb.Image(image)}), run.finish, logger
    )


def open_mlflow(run_dir: Path, config: Mapping[str, Any], resume: ResumePoint | None) -> Tracker:
    """An MLflow run at ``MLFLOW_TRACKING_URI``; without it in ``mlflow.db`` and ``mlruns/`` of the run folder.

    MLflow 3 does not accept a plain folder, which older releases wrote to. A run that resumes in its folder reopens its
    MLflow run; in another folder it is a new one, whose tag ``continues`` is the id of the earlier one.
    """
    import mlflow
    from pytorch_lightning.loggers import MLFlowLogger

    given_uri, params = os.environ.get("MLFLOW_TRACKING_URI"), _flatten(config)
    options: dict[str, Any] = {
        "experiment_name": "mmdistill",
        "run_name": run_dir.name,
        "tracking_uri": given_uri or f"sqlite:///{(run_dir / 'mlflow.db').absolute()}",
        "artifact_location": None if given_uri else (run_dir / "mlruns").absolute().as_uri(),
    }
    own_id, earlier_id = _load_run_id("mlflow", run_dir, resume)
    logger = _resume_mlflow_run(own_id, params, options) if own_id else None
    if logger is None:
        logger = MLFlowLogger(tags={"continues": earlier_id} if earlier_id else None, **options)
        logger.log_hyperparams(params)
        _save_run_id("mlflow", run_dir, logger.run_id)

    def close() -> None:
        logger.finalize("success")
        if given_uri is None:  # MLflow puts its URI into the environment, where the next job of a sweep would find it
            mlflow.set_tracking_uri(None)
            os.environ.pop("MLFLOW_TRACKING_URI", None)

    return Tracker(
        lambda step, values: logger.log_metrics({name: float(v) for name, v in values.items()}, step),
        lambda step, name, image: logger.experiment.log_image(logger.run_id, image, f"{name}-{step}.png"),
        close,
        logger,
    )


def _resume_mlflow_run(run_id: str, params: Mapping[str, str], options: Mapping[str, Any]) -> Any:
    """Reopen a run; None if the server does not have it. MLflow keeps params, so changed values become tags."""
    from mlflow.exceptions import MlflowException
    from pytorch_lightning.loggers import MLFlowLogger

    logger = MLFlowLogger(run_id=run_id, **options)
    try:
        stored = logger.experiment.get_run(run_id).data.params
        logger.experiment.update_run(run_id, "RUNNING")
    except MlflowException as error:
        log.warning("cannot resume MLflow run %s; a new run is created: %s", run_id, error)
        return None
    logger.log_hyperparams({key: value for key, value in params.items() if key not in stored})
    for key, value in params.items():
        if stored.get(key, value) != value:
            logger.experiment.set_tag(run_id, f"resumed.{key}", value)
    return logger


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"trainer": {"lr": 1}}`` -> ``{"trainer.lr": "1"}``, values cut at 250 characters, as `MLFlowLogger` does."""
    out: dict[str, str] = {}
    for key, value in config.items():
        is_mapping = isinstance(value, Mapping)
        out |= _flatten(value, f"{prefix}{key}.") if is_mapping else {prefix + key: str(value)[:250]}
    return out


TRACKERS = {"tensorboard": open_tensorboard, "csv": open_csv, "wandb": open_wandb, "mlflow": open_mlflow}
