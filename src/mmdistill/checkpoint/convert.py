"""Convert checkpoints between formats. Names are canonical in all formats and values are bit-identical."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdistill import __version__
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.manifest import manifest_bytes, manifest_entry
from mmdistill.checkpoint.formats.names import LATEST, MANIFEST, META, METADATA_KEY, TAG
from mmdistill.checkpoint.read import read_checkpoint
from mmdistill.checkpoint.write import (
    fsync_path,
    save_safetensors,
    save_torch,
    write_bytes,
    write_directory,
    write_torch,
)


def _clone_views(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that are views of a larger storage, which ``torch.save`` would write completely."""
    return {
        k: v if v.untyped_storage().nbytes() == v.numel() * v.element_size() else v.clone() for k, v in state.items()
    }


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
        name = f"{TAG}/mp_rank_00_model_states.pt"
        write_torch(content, folder / name)
        files = {name: manifest_entry(folder / name)}
        text = json.dumps(dict(meta), indent=1, sort_keys=True) + "\n"
        for file, data in ((LATEST, TAG.encode()), (META, text.encode())):
            files[file] = manifest_entry(folder / file, write_bytes(folder / file, data))
        fsync_path(folder / TAG)
        summary = {key: meta.get(key) for key in ("epoch", "loss", "kind", "modality")}
        write_bytes(folder / MANIFEST, manifest_bytes(files, world_size=1, stage=0, step=step, **summary))

    write_directory(target, fill)


def _lightning_version() -> str:
    try:
        return version("pytorch-lightning")
    except PackageNotFoundError:
        return "2.0.0"


def convert_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the weights and metadata of `source` in the format given by the name of `target`.

    Args:
        source: anything that `read_checkpoint` reads.
        target: ``X.safetensors``, ``X.ckpt`` (Lightning), ``X.pt``/``X.pth`` (under ``model``), or a name without
            these suffixes for a DeepSpeed directory. Optimizer states are not converted.
        force: replace an existing `target`.

    Returns:
        `target` with ``~`` expanded.

    Raises:
        CheckpointError: `target` exists, or cannot be written.
    """
    target_path = Path(target).expanduser()
    if target_path.exists() and not force:
        raise CheckpointError(f"{target}: exists; choose another name, or use --force to replace it")
    checkpoint = read_checkpoint(source)
    meta = {"mmdistill_version": __version__, **checkpoint.meta}
    state = _clone_views(checkpoint.state_dict)
    if target_path.suffix == ".safetensors":
        save_safetensors(state, target_path, meta)
    elif target_path.suffix == ".ckpt":
        save_torch(
            {
                "epoch": int(meta.get("epoch") or 0),
                "global_step": int(meta.get("step") or 0),
                "pytorch-lightning_version": _lightning_version(),
                "state_dict": state,
                "optimizer_states": [],
                "lr_schedulers": [],
                METADATA_KEY: meta,
            },
            target_path,
        )
    elif target_path.suffix in (".pt", ".pth"):
        save_torch({"model": state, METADATA_KEY: meta}, target_path)
    else:
        write_deepspeed(state, target_path, meta)
    return target_path
