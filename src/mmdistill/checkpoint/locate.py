"""Find out what a path is: which format, which directory level, which files."""

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
from mmdistill.checkpoint.formats.torch_zip import load_pickle

log = logging.getLogger(__name__)

_LISTED = 12  # candidates named in an error


@dataclass(frozen=True)
class Location:
    """A path that has been understood.

    Attributes:
        given: the path as it was given.
        format: the layout.
        root: the file itself, or the directory that holds ``latest``, ``meta.json`` and the tag (DeepSpeed).
        tag: the directory with the ``*_states.pt`` files (DeepSpeed only).
        content: what a pickled file holds, with memory-mapped tensors: its format is known only from its content, and
            readers do not unpickle it again. None for DeepSpeed directories and ``.safetensors``.
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


def _rank(name: str) -> int:
    after = name.partition("zero_pp_rank_")[2]
    digits = after.partition("_")[0]
    return int(digits) if digits.isdigit() else 0


def rank_files(directory: Path, suffix: str) -> list[Path]:
    """Files of a tag directory that end in `suffix`, by rank. No glob: the path may hold ``[``, ``*`` or ``?``."""
    names = [name for name in os.listdir(directory) if name.endswith(suffix)]
    return [directory / name for name in sorted(names, key=lambda name: (_rank(name), name))]


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


def _children(directory: Path, depth: int = 3) -> list[Path]:
    found = []
    for child in sorted(directory.iterdir()):
        if _looks_like_checkpoint(child):
            found.append(child)
        elif depth and child.is_dir() and not child.name.startswith("."):
            found += _children(child, depth - 1)
    return found


def _describe(paths: list[Path]) -> str:
    shown = "".join(f"\n  {path}" for path in paths[:_LISTED])
    return shown + (f"\n  ... and {len(paths) - _LISTED} more" if len(paths) > _LISTED else "")


def _latest_tag(root: Path) -> Path:
    """The tag directory that ``latest`` names."""
    tags = _tags(root)
    have = (
        f"there is {', '.join(repr(t.name) for t in tags)}" if tags else "there is no directory with *_model_states.pt"
    )
    try:
        name = (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(
            f"{root / LATEST}: unreadable ({error}); {have}: give that directory itself"
        ) from error
    if not name:
        raise CorruptCheckpointError(
            f"{root / LATEST}: is empty and should name the checkpoint's tag; {have}: give that itself"
        )
    tag = root / name
    if not tag.is_dir() or not _has_model_states(tag):
        raise CorruptCheckpointError(
            f"{root / LATEST}: names '{name}', which holds no *_model_states.pt; {have}: give that itself"
        )
    return tag


def _locate_directory(given: Path, path: Path) -> Location:
    if _has_model_states(path):
        return Location(given, CheckpointFormat.DEEPSPEED, path.parent if _owns(path.parent, path) else path, path)
    if (path / LATEST).exists():
        return Location(given, CheckpointFormat.DEEPSPEED, path, _latest_tag(path))
    if (path / "model.safetensors").is_file():
        return Location(given, CheckpointFormat.WEIGHTS, path / "model.safetensors")
    if (path / MANIFEST).exists():
        raise CorruptCheckpointError(f"{path}: its manifest is there but not its tag directory; use another checkpoint")
    tags = _tags(path)
    if (len(tags) == 1 and tags[0].name == TAG) or (len(tags) == 1 and not (tags[0] / LATEST).exists()):
        log.info("%s has no file 'latest'; using its only tag '%s'", path, tags[0].name)
        return Location(given, CheckpointFormat.DEEPSPEED, path, tags[0])
    candidates = tags or _children(path)
    if candidates:
        raise CheckpointError(
            f"{given}: a folder of {len(candidates)} checkpoints, not one; give one of{_describe(candidates)}"
        )
    raise CheckpointError(
        f"{given}: no checkpoint in this directory (no 'latest', no *_model_states.pt, no weights file)"
    )


def _owns(root: Path, tag: Path) -> bool:
    """Whether `root` is the checkpoint that `tag` belongs to, rather than a folder of unrelated ones."""
    if (root / MANIFEST).exists() or (root / META).exists() or tag.name == TAG:
        return True
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip() == tag.name
    except (OSError, UnicodeDecodeError):
        return False


def content_format(content: Any) -> CheckpointFormat:
    """Lightning or weights, from what a pickle holds."""
    lightning = isinstance(content, Mapping) and "state_dict" in content and "pytorch-lightning_version" in content
    return CheckpointFormat.LIGHTNING if lightning else CheckpointFormat.WEIGHTS


def is_safetensors(path: Path) -> bool:
    """By its first bytes: 8 bytes of length, then a JSON object. The name decides only where they are missing."""
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (
        len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27
    )


def existing(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` expanded. A directory whose re-save was interrupted is found under its kept name.

    Raises:
        CheckpointError: nothing is there; the message names what is nearby.
    """
    where = Path(path).expanduser()
    if where.exists():
        return where
    kept = where.with_name(f"{OLD_PREFIX}{where.name}")
    if where.name and kept.exists():
        log.warning(
            "%s: a save over it was interrupted; using the checkpoint that stood there before (%s)", where, kept.name
        )
        return kept
    near = where.parent
    while not near.is_dir() and near != near.parent:
        near = near.parent
    try:
        names = sorted(n for n in os.listdir(near) if not n.startswith("."))[:_LISTED]
    except OSError:
        names = []
    raise CheckpointError(f"{path}: does not exist; {near} holds {', '.join(map(repr, names)) or 'nothing'}")


def locate(path: str | os.PathLike[str]) -> Location:
    """Understand a path: a checkpoint directory, its tag, a file inside it, or a single file.

    Raises:
        CheckpointError: nothing there, or a folder of several checkpoints (the message lists them).
        CorruptCheckpointError: ``latest`` is empty or names nothing, or the file is cut off.
    """
    given, where = Path(path), existing(path)
    if where.is_dir():
        return _locate_directory(given, where)
    if where.name.endswith((MODEL_STATES, OPTIM_STATES)):
        root = where.parent.parent if _owns(where.parent.parent, where.parent) else where.parent
        return Location(given, CheckpointFormat.DEEPSPEED, root, where.parent)
    if where.name in (LATEST, META, MANIFEST):
        return _locate_directory(given, where.parent)
    if where.stat().st_size == 0:
        raise CorruptCheckpointError(f"{where}: truncated: the file is empty (0 bytes); use another checkpoint")
    if is_safetensors(where):
        return Location(given, CheckpointFormat.WEIGHTS, where)
    if where.suffix in FILE_SUFFIXES:
        content = load_pickle(where, verify=False)
        return Location(given, content_format(content), where, content=content)
    raise CheckpointError(
        f"{where}: not a checkpoint that is known here; expected a directory or {', '.join(FILE_SUFFIXES)}"
    )


def detect_format(path: str | os.PathLike[str]) -> CheckpointFormat:
    """Which of the three layouts a path is, at whatever level it was given. Raises as `locate` does."""
    return locate(path).format


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of ours. Raises `CorruptCheckpointError` naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{path}: unreadable ({error}); use another checkpoint") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path}: should hold a JSON object; use another checkpoint")
    return content
