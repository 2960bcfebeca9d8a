"""Bytes of one file: the zip archive that ``torch.save`` writes, its checksums, and reading it without running code.

``torch.load`` is called here and nowhere else, always with ``weights_only=True``.
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

_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
# What torch's unpickler raises on bytes that are not a checkpoint.
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
_CHUNK = 4 << 20  # bytes hashed at a time: large enough that zlib and hashlib release the interpreter lock
THREADS = min(4, os.cpu_count() or 1)


class _Inert:
    """Stands for a DeepSpeed class that optimizer shards name. It holds the pickled attributes and does nothing."""


class _ZeroStage(int):
    """Stands for ``deepspeed.runtime.zero.config.ZeroStageEnum``."""


class _FragmentAddress(_Inert):
    """Stands for ``deepspeed.utils.tensor_fragment.fragment_address``."""


class _LossScaler(_Inert):
    """Stands for ``deepspeed.runtime.fp16.loss_scaler.LossScaler``."""


class _DynamicLossScaler(_Inert):
    """Stands for ``DynamicLossScaler``, which fp16 training has in the place of `LossScaler`."""


# The only names beyond torch's own list that a checkpoint may use. None of them is DeepSpeed's real class.
_STANDINS: list[Any] = [
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


@dataclass(frozen=True)
class Record:
    """One stored file of a zip archive: where its bytes lie and what their CRC-32 must be."""

    name: str
    start: int
    size: int
    crc: int


def is_zip(path: Path) -> bool:
    """Whether the file begins like a zip archive (it may still be cut off)."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _cut_off(path: Path) -> CorruptCheckpointError:
    """Say how far a zip without its directory reaches, from the headers that precede each record."""
    size = path.stat().st_size
    needed, cut = 0, "its end"
    with path.open("rb") as file:
        while True:
            file.seek(needed)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
                break
            fields = _LOCAL_HEADER.unpack(header)
            name = file.read(fields[9]).decode("utf-8", "replace")
            extra = file.read(fields[10])
            stored = fields[7]
            if stored == 0xFFFFFFFF and len(extra) >= 12 and extra[:2] == b"\x01\x00":
                stored = struct.unpack_from("<Q", extra, 4)[0]
            needed += _LOCAL_HEADER.size + fields[9] + fields[10] + stored
            if fields[2] & 8:
                needed += 24 if fields[7] == 0xFFFFFFFF or stored > 0xFFFFFFF0 else 16
            if needed > size:
                cut = f"record '{name}'"
                break
    return CorruptCheckpointError(
        f"{path}: truncated: {size} bytes on disk, at least {max(needed, size + 1)} expected ({cut} is cut off); "
        "use another checkpoint or copy it again"
    )


def zip_records(path: Path) -> list[Record]:
    """Records of an archive. Raises `CorruptCheckpointError` if its directory is damaged or missing."""
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
                    raise CorruptCheckpointError(f"{path}: corrupt: checksum: header of '{info.filename}' is damaged")
                start = info.header_offset + _LOCAL_HEADER.size + fields[9] + fields[10]
                records.append(Record(info.filename, start, info.compress_size, info.CRC))
                if info.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{path}: compressed archive; torch never writes these, unpack and save it again"
                    )
            return records
    except (zipfile.BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError, EOFError) as error:
        raise _cut_off(path) from error


def directory_digest(path: Path) -> str:
    """sha256 of a zip's directory and end records. It holds every record's CRC, so it names the whole content."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(size - start)).hexdigest()


def _crc_matches(handle: int, record: Record) -> bool:
    """Read in chunks, not mapped: mapped pages would count as the process's memory."""
    buffer = memoryview(bytearray(min(_CHUNK, max(record.size, 1))))
    crc, at, end = 0, record.start, record.start + record.size
    while at < end:
        count = os.preadv(handle, [buffer[: min(end - at, len(buffer))]], at)
        if not count:
            return False
        crc = zlib.crc32(buffer[:count], crc)
        at += count
    return crc == record.crc


def verify_zip(path: Path) -> None:
    """Check every record of an archive against its CRC-32.

    Raises:
        CorruptCheckpointError: truncated, or some byte of a record differs.
    """
    records, size = zip_records(path), path.stat().st_size
    if any(record.start + record.size > size for record in records):
        raise _cut_off(path)
    with path.open("rb") as file, ThreadPoolExecutor(THREADS) as pool:
        good = list(pool.map(lambda record: _crc_matches(file.fileno(), record), records))
    bad = [record.name for record, ok in zip(records, good, strict=True) if not ok]
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


def _named_globals(data: bytes) -> list[str]:
    """Every ``module.name`` that a pickle asks for, read without running it."""
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


def _refusal(path: Path, error: BaseException) -> CheckpointError:
    """The one sentence for a file that torch's restricted unpickler does not take."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.<>]+)", text)
    known = ("torch.", "collections.", "deepspeed.", "numpy.", "_codecs.")
    names = (
        [found[1].rstrip(".")] if found else [n for n in _named_globals(_pickle_bytes(path)) if not n.startswith(known)]
    )
    if names:
        return UnsafeCheckpointError(
            f"{path}: refused: its pickle asks for '{names[0]}', and only tensors and plain containers are read; "
            "nothing was run. If you trust the file, load it where it was made and save plain tensors"
        )
    reason = text.splitlines()[0][:160] if text else repr(error)
    return CorruptCheckpointError(f"{path}: not a torch file, or a damaged one ({reason}); use another checkpoint")


@contextlib.contextmanager
def _standins() -> Iterator[None]:
    with torch.serialization.safe_globals(_STANDINS):
        yield


def load_pickle(path: Path, *, verify: bool = True, mapped: bool = True, real_classes: list[Any] | None = None) -> Any:
    """Read a ``torch.save`` file (either layout) onto the CPU.

    Args:
        path: the file.
        verify: check the CRC of each record first.
        mapped: map the tensors of a zip instead of copying them; for readers that copy them on.
        real_classes: classes to admit in the place of the stand-ins, for DeepSpeed's own loader.

    Raises:
        CorruptCheckpointError: truncated or damaged.
        UnsafeCheckpointError: the pickle names something that is not on the list; nothing was run.
    """
    size = path.stat().st_size
    if size == 0:
        raise CorruptCheckpointError(f"{path}: truncated: the file is empty (0 bytes); use another checkpoint")
    if not is_zip(path):
        return _unpickle(path, False, real_classes)
    zip_records(path)
    if not verify:
        return _unpickle(path, mapped, real_classes)
    if mapped:  # mapping reads nothing, so there is nothing to overlap
        verify_zip(path)
        return _unpickle(path, True, real_classes)
    with ThreadPoolExecutor(1) as pool:  # checksums are compared while the bytes are copied
        checking = pool.submit(verify_zip, path)
        try:
            content = _unpickle(path, False, real_classes)
        finally:
            checking.result()  # damage is the better explanation of a failed read
    return content


def _unpickle(path: Path, mapped: bool, real_classes: list[Any] | None) -> Any:
    allowed = _standins() if real_classes is None else torch.serialization.safe_globals(real_classes)
    try:
        with allowed:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _UNREADABLE as error:
        if isinstance(error, CheckpointError):
            raise
        raise _refusal(path, error) from error
