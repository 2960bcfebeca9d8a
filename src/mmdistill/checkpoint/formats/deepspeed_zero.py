"""Weights of a DeepSpeed directory of any ZeRO stage and world size, without DeepSpeed.

Where training kept fp32 masters, those are the weights: bf16 copies differ from them by up to 5e-4. The layouts were
read from directories that DeepSpeed 0.19 wrote. Per stage:

* 0: everything in ``mp_rank_00_model_states.pt``; under bf16 the masters are in its ``optimizer`` entry, without names.
* 1, 2: weights (bf16 or fp32) in the model file; each rank's optimizer shard holds an equal slice of one flat vector
  per parameter group, padded at its end.
* 3: only placeholders in the model files; each rank holds 1/world of every parameter, in order, each padded to a
  multiple of the world size. Frozen parameters are sliced the same way, in the model files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.torch_zip import load_pickle
from mmdistill.checkpoint.locate import Location

GROUP_NAMES = "mmdistill_master_names"  # written by our saver: names of stage-0 masters, which DeepSpeed leaves out


@dataclass
class ZeroContent:
    """What a DeepSpeed directory holds.

    Attributes:
        weights: every parameter and persistent buffer, under the names in the file.
        stage: ZeRO stage.
        world_size: number of data-parallel ranks that wrote it.
        client: entries of the first model file that are not weights (``global_steps``, what the training loop added,
            ...).
        notes: what a reader should know, a sentence each.
    """

    weights: dict[str, Tensor]
    stage: int
    world_size: int
    client: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def _stage(model: Mapping[str, Any], optim: Mapping[str, Any] | None) -> int:
    if optim is not None:
        return int(optim["optimizer_state_dict"].get("zero_stage", 0))
    zero = model.get("ds_config") or {}
    zero = zero.get("zero_optimization", {}) if isinstance(zero, Mapping) else {}
    return int(zero.get("stage", 0)) if isinstance(zero, Mapping) else 0


def _sharded(content: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not isinstance(content.get("optimizer_state_dict"), Mapping):
        raise CorruptCheckpointError(f"{path}: holds no 'optimizer_state_dict'; it is not a DeepSpeed optimizer shard")
    return content


def read_model_file(path: Path, *, verify: bool = True) -> Mapping[str, Any]:
    """A ``*_model_states.pt``. Raises `CheckpointError` if it has no ``module`` entry."""
    content = load_pickle(path, verify=verify)
    if not isinstance(content, Mapping) or not isinstance(content.get("module"), Mapping):
        raise CheckpointError(f"{path}: holds no 'module' dictionary; it is not a DeepSpeed model file")
    return content


def adam_step(optim: Mapping[str, Any]) -> int | None:
    """Optimizer steps that a shard's Adam state has seen; None where the optimizer keeps no count."""
    state = optim["optimizer_state_dict"]
    inner = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    entries = inner.get("state", {}) if isinstance(inner, Mapping) else {}
    for entry in entries.values() if isinstance(entries, Mapping) else []:
        if isinstance(entry, Mapping) and "step" in entry:
            return int(entry["step"])
    for group in inner.get("param_groups", []) if isinstance(inner, Mapping) else []:
        if isinstance(group, Mapping) and "step" in group:
            return int(group["step"])
    return None


def check_shards(tag: Path, shards: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> int:
    """World size, after checking that all its shards are there and from one step."""
    count = shards[0]["optimizer_state_dict"].get("partition_count", len(shards))
    world = max(count) if isinstance(count, (list, tuple)) else int(count)
    if world != len(shards):
        names = ", ".join(f.name for f in files)
        raise CorruptCheckpointError(
            f"{tag}: written by {world} ranks but {len(shards)} optimizer shards are there ({names}); "
            "copy the missing ones"
        )
    steps = [adam_step(shard) for shard in shards]
    if len(set(steps)) > 1:
        raise CorruptCheckpointError(
            f"{tag}: a mix of two saves: the optimizer shards are at steps {', '.join(map(str, steps))} "
            f"({', '.join(f.name for f in files)}); use another checkpoint"
        )
    return world


def _numel(shape: Sequence[int]) -> int:
    return math.prod(int(n) for n in shape)


def _merge_flat(
    tag: Path, shapes: Sequence[Mapping[str, Any]], shards: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Stages 1 and 2: slices of one vector per parameter group. Views into the joined vector, no second copy."""
    states = [shard["optimizer_state_dict"] for shard in shards]
    slices = [state["single_partition_of_fp32_groups"] for state in states]
    paddings = states[0].get("param_alignment_paddings")
    merged: dict[str, Tensor] = {}
    for group, names in enumerate(shapes):
        parts = [rank[group] for rank in slices]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        offset = 0
        for index, (name, shape) in enumerate(names.items()):
            count = _numel(shape)
            if offset + count > flat.numel():
                raise CorruptCheckpointError(
                    f"{tag}: the shards hold {flat.numel()} values of group {group}, too few for '{name}'"
                )
            merged[name] = flat.narrow(0, offset, count).view(tuple(shape))
            offset += count + (int(paddings[group][index]) if paddings else 0)
        # the end is padded to a multiple of 2 * world size, more where gradients are aligned for NCCL
        if flat.numel() - offset >= max(2 * len(parts), 1) + len(names) * 2 * len(parts):
            raise CorruptCheckpointError(
                f"{tag}: the shards hold {flat.numel()} values of group {group}, its names only {offset}"
            )
    return merged


def _join(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    whole = torch.cat([part.reshape(-1) for part in parts]) if len(parts) > 1 else parts[0].reshape(-1)
    return whole[: _numel(shape)].view(tuple(shape))


def _merge_sliced(
    tag: Path, models: Sequence[Mapping[str, Any]], shards: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Stage 3: each rank has 1/world of each parameter; its flat groups follow each other without gaps."""
    world = len(shards)
    if len(models) != world:
        raise CorruptCheckpointError(
            f"{tag}: {world} optimizer shards but {len(models)} model files; copy the missing ones"
        )
    groups = [shard["optimizer_state_dict"]["fp32_flat_groups"] for shard in shards]
    flat = [torch.cat(list(rank)) if len(rank) > 1 else rank[0] for rank in groups]
    merged: dict[str, Tensor] = {}
    offset = 0
    for names in models[0]["param_shapes"]:
        for name, shape in names.items():
            part = -(-_numel(shape) // world)
            if offset + part > flat[0].numel():
                raise CorruptCheckpointError(f"{tag}: the shards end before '{name}'; copy the checkpoint again")
            merged[name] = _join([rank.narrow(0, offset, part) for rank in flat], shape)
            offset += part
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        merged[name] = _join([model["frozen_param_fragments"][name] for model in models], shape)
    return merged


def _match_order(names: Sequence[str], module: Mapping[str, Tensor], masters: Sequence[Tensor]) -> list[str] | None:
    """Names for unnamed masters that follow the module's order; None unless there is exactly one way."""

    def fits(name: str, master: Tensor) -> bool:
        copy = module[name]
        return copy.shape == master.shape and bool(torch.equal(master.to(copy.dtype), copy))

    def greedy(order: Sequence[str], wanted: Sequence[Tensor]) -> list[str] | None:
        found, at = [], 0
        for master in wanted:
            while at < len(order) and not fits(order[at], master):
                at += 1
            if at == len(order):
                return None
            found.append(order[at])
            at += 1
        return found

    first = greedy(names, masters)
    last = greedy(names[::-1], masters[::-1])
    return first if first is not None and last is not None and first == last[::-1] else None


def _unsharded_masters(model: Mapping[str, Any], notes: list[str]) -> dict[str, Tensor]:
    """Stage 0 under bf16 or fp16: the masters lie in the optimizer entry, in the order of its parameter groups."""
    optimizer = model.get("optimizer")
    groups = optimizer.get("fp32_groups") if isinstance(optimizer, Mapping) else None
    module: Mapping[str, Tensor] = model["module"]
    low = [k for k, v in module.items() if isinstance(v, Tensor) and v.dtype in (torch.bfloat16, torch.float16)]
    if not groups or not low:
        if low:
            notes.append(
                f"weights are {str(module[low[0]].dtype).removeprefix('torch.')} copies; no fp32 masters were found"
            )
        return {}
    named = model.get(GROUP_NAMES)
    out: dict[str, Tensor] = {}
    for index, masters in enumerate(groups):
        names = list(named[index]) if named else _match_order(low, module, masters)
        if names is None or len(names) != len(masters):
            notes.append(
                "the fp32 masters of stage 0 have no names and could not be assigned; low-precision copies are used"
            )
            return {}
        out.update(zip(names, masters, strict=True))
    return out


def _check_copies(tag: Path, masters: Mapping[str, Tensor], module: Mapping[str, Any]) -> None:
    """Low-precision copies are the rounded masters, always; else the files are from two different saves."""
    for name, master in masters.items():
        copy = module.get(name)
        if isinstance(copy, Tensor) and copy.numel() and not torch.equal(master.to(copy.dtype), copy):
            raise CorruptCheckpointError(
                f"{tag}: a mix of two saves: '{name}' in the optimizer shards is not the one in the model file; "
                "use another checkpoint"
            )


def read_zero(place: Location, *, verify: bool = True) -> ZeroContent:
    """All weights of a DeepSpeed directory, fp32 where fp32 masters exist, frozen parameters included.

    Raises:
        CheckpointError: model parallelism, or a stage-3 file without its shards.
        CorruptCheckpointError: shards missing, of different steps, or damaged.
    """
    assert place.tag is not None
    try:
        return _read(place.tag, place.model_files, place.optim_files, verify)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise CorruptCheckpointError(
            f"{place.tag}: its files are not as DeepSpeed writes them ({what}); use another checkpoint"
        ) from error


def _read(tag: Path, model_files: list[Path], optim_files: list[Path], verify: bool) -> ZeroContent:
    if not model_files:
        raise CorruptCheckpointError(f"{tag}: has no *_model_states.pt; copy the checkpoint again")
    foreign = [f.name for f in model_files if "mp_rank_00" not in f.name]
    if foreign:
        raise CheckpointError(
            f"{tag}: written with model parallelism ({foreign[0]}); merge it with DeepSpeed's own tools first"
        )
    model = read_model_file(model_files[0], verify=verify)
    module = {k: v for k, v in model["module"].items() if isinstance(v, Tensor)}
    sharded_weights = model_files[0].name.startswith(("zero_pp_rank_", "bf16_zero_pp_rank_"))
    low = any(v.dtype in (torch.bfloat16, torch.float16) for v in module.values() if v.is_floating_point())
    notes: list[str] = []
    shards: list[Mapping[str, Any]] = []
    if optim_files and (low or sharded_weights):  # at stages 0-2 in fp32 the model file alone is the truth
        shards = [_sharded(load_pickle(f, verify=verify), f) for f in optim_files]
    stage = _stage(model, shards[0] if shards else None)
    world = check_shards(tag, shards, optim_files) if shards else int(model.get("dp_world_size") or 1)
    masters: dict[str, Tensor] = {}
    if sharded_weights:
        if not shards:
            raise CheckpointError(
                f"{model_files[0]}: ZeRO stage 3 keeps the weights in *{'_optim_states.pt'}, and {tag} has none"
            )
        masters = _merge_sliced(tag, [model, *(read_model_file(f, verify=verify) for f in model_files[1:])], shards)
        module = {k: v for k, v in module.items() if k in set(model.get("buffer_names") or ())}
    elif shards:
        masters = _merge_flat(tag, model["param_shapes"], shards)
        _check_copies(tag, masters, module)
    else:
        if stage in (1, 2) and low:
            notes.append(
                "the optimizer shards are not here: weights are the low-precision copies, not the fp32 masters"
            )
            stage_masters: dict[str, Tensor] = {}
        else:
            stage_masters = _unsharded_masters(model, notes)
        masters = stage_masters
    weights = {**module, **masters}
    for alias, name in (model.get("shared_params") or {}).items():
        if name in weights:
            weights[alias] = weights[name]
    if masters and not sharded_weights:
        kept = sum(1 for k in module if k not in masters and module[k].dtype in (torch.bfloat16, torch.float16))
        notes.append(f"{len(masters)} fp32 masters read" + (f"; {kept} frozen tensors have none" if kept else ""))
    client = {
        k: v for k, v in model.items() if k not in ("module", "optimizer", "param_shapes", "frozen_param_fragments")
    }
    return ZeroContent(weights, stage, world, client, notes)
