"""Which checkpoints of a run are complete, which may go, and whose folder it is."""

import contextlib
import json
import logging
import math
import os
import socket
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.archive import load_pickle, verify_zip
from mmdistill.checkpoint.detect import locate
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.layout import TMP_PREFIX, TRASH_PREFIX, CheckpointFormat
from mmdistill.checkpoint.manifest import read_manifest, verify_manifest
from mmdistill.checkpoint.read import read_meta
from mmdistill.checkpoint.write import discard, recover
from mmdistill.checkpoint.zero import read_zero

log = logging.getLogger(__name__)

LOCK = ".lock"


@dataclass(frozen=True)
class _Candidate:
    path: Path
    step: float  # inf where it cannot be told, so that a damaged newest one is looked at, and warned about, first
    modified: int


def _candidates(directory: Path) -> list[_Candidate]:
    found = []
    for path in directory.iterdir():
        if path.name.startswith(".") or not (path.is_dir() or path.suffix == ".ckpt"):
            continue
        step = math.inf
        with contextlib.suppress(CheckpointError, OSError):
            place = locate(path)
            manifest = read_manifest(place.root) if place.format is CheckpointFormat.DEEPSPEED else None
            step = float((manifest or read_meta(place)).get("step", math.inf))
        found.append(_Candidate(path, step, path.stat().st_mtime_ns))
    return sorted(found, key=lambda c: (c.step, c.modified, c.path.name), reverse=True)


def verify(path: Path) -> None:
    """Compare a checkpoint with the checksums it carries; one of others is read once instead.

    Raises:
        CheckpointError: why it cannot be used.
    """
    place = locate(path)
    if place.format is not CheckpointFormat.DEEPSPEED:
        if place.root.suffix == ".safetensors":
            read_meta(place)
        else:
            load_pickle(place.root)
    elif verify_manifest(place.root) is None:
        read_zero(place)
        for file in place.optim_files:
            verify_zip(file)


def newest_complete(directory: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a folder that verifies, by step; for ``resume=auto``.

    Directories of the native loop and ``.ckpt`` files. Interrupted re-saves are repaired, unfinished ``.tmp-*``
    ignored. Each checkpoint that is skipped gets a warning with the reason.

    Returns:
        Its path, or None where there is none (also when the folder does not exist).
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        return None
    recover(folder)
    for candidate in _candidates(folder):
        try:
            verify(candidate.path)
        except (CheckpointError, OSError) as error:
            log.warning("skipped %s", error)
            continue
        return candidate.path
    return None


def _loss(manifest: dict[str, Any]) -> float:
    loss = manifest.get("loss")
    return float(loss) if isinstance(loss, (int, float)) and math.isfinite(loss) else math.inf


def prune(
    directory: str | os.PathLike[str],
    *,
    keep_last: int,
    save_top_k: int,
    protect: Iterable[str | os.PathLike[str]] = (),
) -> list[Path]:
    """Remove old checkpoint directories of ours; call on one rank, after a save.

    Kept are the newest `keep_last` (at least one), the `save_top_k` of lowest loss (the best one always; -1 keeps
    all), and `protect`. Directories without a sound manifest are not ours to judge and stay. Leftovers of killed
    saves are cleaned up.

    Args:
        directory: the folder of checkpoints.
        keep_last: number of newest ones to keep, by step.
        save_top_k: number of best ones to keep.
        protect: never removed: the checkpoint that this run resumed from.

    Returns:
        What was removed. A failure to delete is a warning.
    """
    folder = Path(directory).expanduser()
    for leftover in [p for p in folder.iterdir() if p.name.startswith((TMP_PREFIX, TRASH_PREFIX))]:
        discard(leftover)
    recover(folder)
    complete: list[tuple[Path, dict[str, Any]]] = []
    for path in folder.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            try:
                manifest = verify_manifest(path, payload=False)
            except CheckpointError as error:
                log.warning("not counted, and left alone: %s", error)
                continue
            if manifest is not None:
                complete.append((path, manifest))
    if save_top_k < 0:
        return []
    complete.sort(key=lambda item: (float(item[1].get("step") or 0), item[0].name), reverse=True)
    kept = {path.resolve() for path, _ in complete[: max(keep_last, 1)]}
    finite = [item for item in complete if _loss(item[1]) < math.inf]
    kept |= {path.resolve() for path, _ in sorted(finite, key=lambda item: _loss(item[1]))[: max(save_top_k, 1)]}
    guarded = [Path(p).expanduser().resolve() for p in protect]
    removed = []
    for path, _ in complete:
        real = path.resolve()
        if real in kept or any(p == real or real in p.parents for p in guarded):
            continue
        trash = path.with_name(f"{TRASH_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}"[:250])
        try:
            os.rename(path, trash)  # gone at once: a half-deleted directory never looks like a checkpoint
        except OSError as error:
            log.warning("%s: could not be removed (%s)", path, error)
            continue
        discard(trash)
        removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def directory_lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder of checkpoints for one job; call on rank 0.

    A lock of a process of this host that has ended is taken over, with a message.

    Raises:
        CheckpointError: another job holds it; the message names its process and host.
    """
    folder = Path(directory).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / LOCK, {"pid": os.getpid(), "host": socket.gethostname(), "id": uuid.uuid4().hex}
    staged = folder / f"{TMP_PREFIX}lock-{mine['id']}"
    staged.write_text(json.dumps(mine), encoding="utf-8")
    try:
        while True:
            try:
                os.link(staged, path)  # fails if it exists, and shows no half-written lock to others
                break
            except FileExistsError:
                _take_over(path, mine)
    finally:
        staged.unlink(missing_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8")).get("id") == mine["id"]:
                path.unlink()


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
    if host == mine["host"] and not _alive(pid):
        log.warning("%s: taken over from process %d, which has ended", path, pid)
        path.unlink(missing_ok=True)
        return
    raise CheckpointError(
        f"{path.parent}: process {pid} on {host} writes checkpoints here; wait for it, choose another folder, or "
        f"remove {path} if that process is gone"
    )
