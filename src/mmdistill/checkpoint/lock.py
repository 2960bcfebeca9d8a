"""Run lock: one process writes to a run directory at a time."""

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
LOCK = ".lock"


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """`directory_lock` for a run of several ranks: rank 0 holds it, and all raise if it cannot. Collective."""
    with contextlib.ExitStack() as stack:
        run_on_all_ranks(
            lambda: stack.enter_context(directory_lock(directory)) if get_rank() == 0 else None,
            error_class=CheckpointError,
        )
        yield


def _started(pid: int) -> str | None:
    """When a process of this host began, in the kernel's ticks: numbers of ended processes are given out again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _alive(pid: int, started: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(pid)
    return started is None or now is None or started == now


@contextlib.contextmanager
def directory_lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder of checkpoints for one job; call on rank 0.

    A lock of a process of this host that has ended is taken over, with a message.

    Raises:
        CheckpointError: another job holds it; the message names its process and host.
    """
    folder = Path(directory).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path, pid = folder / LOCK, os.getpid()
    mine = {"pid": pid, "host": socket.gethostname(), "started": _started(pid), "id": uuid.uuid4().hex}
    staged = folder / f"{TMP_PREFIX}lock-{mine['id']}"
    staged.write_text(json.dumps(mine), encoding="utf-8")
    try:
        while not _linked(staged, path):
            _take_over(path, mine)
    finally:
        staged.unlink(missing_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8")).get("id") == mine["id"]:
                path.unlink()


def _linked(staged: Path, path: Path) -> bool:
    """Whether `path` was free, and is a second name of `staged` now: others see no half-written lock."""
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    return True


def _take_over(path: Path, mine: dict[str, Any]) -> None:
    """Remove a stale lock, or raise because it is not stale."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        pid, host = int(holder["pid"]), str(holder["host"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: unreadable lock ({error}); remove it if no job writes to this folder"
        ) from error
    if host == mine["host"] and not _alive(pid, holder.get("started")):
        log.warning("%s: taken over from process %d, which has ended", path, pid)
        path.unlink(missing_ok=True)
        return
    raise CheckpointError(
        f"{path.parent}: process {pid} on {host} writes checkpoints here; wait for it, choose another folder, or "
        f"remove {path} if that process is gone"
    )
