"""Reading ``.safetensors`` files: header, checksums, memory-mapped tensors."""

import hashlib
import json
import math
import mmap
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.torch_zip import THREADS
from mmdistill.errors import format_count

TENSOR_CRCS = "mmdistill_crc32"  # metadata: 8 hex digits of CRC-32 per tensor, in the order of the data
DATA_SHA256 = "mmdistill_data_sha256"  # metadata of older versions, in place of TENSOR_CRCS
DTYPES = {
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


def is_safetensors(path: Path) -> bool:
    """Whether the first bytes are a length and the start of a JSON object, or the name ends in ``.safetensors``."""
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (
        len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27
    )


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Read the tensor entries, the metadata and the offset of the data.

    Raises:
        CorruptCheckpointError: the file is truncated or its header is invalid.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or 8 + length > size:
            expected = 8 + length if len(head) == 8 else "more"
            raise CorruptCheckpointError(
                f"{path}: truncated: {format_count(size, 'byte')} on disk, {expected} expected; copy it again"
            )
        try:
            header = dict(json.loads(file.read(length)))
            meta = dict(header.pop("__metadata__", None) or {})
            end = _end_of_data(header)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(
                f"{path}: corrupt: its safetensors header is invalid ({error}); copy it again"
            ) from error
    if 8 + length + end != size:
        word = "truncated" if size < 8 + length + end else "corrupt"
        raise CorruptCheckpointError(
            f"{path}: {word}: {format_count(size, 'byte')} on disk, {8 + length + end} expected; copy it again"
        )
    return header, meta, 8 + length


def _end_of_data(header: Mapping[str, Any]) -> int:
    """Offset of the end of the last tensor. Raises `ValueError` unless the tensors are contiguous and of their size."""
    offset = 0
    for begin, end, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
        dtype, shape = str(header[name]["dtype"]), header[name]["shape"]
        width = DTYPES[dtype].itemsize if dtype in DTYPES else None  # other dtypes are rejected when tensors are read
        valid = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
        if not valid or begin != offset or (width is not None and end - begin != math.prod(shape) * width):
            raise ValueError(f"'{name}': {dtype} {shape} at {begin} to {end}, after a tensor that ends at {offset}")
        offset = end
    return offset


def read_safetensors(path: Path, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, memory-mapped, and the metadata.

    Args:
        path: the file.
        verify: compare the checksums that mmdistill writes, if there are any.

    Raises:
        CorruptCheckpointError: truncated, or a checksum differs.
        CheckpointError: a dtype that is not supported.
    """
    header, meta, start = read_safetensors_header(path)
    if not header:
        return {}, meta
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: changes never reach the file
    if verify:
        with memoryview(mapped) as view, view[start:] as data:
            _verify_tensors(path, header, meta, data)
    tensors = {}
    for name, entry in header.items():
        dtype = DTYPES.get(str(entry["dtype"]))
        if dtype is None:
            raise CheckpointError(
                f"{path}: '{name}' has dtype {entry['dtype']}, which is not supported; save it in another dtype"
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
    """Compare the checksums in the metadata. Raises `CorruptCheckpointError` that names the tensor."""
    if DATA_SHA256 in meta and hashlib.sha256(data).hexdigest() != meta[DATA_SHA256]:
        raise CorruptCheckpointError(f"{path}: corrupt: checksum of its tensors does not match; copy it again")
    if TENSOR_CRCS not in meta:
        return
    tensors = sorted((entry["data_offsets"], name) for name, entry in header.items())
    stored = [meta[TENSOR_CRCS][8 * i : 8 * i + 8] for i in range(len(tensors))]
    if len(meta[TENSOR_CRCS]) != 8 * len(tensors):
        raise CorruptCheckpointError(f"{path}: corrupt: some tensors have no checksum; copy it again")
    with ThreadPoolExecutor(THREADS) as pool:  # zlib releases the GIL
        found = list(pool.map(lambda tensor: f"{zlib.crc32(data[slice(*tensor[0])]):08x}", tensors))
    bad = [name for (_, name), crc, expected in zip(tensors, found, stored, strict=True) if crc != expected]
    if bad:
        raise CorruptCheckpointError(f"{path}: corrupt: checksum of '{bad[0]}' does not match; copy it again")
