"""A run that is resumed with other settings, or with other files: they count, or they are refused. Never neither."""

import csv
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdistill.checkpoint import WeightMismatchError, load_torch, save_torch
from mmdistill.config import ConfigError, DistillConfig, PretrainConfig, modality_specs, to_plain
from mmdistill.config.compose import load_config
from mmdistill.distill import trainer as run
from mmdistill.distill.module import MMDistill
from mmdistill.distill.teachers import load_teachers
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE
from mmdistill.models.videomae import Encoder, EncoderConfig
from mmdistill.pretrain import trainer as loop
from mmdistill.training.optim import make_optimizer
from tests.tiny_data import MODEL, make_tiny, overrides


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 clips, and three teachers that say what they were trained on."""
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
    teachers = ",".join(f"{m}:{folder / m}.ckpt" for m in ("rgb", "flow", "skeleton"))
    fixed = [f"trainer.ckpt_path={{{teachers}}}", "accelerator=cpu", "trainer.save_ckpt_freq=1"]
    return load_config(DistillConfig, "config_mmdistill", [*overrides(folder / "data"), *fixed, *more])


def _pretrain(folder: Path, *more: str) -> PretrainConfig:
    fixed = ["modality=rgb", "accelerator=cpu", "trainer.save_ckpt_freq=1"]
    return load_config(PretrainConfig, "config_pretrain", [*overrides(folder / "data"), *MODEL, *fixed, *more])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """(rate, largest weight decay) of every step of distillations."""
    told: list[tuple[float, float]] = []
    original = MMDistill.on_before_optimizer_step

    def watch(self: MMDistill, optimizer: torch.optim.Optimizer) -> None:
        groups = optimizer.param_groups
        told.append((groups[0]["lr"], max(g["weight_decay"] for g in groups)))
        original(self, optimizer)

    monkeypatch.setattr(MMDistill, "on_before_optimizer_step", watch)
    return told


def test_a_longer_training_has_the_rates_of_one_that_was_meant_to_be_as_long(
    folder: Path, steps: list[tuple[float, float]], tmp_path: Path
) -> None:
    """The schedule that the file holds ends with the first training, at a rate of almost nothing."""
    run.distill(_distill(folder, "trainer.epochs=3"), tmp_path / "whole")
    whole = [rate for rate, _ in steps]
    steps.clear()
    run.distill(_distill(folder, "trainer.epochs=1"), tmp_path / "parts")
    assert [rate for rate, _ in steps] != whole[:9]
    steps.clear()
    more = ["trainer.epochs=3", "trainer.weight_decay=0.3", "resume=auto"]
    run.distill(_distill(folder, *more), tmp_path / "parts")
    assert steps == [(rate, 0.3) for rate in whole[9:]]


def test_the_rate_goes_by_epochs_where_a_batch_has_become_smaller(
    folder: Path, steps: list[tuple[float, float]], tmp_path: Path
) -> None:
    run.distill(_distill(folder, "trainer.epochs=2", "batch_size=4"), tmp_path / "whole")
    second = steps[18:]
    steps.clear()
    run.distill(_distill(folder, "trainer.epochs=1"), tmp_path / "parts")
    steps.clear()
    run.distill(_distill(folder, "trainer.epochs=2", "batch_size=4", "resume=auto"), tmp_path / "parts")
    assert steps == second


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """(epoch, clips) of every batch of pretrainings."""
    told: list[tuple[int, list[int]]] = []
    original = loop._train_step

    def watch(run: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float] | None:
        told.append((run.at.epoch, batch["index"].tolist()))
        return original(run, batch)

    monkeypatch.setattr(loop, "_train_step", watch)
    return told


def test_clips_that_fill_no_step_are_counted_as_left_out(
    folder: Path, batches: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    """9 batches of 8 are 4 steps of 2, and a batch that is left out though it is full."""
    loop.pretrain(_pretrain(folder, "trainer.epochs=1", "trainer.accumulate_grad_batches=2"), tmp_path)
    assert sum(len(clips) for _, clips in batches) == 64
    assert "(8 clips left out each epoch)" in (tmp_path / "run.log").read_text()


def test_pretraining_with_other_batches_goes_on_at_an_epochs_end(
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


def test_pretraining_with_other_batches_is_refused_inside_an_epoch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, run_dir = loop._train_step, tmp_path / "run"

    def stop_at_5(run: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float] | None:
        if run.at.batch == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_step", stop_at_5)
        with pytest.raises(SystemExit, match=str(INTERRUPTED_EXIT_CODE)):
            loop.pretrain(_pretrain(folder), run_dir)
    for changed in ("batch_size=4", "batch_size=16", "seed=1"):
        with pytest.raises(ConfigError, match="inside epoch 0"):
            loop.pretrain(_pretrain(folder, changed, "resume=auto"), run_dir)
    loop.pretrain(_pretrain(folder, "resume=auto"), run_dir)


def test_weight_decay_of_a_resumed_pretraining_is_the_configs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[float] = []
    original = loop._optimise

    def watch(run: Any, last: bool) -> None:
        found.append(max(g["weight_decay"] for g in run.engine.optimizer.param_groups))
        original(run, last)

    monkeypatch.setattr(loop, "_optimise", watch)
    for stage in ("0", "1"):
        fixed = [f"strategy=deepspeed_stage_{stage}", "trainer.weight_decay=0.2"]
        loop.pretrain(_pretrain(folder, *fixed, "trainer.epochs=1"), tmp_path / stage)
        found.clear()
        fixed[1] = "trainer.weight_decay=0.1"
        loop.pretrain(_pretrain(folder, *fixed, "trainer.epochs=2", "resume=auto"), tmp_path / stage)
        assert set(found) == {0.1}


@pytest.mark.parametrize("changed", ["model.heads=4", "data_module.modalities.rgb.mean=[0.5]"])
def test_pretraining_goes_on_with_what_its_weights_have_learned_with(
    pretrained: Path, folder: Path, changed: str
) -> None:
    """No tensor's shape tells."""
    with pytest.raises(ConfigError, match="has learned with other settings"):
        loop.pretrain(_pretrain(folder, "trainer.epochs=2", changed, f"resume={pretrained}"), pretrained.parents[1])


def test_weights_of_other_heads_are_no_start(pretrained: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightMismatchError, match="heads 2 / 4, head_dim 16 / 8"):
        loop.pretrain(_pretrain(folder, "model.heads=4", f"init_from={pretrained}"), tmp_path)


@pytest.fixture(scope="module")
def pretrained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch."""
    return loop.pretrain(_pretrain(folder, "trainer.epochs=1"), tmp_path_factory.mktemp("pretrained"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("data_module.modalities.flow.std=[7.0]", r"std \(1.0, 1.0\) / \(7.0, 7.0\)"),
        ("data_module.modalities.skeleton.sigma=0.5", "sigma 2.0 / 0.5"),
    ],
)
def test_teachers_see_what_they_were_trained_on(folder: Path, changed: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        run.distill(_distill(folder, changed), tmp_path / "fresh")
    run.distill(_distill(folder, "trainer.epochs=1"), tmp_path / "run")
    with pytest.raises(ConfigError, match=told):  # its teachers are in the file
        run.distill(_distill(folder, changed, "resume=auto"), tmp_path / "run")


def test_other_teachers_than_those_in_the_file_are_refused(folder: Path, tmp_path: Path) -> None:
    """trainer.ckpt_path, where it names what is there, is never passed over."""
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
    assert load_teachers(config, specs, full)[1] == sources

    content = load_torch(here / "flow.ckpt")
    content["state_dict"]["encoder.norm.weight"] += 1
    save_torch(content, here / "flow.ckpt")
    with pytest.raises(ConfigError, match=r"flow\.ckpt: its weights have sha256"):
        load_teachers(config, specs, full)
    (here / "flow.ckpt").unlink()
    assert load_teachers(config, specs, full)[1] == sources


def test_kept_features_are_of_the_files_and_clips_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Neither a flow that was computed again nor another choice of frames has a name that tells."""
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


def test_learned_positions_are_not_decayed() -> None:
    """Under whatever name the encoder stands."""
    geometry = EncoderConfig(3, 4, 16, 16, 8, 2, 16, 2, 2, 8, 32, pos_embed="learned")
    module = torch.nn.ModuleDict({"student_rgb": torch.nn.ModuleDict({"encoder": Encoder(geometry)})})
    optimizer = make_optimizer(module, lr=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    of = {name: decay[id(p)] for name, p in module.named_parameters()}
    assert of["student_rgb.encoder.pos_embed"] == 0
    assert of["student_rgb.encoder.patch_embed.proj.weight"] == 0.1
