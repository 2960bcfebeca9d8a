"""``.safetensors`` files with checksums in their metadata."""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.names import METADATA_KEY
from mmdistill.checkpoint.formats.torch_zip import THREADS
from mmdistill.checkpoint.write import DirectFile, stage_file
from mmdistill.errors import format_count

TENSOR_CRCS = "mmdistill_crc32"  # metadata: 8 hex digits of CRC-32 per tensor, in the order of the data
DATA_SHA256 = "mmdistill_data_sha256"  # metadata of older versions, in place of TENSOR_CRCS
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def is_safetensors(path: Path) -> bool:
    """Whether the first bytes are a length and the start of a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class SafetensorsContent(NamedTuple):
    """Tensors in the order of the data, mmdistill's metadata, and all metadata of the format."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> SafetensorsContent:
    """Read tensors, memory-mapped (changes do not reach the file), and metadata; `verify_safetensors` reads the data.

    Raises:
        CorruptCheckpointError: truncated, or the header is invalid.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        meta = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        size = format_count(path.stat().st_size, "byte")
        is_truncated = any(text in str(error) for text in ("too small", "header length", "not fully covered"))
        problem = f"truncated: {size} on disk, another size expected" if is_truncated else "corrupt"
        raise CorruptCheckpointError(f"{path}: {problem} ({error}); copy it again") from error
    return SafetensorsContent(tensors, meta if isinstance(meta, dict) else {}, metadata)


def verify_safetensors(path: Path, content: SafetensorsContent) -> None:
    """Compare tensors with the checksums that mmdistill writes, if there are any.

    Raises:
        CorruptCheckpointError: a checksum differs.
    """
    tensors, _, meta = content
    if DATA_SHA256 in meta:
        digest = hashlib.sha256()
        for tensor in tensors.values():
            digest.update(tensor_bytes(tensor))
        if digest.hexdigest() != meta[DATA_SHA256]:
            raise CorruptCheckpointError(f"{path}: corrupt: checksum of its tensors does not match; copy it again")
    if TENSOR_CRCS not in meta:
        return
    stored = [meta[TENSOR_CRCS][i : i + 8] for i in range(0, len(meta[TENSOR_CRCS]), 8)]
    if len(stored) != len(tensors):
        raise CorruptCheckpointError(f"{path}: corrupt: some tensors have no checksum; copy it again")
    with ThreadPoolExecutor(THREADS) as pool:  # zlib releases the GIL
        found = list(pool.map(lambda tensor: f"{zlib.crc32(tensor_bytes(tensor)):08x}", tensors.values()))
    bad = [name for name, crc, expected in zip(tensors, found, stored, strict=True) if crc != expected]
    if bad:
        raise CorruptCheckpointError(f"{path}: corrupt: checksum of '{bad[0]}' does not match; copy it again")


def save_safetensors(state: Mapping[str, Tensor], path: str | PathLike[str], meta: Mapping[str, Any]) -> None:
    """Write tensors as ``.safetensors``, atomically, with `meta` as JSON and the CRC-32 of each tensor in the header.

    The library's writer needs the checksums before it writes, and its data reach the disk only in the final fsync.
    Here both overlap with the write.

    Raises:
        CheckpointError: not writable, or a dtype that the format does not have.
    """
    target = Path(path).expanduser()
    # sorted by decreasing element size, so that every tensor is aligned to its element size
    order = sorted(state, key=lambda name: (-state[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor, start = state[name], end
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{target}: '{name}' has dtype {tensor.dtype}, which safetensors does not support")
        end += tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    placeholder = "0" * 8 * len(order)
    metadata = {"format": "pt", METADATA_KEY: json.dumps(dict(meta), sort_keys=True), TENSOR_CRCS: placeholder}
    head = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    size = 8 + len(head) + end
    with stage_file(target, lambda: size) as staged, DirectFile(staged) as file, ThreadPoolExecutor(1) as executor:
        file.write(struct.pack("<Q", len(head)) + head)
        crcs = []
        for name in order:
            data = tensor_bytes(state[name])
            crc = executor.submit(zlib.crc32, data)  # zlib releases the GIL
            file.write(data)
            crcs.append(f"{crc.result():08x}")
        file.seek(8 + head.rindex(placeholder.encode()))
        file.write("".join(crcs).encode())
        file.finish()
