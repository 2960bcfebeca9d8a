"""What a run leaves behind: its numbers by every tracker, its lines, and what is needed to do it again."""

import csv
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmdistill.config import ConfigError, PretrainConfig, as_names, to_plain
from mmdistill.config.compose import load_config
from mmdistill.training.loggers import TRACKERS, copy_metrics_history, open_trackers
from mmdistill.training.run_logger import RunLog
from mmdistill.training.run_metadata import git_state, record_run


def _parsed(*overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, "config_pretrain", ["modality=rgb", *overrides])


def test_default_trackers_get_the_same_numbers(tmp_path: Path) -> None:
    names = as_names("logger", _parsed().logger)
    with RunLog(tmp_path, total_steps=2, title="t", trackers=names) as log:
        log.log_metrics(1, {"loss": 0.5})
        log.log_metrics(2, {"loss": 0.25, "loss_scale": 1024.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "loss": "0.5", "loss_scale": ""},
        {"step": "2", "loss": "0.25", "loss_scale": "1024.0"},
    ]


def test_a_resumed_run_goes_on_with_its_csv(tmp_path: Path) -> None:
    for step in (1, 2):
        (tracker,) = open_trackers(["csv"], tmp_path, {})
        tracker.log_metrics(step, {"loss": step / 4})
        tracker.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", "1,0.25", "2,0.5"]


def test_a_run_resumed_in_another_folder_begins_with_the_rows_up_to_its_checkpoint(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    checkpoint = old / "checkpoints" / "epoch=01-loss=0.5000"
    assert copy_metrics_history(checkpoint, new, 20) == 0  # there is none
    old.mkdir()
    (old / "metrics.csv").write_text("step,loss\n10,0.9\n20,0.5\n30,0.7\n")
    names = as_names("logger", _parsed().logger)
    with RunLog(new, total_steps=3, title="t", trackers=names) as log:
        log.continues(checkpoint, 20)
        log.log_metrics(30, {"loss": 0.4, "top1": 0.3})
    assert (new / "metrics.csv").read_text().splitlines() == ["step,loss,top1", "10,0.9,", "20,0.5,", "30,0.4,0.3"]
    assert f"metrics.csv begins with 2 rows of {old}" in (new / "run.log").read_text()
    assert copy_metrics_history(checkpoint, new, 30) == 0  # it has rows of its own
    assert copy_metrics_history(checkpoint, old, 20) == 0  # resumed in the same folder
    assert len((old / "metrics.csv").read_text().splitlines()) == 4


def test_repeated_epochs_replace_their_rows(tmp_path: Path) -> None:
    """A run killed after step 30 goes on from its checkpoint of step 10."""
    [log] = open_trackers(["csv"], tmp_path, {})
    for step in (10, 20, 30, 20):
        log.log_metrics(step, {"epoch": step // 10, "loss": 1.0 / step})
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [10, 20]
    log.log_metrics(20, {"top1": 0.5})  # other numbers of the same step are no repetition
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [10, 20, 20]


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="logger=wandb: wandb is not installed; pip install wandb"):
        _parsed("logger=[csv,wandb]")
    with pytest.raises(ConfigError, match="did you mean mlflow"):
        _parsed("logger=mlfow")


def test_wandb_and_mlflow_are_called_as_they_want(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    run = types.SimpleNamespace(
        id="w1",
        log=lambda values, step: calls.append(("wandb", (values, step))),
        finish=lambda: calls.append(("wandb", "end")),
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **given: calls.append(("wandb", given["config"])) or run  # type: ignore[attr-defined]
    mlflow = types.ModuleType("mlflow")
    mlflow.get_experiment_by_name = lambda name: None  # type: ignore[attr-defined]
    mlflow.create_experiment = lambda name, artifact_location: calls.append((name, artifact_location))  # type: ignore[attr-defined]
    for name in ("set_tracking_uri", "set_experiment", "log_params"):
        setattr(mlflow, name, lambda given, _name=name: calls.append((_name, given)))
    started = types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
    mlflow.start_run = lambda run_name: calls.append(("start", run_name)) or started  # type: ignore[attr-defined]
    mlflow.log_metrics = lambda values, step: calls.append(("mlflow", (values, step)))  # type: ignore[attr-defined]
    mlflow.end_run = lambda: calls.append(("mlflow", "end"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = {"seed": 1, "trainer": {"lr": 0.5}}
    with RunLog(tmp_path / "run", total_steps=1, title="t", trackers=["wandb", "mlflow"], config=config) as log:
        log.log_metrics(3, {"loss": 0.5})
    assert ("wandb", config) in calls
    assert ("log_params", {"seed": "1", "trainer.lr": "0.5"}) in calls
    assert [c[1] for c in calls if c[0] == "set_tracking_uri"] == [f"sqlite:///{tmp_path}/run/mlflow.db", None]
    assert ("mmdistill", (tmp_path / "run" / "mlruns").as_uri()) in calls
    assert ("start", "run") in calls
    assert [c for c in calls if c[0] in ("wandb", "mlflow")][1:] == [
        ("wandb", ({"loss": 0.5}, 3)), ("mlflow", ({"loss": 0.5}, 3)), ("wandb", "end"), ("mlflow", "end"),
    ]  # fmt: skip
    assert set(TRACKERS) == {"tensorboard", "csv", "wandb", "mlflow"}
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"wandb": "w1", "mlflow": "m1"}


@pytest.mark.parametrize(
    ("folder", "source", "given"),
    [
        ("run", "run", {"id": "w0", "resume": "allow", "allow_val_change": True, "config": {"seed": 1}}),
        ("branch", "run", {"config": {"seed": 1, "continues": "w0"}}),
        ("run", None, {"config": {"seed": 1}}),
        ("run", "other", {"config": {"seed": 1}}),  # whose run was not on W&B
    ],
)
def test_wandb_goes_on_with_a_run_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, source: str | None, given: dict[str, object]
) -> None:
    calls: list[dict[str, object]] = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **given: calls.append(given) or types.SimpleNamespace(id="w1")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("run", "branch"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "trackers.json").write_text('{"mlflow": "m0", "wandb": "w0"}')
    checkpoint = tmp_path / source / "checkpoints" / "last.ckpt" if source else None
    open_trackers(["wandb"], tmp_path / folder, {"seed": 1}, checkpoint)
    assert calls == [{"project": "mmdistill", "name": folder, "dir": str(tmp_path / folder), **given}]
    assert json.loads((tmp_path / folder / "trackers.json").read_text())["wandb"] == "w1"


def test_mlflow_itself_keeps_each_run_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = to_plain(_parsed())
    for name in ("first job", "second=1,[é]"):  # jobs of a sweep share a process
        run = tmp_path / name
        with RunLog(run, total_steps=1, title="t", trackers=["mlflow"], config=config) as log:
            log.log_metrics(3, {"loss": 0.5, "grad_norm": float("nan")})
            log.log_image(3, "reconstruction", np.zeros((8, 8, 3), np.uint8))
        assert "MLFLOW_TRACKING_URI" not in os.environ
        client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
        experiment = client.get_experiment_by_name("mmdistill")
        (found,) = client.search_runs([experiment.experiment_id])
        assert (found.info.status, found.info.run_name, found.data.metrics["loss"]) == ("FINISHED", name, 0.5)
        assert found.data.params["trainer.lr"] == str(config["trainer"]["lr"])
        assert len(list((run / "mlruns").rglob("reconstruction-3.png"))) == 1


def test_mlflow_itself_goes_on_with_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"

    def part(folder: str, step: int, source: Path | None, *overrides: str) -> list[Any]:
        config = to_plain(_parsed(*overrides))
        with RunLog(
            tmp_path / folder, total_steps=9, title="t", trackers=["mlflow"], config=config, source=source
        ) as log:
            log.log_metrics(step, {"loss": 1 / step})
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / folder}/mlflow.db")
        return client.search_runs([client.get_experiment_by_name("mmdistill").experiment_id])

    (first,) = part("run", 3, None, "trainer.epochs=7")
    (whole,) = part("run", 6, checkpoint, "trainer.epochs=8", "resume=auto")
    assert (whole.info.run_id, whole.info.status) == (first.info.run_id, "FINISHED")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    assert [m.step for m in client.get_metric_history(whole.info.run_id, "loss")] == [3, 6]
    assert whole.data.params["trainer.epochs"] == "7"
    assert (whole.data.tags["resumed.trainer.epochs"], whole.data.tags["resumed.resume"]) == ("8", "auto")
    (branch,) = part("branch", 6, checkpoint)
    assert branch.data.tags["continues"] == first.info.run_id
    (tmp_path / "run" / "trackers.json").write_text('{"mlflow": "0123"}')  # a run that was deleted there
    assert len(part("run", 9, checkpoint)) == 2
    assert "0123 cannot go on, a new one is made" in caplog.text


def test_wandb_itself_gives_a_resumed_run_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for source in (None, tmp_path / "checkpoints" / "last.ckpt"):
        config = to_plain(_parsed(f"trainer.epochs={7 if source else 8}"))
        with RunLog(tmp_path, total_steps=1, title="t", trackers=["wandb"], config=config, source=source) as log:
            log.log_metrics(3, {"loss": 0.5})
    parts = [path.stem for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert (len(parts), len(set(parts))) == (2, 1)


def test_wandb_itself_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for job in range(2):
        run = tmp_path / f"run {job}"
        with RunLog(run, total_steps=1, title="t", trackers=["wandb"], config=to_plain(_parsed())) as log:
            log.log_metrics(3, {"loss": 0.5, "grad_norm": float("nan")})
            log.log_image(3, "reconstruction", np.zeros((8, 8, 3), np.uint8))
        assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 1
        assert len(list(run.rglob("reconstruction_3_*.png"))) == 1


def test_plain_lines_have_the_time_left_and_the_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, total_steps=3, title="pretrain", trackers=[]) as log:
        for done in (1, 2, 3):
            log.step(done, "7 clips/s")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]  # the first and the last; between them too little time
    assert re.search(r"GiB( GPU)? ETA \?$", lines[0])
    assert lines[1].endswith("ETA 0:00:00")
    assert (tmp_path / "run.log").read_text().count("7 clips/s") == 2


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", total_steps=1, title="t", enabled=False) as log:
        log.step(1, "")
        log.info("x")
        log.log_metrics(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr().err == ""


def test_each_start_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/pretrain_main.py", "modality=rgb"])
    for _ in range(2):
        record_run(tmp_path, {"seed": 3}, processes=2, accelerator="cpu")
    first, second = json.loads((tmp_path / "run.json").read_text())
    assert first["command"] == ["pretrain_main.py", "modality=rgb"]
    assert second["config"] == {"seed": 3}
    assert (first["environment"]["device"], first["environment"]["processes"]) == ("cpu", 2)
    assert {"torch", "deepspeed", "hydra-core"} <= set(first["environment"]["packages"])


def test_git_state_sees_changes(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        own = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *own, *words], check=True, capture_output=True)

    assert git_state(tmp_path / "absent") is None
    git("init")
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert clean is not None
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    (tmp_path / "a.txt").write_text("2")
    state = git_state(tmp_path)
    assert state is not None
    assert (state["dirty"], state["changed"]) == (True, ["a.txt"])
