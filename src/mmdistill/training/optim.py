"""AdamW on timm's parameter groups and timm's cosine schedule, the same for both trainings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from mmdistill.config.schema import TrainerConfig
from mmdistill.errors import format_count


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of one run, derived from the config's rates, which are per 256 clips.

    The linear scaling rule (Goyal et al. 2017, arXiv 1706.02677): ``rate = base * global batch / 256``.
    """

    lr: float
    min_lr: float
    warmup_lr: float

    @classmethod
    def scaled(cls, lr: float, min_lr: float, warmup_lr: float, *, global_batch: int) -> "LearningRates":
        """Rates for `global_batch` clips per optimizer step."""
        factor = global_batch / 256
        return cls(lr * factor, min_lr * factor, warmup_lr * factor)


def make_optimizer(
    module: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], layer_decay: float | None = None
) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms, mask token and position embeddings. Frozen parameters are ignored.

    With `layer_decay` the learning rate of layer k is ``lr * layer_decay ** (n + 1 - k)``, as in BEiT (arXiv
    2106.08254): the patch embedding is layer 0, the n encoder blocks are 1 to n, and all parameters above them have the
    full rate. Groups store the factor as ``lr_scale``, which timm's schedule applies.
    """
    groups = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=("*mask_token", "*pos_embed"))
    if layer_decay is not None:
        groups = _layer_groups(module, groups, layer_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def param_group_hparams(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """This run's hyperparameters of each group. Loading an optimizer state replaces them by those of the checkpoint."""
    return [{k: g[k] for k in ("weight_decay", "betas", "lr_scale") if k in g} for g in optimizer.param_groups]


def layer_index(name: str, depth: int) -> int:
    """Layer of a parameter: 0 for patch and position embedding, i + 1 for encoder block i, depth + 1 for all others."""
    block = re.search(r"(?:^|\.)encoder\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if re.search(r"(?:^|\.)encoder\.(patch_embed|pos_embed)", name) else depth + 1


def _layer_groups(module: nn.Module, groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    """Split timm's groups by layer, the highest layer first: the first group has the full learning rate."""
    names = {id(p): name for name, p in module.named_parameters()}
    depth = max((layer_index(n, -1) for n in names.values()), default=0)
    split: dict[tuple[int, int], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            layer = layer_index(names[id(parameter)], depth)
            scale = decay ** (depth + 1 - layer)
            empty = {**group, "params": [], "lr_scale": scale}
            split.setdefault((-layer, index), empty)["params"].append(parameter)
    return [split[key] for key in sorted(split)]


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


def schedule_warnings(trainer: TrainerConfig, source: Mapping[str, Any] | None = None) -> list[str]:
    """Log lines about a schedule that is probably not intended; empty if there is nothing to say.

    Args:
        trainer: the config of this run.
        source: metadata of the checkpoint that the run resumes from.
    """
    lines, epochs = [], trainer.epochs
    if trainer.warmup_epochs >= epochs:
        lines.append(
            f"warning: trainer.warmup_epochs={trainer.warmup_epochs:g} is not below trainer.epochs={epochs}: the "
            "learning rate rises during the whole training; lower trainer.warmup_epochs"
        )
    stored = (((source or {}).get("config") or {}).get("trainer") or {}).get("epochs", epochs)
    if stored != epochs:
        lines.append(
            f"warning: trainer.epochs={epochs}, but the checkpoint was trained with trainer.epochs={stored}: the "
            f"learning rate continues on the schedule of {format_count(epochs, 'epoch')}, so it changes at the resume"
        )
    return lines
