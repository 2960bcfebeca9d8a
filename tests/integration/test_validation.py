"""Few-shot validation during a distillation: equal to a separate evaluation, usable by callbacks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from mmdistill.builders import make_clip_dataset, make_clip_loader
from mmdistill.checkpoint import load_encoder, save_torch
from mmdistill.config import DistillConfig, modality_specs, to_plain
from mmdistill.distill import trainer as run
from mmdistill.distill.validation import Validation
from mmdistill.evaluation.networks import Network
from mmdistill.fewshot.encode import EvalMasks, encode_clips
from mmdistill.fewshot.episodes import EpisodeSpec, sample_episodes
from mmdistill.fewshot.scores import evaluate_episodes
from mmdistill.models.videomae import Encoder, EncoderConfig
from mmdistill.training.monitoring import METRIC
from tests.configs import distill_config
from tests.ranks import fork_ranks, wait_for
from tests.tiny_data import EVAL, make_tiny, overrides


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data and an RGB teacher with random weights."""
    root = tmp_path_factory.mktemp("validate")
    make_tiny(root / "data")
    torch.manual_seed(3)
    geometry = EncoderConfig(
        channels=3, num_frames=4, height=32, width=32, patch=8, tubelet=2, dim=32, depth=1, heads=2, head_dim=16,
        mlp_dim=64,
    )  # fmt: skip
    state = {f"encoder.{k}": v for k, v in Encoder(geometry).state_dict().items()}
    meta = {"kind": "pretrain", "modality": "rgb", "encoders": {"encoder": to_plain(geometry)}}
    save_torch({"state_dict": state, "mmdistill": meta}, root / "rgb.ckpt")
    return root


def _config(folder: Path, *more: str) -> DistillConfig:
    fixed = ["trainer.teachers=[rgb]", f"trainer.ckpt_path=[{folder / 'rgb.ckpt'}]", "accelerator=cpu", "test=False"]
    given = [*overrides(folder / "data"), *EVAL, *fixed, "trainer.lr=1.0", *more]
    return distill_config(*given)


class _MetricsRecorder(pl.Callback):
    """The metrics at the end of each epoch."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[DistillConfig, Path, list[dict[str, float]]]:
    """Three epochs, validated after each and at the end, with a stock ModelCheckpoint that keeps the two best."""
    config = _config(folder, "trainer.check_val_every_n_epoch=1", "trainer.epochs=3", "trainer.save_ckpt_freq=1")
    best = ModelCheckpoint(folder / "best", "{epoch}-{val_top1_action:.6f}", monitor=METRIC, mode="max", save_top_k=2)
    recorder, make = _MetricsRecorder(), run._make_trainer

    made: list[pl.Trainer] = []

    def with_monitor(*args: Any) -> pl.Trainer:
        made.append(make(*args))
        made[0].callbacks += [recorder, best]
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_make_trainer", with_monitor)
        run.distill(config, folder / "run")
    (again,) = made[0].validate(made[0].lightning_module, made[0].val_dataloaders, verbose=False)
    recorder.logged.append(again)
    return config, folder, recorder.logged


def _evaluate_separately(config: DistillConfig, path: Path) -> float:
    """Encode all evaluation clips as the evaluation does, then score the same episodes."""
    student = Network("student_rgb", load_encoder(path, part="student_rgb"), "rgb")
    dataset = make_clip_dataset(config.data_module, ("rgb",), training=False, seed=config.seed)
    job = student.encoding_job(modality_specs(config.data_module)["rgb"], EvalMasks())
    loader = make_clip_loader(dataset, num_workers=0, pin_memory=False, batch_size=5)
    (features,) = encode_clips([job], loader, dataset.index, show_progress=False)
    episodes = sample_episodes(features.labels, EpisodeSpec(3, 1, 3), episodes=20, seed=config.seed)
    return float(evaluate_episodes(features.features, episodes, "centroid").accuracy.mean())


def test_logged_value_equals_a_separate_evaluation(
    trained: tuple[DistillConfig, Path, list[dict[str, float]]],
) -> None:
    config, folder, logged = trained
    *epochs, again = logged
    assert len(epochs) == 3
    for epoch, metrics in enumerate(epochs):
        (path,) = (folder / "run" / "checkpoints").glob(f"epoch={epoch:02d}-*")
        assert metrics[METRIC] == pytest.approx(_evaluate_separately(config, path), abs=1e-6)
    assert again[METRIC] == epochs[-1][METRIC]  # `Trainer.validate`
    rows = (folder / "run" / "metrics.csv").read_text().splitlines()
    assert METRIC in rows[0].split(",")


def test_model_checkpoint_can_monitor_it(trained: tuple[DistillConfig, Path, list[dict[str, float]]]) -> None:
    config, folder, logged = trained
    values = [metrics[METRIC] for metrics in logged]
    kept = {float(p.stem.rpartition("=")[2]): p for p in (folder / "best").glob("*.ckpt")}
    assert len(kept) == 2
    assert max(kept) == pytest.approx(max(values), abs=1e-6)
    assert _evaluate_separately(config, kept[max(kept)]) == pytest.approx(max(values), abs=1e-6)


def test_retention_can_use_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints of the highest value and of the last epoch stay; a run resumed in another folder knows both."""
    values = iter((0.2, 0.9, 0.4, 0.3, 0.5))
    monkeypatch.setattr(Validation, "score", lambda self, features: next(values))
    options = ["trainer.monitor=val_top1_action", "trainer.check_val_every_n_epoch=1", "trainer.save_ckpt_freq=1"]
    last = run.distill(_config(folder, *options, "trainer.save_top_k=1", "trainer.epochs=4"), tmp_path / "a")
    saved = sorted(p.name[:8] for p in (tmp_path / "a" / "checkpoints").glob("epoch=*"))
    assert saved == ["epoch=01", "epoch=03"]
    best = next((tmp_path / "a" / "checkpoints").glob("epoch=01-*"))
    assert f"best checkpoint: {best} (val_top1_action 0.9000)" in capsys.readouterr().err
    resumed = [*options, "trainer.keep_last=1", "trainer.epochs=5", f"resume={last}"]
    run.distill(_config(folder, *resumed), tmp_path / "b")
    assert [p.name[:8] for p in (tmp_path / "b" / "checkpoints").glob("epoch=*")] == ["epoch=04"]
    assert f"best checkpoint: {best} (val_top1_action 0.9000)" in capsys.readouterr().err


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    values: list[float] = []
    note = pl.Callback()
    note.on_train_epoch_end = lambda trainer, module: values.append(float(trainer.callback_metrics[METRIC]))
    make = run._make_trainer

    def with_note(*args: Any) -> pl.Trainer:
        trainer = make(*args)
        trainer.callbacks.append(note)
        return trainer

    run._make_trainer = with_note
    more = ["trainer.check_val_every_n_epoch=1", "trainer.epochs=1", "trainer.save_ckpt_freq=1", "batch_size=4"]
    run.distill(_config(Path(folder), *more, "devices=2"), Path(folder) / "two")
    np.save(f"{folder}/value{rank}.npy", values)


def test_two_ranks_log_the_same_value(folder: Path) -> None:
    assert wait_for(fork_ranks(2, lambda rank: _rank(rank, str(folder)))) == [0, 0]
    values = [np.load(folder / f"value{rank}.npy") for rank in range(2)]
    assert values[0] == values[1]
    (path,) = (folder / "two" / "checkpoints").glob("epoch=*")
    assert float(values[0][0]) == pytest.approx(_evaluate_separately(_config(folder), path), abs=1e-6)
