"""Inspect a checkpoint without loading it into a module."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdistill.checkpoint.architecture import decoder_config_from_tensors, encoder_config_from_tensors
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.manifest import verify_manifest
from mmdistill.checkpoint.formats.names import MANIFEST, META, CheckpointFormat
from mmdistill.checkpoint.keys import component_of, encoder_roots, top_level
from mmdistill.checkpoint.locate import Location, existing_path, locate
from mmdistill.checkpoint.read import Checkpoint, read_checkpoint


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
    stored = checkpoint.meta.get("encoders") or {}
    for root in encoder_roots(checkpoint.state_dict):
        component = component_of(root)
        if component in stored:
            found[component] = stored[component]
            continue
        tensors = {k.removeprefix(root): v for k, v in checkpoint.state_dict.items() if k.startswith(root)}
        try:
            config, assumptions = encoder_config_from_tensors(tensors)
        except CheckpointError as error:
            notes.append(f"{component}: {error}")
            continue
        found[component] = asdict(config)
        notes += [f"{component}: {line}" for line in assumptions]
    try:
        decoder = decoder_config_from_tensors(checkpoint.state_dict)
    except CheckpointError as error:
        notes.append(f"decoder: {error}")
    else:
        if checkpoint.meta.get("decoder") or decoder:
            found["decoder"] = checkpoint.meta.get("decoder") or (asdict(decoder) if decoder else None)
    return found, notes


def _list_missing(location: Location, meta: Mapping[str, Any], components: Sequence[str]) -> list[str]:
    """List what complete checkpoints of mmdistill contain and this one does not. These are not errors."""
    lines = []
    if location.format is CheckpointFormat.DEEPSPEED:
        for name, use in ((MANIFEST, "checksums"), (META, "architecture and statistics")):
            if not (location.root / name).exists():
                lines.append(f"{name} ({use})")
    elif "encoders" not in meta:
        lines.append("metadata (architecture and statistics)")
    for component, reference in (meta.get("teachers") or {}).items():
        if component not in components:
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
        path: anything that `read_checkpoint` reads.
        full: also compare the sha256 of archives in manifests of older versions.

    Returns:
        ``path, format, kind, modality, epoch, step, loss, stage, world_size, size, components, dtypes, architecture,
        notes, missing, complete, problem``; if it cannot be read, ``complete`` is false and ``problem`` is the reason.

    Raises:
        CheckpointError: the path does not exist.
    """
    resolved = existing_path(path)
    report: dict[str, Any] = {"path": str(path), "size": _total_bytes(resolved), "complete": False, "problem": ""}
    try:
        location = locate(path)
        report["format"] = str(location.format)
        if full and location.format is CheckpointFormat.DEEPSPEED:
            verify_manifest(location.root, full=True)
        if location.format is CheckpointFormat.DEEPSPEED:
            verify_manifest(location.root)  # also the optimizer shards, which read_checkpoint may not read
        checkpoint = read_checkpoint(location)
    except (CheckpointError, OSError) as error:
        report["problem"] = str(error)
        return report
    architecture, notes = _find_architectures(checkpoint)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.state_dict.values())
    report.update({key: checkpoint.meta.get(key) for key in ("kind", "modality", "epoch", "step", "loss")})
    report.update(
        stage=checkpoint.stage,
        world_size=checkpoint.world_size,
        components=_count_by_component(checkpoint.state_dict),
        dtypes=dict(dtypes),
        architecture=architecture,
        notes=[*checkpoint.notes, *notes],
        missing=_list_missing(location, checkpoint.meta, checkpoint.components),
        complete=True,
    )
    return report
