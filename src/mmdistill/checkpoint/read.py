"""Any checkpoint to canonical names and metadata."""

import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.deepspeed_zero import read_zero
from mmdistill.checkpoint.formats.manifest import verify_manifest
from mmdistill.checkpoint.formats.names import META, CheckpointFormat
from mmdistill.checkpoint.formats.torch_zip import THREADS, is_zip, load_pickle, verify_zip
from mmdistill.checkpoint.keys import (
    COMPONENT_PREFIXES,
    canonical_names,
    encoder_roots,
    from_huggingface,
    is_huggingface,
    part_of,
    split_qkv_bias,
)
from mmdistill.checkpoint.locate import Location, is_safetensors, locate, read_json

EMBEDDED = "mmdistill"  # key of the metadata inside a file
TENSOR_CRCS = "mmdistill_crc32"  # of a .safetensors file: 8 hex digits for each tensor, in the order of the data
DATA_SHA256 = "mmdistill_data_sha256"  # what older versions wrote in its place
_WEIGHT_KEYS = ("state_dict", "module", "model")
_ST_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Attributes:
        path: the path as given.
        format: its layout.
        state_dict: tensors under canonical names, on the CPU, possibly mapped from the file (copy before changing
            them).
        meta: the metadata that travels with our checkpoints; for others what could be found (``epoch``, ``step``,
            ``kind``).
        stage, world_size: of a DeepSpeed directory, else None.
        notes: what a reader should know about the source, a sentence each.
        raw_keys: names in the file, for `inspect`.
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
    def parts(self) -> list[str]:
        """Names of the encoders inside: ``['encoder']`` or ``['student_rgb', 'teacher_rgb', ...]``."""
        return [part_of(root) for root in encoder_roots(self.state_dict)]


def safetensors_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Entries, metadata and the offset of the data. Raises `CorruptCheckpointError` if cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or 8 + length > size:
            expected = 8 + length if len(head) == 8 else "more"
            raise CorruptCheckpointError(f"{path}: truncated: {size} bytes on disk, {expected} expected; copy it again")
        try:
            header = dict(json.loads(file.read(length)))
            meta = dict(header.pop("__metadata__", None) or {})
            end = _end_of_data(header)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(
                f"{path}: corrupt: its header is not that of a safetensors file ({error})"
            ) from error
    if 8 + length + end != size:
        word = "truncated" if size < 8 + length + end else "corrupt"
        raise CorruptCheckpointError(
            f"{path}: {word}: {size} bytes on disk, {8 + length + end} expected; copy it again"
        )
    return header, meta, 8 + length


def _end_of_data(header: Mapping[str, Any]) -> int:
    """Where the last tensor ends. Raises `ValueError` unless tensors of their size lie one behind the other."""
    at = 0
    for begin, end, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
        dtype, shape = str(header[name]["dtype"]), header[name]["shape"]
        width = _ST_DTYPES[dtype].itemsize if dtype in _ST_DTYPES else None  # others are refused when they are read
        whole = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
        if not whole or begin != at or (width is not None and end - begin != math.prod(shape) * width):
            raise ValueError(f"'{name}': {dtype} {shape} at {begin} to {end}, behind a tensor that ends at {at}")
        at = end
    return at


def _read_safetensors(path: Path, verify: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    header, meta, start = safetensors_header(path)
    if not header:
        return {}, meta
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: nothing can reach the file
    if verify:
        with memoryview(mapped) as view, view[start:] as data:
            _verify_tensors(path, header, meta, data)
    tensors = {}
    for name, entry in header.items():
        dtype = _ST_DTYPES.get(str(entry["dtype"]))
        if dtype is None:
            raise CheckpointError(
                f"{path}: '{name}' has dtype {entry['dtype']}, which is not read here; convert it first"
            )
        begin, end = entry["data_offsets"]
        count = (end - begin) // dtype.itemsize
        flat = (
            torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin)
            if count
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(entry["shape"])
    return tensors, meta


def _verify_tensors(path: Path, header: Mapping[str, Any], meta: Mapping[str, str], data: memoryview) -> None:
    """Compare the checksums that our ``.safetensors`` carry. Raises `CorruptCheckpointError` naming the tensor."""
    if DATA_SHA256 in meta and hashlib.sha256(data).hexdigest() != meta[DATA_SHA256]:
        raise CorruptCheckpointError(f"{path}: corrupt: checksum of its tensors does not match; copy it again")
    if TENSOR_CRCS not in meta:
        return
    places = sorted((entry["data_offsets"], name) for name, entry in header.items())
    stored = [meta[TENSOR_CRCS][8 * i : 8 * i + 8] for i in range(len(places))]
    if len(meta[TENSOR_CRCS]) != 8 * len(places):
        raise CorruptCheckpointError(f"{path}: corrupt: checksum missing of some of its tensors; copy it again")
    with ThreadPoolExecutor(THREADS) as pool:  # zlib releases the interpreter lock
        found = list(pool.map(lambda place: f"{zlib.crc32(data[slice(*place[0])]):08x}", places))
    bad = [name for (_, name), crc, wanted in zip(places, found, stored, strict=True) if crc != wanted]
    if bad:
        raise CorruptCheckpointError(f"{path}: corrupt: checksum of '{bad[0]}' does not match; copy it again")


def _plain(entries: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors among some entries. Raises `CheckpointError` naming one that is no weight."""
    found = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    for key, tensor in found.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: a tensor has the key {key!r}, and weights have names; save it under one")
        if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
            kind = "holds no values" if tensor.is_meta else "is quantized" if tensor.is_quantized else "is sparse"
            raise CheckpointError(f"{path}: '{key}' {kind}; save it as an ordinary dense tensor")
    return found


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict inside whatever a ``.pt`` or ``.ckpt`` holds."""
    if isinstance(content, Mapping):
        for key in _WEIGHT_KEYS:
            inner = content.get(key)
            if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
                return _plain(inner, path)
        if any(isinstance(v, Tensor) for v in content.values()):
            return _plain(content, path)
        held = ", ".join(map(repr, list(content)[:8])) or "nothing"
    else:
        held = type(content).__name__
    raise CheckpointError(f"{path}: no tensors under 'state_dict', 'module', 'model' or at its top (it holds {held})")


def _found_meta(content: Any) -> dict[str, Any]:
    """Metadata inside a pickle: ours whole, of others the epoch and step."""
    if not isinstance(content, Mapping):
        return {}
    meta = dict(content[EMBEDDED]) if isinstance(content.get(EMBEDDED), Mapping) else {}
    for ours, names in (("epoch", ("epoch",)), ("step", ("global_step", "global_steps", "step"))):
        for name in names:
            if ours not in meta and isinstance(content.get(name), int):
                meta[ours] = content[name]
    return meta


def canonical_state(raw: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors under canonical names. Raises `CheckpointError` naming the file if two become one."""
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
            f"{path}: Hugging Face names without their partner {error}; the file is incomplete"
        ) from error


def _kind(state: Mapping[str, Tensor]) -> str:
    if any(key.startswith(COMPONENT_PREFIXES) or key.startswith("cmt.") for key in state):
        return "distill"
    return "pretrain" if any(key.startswith("decoder.") for key in state) else "weights"


def read_meta(place: Location) -> dict[str, Any]:
    """Only the metadata of a checkpoint, without its tensors where the layout allows that."""
    if place.format is CheckpointFormat.DEEPSPEED:
        if (place.root / META).exists():
            return read_json(place.root / META)
        return _found_meta(load_pickle(place.model_files[0], verify=False))
    if is_safetensors(place.root):
        return _safetensors_meta(safetensors_header(place.root)[1], place.root)
    return _found_meta(place.content)


def _safetensors_meta(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if EMBEDDED not in metadata:
        return {}
    try:
        meta = json.loads(metadata[EMBEDDED])
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: corrupt: its '{EMBEDDED}' metadata is not JSON ({error})") from error
    return meta if isinstance(meta, dict) else {}


def read_checkpoint(source: str | os.PathLike[str] | Location, *, verify: bool = True) -> Checkpoint:
    """Read any checkpoint. Each file is unpickled once; pass the result on instead of reading the path again.

    Args:
        source: a DeepSpeed directory (at any level, or a file inside it), ``.ckpt``, ``.pt``/``.pth``,
            ``.safetensors``, or a Hugging Face folder; or its `locate`.
        verify: compare every byte with the checksums that the format carries (zip CRCs, manifest, safetensors CRCs).

    Raises:
        CheckpointError: or a subclass; one sentence naming the file.
    """
    place = source if isinstance(source, Location) else locate(source)
    stage = world = None
    notes: tuple[str, ...] = ()
    if place.format is CheckpointFormat.DEEPSPEED:
        # payloads are checked while they are read, by the CRCs that the manifest's digests name
        verify_manifest(place.root, payload=False)
        content = read_zero(place, verify=verify)
        raw, stage, world, notes = content.weights, content.stage, content.world_size, tuple(content.notes)
        meta = read_json(place.root / META) if (place.root / META).exists() else _found_meta(content.client)
    elif is_safetensors(place.root):
        raw, metadata = _read_safetensors(place.root, verify)
        meta = _safetensors_meta(metadata, place.root)
    else:
        if verify and is_zip(place.root):
            verify_zip(place.root)
        raw, meta = _tensors(place.content, place.root), _found_meta(place.content)
    told = meta.get("encoders")
    if not isinstance(told or {}, dict) or not all(isinstance(fields, dict) for fields in (told or {}).values()):
        raise CheckpointError(f"{place.given}: 'encoders' of its metadata should hold the geometry of each encoder")
    state = canonical_state(raw, place.given)
    if not state:
        raise CheckpointError(f"{place.given}: holds no tensors")
    meta.setdefault("kind", _kind(state))
    return Checkpoint(place.given, place.format, state, meta, stage, world, notes, tuple(raw))
