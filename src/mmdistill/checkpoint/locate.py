"""Locate a checkpoint: the file, or the directory and its tag, that a path refers to."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.names import (
    FILE_SUFFIXES,
    HUGGINGFACE_WEIGHTS,
    LATEST,
    MANIFEST,
    META,
    MODEL_STATES,
    OPTIM_STATES,
    SHARD_INDEX_SUFFIX,
    TAG,
    is_tag,
)
from mmdistill.errors import format_count
from mmdistill.files import OLD_PREFIX, require_utf8_name

log = logging.getLogger(__name__)

_MAX_LISTED = 12  # paths listed in an error
_SHARD_NAME = re.compile(r"(.+)-\d+-of-\d+(\.safetensors|\.bin)")


def _tags(directory: Path) -> list[Path]:
    return sorted(d for d in directory.iterdir() if d.is_dir() and is_tag(d))


def _huggingface_weights(directory: Path) -> Path | None:
    """The weights file, or the index of the shards, in a folder of `save_pretrained`; None if it has neither."""
    return next((directory / name for name in HUGGINGFACE_WEIGHTS if (directory / name).is_file()), None)


def _find_below(directory: Path, depth: int = 3) -> list[Path]:
    found = []
    for child in sorted(p for p in directory.iterdir() if not p.name.startswith(".")):
        if not child.is_dir():
            found += [child] if child.name.endswith(FILE_SUFFIXES) else []
        elif (child / LATEST).exists() or (child / MANIFEST).exists() or _tags(child) or _huggingface_weights(child):
            found.append(child)
        elif depth:
            found += _find_below(child, depth - 1)
    return found


def _modified(path: Path) -> tuple[int, bool]:
    """Sort key: ``last.ckpt`` is a link to the newest checkpoint of its folder."""
    return path.stat().st_mtime_ns, path.stem == "last"


def _latest_tag(root: Path) -> Path:
    """Return the tag directory that the file ``latest`` names."""
    latest, tags = root / LATEST, _tags(root)
    try:
        name = latest.read_text(encoding="utf-8").strip()
        problem = f"names '{name}', which contains no *{MODEL_STATES}" if name else "is empty and should name the tag"
    except (OSError, UnicodeDecodeError) as error:
        name, problem = "", f"unreadable ({error})"
    if not name or not is_tag(root / name):
        names = ", ".join(repr(tag.name) for tag in tags) or f"no directory with *{MODEL_STATES}"
        raise CorruptCheckpointError(f"{latest}: {problem}; there is {names}: give the path of that directory")
    return root / name


def _locate_in_directory(given: Path, path: Path) -> tuple[Path, Path | None]:
    if is_tag(path):
        return _root_of(path), path
    if (path / LATEST).exists():
        return path, _latest_tag(path)
    if weights := _huggingface_weights(path):
        return weights, None
    if (path / MANIFEST).exists():
        raise CorruptCheckpointError(f"{path}: has a manifest but no tag directory; use another checkpoint")
    tags = _tags(path)
    if len(tags) == 1 and (tags[0].name == TAG or not (tags[0] / LATEST).exists()):
        log.info("%s has no file 'latest'; using its only tag '%s'", path, tags[0].name)
        return path, tags[0]
    candidates = tags or _find_below(path)
    if candidates:
        candidates = sorted(candidates, key=_modified, reverse=True)
        listed = "".join(f"\n  {candidate}" for candidate in candidates[:_MAX_LISTED])
        more = f"\n  ... and {len(candidates) - _MAX_LISTED} more" if len(candidates) > _MAX_LISTED else ""
        if len(candidates) == 1:
            raise CheckpointError(f"{given}: contains one checkpoint; give its path:{listed}")
        count = format_count(len(candidates), "checkpoint")
        raise CheckpointError(f"{given}: contains {count}; give one of these, newest first:{listed}{more}")
    raise CheckpointError(
        f"{given}: no checkpoint in this directory (no 'latest', no *{MODEL_STATES}, no weights file); "
        "`mmdistill find-checkpoints` lists the paths of checkpoints"
    )


def _root_of(tag: Path) -> Path:
    """The checkpoint directory of a tag, or the tag itself if it is in a folder of unrelated directories."""
    root = tag.parent
    if (root / MANIFEST).exists() or (root / META).exists() or tag.name == TAG:
        return root
    try:
        return root if (root / LATEST).read_text(encoding="utf-8").strip() == tag.name else tag
    except (OSError, UnicodeDecodeError):
        return tag


def existing_path(path: str | os.PathLike[str]) -> Path:
    """Expand ``~`` and check that the path exists. If a save over it was interrupted, return the previous checkpoint.

    Raises:
        CheckpointError: the path does not exist; the message lists the closest existing folder.
        InputError: the path is not UTF-8.
    """
    resolved = Path(path).expanduser()
    require_utf8_name(resolved)
    try:
        if resolved.exists():
            return resolved
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{path}: {error.strerror}; give the path of a checkpoint") from error
    previous = resolved.with_name(f"{OLD_PREFIX}{resolved.name}")
    if resolved.name and previous.exists():
        log.warning(
            "%s: the save that replaces it was interrupted; using the previous checkpoint (%s)", resolved, previous.name
        )
        return previous
    folder = next(parent for parent in resolved.absolute().parents if parent.is_dir())
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".") and not _holds_only_this_run(path)]
        names = sorted(path.name for path in paths)[:_MAX_LISTED]
    except OSError:
        names = []
    raise CheckpointError(f"{path}: does not exist; {folder} contains {', '.join(map(repr, names)) or 'nothing'}")


def _holds_only_this_run(path: Path) -> bool:
    """Whether a folder is, or contains nothing else than, the run folder that Hydra has made for this command."""
    if not HydraConfig.initialized():
        return False
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if path not in (run_dir, *run_dir.parents):
        return False
    return all(run_dir in file.parents for file in path.rglob("*") if not file.is_dir())


def locate(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """Locate the checkpoint of a path: a checkpoint directory, its tag, a file in it, or a single file.

    Returns:
        For a DeepSpeed directory the directory of ``latest`` and ``meta.json``, and the tag directory with the
        ``*_states.pt`` files. Otherwise the file, and None.

    Raises:
        CheckpointError: nothing exists there, or it is a folder of several checkpoints (the message lists them).
        CorruptCheckpointError: ``latest`` is empty or invalid.
    """
    file = existing_path(path)
    if file.is_dir():
        return _locate_in_directory(Path(path), file)
    if file.name.endswith((MODEL_STATES, OPTIM_STATES)):
        return _root_of(file.parent), file.parent
    if file.name in (LATEST, META, MANIFEST):
        return _locate_in_directory(Path(path), file.parent)
    if shard := _SHARD_NAME.fullmatch(file.name):
        index = file.with_name(f"{shard[1]}{shard[2]}{SHARD_INDEX_SUFFIX}")
        if not index.exists():
            raise CheckpointError(f"{path}: one of several shards; {index.name}, which lists them, is missing: copy it")
        return index, None
    return file, None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CorruptCheckpointError` that names the file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{path}: unreadable ({error}); use another checkpoint") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path}: is not a JSON object; use another checkpoint")
    return content
