"""Lightning strategies that write one ordinary checkpoint file, also with DeepSpeed.

Lightning's own DeepSpeed strategy writes a directory. Here all ranks gather Adam's moments into the layout of
`torch.optim.AdamW`, and rank 0 writes the same file as with any other strategy. A checkpoint therefore resumes under
another ZeRO stage, with another number of processes, or without DeepSpeed, and the other way round.

Weights are float32 with every strategy; ``precision=bf16`` is autocast around the step, as in a plain Trainer. There is
no second, rounded copy of the weights that could be saved by mistake.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from mmdistill.checkpoint import CheckpointError, load_deepspeed, load_torch, save_torch
from mmdistill.config import DEEPSPEED_STAGES, ConfigError, DistillConfig, has_offload
from mmdistill.distributed.collectives import run_on_all_ranks
from mmdistill.distributed.process import disable_shm_op
from mmdistill.training.old_checkpoints import upgrade_distill_checkpoint

_BUCKET_SIZE = 50_000_000  # elements per reduction; one buffer of this size is allocated
_STEP = "step"  # the only entry of AdamW's state that is not a moment
_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def strategy_kwargs(config: DistillConfig, precision: str) -> dict[str, Any]:
    """The Trainer's arguments ``strategy``, ``devices``, ``num_nodes``, ``precision`` and ``plugins``.

    Rank and world size are read from the environment variables that `start_process` uses, whichever launcher set them.
    Lightning must not start processes itself: each of them would run all jobs of a multirun again.

    Raises:
        ConfigError: the strategy does not support `precision` (``32``, ``bf16`` or ``16``).
    """
    world_size = int(os.environ["WORLD_SIZE"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if config.accelerator != "cpu" and torch.cuda.is_available():  # a task of srun may see only a part of the GPUs
        local_world_size = min(local_world_size, torch.cuda.device_count())
    strategy: Strategy | str = "auto"
    if config.strategy in DEEPSPEED_STAGES:
        if precision == "16":
            raise ConfigError(f"strategy={config.strategy} does not support precision=16; use precision=bf16 or 32")
        strategy = SingleFileDeepSpeedStrategy(
            DEEPSPEED_STAGES[config.strategy],
            batch_size=config.batch_size,
            autocast=precision == "bf16",
            offload=has_offload(config),
        )
        precision = "32"  # of the weights; the engine computes under autocast
    elif config.strategy == "ddp" or world_size > 1:
        strategy = SingleFileDDPStrategy()
    return {
        "strategy": strategy,
        "devices": local_world_size,
        "num_nodes": world_size // local_world_size,
        "precision": _PRECISION[precision],
        "plugins": [VerifiedCheckpointIO(), TorchElasticEnvironment()],
    }


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's checkpoint I/O through the checkpoint layer: atomic writes, checksums, ``weights_only``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one file; it appears under its name only when it is complete."""
        save_torch(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file. Raises `CheckpointError` if it is damaged or contains anything but data."""
        return upgrade_distill_checkpoint(load_torch(Path(path)))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file."""
        Path(path).unlink(missing_ok=True)


class SingleFileCheckpointMixin:
    """Rank 0 writes a checkpoint file, every rank reads it, and an error on one rank is raised on all ranks.

    If only one rank raised, the others would wait for it in a barrier.
    """

    broadcast: Callable[..., Any]
    checkpoint_io: Any
    is_global_zero: bool

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file on rank 0. Raises the same `CheckpointError` on every rank."""
        path = self.broadcast(filepath)
        run_on_all_ranks(
            lambda: self.checkpoint_io.save_checkpoint(checkpoint, path) if self.is_global_zero else None,
            error_class=CheckpointError,
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file on every rank. Raises the same `CheckpointError` on every rank."""
        content: dict[str, Any] = {}
        run_on_all_ranks(
            lambda: content.update(self.checkpoint_io.load_checkpoint(checkpoint_path)), error_class=CheckpointError
        )
        return content


class SingleFileDDPStrategy(SingleFileCheckpointMixin, DDPStrategy):
    """Lightning's DDP strategy; a failed save or load raises on all ranks."""


class SingleFileDeepSpeedStrategy(SingleFileCheckpointMixin, DeepSpeedStrategy):
    """DeepSpeed with ZeRO stage 0, 1 or 2 on GPUs and CPUs; its checkpoint is the same file as with other strategies.

    Args:
        stage: ZeRO stage.
        batch_size: clips per process and batch; DeepSpeed logs it.
        autocast: compute in bfloat16 where autocast does; weights, gradients and moments stay float32.
        offload: keep the optimizer state in host memory, at stage 1 or 2; torch.optim.AdamW steps there.

    Raises:
        ValueError: another stage, or `offload` at stage 0.
    """

    def __init__(self, stage: int, *, batch_size: int, autocast: bool = False, offload: bool = False) -> None:
        if stage not in (0, 1, 2):
            raise ValueError(
                f"ZeRO stage {stage}: no process has all weights, so the checkpoint cannot be a single file; "
                "use stage 0, 1 or 2"
            )
        if offload and not stage:
            raise ValueError("offload needs ZeRO stage 1 or 2")
        zero = {"stage": stage, "reduce_bucket_size": _BUCKET_SIZE, "allgather_bucket_size": _BUCKET_SIZE}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch_size,
            "zero_optimization": {**zero, **({"offload_optimizer": {"device": "cpu"}} if offload else {})},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if autocast:  # no modules are listed, so all gradients are reduced in float32
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        super().__init__(config=config)
        self.stage = stage
        self._param_groups: list[list[nn.Parameter]] = []
        self._resumed_from_directory = False

    def setup_environment(self) -> None:
        """Like Lightning's, but also on CPUs, for which DeepSpeed needs numbered devices."""
        disable_shm_op()
        if isinstance(self.accelerator, CPUAccelerator):
            self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices or ()))]
        DDPStrategy.setup_environment(self)

    def _init_optimizers(self) -> tuple[Any, Any]:
        """Keep the parameters of each group, because ZeRO replaces them by one flat tensor."""
        optimizer, scheduler = super()._init_optimizers()
        self._param_groups = [list(group["params"]) for group in optimizer.param_groups if group["params"]]
        return optimizer, scheduler

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        super()._initialize_deepspeed_train(model)
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)

    def teardown(self) -> None:
        """Release the engine's hooks and buffers: a sweep trains several times in one process."""
        engine: Any = self.model
        super().teardown()
        if hasattr(engine, "destroy"):
            engine.destroy()

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning decides when to step. DeepSpeed's own count would continue across the end of an epoch."""
        return False

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the number of batches per step already."""
        loss: Tensor = super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)
        return loss

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Do nothing: the engine already reduces only at the last batch, and stage 2 does not support this call."""
        yield

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step after the last batch of a step; its backward pass runs in the closure and ends the accumulation."""
        engine = self.deepspeed_engine
        engine.set_gradient_accumulation_boundary(True)
        try:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            engine.set_gradient_accumulation_boundary(False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights on rank 0, an empty dict on other ranks. Trained ones are copied out of ZeRO's flat tensors."""
        if not self.is_global_zero:
            return {}
        assert self.lightning_module is not None
        trainable = {name for name, p in self.lightning_module.named_parameters() if p.requires_grad}
        state = self.lightning_module.state_dict()
        return {name: value.detach().to("cpu", copy=name in trainable) for name, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """AdamW's state in torch's layout on rank 0; param groups without moments on other ranks. Collective."""
        wrapped = self.deepspeed_engine.optimizer
        if self.stage == 0:
            unsharded: dict[str, Any] = wrapped.state_dict()
            return unsharded
        from deepspeed.utils import safe_get_full_optimizer_state

        _link_moments(wrapped)
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        index = 0
        for parameters, flat, group in self._partitions():
            hyperparameters = {k: v for k, v in group.items() if k != "params"}
            groups.append({**hyperparameters, "params": list(range(index, index + len(parameters)))})
            flat_state = wrapped.optimizer.state.get(flat)  # None before the first step
            for parameter in parameters:
                if flat_state:
                    moments = {k: safe_get_full_optimizer_state(parameter, k) for k in flat_state if k != _STEP}
                    if self.is_global_zero:
                        state[index] = {_STEP: flat_state[_STEP].clone(), **{k: m.cpu() for k, m in moments.items()}}
                index += 1
        return {"state": state, "param_groups": groups}

    def _partitions(self) -> Iterator[tuple[list[nn.Parameter], Tensor, dict[str, Any]]]:
        """Parameters, this rank's flat tensor, and param group of each group of a ZeRO optimizer."""
        wrapped = self.deepspeed_engine.optimizer
        flat_tensors, groups = wrapped.single_partition_of_fp32_groups, wrapped.optimizer.param_groups
        return zip(self._param_groups, flat_tensors, groups, strict=True)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, or restore the engine from a directory that Lightning's own DeepSpeed strategy wrote."""
        self._resumed_from_directory = Path(checkpoint_path).is_dir()
        if self._resumed_from_directory:
            content = upgrade_distill_checkpoint(load_deepspeed(self.deepspeed_engine, checkpoint_path))
            assert self.lightning_module is not None
            return {**content, "state_dict": self.lightning_module.state_dict()}  # hooks expect this key
        return super().load_checkpoint(checkpoint_path, weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores the optimizer: from a file yes; from a directory DeepSpeed has restored it."""
        return not self._resumed_from_directory

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights into the module and into this rank's shard of ZeRO's copy, which the optimizer updates."""
        if self._resumed_from_directory:
            return
        Strategy.load_model_state_dict(self, checkpoint, strict=strict)
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter in (p for group in self._param_groups for p in group):
            safe_set_full_fp32_param(parameter, parameter.detach())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load AdamW's state in torch's layout into this rank's flat tensors.

        Raises:
            CheckpointError: the state belongs to other parameters, or ZeRO cannot represent it.
        """
        saved = checkpoint["optimizer_states"][0]
        self._check_optimizer_state(saved)
        if self.stage == 0:
            Strategy.load_optimizer_state_dict(self, checkpoint)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        wrapped, states = self.deepspeed_engine.optimizer, saved["state"]
        for (_, flat, group), stored in zip(self._partitions(), saved["param_groups"], strict=True):
            group.update({k: v for k, v in stored.items() if k != "params"})
            if entry := states.get(stored["params"][0]):
                moments = {k: torch.zeros_like(flat) for k in entry if k != _STEP}
                wrapped.optimizer.state[flat] = {_STEP: entry[_STEP].to(flat.device, copy=True), **moments}
        if states:
            _link_moments(wrapped)
        for (parameters, _, _), stored in zip(self._partitions(), saved["param_groups"], strict=True):
            for parameter, index in zip(parameters, stored["params"], strict=True):
                for key, value in states.get(index, {}).items():
                    if key != _STEP:
                        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _check_optimizer_state(self, saved: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless a stored state belongs to this optimizer's parameters."""
        stored = [group["params"] for group in saved["param_groups"]]
        if [len(g) for g in stored] != [len(g) for g in self._param_groups]:
            raise CheckpointError(
                f"the checkpoint's optimizer has groups of {', '.join(str(len(g)) for g in stored)} parameters, this "
                f"run's has {', '.join(str(len(g)) for g in self._param_groups)}; resume with the same model"
            )
        for parameters, indices in zip(self._param_groups, stored, strict=True):
            entries = [saved["state"].get(i) for i in indices]
            for parameter, entry in zip(parameters, entries, strict=True):
                shapes = {tuple(v.shape) for k, v in (entry or {}).items() if k != _STEP}
                if shapes - {tuple(parameter.shape)}:
                    raise CheckpointError(
                        f"the checkpoint's optimizer has a moment of shape {shapes}, "
                        f"not {tuple(parameter.shape)}; resume with the same model"
                    )
            if len({float(e[_STEP]) if e else None for e in entries}) > 1 and self.stage > 0:
                raise CheckpointError(
                    "the checkpoint's optimizer has parameters at different steps, which ZeRO does not support; "
                    "resume with strategy=auto, ddp or deepspeed_stage_0"
                )


def _link_moments(wrapped: Any) -> None:
    """Link parameters to their moments. DeepSpeed does this after its first step, and for the first group only."""
    wrapped._hp_optimizer_states_linked = False
    wrapped._lazy_init_hp_params_optimizer_state()
