"""Export one encoder, by default the student, for use without this project."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mmdistill import __version__
from mmdistill.checkpoint.convert import resolve_target
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.names import EXPORT_SUFFIXES
from mmdistill.checkpoint.formats.safetensors_file import save_safetensors
from mmdistill.checkpoint.keys import to_huggingface
from mmdistill.checkpoint.load import select_encoder
from mmdistill.checkpoint.read import Checkpoint, open_checkpoint
from mmdistill.checkpoint.references import labeled_sources, labeled_sources_entry
from mmdistill.checkpoint.student import (
    FeatureExtractor,
    find_frame_size,
    find_modality,
    find_statistics,
    stored_pooling,
    stored_resize,
)
from mmdistill.checkpoint.write import fsync_path, stage_file, write_bytes, write_directory
from mmdistill.modalities import stored_statistics
from mmdistill.models.pooling import Pooling
from mmdistill.models.videomae import Encoder


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
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": True,
        "use_mean_pooling": not config.final_norm,
    }


def make_preprocessor_config(
    encoder: Encoder, frame_size: Sequence[int], mean: Sequence[float], std: Sequence[float], *, resize: str = "crop"
) -> dict[str, Any]:
    """Build the ``preprocessor_config.json`` of transformers' image and video processors.

    They scale the shorter side of a frame to that of `frame_size`, (height, width) of the frames of the training, and
    crop the center. Frames that are then narrower than the input are padded with zeros. With ``resize="squash"`` they
    scale the whole frame to the input.
    """
    config = encoder.config
    is_crop, input_size = resize == "crop", {"height": config.height, "width": config.width}
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "video_processor_type": "VideoMAEVideoProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(frame_size)} if is_crop else input_size,
        "resample": 2,  # bilinear
        "do_center_crop": is_crop,
        "crop_size": input_size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


_MAX_ONNX_BYTES = 2**31  # of one protobuf file
_CARD = """---
library_name: transformers
pipeline_tag: video-classification
tags: [videomae, mmdistill]
---

# {component} of mmdistill

An encoder of {num_frames} frames of {height} x {width} px, exported from `{source}` by mmdistill {version}.

```python
import torch
from transformers import {classes}

model = VideoMAEModel.from_pretrained("FOLDER").eval()
{preprocessing}
with torch.no_grad():
    tokens = model(pixel_values).last_hidden_state  # (B, {num_tokens}, {dim})
    feature = torch.nn.functional.layer_norm(tokens.mean(dim=1), ({dim},), eps=1e-6)  # (B, {dim})
```

The feature of mmdistill is the last line: the mean over the tokens, then a LayerNorm without weights. The mean alone is
another feature. Few-shot accuracies of mmdistill hold for the normalized feature.

Mean and standard deviation of the input: {statistics}.
"""
_RGB_PREPROCESSING = """processor = VideoMAEImageProcessor.from_pretrained("FOLDER")  # scales, crops, normalizes
pixel_values = processor(list(frames), return_tensors="pt").pixel_values  # uint8 (T, H, W, 3), RGB"""
_OTHER_PREPROCESSING = "pixel_values = (clips - mean) / std  # float32 (B, T, C, H, W), mean and std per channel"


@dataclass(frozen=True)
class _Export:
    """What a writer needs: the encoder, its metadata, its name and modality, and its checkpoint."""

    checkpoint: Checkpoint
    component: str
    modality: str | None
    encoder: Encoder
    meta: dict[str, Any]
    pooling: Pooling

    def extractor(self) -> FeatureExtractor:
        mean, std = find_statistics(self.checkpoint, self.modality)
        assert self.modality is not None  # `find_statistics` raises
        if self.pooling.name == "motion":
            raise CheckpointError(
                f"{self.checkpoint.path}: the encoder was distilled with pooling=motion, and an exported program has "
                "no input for the weights of the tokens; use --to safetensors, or load_student (Python)"
            )
        return FeatureExtractor(self.encoder, self.modality, mean, std, self.pooling).eval().requires_grad_(False)


def _export_safetensors(export: _Export, target: Path) -> None:
    save_safetensors({f"encoder.{k}": v for k, v in export.encoder.state_dict().items()}, target, export.meta)


def _export_hf(export: _Export, target: Path) -> None:
    encoder, config = export.encoder, export.encoder.config
    if export.pooling.name != "mean":
        raise CheckpointError(
            f"{export.checkpoint.path}: the encoder was distilled with pooling={export.pooling.name}, and "
            "VideoMAEModel has the mean only; use --to safetensors"
        )
    files = {"config.json": {**make_huggingface_config(encoder), "mmdistill": export.meta}}
    statistics = stored_statistics(export.meta, str(export.modality))
    if is_rgb := export.modality == "rgb":
        statistics = find_statistics(export.checkpoint, export.modality)
        files["preprocessor_config.json"] = make_preprocessor_config(
            encoder, export.meta["frame_size"], *statistics, resize=export.meta["resize"]
        )
    card = _CARD.format(
        **asdict(config),
        component=export.component,
        num_tokens=config.num_tokens,
        source=export.checkpoint.path.name,
        version=__version__,
        classes="VideoMAEImageProcessor, VideoMAEModel" if is_rgb else "VideoMAEModel",
        preprocessing=_RGB_PREPROCESSING if is_rgb else _OTHER_PREPROCESSING,
        statistics=f"{list(statistics[0])} and {list(statistics[1])}" if statistics else "not stored",
    )

    def fill(folder: Path) -> None:
        save_safetensors(to_huggingface(encoder.state_dict()), folder / "model.safetensors", export.meta)
        for name, content in files.items():
            write_bytes(folder / name, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
        write_bytes(folder / "README.md", card.encode())

    write_directory(target, fill)


def _example_arguments(extractor: FeatureExtractor) -> dict[str, Any]:
    """Arguments of torch's exporters: a batch of 2, which may have any size later."""
    config = extractor.encoder.config
    if extractor.modality == "rgb":
        clips = torch.zeros(2, config.num_frames, config.height, config.width, 3, dtype=torch.uint8)
    else:
        clips = torch.zeros(2, config.channels, config.num_frames, config.height, config.width)
    return {"args": (clips,), "dynamic_shapes": ({0: torch.export.Dim("batch", min=1)},)}


def _export_torch(export: _Export, target: Path) -> None:
    extractor = export.extractor()
    program = torch.export.export(extractor, **_example_arguments(extractor))
    with stage_file(target) as staged:
        torch.export.save(program, str(staged))
        fsync_path(staged)


def _export_onnx(export: _Export, target: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"{target}: not written: ONNX export needs the packages {' and '.join(missing)}; pip install them"
        )
    extractor = export.extractor()
    if sum(p.nbytes for p in extractor.parameters()) >= _MAX_ONNX_BYTES:
        raise CheckpointError(f"{target}: not written: one ONNX file holds less than 2 GiB; use --to torch_export")
    program = torch.onnx.export(
        extractor,
        dynamo=True,
        input_names=["frames" if extractor.modality == "rgb" else "clip"],
        output_names=["feature"],
        verbose=False,
        **_example_arguments(extractor),
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


def _with_suffix(target: str | os.PathLike[str], to: str) -> Path:
    """`target` with the suffix of the format. Raises `CheckpointError` for another suffix. A folder has any name."""
    path, suffix = Path(target), EXPORT_SUFFIXES[to]
    if suffix and path.suffix not in ("", suffix):
        raise CheckpointError(f"{target}: --to {to} writes a file that ends in {suffix}; choose another name")
    return path.with_suffix(suffix) if suffix else path


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
        target: the file, or for ``hf`` the folder, to write. A file name without suffix gets that of the format.
        to: ``safetensors`` (our names, with metadata), ``hf`` (``transformers.VideoMAEModel``, its processor and a
            README), ``onnx`` or ``torch_export`` (any batch size; input and output of `FeatureExtractor`, with mean
            and std inside).
        component: name of the encoder; None is the student.
        force: replace an existing `target`.

    Returns:
        The path that was written, with ``~`` expanded.

    Raises:
        CheckpointError: `target` exists or has the suffix of another format, the format does not support the
            architecture, a package is missing, or mean and std are unknown.
    """
    if to not in _WRITERS:
        raise CheckpointError(f"--to {to}: choose one of {', '.join(_WRITERS)}")
    target_path = resolve_target(_with_suffix(target, to), force=force)
    checkpoint = open_checkpoint(path)
    name = select_encoder(checkpoint.state_dict, component, checkpoint.path).component
    encoder = checkpoint.encoder(name).eval()
    modality = find_modality(checkpoint, name)
    statistics = checkpoint.meta.get("statistics") or {}
    pooling = stored_pooling(checkpoint.meta)
    meta = {
        "mmdistill_version": __version__,
        "kind": "weights",
        "component": name,
        "modality": modality,
        "encoders": {"encoder": asdict(encoder.config)},
        "decoder": None,
        "statistics": {modality: statistics[modality]} if modality in statistics else statistics,
        "frame_size": find_frame_size(checkpoint, encoder),
        "resize": stored_resize(checkpoint.meta),
        **({"pooling": pooling.name, "pooling_last_k": pooling.last_k} if pooling else {}),
        "epoch": checkpoint.meta.get("epoch"),
        "step": checkpoint.meta.get("step"),
        **labeled_sources_entry(labeled_sources(checkpoint.meta)),
    }
    _WRITERS[to](_Export(checkpoint, name, modality, encoder, meta, pooling or Pooling()), target_path)
    return target_path
