"""Where a run's numbers go: ``logger=tensorboard``, ``csv``, ``wandb``, ``mlflow``, or a list of them.

Each is a class with two methods. W&B and MLflow are optional packages, imported only when they are asked for.
"""

import csv
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmdistill.files import atomic_write_bytes

IDS_FILE = "trackers.json"  # by tracker the id of the run in its own books
log = logging.getLogger(__name__)


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

    def __init__(self, run_dir: Path, config: Mapping[str, Any], source: Path | None) -> None:
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

    def __init__(self, run_dir: Path, config: Mapping[str, Any], source: Path | None) -> None:
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
    old, new = _run_folder(checkpoint) / "metrics.csv", run_dir.absolute() / "metrics.csv"
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


def _run_folder(checkpoint: Path) -> Path:
    """Of the run that wrote it: ``checkpoints/NAME`` lies in it."""
    return checkpoint.absolute().parent.parent


def _earlier_id(tracker: str, run_dir: Path, source: Path | None) -> tuple[str | None, bool]:
    """The id of the run that wrote `source`, and whether this is that run: in another folder it may be a branch."""
    if source is None:
        return None, False
    path = _run_folder(source) / IDS_FILE
    ids = json.loads(path.read_text()) if path.is_file() else {}
    return ids.get(tracker), _run_folder(source) == run_dir.absolute()


def _keep_id(tracker: str, run_dir: Path, own: str) -> None:
    path = run_dir / IDS_FILE
    ids = json.loads(path.read_text()) if path.is_file() else {}
    atomic_write_bytes(path, json.dumps({**ids, tracker: own}, indent=1).encode() + b"\n")


class Wandb:
    """A run on Weights & Biases, named after the run's folder; its files lie under ``wandb/``.

    A run that is resumed in its folder goes on under its id: steps that W&B has it does not take again. Offline that is
    a further folder with the same id, for ``wandb sync --append``. In another folder it is a run of its own, whose
    config says under ``continues`` which one it comes from.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], source: Path | None) -> None:
        import wandb

        earlier, same = _earlier_id("wandb", run_dir, source)
        given: dict[str, Any] = {"config": dict(config)}
        if earlier and same:
            given |= {"id": earlier, "resume": "allow", "allow_val_change": True}
        elif earlier:
            given["config"]["continues"] = earlier
        self.run = wandb.init(project="mmdistill", name=run_dir.name, dir=str(run_dir), **given)
        _keep_id("wandb", run_dir, self.run.id)

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

    A folder alone, which older releases wrote to, is refused by MLflow 3. A run that is resumed in its folder goes on;
    in another folder it is a run of its own, whose tag ``continues`` is the id of the one it comes from.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], source: Path | None) -> None:
        import mlflow

        self.mlflow = mlflow
        self.own = "MLFLOW_TRACKING_URI" not in os.environ
        if self.own:
            mlflow.set_tracking_uri(f"sqlite:///{(run_dir / 'mlflow.db').absolute()}")
            if mlflow.get_experiment_by_name("mmdistill") is None:
                mlflow.create_experiment("mmdistill", artifact_location=(run_dir / "mlruns").absolute().as_uri())
        mlflow.set_experiment("mmdistill")
        earlier, same = _earlier_id("mlflow", run_dir, source)
        if not (earlier and same and self._goes_on(earlier, _flat(config))):
            run = mlflow.start_run(run_name=run_dir.name)
            mlflow.log_params(_flat(config))
            if earlier:
                mlflow.set_tag("continues", earlier)
            _keep_id("mlflow", run_dir, run.info.run_id)

    def _goes_on(self, run_id: str, params: Mapping[str, str]) -> bool:
        """Open a run again; False where this server does not have it. Values that differ become tags: params stay."""
        try:
            known = self.mlflow.get_run(run_id).data.params
            self.mlflow.start_run(run_id=run_id)
        except self.mlflow.MlflowException as error:
            log.warning("MLflow's run %s cannot go on, a new one is made: %s", run_id, error)
            return False
        self.mlflow.log_params({key: value for key, value in params.items() if key not in known})
        changed = {f"resumed.{key}": value for key, value in params.items() if known.get(key, value) != value}
        self.mlflow.set_tags(changed)
        return True

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


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], Path | None], Tracker]] = {
    "tensorboard": TensorBoard, "csv": Csv, "wandb": Wandb, "mlflow": MLflow,
}  # fmt: skip


def open_trackers(
    names: Sequence[str], run_dir: Path, config: Mapping[str, Any], source: Path | None = None
) -> list[Tracker]:
    """The trackers of one run.

    Args:
        names: keys of `TRACKERS`; a further one is an entry there.
        run_dir: the run's folder; what is written to disk goes there.
        config: the resolved config as builtin containers, for trackers that show it.
        source: the checkpoint that the run goes on from.
    """
    return [TRACKERS[name](run_dir, config, source) for name in names]
