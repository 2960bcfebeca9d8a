"""Validation and pruning of a run's checkpoints, and the checkpoint to resume from."""

import contextlib
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from mmdistill.checkpoint.errors import CheckpointError, name_setting
from mmdistill.checkpoint.formats.manifest import read_manifest, verify_manifest
from mmdistill.checkpoint.formats.names import MANIFEST, TMP_PREFIX, TRASH_PREFIX
from mmdistill.checkpoint.locate import existing_path
from mmdistill.checkpoint.read import Checkpoint, open_checkpoint
from mmdistill.checkpoint.write import fsync_path, recover_interrupted_saves, remove_quietly
from mmdistill.console import log_once
from mmdistill.distributed.collectives import get_rank, run_on_all_ranks
from mmdistill.errors import suggest_nearest
from mmdistill.files import describe_write_error, rename_directory, replace_file

log = logging.getLogger(__name__)


class _Candidate(NamedTuple):
    path: Path
    checkpoint: Checkpoint | None  # None if it cannot be opened
    step: float  # inf if unknown, so that a damaged newest checkpoint is checked, and warned about, first


def _step(checkpoint: Checkpoint) -> float:
    """Optimizer steps of a checkpoint; inf if it does not store them."""
    manifest = read_manifest(checkpoint.root) if checkpoint.tag is not None else None
    return float((manifest or checkpoint.stored_meta).get("step", math.inf))


def _candidates(directory: Path) -> list[_Candidate]:
    """DeepSpeed directories and ``.ckpt`` files in a folder, newest first."""
    found = []
    for path in directory.iterdir():
        if path.name.startswith(".") or not (path.is_dir() or path.suffix == ".ckpt"):
            continue
        checkpoint, step = None, math.inf
        with contextlib.suppress(CheckpointError, OSError):
            checkpoint = open_checkpoint(path, verify=False)
            step = _step(checkpoint)
        found.append((_Candidate(path, checkpoint, step), path.stat().st_mtime_ns))
    found.sort(key=lambda item: (item[0].step, item[1], item[0].path.name), reverse=True)
    return [candidate for candidate, _ in found]


def latest_valid_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Find the newest checkpoint of a folder, by step, that passes `Checkpoint.verify`; for ``resume=auto``.

    Considers DeepSpeed directories and ``.ckpt`` files. Interrupted saves over a checkpoint are repaired and
    incomplete ``.tmp-*`` are ignored. A warning gives the reason for each skipped checkpoint.

    Returns:
        Its path, or None if there is none (also if the folder does not exist).
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        return None
    recover_interrupted_saves(folder)
    for candidate in _candidates(folder):
        try:
            (candidate.checkpoint or open_checkpoint(candidate.path)).verify()
        except (CheckpointError, OSError) as error:
            log.warning("skipping an invalid checkpoint: %s", error)
            continue
        return candidate.path
    return None


def _loss(path: Path, summary: Mapping[str, Any]) -> float:
    """Mean loss of the epoch; inf if unknown or if the epoch was interrupted, which makes the mean not comparable."""
    loss = summary.get("loss")
    is_full_epoch = "-step=" not in path.name
    return float(loss) if is_full_epoch and isinstance(loss, (int, float)) and math.isfinite(loss) else math.inf


def _read_summary(path: Path) -> tuple[Checkpoint, dict[str, Any]] | None:
    """Open a checkpoint that may be pruned, and read its step and loss; None if it may not.

    Directories with a manifest and ``epoch=`` files of mmdistill may be pruned.

    Raises:
        CheckpointError: it may be pruned but is damaged.
    """
    if path.is_dir():
        manifest = verify_manifest(path, payload=False)
        return None if manifest is None else (open_checkpoint(path, verify=False), manifest)
    if path.suffix != ".ckpt" or not path.name.startswith("epoch="):
        return None
    checkpoint = open_checkpoint(path, verify=False)
    return (checkpoint, checkpoint.stored_meta) if checkpoint.stored_meta.get("kind") == "distill" else None


def _prune_candidates(folder: Path) -> list[tuple[Checkpoint, dict[str, Any]]]:
    """Checkpoints that may be pruned, with their summaries, newest first."""
    found = []
    for path in [p for p in folder.iterdir() if not p.name.startswith(".")]:
        try:
            if (summary := _read_summary(path)) is not None:
                found.append(summary)
        except (CheckpointError, OSError) as error:
            log.warning("excluded from pruning: %s", error)
    return sorted(found, key=lambda item: (float(item[1].get("step") or 0), item[0].path.name), reverse=True)


def remove_interrupted_saves(folder: Path) -> None:
    """Remove temporary files of interrupted saves, and repair those over a checkpoint."""
    for temporary in [p for p in folder.iterdir() if p.name.startswith((TMP_PREFIX, TRASH_PREFIX))]:
        remove_quietly(temporary)
    recover_interrupted_saves(folder)


def _remove(path: Path) -> bool:
    trash = path.with_name(f"{TRASH_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}"[:250])
    try:
        # so that a partly deleted directory never looks like a checkpoint
        rename_directory(path, trash, last=(MANIFEST,))
    except OSError as error:
        log.warning("%s: could not be removed (%s)", path, error)
        return False
    remove_quietly(trash)
    return True


def prune(
    directory: str | os.PathLike[str],
    *,
    keep_last: int | None,
    save_top_k: int | None,
    protect: Iterable[str | os.PathLike[str]] = (),
    external_losses: Mapping[str, float] | None = None,
    scores: Mapping[str, float] | None = None,
) -> list[Path]:
    """Remove old checkpoints that mmdistill wrote; call on one rank, after a save.

    Keeps the newest `keep_last` (at least one), the `save_top_k` of lowest loss (at least one; -1 keeps all) and
    `protect`. Removes nothing unless the newest one passes `Checkpoint.verify`. Directories without a valid manifest
    and files that are not named ``epoch=`` are kept. Temporary files of interrupted saves are removed.

    Args:
        directory: the folder of checkpoints.
        keep_last: number of newest checkpoints to keep, by step; None: decided by `save_top_k`.
        save_top_k: number of best checkpoints to keep; None: decided by `keep_last`. Both None: all are kept.
        protect: paths that are never removed, such as the checkpoint that this run resumed from.
        external_losses: losses of checkpoints in other folders, by path; they count among the best and are not removed.
        scores: values by path that replace all losses, lower is better.

    Returns:
        Paths of the removed checkpoints. A failure to delete is a warning.
    """
    folder = Path(directory).expanduser()
    remove_interrupted_saves(folder)
    if (keep_last is None and save_top_k is None) or (save_top_k is not None and save_top_k < 0):
        return []
    complete = _prune_candidates(folder)
    losses = {checkpoint.path.resolve(): _loss(checkpoint.path, summary) for checkpoint, summary in complete}
    for other, loss in (external_losses or {}).items():
        losses.setdefault(Path(other).resolve(), loss)
    if scores is not None:
        losses = {Path(path).resolve(): score for path, score in scores.items()}
    ranked = [path for path, loss in losses.items() if math.isfinite(loss) and path.exists()]
    best = sorted(ranked, key=losses.__getitem__)[: max(save_top_k or 0, 1)]
    newest = [checkpoint.path for checkpoint, _ in complete[: max(keep_last or 0, 1)]]
    kept = {Path(p).expanduser().resolve() for p in (*newest, *best, *protect)}
    kept |= {parent for path in kept for parent in path.parents}  # `protect` may name a file in a directory
    to_remove = [checkpoint.path for checkpoint, _ in complete if checkpoint.path.resolve() not in kept]
    if not to_remove:
        return []
    try:
        complete[0][0].verify()
    except (CheckpointError, OSError) as error:
        log.warning("no checkpoint was pruned, because the newest one is damaged: %s", error)
        return []
    return [path for path in to_remove if _remove(path)]


def best_checkpoint(losses: Mapping[str, float]) -> Path | None:
    """Return the existing checkpoint of lowest finite loss, or None."""
    existing = [path for path, loss in losses.items() if math.isfinite(loss) and Path(path).exists()]
    return Path(min(existing, key=lambda path: losses[path])) if existing else None


def link_or_copy(path: Path, name: Path) -> None:
    """Hard-link the file `path` to `name`, replacing an existing file; copy it if the file system has no links.

    Raises:
        CheckpointError: not writable. The previous file at `name` is unchanged.
    """
    staged = name.with_name(TMP_PREFIX + uuid.uuid4().hex)
    try:
        try:
            os.link(path, staged)
        except OSError:
            log_once(f"{name.parent}: this file system has no hard links, so {name.name} is a copy, not a link")
            shutil.copyfile(path, staged)
            fsync_path(staged)
        replace_file(staged, name)
        fsync_path(name.parent)
    except OSError as error:
        reason = describe_write_error(error, path.stat().st_size)
        raise CheckpointError(f"{name}: not written ({reason}); {path} is complete") from error
    finally:
        remove_quietly(staged)


def find_resume(resume: str | None, directory: Path) -> Path | None:
    """Find the checkpoint to resume from: the path `resume`, or with ``auto`` the newest valid one of `directory`.

    ``auto`` without any checkpoint returns None, so that the first start of a requeued job starts from scratch.
    Collective: only rank 0 searches and verifies; all ranks return its result.

    Raises:
        CheckpointError: the same on all ranks. The path does not exist; or `directory` holds checkpoints that would be
            taken for newer ones than those of this run: any checkpoint for a fresh run, later ones for a resumed run.
    """

    def search() -> Path | None:
        if resume == "auto":
            return latest_valid_checkpoint(directory)
        source = resume_path(resume) if resume is not None else None
        _check_no_later_checkpoints(directory, source)
        return source

    found = run_on_all_ranks(lambda: search() if get_rank() == 0 else None, error_class=CheckpointError)
    return cast(Path | None, found[0])


def resume_path(resume: str) -> Path:
    """The path of `resume`, which is not ``auto``. Raises `CheckpointError` that names the key."""
    hint = suggest_nearest(resume.lower(), ["auto"])
    if hint and not Path(resume).expanduser().exists():
        raise CheckpointError(f"resume={resume}: there is no such path{hint}")
    with name_setting("resume"):
        return existing_path(resume)


def _check_no_later_checkpoints(directory: Path, source: Path | None) -> None:
    with name_setting("resume"):
        step = _step(open_checkpoint(source)) if source else -1.0
    step = step if math.isfinite(step) else 0.0
    for candidate in _candidates(directory) if directory.is_dir() else ():
        if not candidate.path.name.startswith(("epoch=", "last")) or candidate.step <= step:
            continue
        if source is None:
            raise CheckpointError(
                f"{directory}: contains checkpoints of an earlier run ({candidate.path.name}); continue it with "
                "resume=auto, choose another hydra.run.dir, or move them away"
            )
        if math.isfinite(candidate.step):
            raise CheckpointError(
                f"{directory}: contains {candidate.path.name} of step {candidate.step:.0f}, later than resume={source} "
                f"(step {step:.0f}); continue it with resume=auto, choose another hydra.run.dir, or move it away"
            )
