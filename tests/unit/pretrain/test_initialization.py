"""`init_from=PATH`: an encoder initialized from VideoMAE weights with the same or another number of channels."""

from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import CheckpointError
from mmdistill.models.videomae import Encoder, EncoderConfig
from mmdistill.pretrain.initialization import load_videomae


def _encoder(channels: int, *, dim: int = 16, mlp_dim: int = 32) -> Encoder:
    torch.manual_seed(channels)
    return Encoder(EncoderConfig(channels, 4, 16, 16, 8, 2, dim, 2, 2, dim // 2, mlp_dim))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A `.pth` file like VideoMAE's: key `model`, prefix `encoder.`, with a decoder."""
    state = {f"encoder.{k}": v for k, v in _encoder(3).state_dict().items()}
    state["mask_token"] = torch.zeros(1, 1, 8)
    state["encoder_to_decoder.weight"] = torch.zeros(8, 16)
    torch.save({"model": state, "epoch": 7}, tmp_path / "videomae.pth")
    return tmp_path / "videomae.pth"


def test_same_channels_give_the_same_features(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source, encoder = _encoder(3), _encoder(3)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(1)
    report = load_videomae(encoder, str(weights))
    clip = torch.rand(2, 3, 4, 16, 16)
    assert torch.equal(encoder(clip), source(clip))
    assert "videomae.pth" in str(report)
    assert caplog.messages == []  # the training logs the report once


@pytest.mark.parametrize("channels", [2, 17])
def test_equal_channels_give_the_same_tokens_for_other_channel_counts(weights: Path, channels: int) -> None:
    source, encoder = _encoder(3), _encoder(channels)
    report = load_videomae(encoder, str(weights))
    gray = torch.rand(2, 1, 4, 16, 16)
    expected = source(gray.expand(-1, 3, -1, -1, -1))
    torch.testing.assert_close(encoder(gray.expand(-1, channels, -1, -1, -1)), expected, atol=1e-5, rtol=1e-5)
    assert f"from 3 to {channels} channels" in str(report)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 32}, r"videomae\.pth has width 16, depth 2, .* 16; this model has 32, 2, 32; set model="),
        ({"mlp_dim": 48}, r"blocks\.0\.mlp\.fc1\.weight"),
    ],
)
def test_mismatch_raises_and_leaves_the_encoder_unchanged(weights: Path, sizes: dict[str, int], message: str) -> None:
    encoder = _encoder(3, **sizes)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_videomae(encoder, str(weights))
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
