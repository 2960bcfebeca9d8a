"""Metric loggers: rows, curves, images, and what a resumed run continues."""

import csv
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmdistill.config import ConfigError, PretrainConfig, to_plain
from mmdistill.training import loggers
from mmdistill.training.loggers import TRACKERS, Csv, ResumePoint, open_csv, open_tensorboard, open_wandb
from mmdistill.training.run_logger import RunLog
from tests.configs import pretrain_config


def _parsed(*overrides: str) -> PretrainConfig:
    return pretrain_config("modality=rgb", *overrides)


def test_csv_appends_to_the_rows_of_a_resumed_run(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = open_csv(tmp_path, {}, None)
        tracker.log_metrics(step, {"loss": step / 4})
        tracker.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", "1,0.25", "2,0.5"]


def test_history_is_copied_up_to_the_resumed_step(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    resume = ResumePoint(old / "checkpoints" / "epoch=01-loss=0.5000", 20)
    old.mkdir()
    new.mkdir()
    assert Csv(new, resume).num_copied == 0  # the old run has no metrics
    (old / "metrics.csv").write_text("step,loss\n10,0.9\n20,0.5\n30,0.7\n")
    assert Csv(new, resume).num_copied == 2
    assert (new / "metrics.csv").read_text().splitlines() == ["step,loss", "10,0.9", "20,0.5"]
    assert Csv(new, resume).num_copied == 0  # the new run has metrics
    assert Csv(old, resume).num_copied == 0  # resumed in the same folder
    assert len((old / "metrics.csv").read_text().splitlines()) == 4


def test_csv_rows_of_repeated_steps_replace_older_ones(tmp_path: Path) -> None:
    """A run that was killed after step 30 resumes from its checkpoint of step 10."""
    log = open_csv(tmp_path, {}, None)
    for step in (10, 20, 30, 20):
        log.log_metrics(step, {"epoch": step // 10, "loss": 1.0 / step})
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [10, 20]
    log.log_metrics(20, {"top1": 0.5})  # other metrics of the same step are kept
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [10, 20, 20]


def test_csv_of_a_long_run_is_read_once_per_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of an epoch must not grow with the number of epochs."""
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n9,0.1\n")
    reads, read = [], loggers._read_rows
    monkeypatch.setattr(loggers, "_read_rows", lambda path: (reads.append(path), read(path))[1])
    log = open_csv(tmp_path, {}, None)
    for step in (2, 3, 4):
        log.log_metrics(step, {"loss": step / 4})
    assert len(reads) == 1
    log.log_metrics(5, {"loss": 0.25, "top1": 0.5})  # a new column
    log.log_metrics(6, {"loss": 0.125})
    log.log_metrics(7, {"top1": 0.75, "loss": 0.125})
    assert len(reads) == 2
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,loss,top1", "1,0.5,", "2,0.5,", "3,0.75,", "4,1.0,", "5,0.25,0.5", "6,0.125,", "7,0.125,0.75",
    ]  # fmt: skip
    (tmp_path / "metrics.csv").unlink()
    log.log_metrics(8, {"loss": 0.5})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", "8,0.5"]


@pytest.mark.parametrize("is_killed", [False, True])
def test_tensorboard_hides_steps_that_a_resumed_run_repeats(tmp_path: Path, is_killed: bool) -> None:
    """The run writes steps 10 to 30, and resumes from its checkpoint of step 10."""
    first = open_tensorboard(tmp_path, {}, None)
    for step in (10, 20, 30):
        first.log_metrics(step, {"loss": 1.0})
    first.logger.experiment.flush() if is_killed else first.close()
    second = open_tensorboard(tmp_path, {}, ResumePoint(tmp_path / "checkpoints" / "last.ckpt", 10))
    for step in (20, 30, 40):
        second.log_metrics(step, {"loss": 2.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 1.0), (20, 2.0), (30, 2.0), (40, 2.0)]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="logger=wandb: wandb is not installed; pip install wandb"):
        _parsed("logger=[csv,wandb]")
    with pytest.raises(ConfigError, match="did you mean mlflow"):
        _parsed("logger=mlfow")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Calls of Lightning's loggers, also where W&B and MLflow are not installed."""
    calls: list[tuple[str, Any]] = []

    class Wandb:
        def __init__(self, **given: Any) -> None:
            calls.append(("wandb", given))
            self.experiment = types.SimpleNamespace(
                id="w1",
                log=lambda values, step: calls.append(("wandb log", (values, step))),
                finish=lambda: calls.append(("wandb end", None)),
            )

    class MLflow:
        run_id = "m1"

        def __init__(self, **given: Any) -> None:
            calls.append(("mlflow", given))

        def log_hyperparams(self, params: dict[str, str]) -> None:
            calls.append(("mlflow params", params))

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            calls.append(("mlflow log", (values, step)))

        def finalize(self, status: str) -> None:
            calls.append(("mlflow end", status))

    monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger", Wandb)
    monkeypatch.setattr("pytorch_lightning.loggers.MLFlowLogger", MLflow)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    mlflow = types.ModuleType("mlflow")
    mlflow.set_tracking_uri = lambda uri: calls.append(("uri", uri))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return calls


def test_calls_of_wandb_and_mlflow(tmp_path: Path, calls: list[tuple[str, Any]]) -> None:
    config, run = {"seed": 1, "trainer": {"lr": 0.5}}, tmp_path / "run"
    with RunLog(run, total_steps=1, title="t") as log:
        log.open_trackers(["wandb", "mlflow"], config)
        log.log_metrics(3, {"loss": 0.5})
    place = {"tracking_uri": f"sqlite:///{run}/mlflow.db", "artifact_location": (run / "mlruns").as_uri()}
    assert calls == [
        ("wandb", {"project": "mmdistill", "name": "run", "save_dir": str(run), "config": config}),
        ("mlflow", {"experiment_name": "mmdistill", "run_name": "run", "tags": None, **place}),
        ("mlflow params", {"seed": "1", "trainer.lr": "0.5"}),
        ("wandb log", ({"loss": 0.5, "trainer/global_step": 3}, 3)), ("mlflow log", ({"loss": 0.5}, 3)),
        ("wandb end", None), ("mlflow end", "success"), ("uri", None),
    ]  # fmt: skip
    assert set(TRACKERS) == {"tensorboard", "csv", "wandb", "mlflow"}
    assert json.loads((run / "trackers.json").read_text()) == {"wandb": "w1", "mlflow": "m1"}


@pytest.mark.parametrize(
    ("folder", "source", "given"),
    [
        ("run", "run", {"id": "w0", "allow_val_change": True, "config": {"seed": 1}}),
        ("branch", "run", {"config": {"seed": 1, "continues": "w0"}}),
        ("run", None, {"config": {"seed": 1}}),
        ("run", "other", {"config": {"seed": 1}}),  # whose run was not on W&B
    ],
)
def test_wandb_resumes_a_run_of_the_same_folder(
    tmp_path: Path, calls: list[tuple[str, Any]], folder: str, source: str | None, given: dict[str, object]
) -> None:
    for name in ("run", "branch"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "trackers.json").write_text('{"mlflow": "m0", "wandb": "w0"}')
    resume = ResumePoint(tmp_path / source / "checkpoints" / "last.ckpt", 3) if source else None
    open_wandb(tmp_path / folder, {"seed": 1}, resume)
    place = {"project": "mmdistill", "name": folder, "save_dir": str(tmp_path / folder)}
    assert calls == [("wandb", {**place, **given})]
    assert json.loads((tmp_path / folder / "trackers.json").read_text())["wandb"] == "w1"


def test_mlflow_writes_each_run_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = to_plain(_parsed())
    for name in ("first job", "second=1,[é]"):  # jobs of a sweep share a process
        run = tmp_path / name
        with RunLog(run, total_steps=1, title="t") as log:
            log.open_trackers(["mlflow"], config)
            log.log_metrics(3, {"loss": 0.5, "grad_norm": float("nan")})
            log.log_image(3, "reconstruction", np.zeros((8, 8, 3), np.uint8))
        assert "MLFLOW_TRACKING_URI" not in os.environ
        client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
        experiment = client.get_experiment_by_name("mmdistill")
        (found,) = client.search_runs([experiment.experiment_id])
        assert (found.info.status, found.info.run_name, found.data.metrics["loss"]) == ("FINISHED", name, 0.5)
        assert found.data.params["trainer.lr"] == str(config["trainer"]["lr"])
        assert len(list((run / "mlruns").rglob("reconstruction-3.png"))) == 1


def test_mlflow_reopens_the_run_of_a_resumed_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    resume = ResumePoint(tmp_path / "run" / "checkpoints" / "last.ckpt", 3)

    def part(folder: str, step: int, resume: ResumePoint | None, *overrides: str) -> list[Any]:
        config = to_plain(_parsed(*overrides))
        with RunLog(tmp_path / folder, total_steps=9, title="t") as log:
            log.open_trackers(["mlflow"], config, resume)
            log.log_metrics(step, {"loss": 1 / step})
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / folder}/mlflow.db")
        return client.search_runs([client.get_experiment_by_name("mmdistill").experiment_id])

    (first,) = part("run", 3, None, "trainer.epochs=7")
    (full,) = part("run", 6, resume, "trainer.epochs=8", "resume=auto")
    assert (full.info.run_id, full.info.status) == (first.info.run_id, "FINISHED")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    assert [m.step for m in client.get_metric_history(full.info.run_id, "loss")] == [3, 6]
    assert full.data.params["trainer.epochs"] == "7"
    assert (full.data.tags["resumed.trainer.epochs"], full.data.tags["resumed.resume"]) == ("8", "auto")
    (branch,) = part("branch", 6, resume)
    assert branch.data.tags["continues"] == first.info.run_id
    (tmp_path / "run" / "trackers.json").write_text('{"mlflow": "0123"}')  # a run that was deleted there
    assert len(part("run", 9, resume)) == 2
    assert "cannot resume MLflow run 0123; a new run is created" in caplog.text


def test_wandb_keeps_the_id_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resume in (None, ResumePoint(tmp_path / "checkpoints" / "last.ckpt", 3)):
        config = to_plain(_parsed(f"trainer.epochs={7 if resume else 8}"))
        with RunLog(tmp_path, total_steps=1, title="t") as log:
            log.open_trackers(["wandb"], config, resume)
            log.log_metrics(3, {"loss": 0.5})
    parts = [path.stem for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert (len(parts), len(set(parts))) == (2, 1)


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for job in range(2):
        run = tmp_path / f"run {job}"
        with RunLog(run, total_steps=1, title="t") as log:
            log.open_trackers(["wandb"], to_plain(_parsed()))
            log.log_metrics(3, {"loss": 0.5, "grad_norm": float("nan")})
            log.log_image(3, "reconstruction", np.zeros((8, 8, 3), np.uint8))
        assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 1
        assert len(list(run.rglob("reconstruction_3_*.png"))) == 1
