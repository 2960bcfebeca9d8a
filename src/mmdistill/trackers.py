"""Where a run's numbers go: ``logger=tensorboard``, ``csv``, ``wandb``, ``mlflow``, or a list of them.

Each is a class with two methods. W&B and MLflow are optional packages, imported only when they are asked for.
"""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Tracker(Protocol):
    """Takes numbers while a run lasts."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` optimiser steps."""

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture after `step` optimiser steps, uint8 (height, width, 3)."""

    def close(self) -> None:
        """The run is over."""


class TensorBoard:
    """Curves under ``tensorboard/``."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Among the images."""
        self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered."""
        self.writer.close()


class Csv:
    """``metrics.csv``, which a resumed run goes on with. A new column has empty cells in the older rows.

    A run that was killed repeats what came after its last checkpoint; its rows then take the place of the older ones.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self.path = run_dir / "metrics.csv"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        row = {"step": step, **values}
        rows: list[dict[str, Any]] = []
        columns = list(row)
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                columns, rows = list(reader.fieldnames or []), list(reader)
        new = [name for name in row if name not in columns]
        held = len(rows)
        rows = [r for r in rows if not _repeated(r, step, values)]
        whole = bool(new) or len(rows) < held or not self.path.exists()
        with self.path.open("w" if whole else "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*columns, *new], restval="")
            if whole:
                writer.writeheader()
                writer.writerows(rows)
            writer.writerow(row)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A table shows none."""

    def close(self) -> None:
        """Each row is written at once."""


def carry_rows(checkpoint: Path, run_dir: Path, step: int) -> int:
    """Begin the ``metrics.csv`` of `run_dir` with the rows up to `step` of the run that wrote `checkpoint`.

    Nothing where that run is this one or has none, or where this one has rows of its own. Returns how many came over.
    """
    old, new = checkpoint.absolute().parents[1] / "metrics.csv", run_dir.absolute() / "metrics.csv"
    if new.exists() or not old.is_file():
        return 0
    with old.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if row.get("step", "").isdecimal() and int(row["step"]) <= step]
    if rows:
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(reader.fieldnames or []), restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return len(rows)


def _repeated(row: Mapping[str, Any], step: int, values: Mapping[str, float]) -> bool:
    """Whether a stored row is of a later step, or of this one with the same numbers in it."""
    stored = int(row["step"])
    return stored > step or (stored == step and all(row.get(name) not in (None, "") for name in values))


class Wandb:
    """A run on Weights & Biases, named after the run's folder; its files lie under ``wandb/``."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(project="mmdistill", name=run_dir.name, dir=str(run_dir), config=dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Among the media."""
        import wandb

        self.run.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Upload the rest."""
        self.run.finish()


class MLflow:
    """An MLflow run: at ``MLFLOW_TRACKING_URI``, else in ``mlflow.db`` and ``mlruns/`` of the run's folder.

    A folder alone, which older releases wrote to, is refused by MLflow 3.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self.mlflow = mlflow
        self.own = "MLFLOW_TRACKING_URI" not in os.environ
        if self.own:
            mlflow.set_tracking_uri(f"sqlite:///{(run_dir / 'mlflow.db').absolute()}")
            if mlflow.get_experiment_by_name("mmdistill") is None:
                mlflow.create_experiment("mmdistill", artifact_location=(run_dir / "mlruns").absolute().as_uri())
        mlflow.set_experiment("mmdistill")
        mlflow.start_run(run_name=run_dir.name)
        mlflow.log_params(_flat(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        self.mlflow.log_metrics({k: float(v) for k, v in values.items()}, step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Among the artefacts."""
        self.mlflow.log_image(image, f"{name}-{step}.png")

    def close(self) -> None:
        """End the run. MLflow has put its place into the environment; the next job of a sweep has another."""
        self.mlflow.end_run()
        if self.own:
            self.mlflow.set_tracking_uri(None)
            os.environ.pop("MLFLOW_TRACKING_URI", None)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"trainer": {"lr": 1}}`` -> ``{"trainer.lr": "1"}``; MLflow takes at most 500 characters of a value."""
    out: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = str(value)[:500]
    return out


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard, "csv": Csv, "wandb": Wandb, "mlflow": MLflow,
}  # fmt: skip


def open_trackers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of one run.

    Args:
        names: keys of `TRACKERS`; a further one is an entry there.
        run_dir: the run's folder; what is written to disk goes there.
        config: the resolved config as builtin containers, for trackers that show it.
    """
    return [TRACKERS[name](run_dir, config) for name in names]
