"""The student alone, for use without this project."""

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
from mmdistill.checkpoint.keys import to_huggingface
from mmdistill.checkpoint.load import load_encoder_with_report
from mmdistill.checkpoint.read import read_checkpoint
from mmdistill.checkpoint.write import save_safetensors, staged_directory, sync, write_bytes
from mmdistill.models.videomae import Encoder

FORMATS = {"safetensors": ".safetensors", "hf": "", "onnx": ".onnx", "torch_export": ".pt2"}


class _Features(nn.Module):
    """A clip's feature as one call. (B, C, T, H, W) normalised -> (B, D)"""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clip: Tensor) -> Tensor:
        """See `Encoder.embed`."""
        return self.encoder.embed(clip)


def huggingface_config(encoder: Encoder) -> dict[str, Any]:
    """The ``config.json`` of ``transformers.VideoMAEModel``.

    Raises:
        CheckpointError: an architecture that VideoMAEModel cannot have.
    """
    g = encoder.config
    if g.pos_embed == "learned":
        raise CheckpointError(
            "this encoder's positions are learned, and transformers' VideoMAE has fixed ones; use safetensors"
        )
    if g.pos_embed == "sincos_separable":
        raise CheckpointError(
            "this encoder's positions are separable in (t, h, w), and transformers' VideoMAE numbers its tokens in one "
            "row; use --to safetensors, onnx or torch_export"
        )
    if g.heads * g.head_dim != g.dim:
        raise CheckpointError(
            f"this encoder has {g.heads} heads of {g.head_dim} in a width of {g.dim}, which transformers' VideoMAE "
            "cannot have; use --to safetensors, onnx or torch_export"
        )
    return {
        "architectures": ["VideoMAEModel"],
        "model_type": "videomae",
        "image_size": [g.height, g.width],
        "patch_size": g.patch,
        "num_channels": g.channels,
        "num_frames": g.num_frames,
        "tubelet_size": g.tubelet,
        "hidden_size": g.dim,
        "num_hidden_layers": g.depth,
        "num_attention_heads": g.heads,
        "intermediate_size": g.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_mean_pooling": False,
    }


def _export_hf(encoder: Encoder, target: Path, meta: dict[str, Any]) -> None:
    config = huggingface_config(encoder)

    def fill(folder: Path) -> None:
        save_safetensors(to_huggingface(encoder.state_dict()), folder / "model.safetensors", meta)
        text = json.dumps({**config, "mmdistill": meta}, indent=1, sort_keys=True) + "\n"
        write_bytes(folder / "config.json", text.encode())

    staged_directory(target, fill)


def _example(encoder: Encoder) -> Tensor:
    g = encoder.config
    return torch.zeros(2, g.channels, g.num_frames, g.height, g.width)


def _export_torch(encoder: Encoder, target: Path, _: dict[str, Any]) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(_Features(encoder).eval(), (_example(encoder),), dynamic_shapes=({0: batch},))
    _replace(target, lambda staged: torch.export.save(program, staged))


def _export_onnx(encoder: Encoder, target: Path, _: dict[str, Any]) -> None:
    lacking = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if lacking:
        raise CheckpointError(
            f"{target}: not written: ONNX export needs the packages {' and '.join(lacking)}; pip install them"
        )
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        _Features(encoder).eval(),
        (_example(encoder),),
        dynamo=True,
        input_names=["clip"],
        output_names=["feature"],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    if program is None:
        raise CheckpointError(f"{target}: not written: torch.onnx returned no program")
    _replace(target, lambda staged: program.save(staged, external_data=False))


def _replace(target: Path, write: Callable[[str], None]) -> None:
    staged = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(str(staged))
        sync(staged)
        os.replace(staged, target)
        sync(target.parent)
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
    part: str | None = None,
    force: bool = False,
) -> Path:
    """Write one encoder of a checkpoint.

    Args:
        path: a distilled (or pretrained) checkpoint in any format.
        target: the file, or for ``hf`` the folder, to write.
        to: ``safetensors`` (our names, with metadata), ``hf`` (``transformers.VideoMAEModel``), ``onnx`` or
            ``torch_export`` (clip in, feature out, any batch size).
        part: another encoder than the student.
        force: replace what is there.

    Raises:
        CheckpointError: the target exists, the architecture has no place in that format, or a package is missing.
    """
    where = Path(target).expanduser()
    if to not in FORMATS:
        raise CheckpointError(f"--to {to}: choose one of {', '.join(FORMATS)}")
    if where.exists() and not force:
        raise CheckpointError(f"{target}: exists; give another name, or --force to replace it")
    source = read_checkpoint(path).meta
    encoder, report = load_encoder_with_report(path, part=part)
    encoder.eval()
    taken = report.part or "encoder"
    modality = taken.rpartition("_")[2] if "_" in taken else source.get("modality")
    statistics = source.get("statistics") or {}
    meta = {
        "mmdistill_version": __version__,
        "kind": "weights",
        "part": taken,
        "modality": modality,
        "encoders": {"encoder": asdict(encoder.config)},
        "decoder": None,
        "statistics": {modality: statistics[modality]} if modality in statistics else statistics,
        "epoch": source.get("epoch"),
        "step": source.get("step"),
    }
    writers = {
        "safetensors": _export_safetensors,
        "hf": _export_hf,
        "onnx": _export_onnx,
        "torch_export": _export_torch,
    }
    writers[to](encoder, where, meta)
    return where
