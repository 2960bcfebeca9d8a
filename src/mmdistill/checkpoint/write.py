"""Atomic writes of checkpoint files and directories.

Everything is written under a temporary name in the folder of its target (never in ``$TMPDIR``, which may be on another,
full disk), synced, and renamed.
"""

import contextlib
import errno
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.names import LATEST, MANIFEST, META, MODEL_STATES, TMP_PREFIX
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.checkpoint.locate import existing_path
from mmdistill.files import OLD_PREFIX, describe_write_error, rename_directory, replace_file, temporary_path

log = logging.getLogger(__name__)

# errno of os.open or os.fsync for a directory that the file system cannot sync
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM)
_WRITEBACK_BYTES = 16 << 20  # after so many bytes the kernel is asked to start writing them to disk


class DirectFile(io.FileIO):
    """An unbuffered file for writing; `finish` returns when its bytes are on disk.

    Writing to disk starts after the first 16 MB and overlaps with the rest, instead of in the final fsync.
    """

    def __init__(self, path: Path) -> None:
        """Create or truncate the file."""
        super().__init__(path, "w+")
        self._writeback_offset = 0  # bytes whose write to disk was started

    def write(self, data: Any) -> int:
        """Write all bytes of `data` and return their number."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += super().write(view[written : written + _WRITEBACK_BYTES]) or 0
            self._start_writeback()
        return written

    def _start_writeback(self) -> None:
        """Start writing pages to disk without waiting: Linux writes pages for which POSIX_FADV_DONTNEED is given."""
        length = self.tell() - self._writeback_offset
        if length >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # only advice; fsync reports errors of the disk
                os.posix_fadvise(self.fileno(), self._writeback_offset, length, os.POSIX_FADV_DONTNEED)
            self._writeback_offset += length

    def finish(self) -> None:
        """Sync the bytes to disk."""
        os.fsync(self.fileno())


def fsync_path(path: Path) -> bool:
    """Sync a file, or the entries of a directory, to disk.

    Some file systems (FUSE, SMB, mounted cloud drives) cannot sync a directory. A crash of the machine can then undo
    the last rename.

    Returns:
        False for a directory that cannot be synced.
    """
    try:
        # Windows syncs a file only if it is open for writing
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC or not path.is_dir():
            raise
        return False
    return True


def warn_if_unsynced(directory: Path) -> None:
    """Log a warning if the entries of a directory cannot be synced; see `fsync_path`."""
    if not fsync_path(directory):
        log.warning(
            "%s: this file system cannot sync folders; after a power failure the newest checkpoint may be missing",
            directory,
        )


@contextlib.contextmanager
def _stage(target: Path, staged: Path, size: Callable[[], int] | None = None) -> Iterator[Path]:
    """Create the folder of `target`; if the block fails, remove `staged` and report errors of the disk.

    `size` computes the number of bytes of the complete checkpoint, for the message.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield staged
    except BaseException as error:
        remove_quietly(staged)
        if (cause := find_os_error(error)) is None:
            raise
        reason = describe_write_error(cause, size() if size else None)
        raise CheckpointError(f"{target}: not saved ({reason}); earlier checkpoints are unchanged") from error


@contextlib.contextmanager
def disk_errors(num_bytes: int | None = None) -> Iterator[None]:
    """Convert an error of the operating system to a `CheckpointError` that gives the space needed, `num_bytes`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (cause := find_os_error(error)) is None:
            raise
        reason = describe_write_error(cause, num_bytes)
        raise CheckpointError(f"{reason}; earlier checkpoints are unchanged") from error


def find_os_error(error: BaseException) -> OSError | None:
    """`error` or the `OSError` that caused it: torch raises a RuntimeError if a write fails."""
    cause: BaseException | None = error if isinstance(error, (OSError, RuntimeError)) else None
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


@contextlib.contextmanager
def stage_file(path: Path, size: Callable[[], int] | None = None) -> Iterator[Path]:
    """Name of a temporary file, which the block writes and syncs; after the block it is renamed to `path`.

    `size` computes the number of bytes of the file. It is called if the disk is full.

    Raises:
        CheckpointError: not writable. The previous file at `path` is unchanged.
    """
    with _stage(path, temporary_path(path), size) as staged:
        yield staged
        replace_file(staged, path)
        fsync_path(path.parent)


def write_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a directory atomically: `fill` writes its files under a temporary name, which is then renamed.

    Raises:
        CheckpointError: not writable. The previous directory at `target` is unchanged.
    """
    with _stage(target, target.with_name(TMP_PREFIX + target.name)) as staged:
        remove_quietly(staged)
        staged.mkdir()
        fill(staged)
        fsync_path(staged)
        publish_directory(staged, target)


def write_bytes(path: Path, data: bytes) -> None:
    """Write and sync a file in a directory that is itself staged."""
    with DirectFile(path) as file:
        file.write(data)
        file.finish()


def write_torch(obj: Any, path: Path) -> None:
    """Write ``torch.save(obj)`` and sync, for a file in a staged directory. The zip format stores the checksums."""
    with DirectFile(path) as file:
        torch.save(obj, cast(IO[bytes], file))
        file.finish()


class _ByteCounter(io.RawIOBase):
    """A file that only counts what is written to it."""

    num_bytes = 0

    def write(self, data: Any) -> int:
        """Count the bytes of `data`."""
        self.num_bytes += len(memoryview(data).cast("B"))
        return len(memoryview(data).cast("B"))


def torch_file_size(obj: Any) -> int:
    """Number of bytes of the file that ``torch.save(obj)`` writes."""
    counter = _ByteCounter()
    torch.save(obj, cast(IO[bytes], counter))
    return counter.num_bytes


def save_torch(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write ``torch.save(obj)`` atomically.

    `load_torch` compares the CRC-32 that the file stores for every record. ``torch.load(weights_only=True)`` can read
    the file if `obj` holds only tensors and plain containers.

    Raises:
        CheckpointError: see `stage_file`.
    """
    with stage_file(Path(path).expanduser(), lambda: torch_file_size(obj)) as staged:
        write_torch(obj, staged)


def load_torch(path: str | os.PathLike[str], *, verify: bool = True) -> Any:
    """Read a file of `save_torch`, or any ``torch.save`` of tensors and plain containers, and compare its checksums.

    Raises:
        CorruptCheckpointError: truncated or damaged; states the sizes found and expected.
        UnsafeCheckpointError: the pickle references anything else, which the message names; no code was executed.
    """
    return read_torch_file(existing_path(path), verify=verify, mapped=False)


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
    last = (MODEL_STATES, LATEST, META, MANIFEST)  # without a model file, a directory is no checkpoint
    old = target.with_name(OLD_PREFIX + target.name)
    if target.exists():
        remove_quietly(old)
        rename_directory(target, old, last=last)
    try:
        rename_directory(staged, target, last=last)
    except OSError:
        if old.exists():
            rename_directory(old, target, last=last)
        raise
    fsync_path(target.parent)
    remove_quietly(old)


def recover_interrupted_saves(directory: Path) -> None:
    """Finish or undo interrupted saves over an existing checkpoint in a folder of checkpoints."""
    for old in [p for p in directory.iterdir() if p.name.startswith(OLD_PREFIX)]:
        target = old.with_name(old.name.removeprefix(OLD_PREFIX))
        if target.exists():
            remove_quietly(old)
        else:
            with contextlib.suppress(FileNotFoundError):  # another rank did it first
                rename_directory(old, target)
                log.warning("%s: restored, because the save that replaces it was interrupted", target)
