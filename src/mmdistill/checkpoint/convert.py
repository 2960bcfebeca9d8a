"""Convert checkpoints between formats. Names are canonical in all formats and values are bit-identical."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdistill import __version__
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.manifest import complete_directory
from mmdistill.checkpoint.formats.names import METADATA_KEY, TAG
from mmdistill.checkpoint.formats.safetensors_file import save_safetensors
from mmdistill.checkpoint.read import read_checkpoint
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


def convert_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the weights and metadata of `source` in the format given by the name of `target`.

    Args:
        source: see `open_checkpoint`.
        target: ``X.safetensors``, ``X.ckpt`` (Lightning), ``X.pt``/``X.pth`` (under ``model``), or a name without
            suffix for a DeepSpeed directory (``epoch=49-loss=0.6095`` has none). Optimizer states are not converted.
        force: replace an existing `target`.

    Returns:
        `target` with ``~`` expanded.

    Raises:
        CheckpointError: the suffix of `target` is unknown, or `target` exists, or it cannot be written.
    """
    path = resolve_target(target, force=force)
    if re.match(r"\.[A-Za-z]", path.suffix) and path.suffix not in (*WEIGHTS_SUFFIXES, ".safetensors", ".ckpt"):
        raise CheckpointError(
            f"{target}: unknown suffix {path.suffix}; use .safetensors, .ckpt (Lightning), "
            f"{' or '.join(WEIGHTS_SUFFIXES)} (plain weights), or no suffix for a DeepSpeed directory"
        )
    checkpoint = read_checkpoint(source)
    meta = {"mmdistill_version": __version__, **checkpoint.meta}
    if checkpoint.settings.heads and not meta.get("encoders"):  # from a config.json, which is not copied
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
