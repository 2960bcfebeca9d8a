"""Inspect a checkpoint without loading it into a module."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.names import MANIFEST, META, CheckpointFormat
from mmdistill.checkpoint.keys import top_level
from mmdistill.checkpoint.locate import existing_path
from mmdistill.checkpoint.read import Checkpoint, open_checkpoint
from mmdistill.checkpoint.references import labeled_sources
from mmdistill.models.videomae import DecoderConfig, EncoderConfig


def _count_by_component(state: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for name, tensor in state.items():
        component = counts.setdefault(top_level(name), {"tensors": 0, "parameters": 0})
        component["tensors"] += 1
        component["parameters"] += tensor.numel()
    return counts


def _find_architectures(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """Configs of each encoder and of the decoder, from the metadata or else from the tensors; and notes."""
    found: dict[str, Any] = {}
    notes: list[str] = []
    stored = {**(checkpoint.meta.get("encoders") or {}), "decoder": checkpoint.meta.get("decoder")}
    for component in [*checkpoint.components, "decoder"]:
        try:
            if stored.get(component):
                found[component] = _in_order(
                    stored[component], DecoderConfig if component == "decoder" else EncoderConfig
                )
            elif component == "decoder":
                decoder = checkpoint.find_decoder_config()
                found |= {"decoder": asdict(decoder)} if decoder else {}
            else:
                config, assumptions = checkpoint.find_encoder_config(component)
                found[component] = asdict(config)
                notes += [f"{component}: {line}" for line in assumptions]
        except CheckpointError as error:
            notes.append(f"{component}: {str(error).removeprefix(f'{checkpoint.path}: ')}")
    return found, notes


def _in_order(stored: Mapping[str, Any], config_class: type[EncoderConfig | DecoderConfig]) -> dict[str, Any]:
    """The stored fields in the order of the class; the header of a safetensors file sorts them. Others follow."""
    names = [field.name for field in fields(config_class)]
    return {name: stored[name] for name in (*names, *stored) if name in stored}


def _list_missing(checkpoint: Checkpoint) -> list[str]:
    """List what complete checkpoints of mmdistill contain and this one does not. These are not errors."""
    lines = []
    if checkpoint.format is CheckpointFormat.DEEPSPEED:
        uses = {MANIFEST: "checksums", META: "architecture and statistics"}
        lines += [f"{name} ({use})" for name, use in uses.items() if not (checkpoint.root / name).exists()]
    elif "encoders" not in checkpoint.meta:
        lines.append("metadata (architecture and statistics)")
    for component, reference in (checkpoint.meta.get("teachers") or {}).items():
        if reference.get("kind") == "file":
            lines.append(f"{component} (a file of features: {reference['path']}, sha256 {reference['sha256']})")
        elif component not in checkpoint.components:
            lines.append(
                f"{component} (a student-only checkpoint references it: {reference['path']}, sha256 of its encoder "
                f"{reference['sha256']})"
            )
    return lines


def _total_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(os.path.getsize(os.path.join(top, name)) for top, _, names in os.walk(path) for name in names)


def inspect_checkpoint(path: str | os.PathLike[str], *, full: bool = False) -> dict[str, Any]:
    """Describe a checkpoint as plain data. Every byte is compared with the checksums of the format.

    Args:
        path: see `open_checkpoint`.
        full: also compare the sha256 of archives in manifests of older versions.

    Returns:
        ``path, format, kind, modality, epoch, step, loss, stage, world_size, size, components, dtypes, architecture,
        labeled_sources, notes, missing, complete, problem``; if it cannot be read, ``complete`` is false and
        ``problem`` is the reason.

    Raises:
        CheckpointError: the path does not exist.
    """
    size = _total_bytes(existing_path(path))
    report: dict[str, Any] = {"path": str(path), "size": size, "complete": False, "problem": ""}
    try:
        checkpoint = open_checkpoint(path, verify=False)
        report["format"] = str(checkpoint.format)
        checkpoint.verify(full=full)  # all files, also the optimizer shards, which `state_dict` may not read
        meta, state_dict = checkpoint.meta, checkpoint.state_dict
    except (CheckpointError, OSError) as error:
        report["problem"] = str(error)
        return report
    architecture, notes = _find_architectures(checkpoint)
    report.update({key: meta.get(key) for key in ("kind", "modality", "epoch", "step", "loss")})
    report.update(
        stage=checkpoint.raw.stage,
        world_size=checkpoint.raw.world_size,
        components=_count_by_component(state_dict),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in state_dict.values())),
        architecture=architecture,
        labeled_sources=[
            {"dataset": source["dataset"], "classes": len(source["classes"])} for source in labeled_sources(meta)
        ],
        notes=[*checkpoint.raw.notes, *notes],
        missing=_list_missing(checkpoint),
        complete=True,
    )
    return report
