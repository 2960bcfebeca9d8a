"""Run lock: only one job at a time writes to a run directory."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname

import psutil
from filelock import SoftFileLock, Timeout

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.distributed.collectives import get_rank, run_on_all_ranks
from mmdistill.files import write_errors

log = logging.getLogger(__name__)
LOCK_NAME = ".lock"
_TIMEOUT_S = 0.5  # another job may be writing its lock, or removing it


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """`directory_lock` for a run of several ranks: rank 0 holds it, and all ranks raise if it fails. Collective."""
    with contextlib.ExitStack() as stack:
        run_on_all_ranks(
            lambda: stack.enter_context(directory_lock(directory)) if get_rank() == 0 else None,
            error_class=CheckpointError,
        )
        yield


@contextlib.contextmanager
def directory_lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder of checkpoints for one job; call on rank 0.

    The lock is a file that is created exclusively, which works on every shared file system. A lock of a process of
    this host that has ended is removed, with a warning.

    Raises:
        CheckpointError: another job holds the lock; the message names its process and host.
        WriteError: the folder is read-only, or the disk is full.
    """
    folder = Path(directory).expanduser()
    path = folder / LOCK_NAME
    lock = SoftFileLock(path)
    with write_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        previous = _read_holder(path)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=_TIMEOUT_S)  # also takes over the lock of a process that has ended
    if not lock.is_locked:  # not raised from Timeout, which is an OSError, whose text `run_on_all_ranks` would report
        holder = _read_holder(path)
        who = f"process {holder[0]} on {holder[1]}" if holder else "another process"
        raise CheckpointError(
            f"{folder}: {who} writes checkpoints to this folder; wait for it, choose another folder, or delete {path} "
            "if that process has ended"
        )
    if previous is not None:
        log.warning("%s: removed the lock of process %d, which has ended", path, previous[0])
    try:
        yield
    finally:
        lock.release()


def _read_holder(path: Path) -> tuple[int, str] | None:
    """Read process and host of a lock file of filelock, or of earlier versions in JSON; None if there is none.

    A JSON lock of a process that has ended is removed; filelock does this with its own.

    Raises:
        CheckpointError: the file is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if not text:  # its process is just writing it
            return None
        if text.startswith("{"):
            fields = json.loads(text)
            pid, host = int(fields["pid"]), str(fields["host"])
            if host == gethostname() and _has_ended(pid, fields.get("started")):
                path.unlink(missing_ok=True)
            return pid, host
        process, host, *_ = text.splitlines()
        return int(process), host.partition("?")[0]  # after "?": the PID namespace
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: unreadable lock ({error}); delete it if no job writes to this folder"
        ) from error


def _has_ended(pid: int, started: str | None) -> bool:
    """Whether a process of this host has ended. Process ids are reused, so its start (kernel ticks) is compared."""
    if not psutil.pid_exists(pid):
        return True
    try:
        current = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # macOS and Windows have no /proc
        return False
    return started is not None and started != current
