"""AdamW on timm's parameter groups and timm's cosine schedule, the same for both phases."""

from dataclasses import dataclass

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of one run, derived once from the rates per 256 clips that the config states.

    The linear scaling rule (Goyal et al. 2017, arXiv 1706.02677): ``rate = base * global batch / 256``.
    """

    lr: float
    min_lr: float
    warmup_lr: float

    @classmethod
    def scaled(cls, lr: float, min_lr: float, warmup_lr: float, *, global_batch: int) -> "LearningRates":
        """Rates for `global_batch` clips per optimiser step."""
        factor = global_batch / 256
        return cls(lr * factor, min_lr * factor, warmup_lr * factor)


def make_optimizer(
    module: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW; biases, norms, mask token and positions are not decayed. Frozen parameters are left out."""
    groups = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=("mask_token", "pos_embed"))
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def make_schedule(
    optimizer: torch.optim.Optimizer, rates: LearningRates, *, warmup_steps: int, total_steps: int
) -> CosineLRScheduler:
    """Linear warm-up, then half a cosine to `min_lr`. A pure function of the step: call `step_update(steps done)`."""
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total_steps, 1),
        lr_min=rates.min_lr,
        warmup_t=min(warmup_steps, total_steps),
        warmup_lr_init=rates.warmup_lr,
        t_in_epochs=False,
    )
