"""Read the weights of a DeepSpeed directory of any ZeRO stage and world size, without DeepSpeed.

If the training kept fp32 master weights, these are read: bf16 copies differ from them by up to 5e-4. The layouts are
those of directories that DeepSpeed 0.19 wrote. Per stage:

* 0: everything is in ``mp_rank_00_model_states.pt``; with bf16 the masters are in its ``optimizer`` entry, unnamed.
* 1, 2: weights (bf16 or fp32) are in the model file; the optimizer shard of each rank holds an equal slice of one flat
  vector per parameter group, padded at the end.
* 3: the model files hold only placeholders; each rank holds 1/world of every parameter, in order, padded to a multiple
  of the world size. Frozen parameters are sliced in the same way, in the model files.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.names import MODEL_STATES, OPTIM_STATES, rank_files
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.errors import format_count

GROUP_NAMES = "mmdistill_master_names"  # names of stage-0 masters, which `save_deepspeed` adds

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RawTensors:
    """Tensors of a checkpoint.

    Attributes:
        weights: every parameter and persistent buffer, under the names in the file.
        stage, world_size: ZeRO stage and number of data-parallel ranks of a DeepSpeed directory, else None.
        notes: remarks about the weights, one sentence each.
    """

    weights: dict[str, Tensor]
    stage: int | None = None
    world_size: int | None = None
    notes: tuple[str, ...] = ()


def stage_in_config(config: Any) -> int:
    """ZeRO stage in the ``ds_config`` of a model file; 0 if it has none."""
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    return int(zero.get("stage", 0)) if isinstance(zero, Mapping) else 0


def read_shard(path: Path, *, verify: bool = True) -> Mapping[str, Any]:
    """Read an ``*_optim_states.pt``. Raises `CorruptCheckpointError` if it has no ``optimizer_state_dict``."""
    content = read_torch_file(path, verify=verify)
    if not isinstance(content, Mapping) or not isinstance(content.get("optimizer_state_dict"), Mapping):
        raise CorruptCheckpointError(
            f"{path}: contains no 'optimizer_state_dict'; it is not a DeepSpeed optimizer shard"
        )
    return content


def _read_model_file(path: Path, verify: bool) -> Mapping[str, Any]:
    content = read_torch_file(path, verify=verify)
    if not isinstance(content, Mapping) or not isinstance(content.get("module"), Mapping):
        raise CheckpointError(f"{path}: contains no 'module' dictionary; it is not a DeepSpeed model file")
    return content


def read_model_states(tag: Path, *, verify: bool = True) -> Mapping[str, Any]:
    """Read the first ``*_model_states.pt`` of a tag directory, memory-mapped; `verify`: compare its CRCs.

    Raises:
        CheckpointError: there is none, it has no ``module`` entry, or it is one of several model-parallel files.
    """
    files = rank_files(tag, MODEL_STATES)
    if not files:
        raise CorruptCheckpointError(f"{tag}: has no *{MODEL_STATES}; copy the checkpoint again")
    model_parallel = [f.name for f in files if "mp_rank_00" not in f.name]
    if model_parallel:
        raise CheckpointError(
            f"{tag}: written with model parallelism ({model_parallel[0]}); merge it with DeepSpeed's tools first"
        )
    return _read_model_file(files[0], verify)


def adam_step(optim: Mapping[str, Any]) -> int | None:
    """Step count in the Adam state of a shard; None if the optimizer does not count steps."""
    state = optim["optimizer_state_dict"]
    inner = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    if not isinstance(inner, Mapping):
        return None
    states = inner.get("state", {})
    entries = [*(states.values() if isinstance(states, Mapping) else ()), *inner.get("param_groups", ())]
    return next((int(entry["step"]) for entry in entries if isinstance(entry, Mapping) and "step" in entry), None)


def _rank_of(file: Path) -> int:
    """Rank in the name of an optimizer shard; -1 if it has none."""
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else -1


def check_shards(tag: Path, shards: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> int:
    """Check that all shards exist and are of the same step, and return the world size."""
    count = shards[0]["optimizer_state_dict"].get("partition_count", len(shards))
    world_size = max(count) if isinstance(count, (list, tuple)) else int(count)
    if world_size != len(shards):
        names = ", ".join(f.name for f in files)
        missing = sorted(set(range(world_size)) - {_rank_of(f) for f in files})
        raise CorruptCheckpointError(
            f"{tag}: written by {format_count(world_size, 'rank')} but "
            f"{format_count(len(shards), 'optimizer shard')} found ({names}); copy the missing ones, of "
            f"rank {', '.join(map(str, missing))}"
        )
    steps = [adam_step(shard) for shard in shards]
    if len(set(steps)) > 1:
        raise CorruptCheckpointError(
            f"{tag}: a mix of two saves: the optimizer shards are at steps {', '.join(map(str, steps))} "
            f"({', '.join(f.name for f in files)}); use another checkpoint"
        )
    return world_size


def _numel(shape: Sequence[int]) -> int:
    return math.prod(int(n) for n in shape)


def merge_flat(
    tag: Path,
    shapes: Sequence[Mapping[str, Any]],
    slices: Sequence[Sequence[Tensor]],
    paddings: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Merge stages 1 and 2: slices of one vector per parameter group. Returns views of the joined vectors.

    Args:
        tag: for messages.
        shapes: shape of each parameter by name, per group.
        slices: per rank, the slice of each group.
        paddings: per group, the number of values after each parameter that are no parameter.
    """
    world_size = len(slices)
    merged: dict[str, Tensor] = {}
    for group, names in enumerate(shapes):
        group_slices = [rank[group] for rank in slices]
        flat = torch.cat(group_slices) if len(group_slices) > 1 else group_slices[0]
        offset = 0
        for index, (name, shape) in enumerate(names.items()):
            count = _numel(shape)
            if offset + count > flat.numel():
                raise CorruptCheckpointError(
                    f"{tag}: the shards contain {format_count(flat.numel(), 'value')} of parameter group {group}, "
                    f"too few for '{name}'; copy the checkpoint again"
                )
            merged[name] = flat.narrow(0, offset, count).view(tuple(shape))
            offset += count + (int(paddings[group][index]) if paddings else 0)
        # the end is padded to a multiple of 2 * world size, and further if gradients are aligned for NCCL
        if flat.numel() - offset >= max(2 * world_size, 1) + len(names) * 2 * world_size:
            raise CorruptCheckpointError(
                f"{tag}: the shards contain {format_count(flat.numel(), 'value')} of parameter group {group}, "
                f"expected {offset}; use another checkpoint"
            )
    return merged


def _join_slices(slices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    flat = torch.cat([part.reshape(-1) for part in slices]) if len(slices) > 1 else slices[0].reshape(-1)
    return flat[: _numel(shape)].view(tuple(shape))


def merge_sliced(
    tag: Path, shapes: Sequence[Mapping[str, Any]], slices: Sequence[Sequence[Tensor]]
) -> dict[str, Tensor]:
    """Merge stage 3: each rank has 1/world of each parameter; its flat groups are contiguous. Arguments as above."""
    flat = [torch.cat(list(rank)) if len(rank) > 1 else rank[0] for rank in slices]
    merged: dict[str, Tensor] = {}
    offset = 0
    for names in shapes:
        for name, shape in names.items():
            length = -(-_numel(shape) // len(slices))
            if offset + length > flat[0].numel():
                raise CorruptCheckpointError(f"{tag}: the shards end before '{name}'; copy the checkpoint again")
            merged[name] = _join_slices([rank.narrow(0, offset, length) for rank in flat], shape)
            offset += length
    return merged


def merge_frozen(models: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Merge the frozen parameters of stage 3, of which each model file has a slice."""
    return {
        name: _join_slices([model["frozen_param_fragments"][name] for model in models], shape)
        for name, shape in (models[0].get("frozen_param_shapes") or {}).items()
    }


def read_sliced_models(tag: Path, first: Mapping[str, Any], world_size: int, verify: bool) -> list[Mapping[str, Any]]:
    """Read the model files of all ranks of stage 3; `first` is that of rank 0."""
    files = rank_files(tag, MODEL_STATES)
    if len(files) != world_size:
        raise CorruptCheckpointError(
            f"{tag}: {format_count(world_size, 'optimizer shard')} but {format_count(len(files), 'model file')}; copy "
            "the missing ones"
        )
    return [first, *(_read_model_file(file, verify) for file in files[1:])]


def _match_by_value(names: Sequence[str], module: Mapping[str, Tensor], masters: Sequence[Tensor]) -> list[str] | None:
    """Find the names of unnamed masters, which follow the module's order; None unless the match is unique."""

    def is_copy(name: str, master: Tensor) -> bool:
        copy = module[name]
        return copy.shape == master.shape and torch.equal(master.to(copy.dtype), copy)

    def match_greedily(order: Iterable[str], tensors: Iterable[Tensor]) -> list[str | None]:
        remaining = iter(order)
        return [next((name for name in remaining if is_copy(name, master)), None) for master in tensors]

    first = match_greedily(names, masters)
    last = match_greedily(reversed(names), reversed(masters))[::-1]  # another result if there are several
    found = [name for name in first if name is not None]
    return found if len(found) == len(masters) and first == last else None


def _unsharded_masters(model: Mapping[str, Any], notes: list[str]) -> dict[str, Tensor]:
    """Read the masters of stage 0 with bf16 or fp16 from the optimizer entry, in the order of its parameter groups."""
    optimizer = model.get("optimizer")
    groups = optimizer.get("fp32_groups") if isinstance(optimizer, Mapping) else None
    module: Mapping[str, Tensor] = model["module"]
    low_precision = [k for k, v in module.items() if isinstance(v, Tensor) and v.dtype in LOW_PRECISION]
    if not groups or not low_precision:
        if low_precision:
            dtype = str(module[low_precision[0]].dtype).removeprefix("torch.")
            notes.append(f"no fp32 master weights were found; the weights were saved in {dtype}")
        return {}
    group_names = model.get(GROUP_NAMES)
    out: dict[str, Tensor] = {}
    for index, masters in enumerate(groups):
        names = list(group_names[index]) if group_names else _match_by_value(low_precision, module, masters)
        if names is None or len(names) != len(masters):
            notes.append(
                "the fp32 master weights of stage 0 have no names and do not match the model; "
                "the low-precision weights are read"
            )
            return {}
        out.update(zip(names, masters, strict=True))
    return out


def _check_copies(tag: Path, masters: Mapping[str, Tensor], module: Mapping[str, Any]) -> None:
    """Compare low-precision copies with the rounded masters: if they differ, the files are from two saves."""
    for name, master in masters.items():
        copy = module.get(name)
        if isinstance(copy, Tensor) and copy.numel() and not torch.equal(master.to(copy.dtype), copy):
            raise CorruptCheckpointError(
                f"{tag}: a mix of two saves: '{name}' in the optimizer shards differs from the model file; "
                "use another checkpoint"
            )


def read_zero_checkpoint(tag: Path, model: Mapping[str, Any], *, verify: bool = True) -> RawTensors:
    """Read all weights of a DeepSpeed directory, fp32 if fp32 masters exist, frozen parameters included.

    Args:
        tag: the directory of the ``*_states.pt`` files.
        model: result of `read_model_states`.
        verify: compare the CRCs of the other files that are read.

    Raises:
        CheckpointError: a stage-3 file without its shards.
        CorruptCheckpointError: shards missing, of different steps, or damaged.
    """
    with layout_errors(tag):
        return _read_weights(tag, model, verify)


@contextlib.contextmanager
def layout_errors(tag: Path) -> Iterator[None]:
    """Report entries that the files of a tag directory lack as a `CorruptCheckpointError`."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise CorruptCheckpointError(
            f"{tag}: its files do not have the layout of DeepSpeed ({reason}); use another checkpoint"
        ) from error


def _read_weights(tag: Path, model: Mapping[str, Any], verify: bool) -> RawTensors:
    model_files, optim_files = rank_files(tag, MODEL_STATES), rank_files(tag, OPTIM_STATES)
    module = {k: v for k, v in model["module"].items() if isinstance(v, Tensor)}
    sharded_weights = model_files[0].name.startswith(("zero_pp_rank_", "bf16_zero_pp_rank_"))
    has_low_precision = any(v.dtype in LOW_PRECISION for v in module.values())
    notes: list[str] = []
    shards: list[Mapping[str, Any]] = []
    if optim_files and (has_low_precision or sharded_weights):  # at stages 0-2 in fp32 the model file has the weights
        shards = [read_shard(f, verify=verify) for f in optim_files]
        stage = int(shards[0]["optimizer_state_dict"].get("zero_stage", 0))
        world_size = check_shards(tag, shards, optim_files)
    else:
        stage, world_size = stage_in_config(model.get("ds_config")), int(model.get("dp_world_size") or 1)
    masters: dict[str, Tensor] = {}
    if sharded_weights:
        if not shards:
            raise CheckpointError(
                f"{model_files[0]}: ZeRO stage 3 stores the weights in *{OPTIM_STATES}, and {tag} has none; "
                "copy these files"
            )
        models = read_sliced_models(tag, model, world_size, verify)
        groups = [shard["optimizer_state_dict"]["fp32_flat_groups"] for shard in shards]
        masters = merge_sliced(tag, model["param_shapes"], groups) | merge_frozen(models)
        module = {k: v for k, v in module.items() if k in set(model.get("buffer_names") or ())}
    elif shards:
        states = [shard["optimizer_state_dict"] for shard in shards]
        slices = [state["single_partition_of_fp32_groups"] for state in states]
        masters = merge_flat(tag, model["param_shapes"], slices, states[0].get("param_alignment_paddings"))
        _check_copies(tag, masters, module)
    elif stage in (1, 2) and has_low_precision:
        notes.append(
            "the optimizer shards are missing, so the low-precision weights are read, not the fp32 master weights"
        )
    else:
        masters = _unsharded_masters(model, notes)
    weights = {**module, **masters}
    for alias, name in (model.get("shared_params") or {}).items():
        if name in weights:
            weights[alias] = weights[name]
    if masters and not sharded_weights:
        num_frozen = sum(1 for k in module if k not in masters and module[k].dtype in LOW_PRECISION)
        frozen = f"; {format_count(num_frozen, 'frozen tensor')} without fp32 master weights" if num_frozen else ""
        notes.append(f"{len(masters)} fp32 master weights read{frozen}")
    return RawTensors(weights, stage, world_size, tuple(notes))
