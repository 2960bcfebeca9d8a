"""The DeepSpeed side of pretraining: process group, config and engine."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from mmdistill.config import PretrainConfig, has_offload, zero_stage
from mmdistill.distributed.device import resolve_precision
from mmdistill.distributed.process import Process, disable_shm_op
from mmdistill.models.videomae import VideoMAE
from mmdistill.training.optim import LearningRates, make_optimizer


def init_process_group(process: Process) -> None:
    """Create the process group and DeepSpeed's backend, once per Python process: the jobs of a sweep share it."""
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    if process.world_size == 1 and not torch.distributed.is_initialized():
        # an in-memory store needs no port, which another job of this machine could take first
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        disable_shm_op()
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def deepspeed_config(config: PretrainConfig, precision: str) -> dict[str, Any]:
    """The config dictionary for `deepspeed.initialize`; `precision` is ``32``, ``bf16`` or ``16``."""
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
        out["fp16"] = {"enabled": True, "hysteresis": 1}  # each overflow halves the loss scale at every stage
    return out


def make_engine(config: PretrainConfig, model: VideoMAE, rates: LearningRates, process: Process) -> DeepSpeedEngine:
    """The engine that trains `model`. The schedule sets the optimizer's learning rates before each step."""
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
    if scaler is not None:  # trainer.on_nonfinite handles a gradient that overflows at the minimum scale
        scaler.raise_error_at_min_scale = False
    return engine
