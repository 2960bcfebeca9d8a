"""The classifier of joint pretraining against its formula."""

import numpy as np
import pytest
import torch

from mmdistill.models.joint import JointVideoMAE
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE

ENCODER = EncoderConfig(
    channels=2, num_frames=4, height=8, width=8, patch=4, tubelet=2, dim=16, depth=1, heads=2, head_dim=8, mlp_dim=32
)
DECODER = DecoderConfig(dim=8, depth=1, heads=1, head_dim=8, mlp_dim=16)


def _model(**options: float) -> JointVideoMAE:
    torch.manual_seed(0)
    return JointVideoMAE(ENCODER, DECODER, num_classes=3, **options)


def _clips() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 2, 4, 8, 8), torch.tensor([[0, 3, 5]]).repeat(4, 1)


def test_classifier_equals_its_formula() -> None:
    """Mean over the tokens, LayerNorm with weight and bias, linear layer; in float64 with NumPy."""
    model = _model().eval()
    for parameter in (*model.fc_norm.parameters(), *model.head_action.parameters()):
        torch.nn.init.normal_(parameter)
    x, visible = _clips()
    logits = model(x, visible, num_source=3)[2]
    tokens = model.encoder(x[:3], visible[:3]).detach().double().numpy()
    mean = tokens.mean(axis=1)
    centered = mean - mean.mean(axis=1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-6)
    own = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    feature = normed * own["fc_norm.weight"] + own["fc_norm.bias"]
    expected = feature @ own["head_action.weight"].T + own["head_action.bias"]
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-5)


def test_dropout_is_before_the_last_layer() -> None:
    """Each element of the normalized feature becomes 0, or twice as large."""
    model = _model(dropout=0.5)
    with torch.no_grad():
        model.head_action.weight.copy_(torch.eye(16)[:3])
    tokens = torch.randn(200, 5, 16)
    kept = model.classify(tokens).detach()
    expected = model.fc_norm(tokens.mean(dim=1))[:, :3].detach()
    ratio = kept / expected
    assert set(ratio.round(decimals=3).unique().tolist()) == {0.0, 2.0}
    assert (ratio == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(model.eval().classify(tokens), expected)


def test_reconstruction_is_that_of_a_masked_autoencoder() -> None:
    """With the same initial weights; the classifier's tensors have the names of MM-CDFSL."""
    torch.manual_seed(0)
    plain, model = VideoMAE(ENCODER, DECODER), _model()
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert added == {"fc_norm.weight", "fc_norm.bias", "head_action.weight", "head_action.bias"}
    x, visible = _clips()
    expected = plain(x, visible)
    for found in (model(x, visible), model(x, visible, num_source=2)):
        torch.testing.assert_close(found[:2], expected, atol=0, rtol=0)


def test_without_a_removed_token_nothing_is_predicted() -> None:
    x, _ = _clips()
    predictions, index, logits = _model()(x, torch.arange(8).repeat(4, 1), num_source=4)
    assert (predictions.shape, index.shape, logits.shape) == ((4, 0, 64), (4, 0), (4, 3))
