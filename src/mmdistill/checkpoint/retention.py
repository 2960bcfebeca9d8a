"""Which checkpoints of a run are complete, which may go, and whose folder it is."""

import contextlib
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.deepspeed_zero import read_zero
from mmdistill.checkpoint.formats.manifest import read_manifest, verify_manifest
from mmdistill.checkpoint.formats.names import TMP_PREFIX, TRASH_PREFIX, CheckpointFormat
from mmdistill.checkpoint.formats.torch_zip import is_zip, verify_zip
from mmdistill.checkpoint.locate import existing, locate
from mmdistill.checkpoint.read import read_meta
from mmdistill.checkpoint.write import discard, recover, sync
from mmdistill.distributed.collectives import get_rank, run_on_all_ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Candidate:
    path: Path
    step: float  # inf where it cannot be told, so that a damaged newest one is looked at, and warned about, first
    modified: int


def _step(path: Path) -> float:
    """Optimiser steps that a checkpoint has seen, whatever they counted in epochs; inf where it does not say."""
    place = locate(path)
    manifest = read_manifest(place.root) if place.format is CheckpointFormat.DEEPSPEED else None
    return float((manifest or read_meta(place)).get("step", math.inf))


def _candidates(directory: Path) -> list[_Candidate]:
    found = []
    for path in directory.iterdir():
        if path.name.startswith(".") or not (path.is_dir() or path.suffix == ".ckpt"):
            continue
        step = math.inf
        with contextlib.suppress(CheckpointError, OSError):
            step = _step(path)
        found.append(_Candidate(path, step, path.stat().st_mtime_ns))
    return sorted(found, key=lambda c: (c.step, c.modified, c.path.name), reverse=True)


def verify(path: Path) -> None:
    """Compare a checkpoint with the checksums it carries; one of others is read once instead.

    Raises:
        CheckpointError: why it cannot be used.
    """
    place = locate(path)
    if place.format is not CheckpointFormat.DEEPSPEED:
        if place.content is None:
            read_meta(place)
        elif is_zip(place.root):
            verify_zip(place.root)
    elif verify_manifest(place.root) is None:
        read_zero(place)
        for file in place.optim_files:
            verify_zip(file)


def latest_valid_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
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


def _loss(path: Path, facts: Mapping[str, Any]) -> float:
    """inf where there is none, and where an epoch was interrupted: a part's mean is no rank among whole epochs."""
    loss = facts.get("loss")
    whole = "-step=" not in path.name
    return float(loss) if whole and isinstance(loss, (int, float)) and math.isfinite(loss) else math.inf


def _facts(path: Path) -> dict[str, Any] | None:
    """Step and loss of a checkpoint that retention may judge: a directory with a sound manifest, or our ``epoch=``
    file. None for everything else.

    Raises:
        CheckpointError: it should be one and is damaged.
    """
    if path.is_dir():
        return verify_manifest(path, payload=False)
    if path.suffix != ".ckpt" or not path.name.startswith("epoch="):
        return None
    meta = read_meta(locate(path))
    return meta if meta.get("kind") == "distill" else None


def _judged(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """What retention may judge, newest first."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in [p for p in folder.iterdir() if not p.name.startswith(".")]:
        try:
            facts = _facts(path)
        except (CheckpointError, OSError) as error:
            log.warning("not counted, and left alone: %s", error)
            continue
        if facts is not None:
            found.append((path, facts))
    return sorted(found, key=lambda item: (float(item[1].get("step") or 0), item[0].name), reverse=True)


def _remove(path: Path) -> bool:
    trash = path.with_name(f"{TRASH_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}"[:250])
    try:
        os.rename(path, trash)  # gone at once: a half-deleted directory never looks like a checkpoint
    except OSError as error:
        log.warning("%s: could not be removed (%s)", path, error)
        return False
    discard(trash)
    return True


def prune(
    directory: str | os.PathLike[str],
    *,
    keep_last: int | None,
    save_top_k: int | None,
    protect: Iterable[str | os.PathLike[str]] = (),
    elsewhere: Mapping[str, float] | None = None,
    ranks: Mapping[str, float] | None = None,
) -> list[Path]:
    """Remove old checkpoints of ours; call on one rank, after a save.

    Kept are the newest `keep_last` (at least one), the `save_top_k` of lowest loss (the best one always; -1 keeps
    all), and `protect`. Nothing goes unless the newest one verifies, byte by byte. Directories without a sound
    manifest and files that are not named ``epoch=`` are not ours to judge and stay. Leftovers of killed saves are
    cleaned up.

    Args:
        directory: the folder of checkpoints.
        keep_last: number of newest ones to keep, by step; None: no number of its own.
        save_top_k: number of best ones to keep; None: no number of its own. Both None: all stay.
        protect: never removed: the checkpoint that this run resumed from.
        elsewhere: losses of checkpoints in other folders, by path: they rank among the best, and are not removed.
        ranks: what the best go by in place of all losses, by path, the lowest first.

    Returns:
        What was removed. A failure to delete is a warning.
    """
    folder = Path(directory).expanduser()
    for leftover in [p for p in folder.iterdir() if p.name.startswith((TMP_PREFIX, TRASH_PREFIX))]:
        discard(leftover)
    recover(folder)
    if (keep_last is None and save_top_k is None) or (save_top_k is not None and save_top_k < 0):
        return []
    complete = _judged(folder)
    kept = {path.resolve() for path, _ in complete[: max(keep_last or 0, 1)]}
    losses = {path.resolve(): _loss(path, facts) for path, facts in complete}
    for other, loss in (elsewhere or {}).items():
        if Path(other).exists():
            losses.setdefault(Path(other).resolve(), loss)
    if ranks is not None:
        losses = {Path(path).resolve(): rank for path, rank in ranks.items() if Path(path).exists()}
    finite = sorted((path for path, loss in losses.items() if math.isfinite(loss)), key=lambda path: losses[path])
    kept |= set(finite[: max(save_top_k or 0, 1)])
    guarded = [Path(p).expanduser().resolve() for p in protect]
    going = [
        path
        for path, _ in complete
        if path.resolve() not in kept and not any(p == path.resolve() or path.resolve() in p.parents for p in guarded)
    ]
    if not going:
        return []
    try:
        verify(complete[0][0])
    except (CheckpointError, OSError) as error:
        log.warning("no checkpoint was removed, since the newest one is damaged: %s", error)
        return []
    return [path for path in going if _remove(path)]


def best_of(losses: Mapping[str, float]) -> Path | None:
    """The checkpoint of lowest loss among those that still exist."""
    there = [path for path, loss in losses.items() if math.isfinite(loss) and Path(path).exists()]
    return Path(min(there, key=lambda path: losses[path])) if there else None


def link_or_copy(path: Path, name: Path) -> None:
    """Make `name` a second name of the file `path`, replacing what had it; a copy where the disk has no links."""
    staged = name.with_name(TMP_PREFIX + uuid.uuid4().hex)
    try:
        try:
            os.link(path, staged)
        except OSError:
            shutil.copyfile(path, staged)
        os.replace(staged, name)
        sync(name.parent)
    finally:
        staged.unlink(missing_ok=True)


def find_resume(resume: str | None, directory: Path) -> Path | None:
    """The checkpoint that `resume` means: a path as given, or with ``auto`` the newest whole one of `directory`.

    ``auto`` without any checkpoint starts from scratch, which is what the first start of a requeued job needs.
    Collective: rank 0 alone searches and verifies, and tells the others.

    Raises:
        CheckpointError: the same on all ranks. The path does not exist; or `directory` holds checkpoints that would
            look newer than what this run writes: any for a fresh run, later ones for a resumed one.
    """

    def search() -> Path | None:
        if resume == "auto":
            return latest_valid_checkpoint(directory)
        source = existing(resume) if resume is not None else None
        _refuse_stale(directory, source)
        return source

    found = run_on_all_ranks(lambda: search() if get_rank() == 0 else None, error_class=CheckpointError)
    return cast(Path | None, found[0])


def _refuse_stale(directory: Path, source: Path | None) -> None:
    done = _step(source) if source else -1.0
    done = done if math.isfinite(done) else 0.0
    for held in _candidates(directory) if directory.is_dir() else ():
        if not held.path.name.startswith(("epoch=", "last")) or held.step <= done:
            continue
        if source is None:
            raise CheckpointError(
                f"{directory}: holds checkpoints of an earlier run ({held.path.name}); continue it with resume=auto, "
                "choose another hydra.run.dir, or move them away"
            )
        if math.isfinite(held.step):
            raise CheckpointError(
                f"{directory}: holds {held.path.name} of step {held.step:.0f}, later than resume={source} (step "
                f"{done:.0f}); continue it with resume=auto, choose another hydra.run.dir, or move it away"
            )
