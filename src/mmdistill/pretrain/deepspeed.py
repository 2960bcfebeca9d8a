"""The DeepSpeed side of pretraining: the process group, the engine, and what is all-reduced."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from mmdistill.config import PretrainConfig, has_offload, zero_stage
from mmdistill.distributed.device import resolve_precision
from mmdistill.distributed.process import Process
from mmdistill.models.videomae import VideoMAE
from mmdistill.training.optim import LearningRates, make_optimizer


def open_process_group(process: Process) -> None:
    """Join the other ranks, once per Python process (jobs of a sweep share it)."""
    if process.world_size == 1 and not torch.distributed.is_initialized():
        backend = "nccl" if process.device.type == "cuda" else "gloo"
        # no port: other jobs of this machine cannot take it in between
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if process.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )


def deepspeed_config(config: PretrainConfig, precision: str) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`."""
    trainer, stage = config.trainer, zero_stage(config)
    zero: dict[str, Any] = {"stage": stage}
    if has_offload(config):
        zero["offload_optimizer"] = {"device": "cpu"}
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": trainer.accumulate_grad_batches,
        "gradient_clipping": trainer.clip_grad or 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if precision == "bf16":
        out["bf16"] = {"enabled": True}
    elif precision == "16":
        out["fp16"] = {"enabled": True, "hysteresis": 1}  # each overflow halves the loss scale, at every stage
    return out


def make_engine(config: PretrainConfig, model: VideoMAE, rates: LearningRates, process: Process) -> DeepSpeedEngine:
    """The engine around `model`. Its optimiser's learning rates are set by the schedule before each step."""
    betas = (config.trainer.betas[0], config.trainer.betas[1])
    optimizer = make_optimizer(
        model,
        lr=rates.lr,
        weight_decay=config.trainer.weight_decay,
        betas=betas,
        layer_decay=config.trainer.layer_decay,
    )
    precision = resolve_precision(config.precision, process.device)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, precision), dist_init_required=False
    )
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:  # a gradient that overflows at the least scale is a case for trainer.on_nonfinite
        scaler.raise_error_at_min_scale = False
    return engine
