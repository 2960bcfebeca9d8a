"""Resume with other settings or other files: each change either takes effect or raises an error."""

import csv
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdistill.checkpoint import CheckpointError, WeightMismatchError, load_torch, open_checkpoint, save_torch
from mmdistill.config import ConfigError, DistillConfig, PretrainConfig, modality_specs, to_plain
from mmdistill.distill import trainer as run
from mmdistill.distill.module import MMDistill
from mmdistill.distill.teachers import load_teachers
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE
from mmdistill.models.videomae import Encoder, EncoderConfig
from mmdistill.pretrain import trainer as loop
from tests.configs import distill_config, pretrain_config
from tests.tiny_data import MODEL, make_tiny, overrides


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 clips, and three teachers with statistics in their metadata."""
    root = tmp_path_factory.mktemp("changed")
    make_tiny(root / "data")
    for number, (name, spec) in enumerate(modality_specs(_distill(root).data_module).items()):
        torch.manual_seed(number)
        size = 32 // spec.input_stride
        geometry = EncoderConfig(spec.channels, 4, size, size, 8 // spec.input_stride, 2, 16, 2, 2, 8, 32)
        state = {f"encoder.{k}": v for k, v in Encoder(geometry).state_dict().items()}
        meta = {"kind": "pretrain", "modality": name, "encoders": {"encoder": to_plain(geometry)},
                "statistics": {name: spec.statistics}}  # fmt: skip
        save_torch({"state_dict": state, "mmdistill": meta}, root / f"{name}.ckpt")
    return root


def _distill(folder: Path, *more: str) -> DistillConfig:
    teachers = ",".join(f"{folder / m}.ckpt" for m in ("rgb", "flow", "skeleton"))
    fixed = [f"trainer.ckpt_path=[{teachers}]", "accelerator=cpu", "trainer.save_ckpt_freq=1"]
    return distill_config(*overrides(folder / "data"), *fixed, *more)


def _pretrain(folder: Path, *more: str) -> PretrainConfig:
    fixed = ["modality=rgb", "accelerator=cpu", "trainer.save_ckpt_freq=1"]
    return pretrain_config(*overrides(folder / "data"), *MODEL, *fixed, *more)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """(rate, largest weight decay) of every optimizer step of distillations."""
    recorded: list[tuple[float, float]] = []
    original = MMDistill.on_before_optimizer_step

    def record(self: MMDistill, optimizer: torch.optim.Optimizer) -> None:
        groups = optimizer.param_groups
        recorded.append((groups[0]["lr"], max(g["weight_decay"] for g in groups)))
        original(self, optimizer)

    monkeypatch.setattr(MMDistill, "on_before_optimizer_step", record)
    return recorded


def test_extended_training_uses_the_schedule_of_the_new_length(
    folder: Path, steps: list[tuple[float, float]], tmp_path: Path
) -> None:
    """The schedule in the checkpoint ends with the first training, at a learning rate of almost 0."""
    run.distill(_distill(folder, "trainer.epochs=3"), tmp_path / "full")
    full = [rate for rate, _ in steps]
    steps.clear()
    run.distill(_distill(folder, "trainer.epochs=1"), tmp_path / "parts")
    assert [rate for rate, _ in steps] != full[:9]
    steps.clear()
    more = ["trainer.epochs=3", "trainer.weight_decay=0.3", "resume=auto"]
    run.distill(_distill(folder, *more), tmp_path / "parts")
    assert steps == [(rate, 0.3) for rate in full[9:]]


def test_schedule_position_follows_epochs_after_a_change_of_batch_size(
    folder: Path, steps: list[tuple[float, float]], tmp_path: Path
) -> None:
    run.distill(_distill(folder, "trainer.epochs=2", "batch_size=4"), tmp_path / "full")
    second = steps[18:]
    steps.clear()
    run.distill(_distill(folder, "trainer.epochs=1"), tmp_path / "parts")
    steps.clear()
    run.distill(_distill(folder, "trainer.epochs=2", "batch_size=4", "resume=auto"), tmp_path / "parts")
    assert steps == second


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """(epoch, clips) of every batch of pretrainings."""
    recorded: list[tuple[int, list[int]]] = []
    original = loop.PretrainTrainer.train_step

    def record(self: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        recorded.append((self.state.epoch, batch["index"].tolist()))
        return original(self, batch)

    monkeypatch.setattr(loop.PretrainTrainer, "train_step", record)
    return recorded


def test_start_summary_counts_clips_skipped_by_accumulation(
    folder: Path, batches: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    """9 batches of 8 clips are 4 steps of 2 batches; the last batch is skipped although it is full."""
    loop.pretrain(_pretrain(folder, "trainer.epochs=1", "trainer.accumulate_grad_batches=2"), tmp_path)
    assert sum(len(clips) for _, clips in batches) == 64
    assert "(8 clips skipped each epoch)" in (tmp_path / "run.log").read_text()


def test_pretraining_resumes_at_an_epoch_end_with_another_batch_size(
    folder: Path, batches: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    """Each clip once per epoch, and the settings of this run."""
    run_dir = tmp_path / "run"
    loop.pretrain(_pretrain(folder, "trainer.epochs=1"), run_dir)
    loop.pretrain(_pretrain(folder, "trainer.epochs=2", "batch_size=4", "resume=auto"), run_dir)
    last = loop.pretrain(_pretrain(folder, "trainer.epochs=3", "batch_size=12", "resume=auto"), run_dir)
    loop.pretrain(_pretrain(folder, "trainer.epochs=4", "batch_size=12", f"resume={last}"), run_dir)
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [(int(row["epoch"]), int(row["step"])) for row in csv.DictReader(file)]
    assert rows == [(0, 9), (1, 27), (2, 33), (3, 39)]  # steps never go back: rows of later ones would be lost
    for epoch, count in enumerate((9, 18, 6, 6)):
        own = [clips for e, clips in batches if e == epoch]
        assert len(own) == count
        assert sorted(i for clips in own for i in clips) == list(range(72))


def test_pretraining_inside_an_epoch_rejects_another_batch_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, run_dir = loop.PretrainTrainer.train_step, tmp_path / "run"

    def stop_at_5(self: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        if self.state.batch == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.PretrainTrainer, "train_step", stop_at_5)
        with pytest.raises(SystemExit, match=str(INTERRUPTED_EXIT_CODE)):
            loop.pretrain(_pretrain(folder), run_dir)
    for changed in ("batch_size=4", "batch_size=16", "seed=1"):
        with pytest.raises(ConfigError, match="in the middle of epoch 0"):
            loop.pretrain(_pretrain(folder, changed, "resume=auto"), run_dir)
    (stopped,) = (run_dir / "checkpoints").glob("*-step=5")
    loop.pretrain(_pretrain(folder, "resume=auto"), run_dir)
    more = ["batch_size=4", "trainer.accumulate_grad_batches=2", "strategy=deepspeed_stage_1", f"resume={stopped}"]
    loop.pretrain(_pretrain(folder, *more), tmp_path / "halves")
    files = [sorted((d / "checkpoints").glob("epoch=*"))[-1] for d in (run_dir, tmp_path / "halves")]
    whole, halves = (open_checkpoint(file) for file in files)
    assert whole.meta["step"] == halves.meta["step"] == 18
    assert halves.meta["loss"] == pytest.approx(
        whole.meta["loss"], abs=1e-5
    )  # of the same clips, with the same weights


def test_resumed_pretraining_uses_the_configs_weight_decay_and_clipping(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[float] = []
    clips: list[float] = []
    original = loop.PretrainTrainer.optimizer_step

    def record(self: Any, *, is_last: bool) -> None:
        found.append(max(g["weight_decay"] for g in self.engine.optimizer.param_groups))
        clips.append(getattr(self.engine.optimizer, "clip_grad", self.engine.gradient_clipping()))
        original(self, is_last=is_last)

    monkeypatch.setattr(loop.PretrainTrainer, "optimizer_step", record)
    for stage in ("0", "1"):
        fixed = [f"strategy=deepspeed_stage_{stage}", "trainer.weight_decay=0.2", "trainer.clip_grad=2.0"]
        loop.pretrain(_pretrain(folder, *fixed, "trainer.epochs=1"), tmp_path / stage)
        found.clear()
        clips.clear()
        fixed[1:] = ["trainer.weight_decay=0.1", "trainer.clip_grad=0.5"]
        loop.pretrain(_pretrain(folder, *fixed, "trainer.epochs=2", "resume=auto"), tmp_path / stage)
        assert set(found) == {0.1}
        assert set(clips) == {0.5}


@pytest.mark.parametrize("changed", ["model.heads=4", "data_module.modalities.rgb.mean=[0.5]"])
def test_resumed_pretraining_rejects_other_heads_and_statistics(pretrained: Path, folder: Path, changed: str) -> None:
    """These settings do not change the shape of any tensor."""
    with pytest.raises(ConfigError, match="was trained with other settings"):
        loop.pretrain(_pretrain(folder, "trainer.epochs=2", changed, f"resume={pretrained}"), pretrained.parents[1])


def test_init_from_rejects_weights_with_other_heads(pretrained: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightMismatchError, match="heads 2 / 4, head_dim 16 / 8"):
        loop.pretrain(_pretrain(folder, "model.heads=4", f"init_from={pretrained}"), tmp_path)


@pytest.fixture(scope="module")
def pretrained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch."""
    return loop.pretrain(_pretrain(folder, "trainer.epochs=1"), tmp_path_factory.mktemp("pretrained"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("data_module.modalities.flow.std=[7.0]", r"std \(1.0, 1.0\) / \(7.0, 7.0\)"),
        ("data_module.modalities.skeleton.sigma=0.5", "sigma 2.0 / 0.5"),
    ],
)
def test_teachers_reject_other_statistics(folder: Path, changed: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run.distill(_distill(folder, changed), tmp_path / "fresh")
    run.distill(_distill(folder, "trainer.epochs=1"), tmp_path / "run")
    with pytest.raises(ConfigError, match=message):  # its teachers are in the file
        run.distill(_distill(folder, changed, "resume=auto"), tmp_path / "run")


def test_resume_rejects_other_teachers_than_the_checkpoints(folder: Path, tmp_path: Path) -> None:
    """trainer.ckpt_path is checked even if the checkpoint contains the teachers."""
    shutil.copytree(folder, tmp_path / "here", ignore=shutil.ignore_patterns("data"))
    here, full = tmp_path / "here", tmp_path / "full.ckpt"
    config = _distill(here)
    specs = modality_specs(config.data_module)
    teachers, sources = load_teachers(config, specs, None)
    state = {f"teacher_{m}.encoder.{k}": v for m, e in teachers.items() for k, v in e.state_dict().items()}
    encoders = {f"teacher_{m}": to_plain(e.config) for m, e in teachers.items()}
    statistics = {m: specs[m].statistics for m in teachers}
    meta = {"kind": "distill", "encoders": encoders, "teachers": sources, "statistics": statistics}
    save_torch({"state_dict": state, "mmdistill": meta}, full)
    assert load_teachers(config, specs, open_checkpoint(full))[1] == sources

    content = load_torch(here / "flow.ckpt")
    content["state_dict"]["encoder.norm.weight"] += 1
    save_torch(content, here / "flow.ckpt")
    with pytest.raises(CheckpointError, match=r"flow\.ckpt: the sha256 of its weights is"):
        load_teachers(config, specs, open_checkpoint(full))
    (here / "flow.ckpt").unlink()
    assert load_teachers(config, specs, open_checkpoint(full))[1] == sources


def test_cached_features_depend_on_files_and_clips(folder: Path, tmp_path: Path) -> None:
    """Recomputed flow files and other frames get a new cache, although no name changes."""
    shutil.copytree(folder, tmp_path / "data")
    here, run_dir = tmp_path / "data", tmp_path / "run"
    options = ["trainer.cache_teacher_epochs=1", "trainer.epochs=1"]

    def draws() -> int:
        return len(list((run_dir / "teacher_features").iterdir()))

    run.distill(_distill(here, *options), run_dir)
    options = ["trainer.cache_teacher_epochs=1", "resume=auto"]
    run.distill(_distill(here, *options, "trainer.epochs=2"), run_dir)
    assert draws() == 1
    file = next((here / "data" / "flow").rglob("*.npy"))
    np.save(file, np.load(file) + 1)
    run.distill(_distill(here, *options, "trainer.epochs=3"), run_dir)
    assert draws() == 2
    run.distill(_distill(here, *options, "trainer.epochs=4", "data_module.sampling_rate=2"), run_dir)
    assert draws() == 3
