"""Locate a checkpoint: its format, its root directory and its files."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.names import (
    FILE_SUFFIXES,
    LATEST,
    MANIFEST,
    META,
    MODEL_STATES,
    OLD_PREFIX,
    OPTIM_STATES,
    TAG,
    CheckpointFormat,
)
from mmdistill.checkpoint.formats.safetensors_file import is_safetensors
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.errors import format_count

log = logging.getLogger(__name__)

_MAX_LISTED = 12  # paths listed in an error


@dataclass(frozen=True)
class Location:
    """Result of `locate`.

    Attributes:
        given: the path as given.
        format: layout on disk.
        root: the file, or the directory that holds ``latest``, ``meta.json`` and the tag (DeepSpeed).
        tag: the directory with the ``*_states.pt`` files (DeepSpeed only).
        content: content of a pickled file, with memory-mapped tensors. `locate` unpickles the file to find its format;
            readers use the content instead of unpickling again. None for DeepSpeed directories and ``.safetensors``.
    """

    given: Path
    format: CheckpointFormat
    root: Path
    tag: Path | None = None
    content: Any = field(default=None, repr=False, compare=False)

    @property
    def model_files(self) -> list[Path]:
        """``*_model_states.pt`` in rank order."""
        return rank_files(self.tag, MODEL_STATES) if self.tag else []

    @property
    def optim_files(self) -> list[Path]:
        """``*_optim_states.pt`` in rank order."""
        return rank_files(self.tag, OPTIM_STATES) if self.tag else []


def _rank_in_name(name: str) -> int:
    digits = name.partition("zero_pp_rank_")[2].partition("_")[0]
    return int(digits) if digits.isdigit() else 0


def rank_files(directory: Path, suffix: str) -> list[Path]:
    """List the files of a tag directory that end in `suffix`, by rank. No glob: the path may hold ``[`` or ``*``."""
    names = [name for name in os.listdir(directory) if name.endswith(suffix)]
    return [directory / name for name in sorted(names, key=lambda name: (_rank_in_name(name), name))]


def _has_model_states(directory: Path) -> bool:
    try:
        return any(name.endswith(MODEL_STATES) for name in os.listdir(directory))
    except OSError:
        return False


def _tags(directory: Path) -> list[Path]:
    return sorted(d for d in directory.iterdir() if d.is_dir() and _has_model_states(d))


def _looks_like_checkpoint(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_file():
        return path.suffix in FILE_SUFFIXES
    return path.is_dir() and ((path / LATEST).exists() or (path / MANIFEST).exists() or bool(_tags(path)))


def _find_below(directory: Path, depth: int = 3) -> list[Path]:
    found = []
    for child in sorted(directory.iterdir()):
        if _looks_like_checkpoint(child):
            found.append(child)
        elif depth and child.is_dir() and not child.name.startswith("."):
            found += _find_below(child, depth - 1)
    return found


def _format_paths(paths: list[Path]) -> str:
    shown = "".join(f"\n  {path}" for path in paths[:_MAX_LISTED])
    return shown + (f"\n  ... and {len(paths) - _MAX_LISTED} more" if len(paths) > _MAX_LISTED else "")


def _latest_tag(root: Path) -> Path:
    """Return the tag directory that the file ``latest`` names."""
    tags = _tags(root)
    found = (
        f"there is {', '.join(repr(t.name) for t in tags)}" if tags else "there is no directory with *_model_states.pt"
    )
    try:
        name = (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(
            f"{root / LATEST}: unreadable ({error}); {found}: give the path of that directory"
        ) from error
    if not name:
        raise CorruptCheckpointError(
            f"{root / LATEST}: is empty and should name the checkpoint's tag; {found}: give the path of that directory"
        )
    tag = root / name
    if not tag.is_dir() or not _has_model_states(tag):
        raise CorruptCheckpointError(
            f"{root / LATEST}: names '{name}', which contains no *_model_states.pt; {found}: give the path of that "
            "directory"
        )
    return tag


def _locate_directory(given: Path, path: Path) -> Location:
    if _has_model_states(path):
        root = path.parent if _is_root_of(path.parent, path) else path
        return Location(given, CheckpointFormat.DEEPSPEED, root, path)
    if (path / LATEST).exists():
        return Location(given, CheckpointFormat.DEEPSPEED, path, _latest_tag(path))
    if (path / "model.safetensors").is_file():
        return Location(given, CheckpointFormat.WEIGHTS, path / "model.safetensors")
    if (path / MANIFEST).exists():
        raise CorruptCheckpointError(f"{path}: has a manifest but no tag directory; use another checkpoint")
    tags = _tags(path)
    if (len(tags) == 1 and tags[0].name == TAG) or (len(tags) == 1 and not (tags[0] / LATEST).exists()):
        log.info("%s has no file 'latest'; using its only tag '%s'", path, tags[0].name)
        return Location(given, CheckpointFormat.DEEPSPEED, path, tags[0])
    candidates = tags or _find_below(path)
    if candidates:
        raise CheckpointError(
            f"{given}: contains {format_count(len(candidates), 'checkpoint')}; give one of{_format_paths(candidates)}"
        )
    raise CheckpointError(
        f"{given}: no checkpoint in this directory (no 'latest', no *_model_states.pt, no weights file); "
        "`mmdistill find-checkpoints` lists the paths of checkpoints"
    )


def _is_root_of(root: Path, tag: Path) -> bool:
    """Whether `root` is the checkpoint directory of `tag`, and not a folder of unrelated directories."""
    if (root / MANIFEST).exists() or (root / META).exists() or tag.name == TAG:
        return True
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip() == tag.name
    except (OSError, UnicodeDecodeError):
        return False


def format_of_content(content: Any) -> CheckpointFormat:
    """Format of a pickle by its content: Lightning or weights."""
    is_lightning = isinstance(content, Mapping) and "state_dict" in content and "pytorch-lightning_version" in content
    return CheckpointFormat.LIGHTNING if is_lightning else CheckpointFormat.WEIGHTS


def existing_path(path: str | os.PathLike[str]) -> Path:
    """Expand ``~`` and check that the path exists. If a save over it was interrupted, return the previous checkpoint.

    Raises:
        CheckpointError: the path does not exist; the message lists the closest existing folder.
    """
    resolved = Path(path).expanduser()
    if resolved.exists():
        return resolved
    previous = resolved.with_name(f"{OLD_PREFIX}{resolved.name}")
    if resolved.name and previous.exists():
        log.warning(
            "%s: the save that replaces it was interrupted; using the previous checkpoint (%s)", resolved, previous.name
        )
        return previous
    folder = resolved.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        names = sorted(n for n in os.listdir(folder) if not n.startswith("."))[:_MAX_LISTED]
    except OSError:
        names = []
    raise CheckpointError(f"{path}: does not exist; {folder} contains {', '.join(map(repr, names)) or 'nothing'}")


def locate(path: str | os.PathLike[str]) -> Location:
    """Locate the checkpoint of a path: a checkpoint directory, its tag, a file in it, or a single file.

    Raises:
        CheckpointError: nothing exists there, or it is a folder of several checkpoints (the message lists them).
        CorruptCheckpointError: ``latest`` is empty or invalid, or the file is truncated.
    """
    given, file = Path(path), existing_path(path)
    if file.is_dir():
        return _locate_directory(given, file)
    if file.name.endswith((MODEL_STATES, OPTIM_STATES)):
        root = file.parent.parent if _is_root_of(file.parent.parent, file.parent) else file.parent
        return Location(given, CheckpointFormat.DEEPSPEED, root, file.parent)
    if file.name in (LATEST, META, MANIFEST):
        return _locate_directory(given, file.parent)
    if file.stat().st_size == 0:
        raise CorruptCheckpointError(f"{file}: truncated: the file is empty (0 bytes); use another checkpoint")
    if is_safetensors(file):
        return Location(given, CheckpointFormat.WEIGHTS, file)
    if file.suffix in FILE_SUFFIXES:
        content = read_torch_file(file, verify=False)
        return Location(given, format_of_content(content), file, content=content)
    raise CheckpointError(f"{file}: not a known checkpoint format; expected a directory or {', '.join(FILE_SUFFIXES)}")


def detect_format(path: str | os.PathLike[str]) -> CheckpointFormat:
    """Format of a path at any level of the checkpoint. Raises the errors of `locate`."""
    return locate(path).format


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CorruptCheckpointError` that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{path}: unreadable ({error}); use another checkpoint") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path}: is not a JSON object; use another checkpoint")
    return content
