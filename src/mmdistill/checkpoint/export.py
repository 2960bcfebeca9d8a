"""Export one encoder, by default the student, for use without this project."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill import __version__
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.names import EXPORT_SUFFIXES
from mmdistill.checkpoint.keys import to_huggingface
from mmdistill.checkpoint.load import load_encoder_with_report
from mmdistill.checkpoint.read import read_checkpoint
from mmdistill.checkpoint.write import fsync_path, save_safetensors, write_bytes, write_directory
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
    if config.pos_embed == "learned":
        raise CheckpointError(
            "this encoder has learned positions, which transformers' VideoMAE does not support; use --to "
            "safetensors, onnx or torch_export"
        )
    if config.pos_embed == "sincos_separable":
        raise CheckpointError(
            "this encoder has positions separable in (t, h, w), which transformers' VideoMAE does not support; use "
            "--to safetensors, onnx or torch_export"
        )
    if config.heads * config.head_dim != config.dim:
        raise CheckpointError(
            f"this encoder has {config.heads} heads of {config.head_dim} in a width of {config.dim}, which "
            "transformers' VideoMAE does not support; use --to safetensors, onnx or torch_export"
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


def _export_hf(encoder: Encoder, target: Path, meta: dict[str, Any]) -> None:
    config = make_huggingface_config(encoder)

    def fill(folder: Path) -> None:
        save_safetensors(to_huggingface(encoder.state_dict()), folder / "model.safetensors", meta)
        text = json.dumps({**config, "mmdistill": meta}, indent=1, sort_keys=True) + "\n"
        write_bytes(folder / "config.json", text.encode())

    write_directory(target, fill)


def _make_example_batch(encoder: Encoder) -> Tensor:
    config = encoder.config
    return torch.zeros(2, config.channels, config.num_frames, config.height, config.width)


def _export_torch(encoder: Encoder, target: Path, _: dict[str, Any]) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        _FeatureExtractor(encoder).eval(), (_make_example_batch(encoder),), dynamic_shapes=({0: batch},)
    )
    _write_atomically(target, lambda staged: torch.export.save(program, staged))


def _export_onnx(encoder: Encoder, target: Path, _: dict[str, Any]) -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"{target}: not written: ONNX export needs the packages {' and '.join(missing)}; pip install them"
        )
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        _FeatureExtractor(encoder).eval(),
        (_make_example_batch(encoder),),
        dynamo=True,
        input_names=["clip"],
        output_names=["feature"],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    if program is None:
        raise CheckpointError(f"{target}: not written: torch.onnx returned no program; use --to torch_export")
    _write_atomically(target, lambda staged: program.save(staged, external_data=False))


def _write_atomically(target: Path, write: Callable[[str], None]) -> None:
    staged = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(str(staged))
        fsync_path(staged)
        os.replace(staged, target)
        fsync_path(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: not saved ({error})") from error
    finally:
        staged.unlink(missing_ok=True)


def _export_safetensors(encoder: Encoder, target: Path, meta: dict[str, Any]) -> None:
    save_safetensors({f"encoder.{k}": v for k, v in encoder.state_dict().items()}, target, meta)


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
    target_path = Path(target).expanduser()
    if to not in EXPORT_SUFFIXES:
        raise CheckpointError(f"--to {to}: choose one of {', '.join(EXPORT_SUFFIXES)}")
    if target_path.exists() and not force:
        raise CheckpointError(f"{target}: exists; choose another name, or use --force to replace it")
    checkpoint = read_checkpoint(path)
    encoder, report = load_encoder_with_report(checkpoint, part=component)
    encoder.eval()
    name = report.component or "encoder"
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
    writers = {
        "safetensors": _export_safetensors,
        "hf": _export_hf,
        "onnx": _export_onnx,
        "torch_export": _export_torch,
    }
    writers[to](encoder, target_path, meta)
    return target_path
