"""Run lock: only one job at a time writes to a run directory."""

import contextlib
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.names import TMP_PREFIX
from mmdistill.distributed.collectives import get_rank, run_on_all_ranks

log = logging.getLogger(__name__)
LOCK_NAME = ".lock"


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """`directory_lock` for a run of several ranks: rank 0 holds it, and all ranks raise if it fails. Collective."""
    with contextlib.ExitStack() as stack:
        run_on_all_ranks(
            lambda: stack.enter_context(directory_lock(directory)) if get_rank() == 0 else None,
            error_class=CheckpointError,
        )
        yield


def _process_start_ticks(pid: int) -> str | None:
    """Start time of a process of this host in kernel ticks; identifies it, because process ids are reused."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_alive(pid: int, started: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    current = _process_start_ticks(pid)
    return started is None or current is None or started == current


@contextlib.contextmanager
def directory_lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder of checkpoints for one job; call on rank 0.

    A lock of a process of this host that has ended is removed, with a warning.

    Raises:
        CheckpointError: another job holds the lock; the message names its process and host.
    """
    folder = Path(directory).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path, pid = folder / LOCK_NAME, os.getpid()
    own = {"pid": pid, "host": socket.gethostname(), "started": _process_start_ticks(pid), "id": uuid.uuid4().hex}
    staged = folder / f"{TMP_PREFIX}lock-{own['id']}"
    staged.write_text(json.dumps(own), encoding="utf-8")
    try:
        while not _try_link(staged, path):
            _break_stale_lock(path, own)
    finally:
        staged.unlink(missing_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8")).get("id") == own["id"]:
                path.unlink()


def _try_link(staged: Path, path: Path) -> bool:
    """Hard-link `staged` to `path`, so that no process sees an incomplete lock. False if `path` exists."""
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    return True


def _break_stale_lock(path: Path, own: dict[str, Any]) -> None:
    """Remove a lock whose process has ended; raise `CheckpointError` if the process may still run."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        pid, host = int(holder["pid"]), str(holder["host"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: unreadable lock ({error}); delete it if no job writes to this folder"
        ) from error
    if host == own["host"] and not _is_alive(pid, holder.get("started")):
        log.warning("%s: removed the lock of process %d, which has ended", path, pid)
        path.unlink(missing_ok=True)
        return
    raise CheckpointError(
        f"{path.parent}: process {pid} on {host} writes checkpoints to this folder; wait for it, choose another "
        f"folder, or delete {path} if that process has ended"
    )
