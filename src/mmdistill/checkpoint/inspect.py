"""What a checkpoint is, without loading it into anything."""

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
from mmdistill.checkpoint.keys import encoder_roots, part_of, top_level
from mmdistill.checkpoint.locate import Location, existing, locate
from mmdistill.checkpoint.read import Checkpoint, read_checkpoint


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        part = parts.setdefault(top_level(name), {"tensors": 0, "parameters": 0})
        part["tensors"] += 1
        part["parameters"] += tensor.numel()
    return parts


def _geometries(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """Of each encoder, and of the decoder: from the metadata, else from the tensors."""
    found: dict[str, Any] = {}
    notes: list[str] = []
    told = checkpoint.meta.get("encoders") or {}
    for root in encoder_roots(checkpoint.state_dict):
        part = part_of(root)
        if part in told:
            found[part] = told[part]
            continue
        tensors = {k.removeprefix(root): v for k, v in checkpoint.state_dict.items() if k.startswith(root)}
        try:
            geometry, assumed = encoder_config_from_tensors(tensors)
        except CheckpointError as error:
            notes.append(f"{part}: {error}")
            continue
        found[part] = asdict(geometry)
        notes += [f"{part}: {line}" for line in assumed]
    try:
        decoder = decoder_config_from_tensors(checkpoint.state_dict)
    except CheckpointError as error:
        notes.append(f"decoder: {error}")
    else:
        if checkpoint.meta.get("decoder") or decoder:
            found["decoder"] = checkpoint.meta.get("decoder") or (asdict(decoder) if decoder else None)
    return found, notes


def _missing(place: Location, meta: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """What a checkpoint of ours has and this one does not. Not errors: files of others are like that."""
    lines = []
    if place.format is CheckpointFormat.DEEPSPEED:
        for name, use in ((MANIFEST, "checksums"), (META, "architecture and statistics")):
            if not (place.root / name).exists():
                lines.append(f"{name} ({use})")
    elif "encoders" not in meta:
        lines.append("metadata (architecture and statistics)")
    for part, named in (meta.get("teachers") or {}).items():
        if part not in parts:
            lines.append(f"{part} (slim file; it is in {named['path']}, sha256 of its encoder {named['sha256']})")
    return lines


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(os.path.getsize(os.path.join(top, name)) for top, _, names in os.walk(path) for name in names)


def inspect_checkpoint(path: str | os.PathLike[str], *, full: bool = False) -> dict[str, Any]:
    """Everything about a checkpoint as plain data. Every byte is compared with the checksums that the format carries.

    Args:
        path: as `read_checkpoint`.
        full: also compare the sha256 of archives that manifests of older versions hold.

    Returns:
        ``path, format, kind, modality, epoch, step, loss, stage, world_size, size, parts, dtypes, geometry, notes,
        missing, complete, problem``; where it cannot be read, ``complete`` is false and ``problem`` says why.

    Raises:
        CheckpointError: nothing is there.
    """
    where = existing(path)
    report: dict[str, Any] = {"path": str(path), "size": _size(where), "complete": False, "problem": ""}
    try:
        place = locate(path)
        report["format"] = str(place.format)
        if full and place.format is CheckpointFormat.DEEPSPEED:
            verify_manifest(place.root, full=True)
        if place.format is CheckpointFormat.DEEPSPEED:
            verify_manifest(place.root)  # optimizer shards too, which reading weights may not touch
        checkpoint = read_checkpoint(place)
    except (CheckpointError, OSError) as error:
        report["problem"] = str(error)
        return report
    geometry, notes = _geometries(checkpoint)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.state_dict.values())
    report.update({key: checkpoint.meta.get(key) for key in ("kind", "modality", "epoch", "step", "loss")})
    report.update(
        stage=checkpoint.stage,
        world_size=checkpoint.world_size,
        parts=_parts(checkpoint.state_dict),
        dtypes=dict(dtypes),
        geometry=geometry,
        notes=[*checkpoint.notes, *notes],
        missing=_missing(place, checkpoint.meta, checkpoint.parts),
        complete=True,
    )
    return report
