"""The DeepSpeed side of pretraining: the process group, the engine, and what is all-reduced."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from mmdistill.config import PretrainConfig
from mmdistill.models.videomae import VideoMAE
from mmdistill.optim import LearningRates, make_optimizer
from mmdistill.runtime import Process, resolve_precision


def open_process_group(process: Process) -> None:
    """Join the other ranks, once per Python process (jobs of a sweep share it)."""
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if process.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )


def deepspeed_config(config: PretrainConfig, precision: str) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`."""
    ds, trainer = config.deepspeed, config.trainer
    zero: dict[str, Any] = {"stage": ds.zero_stage}
    if ds.offload:
        if ds.zero_stage == 0:
            raise ValueError("deepspeed.offload needs deepspeed.zero_stage 1, 2 or 3: stage 0 shards nothing")
        zero["offload_optimizer"] = {"device": "cpu"}
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": trainer.accumulate,
        "gradient_clipping": trainer.clip_grad or 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if precision in ("bf16", "16"):
        out["bf16" if precision == "bf16" else "fp16"] = {"enabled": True}
    return out


def make_engine(config: PretrainConfig, model: VideoMAE, rates: LearningRates, process: Process) -> DeepSpeedEngine:
    """The engine around `model`. Its optimiser's learning rates are set by the schedule before each step."""
    betas = (config.trainer.betas[0], config.trainer.betas[1])
    optimizer = make_optimizer(model, lr=rates.lr, weight_decay=config.trainer.weight_decay, betas=betas)
    precision = resolve_precision(config.precision, process.device)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, precision), dist_init_required=False
    )
    return engine


def mean_over_ranks(values: list[torch.Tensor]) -> list[float]:
    """The average of each scalar over all ranks, in one all-reduce."""
    stacked = torch.stack([v.detach().float() for v in values])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(stacked)
        stacked /= torch.distributed.get_world_size()
    return [float(v) for v in stacked.tolist()]


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if `flag` is true on one."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return flag
    seen = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
    return bool(seen.item())
