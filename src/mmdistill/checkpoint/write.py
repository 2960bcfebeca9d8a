"""Files and directories that appear whole or not at all.

Everything is written under a temporary name beside its target (never in ``$TMPDIR``, which may be another, full
disk), synced, and renamed.
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
from mmdistill.checkpoint.formats.names import OLD_PREFIX, TMP_PREFIX
from mmdistill.checkpoint.formats.torch_zip import load_pickle
from mmdistill.checkpoint.locate import existing
from mmdistill.checkpoint.read import _ST_DTYPES, EMBEDDED, TENSOR_CRCS

log = logging.getLogger(__name__)

_PIECE = 16 << 20  # bytes after which the kernel is asked to begin bringing them to the disk
_TO_COME = "0" * 8  # the CRC-32 of a tensor in hex, which is known when the tensor has been written
_DTYPE_NAMES = {dtype: name for name, dtype in _ST_DTYPES.items()}


class DirectFile:
    """A file opened for writing without a buffer, whose bytes are on the disk when it is finished.

    The disk works from the first piece on, and not only in the fsync at the end.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("w+b", buffering=0)
        self._begun = self._written = 0  # bytes on their way to the disk, and bytes given to the kernel

    def write(self, data: Any) -> int:
        """All of `data`."""
        view = memoryview(data).cast("B")
        self._write_all(view)
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while view:
            done = self._file.write(view[:_PIECE])
            self._written += done
            if self._written - self._begun >= _PIECE:
                self._begin()
            view = view[done:]

    def _begin(self) -> None:
        """Start bringing to the disk what was written, without waiting for it: Linux does, for pages to be dropped."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice; what is wrong with the disk, fsync says
                os.posix_fadvise(self._file.fileno(), self._begun, self._written - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = self._written

    def flush(self) -> None:
        """Nothing is buffered."""

    def patch(self, position: int, data: bytes) -> None:
        """Replace bytes that were written before."""
        self._file.seek(position)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Bring the bytes to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close without syncing."""
        self._file.close()


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[DirectFile]:
    """A file beside `path` that takes its name when the block ends well, and disappears when it does not."""
    staged = path.with_name(TMP_PREFIX + uuid.uuid4().hex)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = DirectFile(staged)
    try:
        yield file
        file.finish()
        file.close()
        os.replace(staged, path)
        sync(path.parent)
    except BaseException:
        file.close()
        staged.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> str:
    """Write a small file, synced but not renamed, for use inside a directory that is itself staged; its sha256."""
    file = DirectFile(path)
    try:
        file.write(data)
        file.finish()
    finally:
        file.close()
    return hashlib.sha256(data).hexdigest()


def stream_torch(obj: Any, path: Path) -> None:
    """``torch.save`` to a path as given, synced. For files inside a staged directory. Its checksums are the zip's."""
    file = DirectFile(path)
    try:
        torch.save(obj, cast(IO[bytes], file))
        file.finish()
    finally:
        file.close()


def _reason(error: BaseException) -> BaseException:
    """torch hides a failed write behind a RuntimeError about the zip writer; the first cause says more."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def save_torch(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write ``torch.save(obj)`` atomically.

    The file's own CRC-32 of every record is the checksum that `load_torch` compares, so the checkpoint stays one
    file. It can be read by ``torch.load(weights_only=True)`` as long as `obj` holds tensors and plain containers only.

    Raises:
        CheckpointError: the disk is full or not writable. What stood at `path` before is untouched.
    """
    target = Path(path).expanduser()
    try:
        with _staged(target) as file:
            torch.save(obj, cast(IO[bytes], file))
    except (OSError, RuntimeError) as error:
        cause = _reason(error)
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{target}: not saved ({cause}); what stood there before is unchanged") from error


def load_torch(path: str | os.PathLike[str], *, verify: bool = True) -> Any:
    """Read a file of `save_torch` (or any ``torch.save`` of tensors and plain containers), checksums compared first.

    Raises:
        CorruptCheckpointError: truncated or damaged, with the bytes found and expected.
        UnsafeCheckpointError: the pickle names anything else; it is named, and nothing was run.
    """
    return load_pickle(existing(path), verify=verify, mapped=False)


def save_safetensors(state: Mapping[str, Tensor], path: str | os.PathLike[str], meta: Mapping[str, Any]) -> None:
    """Write tensors as ``.safetensors``, atomically, with `meta` as JSON and the CRC-32 of each tensor in the header.

    Raises:
        CheckpointError: not writable, or a dtype that the format lacks.
    """
    target = Path(path).expanduser()
    # the widest elements first, so that every tensor is aligned to its element size
    order = sorted(state, key=lambda name: (-state[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = state[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{target}: '{name}' has dtype {tensor.dtype}, which safetensors files do not hold")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header["__metadata__"] = {
        "format": "pt",
        EMBEDDED: json.dumps(dict(meta), sort_keys=True),
        TENSOR_CRCS: _TO_COME * len(order),
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    try:
        with _staged(target) as file, ThreadPoolExecutor(1) as beside:
            file.write(struct.pack("<Q", len(head)) + head)
            crcs = []
            for name in order:
                raw = _raw(state[name])
                crc = beside.submit(zlib.crc32, raw)  # zlib releases the interpreter lock
                file.write(raw)
                crcs.append(f"{crc.result():08x}")
            if crcs:
                file.patch(8 + head.index((_TO_COME * len(order)).encode()), "".join(crcs).encode())
    except OSError as error:
        raise CheckpointError(f"{target}: not saved ({error}); what stood there before is unchanged") from error


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def discard(path: Path) -> None:
    """Remove a file or directory; a failure is a warning, since the next clean-up will try again."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: could not be removed (%s)", path, error)


def publish_directory(staged: Path, target: Path) -> None:
    """Give a finished, synced directory its name; a checkpoint that has that name is kept as ``.old-`` until then.

    A kill between the two renames leaves ``.old-NAME``, which readers use and `recover` restores.
    """
    old = target.with_name(OLD_PREFIX + target.name)
    if target.exists():
        if old.exists():
            discard(old)
        os.rename(target, old)
    os.rename(staged, target)
    sync(target.parent)
    if old.exists():
        discard(old)


def recover(directory: Path) -> None:
    """Finish or undo re-saves that were interrupted in a folder of checkpoints."""
    for old in [p for p in directory.iterdir() if p.name.startswith(OLD_PREFIX)]:
        target = old.with_name(old.name.removeprefix(OLD_PREFIX))
        if target.exists():
            discard(old)
        else:
            with contextlib.suppress(FileNotFoundError):  # another rank was first
                os.rename(old, target)
                log.warning("%s: restored, a save over it was interrupted", target)


def staged_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Build a directory under a temporary name with `fill`, then give it its own.

    Raises:
        CheckpointError: not writable. What stood at `target` is unchanged.
    """
    staged = target.with_name(TMP_PREFIX + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        discard(staged)
        staged.mkdir()
        fill(staged)
        sync(staged)
        publish_directory(staged, target)
    except OSError as error:
        discard(staged)
        raise CheckpointError(f"{target}: not saved ({error}); what stood there before is unchanged") from error
