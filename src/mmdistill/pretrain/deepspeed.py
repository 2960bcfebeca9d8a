"""The DeepSpeed side of pretraining: process group, config and engine."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmdistill.config import PretrainConfig, has_offload, zero_stage
from mmdistill.distributed.process import disable_shm_op, prepare_deepspeed_import
from mmdistill.models.videomae import VideoMAE
from mmdistill.training.nonfinite import skip_optimizer_step
from mmdistill.training.optim import Optimization, make_optimizer
from mmdistill.training.run import Run

prepare_deepspeed_import()
import deepspeed  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402


def init_process_group(device: torch.device, world_size: int) -> None:
    """Create the process group and DeepSpeed's backend, once per Python process: the jobs of a sweep share it."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1 and not torch.distributed.is_initialized():
        # an in-memory store needs no port, which another job of this machine could take first
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        disable_shm_op()
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def deepspeed_config(config: PretrainConfig, precision: str) -> dict[str, Any]:
    """The config dictionary for `deepspeed.initialize`; `precision` is ``32``, ``bf16`` or ``16``."""
    trainer = config.trainer
    zero: dict[str, Any] = {"stage": zero_stage(config)}
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


def make_engine(config: PretrainConfig, model: VideoMAE, optimization: Optimization, run: Run) -> DeepSpeedEngine:
    """The engine that trains `model`. The schedule sets the optimizer's learning rates before each step."""
    init_process_group(run.process.device, run.process.world_size)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, optimization),
        config=deepspeed_config(config, run.precision),
        dist_init_required=False,
    )
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:  # trainer.on_nonfinite handles a gradient that overflows at the minimum scale
        scaler.raise_error_at_min_scale = False
    checker = getattr(engine.optimizer, "overflow_checker", None)
    if checker is not None:  # of bf16 and fp16 at stage 0
        checker.has_overflow_serial = has_nonfinite_gradient
    return engine


def has_nonfinite_gradient(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether a gradient is not finite. DeepSpeed's own function reads one value per gradient from the device."""
    is_finite = [p.grad.isfinite().all() for p in parameters if p.grad is not None]
    return bool(is_finite) and not bool(torch.stack(is_finite).all())


@contextmanager
def skip_engine_step(engine: DeepSpeedEngine) -> Iterator[None]:
    """`engine.step` counts a step but changes no weight. The loader of checkpoints compares the engine's counts."""
    engine.skipped_steps += 1
    with skip_optimizer_step(engine.optimizer):
        yield
