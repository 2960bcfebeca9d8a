"""The validations of a pretraining, and the average of its encoder, in whole trainings on tiny data."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.builders import make_clip_dataset, make_clip_loader
from mmdistill.checkpoint import CheckpointError, load_encoder
from mmdistill.checkpoint.export import export_student
from mmdistill.checkpoint.inspect import inspect_checkpoint
from mmdistill.checkpoint.read import read_checkpoint
from mmdistill.config import PretrainConfig, modality_specs
from mmdistill.distill.teachers import read_teacher
from mmdistill.evaluation.networks import load_networks
from mmdistill.modalities import preprocess_clips
from mmdistill.models.videomae import VideoMAE
from mmdistill.pretrain.monitor import merge_sums, reconstruction_sums
from mmdistill.pretrain.trainer import pretrain
from mmdistill.pretrain.visualization import load_masked_autoencoder
from tests.configs import distill_config, pretrain_config
from tests.tiny_data import MODEL, make_tiny, overrides

MONITORED = ["trainer.check_val_every_n_epoch=2", "trainer.val_episodes=2", "data_module.n_way=2"]
MONITORED += ["data_module.k_shot=1", "data_module.q_sample=1"]
METRICS = ("val_top1_action", "held_out_loss", "held_out_constant_baseline_loss", "feature_std", "effective_rank")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=2)


def _config(data: Path, *more: str) -> PretrainConfig:
    fixed = ["modality=rgb", "accelerator=cpu", "batch_size=8", "trainer.lr=0.1", "trainer.image_every_n_epochs=0"]
    fixed += ["trainer.save_ckpt_freq=1"]
    return pretrain_config(*overrides(data), *MODEL, *fixed, *more)


def _rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        timed = ("clips_per_s", "data_wait_percent", "mfu_percent")
        timed += ("grad_norm",)  # it is rounded differently by each ZeRO stage
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def _assert_same(one: Path, other: Path, *ignored: str) -> None:
    a, b = (read_checkpoint(path).state_dict for path in (one, other))
    names = {name for name in a.keys() | b.keys() if not name.startswith(ignored or ("none.",))}
    assert all(torch.equal(a[name], b[name]) for name in names)


@pytest.fixture(scope="module")
def monitored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run folder and last checkpoint of two epochs with a validation after the second, and an average."""
    folder = tmp_path_factory.mktemp("monitored")
    return folder, pretrain(_config(data, *MONITORED, "trainer.ema=0.75"), folder)


def test_validation_and_average_change_no_number(data: Path, monitored: tuple[Path, Path], tmp_path: Path) -> None:
    folder, last = monitored
    plain = pretrain(_config(data), tmp_path)
    _assert_same(last, plain, "encoder_ema.")
    first, second = _rows(folder)
    assert all(first[name] == "" for name in METRICS)
    assert all(float(second[name]) > 0 for name in METRICS[1:])
    assert 0 <= float(second["val_top1_action"]) <= 1
    own = [{k: v for k, v in row.items() if k not in METRICS} for row in (first, second)]
    assert own == _rows(tmp_path)
    log = (folder / "run.log").read_text()
    assert "val_top1_action every 2 epochs on" in log
    assert f"epoch 1: held-out loss {float(second['held_out_loss']):.4f} (constant baseline" in log
    assert "epoch 1: val_top1_action" in log


def _held_out(config: PretrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Model input and mask of all held-out clips."""
    dataset = make_clip_dataset(config.data_module, ("rgb",), training=False, masked=True, seed=config.seed)
    (batch,) = make_clip_loader(dataset, num_workers=0, pin_memory=False, batch_size=len(dataset))
    spec = modality_specs(config.data_module)["rgb"]
    return preprocess_clips(batch["rgb"], batch["crop_box"], spec, (32, 32)), batch["visible"]


def test_held_out_metrics_are_those_of_the_formulas(data: Path, monitored: tuple[Path, Path]) -> None:
    """From the last checkpoint: loss, best constant per channel, LayerNorm of the mean over the visible tokens."""
    folder, last = monitored
    config = _config(data)
    model = load_masked_autoencoder(read_checkpoint(last), config).eval()
    x, visible = _held_out(config)
    with torch.no_grad():
        prediction, removed = model(x, visible)
        tokens = model.encoder(x, visible).mean(dim=1).double()
    assert config.data_module.modalities["rgb"].target == "motion_energy"
    energy = (x - x.mean(dim=2, keepdim=True)).abs().double()
    errors, values = [], []
    for clip in range(len(x)):
        for token, predicted in zip(removed[clip].tolist(), prediction[clip].double(), strict=True):
            t, h, w = token // 16, token // 4 % 4, token % 4
            patch = energy[clip, :, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8].reshape(3, -1)
            values.append(patch)
            errors.append(((predicted - patch.reshape(-1)) ** 2).mean())
    flat = torch.cat(values, dim=1)
    feature = (tokens - tokens.mean(dim=1, keepdim=True)) / (
        tokens.var(dim=1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    singular = np.linalg.svd((feature - feature.mean(dim=0)).numpy(), compute_uv=False)
    p = singular[singular > 1e-12] / singular.sum()
    expected = {
        "held_out_loss": float(torch.stack(errors).mean()),
        "held_out_constant_baseline_loss": float(((flat - flat.mean(dim=1, keepdim=True)) ** 2).mean()),
        "feature_std": float(((feature - feature.mean(dim=0)) ** 2).mean(dim=0).sqrt().mean()),
        "effective_rank": float(np.exp(-(p * np.log(p)).sum())),
    }
    row = _rows(folder)[-1]
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-3)


def test_sums_do_not_depend_on_the_batches(data: Path, monitored: tuple[Path, Path]) -> None:
    config = _config(data)
    model = load_masked_autoencoder(read_checkpoint(monitored[1]), config).eval()
    x, visible = _held_out(config)
    with torch.no_grad():
        whole = reconstruction_sums(model, x, visible, "pixel")
        parts = [reconstruction_sums(model, x[i : i + 3], visible[i : i + 3], "pixel") for i in range(0, len(x), 3)]
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    assert merge_sums(*joined) == pytest.approx(merge_sums(*whole), rel=1e-6)


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_2"])
def test_resumed_average_and_validation_are_bit_identical(data: Path, strategy: str, tmp_path: Path) -> None:
    """The second part resumes at another stage, whose directory has the same buffers."""
    options = [*MONITORED, "trainer.ema=0.75"]
    full = pretrain(_config(data, *options, f"strategy={strategy}"), tmp_path / "full")
    first = next((tmp_path / "full" / "checkpoints").glob("epoch=00-*"))
    last = pretrain(_config(data, *options, "strategy=deepspeed_stage_1", f"resume={first}"), tmp_path / "parts")
    _assert_same(last, full)
    assert _rows(tmp_path / "parts") == _rows(tmp_path / "full")
    with pytest.raises(
        CheckpointError, match=r"has an average of the encoder \(encoder_ema\), this run has trainer.ema"
    ):
        pretrain(_config(data, f"resume={first}"), tmp_path / "other")


def test_who_reads_the_average(data: Path, monitored: tuple[Path, Path], tmp_path: Path) -> None:
    """A teacher and the reconstruction images use the plain encoder. An export makes the average a teacher."""
    last, config = monitored[1], _config(data)
    assert inspect_checkpoint(last)["architecture"].keys() == {"encoder", "encoder_ema", "decoder"}
    plain, average = load_encoder(last), load_encoder(last, part="encoder_ema")
    assert not torch.equal(plain.blocks[0].mlp.fc1.weight, average.blocks[0].mlp.fc1.weight)
    spec = modality_specs(config.data_module)["rgb"]
    assert isinstance(load_masked_autoencoder(read_checkpoint(last), config), VideoMAE)
    exported = export_student(last, tmp_path / "ema.safetensors", to="safetensors", component="encoder_ema")
    for path, expected in ((last, plain), (exported, average)):
        teacher = read_teacher(str(path), "rgb", spec, config.data_module).state_dict()
        assert all(torch.equal(teacher[name], x) for name, x in expected.state_dict().items())
    given = [*overrides(data), "train=False", f"ckpt_path={last}", "eval_component=encoder_ema", "baselines=[encoder]"]
    networks, _ = load_networks(distill_config(*given), read_checkpoint(last))
    assert [network.name for network in networks] == ["pretrained_ema_rgb", "pretrained_rgb"]
    weights = [network.encoder.blocks[0].mlp.fc1.weight for network in networks]
    assert torch.equal(weights[0], average.blocks[0].mlp.fc1.weight)
    assert torch.equal(weights[1], plain.blocks[0].mlp.fc1.weight)


def test_missing_labels_and_files_are_one_line_each(data: Path, tmp_path: Path) -> None:
    rallies = json.loads((data / "val.json").read_text())
    (data / "no_labels.json").write_text(json.dumps([{**rally, "events": []} for rally in rallies]))
    short = [*MONITORED, "trainer.check_val_every_n_epoch=1", "trainer.epochs=1"]
    pretrain(_config(data, *short, "data_module.val_json_path=absent.json"), tmp_path / "absent")
    log = (tmp_path / "absent" / "run.log").read_text()
    for start in ("no val_top1_action: ", "no held-out clips: "):
        (line,) = [line for line in log.splitlines() if line.startswith(start)]
        assert "absent.json does not exist" in line
    pretrain(_config(data, *short, "data_module.val_json_path=no_labels.json"), tmp_path / "labels")
    assert "no val_top1_action: " in (tmp_path / "labels" / "run.log").read_text()
