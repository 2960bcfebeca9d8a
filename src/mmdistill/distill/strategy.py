"""Lightning's processes, and strategies under which a checkpoint is one ordinary file.

Stock Lightning writes a directory as soon as its strategy is DeepSpeed. Here all processes gather Adam's moments into
the layout of `torch.optim.AdamW`, and rank 0 writes the file that any other strategy would: it resumes under another
ZeRO stage, another number of processes, or in a Trainer without DeepSpeed, and the other way round.

Weights are float32 in every strategy; ``precision=bf16`` is autocast around the step, as in a plain Trainer. So there
is no second, rounded copy of the weights that could be saved by mistake.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from mmdistill.checkpoint import CheckpointError, load_deepspeed
from mmdistill.config import DEEPSPEED_STAGES, ConfigError, DistillConfig, has_offload
from mmdistill.distributed.collectives import run_on_all_ranks

_BUCKET = 50_000_000  # elements reduced at a time; the buffer of one bucket is allocated
_STEP = "step"  # the only entry of AdamW's state that is not a moment
_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def strategy_kwargs(config: DistillConfig, precision: str, plugins: list[Any]) -> dict[str, Any]:
    """The Trainer's arguments that say how it runs: strategy, devices, num_nodes, precision and plugins.

    The usual variables say who this process is, see `runtime.start_process`; they are read whichever launcher set
    them. Lightning starts no processes of its own, which would run the whole sweep of a multirun again in each.

    Args:
        precision: ``32``, ``bf16`` or ``16``.
        plugins: further ones.

    Raises:
        ConfigError: a precision that the strategy lacks.
    """
    world = int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    strategy: Strategy | str = "auto"
    if config.strategy in DEEPSPEED_STAGES:
        if precision == "16":
            raise ConfigError(f"precision=16 does not go with strategy={config.strategy}; use precision=bf16 or 32")
        stage = DEEPSPEED_STAGES[config.strategy]
        strategy = OneFileDeepSpeed(
            stage, batch_size=config.batch_size, autocast=precision == "bf16", offload=has_offload(config)
        )
        precision = "32"  # of the weights; the engine computes under autocast
    elif config.strategy == "ddp" or world > 1:
        strategy = OneFileDDP()
    return {
        "strategy": strategy,
        "devices": local,
        "num_nodes": world // local,
        "precision": _PRECISION[precision],
        "plugins": [*plugins, TorchElasticEnvironment()],
    }


class SingleFileCheckpointMixin:
    """Checkpoints of a strategy with several processes: rank 0 writes, each rank reads, all agree on errors.

    An error of one rank alone would leave the others waiting for it in a barrier.
    """

    broadcast: Callable[..., Any]
    checkpoint_io: Any
    is_global_zero: bool

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file on rank 0. Raises the same `CheckpointError` on every rank."""
        path = self.broadcast(filepath)

        def write() -> None:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

        run_on_all_ranks(
            write, error_class=CheckpointError, message=f"{path}: not saved, what stood there before is unchanged"
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file on every rank. Raises the same `CheckpointError` on every rank."""
        content: dict[str, Any] = {}

        def read() -> None:
            content.update(self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only))

        run_on_all_ranks(read, error_class=CheckpointError)
        return content


class OneFileDDP(SingleFileCheckpointMixin, DDPStrategy):
    """Lightning's DDP, whose ranks agree on a failed save or load."""


class OneFileDeepSpeed(SingleFileCheckpointMixin, DeepSpeedStrategy):
    """DeepSpeed at ZeRO stage 0, 1 or 2, on GPUs and CPUs, whose checkpoint is the file that other strategies write.

    Args:
        stage: of ZeRO.
        batch_size: clips per process and batch; DeepSpeed logs it.
        autocast: compute in bfloat16 where autocast allows; weights, gradients and moments stay float32.
        offload: keep the optimiser's state in host memory, stage 1 or 2; the same torch.optim.AdamW steps there.

    Raises:
        ValueError: another stage, or `offload` at stage 0.
    """

    def __init__(self, stage: int, *, batch_size: int, autocast: bool = False, offload: bool = False) -> None:
        if stage not in (0, 1, 2):
            raise ValueError(
                f"ZeRO stage {stage}: no process holds all the weights, so a checkpoint could not stay one file; "
                "use stage 0, 1 or 2"
            )
        if offload and not stage:
            raise ValueError("offload needs ZeRO stage 1 or 2: stage 0 shards nothing")
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch_size,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": _BUCKET,
                "allgather_bucket_size": _BUCKET,
            },
            "steps_per_print": 10**9,
        }
        if offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
        if autocast:  # no module is listed whose gradients would be reduced in bfloat16
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        super().__init__(config=config)
        self.stage = stage
        self._groups: list[list[nn.Parameter]] = []
        self._from_directory = False

    # setting up ---------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """As Lightning's, which refuses a CPU; DeepSpeed asks for numbered devices there too."""
        if isinstance(self.accelerator, CPUAccelerator):
            self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices or ()))]
        DDPStrategy.setup_environment(self)

    def _init_optimizers(self) -> tuple[Any, Any]:
        """Remember the parameters of each group: ZeRO puts one flat tensor in their place."""
        optimizer, scheduler = super()._init_optimizers()
        self._groups = [list(group["params"]) for group in optimizer.param_groups if group["params"]]
        return optimizer, scheduler

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        super()._initialize_deepspeed_train(model)
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)

    def teardown(self) -> None:
        """Let go of the engine's hooks and buffers: a sweep trains several times in one process."""
        engine = self.model
        super().teardown()
        if hasattr(engine, "destroy"):
            engine.destroy()

    # stepping -----------------------------------------------------------------------------------------------------

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning says when to step: DeepSpeed's own count would run on over the end of an epoch."""
        return False

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the number of batches per step already."""
        loss: Tensor = super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)
        return loss

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing: the engine waits for the last batch of a step by itself, and stage 2 cannot be told to."""
        yield

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The last batch of a step: its backward pass, which the closure runs, ends the accumulation."""
        engine = self.deepspeed_engine
        engine.set_gradient_accumulation_boundary(True)
        try:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            engine.set_gradient_accumulation_boundary(False)

    # saving -------------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights, on rank 0; nothing on the others. ZeRO keeps them in one tensor per group: they are copied."""
        if not self.is_global_zero:
            return {}
        assert self.lightning_module is not None
        trained = {name for name, p in self.lightning_module.named_parameters() if p.requires_grad}
        state = self.lightning_module.state_dict()
        return {name: value.detach().to("cpu", copy=name in trained) for name, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """AdamW's state in torch's layout, on rank 0; groups without moments on the others. Collective."""
        wrapped = self.deepspeed_engine.optimizer
        if self.stage == 0:
            plain: dict[str, Any] = wrapped.state_dict()
            return plain
        inner = wrapped.optimizer
        _link_moments(wrapped)
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for parameters, flat, group in zip(
            self._groups, wrapped.single_partition_of_fp32_groups, inner.param_groups, strict=True
        ):
            numbers = list(range(first, first + len(parameters)))
            first += len(parameters)
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": numbers})
            held = inner.state.get(flat, {})  # empty before the first step
            for number, parameter in zip(numbers, parameters, strict=True) if held else ():
                moments = {k: self._gathered(parameter, k) for k in held if k != _STEP}
                if self.is_global_zero:
                    state[number] = {_STEP: held[_STEP].clone(), **moments}
        return {"state": state, "param_groups": groups}

    def _gathered(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        """One moment, whole, on rank 0. All ranks take part."""
        from deepspeed.utils import safe_get_full_optimizer_state

        whole: Tensor = safe_get_full_optimizer_state(parameter, key)
        return whole.cpu() if self.is_global_zero else None

    # loading ------------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file; or restore the engine from a directory that Lightning's own DeepSpeed strategy wrote."""
        self._from_directory = Path(checkpoint_path).is_dir()
        if self._from_directory:
            content = load_deepspeed(self.deepspeed_engine, checkpoint_path)
            assert self.lightning_module is not None
            return {**content, "state_dict": self.lightning_module.state_dict()}  # as hooks expect it
        return super().load_checkpoint(checkpoint_path, weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """A file's optimizer is restored by us; that of a directory already is."""
        return not self._from_directory

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Weights into the module, and into this rank's part of ZeRO's copy, which the optimizer changes."""
        if self._from_directory:
            return
        Strategy.load_model_state_dict(self, checkpoint, strict=strict)
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter in (p for group in self._groups for p in group):
            safe_set_full_fp32_param(parameter, parameter.detach())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """AdamW's state from torch's layout into this rank's flat tensors.

        Raises:
            CheckpointError: it is of other parameters, or ZeRO cannot hold it.
        """
        saved = checkpoint["optimizer_states"][0]
        self._check(saved)
        if self.stage == 0:
            Strategy.load_optimizer_state_dict(self, checkpoint)
            return
        wrapped = self.deepspeed_engine.optimizer
        for flat, group, stored in zip(
            wrapped.single_partition_of_fp32_groups, wrapped.optimizer.param_groups, saved["param_groups"], strict=True
        ):
            group.update({k: v for k, v in stored.items() if k != "params"})
            entries = [saved["state"][n] for n in stored["params"] if n in saved["state"]]
            if entries:
                moments = {k: torch.zeros_like(flat) for k in entries[0] if k != _STEP}
                wrapped.optimizer.state[flat] = {_STEP: entries[0][_STEP].to(flat.device, copy=True), **moments}
        if saved["state"]:
            self._fill_moments(wrapped, saved)

    def _fill_moments(self, wrapped: Any, saved: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        _link_moments(wrapped)
        for parameters, stored in zip(self._groups, saved["param_groups"], strict=True):
            for parameter, number in zip(parameters, stored["params"], strict=True):
                for key, value in saved["state"][number].items():
                    if key != _STEP:
                        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _check(self, saved: Mapping[str, Any]) -> None:
        """Whether a stored state is one of this optimizer's parameters."""
        stored = [group["params"] for group in saved["param_groups"]]
        if [len(g) for g in stored] != [len(g) for g in self._groups]:
            raise CheckpointError(
                f"its optimizer has groups of {', '.join(str(len(g)) for g in stored)} parameters, this run of "
                f"{', '.join(str(len(g)) for g in self._groups)}; resume with the model it was trained with"
            )
        for parameters, numbers in zip(self._groups, stored, strict=True):
            entries = [saved["state"].get(n) for n in numbers]
            for parameter, entry in zip(parameters, entries, strict=True):
                shapes = {tuple(v.shape) for k, v in (entry or {}).items() if k != _STEP}
                if shapes - {tuple(parameter.shape)}:
                    raise CheckpointError(f"its optimizer has a moment of shape {shapes}, not {tuple(parameter.shape)}")
            if len({float(e[_STEP]) if e else None for e in entries}) > 1 and self.stage > 0:
                raise CheckpointError(
                    "its optimizer's parameters are at different steps, which ZeRO cannot hold; "
                    "resume with strategy=auto, ddp or deepspeed_stage_0"
                )


def _link_moments(wrapped: Any) -> None:
    """Tell each parameter where its moments lie. DeepSpeed does so after its first step, for the first group only."""
    wrapped._hp_optimizer_states_linked = False
    wrapped._lazy_init_hp_params_optimizer_state()
