"""Trainings whose last epoch is done, and epochs with constant targets."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from mmdistill.checkpoint import read_checkpoint
from mmdistill.checkpoint.retention import latest_valid_checkpoint
from tests.commands import run_python
from tests.tiny_data import HEIGHT, MODEL, WIDTH, make_tiny, overrides, write_teacher

COMMON = ("accelerator=cpu", "trainer.epochs=1", "batch_size=8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return overrides(make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=2))


@pytest.fixture(scope="module")
def pretrained(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments and the folder of a finished pretraining."""
    run_dir = tmp_path_factory.mktemp("pretrain") / "run"
    arguments = ["pretrain_main.py", "modality=flow", *data, *MODEL, *COMMON]
    run_python(*arguments, f"hydra.run.dir={run_dir}")
    return arguments, run_dir


@pytest.fixture(scope="module")
def distilled(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments and the folder of a finished distillation."""
    root = tmp_path_factory.mktemp("distill")
    teacher = write_teacher(root / "teacher", "rgb", 0)
    given = ["trainer.teachers=[rgb]", f"trainer.ckpt_path=[{teacher}]", "test=False"]
    arguments = ["lit_main_mmdistill.py", *data, *COMMON, *given]
    run_python(*arguments, f"hydra.run.dir={root / 'run'}")
    return arguments, root / "run"


@pytest.mark.parametrize("training", ["pretrained", "distilled"])
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_finished_run_exits_with_0_and_prints_its_checkpoint(
    training: str, resume: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A requeue loop starts the same command until it exits with 0."""
    arguments, run_dir = request.getfixturevalue(training)
    checkpoint = latest_valid_checkpoint(run_dir / "checkpoints")
    weights = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}
    if resume == "auto":
        done = run_python(*arguments, "resume=auto", f"hydra.run.dir={run_dir}", expect=0)
        assert {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")} == weights
    else:
        done = run_python(*arguments, f"resume={checkpoint}", f"hydra.run.dir={tmp_path / 'new'}", expect=0)
        run_dir = tmp_path / "new"
    assert "training is already complete: trainer.epochs=1" in done.stderr
    assert f"last checkpoint: {checkpoint}" in done.stderr
    assert f"last checkpoint: {checkpoint}" in (run_dir / "run.log").read_text()


def test_run_that_was_killed_after_its_last_checkpoint_is_completed(distilled: tuple[list[str], Path]) -> None:
    """`last.ckpt` is linked to the checkpoint after it is written."""
    arguments, run_dir = distilled
    (checkpoint,), last = (run_dir / "checkpoints").glob("epoch=*"), run_dir / "checkpoints" / "last.ckpt"
    last.unlink()
    (run_dir / "checkpoints" / ".tmp-0").touch()
    (run_dir / ".tmp-1-metrics.csv").touch()
    run_python(*arguments, "resume=auto", f"hydra.run.dir={run_dir}")
    assert last.samefile(checkpoint)
    assert not list(run_dir.rglob(".tmp-*"))


def test_finished_distillation_is_extended_by_more_epochs(distilled: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, run_dir = distilled
    resume = f"resume={run_dir / 'checkpoints' / 'last.ckpt'}"
    run_python(*arguments, "trainer.epochs=2", resume, f"hydra.run.dir={tmp_path / 'run'}")
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").meta["epoch"] == 1


def test_constant_targets_are_saved_without_a_ratio(tmp_path: Path) -> None:
    """A video without motion: the constant baseline's loss on its flow is exactly 0."""
    root = make_tiny(tmp_path / "data", per_class=2)
    for flow in (root / "flow").rglob("*.npy"):
        np.save(flow, np.zeros((2, HEIGHT, WIDTH), np.float16))
    run_dir = tmp_path / "run"
    run_python("pretrain_main.py", "modality=flow", *overrides(root), *MODEL, *COMMON, f"hydra.run.dir={run_dir}")
    with (run_dir / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["constant_baseline_loss"]) == 0
    assert math.isfinite(float(row["loss"]))
    assert "(constant baseline 0.0000, ratio nan, lower is better)" in (run_dir / "run.log").read_text()
    assert len(list((run_dir / "checkpoints").glob("epoch=00-*"))) == 1
