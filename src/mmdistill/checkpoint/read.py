"""Read a checkpoint of any format: tensors under canonical names, and metadata."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.deepspeed_zero import read_zero_checkpoint
from mmdistill.checkpoint.formats.manifest import verify_manifest
from mmdistill.checkpoint.formats.names import META, METADATA_KEY, CheckpointFormat
from mmdistill.checkpoint.formats.safetensors_file import is_safetensors, read_safetensors, read_safetensors_header
from mmdistill.checkpoint.formats.torch_zip import is_zip, read_torch_file, verify_zip
from mmdistill.checkpoint.keys import (
    COMPONENT_PREFIXES,
    canonical_names,
    component_of,
    encoder_roots,
    from_huggingface,
    is_huggingface,
    split_qkv_bias,
)
from mmdistill.checkpoint.locate import Location, locate, read_json

_STATE_DICT_KEYS = ("state_dict", "module", "model")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: tensors and metadata.

    Attributes:
        path: the path as given.
        format: layout on disk.
        state_dict: tensors under canonical names, on the CPU, possibly memory-mapped (copy them before changing them).
        meta: metadata that mmdistill stores; for files of other programs the values that were found (``epoch``,
            ``step``, ``kind``).
        stage, world_size: ZeRO stage and number of ranks of a DeepSpeed directory, else None.
        notes: remarks about the source, one sentence each.
        raw_keys: names of the tensors in the file.
    """

    path: Path
    format: CheckpointFormat
    state_dict: dict[str, Tensor]
    meta: dict[str, Any]
    stage: int | None = None
    world_size: int | None = None
    notes: tuple[str, ...] = ()
    raw_keys: tuple[str, ...] = field(default=(), repr=False)

    @property
    def components(self) -> list[str]:
        """Names of the encoders: ``['encoder']`` or ``['student_rgb', 'teacher_rgb', ...]``."""
        return [component_of(root) for root in encoder_roots(self.state_dict)]


def _select_tensors(entries: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Select the entries that are tensors. Raises `CheckpointError` that names a tensor which cannot be a weight."""
    found = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    for key, tensor in found.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: a tensor has the key {key!r}, which is not a string; use a string")
        if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
            problem = "has no values" if tensor.is_meta else "is quantized" if tensor.is_quantized else "is sparse"
            raise CheckpointError(f"{path}: '{key}' {problem}; save it as a dense tensor")
    return found


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state_dict in the content of a ``.pt`` or ``.ckpt`` file."""
    if isinstance(content, Mapping):
        for key in _STATE_DICT_KEYS:
            inner = content.get(key)
            if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
                return _select_tensors(inner, path)
        if any(isinstance(v, Tensor) for v in content.values()):
            return _select_tensors(content, path)
        found = ", ".join(map(repr, list(content)[:8])) or "nothing"
    else:
        found = type(content).__name__
    raise CheckpointError(
        f"{path}: no tensors under 'state_dict', 'module', 'model' or at the top level, only {found}; "
        "use another checkpoint"
    )


def _find_meta(content: Any) -> dict[str, Any]:
    """Metadata in the content of a pickle: mmdistill's entry, and epoch and step of other programs."""
    if not isinstance(content, Mapping):
        return {}
    meta = dict(content[METADATA_KEY]) if isinstance(content.get(METADATA_KEY), Mapping) else {}
    for key, names in (("epoch", ("epoch",)), ("step", ("global_step", "global_steps", "step"))):
        for name in names:
            if key not in meta and isinstance(content.get(name), int):
                meta[key] = content[name]
    return meta


def to_canonical_state(raw: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename tensors to canonical names. Raises `CheckpointError` that names the file if two names become the same."""
    try:
        names = canonical_names(raw)
        state = {names[key]: tensor for key, tensor in raw.items()}
        if is_huggingface(state):
            state = from_huggingface(state)
        return split_qkv_bias(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(
            f"{path}: the Hugging Face tensor {error} is missing; the file is incomplete, copy it again"
        ) from error


def _infer_kind(state: Mapping[str, Tensor]) -> str:
    if any(key.startswith(COMPONENT_PREFIXES) or key.startswith("cmt.") for key in state):
        return "distill"
    return "pretrain" if any(key.startswith("decoder.") for key in state) else "weights"


def read_meta(location: Location) -> dict[str, Any]:
    """Read only the metadata of a checkpoint, without its tensors if the format allows it."""
    if location.format is CheckpointFormat.DEEPSPEED:
        if (location.root / META).exists():
            return read_json(location.root / META)
        return _find_meta(read_torch_file(location.model_files[0], verify=False))
    if is_safetensors(location.root):
        return _parse_safetensors_meta(read_safetensors_header(location.root)[1], location.root)
    return _find_meta(location.content)


def _parse_safetensors_meta(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        return {}
    try:
        meta = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: corrupt: its '{METADATA_KEY}' metadata is not JSON ({error})") from error
    return meta if isinstance(meta, dict) else {}


def read_checkpoint(source: str | os.PathLike[str] | Location, *, verify: bool = True) -> Checkpoint:
    """Read any checkpoint. Each file is unpickled once; pass the result on instead of reading the path again.

    Args:
        source: a DeepSpeed directory (at any level, or a file inside it), ``.ckpt``, ``.pt``/``.pth``,
            ``.safetensors``, or a Hugging Face folder; or the result of `locate`.
        verify: compare every byte with the checksums of the format (zip CRCs, manifest, safetensors CRCs).

    Raises:
        CheckpointError: or a subclass; one sentence that names the file.
    """
    location = source if isinstance(source, Location) else locate(source)
    stage = world_size = None
    notes: tuple[str, ...] = ()
    if location.format is CheckpointFormat.DEEPSPEED:
        # the payload is checked when it is read, by CRCs that the digests of the manifest cover
        verify_manifest(location.root, payload=False)
        content = read_zero_checkpoint(location, verify=verify)
        raw, stage, world_size, notes = content.weights, content.stage, content.world_size, tuple(content.notes)
        meta = read_json(location.root / META) if (location.root / META).exists() else _find_meta(content.client)
    elif is_safetensors(location.root):
        raw, metadata = read_safetensors(location.root, verify=verify)
        meta = _parse_safetensors_meta(metadata, location.root)
    else:
        if verify and is_zip(location.root):
            verify_zip(location.root)
        raw, meta = _find_state_dict(location.content, location.root), _find_meta(location.content)
    encoders = meta.get("encoders") or {}
    if not isinstance(encoders, dict) or not all(isinstance(fields, dict) for fields in encoders.values()):
        raise CheckpointError(f"{location.given}: 'encoders' in its metadata must map each encoder to its config")
    state = to_canonical_state(raw, location.given)
    if not state:
        raise CheckpointError(f"{location.given}: contains no tensors; use another checkpoint")
    meta.setdefault("kind", _infer_kind(state))
    return Checkpoint(location.given, location.format, state, meta, stage, world_size, notes, tuple(raw))
