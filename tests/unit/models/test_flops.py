"""The FLOPs of the formulas are those that torch counts in the passes of the networks."""

import pytest
import torch

from mmdistill.models.flops import decoder_flops, encoder_flops, encoder_training_flops
from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig, VideoMAE
from tests.flops import count_flops

ENCODER = EncoderConfig(
    channels=3, num_frames=4, height=16, width=24, patch=8, tubelet=2,
    dim=24, depth=3, heads=2, head_dim=8, mlp_dim=40,
)  # fmt: skip  # 12 tokens
DECODER = DecoderConfig(dim=16, depth=2, heads=4, head_dim=8, mlp_dim=24)


def _inputs(num_visible: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip and its visible tokens."""
    return torch.rand(1, 3, 4, 16, 24), torch.arange(num_visible)[None]


@pytest.mark.parametrize("recomputes", [False, True])
def test_encoder(recomputes: bool) -> None:
    encoder, inputs = Encoder(ENCODER), _inputs(5)
    encoder.set_activation_checkpointing(recomputes)
    with torch.no_grad():
        assert count_flops(lambda: encoder.eval()(*inputs)) == encoder_flops(ENCODER, 5)
    counted = count_flops(lambda: encoder.train()(*inputs).sum().backward())
    assert counted == encoder_training_flops(ENCODER, 5, recomputes=recomputes)


def test_decoder() -> None:
    model, (clip, visible) = VideoMAE(ENCODER, DECODER), _inputs(5)
    counted = count_flops(lambda: model(clip, visible, torch.tensor([[6, 7, 9]]))[0].sum().backward())
    assert counted == encoder_training_flops(ENCODER, 5) + 3 * decoder_flops(ENCODER, DECODER, 5, 3)
