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
class Optimization:
    """Hyperparameters of AdamW and of its schedule: linear warm-up, then half a cosine.

    Attributes:
        lr, min_lr, warmup_lr: learning rates after the warm-up, at the end and at the start.
        weight_decay, betas: of AdamW.
        layer_decay: the learning rate of layer k is ``lr * layer_decay ** (n + 1 - k)``, as in BEiT (arXiv 2106.08254):
            the patch embedding is layer 0, the n encoder blocks are 1 to n, and all parameters above them have the full
            rate. None: one learning rate for all layers.
        warmup_steps, total_steps: optimizer steps of the warm-up and of the whole training.
    """

    lr: float
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    layer_decay: float | None = None
    warmup_steps: int = 0
    total_steps: int = 1

    @classmethod
    def from_config(cls, trainer: TrainerConfig, *, global_batch: int, steps_per_epoch: int) -> "Optimization":
        """Those of a run with `global_batch` clips per optimizer step.

        The config's rates are per 256 clips: the linear scaling rule (Goyal et al. 2017, arXiv 1706.02677).
        """
        t, factor = trainer, global_batch / 256
        rates, betas = (t.lr * factor, t.min_lr * factor, t.warmup_lr * factor), (t.betas[0], t.betas[1])
        warmup_steps, total_steps = round(t.warmup_epochs * steps_per_epoch), t.epochs * steps_per_epoch
        return cls(*rates, t.weight_decay, betas, t.layer_decay, warmup_steps, total_steps)


def make_optimizer(module: nn.Module, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms, mask token and position embeddings. Frozen parameters are ignored.

    With `layer_decay`, groups store their factor as ``lr_scale``, which timm's schedule applies.
    """
    o = optimization
    groups = param_groups_weight_decay(module, o.weight_decay, no_weight_decay_list=("*mask_token", "*pos_embed"))
    if o.layer_decay is not None:
        groups = _layer_groups(module, groups, o.layer_decay)
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, fused=True)


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
            empty = {**group, "params": [], "lr_scale": decay ** (depth + 1 - layer)}
            split.setdefault((-layer, index), empty)["params"].append(parameter)
    return [split[key] for key in sorted(split)]


class StepSchedule(CosineLRScheduler):
    """timm's schedule by optimizer step, a pure function of the step: call `step_update(steps done)`."""

    def __init__(self, optimizer: torch.optim.Optimizer, optimization: Optimization) -> None:
        super().__init__(
            optimizer,
            t_initial=max(optimization.total_steps, 1),
            lr_min=optimization.min_lr,
            warmup_t=min(optimization.warmup_steps, optimization.total_steps),
            warmup_lr_init=optimization.warmup_lr,
            t_in_epochs=False,
            cycle_decay=0.5,  # no effect with one cycle; with 1 timm warns about a schedule of one step
        )
        names = ("weight_decay", "betas", "lr_scale")
        self._hparams = [{k: group[k] for k in names if k in group} for group in optimizer.param_groups]

    def restore(self, step: int) -> None:
        """After the optimizer has loaded a checkpoint: set this run's rates of `step`, weight decay and betas."""
        for group, hparams in zip(self.optimizer.param_groups, self._hparams, strict=True):
            group.update(hparams)
        self.step_update(step)

    @property
    def lr(self) -> float:
        """The current learning rate of the highest layer."""
        return float(self.optimizer.param_groups[0]["lr"])


def schedule_warnings(trainer: TrainerConfig, source: Mapping[str, Any] | None = None) -> list[str]:
    """Log lines about a schedule that is probably not intended; `source` are metadata of the resumed checkpoint."""
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
