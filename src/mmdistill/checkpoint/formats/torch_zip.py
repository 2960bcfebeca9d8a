"""Files of ``torch.save``: the zip archive, its checksums, and reading without executing code.

Only this module calls ``torch.load``, always with ``weights_only=True``.
"""

import contextlib
import hashlib
import io
import os
import pickletools
import re
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from mmdistill.errors import format_count

# Exceptions of `zipfile` for damaged archives: RuntimeError for flags such as "encrypted", ValueError for texts.
_BAD_ZIP = (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, LookupError, OSError, struct.error)
_CHUNK_BYTES = 4 << 20  # read at a time: large enough that zlib releases the GIL
THREADS = min(4, os.cpu_count() or 1)


class _StandIn:
    """Replaces a harmless class that checkpoints reference. Holds the pickled attributes, executes nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def _make_dict(*_: Any) -> dict[Any, Any]:
    """Replaces ``collections.defaultdict``, because torch fills only plain dicts."""
    return {}


class _ZeroStage(int):
    """Replaces DeepSpeed's ``ZeroStageEnum``."""


# Names of harmless classes in the training state and the arguments that other programs save. Stand-ins replace them.
_HARMLESS_NAMES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    ),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"omegaconf.{name}"
        for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata")
    ),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path", "Enum")
    ),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "set", "int", "float", "bool", "str", "bytes")),
    "typing.Any",
)
# The only names outside torch's own list that a checkpoint may reference. Their own classes are never used.
_STAND_INS: list[Any] = [
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_make_dict, "collections.defaultdict"),
    *((_StandIn, name) for name in _HARMLESS_NAMES),
]


def is_zip(path: Path) -> bool:
    """Whether the file starts like a zip archive (it may be truncated)."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def is_pickle(path: Path) -> bool:
    """Whether the file starts like a pickle of protocol 2 or higher, as those of torch before version 1.6."""
    with path.open("rb") as file:
        head = file.read(2)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open an archive of ``torch.save``.

    Raises:
        CorruptCheckpointError: its directory, which is at its end, is missing or damaged.
        CheckpointError: its records are compressed.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _BAD_ZIP as error:
        raise CorruptCheckpointError(
            f"{path}: truncated: {format_count(path.stat().st_size, 'byte')} on disk, more expected, or its end is "
            f"damaged ({error}); use another checkpoint or copy it again"
        ) from error
    if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
        archive.close()
        raise CheckpointError(f"{path}: compressed archive, which torch cannot map; save it again with torch.save")
    return archive


def directory_digest(path: Path) -> str:
    """sha256 of a zip's directory and end records. It covers all content, because the directory holds all CRCs."""
    with open_zip(path) as archive, path.open("rb") as file:
        file.seek(archive.start_dir)
        return hashlib.sha256(file.read()).hexdigest()


def verify_zip(path: Path) -> None:
    """Compare every record of an archive with its header and its CRC-32.

    Raises:
        CorruptCheckpointError: the file is truncated or a record differs.
    """

    def is_intact(record: zipfile.ZipInfo) -> bool:
        try:
            with archive.open(record) as file:
                while file.read(_CHUNK_BYTES):  # compares the CRC at the end; not mapped: that would count as memory
                    pass
        except _BAD_ZIP:
            return False
        return True

    with open_zip(path) as archive, ThreadPoolExecutor(THREADS) as pool:
        records = archive.infolist()
        bad = [record.filename for record, ok in zip(records, pool.map(is_intact, records), strict=True) if not ok]
    if bad:
        raise CorruptCheckpointError(
            f"{path}: corrupt: checksum of {', '.join(bad[:3])} does not match; use another checkpoint or copy it again"
        )


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _referenced_names(path: Path) -> list[str]:
    """List every ``module.name`` that the pickles of a file reference, without executing them."""
    if is_zip(path):
        with zipfile.ZipFile(path) as archive:
            data = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    else:
        with path.open("rb") as file:
            data = file.read(1 << 20)
    names: list[str] = []
    strings: list[str] = []
    stream = io.BytesIO(data)
    with contextlib.suppress(ValueError, struct.error, IndexError):  # after the last pickle
        while stream.tell() < len(data):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return names


def _rejection_error(path: Path, error: Exception) -> CheckpointError:
    """Build the error for a file that torch's restricted unpickler rejects."""
    text = str(error)
    known = ("torch.", "collections.", "deepspeed.", "numpy.", "_codecs.")
    if found := re.search(r"GLOBAL ([\w.<>]+)", text):
        names = [found[1].rstrip(".")]
    else:
        names = [name for name in _referenced_names(path) if not name.startswith(known) and name not in _HARMLESS_NAMES]
    if names:
        return UnsafeCheckpointError(
            f"{path}: rejected: its pickle references '{names[0]}', but only tensors, plain containers and "
            "values of argparse, pathlib, NumPy and OmegaConf are allowed; no code was executed. If you trust the "
            "file, load it in its original environment and save plain tensors"
        )
    reason = text.splitlines()[0][:160] if text else repr(error)
    return CorruptCheckpointError(f"{path}: not a torch file, or damaged ({reason}); use another checkpoint")


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
    if path.stat().st_size == 0:
        raise CorruptCheckpointError(f"{path}: truncated: the file is empty (0 bytes); use another checkpoint")
    is_archive = is_zip(path)
    if is_archive:
        open_zip(path).close()

    def unpickle() -> Any:
        with torch.serialization.safe_globals(_STAND_INS if real_classes is None else real_classes):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_archive)
            except OSError:
                raise
            except Exception as error:  # bytes that are not a checkpoint raise anything
                raise _rejection_error(path, error) from error

    if not (verify and is_archive):
        return unpickle()
    if mapped:  # mapping does not read the data, so there is nothing to overlap
        verify_zip(path)
        return unpickle()
    with ThreadPoolExecutor(1) as pool:  # checksums are compared while the bytes are copied
        verification = pool.submit(verify_zip, path)
        try:
            return unpickle()
        finally:
            verification.result()  # a checksum error explains a failed read better
