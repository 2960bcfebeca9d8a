"""Reconstruction targets and losses of masked autoencoding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdistill.models import TARGETS
from mmdistill.models.videomae import gather_patches


def patch_targets(x: Tensor, index: Tensor, grid: tuple[int, int, int], *, target: str) -> Tensor:
    """Reconstruction targets of the tokens `index`. (B, C, T, H, W), (B, N) -> (B, N, P).

    `x` are normalized clips. The values of a token are in the order (C, pt, ph, pw). Targets:

    - ``norm_pix``: ``(value - mean) / (std + 1e-6)`` per token and channel, with the unbiased std (VideoMAE, section
      3.1).
    - ``motion_energy``: ``|value - mean over the clip's frames|`` of the same pixel and channel, which shows where and
      when something moves, independent of its color (after Bobick and Davis, IEEE PAMI 2001).
    - ``pixel``: the values of `x`.

    Raises:
        ValueError: the target is unknown.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    if target == "motion_energy":
        x = (x - x.mean(dim=2, keepdim=True)).abs()
    patches = gather_patches(x, index, grid).flatten(3)  # (B, N, C, pt*ph*pw), a copy
    if target == "norm_pix":
        patches.sub_(patches.mean(dim=3, keepdim=True))
        # torch.std takes ten times as long as vector_norm
        std = torch.linalg.vector_norm(patches, dim=3, keepdim=True).div_((patches.shape[3] - 1) ** 0.5)
        patches.div_(std.add_(1e-6))
    return patches.flatten(2)


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over removed tokens, in float32. (B, N, P) twice -> scalar."""
    return F.mse_loss(prediction.float(), target.float())


def constant_baseline_loss(target: Tensor, channels: int) -> Tensor:
    """Loss of the best constant prediction per channel for this batch. (B, N, P) -> scalar.

    A model whose reconstruction loss is not clearly lower has learned nothing but the mean of each channel.
    """
    values = target.float().unflatten(2, (channels, -1)).flatten(0, 1)  # (B * N, C, pt*ph*pw)
    mean = values.mean(dim=2).double()  # of each token, (B * N, C)
    square = torch.linalg.vector_norm(values, dim=2).double().square() / values.shape[2]
    loss: Tensor = (square.mean(dim=0) - mean.mean(dim=0).square()).mean()
    return loss.float()
