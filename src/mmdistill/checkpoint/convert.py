"""Convert checkpoints between formats, and training states between ZeRO layouts. Values are bit-identical.

Weights have canonical names in all formats; a training state keeps its own.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdistill import __version__
from mmdistill.checkpoint.architecture import decoder_config_from_tensors
from mmdistill.checkpoint.deepspeed_engine import make_loss_scaler
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.deepspeed_zero import read_model_states
from mmdistill.checkpoint.formats.manifest import complete_directory
from mmdistill.checkpoint.formats.names import HEADS_KEY, METADATA_KEY, MODEL_STATES, OPTIM_STATES, TAG
from mmdistill.checkpoint.formats.safetensors_file import save_safetensors
from mmdistill.checkpoint.formats.zero_slices import ZeroLayout, ZeroState, read_zero_state, slice_state
from mmdistill.checkpoint.read import Checkpoint, open_checkpoint, read_checkpoint
from mmdistill.checkpoint.write import save_torch, write_directory, write_torch

WEIGHTS_SUFFIXES = (".pt", ".pth")


def write_deepspeed(state: Mapping[str, Tensor], target: Path, meta: Mapping[str, Any]) -> None:
    """Write a directory as DeepSpeed does at stage 0, without optimizer; read with ``load_module_only=True``."""
    step = int(meta.get("step") or 0)
    content: dict[str, Any] = {
        "module": dict(state),
        "buffer_names": [],
        "optimizer": None,
        "lr_scheduler": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": None,
        "global_steps": step,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 0}},
        "ds_version": None,
        METADATA_KEY: dict(meta),
    }

    def fill(folder: Path) -> None:
        (folder / TAG).mkdir()
        file = folder / TAG / "mp_rank_00_model_states.pt"
        write_torch(content, file)
        complete_directory(folder, [file], meta, world_size=1, stage=0, step=step)

    write_directory(target, fill)


def resolve_target(target: str | os.PathLike[str], *, force: bool) -> Path:
    """Expand ``~``. Raises `CheckpointError` if `target` exists, unless `force`."""
    path = Path(target).expanduser()
    if path.exists() and not force:
        raise CheckpointError(f"{target}: exists; choose another name, or use --force to replace it")
    return path


def convert_layout(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    stage: int | None = None,
    world_size: int | None = None,
    force: bool = False,
) -> Path:
    """Write the training state of a DeepSpeed directory for another ZeRO stage or number of ranks.

    Args:
        source: a DeepSpeed directory with its optimizer state.
        target: the new directory, a name without suffix.
        stage: ZeRO stage, 0 to 3; None: that of `source`.
        world_size: number of ranks; None: that of `source`.
        force: replace an existing `target`.

    Returns:
        `target` with ``~`` expanded.

    Raises:
        CheckpointError: see `read_zero_state`; or `target` exists, has a suffix, or cannot be written.
    """
    path = resolve_target(target, force=force)
    if re.match(r"\.[A-Za-z]", path.suffix):
        raise CheckpointError(f"{target}: a training state is a DeepSpeed directory; use a name without {path.suffix}")
    if stage not in (None, 0, 1, 2, 3) or (world_size is not None and world_size < 1):
        given = f"stage {stage}" if world_size is None or world_size > 0 else f"world size {world_size}"
        raise CheckpointError(f"ZeRO {given}: use a stage of 0 to 3 and a world size of at least 1")
    checkpoint = open_checkpoint(source)
    if checkpoint.tag is None:
        raise CheckpointError(f"{source}: a {checkpoint.format} file; only a DeepSpeed directory has a ZeRO stage")
    checkpoint.verify()
    model = read_model_states(checkpoint.tag, verify=False)
    state = read_zero_state(checkpoint.tag, model, verify=False)
    own = state.layout
    layout = ZeroLayout(own.stage if stage is None else stage, world_size or own.world_size)
    meta = {"mmdistill_version": __version__, **checkpoint.meta}
    write_directory(path, lambda folder: _write_layout(folder, state, layout, meta))
    return path


def _write_layout(folder: Path, state: ZeroState, layout: ZeroLayout, meta: Mapping[str, Any]) -> None:
    """Write the files of all ranks, under the names that DeepSpeed gives them."""
    tag = folder / TAG
    tag.mkdir()
    scaler = make_loss_scaler(state.loss_scale) if layout.stage else None
    config = state.models[0].get("ds_config") or {}
    prefix = "bf16_" if (config.get("bf16") or {}).get("enabled") else ""
    merge, files = cache(state.merge), []
    for rank in range(layout.world_size):
        model, shard = slice_state(state, layout, rank, merge=merge, loss_scaler=scaler)
        contents = {f"{prefix}zero_pp_rank_{rank}_mp_rank_00{OPTIM_STATES}": shard}
        if layout.stage == 3:
            contents[f"zero_pp_rank_{rank}_mp_rank_00{MODEL_STATES}"] = model
        elif rank == 0:
            contents[f"mp_rank_00{MODEL_STATES}"] = model
        for name, content in contents.items():
            if content is not None:
                write_torch(content, tag / name)
                files.append(tag / name)
    step = int(state.models[0]["global_steps"])
    complete_directory(folder, files, meta, world_size=layout.world_size, stage=layout.stage, step=step)


def _check_heads(checkpoint: Checkpoint, heads: int | None, decoder_heads: int | None) -> None:
    """Raise `CheckpointError` if the numbers of heads do not fit the tensors, or if the checkpoint has its own."""
    if checkpoint.meta.get("encoders") or checkpoint.settings.num_frames:
        raise CheckpointError(f"{checkpoint.path}: states its number of heads; remove --heads and --decoder-heads")
    try:
        if heads:
            checkpoint.find_encoder_config(None, heads=heads)
        if decoder_heads:
            decoder_config_from_tensors(checkpoint.state_dict, decoder_heads)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {str(error).removeprefix(f'{checkpoint.path}: ')}") from error


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Path:
    """Write the weights and metadata of `source` in the format given by the name of `target`.

    Args:
        source: see `open_checkpoint`.
        target: ``X.safetensors``, ``X.ckpt`` (Lightning), ``X.pt``/``X.pth`` (under ``model``), or a name without
            suffix for a DeepSpeed directory (``epoch=49-loss=0.6095`` has none). Optimizer states are not converted
            (see `convert_layout`).
        force: replace an existing `target`.
        heads: number of attention heads, for files of other programs whose tensors do not determine it.
        decoder_heads: the same of the decoder.

    Returns:
        `target` with ``~`` expanded.

    Raises:
        CheckpointError: the number of heads is not possible or already known, the suffix of `target` is unknown, or
            `target` exists, or it cannot be written.
    """
    path = resolve_target(target, force=force)
    if re.match(r"\.[A-Za-z]", path.suffix) and path.suffix not in (*WEIGHTS_SUFFIXES, ".safetensors", ".ckpt"):
        raise CheckpointError(
            f"{target}: unknown suffix {path.suffix}; use .safetensors, .ckpt (Lightning), "
            f"{' or '.join(WEIGHTS_SUFFIXES)} (plain weights), or no suffix for a DeepSpeed directory"
        )
    checkpoint = read_checkpoint(source)
    meta = {"mmdistill_version": __version__, **checkpoint.meta}
    if heads or decoder_heads:
        _check_heads(checkpoint, heads, decoder_heads)
        meta[HEADS_KEY] = {"heads": heads, "decoder_heads": decoder_heads}
    if checkpoint.settings.num_frames and not meta.get("encoders"):  # from a config.json, which is not copied
        decoder = checkpoint.find_decoder_config()
        meta["encoders"] = {name: asdict(checkpoint.find_encoder_config(name)[0]) for name in checkpoint.components}
        meta["decoder"] = asdict(decoder) if decoder else None
    state = {  # clones views of a larger storage, which ``torch.save`` would write completely
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in checkpoint.state_dict.items()
    }
    if path.suffix == ".safetensors":
        save_safetensors(state, path, meta)
    elif path.suffix == ".ckpt":
        content = {
            "epoch": int(meta.get("epoch") or 0),
            "global_step": int(meta.get("step") or 0),
            "pytorch-lightning_version": version("pytorch-lightning"),
            "state_dict": state,
            "optimizer_states": [],
            "lr_schedulers": [],
            METADATA_KEY: meta,
        }
        save_torch(content, path)
    elif path.suffix in WEIGHTS_SUFFIXES:
        save_torch({"model": state, METADATA_KEY: meta}, path)
    else:
        write_deepspeed(state, path, meta)
    return path
