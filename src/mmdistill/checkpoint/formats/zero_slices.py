"""The training state of a DeepSpeed directory, in the slices of another ZeRO stage or number of ranks.

The state is weights, fp32 masters, Adam's moments and step, and the loss scale. The layouts are described in
`mmdistill.checkpoint.formats.deepspeed_zero`. DeepSpeed is not imported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.deepspeed_zero import (
    GROUP_NAMES,
    LOW_PRECISION,
    check_shards,
    layout_errors,
    merge_flat,
    merge_frozen,
    merge_sliced,
    read_shard,
    read_sliced_models,
    stage_in_config,
)
from mmdistill.checkpoint.formats.names import OPTIM_STATES, rank_files

MASTERS = "masters"  # name of the fp32 weights; the moments have torch's names, such as ``exp_avg``
_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ZeroLayout:
    """ZeRO stage and number of ranks, which decide how a training state is sliced."""

    stage: int
    world_size: int

    def __str__(self) -> str:
        """Return the layout as in messages."""
        return f"ZeRO stage {self.stage}, {self.world_size} process{'es' if self.world_size > 1 else ''}"


@dataclass(frozen=True)
class ZeroState:
    """The files of a directory, all of one step. `merge` checks the name and shape of each value.

    Attributes:
        tag: the directory of the files.
        layout: how the files are sliced.
        models: contents of the model files; one per rank at stage 3, otherwise one.
        optimizers: state of DeepSpeed's optimizer, per rank; at stage 0 one.
        groups: shape of each trained parameter by name, per parameter group.
        moments: names of Adam's moments; empty if the optimizer has not stepped.
        step: Adam's step; None if the optimizer has not stepped.
    """

    tag: Path
    layout: ZeroLayout
    models: Sequence[Mapping[str, Any]]
    optimizers: Sequence[Mapping[str, Any]]
    groups: Sequence[Shapes]
    moments: tuple[str, ...]
    step: Tensor | None

    @property
    def names(self) -> list[str]:
        """Names of all trained parameters."""
        return [name for group in self.groups for name in group]

    @property
    def has_masters(self) -> bool:
        """Whether the weights are copies in bf16 or fp16."""
        return any(self.models[0]["module"][name].dtype in LOW_PRECISION for name in self.names)

    @property
    def loss_scale(self) -> dict[str, Any]:
        """Attributes of DeepSpeed's loss scaler; ``dynamic`` is true with fp16."""
        optimizer, fp16 = self.optimizers[0], (self.models[0].get("ds_config") or {}).get("fp16") or {}
        scaler = optimizer.get("loss_scaler")
        stored = vars(scaler) if scaler is not None else {k: optimizer[k] for k in _SCALE_KEYS if k in optimizer}
        defaults = {"cur_scale": 1.0, "dynamic": bool(optimizer.get("dynamic_loss_scale"))}
        limits = {"min_scale": fp16.get("min_loss_scale", 1), "delayed_shift": fp16.get("hysteresis", 2)}
        return {**defaults, **limits, **stored}

    def merge(self, kind: str) -> dict[str, Tensor]:
        """All values of `MASTERS` or of one of `moments` by parameter, float32, possibly memory-mapped.

        Raises:
            CorruptCheckpointError: values of a parameter are missing or have another shape.
        """
        with layout_errors(self.tag):
            merged = self._merge(kind)
        for name, shape in ((name, shape) for group in self.groups for name, shape in group.items()):
            if name not in merged or tuple(merged[name].shape) != shape:
                found = f"have the shape {tuple(merged[name].shape)}" if name in merged else "are missing"
                raise CorruptCheckpointError(
                    f"{self.tag}: the {kind} of '{name}' {found}, expected {shape}; use another checkpoint"
                )
        return merged

    def _merge(self, kind: str) -> dict[str, Tensor]:
        if self.layout.stage == 0:
            values = self._unsharded_values(kind)
            if len(values) > len(self.names):
                raise LookupError(f"{kind} of {len(values)} parameters, but {len(self.names)} names")
            return dict(zip(self.names, values, strict=False))  # `merge` reports names without a value
        key = "fp32_flat_groups" if self.layout.stage == 3 else "single_partition_of_fp32_groups"
        slices = [o[key] if kind == MASTERS else _moment_values(_adam_state(o), kind) for o in self.optimizers]
        shapes = self.models[0]["param_shapes"]
        if self.layout.stage == 3:
            return merge_sliced(self.tag, shapes, slices)
        return merge_flat(self.tag, shapes, slices, self.optimizers[0].get("param_alignment_paddings"))

    def _unsharded_values(self, kind: str) -> list[Tensor]:
        if kind != MASTERS:
            return _moment_values(_adam_state(self.optimizers[0]), kind)
        if self.has_masters:
            return [master for group in self.optimizers[0]["fp32_groups"] for master in group]
        return [self.models[0]["module"][name] for name in self.names]

    def module(self, merge: "Merge") -> dict[str, Tensor]:
        """All weights and buffers as in the model file of stages 0 to 2. `merge`: see `slice_state`."""
        stored: Mapping[str, Tensor] = self.models[0]["module"]
        if self.layout.stage < 3:
            return dict(stored)
        weights, aliases = {**merge(MASTERS), **merge_frozen(self.models)}, self.models[0].get("shared_params") or {}
        buffers = set(self.models[0]["buffer_names"])
        return {k: v if k in buffers else weights[aliases.get(k, k)].to(v.dtype) for k, v in stored.items()}


def _adam_state(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the state of torch's optimizer in that of DeepSpeed's."""
    state: Mapping[str, Any] = optimizer.get("base_optimizer_state") or optimizer.get("optimizer_state_dict", optimizer)
    return state


def _moment_values(adam: Mapping[str, Any], kind: str) -> list[Tensor]:
    return [adam["state"][index][kind] for group in adam["param_groups"] for index in group["params"]]


def read_zero_state(tag: Path, model: Mapping[str, Any], *, verify: bool = True) -> ZeroState:
    """Read the training state of a directory of any ZeRO stage and number of ranks, memory-mapped.

    Args:
        tag: the directory of the ``*_states.pt`` files.
        model: result of `read_model_states`.
        verify: compare the CRCs of the other files.

    Raises:
        CheckpointError: the directory has no optimizer state, or stage 0 without the names of its parameters.
        CorruptCheckpointError: a shard is missing or of another step, or values are missing.
    """
    with layout_errors(tag):
        stage = stage_in_config(model.get("ds_config"))
        files = rank_files(tag, OPTIM_STATES)
        if stage == 0:
            layout = ZeroLayout(0, int(model.get("dp_world_size") or 1))
            shapes = _unsharded_shapes(tag, model)
            models, optimizers = [model], [model["optimizer"]]
        elif not files:
            raise CorruptCheckpointError(f"{tag}: has no *{OPTIM_STATES}; copy the checkpoint again")
        else:
            shards = [read_shard(file, verify=verify) for file in files]
            layout = ZeroLayout(stage, check_shards(tag, shards, files))
            models = read_sliced_models(tag, model, len(shards), verify) if stage == 3 else [model]
            optimizers = [shard["optimizer_state_dict"] for shard in shards]
            shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
        adams = [_adam_state(optimizer) for optimizer in optimizers]
        states = [state for adam in adams for state in adam["state"].values()]
        steps = {float(state["step"]) for state in states}
        if len(steps) > 1:
            raise CheckpointError(
                f"{tag}: its parameters are at Adam's steps {', '.join(f'{s:g}' for s in sorted(steps))}, which ZeRO "
                "does not support; resume with the ZeRO stage of the checkpoint"
            )
        kinds = tuple(k for k, v in states[0].items() if isinstance(v, Tensor) and v.dim()) if states else ()
        if missing := [kind for kind in _ADAM_MOMENTS if states and kind not in kinds]:
            raise CorruptCheckpointError(f"{tag}: its optimizer state has no {missing[0]}; use another checkpoint")
        groups = shapes if stage == 0 else _join_subgroups(shapes, adams[0]["param_groups"])
        step = torch.as_tensor(states[0]["step"], dtype=torch.float32) if states else None
        return ZeroState(tag, layout, models, optimizers, groups, kinds, step)


def _unsharded_shapes(tag: Path, model: Mapping[str, Any]) -> list[Shapes]:
    """Shapes of stage 0 by parameter group, whose parameters only `save_deepspeed` names."""
    if not isinstance(model.get("optimizer"), Mapping):
        raise CheckpointError(f"{tag}: has no optimizer state; use its weights with init_from=")
    if GROUP_NAMES not in model:
        raise CheckpointError(
            f"{tag}: its optimizer state has no parameter names, so that ZeRO cannot slice it; resume with stage 0"
        )
    return [{name: tuple(model["module"][name].shape) for name in group} for group in model[GROUP_NAMES]]


def _join_subgroups(shapes: Sequence[Shapes], param_groups: Sequence[Mapping[str, Any]]) -> list[Shapes]:
    """Join the subgroups into which stage 3 divides large parameter groups; other groups are unchanged."""
    remaining = iter(shapes)
    return [{k: v for _ in group["params"] for k, v in next(remaining).items()} for group in param_groups]


def slice_tensors(tensors: Sequence[Tensor], layout: ZeroLayout, rank: int) -> tuple[Tensor, int]:
    """This rank's slice of a parameter group at stages 1 to 3, and the number of zeros at its end.

    Stages 1 and 2 slice the joined vector, whose length is padded to a multiple of twice the number of ranks; stage 3
    slices each tensor, whose length is padded to a multiple of the number of ranks.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    parts: list[Tensor] = []
    padding = 0
    for vector in flat if layout.stage == 3 else [torch.cat(flat)]:
        length = _slice_length(vector.numel(), layout)
        part = vector[rank * length : (rank + 1) * length]
        padding = length - part.numel()
        parts += [part, part.new_zeros(padding)]
    return torch.cat(parts), padding


def _slice_length(count: int, layout: ZeroLayout) -> int:
    unit = 1 if layout.stage == 3 else 2
    return -(-count // (unit * layout.world_size)) * unit


def slice_sizes(groups: Sequence[Shapes], layout: ZeroLayout) -> list[int]:
    """Number of values, padding included, that each rank has of each parameter group at stages 1 to 3."""
    counts = [[math.prod(shape) for shape in group.values()] for group in groups]
    vectors = counts if layout.stage == 3 else [[sum(group)] for group in counts]
    return [sum(_slice_length(count, layout) for count in group) for group in vectors]


Merge = Callable[[str], Mapping[str, Tensor]]


def slice_state(
    state: ZeroState, layout: ZeroLayout, rank: int, *, merge: Merge, loss_scaler: Any
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Contents of the model file and, from stage 1 on, of the optimizer shard that a rank has in another layout.

    Args:
        state: the state in its own layout.
        layout: the other layout.
        rank: below ``layout.world_size``.
        merge: `ZeroState.merge`, or a function that caches its results.
        loss_scaler: DeepSpeed's object with ``state.loss_scale``, for stages 1 to 3.
    """
    with layout_errors(state.tag):
        config = dict(state.models[0].get("ds_config") or {})
        config["zero_optimization"] = {**(config.get("zero_optimization") or {}), "stage": layout.stage}
        model = {key: value for key, value in state.models[0].items() if key != GROUP_NAMES}
        model |= {"ds_config": config, "dp_world_size": layout.world_size, "module": state.module(merge)}
        model |= {"frozen_param_shapes": None, "frozen_param_fragments": None}
        if layout.stage == 0:
            optimizer = _unsharded_optimizer(state, merge)
            names = [list(group) for group in state.groups]
            return {
                **model,
                "optimizer": optimizer,
                "param_shapes": None,
                "shared_params": None,
                GROUP_NAMES: names,
            }, None
        shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in state.groups]
        model |= {"optimizer": None, "param_shapes": shapes, "shared_params": model.get("shared_params") or {}}
        if layout.stage == 3:
            model |= _sliced_module(state, model["module"], layout, rank)
        optimizer = _sharded_optimizer(state, layout, rank, merge)
        optimizer |= {"loss_scaler": loss_scaler, "dynamic_loss_scale": state.loss_scale["dynamic"], "overflow": False}
        optimizer["zero_stage"] = layout.stage
        if layout.stage < 3:
            optimizer["ds_version"] = model["ds_version"]
        return model, {"optimizer_state_dict": optimizer, "ds_config": config, "ds_version": model["ds_version"]}


def _param_groups(state: ZeroState, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Hyperparameters of torch's parameter groups, whose `sizes` parameters are numbered in order."""
    out: list[dict[str, Any]] = []
    for group, size in zip(_adam_state(state.optimizers[0])["param_groups"], sizes, strict=True):
        first = sum(len(earlier["params"]) for earlier in out)
        out.append({**group, "params": list(range(first, first + size))})
    return out


def _unsharded_optimizer(state: ZeroState, merge: Merge) -> dict[str, Any]:
    adam: dict[str, Any] = {"param_groups": _param_groups(state, [len(group) for group in state.groups])}
    adam["state"] = {}
    if state.step is not None:
        merged = {kind: merge(kind) for kind in state.moments}
        for index, name in enumerate(state.names):
            adam["state"][index] = {"step": state.step.clone(), **{kind: merged[kind][name].clone() for kind in merged}}
    if not state.has_masters:
        return adam
    masters, scale = merge(MASTERS), state.loss_scale
    groups = [[masters[name] for name in group] for group in state.groups]
    scale_state = {"dynamic_loss_scale": scale["dynamic"], **{key: scale.get(key) for key in _SCALE_KEYS}}
    return {**scale_state, "optimizer_state_dict": adam, "fp32_groups": groups}


def _sharded_optimizer(state: ZeroState, layout: ZeroLayout, rank: int, merge: Merge) -> dict[str, Any]:
    slices: dict[str, list[Tensor]] = {}
    paddings = [0] * len(state.groups)
    for kind in (MASTERS, *state.moments):
        merged = merge(kind)
        sliced = [slice_tensors([merged[name] for name in group], layout, rank) for group in state.groups]
        slices[kind], paddings = [part for part, _ in sliced], [padding for _, padding in sliced]
    adam: dict[str, Any] = {"param_groups": _param_groups(state, [1] * len(state.groups)), "state": {}}
    if state.step is not None:
        for index in range(len(state.groups)):
            moments = {kind: slices[kind][index] for kind in state.moments}
            adam["state"][index] = {"step": state.step.clone(), **moments}
    if layout.stage == 3:
        out = {"optimizer_state_dict": adam, "fp32_flat_groups": slices[MASTERS]}
        return {**out, "partition_count": layout.world_size}
    masters = [part[: part.numel() - padding] for part, padding in zip(slices[MASTERS], paddings, strict=True)]
    counts = {"group_paddings": paddings, "partition_count": [layout.world_size] * len(paddings)}
    return {"base_optimizer_state": adam, "single_partition_of_fp32_groups": masters, **counts}


def _sliced_module(state: ZeroState, module: Mapping[str, Tensor], layout: ZeroLayout, rank: int) -> dict[str, Any]:
    """Entries of a model file of stage 3: placeholders of the weights, and slices of frozen ones."""
    buffers = set(state.models[0]["buffer_names"])
    trained = {*state.names, *(state.models[0].get("shared_params") or {})}
    frozen = [name for name in module if name not in buffers and name not in trained]
    return {
        "module": {name: value if name in buffers else value.new_empty(0) for name, value in module.items()},
        "frozen_param_shapes": {name: module[name].shape for name in frozen},
        "frozen_param_fragments": {name: slice_tensors([module[name]], layout, rank)[0] for name in frozen},
    }
