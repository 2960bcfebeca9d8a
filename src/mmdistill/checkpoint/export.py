"""Export one encoder, by default the student, for use without this project."""

import json
import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill import __version__
from mmdistill.checkpoint.convert import resolve_target
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.safetensors_file import save_safetensors
from mmdistill.checkpoint.keys import to_huggingface
from mmdistill.checkpoint.load import select_encoder
from mmdistill.checkpoint.read import open_checkpoint
from mmdistill.checkpoint.write import fsync_path, stage_file, write_bytes, write_directory
from mmdistill.models.videomae import Encoder


class _FeatureExtractor(nn.Module):
    """Computes the feature of a clip in one call: (B, C, T, H, W) normalized -> (B, D)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clip: Tensor) -> Tensor:
        """Call `Encoder.embed`."""
        return self.encoder.embed(clip)


def make_huggingface_config(encoder: Encoder) -> dict[str, Any]:
    """Build the ``config.json`` of ``transformers.VideoMAEModel``.

    Raises:
        CheckpointError: VideoMAEModel does not support the architecture.
    """
    config = encoder.config
    problems = {"learned": "learned positions", "sincos_separable": "positions separable in (t, h, w)"}
    problem = problems.get(config.pos_embed)
    if config.heads * config.head_dim != config.dim:
        problem = f"{config.heads} heads of {config.head_dim} in a width of {config.dim}"
    if problem:
        raise CheckpointError(
            f"this encoder has {problem}, which transformers' VideoMAE does not support; use --to safetensors, onnx or "
            "torch_export"
        )
    return {
        "architectures": ["VideoMAEModel"],
        "model_type": "videomae",
        "image_size": [config.height, config.width],
        "patch_size": config.patch,
        "num_channels": config.channels,
        "num_frames": config.num_frames,
        "tubelet_size": config.tubelet,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_mean_pooling": False,
    }


def _export_safetensors(encoder: Encoder, target: Path, meta: dict[str, Any]) -> None:
    save_safetensors({f"encoder.{k}": v for k, v in encoder.state_dict().items()}, target, meta)


def _export_hf(encoder: Encoder, target: Path, meta: dict[str, Any]) -> None:
    text = json.dumps({**make_huggingface_config(encoder), "mmdistill": meta}, indent=1, sort_keys=True) + "\n"

    def fill(folder: Path) -> None:
        save_safetensors(to_huggingface(encoder.state_dict()), folder / "model.safetensors", meta)
        write_bytes(folder / "config.json", text.encode())

    write_directory(target, fill)


def _example_arguments(encoder: Encoder) -> dict[str, Any]:
    """Arguments of torch's exporters: a batch of 2, which may have any size later."""
    config = encoder.config
    clips = torch.zeros(2, config.channels, config.num_frames, config.height, config.width)
    return {"args": (clips,), "dynamic_shapes": ({0: torch.export.Dim("batch", min=1)},)}


def _export_torch(encoder: Encoder, target: Path, _: dict[str, Any]) -> None:
    program = torch.export.export(_FeatureExtractor(encoder).eval(), **_example_arguments(encoder))
    with stage_file(target) as staged:
        torch.export.save(program, str(staged))
        fsync_path(staged)


def _export_onnx(encoder: Encoder, target: Path, _: dict[str, Any]) -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"{target}: not written: ONNX export needs the packages {' and '.join(missing)}; pip install them"
        )
    program = torch.onnx.export(
        _FeatureExtractor(encoder).eval(),
        dynamo=True,
        input_names=["clip"],
        output_names=["feature"],
        verbose=False,
        **_example_arguments(encoder),
    )
    if program is None:
        raise CheckpointError(f"{target}: not written: torch.onnx returned no program; use --to torch_export")
    with stage_file(target) as staged:
        program.save(str(staged), external_data=False)
        fsync_path(staged)


_WRITERS = {
    "safetensors": _export_safetensors,
    "hf": _export_hf,
    "onnx": _export_onnx,
    "torch_export": _export_torch,
}


def export_student(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    component: str | None = None,
    force: bool = False,
) -> Path:
    """Write one encoder of a checkpoint in another format.

    Args:
        path: a distilled (or pretrained) checkpoint in any format.
        target: the file, or for ``hf`` the folder, to write.
        to: ``safetensors`` (our names, with metadata), ``hf`` (``transformers.VideoMAEModel``), ``onnx`` or
            ``torch_export`` (clip in, feature out, any batch size).
        component: name of the encoder; None is the student.
        force: replace an existing `target`.

    Returns:
        `target` with ``~`` expanded.

    Raises:
        CheckpointError: `target` exists, the format does not support the architecture, or a package is missing.
    """
    if to not in _WRITERS:
        raise CheckpointError(f"--to {to}: choose one of {', '.join(_WRITERS)}")
    target_path = resolve_target(target, force=force)
    checkpoint = open_checkpoint(path)
    name = select_encoder(checkpoint.state_dict, component, checkpoint.path).component
    encoder = checkpoint.encoder(name).eval()
    modality = name.rpartition("_")[2] if "_" in name else checkpoint.meta.get("modality")
    statistics = checkpoint.meta.get("statistics") or {}
    meta = {
        "mmdistill_version": __version__,
        "kind": "weights",
        "component": name,
        "modality": modality,
        "encoders": {"encoder": asdict(encoder.config)},
        "decoder": None,
        "statistics": {modality: statistics[modality]} if modality in statistics else statistics,
        "epoch": checkpoint.meta.get("epoch"),
        "step": checkpoint.meta.get("step"),
    }
    _WRITERS[to](encoder, target_path, meta)
    return target_path
