"""The same weights in another format. Names are canonical in all of them, and values equal to the last bit."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdistill import __version__
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.manifest import describe, manifest_bytes
from mmdistill.checkpoint.formats.names import LATEST, MANIFEST, META, TAG
from mmdistill.checkpoint.read import EMBEDDED, read_checkpoint
from mmdistill.checkpoint.write import (
    save_safetensors,
    save_torch,
    staged_directory,
    stream_torch,
    sync,
    write_bytes,
)


def _owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of their own storage: a view would be saved with everything that it views."""
    return {
        k: v if v.untyped_storage().nbytes() == v.numel() * v.element_size() else v.clone() for k, v in state.items()
    }


def write_deepspeed(state: Mapping[str, Tensor], target: Path, meta: Mapping[str, Any]) -> None:
    """A directory as DeepSpeed writes at stage 0, without an optimizer: ``load_checkpoint(load_module_only=True)``."""
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
        EMBEDDED: dict(meta),
    }

    def fill(folder: Path) -> None:
        (folder / TAG).mkdir()
        name = f"{TAG}/mp_rank_00_model_states.pt"
        stream_torch(content, folder / name)
        files = {name: describe(folder / name)}
        text = json.dumps(dict(meta), indent=1, sort_keys=True) + "\n"
        for small, data in ((LATEST, TAG.encode()), (META, text.encode())):
            files[small] = describe(folder / small, write_bytes(folder / small, data))
        sync(folder / TAG)
        facts = {key: meta.get(key) for key in ("epoch", "loss", "kind", "modality")}
        write_bytes(folder / MANIFEST, manifest_bytes(files, world_size=1, stage=0, step=step, **facts))

    staged_directory(target, fill)


def _lightning_version() -> str:
    try:
        return version("pytorch-lightning")
    except PackageNotFoundError:
        return "2.0.0"


def convert_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the weights and metadata of `source` as the format that the name of `target` asks for.

    Args:
        source: anything that `read_checkpoint` reads.
        target: ``X.safetensors``, ``X.ckpt`` (Lightning), ``X.pt``/``X.pth`` (under ``model``), or a name with
            none of these suffixes: a DeepSpeed directory. Optimizer states are not converted.
        force: replace what is there.

    Raises:
        CheckpointError: `target` exists, or cannot be written.
    """
    where = Path(target).expanduser()
    if where.exists() and not force:
        raise CheckpointError(f"{target}: exists; give another name, or --force to replace it")
    checkpoint = read_checkpoint(source)
    meta = {"mmdistill_version": __version__, **checkpoint.meta}
    state = _owned(checkpoint.state_dict)
    if where.suffix == ".safetensors":
        save_safetensors(state, where, meta)
    elif where.suffix == ".ckpt":
        save_torch(
            {
                "epoch": int(meta.get("epoch") or 0),
                "global_step": int(meta.get("step") or 0),
                "pytorch-lightning_version": _lightning_version(),
                "state_dict": state,
                "optimizer_states": [],
                "lr_schedulers": [],
                EMBEDDED: meta,
            },
            where,
        )
    elif where.suffix in (".pt", ".pth"):
        save_torch({"model": state, EMBEDDED: meta}, where)
    else:
        write_deepspeed(state, where, meta)
    return where
