"""The parts of a training around its steps: resume, log, end."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmdistill.config import ConfigError
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE
from mmdistill.training import run
from mmdistill.training.run import count_trainable
from mmdistill.training.run_logger import ThroughputMeter
from mmdistill.training.run_metadata import record_run
from mmdistill.training.state import TrainingState
from tests.tiny_training import MakeTraining

MODULE = nn.Linear(2, 2)  # 6 parameters


def test_training_continues_at_the_stored_position(make: MakeTraining) -> None:
    first, rest = make(), make()
    first.state.start_epoch(1)
    first.state.add_batch({"train_loss": 0.5}, 3)
    first.state.step = 5
    rest.load_state_dict(first.state_dict())
    assert rest.state == first.state
    assert (rest.data.sampler.epoch, rest.data.sampler.start_batch) == (1, 1)


def test_checkpoint_of_an_epochs_end_continues_with_the_next_epoch(make: MakeTraining) -> None:
    stored = {**make().state_dict(), "epoch": 1, "batch": 4, "losses": {"a": 0.5}}
    rest = make("batch_size=2")  # of 6 batches
    rest.load_state_dict(stored)
    assert rest.state == TrainingState(epoch=2, losses={"a": 0.5})


def test_only_the_losses_of_existing_checkpoints_are_saved(make: MakeTraining) -> None:
    """Otherwise each checkpoint of a long run stores the losses of all epochs."""
    training = make()
    kept, removed = training.run.checkpoints / "epoch=01", training.run.checkpoints / "epoch=00"
    kept.mkdir(parents=True)
    for path in (kept, removed):
        training.state.losses[str(path)] = training.state.validations[str(path)] = 0.5
    training.finish_save()
    assert training.state.losses == training.state.validations == {str(kept): 0.5}


def test_start_removes_temporary_files_of_killed_ones(tmp_path: Path) -> None:
    for folder in ("", "images", "checkpoints", "teacher_features/key"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / ".tmp-123-file").touch()
    run._remove_left_files(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_another_order_inside_an_epoch_is_rejected(make: MakeTraining) -> None:
    stored = {**make().state_dict(), "epoch": 1, "batch": 2}
    with pytest.raises(ConfigError, match=r"in the middle of epoch 1.*global_batch 3 / 2"):
        make("batch_size=2").load_state_dict(stored)


def test_another_resize_is_rejected(make: MakeTraining) -> None:
    stored = make().state_dict()
    for state in (stored, {**stored, "weight_compat": {}}):  # the second is that of an earlier version
        with pytest.raises(ConfigError, match=r"other settings.*: resize crop / squash; use the same settings"):
            make("data_module.resize=squash").load_state_dict(state)


def test_state_without_steps_is_at_the_position_of_the_schedule(make: MakeTraining) -> None:
    training = make()
    stored = {name: value for name, value in training.state_dict().items() if name != "step"}
    training.load_state_dict({**stored, "epoch": 1, "batch": 2})
    assert training.state.step == 6


def test_metadata_name_the_batch_inside_an_epoch_only(make: MakeTraining) -> None:
    training = make()
    training.state.load_state_dict({"epoch": 1, "batch": 3, "step": 7, "skipped_steps": 2})
    meta = training.meta("distill", {}, {"rgb": {"mean": [0.5]}})
    assert {key: meta[key] for key in ("epoch", "batch", "step", "skipped_steps")} == {
        "epoch": 1, "batch": 3, "step": 7, "skipped_steps": 2,
    }  # fmt: skip
    assert (meta["statistics"], meta["config"]["batch_size"]) == ({"rgb": {"mean": [0.5]}}, 3)
    training.state.batch = 4
    assert training.meta("distill", {}, {})["batch"] is None


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"source": Path("old/checkpoints/a.ckpt")}, "resumed from old/checkpoints/a.ckpt at epoch 0, step 0"),
        ({}, "resume=auto: {run}/checkpoints has no checkpoint; the training starts at epoch 0"),
    ],
)
def test_start_is_logged(make: MakeTraining, options: dict[str, Any], line: str) -> None:
    training = make("resume=auto", **options)
    training.log_start("distill", MODULE)
    folder = training.run.directory
    text = (folder / "run.log").read_text()
    assert line.format(run=folder) in text
    assert text.index("distill: ") < text.index("data: 12 clips")
    assert (folder / "data_report.json").is_file()


def test_header_names_size_learning_rate_and_device(make: MakeTraining) -> None:
    training = make("trainer.lr=0.256", "trainer.accumulate_grad_batches=2")
    training.log_start("distill rgb", MODULE, ", target pixel\nval_top1_action: x")
    lines = [line.split(" ", 2)[-1] for line in (training.run.directory / "run.log").read_text().splitlines()]
    assert lines[0] == (
        "distill rgb: 12 clips, 4 batches of 3 per process and epoch (0 clips skipped each epoch), 6 trainable "
        "parameters, learning rate 0.006 (trainer.lr 0.256 x 6 clips per step / 256), device cpu, precision 32, target "
        "pixel"
    )


def test_rate_and_flops_are_logged_and_recorded(make: MakeTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_matrix_rate", lambda device, dtype, num_threads: 1.5e11)
    monkeypatch.setattr(run.torch, "get_num_threads", lambda: 2)
    training = make("trainer.accumulate_grad_batches=2")  # steps of 6 clips
    folder = training.run.directory
    record_run(folder, {}, processes=1, accelerator="cpu")
    training.flops_per_clip = 2_050_000_000
    training.log_start("distill", MODULE)
    log, (record,) = folder / "run.log", json.loads((folder / "run.json").read_text())
    assert "12.3 GFLOP per step; matrix products reach 150 GFLOP/s (float32, 2 threads)\n" in log.read_text()
    assert (record["flops_per_step"], record["matrix_flops_per_s"]) == (12_300_000_000, 150_000_000_000)
    monkeypatch.setattr(ThroughputMeter, "metrics", {"clips_per_s": 30.0, "data_wait_percent": 9.0})
    training.log_epoch({"train_loss": 0.5}, "loss 0.5000", lr=0.25, loss_scale=None)
    assert "epoch 0: loss 0.5000, 30.0 clips/s, MFU 41 %, data wait 9 %\n" in log.read_text()
    with (folder / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (float(row["gflop_per_step"]), float(row["mfu_percent"])) == (12.3, 41)


def test_trace_that_does_not_fit_into_the_training_is_rejected(make: MakeTraining, tmp_path: Path) -> None:
    training = make()
    for options, message in (
        (["trainer.profile=6"], r"trainer\.profile=6 .* 6 steps after 3 other steps, .* has 8 steps; use at most 5"),
        (
            ["trainer.profile=1", "trainer.epochs=1", "trainer.accumulate_grad_batches=4"],
            r"1 step; set trainer\.profile=0",
        ),
    ):
        changed = make(*options)
        with (
            pytest.raises(ConfigError, match=message),
            run.start_training(changed.config, training.run, changed.data, title="t"),
        ):
            pass


def test_resume_with_too_few_steps_for_a_trace_is_logged(make: MakeTraining) -> None:
    training = make("trainer.profile=2")
    training.load_state_dict({**training.state_dict(), "epoch": 1, "batch": 1, "step": 5})
    training.log_start("distill", MODULE)
    line = "trainer.profile=2 writes no trace: only 3 steps of this training are left"
    assert line in (training.run.directory / "run.log").read_text()
    training.end_batch(3)


def test_first_step_of_an_epoch_shows_no_rate(make: MakeTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make()
    shown: list[str] = []
    monkeypatch.setattr(training.log, "step", lambda done, text: shown.append(text))
    training.throughput.restart()
    for _ in range(2):
        training.throughput.end_wait()
        training.throughput.add_clips(3)
        training.log_step("loss 0.5")
    assert shown[0] == "epoch 0 loss 0.5"
    assert re.fullmatch(r"epoch 0 loss 0\.5 \d+\.\d clips/s data wait \d+ %", shown[1])


def test_epoch_is_logged(make: MakeTraining) -> None:
    training = make()
    training.log_start("distill", MODULE)
    training.state.load_state_dict({"epoch": 2, "step": 12, "skipped_steps": 1, "overflow_steps": 3})
    training.log_epoch({"train_loss": 0.5}, "loss 0.5000", lr=0.25, loss_scale=8.0)
    with (training.run.directory / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    expected = {"step": 12, "epoch": 2, "train_loss": 0.5, "lr": 0.25, "skipped_steps": 1, "overflow_steps": 3}
    assert {name: float(row[name]) for name in expected} == expected
    assert float(row["loss_scale"]) == 8
    assert "epoch 2: loss 0.5000, 0.0 clips/s, data wait" in (training.run.directory / "run.log").read_text()


def test_stopped_training_names_its_checkpoint(make: MakeTraining, capsys: pytest.CaptureFixture[str]) -> None:
    assert not make().should_stop()
    training = make(signal=15)
    assert training.should_stop()
    with pytest.raises(SystemExit, match=str(INTERRUPTED_EXIT_CODE)):
        training.stop(Path("a/last.ckpt"))
    assert "complete checkpoint written: a/last.ckpt" in capsys.readouterr().err


def test_complete_training_is_logged(make: MakeTraining) -> None:
    training = make("trainer.epochs=1", source=Path("a.ckpt"))
    training.load_state_dict({**training.state_dict(), "batch": 4})
    training.log_start("distill", MODULE)
    assert "training is already complete: trainer.epochs=1" in (training.run.directory / "run.log").read_text()


def test_parameters_that_zero_stage_3_has_emptied_are_counted() -> None:
    module = torch.nn.Linear(3, 2)
    assert count_trainable(module) == 8
    module.weight.ds_numel = 6  # type: ignore[assignment]
    module.weight.data = torch.empty(0)
    module.bias.requires_grad_(False)
    assert count_trainable(module) == 6
