"""Files of ``torch.save``: the zip archive, its checksums, and reading without executing code.

Only this module calls ``torch.load``, always with ``weights_only=True``.
"""

import contextlib
import hashlib
import io
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from mmdistill.errors import format_count

_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
# Exceptions of torch's unpickler for bytes that are not a checkpoint.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    struct.error,
    OverflowError,
    MemoryError,
)
_CHUNK_BYTES = 4 << 20  # hashed at a time: large enough that zlib and hashlib release the GIL
THREADS = min(4, os.cpu_count() or 1)


class _StandIn:
    """Replaces a DeepSpeed class that optimizer shards reference. Holds the pickled attributes, has no methods."""


class _ZeroStage(int):
    """Replaces ``deepspeed.runtime.zero.config.ZeroStageEnum``."""


class _FragmentAddress(_StandIn):
    """Replaces ``deepspeed.utils.tensor_fragment.fragment_address``."""


class _LossScaler(_StandIn):
    """Replaces ``deepspeed.runtime.fp16.loss_scaler.LossScaler``."""


class _DynamicLossScaler(_StandIn):
    """Replaces ``DynamicLossScaler``, which fp16 training uses instead of `LossScaler`."""


# The only names outside torch's own list that a checkpoint may reference. DeepSpeed's own classes are never used.
_STAND_INS: list[Any] = [
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


@dataclass(frozen=True)
class Record:
    """A stored file of a zip archive: position of its bytes and their expected CRC-32."""

    name: str
    start: int
    size: int
    crc: int


def is_zip(path: Path) -> bool:
    """Whether the file starts like a zip archive (it may be truncated)."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _truncation_error(path: Path) -> CorruptCheckpointError:
    """Build the error of a truncated zip: the expected size follows from the headers that precede each record."""
    size = path.stat().st_size
    expected, truncated = 0, "its end"
    with path.open("rb") as file:
        while True:
            file.seek(expected)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
                break
            fields = _LOCAL_HEADER.unpack(header)
            name = file.read(fields[9]).decode("utf-8", "replace")
            extra = file.read(fields[10])
            stored = fields[7]
            if stored == 0xFFFFFFFF and len(extra) >= 12 and extra[:2] == b"\x01\x00":
                stored = struct.unpack_from("<Q", extra, 4)[0]
            expected += _LOCAL_HEADER.size + fields[9] + fields[10] + stored
            if fields[2] & 8:
                expected += 24 if fields[7] == 0xFFFFFFFF or stored > 0xFFFFFFF0 else 16
            if expected > size:
                truncated = f"record '{name}'"
                break
    return CorruptCheckpointError(
        f"{path}: truncated: {format_count(size, 'byte')} on disk, at least {max(expected, size + 1)} expected "
        f"({truncated} is incomplete); use another checkpoint or copy it again"
    )


def zip_records(path: Path) -> list[Record]:
    """List the records of an archive. Raises `CorruptCheckpointError` if its directory is damaged or missing."""
    if path.stat().st_size == 0:
        raise CorruptCheckpointError(f"{path}: truncated: the file is empty (0 bytes); use another checkpoint")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = []
            for info in archive.infolist():
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER.size)
                fields = _LOCAL_HEADER.unpack(header)
                if fields[0] != b"PK\x03\x04" or file.read(fields[9]).decode("utf-8") != info.orig_filename:
                    raise CorruptCheckpointError(
                        f"{path}: corrupt: checksum: header of '{info.filename}' is damaged; copy it again"
                    )
                start = info.header_offset + _LOCAL_HEADER.size + fields[9] + fields[10]
                records.append(Record(info.filename, start, info.compress_size, info.CRC))
                if info.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{path}: compressed archive, which torch cannot map; save it again with torch.save"
                    )
            return records
    except (zipfile.BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError, EOFError) as error:
        raise _truncation_error(path) from error


def directory_digest(path: Path) -> str:
    """sha256 of a zip's directory and end records. It covers all content, because the directory holds all CRCs."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(size - start)).hexdigest()


def _crc_matches(handle: int, record: Record) -> bool:
    """Compare a record with its CRC. Reads chunks, because mapped pages would count as memory of the process."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(record.size, 1))))
    crc, offset, end = 0, record.start, record.start + record.size
    while offset < end:
        count = os.preadv(handle, [buffer[: min(end - offset, len(buffer))]], offset)
        if not count:
            return False
        crc = zlib.crc32(buffer[:count], crc)
        offset += count
    return crc == record.crc


def verify_zip(path: Path) -> None:
    """Compare every record of an archive with its CRC-32.

    Raises:
        CorruptCheckpointError: the file is truncated or a record differs.
    """
    records, size = zip_records(path), path.stat().st_size
    if any(record.start + record.size > size for record in records):
        raise _truncation_error(path)
    with path.open("rb") as file, ThreadPoolExecutor(THREADS) as pool:
        matches = list(pool.map(lambda record: _crc_matches(file.fileno(), record), records))
    bad = [record.name for record, match in zip(records, matches, strict=True) if not match]
    if bad:
        raise CorruptCheckpointError(
            f"{path}: corrupt: checksum of {', '.join(bad[:3])} does not match; use another checkpoint or copy it again"
        )


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pickle_bytes(path: Path) -> bytes:
    if not is_zip(path):
        with path.open("rb") as file:
            return file.read(1 << 20)
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def _referenced_names(data: bytes) -> list[str]:
    """List every ``module.name`` that a pickle references, without executing it."""
    names: list[str] = []
    strings: list[str] = []
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
        except (ValueError, UnicodeDecodeError, struct.error, IndexError):
            break
    return names


def _rejection_error(path: Path, error: BaseException) -> CheckpointError:
    """Build the error for a file that torch's restricted unpickler rejects."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.<>]+)", text)
    known = ("torch.", "collections.", "deepspeed.", "numpy.", "_codecs.")
    if found:
        names = [found[1].rstrip(".")]
    else:
        names = [name for name in _referenced_names(_pickle_bytes(path)) if not name.startswith(known)]
    if names:
        return UnsafeCheckpointError(
            f"{path}: rejected: its pickle references '{names[0]}', but only tensors and plain containers are allowed; "
            "no code was executed. If you trust the file, load it in its original environment and save plain tensors"
        )
    reason = text.splitlines()[0][:160] if text else repr(error)
    return CorruptCheckpointError(f"{path}: not a torch file, or damaged ({reason}); use another checkpoint")


@contextlib.contextmanager
def _allow_stand_ins() -> Iterator[None]:
    with torch.serialization.safe_globals(_STAND_INS):
        yield


def read_torch_file(
    path: Path, *, verify: bool = True, mapped: bool = True, real_classes: list[Any] | None = None
) -> Any:
    """Read a ``torch.save`` file (either layout) onto the CPU.

    Args:
        path: the file.
        verify: compare the CRC of each record first.
        mapped: memory-map the tensors of a zip instead of copying them, for callers that copy them later.
        real_classes: classes that are allowed instead of the stand-ins, for DeepSpeed's own loader.

    Raises:
        CorruptCheckpointError: truncated or damaged.
        UnsafeCheckpointError: the pickle references a name that is not allowed; no code was executed.
    """
    size = path.stat().st_size
    if size == 0:
        raise CorruptCheckpointError(f"{path}: truncated: the file is empty (0 bytes); use another checkpoint")
    if not is_zip(path):
        return _unpickle(path, False, real_classes)
    zip_records(path)
    if not verify:
        return _unpickle(path, mapped, real_classes)
    if mapped:  # mapping does not read the data, so there is nothing to overlap
        verify_zip(path)
        return _unpickle(path, True, real_classes)
    with ThreadPoolExecutor(1) as pool:  # checksums are compared while the bytes are copied
        verification = pool.submit(verify_zip, path)
        try:
            content = _unpickle(path, False, real_classes)
        finally:
            verification.result()  # a checksum error explains a failed read better
    return content


def _unpickle(path: Path, mapped: bool, real_classes: list[Any] | None) -> Any:
    allowed = _allow_stand_ins() if real_classes is None else torch.serialization.safe_globals(real_classes)
    try:
        with allowed:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _UNREADABLE as error:
        if isinstance(error, CheckpointError):
            raise
        raise _rejection_error(path, error) from error
