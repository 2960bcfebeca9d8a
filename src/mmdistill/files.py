"""Atomic file writes, also on file systems that cannot rename over an existing file; errors of a full disk.

Temporary files and folders do not remain after a SIGKILL.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from socket import gethostname
from typing import BinaryIO

import psutil

from mmdistill.console import log_once
from mmdistill.errors import InputError, format_size

try:
    import fcntl
except ImportError:  # Windows, where temporary folders of killed processes remain
    fcntl = None  # type: ignore[assignment]

_FOLDER_PREFIX = "mmdistill-"
_LOCK_SUFFIX = ".lock"  # a file next to a temporary folder, which its processes lock
_PROCESS_PREFIX = "process-"  # see `record_process`
_SHARED_MEMORY = Path("/dev/shm")
OLD_PREFIX = ".old-"  # name of a file or directory while another one takes its place
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)  # Windows has no EDQUOT
# errno of a rename that the file system does not support, on mounted cloud drives also EMFILE, on overlays EXDEV
_CANNOT_RENAME = (
    *(errno.EEXIST, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EXDEV),
    *(errno.ENOTSUP, errno.ENOSYS, errno.EMFILE, errno.ENOTEMPTY),
)


_cleaned_folders: set[Path] = set()  # see `temporary_path`
_NOT_WRITABLE = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM)


class WriteError(InputError, OSError):
    """A file that cannot be written: the disk or a quota is full, or the folder is read-only."""


def describe_write_error(error: OSError, num_bytes: int | None = None) -> str:
    """Why a file was not written; if the disk, a quota or the file size is at its limit, with the space needed.

    `num_bytes` is the size of the file, None if it is unknown.
    """
    reason = f"[Errno {error.errno}] {error.strerror}" if error.strerror else str(error)
    return reason if num_bytes is None or error.errno not in _FULL else f"{reason}, {format_size(num_bytes)} needed"


def is_disk_error(error: BaseException | None) -> bool:
    """Whether the operating system refuses access, or the disk or a quota is full: no defect of this program."""
    return isinstance(error, OSError) and error.errno in _NOT_WRITABLE


@contextmanager
def write_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Convert an error of the operating system to a `WriteError` about `path`; see `describe_write_error`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{path}: not written ({describe_write_error(error, num_bytes)})") from error


def replace_file(source: Path, target: Path) -> None:
    """Rename the file `source` to `target`, which may exist.

    Some file systems (FUSE, SMB) do not rename over an existing file. It is then kept as ``.old-NAME`` until `source`
    has its name.
    """
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME or not target.exists():
            raise
        old = target.with_name(OLD_PREFIX + target.name)
        old.unlink(missing_ok=True)
        os.rename(target, old)
        try:
            os.rename(source, target)
        except OSError:
            os.rename(old, target)
            raise
        old.unlink()
        log_once(
            f"{target.parent}: this file system does not rename over an existing file; if the machine stops during a "
            f"save, the previous file may be named {OLD_PREFIX}NAME"
        )


def rename_directory(source: Path, target: Path, *, last: Sequence[str] = ()) -> None:
    """Rename the directory `source` to `target`, which must not exist.

    Some mounted cloud drives do not rename a directory that contains files. The files are then renamed one by one,
    those with a suffix of `last` at the end, in the order of `last`. After an error they are renamed back.
    """
    try:
        os.rename(source, target)
        return
    except OSError as error:
        if error.errno not in _CANNOT_RENAME or not source.is_dir() or target.exists():
            raise
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    files.sort(key=lambda path: next((i for i, suffix in enumerate(last) if path.name.endswith(suffix)), -1))
    moved: list[tuple[Path, Path]] = []
    try:
        for file in files:
            name = target / file.relative_to(source)
            name.parent.mkdir(parents=True, exist_ok=True)
            os.rename(file, name)
            moved.append((file, name))
    except OSError:
        for file, name in reversed(moved):
            os.rename(name, file)
        shutil.rmtree(target, ignore_errors=True)
        raise
    shutil.rmtree(source)
    log_once(f"{target.parent}: this file system does not rename folders; the files of a checkpoint appear one by one")


@cache
def _machine_id() -> str:
    """Hash of the host and of the container on it: what makes process ids unique."""
    with contextlib.suppress(OSError):
        return hashlib.sha256((gethostname() + os.readlink("/proc/self/ns/pid")).encode()).hexdigest()[:6]
    return hashlib.sha256(gethostname().encode()).hexdigest()[:6]


def temporary_path(path: Path) -> Path:
    """Name in the folder of `path` for a file of this process that is then renamed to `path`.

    The first call for a folder removes such files of processes of this machine that have ended.
    """
    if path.parent not in _cleaned_folders:
        _cleaned_folders.add(path.parent)
        for left in path.parent.glob(f".tmp-[0-9]*-{_machine_id()}-*"):
            with contextlib.suppress(ValueError, OverflowError, OSError):  # another file, or a read-only folder
                if not psutil.pid_exists(int(left.name.split("-")[1])):
                    left.unlink(missing_ok=True)
    return path.with_name(f".tmp-{os.getpid()}-{_machine_id()}-{path.name}")


@contextmanager
def atomic_open(path: Path, *, num_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file in the folder of `path` and rename it to `path` at the end of the block.

    Other processes see the old or the complete new file. After an exception the old file is unchanged. The folder is
    created if it does not exist. `num_bytes` is the number of bytes that will be written, for the message.

    Raises:
        WriteError: the disk is full or not writable.
    """
    temporary = temporary_path(path)
    with write_errors(path, num_bytes):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
            replace_file(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # for example a read-only folder
                temporary.unlink()


def atomic_write_bytes(path: Path, data: bytes, *, fsync: bool = False) -> None:
    """Write `data` to `path` atomically; see `atomic_open`. With `fsync` it is on disk before the rename."""
    with atomic_open(path, num_bytes=len(data)) as file:
        file.write(data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())


def require_utf8_name(path: Path) -> None:
    """Raise an `InputError` if a checkpoint cannot be at `path`: torch cannot open it there."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: the name is not UTF-8, and torch cannot open such files; rename it") from None


def encode_json(content: object, *, allow_nan: bool = True) -> bytes:
    """Indented JSON as UTF-8. Bytes of file names that are not UTF-8 become escapes, which `json.loads` reads back."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=allow_nan)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def remove_temporary_files(folder: Path) -> None:
    """Remove all files of `temporary_path` in a folder that no other process uses, also those of other machines."""
    for path in folder.glob(".tmp-[0-9]*-*"):
        path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: str | None = None) -> Iterator[str]:
    """Create a folder in `parent` (None: the folder for temporary files). It is removed at the end of the block.

    If SIGKILL ends this process, a later command removes it: this process and its forks hold a lock (flock) on the file
    ``NAME.lock``, which the kernel releases when the last of them has ended. The lock exists before the folder. Each
    call first removes the folders of this user that no process holds.
    """
    parent = parent or tempfile.gettempdir()
    remove_temporary_folders(Path(parent))
    owner, (lock, lock_path) = os.getpid(), _create_lock(parent)
    folder = lock_path.removesuffix(_LOCK_SUFFIX)
    try:
        os.mkdir(folder, 0o700)
        yield folder
    finally:
        if os.getpid() == owner:  # a fork may end the block too; it holds the lock until its exit
            _remove_temporary_folder(lock_path)
            os.close(lock)


def _create_lock(parent: str) -> tuple[int, str]:
    """Create and lock a file in `parent`; its descriptor and path. A file system without locks leaves it unlocked."""
    while True:
        lock, path = tempfile.mkstemp(_LOCK_SUFFIX, _FOLDER_PREFIX, parent)
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(path):
            return lock, path
        os.close(lock)  # another process has removed the file before it was locked


def _remove_temporary_folder(lock_path: str) -> None:
    folder = lock_path.removesuffix(_LOCK_SUFFIX)
    for record in Path(folder).glob(f"{_PROCESS_PREFIX}*"):
        pid = record.name.removeprefix(_PROCESS_PREFIX)
        for left in () if psutil.pid_exists(int(pid)) else _SHARED_MEMORY.glob(f"torch_{pid}_*"):
            left.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.exists(folder):  # otherwise the next command tries again
        with contextlib.suppress(OSError):
            os.unlink(lock_path)


def record_process(folder: Path) -> None:
    """Record in a temporary folder that this process creates tensors in shared memory.

    torch removes the name of a tensor at once. If SIGKILL ends the process before, the name is removed with the folder.
    """
    (folder / f"{_PROCESS_PREFIX}{os.getpid()}").touch()


def temporary_folder_until_exit(parent: str | None = None) -> str:
    """A `temporary_folder` that is removed at the exit of this process, after its daemonic children have ended."""
    context = temporary_folder(parent)
    folder = context.__enter__()
    Finalize(None, context.__exit__, (None, None, None), exitpriority=-100)
    return folder


def remove_temporary_folders(parent: Path) -> None:
    """Remove the folders in `parent` of `temporary_folder` whose processes were killed."""
    for path in parent.glob(f"{_FOLDER_PREFIX}*{_LOCK_SUFFIX}") if fcntl else ():
        with contextlib.suppress(OSError):  # in use, or removed by another process
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove_temporary_folder(str(path))
            finally:
                os.close(lock)
