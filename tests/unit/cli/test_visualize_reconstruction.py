"""`mmdistill visualize`: images of a checkpoint that holds a decoder, one line for any other input."""

import re
from pathlib import Path

import cv2
import pytest

from mmdistill.checkpoint import save_torch
from mmdistill.cli.visualize_reconstruction import main
from mmdistill.config import PretrainConfig, to_plain
from mmdistill.config.compose import load_config
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE
from mmdistill.randomness import seed_torch
from tests.tiny_data import MODEL, make_tiny, overrides


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained masked autoencoder of the tiny data with the metadata of a pretraining."""
    root = tmp_path_factory.mktemp("visualize")
    config = load_config(
        PretrainConfig, "config_pretrain", [*overrides(make_tiny(root / "data", per_class=1)), *MODEL, "modality=flow"]
    )
    encoder = EncoderConfig(2, 4, 32, 32, 8, 2, 16, 1, 2, 8, 32)
    decoder = DecoderConfig(16, 1, 1, 16, 64)
    seed_torch(0)
    meta = {
        "kind": "pretrain",
        "modality": "flow",
        "encoders": {"encoder": to_plain(encoder)},
        "decoder": to_plain(decoder),
        "config": to_plain(config),
    }
    path = root / "flow.pt"
    save_torch({"state_dict": VideoMAE(encoder, decoder).state_dict(), "mmdistill": meta}, path)
    return path


def test_each_clip_becomes_one_image(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), "--clips", "2", "--split", "val", "--out", str(tmp_path)]) == 0
    images = sorted(tmp_path.glob("clip_*.png"))
    assert len(images) == 2
    assert all(cv2.imread(str(path)).std() > 0 for path in images)
    lines = capsys.readouterr().out.splitlines()
    pattern = r".*\.png: loss ([\d.]+) \(constant baseline ([\d.]+), ratio ([\d.]+), lower is better\)"
    values = [[float(value) for value in re.fullmatch(pattern, line).groups()] for line in lines]  # type: ignore[union-attr]
    assert len(values) == 2
    assert all(ratio == pytest.approx(loss / baseline, rel=0.02) for loss, baseline, ratio in values), values


def test_a_checkpoint_without_decoder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_torch({"state_dict": {}, "mmdistill": {"kind": "distill", "encoders": {}}}, tmp_path / "last.ckpt")
    assert main([str(tmp_path / "last.ckpt")]) == 2
    errors = capsys.readouterr().err
    assert "last.ckpt" in errors
    assert "Traceback" not in errors


def test_key_without_effect_is_rejected(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), "trainer.epochs=3", "data_module.mask_ratio=0.5"]) == 2
    assert (
        "error: trainer.epochs: no effect on the images of a checkpoint; give dataset=NAME" in capsys.readouterr().err
    )
