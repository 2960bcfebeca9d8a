"""Atomic writes of checkpoint files and directories.

Everything is written under a temporary name in the folder of its target (never in ``$TMPDIR``, which may be on another,
full disk), synced, and renamed.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.names import METADATA_KEY, OLD_PREFIX, TMP_PREFIX
from mmdistill.checkpoint.formats.safetensors_file import DTYPES, TENSOR_CRCS
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.checkpoint.locate import existing_path

log = logging.getLogger(__name__)

_WRITEBACK_BYTES = 16 << 20  # after so many bytes the kernel is asked to start writing them to disk
_CRC_PLACEHOLDER = "0" * 8  # for the CRC-32 of a tensor in hex, which is known only after the tensor was written
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DirectFile:
    """An unbuffered file for writing; `finish` returns when its bytes are on disk.

    Writing to disk starts after the first 16 MB and overlaps with the rest, instead of in the final fsync.
    """

    def __init__(self, path: Path) -> None:
        """Create or truncate the file."""
        self._file: IO[bytes] = path.open("w+b", buffering=0)
        self._writeback_offset = self._written = 0  # bytes whose write to disk was started, and bytes written

    def write(self, data: Any) -> int:
        """Write all bytes of `data` and return their number."""
        view = memoryview(data).cast("B")
        self._write_all(view)
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while view:
            count = self._file.write(view[:_WRITEBACK_BYTES])
            self._written += count
            if self._written - self._writeback_offset >= _WRITEBACK_BYTES:
                self._start_writeback()
            view = view[count:]

    def _start_writeback(self) -> None:
        """Start writing pages to disk without waiting: Linux writes pages for which POSIX_FADV_DONTNEED is given."""
        if hasattr(os, "posix_fadvise"):
            offset, length = self._writeback_offset, self._written - self._writeback_offset
            with contextlib.suppress(OSError):  # only advice; fsync reports errors of the disk
                os.posix_fadvise(self._file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
        self._writeback_offset = self._written

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def overwrite(self, position: int, data: bytes) -> None:
        """Replace bytes that were already written."""
        self._file.seek(position)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Sync the bytes to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close without syncing."""
        self._file.close()


def fsync_path(path: Path) -> None:
    """Sync a file, or the entries of a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _open_atomic(path: Path) -> Iterator[DirectFile]:
    """Open a temporary file in the folder of `path`; rename it to `path` after the block, or delete it on an error."""
    staged = path.with_name(TMP_PREFIX + uuid.uuid4().hex)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = DirectFile(staged)
    try:
        yield file
        file.finish()
        file.close()
        os.replace(staged, path)
        fsync_path(path.parent)
    except BaseException:
        file.close()
        staged.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> str:
    """Write and sync a file in a directory that is itself staged, and return its sha256."""
    file = DirectFile(path)
    try:
        file.write(data)
        file.finish()
    finally:
        file.close()
    return hashlib.sha256(data).hexdigest()


def write_torch(obj: Any, path: Path) -> None:
    """Write ``torch.save(obj)`` and sync, for a file in a staged directory. The zip format stores the checksums."""
    file = DirectFile(path)
    try:
        torch.save(obj, cast(IO[bytes], file))
        file.finish()
    finally:
        file.close()


def _os_error_of(error: BaseException) -> BaseException:
    """Find the OSError behind `error`: torch raises a RuntimeError about its zip writer if a write fails."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def save_torch(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write ``torch.save(obj)`` atomically.

    `load_torch` compares the CRC-32 that the file stores for every record. ``torch.load(weights_only=True)`` can read
    the file if `obj` holds only tensors and plain containers.

    Raises:
        CheckpointError: the disk is full or not writable. The previous file at `path` is unchanged.
    """
    target = Path(path).expanduser()
    try:
        with _open_atomic(target) as file:
            torch.save(obj, cast(IO[bytes], file))
    except (OSError, RuntimeError) as error:
        cause = _os_error_of(error)
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{target}: not saved ({cause}); the previous checkpoint is unchanged") from error


def load_torch(path: str | os.PathLike[str], *, verify: bool = True) -> Any:
    """Read a file of `save_torch`, or any ``torch.save`` of tensors and plain containers, and compare its checksums.

    Raises:
        CorruptCheckpointError: truncated or damaged; states the sizes found and expected.
        UnsafeCheckpointError: the pickle references anything else, which the message names; no code was executed.
    """
    return read_torch_file(existing_path(path), verify=verify, mapped=False)


def save_safetensors(state: Mapping[str, Tensor], path: str | os.PathLike[str], meta: Mapping[str, Any]) -> None:
    """Write tensors as ``.safetensors``, atomically, with `meta` as JSON and the CRC-32 of each tensor in the header.

    Raises:
        CheckpointError: not writable, or a dtype that the format does not have.
    """
    target = Path(path).expanduser()
    # sorted by decreasing element size, so that every tensor is aligned to its element size
    order = sorted(state, key=lambda name: (-state[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = state[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{target}: '{name}' has dtype {tensor.dtype}, which safetensors does not support")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header["__metadata__"] = {
        "format": "pt",
        METADATA_KEY: json.dumps(dict(meta), sort_keys=True),
        TENSOR_CRCS: _CRC_PLACEHOLDER * len(order),
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    try:
        with _open_atomic(target) as file, ThreadPoolExecutor(1) as executor:
            file.write(struct.pack("<Q", len(head)) + head)
            crcs = []
            for name in order:
                data = _bytes_of(state[name])
                crc = executor.submit(zlib.crc32, data)  # zlib releases the GIL
                file.write(data)
                crcs.append(f"{crc.result():08x}")
            if crcs:
                file.overwrite(8 + head.index((_CRC_PLACEHOLDER * len(order)).encode()), "".join(crcs).encode())
    except OSError as error:
        raise CheckpointError(f"{target}: not saved ({error}); the previous checkpoint is unchanged") from error


def _bytes_of(tensor: Tensor) -> memoryview:
    """Bytes of a tensor, without a copy if it is contiguous."""
    flat = tensor.detach().cpu().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def remove_quietly(path: Path) -> None:
    """Remove a file or directory; a failure is only logged, because the next cleanup tries again."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: could not be removed (%s)", path, error)


def publish_directory(staged: Path, target: Path) -> None:
    """Rename a finished, synced directory to `target`; an existing checkpoint is kept as ``.old-NAME`` until then.

    If the process is killed between the two renames, ``.old-NAME`` remains. Readers use it and
    `recover_interrupted_saves` restores it.
    """
    old = target.with_name(OLD_PREFIX + target.name)
    if target.exists():
        if old.exists():
            remove_quietly(old)
        os.rename(target, old)
    os.rename(staged, target)
    fsync_path(target.parent)
    if old.exists():
        remove_quietly(old)


def recover_interrupted_saves(directory: Path) -> None:
    """Finish or undo interrupted saves over an existing checkpoint in a folder of checkpoints."""
    for old in [p for p in directory.iterdir() if p.name.startswith(OLD_PREFIX)]:
        target = old.with_name(old.name.removeprefix(OLD_PREFIX))
        if target.exists():
            remove_quietly(old)
        else:
            with contextlib.suppress(FileNotFoundError):  # another rank did it first
                os.rename(old, target)
                log.warning("%s: restored, because the save that replaces it was interrupted", target)


def write_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a directory atomically: `fill` writes its files under a temporary name, which is then renamed.

    Raises:
        CheckpointError: not writable. The previous directory at `target` is unchanged.
    """
    staged = target.with_name(TMP_PREFIX + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_quietly(staged)
        staged.mkdir()
        fill(staged)
        fsync_path(staged)
        publish_directory(staged, target)
    except BaseException as error:
        remove_quietly(staged)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(f"{target}: not saved ({error}); the previous checkpoint is unchanged") from error
