"""Exponential moving average of the encoder in a pretraining."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mmdistill.checkpoint import CheckpointError
from mmdistill.checkpoint.keys import ENCODER_EMA
from mmdistill.models.videomae import Encoder


class EncoderAverage:
    """The average of the encoder of `model`: ``average = decay * average + (1 - decay) * weights`` after each step.

    It starts as a copy of the weights, and is float32 in every precision. It averages the weights of the forward pass,
    which have the precision of the training.

    It becomes the submodule ``encoder_ema`` of `model`, so that DeepSpeed saves and loads it. Its weights are buffers,
    because ZeRO slices parameters.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, decay: float) -> None:
        with torch.random.fork_rng(devices=[]):
            copy = Encoder(encoder.config)
        copy.load_state_dict(encoder.state_dict())
        for module in list(copy.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        copy.to(next(encoder.parameters()).device)
        model.add_module(ENCODER_EMA, nn.ModuleDict({"encoder": copy}))
        values = copy.state_dict()
        self._pairs = [(values[name], parameter) for name, parameter in encoder.named_parameters()]
        self._update = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Add the current weights."""
        averages = [average for average, _ in self._pairs]
        weights = [parameter.detach().to(average.dtype) for average, parameter in self._pairs]
        self._update(averages, weights, 1)  # the number of averages is not used


def check_average(stored_meta: Mapping[str, Any], ema: float | None) -> None:
    """Raise `CheckpointError` if only one of a checkpoint with these metadata and a run with `ema` has an average."""
    stored = ((stored_meta.get("config") or {}).get("trainer") or {}).get("ema")
    if (stored is None) != (ema is None):
        raise CheckpointError(
            f"resume: the checkpoint has {'no' if stored is None else 'an'} average of the encoder ({ENCODER_EMA}), "
            f"this run has trainer.ema={'null' if ema is None else ema}; use the same setting, or resume=null"
        )
