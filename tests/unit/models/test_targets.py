"""Reconstruction targets and losses against their formulas."""

import numpy as np
import pytest
import torch

from mmdistill.models.targets import constant_baseline_loss, patch_targets, reconstruction_loss


def test_targets_equal_their_formulas() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 2, 4, 6, 8))
    grid = (2, 3, 2)
    token = 7  # t=1, h=0, w=1
    block, moving = np.empty((2, 2, 2, 4)), np.empty((2, 2, 2, 4))  # (C, pt, ph, pw)
    for c, dt, dy, dx in np.ndindex(block.shape):
        block[c, dt, dy, dx] = x[0, c, 2 + dt, dy, 4 + dx]
        moving[c, dt, dy, dx] = abs(block[c, dt, dy, dx] - sum(x[0, c, :, dy, 4 + dx]) / 4)
    mean, std = block.mean((1, 2, 3), keepdims=True), block.std((1, 2, 3), ddof=1, keepdims=True)
    for target, expected in (
        ("pixel", block),
        ("norm_pix", (block - mean) / (std + 1e-6)),
        ("motion_energy", moving),
    ):
        found = patch_targets(torch.from_numpy(x), torch.tensor([[token]]), grid, target=target)
        np.testing.assert_allclose(found[0, 0].numpy(), expected.reshape(-1), atol=1e-9, err_msg=target)
    with pytest.raises(ValueError, match="centered"):
        patch_targets(torch.from_numpy(x), torch.tensor([[token]]), grid, target="centered")


def test_reconstruction_loss_and_its_gradient() -> None:
    prediction = torch.randn(2, 300, 6, requires_grad=True)  # more tokens than one chunk
    target = torch.randn(2, 300, 6)
    loss = reconstruction_loss(prediction, target)
    difference = prediction.detach().double() - target.double()
    assert loss.item() == pytest.approx(difference.square().mean().item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(3 * loss, prediction)
    torch.testing.assert_close(gradient.double(), 3 * 2 * difference / difference.numel(), atol=1e-9, rtol=1e-6)


def test_constant_baseline_is_the_loss_of_the_best_constant_per_channel() -> None:
    target = torch.randn(3, 5, 2 * 4, dtype=torch.float64)  # 2 channels
    channels = target.view(3, 5, 2, 4).numpy()
    best = sum(((channels[:, :, c] - channels[:, :, c].mean()) ** 2).sum() for c in range(2)) / channels.size
    assert constant_baseline_loss(target, 2).item() == pytest.approx(best, rel=1e-5)
